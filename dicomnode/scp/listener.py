"""The listening socket, and what becomes of a connection before and after its association.

One thread stays with each connection from its first byte to its end: it waits for the peer to
speak, does the TLS handshake, hands the connection to pynetdicom, and accounts for it when all
is over. Nothing a peer does holds up the thread that accepts.
"""

import errno
import gc
import logging
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from socketserver import BaseServer
from typing import Any

from pynetdicom import AE, Association, build_context, evt
from pynetdicom.sop_class import Verification
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode.errors import ConfigError
from dicomnode.scp import tls
from dicomnode.scp.access import Directory, Origin, origin
from dicomnode.scp.connection import QUICK_ACK, PromptSocket, PromptTLSSocket, shut_down
from dicomnode.scp.slots import Slot

logger = logging.getLogger(__name__)

BACKLOG = 512  # pynetdicom's 5 drops connections of a busy PACS
POLL_S = 0.1  # within it the accepting thread notices that it is to stop
COLLECT_S = 30.0
DUL_GRACE_S = 2.0
MAXIMUM_CONNECTING = 512  # of all addresses together
HEAD_BYTES = 10  # the shortest PDU
WAIT_BYTES = 1 << 15  # of a request; what TCP surely holds for us, and few requests are longer

STRANGER = "address of no peer"
TLS_FAILED = "TLS handshake failed"
NO_HANDLES = "no file handles"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; receiver processes may share it.

    It is shared by inheritance and not by SO_REUSEPORT: a second node on the port is told so,
    port 0 is one port for all, and what waits in the backlog outlives a receiver that is killed.

    Raises
    ------
    ConfigError
        If it cannot listen on that address.
    """
    where = f"node.host, node.port: cannot listen on {host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    except OSError as exc:
        raise ConfigError(f"{where}: {exc.strerror}") from exc
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as exc:
        listening.close()
        raise ConfigError(f"{where}: {exc.strerror}") from exc
    return listening


@dataclass(slots=True, eq=False)
class Visit:
    """One connection that became an association, and what it brought."""

    origin: Origin
    certificate: tls.Certificate | None
    association_id: str
    connection: PromptSocket | PromptTLSSocket
    accepted: socket.socket  # the same as it was accepted
    established: bool = False
    instances: int = 0
    bytes: int = 0
    refused: int = 0  # Instances that were not taken
    slots: list[Slot] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stored(self, size: int) -> None:
        """Count an Instance that was answered with Success."""
        with self._lock:
            self.instances += 1
            self.bytes += size

    def not_stored(self) -> None:
        """Count an Instance that was answered with anything else."""
        with self._lock:
            self.refused += 1


class Listener(ThreadedAssociationServer):  # type: ignore[misc]  # pynetdicom has no types
    """Accepts connections of peers, and hands those that speak to pynetdicom.

    Parameters
    ----------
    ae, handlers
        As for `AE.start_server`.
    listening
        A socket that listens; it may be shared with other processes.
    directory
        Connections from an address of no peer are closed at once.
    endpoint
        TLS, or None for none.
    visits
        Filled with the associations there are.
    prefix
        What the ids of its associations begin with.
    handshake_s
        Seconds from connection to association.
    maximum_connecting
        Connections of one address that may be on the way to an association.
    on_refused
        Called with why, address and detail for a connection that was closed.
    on_end
        Called when an association and its threads are over.
    """

    daemon_threads = True  # `Receiver.stop` waits for them, so the interpreter need not

    def __init__(
        self,
        ae: AE,
        handlers: list[Any],
        listening: socket.socket,
        directory: Directory,
        endpoint: tls.Endpoint | None,
        visits: dict[Association, Visit],
        *,
        prefix: str,
        handshake_s: float,
        maximum_connecting: int,
        on_refused: Callable[[str, str, str], None],
        on_end: Callable[[Association, Visit], None],
    ) -> None:
        self._listening: socket.socket = listening
        self._directory, self._endpoint = directory, endpoint
        self._prefix, self._handshake_s = prefix, handshake_s
        self._maximum_connecting = maximum_connecting
        self._on_refused, self._on_end = on_refused, on_end
        self._visits = visits
        self._thread = threading.local()
        self._lock = threading.Lock()
        # Connections on the way to an association, oldest first: as accepted -> address, as it is.
        self._connecting: dict[socket.socket, tuple[str, socket.socket]] = {}
        self._collected_at = time.monotonic()
        contexts = [build_context(Verification)]  # and what EVT_REQUESTED adds
        super().__init__(ae, listening.getsockname(), ae.ae_title, contexts)
        # First, so that the handlers that follow find the visit.
        self.bind(evt.EVT_CONN_OPEN, self._begin)
        for event, handler in handlers:
            self.bind(event, handler)
        self.bind(evt.EVT_ESTABLISHED, self._arrive)
        self.bind(evt.EVT_CONN_CLOSE, self._wake)

    def start(self) -> None:
        """Accept, in a thread of its own."""
        threading.Thread(target=self.serve_forever, args=(POLL_S,), daemon=True).start()

    @property
    def connecting(self) -> int:
        """How many connections are on the way to an association."""
        return len(self._connecting)

    def end_connecting(self) -> None:
        """Close every connection that is no association yet."""
        with self._lock:
            for _, connection in self._connecting.values():
                shut_down(connection)

    # What socketserver and pynetdicom call

    def server_bind(self) -> None:
        """Take the socket that was handed in."""
        made: socket.socket = self.socket
        made.close()
        self.socket: socket.socket = self._listening
        self.socket.setblocking(False)  # another process may be quicker to accept
        self.server_address = self.socket.getsockname()

    def server_activate(self) -> None:
        """It listens already."""

    def server_close(self) -> None:
        """Close our end; a shutdown would end it for every process that shares it."""
        self.socket.close()

    def shutdown(self) -> None:
        """Accept no more."""
        BaseServer.shutdown(self)
        self.server_close()

    def service_actions(self) -> None:
        """Collect what pynetdicom's associations leave in cycles, now and then."""
        if time.monotonic() - self._collected_at > COLLECT_S:
            self._collected_at = time.monotonic()
            gc.collect()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        try:
            return self.socket.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                # It stays in the backlog: without a pause we would try again all the time.
                self._on_refused(NO_HANDLES, "", "")
                time.sleep(POLL_S)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether to give a connection a thread; else it is closed at once."""
        address = client_address[0]
        try:
            came = origin(address, request.getsockname()[0])
        except OSError:  # it is gone already
            return False
        if not self._directory.admits(came):
            self._on_refused(STRANGER, str(came.address), "")
            return False
        with self._lock:
            # Who means it speaks at once: the oldest is the one most likely never to.
            same = [r for r, (other, _) in self._connecting.items() if other == address]
            if len(same) >= self._maximum_connecting:
                shut_down(self._connecting.pop(same[0])[1])
            elif len(self._connecting) >= MAXIMUM_CONNECTING:
                shut_down(self._connecting.pop(next(iter(self._connecting)))[1])
            self._connecting[request] = address, request
        return True

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Stay with a connection to its end; called in a thread of its own."""
        deadline = time.monotonic() + self._handshake_s
        opened: socket.socket = request
        try:
            # Until then a connection costs this thread, asleep. What load balancers do to see
            # that we live ends here, without a line in the log.
            if not _requests(request, deadline):
                return
            came = origin(client_address[0], request.getsockname()[0])
            opened = connection = self._dress(request)
            if not self._goes_on(request, connection):
                return
            if isinstance(connection, PromptTLSSocket):
                if not self._shake_hands(connection, came, deadline):
                    return
            connection.settimeout(self._handshake_s)
            association_id = self._prefix + secrets.token_hex(8)[len(self._prefix) :]
            visit = Visit(came, tls.certificate_of(connection), association_id, connection, request)
            self._thread.visit, self._thread.assoc = visit, None
            super().finish_request(connection, client_address)
            self._attend(self._thread.assoc, visit, deadline)
        except OSError as exc:
            logger.debug("connection lost", extra={"reason": exc.strerror})
        finally:
            self._leave(request)
            self.shutdown_request(opened)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, after what pynetdicom still has to send."""
        thread = threading.current_thread()
        if isinstance(thread, Association):
            # An A-ABORT is sent by another thread: closing now would overtake it.
            thread.dul.join(DUL_GRACE_S)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what socketserver would print."""
        self._leave(request)
        logger.exception("connection failed", extra={"address": client_address[0]})

    def _dress(self, request: socket.socket) -> PromptSocket | PromptTLSSocket:
        """The connection as associations use it."""
        if self._endpoint is not None:
            return self._endpoint.wrap(request)
        return PromptSocket(fileno=request.detach())

    def _goes_on(self, request: socket.socket, connection: socket.socket) -> bool:
        """Note its new form; False where it had to make room for another meanwhile."""
        with self._lock:
            if request not in self._connecting:
                return False
            self._connecting[request] = self._connecting[request][0], connection
            return True

    def _shake_hands(self, connection: PromptTLSSocket, came: Origin, deadline: float) -> bool:
        """Do the TLS handshake, and wait for the peer to speak in it; False where it does not."""
        try:
            # One deadline for all of it: OpenSSL's reads and writes share it.
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.do_handshake()
        except OSError as exc:
            self._on_refused(TLS_FAILED, str(came.address), tls.reason_of(exc))
            return False
        return bool(connection.pending()) or _readable(connection, deadline)

    def _begin(self, event: evt.Event) -> None:
        self._thread.assoc = event.assoc
        self._visits[event.assoc] = self._thread.visit

    def _arrive(self, event: evt.Event) -> None:
        visit = self._visits[event.assoc]
        visit.established = True
        visit.connection.allowance = None
        self._leave(visit.accepted)

    def _wake(self, event: evt.Event) -> None:
        # pynetdicom would wait on for a request that cannot come any more.
        assoc = event.assoc
        state = assoc.dul.state_machine.current_state
        if state in ("Sta2", "Sta13") and assoc.requestor.primitive is None:
            assoc.dul.to_user_queue.put(None)

    def _attend(self, assoc: Association, visit: Visit, deadline: float) -> None:
        """Wait for the end of an association, and see to it that it comes."""
        try:
            assoc.join(max(0.0, deadline - time.monotonic()))
            if not visit.established:
                shut_down(visit.connection)
            assoc.join()
            # It still sends what ends the association; one that reads on is cut off.
            assoc.dul.join(DUL_GRACE_S)
            if assoc.dul.is_alive():
                shut_down(visit.connection)
                assoc.dul.join(DUL_GRACE_S)
        finally:
            del self._visits[assoc]
            self._on_end(assoc, visit)

    def _leave(self, accepted: socket.socket) -> None:
        """It is an association now, or never will be."""
        with self._lock:
            self._connecting.pop(accepted, None)


def _requests(connection: socket.socket, deadline: float) -> bool:
    """Wait for an association request, whole; False where none came in time.

    Anything else that a peer may say, in TLS for example, is not waited for.
    """
    head = _peek(connection, HEAD_BYTES, deadline)
    if len(head) == HEAD_BYTES and head[0] == 0x01:  # A-ASSOCIATE-RQ, PS3.8 Table 9-11
        length = 6 + int.from_bytes(head[2:6])
        if length <= WAIT_BYTES:
            _peek(connection, length, deadline)
    return bool(head) and time.monotonic() < deadline


def _peek(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Return so many bytes without taking them; fewer where the peer closed, or time is up."""
    if QUICK_ACK is not None:  # as in `PromptSocket`
        connection.setsockopt(socket.IPPROTO_TCP, QUICK_ACK, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
    ready = _readable(connection, deadline)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    return connection.recv(size, socket.MSG_PEEK) if ready else b""


def _readable(connection: socket.socket, deadline: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
