"""Takes what is due from the outbox to where it is to be: a service for each destination.

Reads deliveries, makes what they stand for, sends it, and writes how that went. A crash between
sending and writing sends the same once more: what is made is the same, its UID or id too.
"""

import contextlib
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from pydicom.uid import generate_uid
from sqlalchemy import Engine

from dicomnode import store
from dicomnode.audit import MINOR_FAILURE, SUCCESS, Act, AuditLog
from dicomnode.config import Peer, Settings
from dicomnode.errors import (
    ConfigError,
    DicomError,
    ObjectError,
    PeerUnavailable,
    StoreUnavailable,
    TransientError,
)
from dicomnode.log import Seldom
from dicomnode.model import Commitment, DeliveryKind, DeliveryState
from dicomnode.outgoing import (
    Nothing,
    NotYet,
    Outgoing,
    forward,
    matched,
    notice,
    registration,
    report,
    webhook,
)
from dicomnode.outgoing.asking import destinations
from dicomnode.scu import commitment
from dicomnode.scu.association import NothingAccepted, associated
from dicomnode.scu.storage import storage_contexts, store_on
from dicomnode.spool.reports import Reports

logger = logging.getLogger(__name__)

BATCH = 20  # deliveries on one association
LEASE = timedelta(minutes=10)  # renewed while what was taken is being sent
FIRST = timedelta(seconds=10)  # to the second attempt; doubled for each
LONGEST = timedelta(hours=1)
# A peer that is down is tried again so often at least, for all that waits for it.
LONGEST_PAUSE = timedelta(minutes=10)
# Whatever `give_up_hours` says: the node itself may have been away for longer.
LEAST_ATTEMPTS = 5
# A Study that is still arriving is waited for so long.
GROWING = timedelta(hours=1)
COMMITMENTS = 100  # asked for at a time
STRAYS = timedelta(minutes=1)  # between looks for what is configured no more
COMMITTED_KINDS = (DeliveryKind.REGISTRATION, DeliveryKind.REPORT)

Clock = Callable[[], datetime]
Make = Callable[[Engine, Settings, store.Delivery], Sequence[Outgoing]]
Tell = Callable[[Engine, Settings, store.Delivery], dict[str, Any]]

MAKERS: dict[DeliveryKind, Make] = {
    DeliveryKind.REGISTRATION: registration.make,
    DeliveryKind.REPORT: report.make,
    DeliveryKind.FORWARD: forward.make,
}


def backoff(attempts: int, luck: float) -> timedelta:
    """Return how long to wait after so many attempts; `luck`, 0 to 1, spreads those of many.

    10 s, doubled for each, an hour at most; a quarter more or less.
    """
    return min(FIRST * (1 << min(attempts, 20)), LONGEST) * (0.75 + 0.5 * luck)


class Courier(Protocol):
    """What brings deliveries to one destination."""

    def carry(self, work: "Work", taken: Sequence[store.Delivery], now: datetime) -> None:
        """Bring what was taken, and settle each.

        Raises
        ------
        TransientError, ConfigError
            If the destination cannot be had: what is not settled is tried again later.
        """

    def after(self, work: "Work", now: datetime) -> int:
        """Do what else is to be done while nothing is due, and return how much that was."""


class Deliver:
    """Delivers to one destination, one step a batch."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        destination: str,
        courier: Courier,
        *,
        clock: Clock = lambda: datetime.now(UTC),
        luck: Callable[[], float] = random.random,
    ) -> None:
        self.name = f"deliver {shown(destination)}"
        self.work = Work(settings, engine, destination, clock, luck)
        self._courier = courier
        self._failures = 0  # one after the other
        self._paused_until: datetime | None = None
        self._told = Seldom()

    def step(self, now: datetime) -> int:
        """Deliver some of what is due, and return how much that was."""
        if self._paused_until is not None and now < self._paused_until:
            return 0
        try:
            return self._step(now)
        except StoreUnavailable:
            raise
        except (TransientError, ConfigError) as exc:
            self._pause(exc)
            return 1

    def _step(self, now: datetime) -> int:
        work = self.work
        with store.reading(work.engine) as session:
            due_at = store.next_delivery_at(session, work.destination)
        if due_at is None or due_at > now:
            return self._courier.after(work, now)
        with store.writing(work.engine) as session:
            taken = store.claim_deliveries(session, now, LEASE, BATCH, destination=work.destination)
        if not taken:  # another exchange was quicker
            return 0
        with work.holding(taken):
            try:
                self._courier.carry(work, [d for d in taken if not work.put_off(d, now)], now)
            except StoreUnavailable:
                raise
            except (TransientError, ConfigError) as exc:  # a certificate, or a key, is missing
                if work.delivered:
                    self._failures = 0
                work.leave(self._pause_after(exc), str(exc))
                raise
        self._failures, self._paused_until = 0, None
        return len(taken)

    def _pause_after(self, exc: Exception) -> timedelta:
        wanted = timedelta(seconds=getattr(exc, "after_s", 0.0))
        pause = max(backoff(self._failures, self.work.luck()), min(wanted, LONGEST))
        return min(pause, max(LONGEST_PAUSE, wanted))

    def _pause(self, exc: Exception) -> None:
        now = self.work.clock()
        self._paused_until = now + self._pause_after(exc)
        self._failures += 1
        where = {"destination": shown(self.work.destination), "reason": str(exc)}
        if times := self._told.due(str(exc)):
            logger.warning("destination not reached", extra={**where, "times": times})
        if self._failures >= LEAST_ATTEMPTS:
            with store.writing(self.work.engine) as session:
                failed = store.fail_deliveries(
                    session,
                    self.work.destination,
                    now,
                    str(exc),
                    asked_before=now - self.work.give_up,
                )
            if failed:
                logger.error("deliveries given up", extra={**where, "deliveries": failed})


class Work:
    """What was taken for one destination, and how to settle it."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        destination: str,
        clock: Clock,
        luck: Callable[[], float],
    ) -> None:
        self.settings, self.engine, self.destination = settings, engine, destination
        self.clock, self.luck = clock, luck
        self.give_up = timedelta(hours=settings.deliver.give_up_hours)
        self._known = destinations(settings)
        self.delivered = False  # something of what was taken
        self._open: dict[int, store.Delivery] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def holding(self, taken: Sequence[store.Delivery]) -> Iterator[None]:
        """Renew the lease of what was taken until it is settled."""
        self._open = {d.id: d for d in taken}
        self.delivered = False
        over = threading.Event()

        def renew() -> None:
            while not over.wait(LEASE.total_seconds() / 3):
                try:
                    self._hold()
                except TransientError as exc:  # another exchange may send the same as well
                    logger.warning("lease not renewed", extra={"reason": str(exc)})

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._open = {}

    def _hold(self) -> None:
        with self._lock, store.writing(self.engine) as session:  # none is settled meanwhile
            if self._open:
                until = self.clock() + LEASE
                store.hold_deliveries(session, list(self._open.values()), until)

    def put_off(self, delivery: store.Delivery, now: datetime) -> bool:
        """Settle what is not to be sent: configured no more, or of a Study that still arrives."""
        what = delivery.what
        if (what.kind, what.destination, what.rule) not in self._known:
            self.settle(delivery, DeliveryState.FAILED, reason=NOT_CONFIGURED)
            return True
        if what.other and now - delivery.asked_at < GROWING:
            with store.reading(self.engine) as session:
                growing = store.is_growing(session, (what.subject, what.other))
            if growing:
                wait = max(timedelta(seconds=self.settings.deliver.settle_seconds), FIRST)
                self.postpone(delivery, wait)
                return True
        return False

    def make(self, delivery: store.Delivery, make: Callable[..., Any]) -> Any:
        """Return what a delivery stands for, None where it was settled because there is none."""
        try:
            return make(self.engine, self.settings, delivery)
        except Nothing as exc:
            self.settle(delivery, DeliveryState.DROPPED, reason=str(exc) or None)
        except NotYet as exc:
            delivery = replace(delivery, reason=str(exc))
            self.postpone(delivery, FIRST)
        except ObjectError as exc:
            self.settle(delivery, DeliveryState.DROPPED, reason=str(exc))
        except DicomError as exc:  # of what is held, which may be sent again
            self.retry(delivery, str(exc))
        except TransientError:
            raise
        except Exception as exc:  # one that cannot be made must not stop those behind it
            logger.exception("delivery not made", extra={"delivery": delivery.id})
            self.retry(delivery, f"not made: {type(exc).__name__}")
        return None

    def settle(self, delivery: store.Delivery, state: DeliveryState, **values: Any) -> None:
        """Note how an attempt went."""
        with self._lock:
            with store.writing(self.engine) as session:
                noted = store.settle_delivery(session, delivery, state, self.clock(), **values)
            self._open.pop(delivery.id, None)
        self.delivered |= state is DeliveryState.DONE
        if noted and state is DeliveryState.FAILED:
            logger.error(
                "delivery given up",
                extra={
                    "delivery": delivery.id,
                    "kind": str(delivery.what.kind),
                    "destination": shown(self.destination),
                    "reason": values.get("reason"),
                },
            )

    def retry(self, delivery: store.Delivery, reason: str, after_s: float = 0.0) -> None:
        """Note that an attempt failed; the next one is later and later, until it is given up."""
        now = self.clock()
        if delivery.attempts + 1 >= LEAST_ATTEMPTS and now - delivery.asked_at >= self.give_up:
            self.settle(delivery, DeliveryState.FAILED, reason=reason)
            return
        wait = max(backoff(delivery.attempts, self.luck()), timedelta(seconds=after_s))
        self.settle(delivery, DeliveryState.WAITING, due_at=now + wait, reason=reason)

    def postpone(self, delivery: store.Delivery, wait: timedelta) -> None:
        """Note that this was no attempt."""
        self.settle(
            delivery,
            DeliveryState.WAITING,
            due_at=self.clock() + wait,
            attempts=delivery.attempts,
            reason=delivery.reason,
        )

    def leave(self, wait: timedelta, reason: str | None = None) -> None:
        """Let go of all that is not settled yet, for so long; with a reason it was an attempt."""
        for delivery in list(self._open.values()):
            if reason is None:
                self.postpone(delivery, wait)
            else:
                due_at = self.clock() + wait
                self.settle(delivery, DeliveryState.WAITING, due_at=due_at, reason=reason)


NOT_CONFIGURED = "this destination is configured no more"


class ToPeer:
    """Stores objects at a peer, and asks it to commit itself to keep ours."""

    def __init__(self, settings: Settings, peer: Peer, audit: AuditLog | None = None) -> None:
        self.peer = peer
        self._audit = audit or AuditLog(None)
        self._reports = Reports.of(settings.spool)
        self._told = Seldom()

    def carry(self, work: Work, taken: Sequence[store.Delivery], now: datetime) -> None:
        """Store the objects of deliveries, all on one association."""
        made = []
        for delivery in taken:
            objects = work.make(delivery, MAKERS[delivery.what.kind])
            if objects is not None:
                made.append((delivery, objects))
        if not made:
            return
        everything = [o for _, objects in made for o in objects]
        if not everything:
            for delivery, _ in made:
                work.settle(delivery, DeliveryState.DROPPED)
            return
        try:
            with associated(work.settings, self.peer, storage_contexts(everything)) as link:
                for delivery, objects in made:
                    try:
                        answers = list(store_on(link, objects))
                    except PeerUnavailable as exc:
                        # Perhaps it is this object that the peer cannot bear: those behind it
                        # are to come first the next time.
                        work.retry(delivery, str(exc))
                        self._tell(delivery, objects, MINOR_FAILURE)
                        work.leave(FIRST)
                        raise
                    self._settle(work, delivery, objects, answers)
        except NothingAccepted as exc:
            for delivery, _ in made:
                work.retry(delivery, str(exc))

    def _settle(
        self,
        work: Work,
        delivery: store.Delivery,
        objects: Sequence[Outgoing],
        answers: Sequence[Any],
    ) -> None:
        refused = [a for a in answers if not a.ok]
        self._tell(delivery, objects, MINOR_FAILURE if refused else SUCCESS)
        if refused:
            some = f"{len(refused)} of {len(answers)}: " if len(answers) > 1 else ""
            work.retry(delivery, f"{some}{refused[0].reason}")
            return
        kind, asks = delivery.what.kind, work.settings.deliver.commitment
        last = objects[-1] if objects else None
        now = work.clock()
        work.settle(
            delivery,
            DeliveryState.DONE,
            sop_class_uid=last.sop_class_uid if last else None,
            sop_instance_uid=last.sop_instance_uid if last else None,
            commitment_due_at=now if asks and kind in COMMITTED_KINDS else None,
        )
        logger.info(
            "delivered",
            extra={
                "delivery": delivery.id,
                "kind": str(kind),
                "destination": self.peer.ae_title,
                "instances": len(answers),
                "sop_instance_uid": last.sop_instance_uid if last else None,
            },
        )

    def _tell(self, delivery: store.Delivery, objects: Sequence[Outgoing], outcome: int) -> None:
        self._audit.write(
            Act.INSTANCES_SENT,
            outcome,
            called_ae_title=self.peer.ae_title,
            address=self.peer.host,
            kind=str(delivery.what.kind),
            subject=[uid for uid in (delivery.what.subject, delivery.what.other) if uid],
            instances=len(objects),
        )

    def after(self, work: Work, now: datetime) -> int:
        """Ask for commitments that are due."""
        with store.reading(work.engine) as session:
            due_at = store.next_commitment_at(session, self.peer.ae_title)
        if due_at is None or due_at > now:
            return 0
        with store.writing(work.engine) as session:
            taken = store.claim_commitments(session, self.peer.ae_title, now, LEASE, COMMITMENTS)
        late = [d for d in taken if d.done_at is not None and now - d.done_at >= work.give_up]
        asked = [d for d in taken if d not in late]
        if not work.settings.deliver.commitment:
            self._note(work, taken, None, None)
            return len(taken)
        if late:
            self._note(work, late, None, Commitment.UNANSWERED)
            logger.warning(
                "commitment not answered",
                extra={"destination": self.peer.ae_title, "deliveries": len(late)},
            )
        if asked:
            self._ask(work, asked)
        return len(taken)

    def _ask(self, work: Work, asked: Sequence[store.Delivery]) -> None:
        transaction_uid = generate_uid(None)  # nobody is to guess it
        # Archives answer within seconds, or by night: an hour, then two, then four, ...
        most = max(d.commitment_attempts for d in asked)
        wait = min(LONGEST * 2 ** min(most, 5), timedelta(days=1))
        references = [
            (d.sop_class_uid, d.sop_instance_uid)
            for d in asked
            if d.sop_class_uid and d.sop_instance_uid
        ]

        def accepted() -> None:
            due_at = work.clock() + wait
            self._note(work, asked, due_at, Commitment.ASKED, transaction_uid)

        try:
            commitment.ask(
                work.settings, self.peer, references, transaction_uid, accepted, self._reports.put
            )
        except NothingAccepted:
            self._note(work, asked, None, None)  # it does not offer it: nothing was asked
        except PeerUnavailable as exc:
            # It stores all the same: nothing that waits is to wait for this.
            due_at = work.clock() + backoff(most, work.luck())
            self._note(work, asked, due_at, Commitment.WANTED)
            extra = {"destination": self.peer.ae_title, "reason": str(exc)}
            if times := self._told.due(str(exc)):
                logger.warning("commitment not asked", extra={**extra, "times": times})

    def _note(
        self,
        work: Work,
        asked: Sequence[store.Delivery],
        due_at: datetime | None,
        state: Commitment | None,
        transaction_uid: str | None = None,
    ) -> None:
        with store.writing(work.engine) as session:
            store.postpone_commitments(session, asked, due_at, state, transaction_uid)


class ToWebhook:
    """Tells a webhook, one notice a request."""

    def carry(self, work: Work, taken: Sequence[store.Delivery], now: datetime) -> None:
        """Tell what deliveries stand for."""
        secret = webhook.read_secret(work.settings.deliver.webhook_secret_file)
        for delivery in taken:
            told = work.make(delivery, teller(delivery))
            if told is None:
                continue
            # The same for each repeat; another once it was asked for anew.
            identity = f"{delivery.id}.{delivery.version}"
            try:
                webhook.post(
                    work.destination, {"id": identity, **told}, identity, secret, work.clock()
                )
            except webhook.WebhookError as exc:
                if exc.status == webhook.GONE:
                    work.settle(delivery, DeliveryState.FAILED, reason=str(exc))
                    continue
                work.retry(delivery, str(exc), exc.after_s)
                if exc.status is None or exc.status >= 500 or exc.status == 429:
                    raise  # it is the server, not this notice
                continue
            work.settle(delivery, DeliveryState.DONE)
            logger.info(
                "delivered",
                extra={
                    "delivery": delivery.id,
                    "kind": str(delivery.what.kind),
                    "destination": shown(work.destination),
                },
            )

    def after(self, work: Work, now: datetime) -> int:
        """Nothing else is to be done."""
        return 0


def teller(delivery: store.Delivery) -> Tell:
    """Return what makes the notice of a delivery."""
    return matched.make if delivery.what.rule else notice.make


class Strays:
    """Gives up what waits for a destination that is configured no more."""

    name = "deliver strays"

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._known = destinations(settings)
        self._engine = engine
        self._looked_at: datetime | None = None

    def step(self, now: datetime) -> int:
        """Look once a minute, and return how much was given up."""
        if self._looked_at is not None and now - self._looked_at < STRAYS:
            return 0
        self._looked_at = now
        with store.reading(self._engine) as session:
            strays = store.waiting_for(session) - self._known
        failed = 0
        for kind, destination, rule in sorted(strays):
            with store.writing(self._engine) as session:
                count = store.fail_deliveries(
                    session, destination, now, NOT_CONFIGURED, kind=kind, rule=rule
                )
            where = {"destination": shown(destination), "kind": str(kind)}
            logger.error(
                "deliveries given up",
                extra={**where, "deliveries": count, "reason": NOT_CONFIGURED},
            )
            failed += count
        return failed


def services(settings: Settings, engine: Engine) -> list[Deliver | Strays]:
    """Return a service for each destination, and one for what has none."""
    audit = AuditLog(settings.audit_log)
    names = dict.fromkeys(name for _, name, _ in sorted(destinations(settings)))
    couriers: dict[str, Courier] = {}
    for name in names:
        peer = settings.peer(name)
        couriers[name] = ToPeer(settings, peer, audit) if peer else ToWebhook()
    return [
        *(Deliver(settings, engine, name, courier) for name, courier in couriers.items()),
        Strays(settings, engine),
    ]


def shown(destination: str) -> str:
    """Return a destination as it may be logged: of a URL its host, for the rest may hold a key."""
    return webhook.host_of(destination) if "://" in destination else destination
