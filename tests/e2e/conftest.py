"""A whole node as a process of its own, phantoms to send to it, and the tools that send them."""

import contextlib
import copy
import functools
import gc
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import psutil
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, Association, evt
from sqlalchemy import Engine

from dicomnode import dicomio, store
from dicomnode.core import phantom
from dicomnode.model import PatientKey, SeriesState
from dicomnode.spool import Spool
from dicomnode.store import SeriesRow
from tests.dicom import CANARIES, PATIENT_ID, leaks

T = TypeVar("T")

# Which of the processes of pytest-xdist this is.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))

# Long enough for a machine that is busy with something else: a test that waits this long fails.
DEADLINE_S = 90.0
PARTS = {"receiver": "receive", "worker": "work"}
# Calling AE titles that the tests use; DICOMNODE is the node itself, so that it may echo itself.
PEERS = ("TEST", "STORESCU", "DCMSEND", "ORTHANC", "DICOMNODE")
LOGS: list[Path] = []  # of every node there was
REAL_CT = Path(__file__).resolve().parents[3] / "shared" / "ct"


def eventually(get: Callable[[], T], what: str, seconds: float = DEADLINE_S) -> T:
    """Return the first true value, and fail when time is up."""
    deadline = time.monotonic() + seconds
    while not (value := get()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}; last: {value!r}"
        time.sleep(0.05)
    return value


def need(*programs: str) -> None:
    """Skip where a program is not installed, but not on CI, which installs them all."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        skip(f"not installed: {', '.join(missing)}")


def skip(reason: str) -> NoReturn:
    """Skip, but fail on CI: there it is a fault and not a circumstance."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true and {reason}")
    pytest.skip(reason)


# The node


class Node:
    """`dicomnode serve` with a folder, a port and a database of its own.

    What it logs goes to `log`, one JSON object a line; `check_log` looks at it.
    """

    def __init__(
        self,
        folder: Path,
        database_url: str | None = None,
        *,
        port: int | None = None,
        spool: Path | None = None,
        quiet_seconds: float = 1.0,
        lost_seconds: float = 600.0,
        prefix: Sequence[str] = (),
        more_settings: str = "",
        receivers: int = 1,
        peers: Mapping[str, int] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.prefix = folder, list(prefix)
        self.port = port or free_port()
        self.database_url = database_url or f"sqlite:///{folder / 'node.sqlite'}"
        self._spool_path = spool or folder / "spool"
        self.config, self.log = folder / "test.toml", folder / "log"
        self.audit_log = self.spool.path.parent / "audit.jsonl"
        LOGS.extend((self.log, self.audit_log))
        # Loggers whose tracebacks are no fault: pynetdicom prints one when a peer hangs up.
        self.tracebacks_of: set[str] = set()
        self._receivers = receivers
        self._quiet_seconds, self._lost_seconds = quiet_seconds, lost_seconds
        self.more_settings = more_settings  # TOML, sections that are not in `write_config`
        self._process: subprocess.Popen[bytes] | None = None
        self._parts: dict[int, psutil.Process] = {}  # every part that was ever seen
        self._resources = contextlib.ExitStack()
        self._peers = peers  # AE title -> port; those of `PEERS` where there are none
        self.write_config(self.config)

    def write_config(self, path: Path, peers: Mapping[str, int] | None = None) -> Path:
        """Write settings of this node, with other peers where they are named, and return them."""
        peers = self._peers if peers is None else peers
        peers = {title: self.port for title in PEERS} if peers is None else peers
        rows = ", ".join(
            f'{{ ae_title = "{title}", host = "127.0.0.1", port = {port} }}'
            for title, port in peers.items()
        )
        path.write_text(
            f"""\
[node]
port = {self.port}
receivers = {self._receivers}
peers = [{rows}]
[spool]
path = "{self.spool.path}"
reserve_bytes = 0
[database]
url = "{self.database_url}"
[score]
device = "cpu"
[series]
quiet_seconds = {self._quiet_seconds}
lost_seconds = {self._lost_seconds}
{self.more_settings}
"""
        )
        return path

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until both parts are at work."""
        assert self._process is None
        starts = self._starts()
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [*self.prefix, *command("serve", "--config", self.config, "--log-json")],
                cwd=self.folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if wait:
            eventually(lambda: self._ready(starts), f"node ready: {self.folder}")

    def stop(self) -> int:
        """Stop it as an operator would, and return the exit status."""
        assert self._process is not None
        process, self._process = self._process, None
        self.parts(process)
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(60)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            self._kill_parts()
        return status

    def kill(self, part: str) -> int:
        """Kill the supervisor, receiver or worker by SIGKILL, and return its process id."""
        assert self._process is not None
        process, parts = self._process, self.parts()
        if part == "supervisor":
            self._process = None
            process.kill()
            process.wait()
            return process.pid
        self.kill_processes([parts[part]])
        return parts[part].pid

    def kill_processes(self, processes: Sequence[psutil.Process]) -> None:
        """Kill some of `processes` by SIGKILL, all at once."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)

    def processes(
        self, part: str, process: subprocess.Popen[bytes] | None = None
    ) -> list[psutil.Process]:
        """Return the processes of a part that run now; receivers may be several."""
        process = process or self._process
        assert process is not None
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if PARTS[part] in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        found.append(child)
                        self._parts[child.pid] = child
        return found

    def parts(self, process: subprocess.Popen[bytes] | None = None) -> dict[str, psutil.Process]:
        """Return a process of each part, waiting for one that is being restarted."""
        process = process or self._process
        assert process is not None

        def find() -> dict[str, psutil.Process]:
            found = {name: self.processes(name, process) for name in PARTS}
            return {name: running[0] for name, running in found.items() if running}

        with contextlib.suppress(AssertionError):
            return eventually(
                lambda: found if len(found := find()) == len(PARTS) or process.poll() else {},
                "receiver and worker",
            )
        return find()

    @property
    def supervisor(self) -> psutil.Process:
        """The process that restarts the others."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    @property
    def running(self) -> bool:
        """Whether the supervisor is up."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """What the supervisor exited with by itself."""
        return self._process.poll() if self._process else None

    def wait_for_parts_to_end(self) -> None:
        """Wait until the parts that a killed supervisor left behind have noticed."""
        _, alive = psutil.wait_procs(list(self._parts.values()), timeout=60)
        assert not alive, f"left behind: {alive}"

    def cli(
        self, *arguments: object, config: Path | None = None, seconds: float = 120.0
    ) -> subprocess.CompletedProcess:
        """Run a command against this node's settings."""
        given = ("--config", config or self.config)
        return cli(*arguments, *given, cwd=self.folder, seconds=seconds)

    def json(self, *arguments: object) -> Any:
        """Return what a command prints as JSON; it must succeed."""
        result = self.cli(*arguments, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    @functools.cached_property
    def engine(self) -> Engine:
        """The node's database, for a look from outside."""
        return self._resources.enter_context(store.opened(self.database_url, checked=False))

    @functools.cached_property
    def spool(self) -> Spool:
        """The node's spool, for a look from outside."""
        return Spool(self._spool_path)

    def let_go(self) -> None:
        """Hold no file of the node open, until it is looked at again."""
        self.engine.dispose()
        spool = self.__dict__.pop("spool", None)
        with contextlib.suppress(AttributeError):  # a spool that keeps nothing open has no `close`
            spool.close()

    def series(self, **filters: Any) -> list[SeriesRow]:
        """Return the Series the node knows, newest arrival first."""
        with store.reading(self.engine) as session:
            return store.list_series(session, limit=10_000, **filters)

    def one(self, series_uid: str) -> SeriesRow | None:
        """Return one Series, None where the node does not know it."""
        return next(iter(self.series(series_uid=series_uid)), None)

    def finished(self, series_uid: str, slices: int = 0, seconds: float = DEADLINE_S) -> SeriesRow:
        """Wait until a Series of so many Instances is finished, and return it."""
        row = eventually(
            lambda: (
                row
                if (row := self.one(series_uid))
                and row.state is not SeriesState.OPEN
                and row.received >= slices
                else None
            ),
            f"{series_uid} finished with {slices} Instances",
            seconds,
        )
        assert row is not None
        return row

    def curve_uids(self, series_uid: str) -> set[str]:
        """Return the SOP Instance UIDs in the curve of a Series."""
        with store.reading(self.engine) as session:
            curve = store.curve_of(session, series_uid)
        return set(curve.sop_instance_uids) if curve else set()

    def quarantined(self) -> dict[str, int]:
        """Return reason -> files in quarantine, of those the database knows."""
        with store.reading(self.engine) as session:
            return store.count_quarantined(session)

    def is_idle(self) -> bool:
        """Whether nothing waits: no file in the spool, no open Series, no pair without offset."""
        if self.spool.pending(1):
            return False
        with store.reading(self.engine) as session:
            return not (store.open_series(session) or store.pending_offsets(session, 1))

    def idle(self, seconds: float = DEADLINE_S) -> None:
        """Wait until nothing waits any more."""
        eventually(self.is_idle, "node idle", seconds)

    def events(self) -> list[dict[str, Any]]:
        """Return what it logged so far."""
        found = []
        for line in self.log_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def audited(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of the audit log of one kind of event."""
        lines = map(json.loads, _text(self.audit_log).splitlines())
        return [line for line in lines if line["event"] == event]

    def log_text(self) -> str:
        """Return its log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def put_log_aside(self) -> None:
        """Begin a new log: what went wrong when the disk died under a node is no fault of it."""
        self._check_canaries()
        self.log.rename(self.log.with_name(f"log-{time.time_ns()}"))

    def _check_canaries(self) -> None:
        for log in (self.log, self.audit_log):
            assert not leaks(_text(log)), f"{leaks(_text(log))} in {log}"

    def check_log(self) -> None:
        """Fail on something of a patient in the logs, or on a traceback."""
        self._check_canaries()
        text = self.log_text()
        for event in self.events():
            if event.get("logger") not in self.tracebacks_of:
                assert "traceback" not in event, event["traceback"]
        # What is no JSON came from outside the log: an interpreter that gave up.
        plain = "\n".join(line for line in text.splitlines() if not line.startswith("{"))
        assert "Traceback" not in plain and "Fatal" not in plain, plain[:3000]

    def close(self) -> None:
        """Stop it however it stands, and let go of the database."""
        try:
            if self._process is not None:
                self.stop()
        finally:
            self._kill_parts()
            self._resources.close()

    def _starts(self) -> tuple[int, int]:
        events = [e.get("event") for e in self.events()]
        return events.count("receiver started"), events.count("worker started")

    def _ready(self, before: tuple[int, int]) -> bool:
        assert self.running, f"exit status {self.exit_status}\n{self.log_text()[-3000:]}"
        return all(now > then for now, then in zip(self._starts(), before, strict=True))

    def _kill_parts(self) -> None:
        left = [part for part in self._parts.values() if part.is_running()]
        for part in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        psutil.wait_procs(left, timeout=10)


@contextlib.contextmanager
def running_node(
    folder: Path,
    database_url: str | None = None,
    *,
    tracebacks_of: frozenset[str] = frozenset(),
    **options: Any,
) -> Iterator[Node]:
    """Give a node that is up; at the end it must stop with status 0 and a clean log."""
    node = Node(folder, database_url, **options)
    node.tracebacks_of = set(tracebacks_of)
    try:
        node.start()
        yield node
        assert node.stop() == 0
        node.check_log()
    finally:
        node.close()


def command(*arguments: object) -> list[str]:
    """Return the command line of `dicomnode`."""
    return [sys.executable, "-m", "dicomnode", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return our environment without settings for a node."""
    return {k: v for k, v in os.environ.items() if not k.startswith("DICOMNODE_")}


def cli(*arguments: object, cwd: Path, seconds: float = 120.0) -> subprocess.CompletedProcess:
    """Run a `dicomnode` command."""
    result = subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    # What it answers may name a patient to who asked, its messages may not.
    assert not leaks(result.stderr), f"{arguments[0]}: {leaks(result.stderr)}"
    return result


# Of the tests that run at a time each takes ports of its own, below those the kernel gives out: a
# port that was free a moment ago must not be somebody else's by then.
_PORTS = itertools.cycle(range(base := 11_000 + 1_000 * WORKER, base + 1_000))


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    for port in itertools.islice(_PORTS, 1_000):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@pytest.fixture(autouse=True)
def _sockets_are_collected() -> Iterator[None]:
    """Let go of pynetdicom's sockets within the test that says so in `filterwarnings`."""
    yield
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _no_log_holds_anything_of_a_patient() -> Iterator[None]:
    """Search every log of every node, at the end of the run: those that were killed, too."""
    yield
    found = {str(log): leaks(_text(log)) for log in LOGS}
    assert not any(found.values()), found


# Phantoms


@dataclass(frozen=True)
class Scan:
    """One CT Series of a phantom, in a Study of its own; patient names and IDs are canaries.

    `z_mm` of the same anatomy is larger by `table_mm` than in the phantom's own coordinates.
    """

    study_uid: str
    series_uid: str
    table_mm: float
    slices: tuple[Dataset, ...] = field(repr=False)

    @property
    def uids(self) -> set[str]:
        return {str(ds.SOPInstanceUID) for ds in self.slices}


def scan(
    seed: int = 9100,
    *,
    lowest: str = "lung_base",
    highest: str = "lung_apex",
    spacing_mm: float = 8.0,
    matrix: int = 64,
    table_mm: float = 0.0,
    patient_id: str | None = None,
    when: datetime = datetime(2024, 5, 2, 14, 5),
    study_uid: str | None = None,
) -> Scan:
    """Return a new scan of a phantom between two of its landmarks."""
    pixel_mm = 448.0 / matrix
    z_mm, volume = _volume(seed, lowest, highest, spacing_mm, matrix)
    study_uid, series_uid, frame = study_uid or generate_uid(), generate_uid(), generate_uid()
    patient = PatientKey(f"{PATIENT_ID}-{seed}" if patient_id is None else patient_id)
    slices = []
    for i, (z, image) in enumerate(zip(z_mm, volume, strict=True)):
        ds = dicomio.ct_dataset(
            image,
            patient=patient,
            study_uid=study_uid,
            series_uid=series_uid,
            sop_instance_uid=generate_uid(),
            instance_number=i + 1,
            image_position=(-pixel_mm * (matrix - 1) / 2,) * 2 + (z + table_mm,),
            pixel_mm=pixel_mm,
            spacing_mm=spacing_mm,
            study_datetime=when,
            frame_of_reference_uid=frame,
        )
        for keyword, value in CANARIES.items():
            if keyword != "PatientID":
                setattr(ds, keyword, value)
        slices.append(ds)
    return Scan(study_uid, series_uid, table_mm, tuple(slices))


@functools.lru_cache(maxsize=32)
def _volume(
    seed: int, lowest: str, highest: str, spacing_mm: float, matrix: int
) -> tuple[tuple[float, ...], Any]:
    body = phantom.patient(seed)
    marks = phantom.landmarks(body)
    z_mm = np.arange(marks[lowest], marks[highest], spacing_mm)
    volume = phantom.volume(
        body, z_mm, pixel_mm=448.0 / matrix, matrix=matrix, noise_hu=20, seed=len(z_mm)
    )
    return tuple(z_mm.tolist()), volume


def localizer(of: Scan) -> Scan:
    """Return a localizer Series in the same Study."""
    series_uid = generate_uid()
    slices = []
    for ds in of.slices[:2]:
        ds = copy.deepcopy(ds)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        ds.SeriesInstanceUID, ds.SOPInstanceUID = series_uid, generate_uid()
        slices.append(ds)
    return Scan(of.study_uid, series_uid, of.table_mm, tuple(slices))


def save(datasets: Sequence[Dataset], folder: Path) -> Path:
    """Write data sets as files into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, ds in enumerate(datasets):
        ds.save_as(folder / f"{i:04d}.dcm", enforce_file_format=True)
    return folder


# Senders


CT = (CTImageStorage, [ExplicitVRLittleEndian])


@contextlib.contextmanager
def association(
    port: int,
    *contexts: tuple[str, Sequence[str]],
    calling_ae_title: str = "TEST",
    called_ae_title: str = "DICOMNODE",
    tls: ssl.SSLContext | None = None,
) -> Iterator[Association]:
    """Give an association, established or not; released at the end where it still stands."""
    ae = AE(calling_ae_title)
    ae.acse_timeout = ae.connection_timeout = 10
    ae.dimse_timeout = ae.network_timeout = 60
    for sop_class_uid, transfer_syntaxes in contexts or [CT]:
        ae.add_requested_context(UID(sop_class_uid), [UID(s) for s in transfer_syntaxes])
    connections: list[socket.socket] = []

    def opened(event: evt.Event) -> None:
        connection = event.assoc.dul.socket.socket
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections.append(connection)

    assoc = ae.associate(
        "127.0.0.1",
        port,
        ae_title=called_ae_title,
        evt_handlers=[(evt.EVT_CONN_OPEN, opened)],
        tls_args=None if tls is None else (tls, None),
    )
    checkpoint = _Checkpoint()
    try:
        if assoc.is_established:
            assoc._reactor_checkpoint = checkpoint
            checkpoint.hold(assoc)
        yield assoc
    finally:
        checkpoint.let_go()
        if assoc.is_established and not assoc.acse.is_aborted():  # nor did the peer break it off
            assoc.release()
        if assoc.ident is not None:  # its thread started: there was somebody to connect to
            assoc.join(30)
        for connection in connections:
            connection.close()


class _Checkpoint(threading.Event):
    """Where pynetdicom's reactor waits while a service is in use; here, while we are sending.

    Its own flag `_is_paused` is set a moment before the reactor waits: under load the reactor
    now and then (twice in 600) took the response from the caller, who waited in vain.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held, self._arrived = threading.Event(), threading.Event()
        self._may_go = threading.Event()

    def hold(self, assoc: Association) -> None:
        """Return once the reactor waits here."""
        self._held.set()
        while assoc.is_alive() and not self._arrived.wait(0.1):
            pass

    def let_go(self) -> None:
        """Let the reactor go on for good."""
        self._held.clear()
        self._may_go.set()
        self.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait as the reactor does."""
        if self._held.is_set():
            self._arrived.set()
            self._may_go.wait()
        return super().wait(timeout)


def send(port: int, datasets: Sequence[Dataset], **titles: str) -> list[int | None]:
    """Store data sets over one association, and return statuses, None where it broke off."""
    contexts = {(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID) for ds in datasets}
    with association(port, *((c, [s]) for c, s in sorted(contexts)), **titles) as assoc:
        assert assoc.is_established
        statuses: list[int | None] = []
        for ds in datasets:
            statuses.append(assoc.send_c_store(ds).get("Status"))
            if statuses[-1] is None:
                break
        return statuses


def storescu(port: int, *paths: Path, options: Sequence[str] = ()) -> list[str]:
    """Return the command line that sends files and folders with DCMTK's storescu."""
    return _dcmtk("storescu", port, paths, options)


def dcmsend(port: int, *paths: Path, options: Sequence[str] = ()) -> list[str]:
    """Return the command line that sends files and folders with DCMTK's dcmsend."""
    return _dcmtk("dcmsend", port, paths, options)


def run(command: Sequence[str], seconds: float = 300.0) -> subprocess.CompletedProcess:
    """Run a program that must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert result.returncode == 0, f"{command[:8]}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result


def _dcmtk(program: str, port: int, paths: Sequence[Path], options: Sequence[str]) -> list[str]:
    titles = ["-aet", program.upper(), "-aec", "DICOMNODE"]
    return [program, *titles, *options, "+sd", "+r", "127.0.0.1", str(port), *map(str, paths)]


# A network of its own


@contextlib.contextmanager
def network_namespace() -> Iterator[list[str]]:
    """Give the command prefix that runs a program in a network with a loopback and nothing else.

    Raises
    ------
    RuntimeError
        If this machine does not permit it.
    """
    make, enter = ["--net"], ["--net"]
    if os.getuid() != 0:
        make = ["--user", "--map-root-user", "--net"]
        enter = ["--user", "--preserve-credentials", "--net"]
    holder = subprocess.Popen(
        ["unshare", *make, "sh", "-c", "ip link set lo up && echo up && exec cat >/dev/null"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with holder:  # closes its stdin, on which it ends, also when we are killed
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != b"up\n":
            raise RuntimeError(f"unshare: {holder.stderr.read().decode().strip()}")
        yield ["nsenter", "--target", str(holder.pid), *enter, "--"]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
