"""What the node needs is away for a while: the database, the worker, room on the disk.

For some seconds here; DICOMNODE_TEST_AWAY_S=60 makes it a minute.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dicomnode import store
from dicomnode.model import SeriesState
from tests.conftest import (
    POSTGRES_SETTINGS,
    _postgres_binaries,
    _unprivileged_user,
    _wait_until_ready,
)
from tests.dicom import PATIENT_ID
from tests.e2e.conftest import Node, Scan, eventually, running_node, scan, skip
from tests.soak.load import Load

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.slow,
]

AWAY_S = float(os.environ.get("DICOMNODE_TEST_AWAY_S", "5"))
# What a sender waits for an acknowledgement at most, whoever is away.
ACKNOWLEDGED_S = 10.0
DRAIN_S = 120.0 + 4 * AWAY_S
DISK_MIB, LEFT_MIB = 384, 24


class Postgres:
    """A server of the test's own, which it may stop and start."""

    def __init__(self, root: Path, binaries: Path, user: str | None) -> None:
        self.url = f"postgresql://postgres@/postgres?host={root}"
        self._root, self._binaries = root, binaries
        self._as = {"cwd": root} | (
            {"user": user, "group": user, "extra_groups": []} if user else {}
        )
        self._process: subprocess.Popen[bytes] | None = None
        initdb = [binaries / "initdb", "-D", root / "data", "-U", "postgres", "--auth=trust"]
        initdb += ["--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, **self._as)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [self._binaries / "postgres", "-D", self._root / "data"]
        for setting in (*POSTGRES_SETTINGS, f"unix_socket_directories={self._root}"):
            command += ["-c", setting]
        with open(self._root / "log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._as,
            )
        _wait_until_ready(self._root, self._process)

    def stop(self) -> None:
        """Stop it as `pg_ctl stop -m fast` does: who is connected is cut off."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    binaries = _postgres_binaries()
    if binaries is None:
        skip("no initdb and postgres on PATH or under /usr/lib/postgresql/*/bin")
    user = _unprivileged_user()
    root = Path(tempfile.mkdtemp(prefix="dicomnode-pg-"))  # short: a socket's path has 107 bytes
    server: Postgres | None = None
    try:
        if user is not None:
            shutil.chown(root, user, user)
        server = Postgres(root, binaries, user)
        server.start()
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("forgotten", [False, True], ids=["while at work", "while idle"])
def test_the_database_is_away(postgres, tmp_path, forgotten):
    with running_node(tmp_path / "node", postgres.url) as node:
        first = [] if forgotten else send_for(node, 1.0)
        if forgotten:
            node.idle()
        node.engine.dispose()
        postgres.stop()
        while_away = send_for(node, AWAY_S)
        assert any(e.get("event") == "worker waits" for e in node.events())
        assert len(node.spool.pending(10_000)) >= sum(len(s.slices) for s in while_away)
        postgres.start()
        assert_all_in_curves(node, [*first, *while_away])


def test_the_worker_is_stopped(tmp_path):
    with running_node(tmp_path / "node") as node:
        first = send_for(node, 1.0)
        (worker,) = node.processes("worker")
        worker.suspend()
        try:
            while_away = send_for(node, AWAY_S)
            assert len(node.spool.pending(10_000)) >= sum(len(s.slices) for s in while_away)
        finally:
            worker.resume()
        assert_all_in_curves(node, [*first, *while_away])
        assert node.processes("worker") == [worker]


def test_a_disk_that_fills_under_load(tmp_path):
    """Refused with true statuses; what was acknowledged makes room, and the rest follows."""
    with small_disk(tmp_path) as disk:
        with running_node(tmp_path / "node", spool=disk / "spool") as node:
            first = send_for(node, 0.5)
            (worker,) = node.processes("worker")
            worker.suspend()
            try:
                fill(disk, LEFT_MIB)
                load, scans = Load(node.port, 4), list[Scan]()
                deadline = time.monotonic() + 60.0
                while not (load.refused or load.turned_away):
                    load.check()
                    assert time.monotonic() < deadline, "the disk does not fill"
                    if load.waiting < 100:
                        scans.append(scan(matrix=256, spacing_mm=12.0))
                        load.put(scans[-1].slices)
                    time.sleep(0.02)
                acknowledged = len(load.acknowledged)
                assert acknowledged > 50
                assert set(load.refused) <= {0xA700}
            finally:
                worker.resume()
            load.finish()  # as room comes back, without a hand
            assert set(load.refused) <= {0xA700}
            assert len(load.acknowledged) > acknowledged
            assert_all_in_curves(node, [*first, *scans])


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    if os.getuid() != 0:
        skip("mounting a small file system needs root")
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "tmpfs", str(disk)]
    result = subprocess.run(mount, capture_output=True, text=True)
    if result.returncode:
        skip(f"mount: {result.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, left_mib: int) -> None:
    """Leave so much room; what a node sets apart for itself beforehand is its own."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with open(disk / "something else", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - (left_mib << 20)))


def send_for(node: Node, seconds: float) -> list[Scan]:
    """Send Series for a while, and return them: all acknowledged, none late, none refused."""
    scans: list[Scan] = []
    rng, until = random.Random(1), time.monotonic() + seconds
    load = Load(node.port, 2)
    while time.monotonic() < until:
        patient_id = f"{PATIENT_ID}-{len(scans)}"  # of a Study each: there is nothing to align
        scans.append(scan(rng.choice((9100, 9101)), spacing_mm=12.0, patient_id=patient_id))
        load.put(scans[-1].slices)
        within(lambda: not load.waiting, load)
        time.sleep(0.2)  # a scanner does not send without end
    load.finish()
    assert load.refused == [] and load.again == 0
    return scans


def within(done: Callable[[], bool], load: Load) -> None:
    def checked() -> bool:
        load.check()
        return done()

    eventually(checked, "acknowledged", ACKNOWLEDGED_S)


def assert_all_in_curves(node: Node, scans: list[Scan]) -> None:
    def done() -> bool:
        with contextlib.suppress(Exception):  # the database may still be on its way up
            return node.is_idle()
        return False

    eventually(done, "the backlog drains", DRAIN_S)
    for made in scans:
        row = node.finished(made.series_uid, len(made.slices))
        assert row.state is SeriesState.CURVE, row
        assert row.set_aside == {}
        assert node.curve_uids(made.series_uid) == made.uids
    assert node.quarantined() == {}
    with store.reading(node.engine) as session:
        assert store.pending_offsets(session, 1) == []
