"""MLLP: messages over TCP, each between <VT> and <FS><CR>, each answered on its connection.

HL7 Minimal Lower Layer Protocol, release 1 (HL7 2.5.1, Appendix C of the implementation guide). A
thread a connection: interface engines open few and keep them.
"""

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

from dicomnode.errors import TransientError
from dicomnode.scp import tls
from dicomnode.scp.access import Origin, origin
from dicomnode.scp.connection import shut_down

logger = logging.getLogger(__name__)

VT, FS, CR = b"\x0b", b"\x1c", b"\r"
MAX_BYTES = 1 << 20  # of a message; one that merges patients has 1 kB
MAX_CONNECTIONS = 32
MESSAGE_S = 60.0  # from the first byte of a message to its last
HANDSHAKE_S = 15.0
POLL_S = 1.0
CHUNK = 1 << 16


class TooLong(Exception):
    """A message of more than `MAX_BYTES`; `head` is how it begins."""

    def __init__(self, head: bytes) -> None:
        super().__init__("message too long")
        self.head = head


class NotMLLP(Exception):
    """Bytes that are in no message."""


class Server:
    """Listens, and hands each message to `answer`.

    Parameters
    ----------
    answer
        Called with a message and the address of its sender, in one of several threads; returns
        what to answer, None for nothing. Called with too long a message's beginning and
        `whole=False` as well.
    admits
        Whether a connection may come from there.
    on_refused
        Called with the address, and why, of a connection that was closed.
    """

    def __init__(
        self,
        host: str,
        port: int,
        answer: Callable[[bytes, str, bool], bytes | None],
        admits: Callable[[Origin], bool],
        endpoint: tls.Endpoint | None,
        idle_s: float,
        on_refused: Callable[[str, str], None],
    ) -> None:
        self._host, self._port = host, port
        self._answer, self._admits, self._endpoint = answer, admits, endpoint
        self._idle_s, self._on_refused = idle_s, on_refused
        self._listening: socket.socket | None = None
        self._lock = threading.Lock()
        self._last: dict[socket.socket, float] = {}  # connection -> when it last said something

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._listening is not None
        return int(self._listening.getsockname()[1])

    def listen(self) -> None:
        """Listen, where it does not yet.

        Raises
        ------
        TransientError
            If it cannot.
        """
        if self._listening is not None:
            return
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            self._listening = socket.create_server((self._host, self._port), family=family)
        except OSError as exc:
            where = f"{self._host}:{self._port}"
            raise TransientError(f"hl7: cannot listen on {where}: {exc.strerror}") from exc

    def step(self) -> int:
        """Take the next connection; 0 where none came for a second.

        Raises
        ------
        TransientError
            If it cannot listen.
        """
        self.listen()
        assert self._listening is not None
        ready, _, _ = select.select([self._listening], [], [], POLL_S)
        if not ready:
            return 0
        try:
            connection, address = self._listening.accept()
        except OSError:  # it left before it was accepted, or no file handles are left
            time.sleep(0.1)  # without handles it would be asked for at once, and again
            return 0
        connection.settimeout(HANDSHAKE_S)
        remote = str(address[0])
        try:
            if not self._admits(origin(remote, str(connection.getsockname()[0]))):
                raise PermissionError("address of no sender")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError as exc:
            connection.close()
            if isinstance(exc, PermissionError):
                self._on_refused(remote, str(exc))
            return 1
        self._make_room()
        with self._lock:
            self._last[connection] = time.monotonic()
        threading.Thread(target=self._serve, args=(connection, remote), daemon=True).start()
        return 1

    def close(self) -> None:
        """Listen no more, and end every connection."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        with self._lock:
            for connection in self._last:
                shut_down(connection)

    def _make_room(self) -> None:
        """End the connection that was silent longest, where there are too many."""
        with self._lock:
            if len(self._last) >= MAX_CONNECTIONS:
                oldest = min(self._last, key=self._last.__getitem__)
                del self._last[oldest]
                shut_down(oldest)

    def _serve(self, accepted: socket.socket, remote: str) -> None:
        connection = accepted
        try:
            if self._endpoint is not None:
                wrapped = self._endpoint.wrap(accepted)
                connection, wrapped.allowance = wrapped, None
                with self._lock:  # the same, under the name that ends it
                    self._last[connection] = self._last.pop(accepted, time.monotonic())
                wrapped.do_handshake()
            self._converse(connection, remote)
        except ssl.SSLError:
            self._on_refused(remote, "TLS handshake failed")
        except NotMLLP:
            self._on_refused(remote, "not MLLP")
        except OSError:
            pass  # it left, or was silent for too long
        except Exception as exc:  # no message may take the listener along
            # No traceback: it could quote what a patient is called.
            logger.error("HL7 connection failed", extra={"error": type(exc).__name__})
        finally:
            with self._lock:
                self._last.pop(connection, None)
                self._last.pop(accepted, None)
            with contextlib.suppress(OSError):
                connection.close()

    def _converse(self, connection: socket.socket, remote: str) -> None:
        blocks = Blocks()
        began = 0.0
        while True:
            if blocks.pending:
                left = began + MESSAGE_S - time.monotonic()
                if left <= 0:
                    return
                connection.settimeout(left)
            else:
                connection.settimeout(self._idle_s)
            data = connection.recv(CHUNK)
            if not data:
                return
            began = began if blocks.pending else time.monotonic()
            with self._lock:
                if connection in self._last:
                    self._last[connection] = time.monotonic()
            try:
                for block in blocks.take(data):
                    self._reply(connection, self._answer(block, remote, True))
                    began = time.monotonic()
            except TooLong as exc:
                self._reply(connection, self._answer(exc.head, remote, False))
                return

    def _reply(self, connection: socket.socket, message: bytes | None) -> None:
        if message is not None:
            connection.settimeout(MESSAGE_S)
            connection.sendall(VT + message + FS + CR)


class Blocks:
    """Takes messages out of a stream of bytes, however it is cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._looked = 0  # how far there is no end

    @property
    def pending(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._buffer)

    def take(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that these bytes complete.

        Raises
        ------
        NotMLLP
            If there is something between messages.
        TooLong
            If a message does not end within `MAX_BYTES`.
        """
        self._buffer += data
        while True:
            self._skip()
            end = self._buffer.find(FS, self._looked)
            if end < 0:
                self._looked = len(self._buffer)
                if len(self._buffer) > MAX_BYTES:
                    raise TooLong(bytes(self._buffer[1:CHUNK]))
                return
            if end > MAX_BYTES:
                raise TooLong(bytes(self._buffer[1:CHUNK]))
            # A second start: the message before it was given up by its sender.
            block = bytes(self._buffer[1:end]).rpartition(VT)[2]
            del self._buffer[: end + 1]
            self._looked = 0
            yield block

    def _skip(self) -> None:
        """Go over what may be between messages: the CR after FS, and line ends of senders."""
        if self._looked:
            return
        rest = self._buffer.lstrip(b"\r\n")
        if rest and rest[:1] != VT:
            raise NotMLLP
        if len(rest) < len(self._buffer):
            self._buffer = rest
