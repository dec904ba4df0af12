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
# Of a Series that is sent as a whole, again and again, and brings nothing new.
FRUITLESS = 2
# After a failure where our own receiver does not listen: not the peer's fault, nor an attempt.
OWN_DOWN = timedelta(minutes=10)
# Between looks whether the worker took what was sent.
BEHIND = timedelta(seconds=5)
# Studies of a day that are looked into in one turn; in between others have theirs.
LOOKS_A_TURN = 10
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
OWN_PORT = "our own receiver does not listen, and so nobody can send to us"
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


@dataclass(slots=True)
class _Pass:
    """How far a day was looked into."""

    # Study -> how much the peer has of it where all of that is here, None where some lacks.
    looked_into: dict[str, tuple[int, int] | None]
    series: int  # asked for


def _lacks(expected: int | None, held: store.Held) -> bool:
    return retrieval.is_missing(expected, held.received, held.rejected)


def _fruitless(fetch: store.Fetch, received: int) -> int:
    """Return how often in a row a Series was sent that brought nothing new, up to now."""
    if fetch.sent_at is None:
        return 0
    return fetch.fruitless + 1 if received == fetch.held_before else 0


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
        # Who may be asked in our stead: somebody asks them.
        self._else_ask = tuple(name for name in settings.priors.asked if name != archive.name)
        # Day -> Study -> how much the peer had of it when all of that was here.
        self._complete: dict[str, dict[str, tuple[int, int]]] = {}
        # Day and version of its question -> what was looked into in turns before this one.
        self._passes: dict[tuple[str, int], _Pass] = {}
        self._began = (datetime.min.replace(tzinfo=UTC), 0.0)
        self._requests = 0  # of this turn

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
                store.charge(session, self._peer, now, self._interval, self._requests)
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
        self._requests = 1
        if not taken:
            self._settle(claimed, FetchState.WAITING, due_at=now, is_attempt=False)
        return taken

    def _is_settled_here(self, claimed: store.Inquiry | store.Fetch) -> bool:
        """Settle what needs no peer; False where one is to be asked."""
        if isinstance(claimed, store.Fetch):
            return self._is_settled_by_what_is_here(claimed)
        if claimed.cause is FetchCause.PRIOR:
            with store.reading(self._engine) as session:
                patient = self._patient(session, claimed.subject)
            if patient is None or not patient.patient_ids:
                self._settle(claimed, FetchState.DROPPED, reason=NOT_ASKABLE if patient else GONE)
                return True
        return False

    def _is_settled_by_what_is_here(self, fetch: store.Fetch) -> bool:
        held = self._held([fetch.what.series_uid]).get(fetch.what.series_uid)
        received = held.received if held else 0
        now = self._now()
        if held and fetch.state is FetchState.WAITING and not _lacks(fetch.what.expected, held):
            self._settle(fetch, FetchState.DROPPED, reason=HERE)
            return True
        told = fetch.completed is not None or fetch.warning is not None
        all_of_it = (fetch.completed or 0) + (fetch.warning or 0) if told else fetch.what.expected
        all_of_it = all_of_it or 1
        if fetch.state is FetchState.SENT and received >= all_of_it:
            fruitless = _fruitless(fetch, received)
            self._settle(fetch, FetchState.DONE, fruitless=fruitless)
            return True
        if held and now < held.last_arrival_at + self._quiet <= now + self._quiet:
            # It is on its way: whoever sends it is left alone.
            due_at = held.last_arrival_at + self._quiet
            self._settle(fetch, fetch.state, due_at=due_at, reason=fetch.reason, is_attempt=False)
            return True
        if self._is_yet_to_be_taken(fetch):
            due_at = now + max(self._quiet, BEHIND)
            self._settle(fetch, fetch.state, due_at=due_at, reason=fetch.reason, is_attempt=False)
            return True
        if fetch.state is FetchState.SENT:
            # The receivers' log and the quarantine know more.
            here = f"{received} are here"
            self._retry(fetch, f"{self._peer} says that it sent {all_of_it} Instances, and {here}")
            return True
        if fetch.sent_at and _fruitless(fetch, received) >= FRUITLESS:
            again = f"sent again {FRUITLESS} times, it brought nothing new"
            reason = f"{fetch.reason}; {again}" if fetch.reason else again
            self._settle(fetch, FetchState.FAILED, reason=reason, is_attempt=False)
            self._tell_failure(fetch, reason, is_over=True)
            return True
        return False

    def _is_yet_to_be_taken(self, fetch: store.Fetch) -> bool:
        """Whether what a peer sent may still be in the spool, since the worker is not so far."""
        if not fetch.sent_at or not fetch.sent_at <= self._now() < fetch.sent_at + self._give_up:
            return False
        with store.reading(self._engine) as session:
            taken = store.last_beat(session, store.WORKER)
        return taken is None or taken < fetch.sent_at

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
        self._requests += len(patient.patient_ids) - 1
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
        self._order(inquiry, orders, (taken, 0), timedelta(0), reason)

    def _ask_for_day(self, conversation: Conversation, inquiry: store.Inquiry) -> None:
        day = datetime.strptime(inquiry.subject, "%Y%m%d").date()
        with self._audited(Act.QUERY, day=inquiry.subject) as told:
            answers = conversation.find_studies(days=(day, day), most=MAX_STUDIES_OF_DAY)
            told["studies"] = len(answers)
        answers = [a for a in answers if a.study_date in (None, day) and a.may_have_ct]
        before = self._complete.get(inquiry.subject, {})
        key = inquiry.subject, inquiry.version
        done = self._passes.get(key) or _Pass({}, 0)
        wanted: dict[str, list[SeriesAnswer]] = {}
        later = 0
        for answer in answers:
            size = (answer.series or 0, answer.instances or 0)
            if answer.study_uid in done.looked_into:
                continue
            if answer.instances is not None and before.get(answer.study_uid) == size:
                done.looked_into[answer.study_uid] = size  # nothing came since
            elif len(wanted) < LOOKS_A_TURN:
                wanted[answer.study_uid] = self._wanted(conversation, answer)
            else:
                later += 1
        orders = self._orders(inquiry, answers, wanted)
        lacking = {order.study_uid for order in orders}
        sizes = {a.study_uid: (a.series or 0, a.instances or 0) for a in answers}
        for uid in wanted:
            done.looked_into[uid] = None if uid in lacking else sizes[uid]
        if later:
            reason = f"{later} Studies are still to be looked into"
            done.series += self._order(inquiry, orders, None, self._quiet, reason)
            self._passes[key] = done
            return
        self._passes = {k: v for k, v in self._passes.items() if k[0] != inquiry.subject}
        complete = {uid: size for uid, size in done.looked_into.items() if size is not None}
        self._complete = dict([*self._complete.items(), (inquiry.subject, complete)][-400:])
        found = len(answers), done.series
        self._order(inquiry, orders, found, self._quiet, None)

    def _wanted(self, conversation: Conversation, study: StudyAnswer) -> list[SeriesAnswer]:
        self._requests += 1
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
            if answer.series_uid not in held or _lacks(answer.instances, held[answer.series_uid])
        ]

    def _order(
        self,
        inquiry: store.Inquiry,
        orders: Sequence[store.Order],
        found: tuple[int, int] | None,
        later: timedelta,
        reason: str | None,
    ) -> int:
        """Ask for Series, settle their question in the same go, and return how many are new.

        `found`: Studies that are wanted, and Series asked for in turns before; None: there is more
        to look into, when fetches had as many turns as this took.
        """
        now = self._now()
        with store.writing(self._engine) as session:
            ordered = store.order_series(session, orders, now, now + later)
            if found is None:
                due_at = self._began[0] + 2 * self._requests * self._interval
                store.settle_inquiry(
                    session,
                    inquiry,
                    FetchState.WAITING,
                    now,
                    due_at=due_at,
                    reason=reason,
                    is_attempt=False,
                )
            else:
                store.settle_inquiry(
                    session,
                    inquiry,
                    FetchState.DONE,
                    now,
                    reason=reason,
                    found=(found[0], found[1] + len(ordered)),
                )
        if ordered:
            extra = {"peer": self._peer, "cause": str(inquiry.cause), "series": len(ordered)}
            logger.info("series to be fetched", extra={**extra, "asked_by": inquiry.subject})
        return len(ordered)

    def _fetch(self, conversation: Conversation, fetch: store.Fetch) -> None:
        what = fetch.what
        with self._audited(Act.QUERY, study_uid=what.study_uid, series_uid=what.series_uid):
            answers = conversation.find_series(what.study_uid, what.series_uid)
        named = [answer for answer in answers if answer.series_uid == what.series_uid]
        if not named:
            raise PeerRefused(f"{self._peer} names no such CT Series any more")
        expected = named[0].instances
        held = self._held([what.series_uid]).get(what.series_uid)
        if held and not _lacks(expected, held):  # it has fewer than it had
            self._settle(fetch, FetchState.DROPPED, reason=HERE)
            return
        is_late = self._now() - fetch.asked_at >= self._give_up
        has_grown = what.expected is not None and (expected or 0) > what.expected
        if what.cause is FetchCause.CATCH_UP and has_grown and not is_late:
            # It is still arriving there: its forward is yet to come.
            self._settle(
                fetch,
                FetchState.WAITING,
                due_at=self._now() + self._quiet,
                expected=expected,
                is_attempt=False,
            )
            return
        if expected is not None:
            with store.writing(self._engine) as session:
                store.note_expected(session, fetch, expected)
        received = held.received if held else 0
        fruitless = _fruitless(fetch, received)
        try:
            with self._audited(
                Act.RETRIEVE, study_uid=what.study_uid, series_uid=what.series_uid
            ) as told:
                retrieved = conversation.retrieve(what.study_uid, what.series_uid)
                told |= {"instances": retrieved.arrived, "failed": retrieved.failed or None}
        except PeerRefused as exc:
            self._retry(fetch, str(exc), is_attempt=self._archive.finds_us())
            return
        counts = (retrieved.completed, retrieved.failed, retrieved.warning)
        reason, arrived = retrieved.reason, retrieved.arrived
        if not reason and arrived is not None and arrived < (1 if expected is None else expected):
            reason = f"{self._peer} sent {arrived} of {expected or 'some'} Instances"
        sent = None if arrived == 0 else store.Sent(self._now(), received, fruitless)
        if reason:
            told_nothing = not arrived and bool(retrieved.failed)
            is_attempt = not told_nothing or self._archive.finds_us()
            self._retry(fetch, reason, counts, expected, sent, is_attempt=is_attempt)
            return
        due_at = self._now() + self._quiet
        self._settle(
            fetch, FetchState.SENT, due_at=due_at, counts=counts, expected=expected, sent=sent
        )
        extra = {"peer": self._peer, "cause": str(what.cause), "instances": arrived}
        logger.info("series fetched", extra={**extra, "series_uid": what.series_uid})

    def _retry(
        self,
        claimed: store.Inquiry | store.Fetch,
        reason: str,
        counts: store.Counts | None = None,
        expected: int | None = None,
        sent: store.Sent | None = None,
        *,
        is_attempt: bool = True,
    ) -> None:
        """Try it again later, of another peer if one has it, or give it up."""
        now = self._now()
        is_over = now - claimed.asked_at >= self._give_up
        is_over |= is_attempt and claimed.attempts >= ATTEMPTS
        state = FetchState.FAILED if is_over else FetchState.WAITING
        due_at = now + RETRY[min(max(claimed.attempts, 1), len(RETRY)) - 1]
        else_ask = () if is_over else self._else_ask
        if not is_attempt:
            reason, due_at, else_ask = f"{reason}; {OWN_PORT}", now + OWN_DOWN, ()
        self._settle(
            claimed,
            state,
            due_at=due_at,
            reason=reason,
            counts=counts,
            expected=expected,
            sent=sent,
            is_attempt=is_attempt,
            else_ask=else_ask,
        )
        self._tell_failure(claimed, reason, is_over=is_over)

    def _tell_failure(
        self, claimed: store.Inquiry | store.Fetch, reason: str, *, is_over: bool
    ) -> None:
        extra = {"peer": self._peer, "attempts": claimed.attempts, "reason": reason}
        if isinstance(claimed, store.Fetch):
            extra["series_uid"] = claimed.what.series_uid
        else:
            extra |= {"cause": str(claimed.cause), "subject": claimed.subject}
        if is_over:
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
            store.hand_over(session, self._peer, self._else_ask, now)
        else_ask = () if late else self._else_ask
        self._settle(claimed, state, due_at=now, reason=reason, is_attempt=late, else_ask=else_ask)
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
        sent: store.Sent | None = None,
        fruitless: int | None = None,
        else_ask: Sequence[str] = (),
    ) -> None:
        # To look at what a peer sent is not counted to begin with.
        is_attempt |= claimed.state is FetchState.SENT
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
                    sent=sent,
                    fruitless=fruitless,
                    is_attempt=is_attempt,
                    else_ask=else_ask,
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
