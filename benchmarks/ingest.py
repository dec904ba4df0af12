"""How fast Instances are acknowledged and scored: this node beside other receivers.

Each receiver is started on the loopback with a fresh folder, warmed by one Instance, and sent CT
slices of 512 x 512 by DCMTK's `storescu`, one process for each association:

- dicomnode receive: `dicomnode serve --only receive`, durable
- dicomnode serve: the whole node; its acknowledged rate while it scores, and beside it the scored
  rate, from the first C-STORE until every slice has a score in the database
- pynetdicom storescp, dcmtk storescp (`--fork +B`): neither is durable
- orthanc: as it comes, durable (`SyncStorageArea`)

`nagle` false means TCP_NODELAY=1 for DCMTK on both sides; true is DCMTK as it comes, on both sides.
`slices_per_s` counts from the first C-STORE to the last response. `cpu_ms_per_slice` is of the
receiver's process tree, until acknowledged, or until scored by the whole node. A latency runs from
the first byte of a C-STORE to its response, as a sender of our own sees it that encodes beforehand,
over as many associations at once. Figures are medians over the repeats; latencies are pooled.
Ratios are ours / theirs. Except for the last, ours is dicomnode receive:

- orthanc_N, storescp_N: DCMTK's storescp, at N associations without Nagle
- nagle_storescp: DCMTK's storescp, Nagle on, one association
- scored_vs_orthanc: scored rate to Orthanc's acknowledged rate, most associations, without Nagle

DCMTK's storescp and Orthanc bind every address, so they only run in a network of the benchmark's
own (unshare), where that is permitted.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil  # type: ignore[import-untyped]
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
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine

from dicomnode import dicomio, store
from dicomnode.core import phantom
from dicomnode.model import PatientKey

SLICES, QUICK_SLICES = 200, 16  # an association
REPEATS = 3
PROBES, QUICK_PROBES = 50, 8  # slices an association whose latency is taken
SENDER, NODE = "BENCH", "DICOMNODE"
START_S, RUN_S, STOP_S = 120.0, 900.0, 60.0
POLL_S = 0.05
PDU_BYTES = 16384  # where the acceptor sets no limit

OURS, WHOLE = "dicomnode receive", "dicomnode serve"
PYNETDICOM, DCMTK, ORTHANC = "pynetdicom storescp", "dcmtk storescp", "orthanc"

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


@dataclass(frozen=True, slots=True)
class Key:
    """One row of the table."""

    receiver: str
    associations: int
    nagle: bool


@dataclass(slots=True)
class Figures:
    """What the repeats of one row gave."""

    slices_per_s: list[float] = field(default_factory=list)
    scored_per_s: list[float] = field(default_factory=list)  # of the whole node only
    cpu_ms_per_slice: list[float] = field(default_factory=list)
    ack_ms: list[float] = field(default_factory=list)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quick", is_flag=True, help="Few slices, one repeat: shows that it works.")
@click.option("--slices", type=click.IntRange(2), help="Slices an association.")
@click.option(
    "--associations",
    default="1,4",
    show_default=True,
    callback=lambda _, __, text: _parse_numbers(text),
    help="How many senders at a time.",
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="/var/tmp",
    show_default=True,
    help="Where to work: on a disk, since in memory to be durable costs nothing.",
)
@click.option("--isolated", is_flag=True, hidden=True, help="The network is ours alone.")
def main(
    as_json: bool,
    quick: bool,
    slices: int | None,
    associations: tuple[int, ...],
    folder: Path,
    isolated: bool,
) -> None:
    """Measure how fast this node and other receivers take and score CT slices.

    \b
    Example:  python -m benchmarks.ingest --slices 200 --associations 1,4
    """
    if dcmtk("storescu") is None:
        raise click.ClickException("DCMTK's storescu sends the slices, and is not installed")
    if not isolated:
        _isolate()
    receivers = _receivers(isolated)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # comes to `finally`
    with tempfile.TemporaryDirectory(prefix="dicomnode-ingest-", dir=folder) as work:
        figures = measure(
            Path(work),
            receivers,
            associations,
            slices=slices or (QUICK_SLICES if quick else SLICES),
            probes=QUICK_PROBES if quick else PROBES,
            repeats=1 if quick else REPEATS,
        )
    result = summary(figures)
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        _print(result)


def measure(
    folder: Path,
    receivers: Sequence[str],
    associations: Sequence[int],
    *,
    slices: int,
    probes: int,
    repeats: int,
) -> dict[Key, Figures]:
    """Return the figures of every receiver at every number of associations, Nagle off and on."""
    say(f"making {max(associations)} series of {slices} slices")
    data = Slices(folder / "data", max(associations), slices)
    figures: dict[Key, Figures] = {}
    # The whole round again and again: what else the machine does meets every receiver.
    for repeat in range(repeats):
        for receiver in receivers:
            for nagle in (False, True):
                with running(receiver, folder / "receiver", nagle, data) as at:
                    for n in associations:
                        key = Key(receiver, n, nagle)
                        row = figures.setdefault(key, Figures())
                        _measure_row(at, data, n, min(probes, slices), row)
                        say(_progress(repeat, repeats, key, row))
    return figures


def _measure_row(at: "Running", data: "Slices", n: int, probes: int, row: Figures) -> None:
    data.renew()
    row.ack_ms += ack_times_ms(at.port, data, n, probes, at.nagle)
    at.await_scores(data.series_uids(n), n * probes)
    data.renew()
    # What the last sender or a receiver that does not sync left to write is not ours to wait for.
    os.sync()
    count = n * len(data.paths[0])
    cpu_s = at.cpu_s()
    first, last = send(at.port, data.paths[:n], at.folder, at.nagle)
    row.slices_per_s.append(count / max(last - first, 1e-3))  # its clock counts milliseconds
    if at.await_scores(data.series_uids(n), count):
        row.scored_per_s.append(count / (time.time() - first))
    row.cpu_ms_per_slice.append((at.cpu_s() - cpu_s) / count * 1e3)


def summary(figures: dict[Key, Figures]) -> dict[str, Any]:
    """Return rows, ratios and scored rates, as `--json` prints them."""
    median = {key: float(np.median(row.slices_per_s)) for key, row in figures.items()}
    scored = {
        key.associations: float(np.median(row.scored_per_s))
        for key, row in figures.items()
        if row.scored_per_s and not key.nagle
    }
    most = max(key.associations for key in figures)

    def ratio(ours: float | None, theirs: Key) -> float | None:
        other = median.get(theirs)
        return round(ours / other, 3) if ours and other else None

    def acknowledged(n: int, theirs: str, nagle: bool = False) -> float | None:
        return ratio(median.get(Key(OURS, n, nagle)), Key(theirs, n, nagle))

    return {
        "rows": [
            {
                "receiver": key.receiver,
                "associations": key.associations,
                "nagle": key.nagle,
                "slices_per_s": round(median[key], 2),
                "cpu_ms_per_slice": round(float(np.median(row.cpu_ms_per_slice)), 3),
                "ack_p50_ms": round(float(np.percentile(row.ack_ms, 50)), 3),
                "ack_p99_ms": round(float(np.percentile(row.ack_ms, 99)), 3),
            }
            for key, row in figures.items()
        ],
        "ratios": {
            "orthanc_1": acknowledged(1, ORTHANC),
            "orthanc_4": acknowledged(4, ORTHANC),
            "storescp_1": acknowledged(1, DCMTK),
            "storescp_4": acknowledged(4, DCMTK),
            "nagle_storescp": acknowledged(1, DCMTK, nagle=True),
            "scored_vs_orthanc": ratio(scored.get(most), Key(ORTHANC, most, False)),
        },
        "scored": [
            {"associations": n, "slices_per_s": round(rate, 2)} for n, rate in scored.items()
        ],
    }


# What is sent


class Slices:
    """CT Series as files, one for each association, which become new Instances by `renew`.

    The pixels of all are the same; each is of a Study and a patient of its own, so that the node
    has no pairs to align.
    """

    def __init__(self, folder: Path, series: int, slices: int) -> None:
        self._session, self._run = secrets.randbelow(9 * 10**8) + 10**8, 10**6
        self.paths: list[list[Path]] = []
        self._places: dict[Path, list[int]] = {}  # where its files hold the token
        body = phantom.patient(1)
        marks = phantom.landmarks(body)
        z_mm, step_mm = np.linspace(marks["symphysis"], marks["chin"], slices, retstep=True)
        small = phantom.volume(body, z_mm, pixel_mm=1.6, matrix=256)
        volume = small.repeat(2, axis=1).repeat(2, axis=2)  # drawn in a quarter of the time
        for s in range(series):
            place = folder / str(s)
            place.mkdir(parents=True)
            self.paths.append([place / f"{i:04d}.dcm" for i in range(slices)])
            for i, path in enumerate(self.paths[s]):
                ds = dicomio.ct_dataset(
                    volume[i],
                    patient=PatientKey(f"INGEST{self._token}{s + 1}", "BENCH"),
                    study_uid=self._uid(s, 1),
                    series_uid=self._uid(s, 2),
                    frame_of_reference_uid=self._uid(s, 3),
                    sop_instance_uid=self.sop_instance_uid(s, i),
                    instance_number=i + 1,
                    image_position=(-204.4, -204.4, float(z_mm[i])),
                    pixel_mm=0.8,
                    spacing_mm=round(float(step_mm), 3),
                    study_datetime=datetime(2026, 1, 5, 8, 15),
                )
                ds.save_as(path, enforce_file_format=True)
                header = path.read_bytes()[: -len(ds.PixelData)]
                self._places[path] = _find_all(header, self._token.encode())

    @property
    def _token(self) -> str:
        return f".{self._session}.{self._run}."

    def _uid(self, series: int, *rest: int) -> str:
        return f"1.2.826.0.1.3680043.8.498{self._token}{'.'.join(map(str, (series + 1, *rest)))}"

    def sop_instance_uid(self, series: int, index: int) -> str:
        """Return the SOP Instance UID that this file holds now."""
        return self._uid(series, 4, index + 1)

    def series_uids(self, series: int) -> set[str]:
        """Return the Series Instance UIDs of the first so many Series."""
        return {self._uid(s, 2) for s in range(series)}

    def renew(self) -> None:
        """Turn all into Instances that no receiver has seen, of other patients."""
        self._run += 1
        token = self._token.encode()  # always as long
        for path, places in self._places.items():
            with open(path, "r+b") as file:
                for place in places:
                    file.seek(place)
                    file.write(token)

    def data_set(self, series: int, index: int) -> bytes:
        """Return what follows the file meta information."""
        data = self.paths[series][index].read_bytes()
        # (0002,0000) FileMetaInformationGroupLength: 8 bytes after the prefix, then its value.
        return data[144 + int.from_bytes(data[140:144], "little") :]


# Senders


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
                        [*command, "+sd", "127.0.0.1", str(port), str(paths[0].parent)],
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                        env=_environment(nagle),
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


def ack_times_ms(port: int, data: Slices, n: int, count: int, nagle: bool) -> list[float]:
    """Return the latencies of the first slices of n Series, over as many associations at once."""
    with contextlib.ExitStack() as stack:
        requestors = [stack.enter_context(contextlib.closing(Requestor(port))) for _ in range(n)]
        encoded = [
            [r.encode(data.sop_instance_uid(s, i), data.data_set(s, i)) for i in range(count)]
            for s, r in enumerate(requestors)
        ]
        for requestor in requestors:
            requestor.set_nagle(nagle)
        with ThreadPoolExecutor(n) as pool:
            work = [pool.submit(r.store, e) for r, e in zip(requestors, encoded, strict=True)]
            return [1e3 * seconds for future in work for seconds in future.result()]


class Requestor:
    """An association that does nothing but wait between a C-STORE and its response.

    pynetdicom encodes; its own reactor would add milliseconds of our own to each.
    """

    def __init__(self, port: int) -> None:
        context = build_context(CTImageStorage, ExplicitVRLittleEndian)
        context.context_id = 1
        length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
        length.maximum_length_received = PDU_BYTES
        implementation.implementation_class_uid = PYNETDICOM_IMPLEMENTATION_UID
        request = A_ASSOCIATE()
        request.application_context_name = "1.2.840.10008.3.1.1.1"
        request.calling_ae_title, request.called_ae_title = SENDER, NODE
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

    def store(self, messages: Sequence[Sequence[bytes]]) -> list[float]:
        """Return the seconds from the first byte of each message to its response.

        Raises
        ------
        RuntimeError
            If one is answered with anything but Success.
        """
        seconds = []
        for pdus in messages:
            start = time.perf_counter()
            for pdu in pdus:
                self._socket.sendall(pdu)
            answer = self._receive(0x04)
            seconds.append(time.perf_counter() - start)
            # (0000,0900) Status, in Implicit VR Little Endian
            status = answer.partition(bytes.fromhex("0000000902000000"))[2][:2]
            if status != b"\0\0":
                raise RuntimeError(f"a C-STORE was answered with the status {status[::-1].hex()}")
        return seconds

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


# Receivers


class Running:
    """A receiver at work, in a folder of its own."""

    def __init__(
        self, receiver: str, folder: Path, port: int, nagle: bool, process: subprocess.Popen[bytes]
    ) -> None:
        self.receiver, self.folder, self.port, self.nagle = receiver, folder, port, nagle
        self.engine: Engine | None = None
        self._process = process

    def cpu_s(self) -> float:
        """Return the CPU time of its processes, those that ended included."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])  # user and system, own and of ended children
        return total

    def processes(self) -> list[psutil.Process]:
        """Return its process and all below."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def await_start(self, data: Slices) -> None:
        """Wait until it acknowledges an Instance and, of the whole node, scores it."""
        if self.receiver == WHOLE:
            self._until(lambda: "worker started" in (self.folder / "log").read_text(), START_S)
        self._until(lambda: self._takes(data), START_S)

    def await_scores(self, series_uids: set[str], count: int) -> bool:
        """Wait until so many slices of these Series have a score; False where nobody scores."""
        engine = self.engine
        if engine is None:
            return False

        def done() -> bool:
            with store.reading(engine) as session:
                rows = store.list_series(session, limit=len(series_uids))
            return sum(r.scored for r in rows if r.series_uid in series_uids) >= count

        self._until(done, RUN_S)
        return True

    def _takes(self, data: Slices) -> bool:
        data.renew()
        try:
            ack_times_ms(self.port, data, 1, 1, nagle=False)
        except OSError:
            return False
        return True

    def _until(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if self._process.poll() is not None or time.monotonic() > deadline:
                how = "stopped" if self._process.poll() is not None else f"not in {seconds:.0f} s"
                raise RuntimeError(f"{self.receiver}: {how}: {_tail(self.folder / 'log')}")
            time.sleep(POLL_S)


@contextlib.contextmanager
def running(receiver: str, folder: Path, nagle: bool, data: Slices) -> Iterator[Running]:
    """Give a receiver that was warmed by one Instance; nothing of it is left at the end."""
    folder.mkdir()
    port = _free_port()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            _command(receiver, folder, port),
            cwd=folder,
            env=_environment(nagle),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    at = Running(receiver, folder, port, nagle, process)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        stack.callback(_stop, at, process)
        at.await_start(data)
        if receiver == WHOLE:
            at.engine = stack.enter_context(store.opened(_database_url(folder)))
            at.await_scores(data.series_uids(1), 1)
        yield at


def _stop(at: Running, process: subprocess.Popen[bytes]) -> None:
    processes = at.processes()
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    for left in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()
    psutil.wait_procs(processes, timeout=STOP_S)


def _command(receiver: str, folder: Path, port: int) -> list[str]:
    into = folder / "stored"
    into.mkdir()
    if receiver in (OURS, WHOLE):
        config = folder / "node.toml"
        config.write_text(_node_config(folder, port))
        only = ["--only", "receive"] if receiver == OURS else []
        return [sys.executable, "-m", "dicomnode", "serve", "--config", str(config), *only]
    if receiver == PYNETDICOM:
        options = ["-ba", "127.0.0.1", "-aet", NODE, "-od", str(into), str(port)]
        return [sys.executable, "-m", "pynetdicom", "storescp", *options]
    if receiver == DCMTK:
        return [str(dcmtk("storescp")), "--fork", "+B", "-aet", NODE, "-od", str(into), str(port)]
    config = folder / "orthanc.json"
    config.write_text(
        json.dumps(
            {
                "StorageDirectory": str(into),
                "IndexDirectory": str(into),
                "DicomAet": NODE,
                "DicomPort": port,
                "HttpServerEnabled": False,
            }
        )
    )
    return ["Orthanc", str(config)]


def _node_config(folder: Path, port: int) -> str:
    # Series stay open, so that the database tells of each slice whether it has a score.
    return f"""\
[node]
ae_title = "{NODE}"
port = {port}
peers = [{{ ae_title = "{SENDER}", host = "127.0.0.1", port = 104 }}]
[spool]
path = {json.dumps(str(folder / "stored"))}
reserve_bytes = 0
[database]
url = {json.dumps(_database_url(folder))}
[series]
quiet_seconds = {10 * RUN_S}
"""


def _database_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'node.sqlite'}"


def _environment(nagle: bool) -> dict[str, str]:
    """Our environment without settings of a node; DCMTK reads TCP_NODELAY."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name != "TCP_NODELAY" and not name.startswith("DICOMNODE_")
    }
    return kept if nagle else {**kept, "TCP_NODELAY": "1"}


def _receivers(isolated: bool) -> list[str]:
    """Return the receivers that can run here; of the others, say why not."""
    found = [OURS, WHOLE, PYNETDICOM]
    for receiver, program in ((DCMTK, dcmtk("storescp")), (ORTHANC, shutil.which("Orthanc"))):
        if program is None:
            say(f"{receiver} is left out: it is not installed")
        elif not isolated:
            say(f"{receiver} is left out: it binds every address, and a network of our own failed")
        else:
            found.append(receiver)
    return found


def _isolate() -> None:
    """Start again in a network with a loopback and nothing else, where this machine permits it."""
    how = ["--net"] if os.getuid() == 0 else ["--user", "--map-root-user", "--net"]
    enter = ["unshare", *how, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        subprocess.run([*enter, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return
    os.execvp(enter[0], [*enter, sys.executable, *sys.orig_argv[1:], "--isolated"])


# What is said


def say(message: str) -> None:
    """Tell the person who waits."""
    click.echo(message, err=True)


def _progress(repeat: int, repeats: int, key: Key, row: Figures) -> str:
    scored = f", {row.scored_per_s[-1]:.0f} scored" if row.scored_per_s else ""
    return (
        f"{repeat + 1}/{repeats} {key.receiver}, {_senders(key.associations)}, "
        f"Nagle {'on' if key.nagle else 'off'}: {row.slices_per_s[-1]:.0f} slices/s{scored}"
    )


def _senders(n: int) -> str:
    return f"{n} association{'s' * (n > 1)}"


def _print(result: dict[str, Any]) -> None:
    table = Table(title="CT slices of 512 x 512, acknowledged")
    table.add_column("receiver", no_wrap=True)
    for title in ("assoc.", "Nagle", "slices/s", "CPU ms", "p50 ms", "p99 ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["receiver"],
            str(row["associations"]),
            "on" if row["nagle"] else "off",
            f"{row['slices_per_s']:.0f}",
            f"{row['cpu_ms_per_slice']:.2f}",
            f"{row['ack_p50_ms']:.1f}",
            f"{row['ack_p99_ms']:.1f}",
        )
    console = Console()
    console.print(table)
    for row in result["scored"]:
        console.print(
            f"scored, {_senders(row['associations'])}: {row['slices_per_s']:.0f} slices/s"
        )
    for name, ratio in result["ratios"].items():
        console.print(f"{name}: {'not measured' if ratio is None else f'{ratio:.2f}'}")


def _parse_numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError as exc:
        raise click.BadParameter(f"numbers with commas between, not {text!r}") from exc
    # pynetdicom's storescp takes 10 at a time.
    if not all(1 <= n <= 10 for n in numbers):
        raise click.BadParameter("1 to 10 associations")
    return numbers


def _find_all(data: bytes, token: bytes) -> list[int]:
    places, place = [], data.find(token)
    while place >= 0:
        places.append(place)
        place = data.find(token, place + 1)
    return places


def _pdu(pdu: Any, primitive: Any) -> bytes:
    pdu.from_primitive(primitive)
    return bytes(pdu.encode())


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:].strip()


if __name__ == "__main__":
    main()
