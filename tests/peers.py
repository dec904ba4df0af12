"""Peers that take what the node sends, well or badly, on ports of their own."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

from dicomnode.config import Peer


class Archive:
    """A Storage SCP that keeps what it gets, and answers as it is told.

    Parameters
    ----------
    ae_title : str
        Its own; associations that call another are rejected.
    contexts : sequence of (SOP Class UID, transfer syntaxes)
        What it takes.
    tls : ssl.SSLContext, optional
        In which it answers.
    """

    def __init__(
        self,
        ae_title: str = "PACS",
        contexts: Sequence[tuple[str, Sequence[str]]] = (),
        tls: Any = None,
        handlers: Sequence[tuple[Any, ...]] = (),
    ) -> None:
        self.ae_title = ae_title
        self.stored: list[tuple[str, str, bytes]] = []  # SOP Instance UID, syntax, data set
        self.answers: list[int | Callable[[evt.Event], int]] = []  # of the next C-STOREs
        self.associations = 0
        self.actions: list[Dataset] = []  # of N-ACTION
        self.on_action: Callable[[evt.Event], Any] = lambda event: (0x0000, None)
        self._arrived = threading.Condition()
        ae = AE(ae_title)
        ae.require_called_aet = True
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
        for sop_class_uid, syntaxes in contexts:
            ae.add_supported_context(sop_class_uid, list(syntaxes))
        ae.add_supported_context(Verification)
        self.ae = ae
        self._server: Any = None
        self._tls = tls
        self._handlers = [
            (evt.EVT_ESTABLISHED, self._established),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_N_ACTION, self._action),
            *handlers,
        ]
        self.port = 0

    def __enter__(self) -> "Archive":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on the port it had before if there was one."""
        self._server = self.ae.start_server(
            ("127.0.0.1", self.port),
            block=False,
            evt_handlers=self._handlers,
            ssl_context=self._tls,
        )
        self.port = self._server.socket.getsockname()[1]

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()

    @property
    def peer(self) -> Peer:
        """Itself, as the node knows it."""
        return Peer(ae_title=self.ae_title, host="127.0.0.1", port=self.port)

    @property
    def uids(self) -> list[str]:
        """SOP Instance UIDs of what it stored, in turn."""
        return [uid for uid, _, _ in self.stored]

    def _established(self, event: evt.Event) -> None:
        self.associations += 1

    def _store(self, event: evt.Event) -> int:
        answer = self.answers.pop(0) if self.answers else 0x0000
        status = answer(event) if callable(answer) else answer
        if status == 0x0000 or status >> 12 == 0xB:
            request = event.request
            data = request.DataSet.getvalue()
            self.stored.append(
                (str(request.AffectedSOPInstanceUID), str(event.context.transfer_syntax), data)
            )
        return status

    def _action(self, event: evt.Event) -> Any:
        self.actions.append(event.action_information)
        return self.on_action(event)


def archive(*sop_class_uids: str, commitment: bool = False, **more: Any) -> Archive:
    """Return an archive that takes these SOP Classes uncompressed."""
    syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    made = Archive(contexts=[(uid, syntaxes) for uid in sop_class_uids], **more)
    if commitment:
        made.ae.add_supported_context(StorageCommitmentPushModel)
    return made


Deed = Callable[[socket.socket], None]


@contextlib.contextmanager
def listening(deed: Deed) -> Iterator[int]:
    """Give the port of a peer that does something raw to each connection, then closes it."""
    server = socket.create_server(("127.0.0.1", 0))
    open_ones: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            open_ones.append(connection)
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            deed(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        for connection in open_ones:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def read_pdu(connection: socket.socket) -> tuple[int, bytes]:
    """Return type and content of one PDU; (0, b"") at the end."""
    header = _exactly(connection, 6)
    if len(header) < 6:
        return 0, b""
    return header[0], _exactly(connection, int.from_bytes(header[2:6]))


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            break
        data += part
    return data


def accept(request: bytes, max_pdu: int = 16384) -> bytes:
    """Return the A-ASSOCIATE-AC that takes the first syntax of each context of a request."""
    at, results = 68, b""  # PS3.8 Table 9-11: version, reserved, titles, reserved
    while at < len(request):
        kind, length = request[at], int.from_bytes(request[at + 2 : at + 4])
        item = request[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == 0x20:
            abstract = int.from_bytes(item[6:8])
            syntax = item[8 + abstract :]
            first = syntax[: 4 + int.from_bytes(syntax[2:4])]
            results += b"\x21\0" + (4 + len(first)).to_bytes(2) + bytes([item[0], 0, 0, 0]) + first
    context = b"1.2.840.10008.3.1.1.1"
    user = b"\x51\0\0\x04" + max_pdu.to_bytes(4) + b"\x52\0\0\x071.2.3.4"
    body = (
        request[:68]
        + b"\x10\0"
        + len(context).to_bytes(2)
        + context
        + results
        + b"\x50\0"
        + len(user).to_bytes(2)
        + user
    )
    return b"\x02\0" + len(body).to_bytes(4) + body
