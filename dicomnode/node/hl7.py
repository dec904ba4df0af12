"""Listens for HL7 messages that say which patients are one.

Reads messages over MLLP, writes links and the pairs that follow from them. A message is
acknowledged (AA) when that is committed, and not before. AE: the same message may work later. AR:
it never will.
"""

import ipaddress
import logging
import threading
import time
import uuid
from collections import Counter
from datetime import UTC, datetime

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from dicomnode import store
from dicomnode.audit import MINOR_FAILURE, Act, AuditLog
from dicomnode.config import Settings
from dicomnode.errors import MessageError, StoreUnavailable
from dicomnode.hl7 import message as messages
from dicomnode.hl7.message import Identities, Kind, Message, Said
from dicomnode.hl7.mllp import Server
from dicomnode.log import Seldom
from dicomnode.scp import tls
from dicomnode.scp.access import Origin
from dicomnode.store import Changed, LinkSource

logger = logging.getLogger(__name__)

ACCEPTED, ERROR, REJECTED = "AA", "AE", "AR"
COUNTS_S = 3600.0  # between lines of how many messages came


class HL7Listener:
    """A service of the exchange: each connection has a thread, merges happen one by one."""

    name = "hl7"

    def __init__(self, settings: Settings, engine: Engine) -> None:
        own = settings.hl7
        assert own.port is not None
        self.engine = engine
        self.counts: Counter[str] = Counter()
        default = own.default_issuer
        self._identities = Identities(
            own.issuers,
            settings.node.default_issuer if default is None else default,
            frozenset(own.identifier_types),
            settings.node.placeholder_ids,
            own.changed_identifiers,
        )
        self._processing_ids = frozenset(own.processing_ids)
        self._networks = [
            ipaddress.ip_network(name)
            for address in own.senders
            for name in (("0.0.0.0/0", "::/0") if address == "*" else (address,))
        ]
        self._audit = AuditLog(settings.audit_log)
        self._lock = threading.Lock()
        self._seldom = Seldom()
        self._told, self._told_at = Counter[str](), time.monotonic()
        endpoint = None
        if own.tls:
            tls.check(settings)
            endpoint = tls.Endpoint(settings.tls)
        self.server = Server(
            own.host,
            own.port,
            self._answer,
            self._admits,
            endpoint,
            own.idle_seconds,
            self._refused,
        )

    def step(self, now: datetime) -> int:
        """Take the next connection."""
        taken = self.server.step()
        if time.monotonic() - self._told_at > COUNTS_S and self.counts != self._told:
            self._told, self._told_at = self.counts.copy(), time.monotonic()
            logger.info("HL7 messages", extra=dict(self._told))
        return taken

    def close(self) -> None:
        """Listen no more."""
        self.server.close()
        self._audit.close()

    def _admits(self, origin: Origin) -> bool:
        if not self._networks:
            return origin.here
        return any(origin.address in network for network in self._networks)

    def _answer(self, data: bytes, sender: str, whole: bool) -> bytes | None:
        """Return the acknowledgment of a message; None of what is one itself."""
        message: Message | None = None
        now = datetime.now(UTC)
        try:
            message = messages.parse(data)
            if message.type == "ACK":  # two that answer answers would never end
                self.counts["ignored"] += 1
                return None
            if not whole:
                raise MessageError("message too long")
            code, text = self._take(message, sender, now)
        except MessageError as exc:
            code, text = REJECTED, str(exc)
            self.counts["refused"] += 1
            self._audit.write(Act.MESSAGE_REFUSED, MINOR_FAILURE, address=sender, reason=text)
            if stands_for := self._seldom.due((sender, text)):
                extra = {"address": sender, "reason": text, "times": stands_for}
                logger.warning("HL7 message refused", extra=extra)
        except StoreUnavailable as exc:
            code, text = ERROR, "not stored, send it again later"
            logger.warning("HL7 message not stored", extra={"reason": str(exc)})
        except Exception as exc:  # a sender is always answered
            code, text = ERROR, "not stored, send it again later"
            # No traceback: it could quote what a patient is called.
            logger.error("HL7 message failed", extra={"error": type(exc).__name__})
        return messages.answer(message, code, text, now.astimezone(), uuid.uuid4().hex[:20])

    def _take(self, message: Message, sender: str, now: datetime) -> tuple[str, str]:
        said = messages.said(message, self._identities)
        if said is None:
            self.counts["ignored"] += 1
            return ACCEPTED, ""
        if (message.processing_id or "P") not in self._processing_ids:
            raise MessageError("processing ID (MSH-11) is not taken")
        # One at a time: the store would let them wait for each other, a connection each.
        with self._lock, store.writing(self.engine) as session:
            changes = _apply(session, message, said, now)
        self.counts["taken"] += 1
        for changed in changes:
            if not changed.is_new:
                continue
            is_link = said.kind is Kind.LINK
            told = {"link": changed.link.id, "pairs": changed.pairs}
            logger.info("patients linked" if is_link else "patients unlinked", extra=told)
            act = Act.PATIENTS_LINKED if is_link else Act.PATIENTS_UNLINKED
            self._audit.write(act, source=str(LinkSource.HL7), address=sender, **told)
        return ACCEPTED, ""

    def _refused(self, address: str, why: str) -> None:
        self._audit.write(Act.CONNECTION_REFUSED, MINOR_FAILURE, address=address, reason=why)
        if stands_for := self._seldom.due((address, why)):
            extra = {"address": address, "reason": why, "times": stands_for}
            logger.warning("connection refused", extra=extra)


def _apply(session: Session, message: Message, said: Said, now: datetime) -> list[Changed]:
    """Do what a message says, but for one that was taken before."""
    pairs = [part for pair in said.pairs for k in pair for part in (k.patient_id, k.issuer)]
    parts = [*(message.header(n) for n in (3, 4, 7, 10)), str(said.kind), *pairs]
    if not store.take_message(session, parts, now):
        return []
    changes: list[Changed] = []
    for merged, into in said.pairs:
        if said.kind is Kind.LINK:
            source, control_id = LinkSource.HL7, message.control_id
            changes.append(store.link_patients(session, merged, into, source, now, control_id))
        else:
            changes += store.unlink_between(session, merged, into, now)
    return changes
