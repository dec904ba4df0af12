"""Asks a peer for earlier CT of the patients of new Studies, and for what a forward missed.

Reads and writes what peers are asked for; what comes takes the way of all that arrives. A peer is
asked by a thread of its own: one that hangs keeps nobody else waiting.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.audit import MINOR_FAILURE, SUCCESS, Act, AuditLog
from dicomnode.config import Settings, hours_of_day
from dicomnode.core import retrieval
from dicomnode.errors import ConfigError, PeerRefused, PeerUnavailable, TransientError
from dicomnode.model import FetchCause, FetchState
from dicomnode.scu.archive import Archive, Conversation
from dicomnode.scu.questions import Questions, lacks

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
# After a failure to reach a peer at all.
AWAY = tuple(timedelta(seconds=s) for s in (30, 120, 600, 1800))

HERE = "it is here already"
OWN_PORT = "our own receiver does not listen, and so nobody can send to us"


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
        self._questions = Questions(settings, engine, archive, self._audited)
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
                else:
                    self._ask(conversation, claimed)
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
        why_not = self._questions.why_not(claimed)
        if why_not:
            self._settle(claimed, FetchState.DROPPED, reason=why_not)
        return bool(why_not)

    def _is_settled_by_what_is_here(self, fetch: store.Fetch) -> bool:
        held = self._held([fetch.what.series_uid]).get(fetch.what.series_uid)
        received = held.received if held else 0
        now = self._now()
        if held and fetch.state is FetchState.WAITING and not lacks(fetch.what.expected, held):
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

    def _ask(self, conversation: Conversation, inquiry: store.Inquiry) -> None:
        """Ask a question, and for the Series that follow, in the go that settles the question."""
        answer = self._questions.ask(conversation, inquiry, self._now())
        self._requests = answer.requests
        if answer.dropped:
            self._settle(inquiry, FetchState.DROPPED, reason=answer.dropped)
            return
        now = self._now()
        # What is on its way comes by itself.
        later = self._quiet if inquiry.cause is FetchCause.CATCH_UP else timedelta(0)
        with store.writing(self._engine) as session:
            ordered = store.order_series(session, answer.orders, now, now + later)
            found = answer.studies, answer.series + len(ordered)
            if answer.is_done:
                store.settle_inquiry(
                    session, inquiry, FetchState.DONE, now, reason=answer.reason, found=found
                )
            else:  # when fetches had as many turns as this took
                store.settle_inquiry(
                    session,
                    inquiry,
                    FetchState.WAITING,
                    now,
                    due_at=self._began[0] + 2 * answer.requests * self._interval,
                    reason=answer.reason,
                    found=found,
                    is_attempt=False,
                )
        self._questions.note(inquiry, answer, len(ordered))
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
        held = self._held([what.series_uid]).get(what.series_uid)
        if held and not lacks(expected, held):  # it has fewer than it had
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
