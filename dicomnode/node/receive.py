"""The receiver: a Verification and Storage SCP. Reads associations, writes the spool.

It waits for neither database nor device, and reads nothing of a data set: what a sender
transmits goes to stable storage as it came, behind file meta information of our own.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from pynetdicom import AE, Association, _config, evt

from dicomnode import notify
from dicomnode.audit import MINOR_FAILURE, Act, AuditLog
from dicomnode.audit import SUCCESS as SUCCESS_OUTCOME
from dicomnode.config import Settings
from dicomnode.errors import ConfigError, SpoolFull
from dicomnode.log import Seldom
from dicomnode.model import RECEIVER_DIGITS
from dicomnode.scp import access, lane, tls
from dicomnode.scp.access import Directory, Rejection
from dicomnode.scp.commitment import handle_event_report, reporting_context
from dicomnode.scp.connection import shut_down
from dicomnode.scp.contexts import handle_sop_common, supported_contexts
from dicomnode.scp.dimse import StoreRequest
from dicomnode.scp.listener import Listener, Visit, listen
from dicomnode.scp.meta import file_meta
from dicomnode.scp.pdata import Budget, Limits
from dicomnode.scp.slots import Slot, Slots
from dicomnode.spool import Spool
from dicomnode.spool.reports import Reports

logger = logging.getLogger(__name__)

# PS3.4 Table B.2-1
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700  # the sender keeps the object, and may try again
CANNOT_UNDERSTAND = 0xC211  # of C000-CFFF; the code pynetdicom gives an exception of its handler

DIMSE_TIMEOUT_S = 60.0
# How long running associations may go on when the receiver stops, and an abort may take.
STOP_GRACE_S = 5.0
ABORT_GRACE_S = 2.0
TAKEOVER_S = 15.0
ALIVE_S = 1.0  # between signs of life to systemd
WATERMARK_S = 1.0  # between looks at the free space
RECEIVERS = 64  # on one spool, at most


class Receiver:
    """Accepts associations of known peers and spools what they store.

    Parameters
    ----------
    settings
        Of the node.
    listening
        A socket that listens, which receiver processes share; unset, it listens by itself.
    """

    def __init__(self, settings: Settings, listening: socket.socket | None = None) -> None:
        peers = settings.node.peers
        if not any(peer.calling for peer in peers):
            raise ConfigError(
                "node.peers: nobody may send; name each sender, for example "
                'peers = [{ ae_title = "PACS", host = "10.0.0.5", port = 104 }]'
            )
        tls.check(settings)
        self._endpoint = tls.Endpoint(settings.tls) if settings.tls.certificate else None
        self._settings = settings
        self._listening = listening
        self._spool = Spool.of(settings.spool)
        self._reports = Reports.of(settings.spool)
        self._audit = AuditLog(settings.audit_log)
        self._directory = Directory(peers)
        self._refused = Seldom()
        self._rejected = Seldom(60.0)
        self._free: tuple[float, bool] = (0.0, False)  # until when it holds; whether it is short
        self._identity: Slot | None = None
        self._visits: dict[Association, Visit] = {}
        self._server: Listener | None = None
        self._limits = Limits()
        self._budget = Budget(self._limits.buffered_bytes)
        self._fast_lane = settings.node.fast_lane
        if self._fast_lane and (missing := lane.check()):
            logger.warning("no fast lane in this pynetdicom", extra={"missing": missing})
            self._fast_lane = False

    @property
    def port(self) -> int:
        """The TCP port it listens on, once started."""
        return self._port

    @property
    def connections(self) -> int:
        """How many connections there are, associations and those on the way to one."""
        return len(self._visits) + (self._server.connecting if self._server else 0)

    def start(self) -> None:
        """Listen; associations run in threads of their own.

        Raises
        ------
        ConfigError
            If it cannot listen on that address.
        """
        # Else pynetdicom formats every PDU and message for its log, 0.3 ms of CPU a slice.
        _config.LOG_HANDLER_LEVEL = "none"
        node = self._settings.node
        listening = self._listening or listen(node.host, node.port)
        try:
            self._start(listening)
        except BaseException:
            listening.close()
            raise
        self._port = int(listening.getsockname()[1])
        logger.info("receiver started", extra={"host": node.host, "port": self._port})
        self._audit.write(Act.STARTED, part="receiver", ae_title=node.ae_title, port=self._port)

    def _start(self, listening: socket.socket) -> None:
        node = self._settings.node
        slots = self._spool.path / ".slots"
        self._all = Slots(slots, "association", node.maximum_associations)
        self._of_peer = {
            peer.ae_title: Slots(
                slots,
                f"association-{peer.ae_title.encode().hex()}",
                peer.maximum_associations or node.maximum_associations_per_peer,
            )
            for peer in node.peers
        }
        self._spool.clean()
        self._identity = self._begin_anew(Slots(slots, "receiver", RECEIVERS))
        ae = AE(node.ae_title)
        ae.acse_timeout = node.handshake_seconds
        ae.dimse_timeout = DIMSE_TIMEOUT_S
        ae.network_timeout = node.idle_seconds
        # Ours, in `_rejection`, counts over all processes.
        ae.maximum_associations = node.maximum_associations + 1
        ae.maximum_pdu_size = self._limits.announced_pdu_bytes
        self._directory.start()
        self._server = Listener(
            ae,
            [
                (evt.EVT_CONN_OPEN, self._handle_conn_open),
                (evt.EVT_REQUESTED, self._handle_requested),
                (evt.EVT_SOP_COMMON, handle_sop_common),
                (evt.EVT_ESTABLISHED, self._handle_established),
                (evt.EVT_C_STORE, self._handle_store),
                (evt.EVT_N_EVENT_REPORT, self._handle_event_report),
            ],
            listening,
            self._directory,
            self._endpoint,
            self._visits,
            prefix=_prefix(self._identity),
            handshake_s=node.handshake_seconds,
            maximum_connecting=node.maximum_connecting,
            on_refused=self._tell_refused,
            on_end=self._end,
        )
        self._server.start()

    def stop(self) -> None:
        """Refuse new associations, let the running ones finish for a while, abort the rest."""
        if self._server is None:
            return
        server, self._server = self._server, None
        self._directory.stop()
        server.shutdown()
        server.end_connecting()
        _wait(lambda: not any(a.is_established for a in list(self._visits)), STOP_GRACE_S)
        remaining = dict(self._visits)
        for assoc, visit in remaining.items():
            if assoc.is_established:
                assoc.abort(block=False)  # blocking, it closes the socket before the A-ABORT
            else:
                shut_down(visit.connection)
        _wait(lambda: not any(assoc.dul.is_alive() for assoc in remaining), ABORT_GRACE_S)
        for visit in remaining.values():
            # A peer that broke off within a PDU keeps its thread reading.
            shut_down(visit.connection)
        _wait(lambda: not self._visits, ABORT_GRACE_S)
        self._spool.close()
        if self._identity:
            self._identity.release()
        logger.info("receiver stopped")
        self._audit.write(Act.STOPPED, part="receiver")
        self._audit.close()

    def _begin_anew(self, receivers: Slots) -> Slot:
        """Become a receiver that no other process is, and end what those gone left open."""
        with receivers.alone():
            identity = receivers.take()
            if identity is None:
                raise ConfigError(f"node.receivers: {RECEIVERS} are at {self._spool.path} already")
            for gone in (identity, *receivers.left_behind()):
                self._spool.put_event(_prefix(gone) + "0" * 8, "started")
        return identity

    def _handle_requested(self, event: evt.Event) -> None:
        assoc, visit = event.assoc, self._visits[event.assoc]
        try:
            rejection = self._rejection(assoc, visit)
            if rejection is None:
                handle_requested(event)
                return
        except Exception:  # pynetdicom would pass over it, and accept
            logger.exception("association not judged")
            rejection = access.NOT_JUDGED
        assoc.acse.send_reject(rejection.result, rejection.source, rejection.reason)
        self._tell_rejected(assoc, visit, rejection)
        assoc.kill()  # once the requestor has read it and closed, or the ARTIM timer ran out

    def _rejection(self, assoc: Association, visit: Visit) -> Rejection | None:
        """Why a request is rejected; None where it is not, and it holds its slots then."""
        request = assoc.requestor.primitive
        peer = self._directory.peer(request.calling_ae_title)
        if request.called_ae_title.strip(" ") != self._settings.node.ae_title:
            return access.CALLED_AE_TITLE
        if peer is None:
            return access.CALLING_AE_TITLE
        if not self._directory.matches(peer.ae_title, visit.origin):
            return access.OTHER_ADDRESS
        if not tls.accepts(peer, visit.certificate):
            return access.OTHER_CERTIFICATE
        if self._is_short():
            return access.DISK_SHORT
        for slots, why in (
            (self._of_peer[peer.ae_title], access.TOO_MANY_OF_PEER),
            (self._all, access.TOO_MANY),
        ):
            try:
                slot = slots.take()
            except OSError as exc:  # no more file handles, or the folder is gone
                logger.warning("no slot for an association", extra={"reason": exc.strerror})
                slot = None
            if slot is None:
                return why
            visit.slots.append(slot)
        return None

    def _is_short(self) -> bool:
        """Whether the disk is below its watermark; looked at once a second at most."""
        until, short = self._free
        now = time.monotonic()
        if now >= until:
            try:
                short = self._spool.free_bytes() < self._settings.refuse_below_bytes
            except OSError:
                short = False  # C-STORE will tell
            self._free = now + WATERMARK_S, short
        return short

    def _handle_established(self, event: evt.Event) -> None:
        assoc, visit = event.assoc, self._visits[event.assoc]
        # An association that was accepted has more time than a stranger.
        if not isinstance(assoc.dul.socket, lane.LaneSocket):  # which has limits of its own
            visit.connection.settimeout(self._settings.node.idle_seconds)
        self._audit.write(Act.ASSOCIATION_OPENED, **_who(assoc, visit))

    def _handle_conn_open(self, event: evt.Event) -> None:
        if self._fast_lane and _connection(event.assoc):
            lane.install(event.assoc, self._store, self._limits, self._budget, self._count_refused)
        else:
            handle_conn_open(event)

    def _handle_store(self, event: evt.Event) -> int:
        """Answer a C-STORE that pynetdicom read."""
        request, context = event.request, event.context
        as_read = StoreRequest(
            context_id=context.context_id,
            transfer_syntax_uid=context.transfer_syntax,
            message_id=request.MessageID,
            affected_sop_class_uid=request.AffectedSOPClassUID,
            affected_sop_instance_uid=request.AffectedSOPInstanceUID,
            priority=request.Priority,
            move_originator_ae_title=request.MoveOriginatorApplicationEntityTitle,
            move_originator_message_id=request.MoveOriginatorMessageID,
        )
        return self._store(event.assoc, as_read, request.DataSet.getbuffer())

    def _handle_event_report(self, event: evt.Event) -> tuple[int, Any]:
        """Answer what a peer reports of a Storage Commitment that the exchange asked for."""
        return handle_event_report(
            event, event.assoc.requestor.ae_title.strip(" "), self._reports.put
        )

    def _count_refused(self, assoc: Association) -> None:
        self._visits[assoc].not_stored()

    def _store(self, assoc: Association, request: StoreRequest, data: memoryview) -> int:
        visit = self._visits[assoc]
        status = handle_store(
            request,
            data,
            self._spool,
            visit.association_id,
            calling_ae_title=assoc.requestor.ae_title,
            called_ae_title=assoc.acceptor.ae_title,
        )
        if status == SUCCESS:
            visit.stored(len(data))
        else:
            visit.not_stored()
        return status

    def _end(self, assoc: Association, visit: Visit) -> None:
        # Neither EVT_RELEASED nor EVT_ABORTED is certain to come, and EVT_CONN_CLOSE may come
        # while the last Instance is being written. Once the threads of the association are over,
        # all it stored is in the spool, and how it ended is settled.
        for slot in visit.slots:
            slot.release()
        if not visit.established:
            return
        kind = "released" if assoc.is_released else "aborted"
        extra = {"association_id": visit.association_id, "kind": kind}
        self._audit.write(
            Act.ASSOCIATION_ENDED,
            SUCCESS_OUTCOME if kind == "released" and not visit.refused else MINOR_FAILURE,
            **_who(assoc, visit),
            kind=kind,
            instances=visit.instances,
            bytes=visit.bytes,
            refused=visit.refused or None,
        )
        if not visit.instances:
            return
        try:
            self._spool.put_event(visit.association_id, kind)
            logger.debug("association over", extra=extra)
        except SpoolFull as exc:  # the worker waits `series.lost_seconds` instead
            logger.warning("end of association not spooled", extra={**extra, "reason": str(exc)})

    def _tell_refused(self, why: str, address: str, detail: str) -> None:
        """Log and audit a connection that was closed; a port scan must not fill the disk."""
        times = self._refused.due((why, address, detail))
        if times:
            extra = {"address": address, "reason": f"{why}: {detail}" if detail else why}
            logger.warning("connection refused", extra={**extra, "times": times})
            self._audit.write(Act.CONNECTION_REFUSED, MINOR_FAILURE, **extra, times=times)

    def _tell_rejected(self, assoc: Association, visit: Visit, rejection: Rejection) -> None:
        who = _who(assoc, visit)
        self._audit.write(Act.ASSOCIATION_REJECTED, MINOR_FAILURE, **who, reason=rejection.why)
        key = (who["calling_ae_title"], who["address"], rejection.why)
        if times := self._rejected.due(key):
            extra = {**who, "reason": rejection.why, "times": times}
            logger.warning("association rejected", extra=extra)


def run(settings: Settings, stop: threading.Event, listening: socket.socket | None = None) -> None:
    """Receive until `stop` is set.

    The receiver of a node that was killed needs a moment to notice and let go of the port.
    """
    receiver = Receiver(settings, listening)
    deadline = time.monotonic() + TAKEOVER_S
    while not stop.is_set():
        try:
            receiver.start()
            break
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            stop.wait(0.2)
    notify.ready()
    try:
        while not stop.wait(ALIVE_S):
            notify.alive()
    finally:
        notify.stopping()
        receiver.stop()


def handle_store(
    request: StoreRequest,
    data_set: memoryview,
    spool: Spool,
    association_id: str,
    *,
    calling_ae_title: str,
    called_ae_title: str,
) -> int:
    """Return the status of a C-STORE; Success once the Instance is on stable storage."""
    try:
        meta = file_meta(
            request.affected_sop_class_uid,
            request.affected_sop_instance_uid,
            request.transfer_syntax_uid,
            calling_ae_title=calling_ae_title,
            called_ae_title=called_ae_title,
        )
        spool.put([meta, data_set], association_id)
    except SpoolFull as exc:
        logger.warning("instance refused", extra={"reason": str(exc)})
        return OUT_OF_RESOURCES
    except Exception:
        logger.exception(
            "instance not stored", extra={"sop_instance_uid": request.affected_sop_instance_uid}
        )
        return CANNOT_UNDERSTAND
    logger.debug(
        "instance stored",
        extra={
            "sop_instance_uid": request.affected_sop_instance_uid,
            "bytes": len(data_set),
            "association_id": association_id,
        },
    )
    return SUCCESS


def handle_requested(event: evt.Event) -> None:
    """Say what we accept of the presentation contexts that this requestor proposes."""
    # For this association alone: listing all 170 storage classes costs each one 15 ms.
    requestor = event.assoc.requestor
    event.assoc.acceptor.supported_contexts = supported_contexts(
        requestor.requested_contexts
    ) + reporting_context(requestor.role_selection)


def handle_conn_open(event: evt.Event) -> None:
    """Set the options of a new connection."""
    if connection := _connection(event.assoc):
        # Our responses are small; Nagle would hold them back until the peer acknowledges.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _who(assoc: Association, visit: Visit) -> dict[str, Any]:
    request = assoc.requestor.primitive
    certificate = visit.certificate
    return {
        "association_id": visit.association_id,
        "calling_ae_title": request.calling_ae_title,
        "called_ae_title": request.called_ae_title,
        "address": str(visit.origin.address),
        **({"certificate": certificate.subject} if certificate else {}),
    }


def _prefix(identity: Slot) -> str:
    """What the ids of a receiver's associations begin with; see `SpooledEvent.receiver`."""
    return f"{identity.index:0{RECEIVER_DIGITS}x}"


def _connection(assoc: Association) -> socket.socket | None:
    """The TCP connection of an association, None once it is closed."""
    connection: socket.socket | None = assoc.dul.socket.socket
    return connection


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
