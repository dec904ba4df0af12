"""Senders: DCMTK's `storescu`, and one of our own that sees when each C-STORE is answered."""

import contextlib
import functools
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID, build_context
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ, P_DATA_TF
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
)

from benchmarks.ingest.slices import Slices

SENDER, NODE = "BENCH", "DICOMNODE"
RUN_S = 300.0
PDU_BYTES = 16384  # where the acceptor sets no limit

# Proposing every storage class costs each receiver another time to negotiate, and `--required`
# has the sender read all files first.
STORESCU_CONFIG = """\
[[TransferSyntaxes]]
[Explicit]
TransferSyntax1 = LittleEndianExplicit
[[PresentationContexts]]
[CT]
PresentationContext1 = CTImageStorage\\Explicit
[[Profiles]]
[CT]
PresentationContexts = CT
"""
# Tells when each C-STORE began and what it was answered; what that costs could not be measured.
STORESCU_LOG = """\
log4cplus.rootLogger = INFO, out
log4cplus.appender.out = log4cplus::ConsoleAppender
log4cplus.appender.out.layout = log4cplus::PatternLayout
log4cplus.appender.out.layout.ConversionPattern = %D{%s.%q} %m%n
log4cplus.appender.out.filters.1 = log4cplus::spi::StringMatchFilter
log4cplus.appender.out.filters.1.StringToMatch = Store Re
log4cplus.appender.out.filters.1.AcceptOnMatch = true
log4cplus.appender.out.filters.2 = log4cplus::spi::DenyAllFilter
"""
REQUEST = re.compile(r"^([\d.]+) Sending Store Request", re.MULTILINE)
RESPONSE = re.compile(r"^([\d.]+) Received Store Response \(Success\)", re.MULTILINE)


def send(
    port: int, series: Sequence[Sequence[Path]], folder: Path, nagle: bool
) -> tuple[float, float]:
    """Send each Series by a `storescu` of its own, all at once.

    Returns
    -------
    tuple[float, float]
        When the first C-STORE began and the last was answered, seconds of `time.time`.

    Raises
    ------
    RuntimeError
        If one of them fails, or takes too long.
    """
    (folder / "storescu.cfg").write_text(STORESCU_CONFIG)
    (folder / "storescu-log.cfg").write_text(STORESCU_LOG)
    command = [str(dcmtk("storescu")), "-lc", str(folder / "storescu-log.cfg")]
    command += ["-xf", str(folder / "storescu.cfg"), "CT", "-aet", SENDER, "-aec", NODE]
    logs = [folder / f"storescu-{s}.log" for s in range(len(series))]
    senders: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        for sender in senders:
            sender.kill()

    timer = threading.Timer(RUN_S, kill)
    try:
        for paths, log in zip(series, logs, strict=True):
            with open(log, "wb") as file:
                senders.append(
                    subprocess.Popen(
                        [*command, "127.0.0.1", str(port), *map(str, paths)],
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                        env=environment(nagle),
                    )
                )
        timer.start()
        statuses = [sender.wait() for sender in senders]
    finally:
        timer.cancel()
        kill()
        for sender in senders:
            sender.wait()
    text = "".join(log.read_text(errors="replace") for log in logs)
    answered = RESPONSE.findall(text)
    if any(statuses) or len(answered) != sum(map(len, series)):
        raise RuntimeError(f"storescu ended with {statuses}: {text[-2000:]}")
    return min(map(float, REQUEST.findall(text))), max(map(float, answered))


@functools.cache
def dcmtk(program: str) -> str | None:
    """Return where a program of DCMTK lies: pynetdicom installs others of the same names."""
    for folder in os.get_exec_path():
        found = shutil.which(program, path=folder)
        if found is not None:
            said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            if said.startswith("$dcmtk"):
                return found
    return None


def environment(nagle: bool) -> dict[str, str]:
    """Return our environment without settings of a node; DCMTK reads TCP_NODELAY."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name != "TCP_NODELAY" and not name.startswith("DICOMNODE_")
    }
    return kept if nagle else {**kept, "TCP_NODELAY": "1"}


def ack_times_ms(
    port: int,
    data: Slices,
    n: int,
    count: int,
    nagle: bool,
    *,
    in_turn: bool = False,
    seconds: float = RUN_S,
) -> list[float]:
    """Return the latencies of the first slices of n Series, over as many associations at once.

    `in_turn` lets each association wait for the one before it; none begins a slice after so
    many seconds.
    """
    start = threading.Barrier(1 if in_turn else n, timeout=60.0)

    def run(s: int) -> list[float]:
        try:
            with contextlib.closing(Requestor(port)) as requestor:
                slices = [
                    requestor.encode(data.sop_instance_uid(s, i), data.data_set(s, i))
                    for i in range(count)
                ]
                requestor.set_nagle(nagle)
                start.wait()
                return requestor.store(slices, seconds)
        except BaseException:
            start.abort()  # nobody waits for this one
            raise

    with ThreadPoolExecutor(1 if in_turn else n) as pool:
        return [1e3 * took for times in pool.map(run, range(n)) for took in times]


class Requestor:
    """An association that does nothing but wait between a C-STORE and its response.

    pynetdicom encodes; its own reactor would add milliseconds of our own to each.
    """

    def __init__(
        self,
        port: int,
        calling_ae_title: str = SENDER,
        transfer_syntax: str = ExplicitVRLittleEndian,
    ) -> None:
        context = build_context(CTImageStorage, transfer_syntax)
        context.context_id = 1
        length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
        length.maximum_length_received = PDU_BYTES
        implementation.implementation_class_uid = PYNETDICOM_IMPLEMENTATION_UID
        request = A_ASSOCIATE()
        request.application_context_name = "1.2.840.10008.3.1.1.1"
        request.calling_ae_title, request.called_ae_title = calling_ae_title, NODE
        request.presentation_context_definition_list = [context]
        request.user_information = [length, implementation]
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30.0)
        self._messages = 0
        try:
            self._socket.sendall(_pdu(A_ASSOCIATE_RQ(), request))
            answer = self._receive(0x02)
            accepted = A_ASSOCIATE_AC()
            accepted.decode(answer)
            if accepted.presentation_context[0].result != 0:
                raise ConnectionError("CT Image Storage was not accepted")
            self._pdu_bytes = accepted.user_information.maximum_length or PDU_BYTES
        except BaseException:
            self._socket.close()
            raise

    def set_nagle(self, on: bool) -> None:
        """Let the kernel hold back small segments, or not."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, int(not on))

    def encode(self, sop_instance_uid: str, data_set: bytes) -> list[bytes]:
        """Return the PDUs of one C-STORE."""
        self._messages += 1
        request, message = C_STORE(), C_STORE_RQ()
        request.MessageID, request.Priority = self._messages, 0
        request.AffectedSOPClassUID = CTImageStorage
        request.AffectedSOPInstanceUID = sop_instance_uid
        request.DataSet = BytesIO(data_set)
        message.primitive_to_message(request)
        return [_pdu(P_DATA_TF(), p) for p in message.encode_msg(1, self._pdu_bytes)]

    def store(self, messages: Sequence[Sequence[bytes]], seconds: float = RUN_S) -> list[float]:
        """Return the seconds from the first byte of each message to its response.

        None is begun after so many seconds.

        Raises
        ------
        RuntimeError
            If one is answered with anything but Success.
        """
        took: list[float] = []
        deadline = time.perf_counter() + seconds
        for pdus in messages:
            start = time.perf_counter()
            if start > deadline:
                break
            status = self.status_of(pdus)
            took.append(time.perf_counter() - start)
            if status != 0x0000:
                raise RuntimeError(f"a C-STORE was answered with the status 0x{status:04X}")
        return took

    def status_of(self, pdus: Sequence[bytes]) -> int:
        """Send one C-STORE, and return what it is answered."""
        for pdu in pdus:
            self._socket.sendall(pdu)
        answer = self._receive(0x04)
        # (0000,0900) Status, in Implicit VR Little Endian
        return int.from_bytes(answer.partition(bytes.fromhex("0000000902000000"))[2][:2], "little")

    def send(self, data: bytes) -> None:
        """Send bytes as they are, whole PDUs or not."""
        self._socket.sendall(data)

    def reset(self) -> None:
        """Break the connection off, as the end of a process with unread bytes does."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def abort(self) -> None:
        """Send an A-ABORT, and close the connection."""
        with self._socket, contextlib.suppress(OSError):
            self._socket.sendall(struct.pack(">BxI4x", 0x07, 4))

    def close(self) -> None:
        """Release the association."""
        with self._socket, contextlib.suppress(OSError):
            self._socket.sendall(struct.pack(">BxI4x", 0x05, 4))  # A-RELEASE-RQ
            self._receive(0x06)

    def _receive(self, kind: int) -> bytes:
        """Return a PDU of the kind that is due."""
        header = self._read(6)
        pdu = header + self._read(int.from_bytes(header[2:], "big"))
        if pdu[0] != kind:
            raise ConnectionError(f"PDU of type {pdu[0]} in place of {kind}: {pdu[6:10].hex()}")
        return pdu

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._socket.recv(count - len(data))
            if not more:
                raise ConnectionError("the receiver closed the connection")
            data += more
        return data


def _pdu(pdu: Any, primitive: Any) -> bytes:
    pdu.from_primitive(primitive)
    return bytes(pdu.encode())
