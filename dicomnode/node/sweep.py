"""Drops held pixels that nobody wants any more.

Reads what is held and what the database says of it, removes files; the database stays as it is.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from enum import Enum, auto

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.held import Held, HeldSeries
from dicomnode.model import DeliveryState, SeriesState
from dicomnode.store import Forward, Wanting

logger = logging.getLogger(__name__)

# Of a Series that the database does not know. Pixels are held before rows are stored, so that each
# is one for a moment; for longer, where the database was restored from a backup: a person may
# import them, and has `rule_days` for it while there is room.
UNKNOWN = timedelta(days=1)
TELL = timedelta(minutes=10)  # between lines that say that the disk is short


class SweepStage:
    """Looks through the held pixels of one spool, under its lease.

    The worker alone puts and drops, both in one thread: nothing comes between a look at the
    database and what is dropped after it.
    """

    def __init__(
        self,
        engine: Engine,
        held: Held,
        rules: Collection[str],
        rule_days: float,
        late_seconds: float = 0.0,
        watermark_bytes: int = 0,
    ) -> None:
        """Make a stage.

        Parameters
        ----------
        rules
            Names of the rules that there are: nobody serves the others.
        rule_days
            How long pixels wait for a person once a delivery was given up, or where the database
            does not know them.
        late_seconds
            How long they stay, from the last slice of their Series on, though no rule wants them.
        watermark_bytes
            Below so many free bytes they wait for neither, the oldest first.
        """
        self.engine, self.held = engine, held
        self.rules = frozenset(rules)
        self.age = timedelta(days=rule_days)
        self.late = timedelta(seconds=late_seconds)
        self.watermark_bytes = watermark_bytes
        self._told: datetime | None = None

    def step(self, now: datetime) -> int:
        """Drop all that nobody wants, and return of how many Series that was."""
        try:
            found = sorted(self.held.series(), key=lambda series: series.changed_at)
        except OSError as exc:  # in its way alone: what else the worker does goes on
            logger.warning("pixels not dropped", extra={"reason": exc.strerror})
            return 0
        if not found:
            return 0
        with store.reading(self.engine) as session:
            known = store.wanting(session, list({s.series_uid for s in found}))
        kept: dict[_Why, list[HeldSeries]] = {why: [] for why in _Why}
        dropped = 0
        for series in found:
            why = self._why(series, known.get(series.series_uid), now)
            if why is None:
                dropped += self._drop(series)
            else:
                kept[why].append(series)
        return dropped + self._make_room(kept, now)

    def _why(self, held: HeldSeries, wanting: Wanting | None, now: datetime) -> "_Why | None":
        """Return why pixels are to stay, None where nobody wants them."""
        if wanting is None:
            return self._why_unknown(held, now)
        if wanting.state is SeriesState.OPEN or any(map(self._is_served, wanting.forwards)):
            return _Why.WANTED
        if any(forward.due_at > now - self.age for forward in wanting.forwards):
            return _Why.GIVEN_UP
        # Either way: where the clock was set back, they were added in the future.
        if abs(now - held.changed_at) < self.late:
            return _Why.LATE
        if wanting.forwards:
            self._tell(held, "rule_days are over")
        return None

    def _why_unknown(self, held: HeldSeries, now: datetime) -> "_Why | None":
        if held.changed_at > now - UNKNOWN:
            return _Why.WANTED
        if held.changed_at > now - self.age:
            return _Why.GIVEN_UP
        self._tell(held, "the database does not know it")
        return None

    def _is_served(self, forward: Forward) -> bool:
        """Whether it is tried again by itself."""
        return forward.state is DeliveryState.WAITING and forward.rule in self.rules

    def _make_room(self, kept: "Mapping[_Why, Sequence[HeldSeries]]", now: datetime) -> int:
        """Where the disk is short, drop what nobody is served with now; return how many."""
        dropped = 0
        for why in (_Why.LATE, _Why.GIVEN_UP):
            for series in kept[why]:
                if self._has_room():
                    return dropped
                if why is _Why.GIVEN_UP:
                    self._tell(series, "the disk is short")
                dropped += self._drop(series)
        is_told = self._told is not None and now < self._told + TELL
        if kept[_Why.WANTED] and not is_told and not self._has_room():
            self._told = now
            logger.warning(
                "held pixels fill the disk",
                extra={"series": len(kept[_Why.WANTED]), "free_bytes": self.held.free_bytes()},
            )
        return dropped

    def _has_room(self) -> bool:
        return self.held.free_bytes() >= self.watermark_bytes

    def _drop(self, series: HeldSeries) -> bool:
        try:
            self.held.drop(series.study_uid, series.series_uid)
        except OSError as exc:
            extra = {"series_uid": series.series_uid, "reason": exc.strerror}
            logger.warning("pixels not dropped", extra=extra)
            return False
        return True

    def _tell(self, series: HeldSeries, reason: str) -> None:
        extra = {"series_uid": series.series_uid, "reason": reason}
        logger.warning("pixels given up", extra=extra)


class _Why(Enum):
    """Why pixels are to stay."""

    WANTED = auto()  # by a Series that arrives, or by who is served with them
    GIVEN_UP = auto()  # a person may have them sent still, or import them
    LATE = auto()  # more of the Series may come
