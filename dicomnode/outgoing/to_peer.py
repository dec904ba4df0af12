"""Stores what was taken of the outbox at a peer, and asks it to commit itself to keep it."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from types import TracebackType

from pydicom.uid import (
    Comprehensive3DSRStorage,
    ExplicitVRLittleEndian,
    SpatialRegistrationStorage,
    generate_uid,
)
from sqlalchemy import Engine

from dicomnode import store
from dicomnode.audit import MINOR_FAILURE, SUCCESS, Act, AuditLog
from dicomnode.config import Peer, Settings
from dicomnode.errors import ConfigError, PeerUnavailable, TransientError
from dicomnode.log import Seldom
from dicomnode.model import Commitment, DeliveryKind, DeliveryState
from dicomnode.outgoing import Outgoing, forward, registration, report
from dicomnode.outgoing.work import FIRST, LEASE, LONGEST, Work, backoff
from dicomnode.scu import commitment
from dicomnode.scu.association import Link, NothingAccepted, associated
from dicomnode.scu.storage import Stored, storage_contexts, store_on
from dicomnode.spool.reports import Reports

logger = logging.getLogger(__name__)

COMMITMENTS = 100  # asked for at a time
COMMITTED_KINDS = (DeliveryKind.REGISTRATION, DeliveryKind.REPORT)
REMEMBERED = 50  # deliveries of which a peer took a part
SOP_CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 Annex C

Make = Callable[[Engine, Settings, store.Delivery], Sequence[Outgoing]]

MAKERS: dict[DeliveryKind, Make] = {
    DeliveryKind.REGISTRATION: registration.make,
    DeliveryKind.REPORT: report.make,
    DeliveryKind.FORWARD: forward.make,
}
# What is known of an object before it is made: SOP Class and transfer syntax.
OURS = {
    DeliveryKind.REGISTRATION: (str(SpatialRegistrationStorage), str(ExplicitVRLittleEndian)),
    DeliveryKind.REPORT: (str(Comprehensive3DSRStorage), str(ExplicitVRLittleEndian)),
}


class Line:
    """Associations with a peer, one at a time.

    Another one where what comes needs a presentation context that was not proposed, or where the
    one before broke; what was proposed before is proposed again.
    """

    def __init__(self, settings: Settings, peer: Peer, held: Sequence[tuple[str, str]]) -> None:
        self._settings, self._peer = settings, peer
        self._proposed = dict.fromkeys(held)  # SOP Class and transfer syntax
        self._refused: dict[str, str] = {}  # SOP Class -> why
        self._stack = contextlib.ExitStack()
        self._link: Link | None = None

    def __enter__(self) -> "Line":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._link = None
        self._stack.__exit__(kind, exc, traceback)

    def cut(self, exc: Exception) -> None:
        """Abort the association, for that error."""
        self.__exit__(type(exc), exc, exc.__traceback__)

    def to(self, objects: Sequence[Outgoing]) -> Link:
        """Return an association on which these objects may go.

        Raises
        ------
        NothingAccepted
            If the peer takes nothing of what was proposed, now or since this was made.
        PeerUnavailable, ConfigError
            If there is none to be had.
        """
        held = dict.fromkeys((o.sop_class_uid, o.transfer_syntax_uid) for o in objects)
        is_up = self._link is not None and self._link.is_established
        if self._link is not None and is_up and held.keys() <= self._proposed.keys():
            return self._link
        refused = [self._refused.get(sop_class_uid) for sop_class_uid, _ in held]
        if refused and all(refused):
            raise NothingAccepted(str(refused[0]))
        self.__exit__(None, None, None)
        self._proposed = held | self._proposed
        contexts = storage_contexts(self._proposed)
        try:
            link = self._stack.enter_context(associated(self._settings, self._peer, contexts))
        except NothingAccepted as exc:
            self._refused |= {sop_class_uid: str(exc) for sop_class_uid, _ in self._proposed}
            raise
        self._link = link
        return link


class ToPeer:
    """Stores objects at a peer, and asks it to commit itself to keep ours."""

    def __init__(self, settings: Settings, peer: Peer, audit: AuditLog | None = None) -> None:
        self.peer = peer
        self._audit = audit or AuditLog(None)
        self._reports = Reports.of(settings.spool)
        self._told = Seldom()
        # Delivery and version -> SOP Instance UIDs that the peer took of it, though not yet all.
        self._taken: dict[tuple[int, int], set[str]] = {}

    def carry(self, work: Work, taken: Sequence[store.Delivery]) -> None:
        """Store the objects of deliveries, as far as may be on one association."""
        kinds = dict.fromkeys(d.what.kind for d in taken)
        held = [OURS[kind] for kind in kinds if kind in OURS]
        with Line(work.settings, self.peer, held) as line:
            for delivery in taken:
                objects = work.make(delivery, MAKERS[delivery.what.kind])
                if objects is None:
                    continue
                try:
                    self._send(work, line, delivery, objects)
                except (TransientError, ConfigError):
                    raise
                except Exception as exc:
                    line.cut(exc)
                    work.failed(delivery, exc)

    def _send(
        self, work: Work, line: Line, delivery: store.Delivery, objects: Sequence[Outgoing]
    ) -> None:
        """Store what a peer does not have yet of the objects of a delivery, and settle it."""
        has = self._taken_of(delivery)
        wanted = [o for o in objects if o.sop_instance_uid not in has]
        answers: list[Stored] = []
        try:
            if wanted:
                link = line.to(wanted)
                answers = self._store(work, link, delivery, wanted, has)
        except NothingAccepted as exc:
            work.retry(delivery, str(exc))
            return
        refused = [a for a in answers if not a.ok]
        if answers:
            self._tell(delivery, len(answers), MINOR_FAILURE if refused else SUCCESS)
        if not refused:
            self._done(work, delivery, objects)
            return
        missing = sum(o.sop_instance_uid not in has for o in objects)
        some = f"{missing} of {len(objects)}: " if len(objects) > 1 else ""
        work.retry(delivery, f"{some}{refused[0].reason}")
        if refused[-1].takes_nothing:
            # Nor would it what is behind: that was no attempt.
            work.leave(FIRST)
            raise PeerUnavailable(f"{self.peer.ae_title} answers {refused[-1].reason}")

    def _store(
        self,
        work: Work,
        link: Link,
        delivery: store.Delivery,
        wanted: Sequence[Outgoing],
        has: set[str],
    ) -> list[Stored]:
        """Store objects until all are, or the peer says that more would be in vain."""
        answers: list[Stored] = []
        try:
            for answer in store_on(link, wanted):
                answers.append(answer)
                if answer.ok:
                    has.add(answer.sop_instance_uid)
                elif answer.takes_nothing or answer.status == SOP_CLASS_NOT_SUPPORTED:
                    break
        except PeerUnavailable as exc:
            # Perhaps it is this object that the peer cannot bear: those behind it are to come
            # first the next time.
            work.retry(delivery, str(exc))
            self._tell(delivery, len(answers) + 1, MINOR_FAILURE)
            work.leave(FIRST)
            raise
        return answers

    def _taken_of(self, delivery: store.Delivery) -> set[str]:
        key = delivery.id, delivery.version
        if key not in self._taken and len(self._taken) >= REMEMBERED:
            del self._taken[next(iter(self._taken))]  # all of it goes again: no harm
        return self._taken.setdefault(key, set())

    def _done(self, work: Work, delivery: store.Delivery, objects: Sequence[Outgoing]) -> None:
        self._taken.pop((delivery.id, delivery.version), None)
        if not objects:
            work.settle(delivery, DeliveryState.DROPPED)
            return
        kind, asks = delivery.what.kind, work.settings.deliver.commitment
        last = objects[-1]
        work.settle(
            delivery,
            DeliveryState.DONE,
            sop_class_uid=last.sop_class_uid,
            sop_instance_uid=last.sop_instance_uid,
            commitment_due_at=work.clock() if asks and kind in COMMITTED_KINDS else None,
        )
        logger.info(
            "delivered",
            extra={
                "delivery": delivery.id,
                "kind": str(kind),
                "destination": self.peer.ae_title,
                "instances": len(objects),
                "sop_instance_uid": last.sop_instance_uid,
            },
        )

    def _tell(self, delivery: store.Delivery, instances: int, outcome: int) -> None:
        self._audit.write(
            Act.INSTANCES_SENT,
            outcome,
            called_ae_title=self.peer.ae_title,
            address=self.peer.host,
            kind=str(delivery.what.kind),
            subject=[uid for uid in (delivery.what.subject, delivery.what.other) if uid],
            instances=instances,
        )

    def after(self, work: Work, now: datetime) -> int:
        """Ask for commitments that are due."""
        with store.reading(work.engine) as session:
            due_at = store.next_commitment_at(session, self.peer.ae_title)
        if due_at is None or due_at > now:
            return 0
        with store.writing(work.engine) as session:
            taken = store.claim_commitments(session, self.peer.ae_title, now, LEASE, COMMITMENTS)
        # What was never asked is not unanswered, however long the exchange was away.
        late = [
            d
            for d in taken
            if d.commitment_attempts and d.done_at and now - d.done_at >= work.give_up
        ]
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
            now = work.clock()
            is_late = all(d.done_at and now - d.done_at >= work.give_up for d in asked)
            due_at = now + (LONGEST if is_late else backoff(most, work.luck()))
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
