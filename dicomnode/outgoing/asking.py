"""What a result asks for: a row of the outbox for each destination that is to have it.

Called in the transaction that stores the result, so that neither is there without the other.
"""

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.model import DeliveryKind
from dicomnode.store import Ask, PendingOffset


class Asking:
    """Asks for what the settings say is to go out by itself.

    What was asked for before is asked for anew in any case: who was told of it is to hear of what
    it became.
    """

    def __init__(self, settings: Settings) -> None:
        deliver = settings.deliver
        self._settle = timedelta(seconds=deliver.settle_seconds)
        self._recent = timedelta(days=deliver.recent_days)
        self._newest = deliver.registration_pairs == "newest"
        self._report = deliver.report
        self._pair = [
            *((DeliveryKind.REGISTRATION, ae_title) for ae_title in deliver.registration),
            *((DeliveryKind.WEBHOOK, url) for url in deliver.webhooks),
        ]

    def curve_stored(self, session: Session, series_uid: str, now: datetime) -> None:
        """Ask for what is due about a Series that has a new curve."""
        if not self._report:
            return
        asks = [Ask(DeliveryKind.REPORT, ae_title, series_uid) for ae_title in self._report]
        recent = self._recent_of(session, store.studies_of(session, [series_uid]).values(), now)
        self._ask(session, asks if recent else [], asks, now)

    def offsets_stored(
        self, session: Session, pairs: Iterable[PendingOffset], now: datetime
    ) -> None:
        """Ask for what is due about pairs with a new offset: once for each two Studies."""
        if not self._pair:
            return
        series = {(p.fixed_series, p.moving_series) for p in pairs}
        studies = store.studies_of(session, {uid for pair in series for uid in pair})
        found = {(studies[f], studies[m]) for f, m in series if f in studies and m in studies}
        asks = [
            Ask(kind, destination, fixed, moving)
            for fixed, moving in found
            if fixed != moving
            for kind, destination in self._pair
        ]
        recent = self._recent_of(session, {ask.subject for ask in asks}, now)
        newest = store.newest_studies(session, recent) if self._newest else recent
        wanted = [
            ask
            for ask in asks
            if ask.subject in (newest if ask.kind is DeliveryKind.REGISTRATION else recent)
        ]
        self._ask(session, wanted, asks, now)

    def _recent_of(self, session: Session, study_uids: Collection[str], now: datetime) -> set[str]:
        """Return those Studies that are not too old to be told of for the first time."""
        if not self._recent:
            return set(study_uids)
        # Local time, as the scanner wrote it: a day more or less does not matter here.
        first = (now - self._recent).date()
        times = store.study_times(session, study_uids)
        return {uid for uid, when in times.items() if when is None or when.date() >= first}

    def _ask(
        self, session: Session, wanted: Collection[Ask], asks: Collection[Ask], now: datetime
    ) -> None:
        others = set(asks) - set(wanted)
        known = store.known_asks(session, others) if others else set()
        store.ask_deliveries(session, [*wanted, *known], now, now + self._settle)


def destinations(settings: Settings) -> set[tuple[DeliveryKind, str, str]]:
    """Return (kind, destination, rule) of all that the settings send anywhere."""
    deliver = settings.deliver
    return {
        *((DeliveryKind.REGISTRATION, ae_title, "") for ae_title in deliver.registration),
        *((DeliveryKind.REPORT, ae_title, "") for ae_title in deliver.report),
        *((DeliveryKind.WEBHOOK, url, "") for url in deliver.webhooks),
        *((DeliveryKind.FORWARD, r.send_to, r.name) for r in settings.rule if r.send_to),
        *((DeliveryKind.WEBHOOK, r.webhook, r.name) for r in settings.rule if r.webhook),
    }
