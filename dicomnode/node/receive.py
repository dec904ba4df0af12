"""The receiver: a Verification and Storage SCP. Reads associations, writes the spool.

It waits for neither database nor device, and reads nothing of a data set: what a sender
transmits goes to stable storage as it came, behind file meta information of our own.
"""

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable

from pynetdicom import AE, Association, _config, build_context, evt
from pynetdicom.sop_class import Verification
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode.config import Settings
from dicomnode.errors import ConfigError, SpoolFull
from dicomnode.scp.connection import PromptSocket
from dicomnode.scp.contexts import handle_sop_common, supported_contexts
from dicomnode.scp.meta import file_meta
from dicomnode.spool import Spool

logger = logging.getLogger(__name__)

# PS3.4 Table B.2-1
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700  # the sender keeps the object, and may try again
CANNOT_UNDERSTAND = 0xC211  # of C000-CFFF; the code pynetdicom gives an exception of its handler

# A requestor speaks first, and at once (the ARTIM timer of PS3.8 9.1.5).
ACSE_TIMEOUT_S = 15.0
DIMSE_TIMEOUT_S = 60.0
# A PACS may think for a while between two slices; a peer whose cable was pulled never says so.
NETWORK_TIMEOUT_S = 120.0
# How long running associations may go on when the receiver stops, and an abort may take.
STOP_GRACE_S = 5.0
ABORT_GRACE_S = 2.0
TAKEOVER_S = 15.0


class Receiver:
    """Accepts associations of known peers and spools what they store."""

    def __init__(self, settings: Settings) -> None:
        peers = settings.node.peers
        calling = [peer.ae_title for peer in peers if peer.calling]
        if not calling:
            raise ConfigError(
                "node.peers: nobody may send; name each sender, for example "
                'peers = [{ ae_title = "PACS", host = "10.0.0.5", port = 104 }]'
            )
        self._host, self._port = settings.node.host, settings.node.port
        self._spool = Spool.of(settings.spool)
        self._ae = AE(settings.node.ae_title)
        self._ae.require_called_aet = True
        self._ae.require_calling_aet = calling
        self._ae.maximum_associations = settings.node.maximum_associations
        self._ae.acse_timeout = ACSE_TIMEOUT_S
        self._ae.dimse_timeout = DIMSE_TIMEOUT_S
        self._ae.network_timeout = NETWORK_TIMEOUT_S
        # maximum_pdu_size stays at 16382: larger PDUs slow a sender that leaves Nagle on from
        # 293 to 26 slices/s (it waits for our delayed TCP acknowledgement once a slice).
        self._server: ThreadedAssociationServer | None = None
        self._association_ids: dict[Association, str] = {}

    @property
    def port(self) -> int:
        """The TCP port it listens on, once started."""
        return self._port

    def start(self) -> None:
        """Listen; associations run in threads of their own.

        Raises
        ------
        ConfigError
            If it cannot listen on that address.
        """
        # Else pynetdicom formats every PDU and message for its log, 0.3 ms of CPU a slice.
        _config.LOG_HANDLER_LEVEL = "none"
        self._spool.clean()
        started = self._spool.put_event(_new_association_id(), "started")
        try:
            server = self._ae.start_server(
                (self._host, self._port),
                block=False,
                contexts=[build_context(Verification)],  # and what `handle_requested` adds
                evt_handlers=[
                    (evt.EVT_CONN_OPEN, handle_conn_open),
                    (evt.EVT_REQUESTED, handle_requested),
                    (evt.EVT_SOP_COMMON, handle_sop_common),
                    (evt.EVT_REJECTED, handle_rejected),
                    (evt.EVT_ESTABLISHED, handle_established),
                    (evt.EVT_C_STORE, self._handle_store),
                ],
            )
        except OSError as exc:
            self._spool.remove(started)  # another receiver may be at work on this spool
            raise ConfigError(
                f"node.host, node.port: cannot listen on {self._host}:{self._port}: {exc.strerror}"
            ) from exc
        server.socket.listen(128)  # pynetdicom's backlog of 5 drops connections of a busy PACS
        self._server, self._port = server, server.server_address[1]
        logger.info("receiver started", extra={"host": self._host, "port": self._port})

    def stop(self) -> None:
        """Refuse new associations, let the running ones finish for a while, abort the rest."""
        if self._server is None:
            return
        server, self._server = self._server, None
        with contextlib.suppress(OSError):
            # Wakes its thread, which else looks up twice a second.
            server.socket.shutdown(socket.SHUT_RDWR)
        server.shutdown()
        _wait(lambda: not any(a.is_established for a in server.active_associations), STOP_GRACE_S)
        remaining = server.active_associations
        for assoc in remaining:
            if assoc.is_established:
                assoc.abort(block=False)  # blocking, it closes the socket before the A-ABORT
            else:
                _shut_down(assoc)
        _wait(lambda: not any(assoc.dul.is_alive() for assoc in remaining), ABORT_GRACE_S)
        for assoc in remaining:  # a peer that broke off within a PDU keeps its thread reading
            _shut_down(assoc)
        _wait(lambda: not self._association_ids, ABORT_GRACE_S)
        self._spool.close()
        logger.info("receiver stopped")

    def _handle_store(self, event: evt.Event) -> int:
        assoc = event.assoc
        association_id = self._association_ids.get(assoc) or _new_association_id()
        status = handle_store(event, self._spool, association_id)
        if status == SUCCESS and assoc not in self._association_ids:
            self._association_ids[assoc] = association_id
            threading.Thread(
                target=self._spool_end, args=(assoc, association_id), daemon=True
            ).start()
        return status

    def _spool_end(self, assoc: Association, association_id: str) -> None:
        # Neither EVT_RELEASED nor EVT_ABORTED is certain to come, and EVT_CONN_CLOSE may come
        # while the last Instance is being written. Once the thread of the association is over,
        # all it stored is in the spool, and how it ended is settled.
        assoc.join()
        kind = "released" if assoc.is_released else "aborted"
        extra = {"association_id": association_id, "kind": kind}
        try:
            self._spool.put_event(association_id, kind)
            logger.debug("association over", extra=extra)
        except SpoolFull as exc:  # the worker waits `series.lost_seconds` instead
            logger.warning("end of association not spooled", extra={**extra, "reason": str(exc)})
        finally:
            del self._association_ids[assoc]


def run(settings: Settings, stop: threading.Event) -> None:
    """Receive until `stop` is set.

    The receiver of a node that was killed needs a moment to notice and let go of the port.
    """
    receiver = Receiver(settings)
    deadline = time.monotonic() + TAKEOVER_S
    while not stop.is_set():
        try:
            receiver.start()
            break
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            stop.wait(0.2)
    try:
        stop.wait()
    finally:
        receiver.stop()


def handle_store(event: evt.Event, spool: Spool, association_id: str) -> int:
    """Return the status of a C-STORE; Success once the Instance is on stable storage."""
    request = event.request
    try:
        data_set = event.encoded_dataset(include_meta=False)
        meta = file_meta(
            request.AffectedSOPClassUID,
            request.AffectedSOPInstanceUID,
            event.context.transfer_syntax,
            calling_ae_title=event.assoc.requestor.ae_title,
            called_ae_title=event.assoc.acceptor.ae_title,
        )
        spool.put([meta, data_set], association_id)
    except SpoolFull as exc:
        logger.warning("instance refused", extra={"reason": str(exc)})
        return OUT_OF_RESOURCES
    except Exception:
        logger.exception(
            "instance not stored", extra={"sop_instance_uid": request.AffectedSOPInstanceUID}
        )
        return CANNOT_UNDERSTAND
    logger.debug(
        "instance stored",
        extra={
            "sop_instance_uid": request.AffectedSOPInstanceUID,
            "bytes": len(data_set),
            "association_id": association_id,
        },
    )
    return SUCCESS


def handle_requested(event: evt.Event) -> None:
    """Say what we accept of the presentation contexts that this requestor proposes."""
    # For this association alone: listing all 170 storage classes costs each one 15 ms.
    event.assoc.acceptor.supported_contexts = supported_contexts(
        event.assoc.requestor.requested_contexts
    )


def handle_conn_open(event: evt.Event) -> None:
    """Set the options of a new connection."""
    if connection := _connection(event.assoc):
        connection = PromptSocket(fileno=connection.detach())
        event.assoc.dul.socket.socket = connection
        # Our responses are small; Nagle would hold them back until the peer acknowledges.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # pynetdicom reads a PDU with a blocking recv, on which its own timeouts cannot act.
        connection.settimeout(ACSE_TIMEOUT_S)


def handle_established(event: evt.Event) -> None:
    """Give an association that was accepted more time than a stranger."""
    if connection := _connection(event.assoc):
        connection.settimeout(NETWORK_TIMEOUT_S)


def handle_rejected(event: evt.Event) -> None:
    """Tell the operator whom we turned away."""
    request = event.assoc.requestor.primitive
    logger.warning(
        "association rejected",
        extra={
            "calling_ae_title": request.calling_ae_title,
            "called_ae_title": request.called_ae_title,
            "address": event.assoc.requestor.address,
        },
    )


def _new_association_id() -> str:
    return secrets.token_hex(8)


def _connection(assoc: Association) -> socket.socket | None:
    """The TCP connection of an association, None once it is closed."""
    connection: socket.socket | None = assoc.dul.socket.socket
    return connection


def _shut_down(assoc: Association) -> None:
    if connection := _connection(assoc):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
