"""PDUs as bytes, right and wrong, and a peer that sends them."""

import contextlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from pynetdicom import build_context
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
)
from pynetdicom.sop_class import PatientRootQueryRetrieveInformationModelFind, Verification

CT, ECHO, SC, FIND, CT2 = 1, 3, 5, 7, 9  # context IDs; FIND is not accepted
CONTEXTS = {
    CT: (CTImageStorage, ExplicitVRLittleEndian),
    ECHO: (Verification, ImplicitVRLittleEndian),
    SC: (SecondaryCaptureImageStorage, ImplicitVRLittleEndian),
    FIND: (PatientRootQueryRetrieveInformationModelFind, ImplicitVRLittleEndian),
    CT2: (CTImageStorage, ImplicitVRLittleEndian),
}
SYNTAXES = {(i, str(sop_class)): str(syntax) for i, (sop_class, syntax) in CONTEXTS.items()}
STORAGE = {key: syntax for key, syntax in SYNTAXES.items() if key[0] in (CT, SC, CT2)}

A_ABORT = bytes.fromhex("07000000000400000000")
A_RELEASE_RQ = bytes.fromhex("05000000000400000000")
COMMAND, DATA, LAST = 1, 0, 2


def associate_rq(maximum_length: int = 16_384, **titles: str) -> bytes:
    """Return an A-ASSOCIATE-RQ with `CONTEXTS`."""
    contexts = []
    for context_id, (sop_class, syntax) in CONTEXTS.items():
        contexts.append(build_context(sop_class, syntax))
        contexts[-1].context_id = context_id
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = maximum_length
    implementation.implementation_class_uid = "1.2.3"
    request = A_ASSOCIATE()
    request.application_context_name = "1.2.840.10008.3.1.1.1"
    request.calling_ae_title = titles.get("calling", "PACS")
    request.called_ae_title = titles.get("called", "DICOMNODE")
    request.presentation_context_definition_list = contexts
    request.user_information = [length, implementation]
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(request)
    return bytes(pdu.encode())


def pdu(kind: int, body: bytes, length: int | None = None) -> bytes:
    """Return a PDU, of a length that may be a lie."""
    return struct.pack(">BxI", kind, len(body) if length is None else length) + body


def pdv(context_id: int, flags: int, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a presentation data value, of a length that may be a lie."""
    length = len(data) + 2 if length is None else length
    return struct.pack(">IBB", length, context_id, flags) + data


def p_data(*items: bytes) -> bytes:
    """Return a P-DATA-TF PDU."""
    return pdu(4, b"".join(items))


def element(number: int, value: bytes) -> bytes:
    """Return an element of a command set."""
    return struct.pack("<HHI", 0, number, len(value)) + value


def us(value: int) -> bytes:
    """Return an unsigned short."""
    return struct.pack("<H", value)


def uid(text: str) -> bytes:
    """Return a UID as a value."""
    return text.encode() + b"\0" * (len(text) % 2)


def command_set(elements: dict[int, bytes | None], group_length: int | None = None) -> bytes:
    """Return a command set; None leaves an element out."""
    body = b"".join(element(n, v) for n, v in elements.items() if v is not None)
    length = len(body) if group_length is None else group_length
    return element(0, struct.pack("<I", length)) + body


def store_rq(
    overrides: dict[int, bytes | None] | None = None,
    *,
    message_id: int = 1,
    instance: str = "1.2.3.4",
    sop_class: str = str(CTImageStorage),
    group_length: int | None = None,
) -> bytes:
    """Return the command set of a C-STORE request; overrides keep their place or come last."""
    elements: dict[int, bytes | None] = {
        0x0002: uid(sop_class),
        0x0100: us(1),
        0x0110: us(message_id),
        0x0700: us(0),
        0x0800: us(1),
        0x1000: uid(instance),
    }
    return command_set(elements | (overrides or {}), group_length)


def echo_rq(message_id: int = 1) -> bytes:
    """Return the PDU of a C-ECHO request."""
    elements: dict[int, bytes | None] = {
        0x0002: uid(str(Verification)),
        0x0100: us(0x30),
        0x0110: us(message_id),
        0x0800: us(0x0101),
    }
    return p_data(pdv(ECHO, COMMAND | LAST, command_set(elements)))


def fragments(data: bytes, size: int) -> list[bytes]:
    """Cut bytes to pieces; one empty piece where there are none."""
    return [data[at : at + size] for at in range(0, len(data), size)] or [b""]


def message(
    command: bytes, data: bytes | None, context_id: int = CT, size: int = 16_378
) -> list[bytes]:
    """Return the PDUs of a message, each of one PDV with `size` bytes at most."""
    pdus = []
    for kind, whole in ((COMMAND, command), (DATA, data)):
        if whole is not None:
            pieces = fragments(whole, size)
            pdus += [p_data(pdv(context_id, kind, piece)) for piece in pieces[:-1]]
            pdus.append(p_data(pdv(context_id, kind | LAST, pieces[-1])))
    return pdus


def store(message_id: int = 1, data: bytes = b"\x08\x00" * 500, **options: Any) -> bytes:
    """Return the bytes of a regular C-STORE, of an Instance numbered as the message."""
    pdus = message(store_rq(message_id=message_id, instance=f"1.2.{message_id}"), data, **options)
    return b"".join(pdus)


class Peer:
    """A connection that says what it is told to, and keeps what it is answered."""

    def __init__(self, port: int, seconds: float = 5.0) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pdus: list[bytes] = []
        self.end = ""  # how it ended, once it did

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send(self, *chunks: bytes) -> None:
        """Send each chunk by itself; the connection may be closed meanwhile."""
        for chunk in chunks:
            try:
                self.connection.sendall(chunk)
            except OSError:
                self.end = "closed"

    def receive(self, count: int) -> list[bytes]:
        """Return so many PDUs, fewer when the connection ends or time is up."""
        got: list[bytes] = []
        while len(got) < count and not (self.end and self.end != "closed"):
            try:
                header = self._read(6)
                got.append(header + self._read(int.from_bytes(header[2:], "big")))
            except TimeoutError:
                self.end = "silence"
            except (ConnectionError, EOFError):
                self.end = "closed "  # with a blank: nothing can follow
        self.pdus += got
        return got

    def finish(self, seconds: float = 5.0) -> str:
        """Read until the end, and say how it came: "closed", or "silence" when time is up."""
        self.connection.settimeout(seconds)
        self.receive(1 << 30)
        return self.end.strip()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.connection.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data


@contextlib.contextmanager
def recording(port: int) -> Iterator[tuple[int, list[bytes]]]:
    """Give the port of a proxy, and what a client says through it, an item for each answer."""
    said: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_forward, args=(server, port, said), daemon=True)
        thread.start()
        yield server.getsockname()[1], said
        thread.join(10)


def _forward(server: socket.socket, port: int, said: list[bytes]) -> None:
    client, _ = server.accept()
    with client, socket.create_connection(("127.0.0.1", port)) as upstream:
        answered = threading.Event()
        answered.set()

        def answers() -> None:
            with contextlib.suppress(OSError):
                while data := upstream.recv(1 << 16):
                    answered.set()
                    client.sendall(data)
                client.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=answers, daemon=True)
        thread.start()
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if answered.is_set():
                    answered.clear()
                    said.append(b"")
                said[-1] += data
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_WR)
        thread.join(10)


def eventually(get: Any, seconds: float = 10.0) -> Any:
    """Return the first true value, or the last one when time is up."""
    deadline = time.monotonic() + seconds
    while not (value := get()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """Cut bytes at some places."""
    ends = sorted({0, len(data), *(p for p in places if 0 < p < len(data))})
    return [data[a:b] for a, b in itertools.pairwise(ends)]
