"""Asks a peer for earlier CT of the patients of new Studies, and for what a forward missed.

Reads and writes what peers are asked for; what comes takes the way of all that arrives. A peer is
asked by a thread of its own: one that hangs keeps nobody else waiting.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from dicomnode import store
from dicomnode.audit import MINOR_FAILURE, SUCCESS, Act, AuditLog
from dicomnode.config import Settings, hours_of_day
from dicomnode.core import retrieval
from dicomnode.core.retrieval import SeriesAnswer, StudyAnswer
from dicomnode.errors import ConfigError, PeerRefused, PeerUnavailable, TransientError
from dicomnode.model import FetchCause, FetchState, PatientKey
from dicomnode.scu.archive import Archive, Conversation

logger = logging.getLogger(__name__)

# What was claimed by a process that died is due again after so long; a living one renews it.
LEASE = timedelta(minutes=3)
RENEW_S = 45.0
# After a failure of one question or Series, the last one again and again; and how often at most.
RETRY = tuple(timedelta(minutes=m) for m in (1, 5, 15, 60, 360))
ATTEMPTS = 8
# After a failure to reach a peer at all.
AWAY = tuple(timedelta(seconds=s) for s in (30, 120, 600, 1800))
# Studies of one patient: a peer that answers more passes over the Patient ID.
MAX_STUDIES_OF_PATIENT = 1000
MAX_STUDIES_OF_DAY = 20_000
# Of the Studies of a patient, newest first, so many are looked into for CT Series at most.
MAX_LOOKED_INTO = 50

NOT_ASKABLE = (
    "its Patient ID has a character that a question takes for a wild card or for two values"
)
HERE = "it is here already"
GONE = "the Study is not here any more"


@dataclass(frozen=True, slots=True)
class _Patient:
    """Whose a Study is: every key of today's patient, and the time of the Study."""

    keys: tuple[PatientKey, ...]
    study_datetime: datetime | None

    @property
    def patient_ids(self) -> list[str]:
        """Patient IDs that a question can be asked for, each once."""
        ids = dict.fromkeys(key.patient_id for key in self.keys)
        return [patient_id for patient_id in ids if retrieval.is_askable(patient_id)]


class Fetcher:
    """Asks one peer, a question or a Series a step, within the limits of `[priors]`."""

    def __init__(
        self, settings: Settings, engine: Engine, archive: Archive, audit: AuditLog
    ) -> None:
        self.name = f"fetch {archive.name}"
        self._settings, self._engine = settings.priors, engine
        self._archive, self._peer, self._audit = archive, archive.name, audit
        self._hours = hours_of_day(settings.priors.hours)
        self._interval = timedelta(minutes=1 / settings.priors.per_minute)
        self._quiet = timedelta(seconds=settings.priors.settle_seconds)
        self._give_up = timedelta(hours=settings.priors.give_up_hours)
        # Day -> Study -> how much the peer had of it when all of that was here.
        self._complete: dict[str, dict[str, tuple[int, int]]] = {}
        self._began = (datetime.min.replace(tzinfo=UTC), 0.0)

    def step(self, now: datetime) -> int:
        """Ask for one thing that is due, and return 1; 0 where nothing is."""
        self._began = (now, time.monotonic())
        in_hours = retrieval.is_within(self._hours, now.astimezone().time())
        causes = tuple(FetchCause) if in_hours else (FetchCause.CATCH_UP,)
        with store.reading(self._engine) as session:
            if not (
                store.may_ask(session, self._peer, now, self._interval)
                and store.has_due(session, self._peer, now, causes)
            ):
                return 0
        claimed = self._claim(now, causes)
        if claimed is None:
            return 0
        if self._is_settled_here(claimed):
            return 1
        if not self._take_turn(claimed):
            return 0
        with self._kept(claimed), contextlib.ExitStack() as stack:
            try:
                conversation = stack.enter_context(self._archive.opened())
            except (PeerUnavailable, ConfigError) as exc:
                self._put_off(claimed, str(exc))
                return 1
            try:
                if isinstance(claimed, store.Fetch):
                    self._fetch(conversation, claimed)
                elif claimed.cause is FetchCause.PRIOR:
                    self._ask_for_priors(conversation, claimed)
                else:
                    self._ask_for_day(conversation, claimed)
            except (PeerUnavailable, PeerRefused) as exc:
                self._retry(claimed, str(exc))
            except TransientError:  # ours: the database
                raise
            except Exception as exc:  # what no rule foresaw must not be asked for without end
                logger.exception("fetch not understood", extra={"peer": self._peer})
                self._retry(claimed, f"not understood: {type(exc).__name__}")
            with store.writing(self._engine) as session:
                store.reached(session, self._peer)
        return 1

    def _claim(
        self, now: datetime, causes: Sequence[FetchCause]
    ) -> store.Inquiry | store.Fetch | None:
        """Take what is due longest, questions first."""
        with store.writing(self._engine) as session:
            inquiry = store.claim_inquiry(session, self._peer, now, LEASE, causes)
            return inquiry or store.claim_fetch(session, self._peer, now, LEASE, causes)

    def _take_turn(self, claimed: store.Inquiry | store.Fetch) -> bool:
        """Take the turn to ask; where another process was quicker, let go of what was claimed."""
        now = self._began[0]
        with store.writing(self._engine) as session:
            taken = store.take_turn(session, self._peer, now, self._interval)
        if not taken:
            self._settle(claimed, FetchState.WAITING, due_at=now, is_attempt=False)
        return taken

    def _is_settled_here(self, claimed: store.Inquiry | store.Fetch) -> bool:
        """Settle what needs no peer; False where one is to be asked."""
        if isinstance(claimed, store.Fetch):
            held = self._held([claimed.what.series_uid]).get(claimed.what.series_uid)
            if held is None:
                return False
            if not retrieval.is_missing(claimed.what.expected, held.received):
                self._settle(claimed, FetchState.DROPPED, reason=HERE)
                return True
            now, quiet_at = self._now(), held.last_arrival_at + self._quiet
            if now < quiet_at <= now + self._quiet:
                # It is on its way: whoever sends it is left alone.
                self._settle(claimed, FetchState.WAITING, due_at=quiet_at, is_attempt=False)
                return True
        elif claimed.cause is FetchCause.PRIOR:
            with store.reading(self._engine) as session:
                patient = self._patient(session, claimed.subject)
            if patient is None or not patient.patient_ids:
                self._settle(claimed, FetchState.DROPPED, reason=NOT_ASKABLE if patient else GONE)
                return True
        return False

    def _patient(self, session: Session, study_uid: str) -> _Patient | None:
        """Return whose a Study is today, None where it is not here."""
        found = store.patient_of_study(session, study_uid)
        if found is None:
            return None
        return _Patient(tuple(store.patient_keys(session, found[0])), found[1])

    def _ask_for_priors(self, conversation: Conversation, inquiry: store.Inquiry) -> None:
        study_uid = inquiry.subject
        with store.reading(self._engine) as session:
            patient = self._patient(session, study_uid)
            known = store.dates_of_studies(session, patient.keys, study_uid) if patient else {}
        if patient is None or not patient.patient_ids:  # by now
            self._settle(inquiry, FetchState.DROPPED, reason=NOT_ASKABLE if patient else GONE)
            return
        day = patient.study_datetime.date() if patient.study_datetime else self._today()
        years = self._settings.years
        answers: dict[str, list[StudyAnswer]] = {}
        for patient_id in patient.patient_ids:
            with self._audited(Act.QUERY, by_patient=True, study_uid=study_uid) as told:
                answers[patient_id] = conversation.find_studies(
                    patient_id=patient_id,
                    days=(retrieval.earliest(day, years), day),
                    most=MAX_STUDIES_OF_PATIENT,
                )
                told["studies"] = len(answers[patient_id])
        own = retrieval.of_keys(
            answers,
            patient.keys,
            self._archive.default_issuer,
            required=self._settings.issuer == "required",
        )
        wanted: dict[str, list[SeriesAnswer]] = {}
        counted = 0
        for answer in retrieval.priors(own, study_uid, day, known, years)[:MAX_LOOKED_INTO]:
            if counted == self._settings.count:
                break
            if isinstance(answer, StudyAnswer):
                wanted[answer.study_uid] = self._wanted(conversation, answer)
                counted += bool(wanted[answer.study_uid])
            else:
                counted += 1  # here, and unknown to this peer
        orders = self._orders(inquiry, own, wanted)
        reason = None
        named = {answer.study_uid for told in answers.values() for answer in told}
        if others := len(named - {answer.study_uid for answer in own}):
            reason = f"{others} Studies of the answer are not known to be of this patient"
            logger.warning(
                "answers of other patients", extra={"peer": self._peer, "studies": others}
            )
        taken = sum(map(bool, wanted.values()))
        self._order(inquiry, orders, taken, timedelta(0), reason)

    def _ask_for_day(self, conversation: Conversation, inquiry: store.Inquiry) -> None:
        day = datetime.strptime(inquiry.subject, "%Y%m%d").date()
        with self._audited(Act.QUERY, day=inquiry.subject) as told:
            answers = conversation.find_studies(days=(day, day), most=MAX_STUDIES_OF_DAY)
            told["studies"] = len(answers)
        answers = [a for a in answers if a.study_date in (None, day) and a.may_have_ct]
        before = self._complete.get(inquiry.subject, {})
        complete: dict[str, tuple[int, int]] = {}
        wanted: dict[str, list[SeriesAnswer]] = {}
        for answer in answers:
            size = (answer.series or 0, answer.instances or 0)
            if answer.instances is not None and before.get(answer.study_uid) == size:
                complete[answer.study_uid] = before[answer.study_uid]  # nothing came since
            else:
                wanted[answer.study_uid] = self._wanted(conversation, answer)
        orders = self._orders(inquiry, answers, wanted)
        lacking = {order.study_uid for order in orders}
        for answer in answers:
            if answer.study_uid in wanted and answer.study_uid not in lacking:
                complete[answer.study_uid] = (answer.series or 0, answer.instances or 0)
        self._complete = dict([*self._complete.items(), (inquiry.subject, complete)][-400:])
        self._order(inquiry, orders, len(answers), self._quiet, None)

    def _wanted(self, conversation: Conversation, study: StudyAnswer) -> list[SeriesAnswer]:
        answers = conversation.find_series(study.study_uid)
        return retrieval.wanted_series(answers, study, self._settings.minimum_instances)

    def _orders(
        self,
        inquiry: store.Inquiry,
        studies: Sequence[StudyAnswer],
        wanted: dict[str, list[SeriesAnswer]],
    ) -> list[store.Order]:
        """Return the Series that are not here in full."""
        dates = {study.study_uid: study.study_date for study in studies}
        series = [answer for answers in wanted.values() for answer in answers]
        held = self._held([answer.series_uid for answer in series])
        return [
            store.Order(
                series_uid=answer.series_uid,
                study_uid=answer.study_uid,
                peer=self._peer,
                cause=inquiry.cause,
                asked_by=inquiry.subject,
                study_date=dates[answer.study_uid],
                expected=answer.instances,
            )
            for answer in series
            if answer.series_uid not in held
            or retrieval.is_missing(answer.instances, held[answer.series_uid].received)
        ]

    def _order(
        self,
        inquiry: store.Inquiry,
        orders: Sequence[store.Order],
        studies: int,
        later: timedelta,
        reason: str | None,
    ) -> None:
        now = self._now()
        with store.writing(self._engine) as session:
            ordered = store.order_series(session, orders, now, now + later)
            store.settle_inquiry(
                session,
                inquiry,
                FetchState.DONE,
                now,
                reason=reason,
                found=(studies, len(ordered)),
            )
        if ordered:
            extra = {"peer": self._peer, "cause": str(inquiry.cause), "series": len(ordered)}
            logger.info("series to be fetched", extra={**extra, "asked_by": inquiry.subject})

    def _fetch(self, conversation: Conversation, fetch: store.Fetch) -> None:
        what = fetch.what
        with self._audited(Act.QUERY, study_uid=what.study_uid, series_uid=what.series_uid):
            answers = conversation.find_series(what.study_uid, what.series_uid)
        named = [answer for answer in answers if answer.series_uid == what.series_uid]
        if not named:
            raise PeerRefused(f"{self._peer} names no such CT Series any more")
        expected = named[0].instances
        if what.cause is FetchCause.CATCH_UP and expected not in (None, what.expected):
            # It is still arriving there: its forward is yet to come.
            self._settle(
                fetch,
                FetchState.WAITING,
                due_at=self._now() + self._quiet,
                expected=expected,
                is_attempt=False,
            )
            return
        with self._audited(
            Act.RETRIEVE, study_uid=what.study_uid, series_uid=what.series_uid
        ) as told:
            retrieved = conversation.retrieve(what.study_uid, what.series_uid)
            told |= {"instances": retrieved.arrived, "failed": retrieved.failed or None}
        counts = (retrieved.completed, retrieved.failed, retrieved.warning)
        reason, arrived = retrieved.reason, retrieved.arrived
        if not reason and arrived is not None and arrived < (1 if expected is None else expected):
            reason = f"{self._peer} sent {arrived} of {expected or 'some'} Instances"
        if reason:
            self._retry(fetch, reason, counts, expected)
            return
        self._settle(fetch, FetchState.DONE, counts=counts, expected=expected)
        extra = {"peer": self._peer, "cause": str(what.cause), "instances": arrived}
        logger.info("series fetched", extra={**extra, "series_uid": what.series_uid})

    def _retry(
        self,
        claimed: store.Inquiry | store.Fetch,
        reason: str,
        counts: store.Counts | None = None,
        expected: int | None = None,
    ) -> None:
        """Try it again later, or give it up."""
        now = self._now()
        late = now - claimed.asked_at >= self._give_up or claimed.attempts >= ATTEMPTS
        state = FetchState.FAILED if late else FetchState.WAITING
        due_at = now + RETRY[min(claimed.attempts, len(RETRY)) - 1]
        self._settle(claimed, state, due_at=due_at, reason=reason, counts=counts, expected=expected)
        extra = {"peer": self._peer, "attempts": claimed.attempts, "reason": reason}
        if isinstance(claimed, store.Fetch):
            extra["series_uid"] = claimed.what.series_uid
        else:
            extra |= {"cause": str(claimed.cause), "subject": claimed.subject}
        if late:
            logger.error("fetch given up", extra=extra)
        else:
            logger.warning("fetch failed", extra=extra)

    def _put_off(self, claimed: store.Inquiry | store.Fetch, reason: str) -> None:
        """Leave the peer alone for a while; what was claimed did nothing to deserve it."""
        now = self._now()
        late = now - claimed.asked_at >= self._give_up
        state = FetchState.FAILED if late else FetchState.WAITING
        with store.writing(self._engine) as session:
            store.put_off(session, self._peer, now, AWAY, reason)
        self._settle(claimed, state, due_at=now, reason=reason, is_attempt=late)
        logger.warning("peer away", extra={"peer": self._peer, "reason": reason})

    def _settle(
        self,
        claimed: store.Inquiry | store.Fetch,
        state: FetchState,
        *,
        due_at: datetime | None = None,
        reason: str | None = None,
        is_attempt: bool = True,
        counts: store.Counts | None = None,
        expected: int | None = None,
    ) -> None:
        now = self._now()
        with store.writing(self._engine) as session:
            if isinstance(claimed, store.Fetch):
                store.settle_fetch(
                    session,
                    claimed,
                    state,
                    now,
                    due_at=due_at,
                    reason=reason,
                    counts=counts,
                    expected=expected,
                    is_attempt=is_attempt,
                )
            else:
                store.settle_inquiry(
                    session,
                    claimed,
                    state,
                    now,
                    due_at=due_at,
                    reason=reason,
                    is_attempt=is_attempt,
                )

    def _held(self, series_uids: Sequence[str]) -> dict[str, store.Held]:
        with store.reading(self._engine) as session:
            return store.held_series(session, series_uids)

    def _now(self) -> datetime:
        began, at = self._began
        return began + timedelta(seconds=time.monotonic() - at)

    def _today(self) -> date:
        return self._now().astimezone().date()

    @contextlib.contextmanager
    def _kept(self, claimed: store.Inquiry | store.Fetch) -> Iterator[None]:
        """Renew the lease of what was claimed, until the block ends."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(RENEW_S):
                try:
                    with store.writing(self._engine) as session:
                        store.renew_lease(session, claimed, self._now() + LEASE)
                except TransientError:  # the next one may succeed
                    logger.debug("lease not renewed", extra={"peer": self._peer})

        thread = threading.Thread(target=renew, name=f"{self.name} lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextlib.contextmanager
    def _audited(self, act: Act, **data: object) -> Iterator[dict[str, object]]:
        """Record what is asked, with what the block adds, and whether it went well."""
        told: dict[str, object] = {}
        outcome = MINOR_FAILURE
        try:
            yield told
            outcome = SUCCESS
        finally:
            self._audit.write(act, outcome, part="fetch", peer=self._peer, **data, **told)
