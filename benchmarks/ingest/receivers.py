"""Receivers: this node, and others beside it, each started in a folder of its own."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it has no stubs
from sqlalchemy import Engine

from benchmarks.ingest.senders import NODE, RUN_S, SENDER, ack_times_ms, dcmtk, environment
from benchmarks.ingest.slices import Slices
from dicomnode import store
from dicomnode.config import Settings

START_S, STOP_S = 120.0, 60.0
POLL_S = 0.02

OURS, OURS_FILES, WHOLE = "dicomnode receive", "dicomnode receive, files", "dicomnode serve"
PYNETDICOM, ORTHANC = "pynetdicom storescp", "orthanc"
PLAIN, FORK = "dcmtk storescp", "dcmtk storescp --fork"

# Takes the next association when the one before it is over.
IN_TURN = (PLAIN,)


class Running:
    """A receiver at work, in a folder of its own."""

    def __init__(
        self, receiver: str, folder: Path, port: int, nagle: bool, process: subprocess.Popen[bytes]
    ) -> None:
        self.receiver, self.folder, self.port, self.nagle = receiver, folder, port, nagle
        self.in_turn = receiver in IN_TURN
        self.database = folder / "node.sqlite"
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
def running(
    receiver: str,
    folder: Path,
    nagle: bool,
    data: Slices,
    *,
    settings: Mapping[str, str] | None = None,
    quiet_seconds: float = 10 * RUN_S,
) -> Iterator[Running]:
    """Give a receiver that was warmed by one Instance; nothing of it is left at the end.

    Parameters
    ----------
    settings
        Of this node, as in the environment: `SECTION__KEY` to value.
    quiet_seconds
        When Series end. The default leaves them open, so that the database tells of each slice
        whether it has a score.
    """
    folder.mkdir()
    port = _free_port()
    ours = {f"DICOMNODE_{name.upper()}": value for name, value in (settings or {}).items()}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            _command(receiver, folder, port, quiet_seconds),
            cwd=folder,
            env={**environment(nagle), **ours},
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
            at.engine = stack.enter_context(store.opened(f"sqlite:///{at.database}"))
            at.await_scores({data.series_uid(0)}, 1)
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


def _command(receiver: str, folder: Path, port: int, quiet_seconds: float) -> list[str]:
    into = folder / "stored"
    into.mkdir()
    if receiver in (OURS, OURS_FILES, WHOLE):
        config = folder / "node.toml"
        durability = "file" if receiver == OURS_FILES else None
        config.write_text(_node_config(folder, port, quiet_seconds, durability))
        only = [] if receiver == WHOLE else ["--only", "receive"]
        return [sys.executable, "-m", "dicomnode", "serve", "--config", str(config), *only]
    if receiver == PYNETDICOM:
        options = ["-ba", "127.0.0.1", "-aet", NODE, "-od", str(into), str(port)]
        return [sys.executable, "-m", "pynetdicom", "storescp", *options]
    if receiver in (PLAIN, FORK):
        fork = ["--fork"] if receiver == FORK else []
        options = [*fork, "+B", "-aet", NODE, "-od", str(into)]
        return [str(dcmtk("storescp")), *options, str(port)]
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


def _node_config(folder: Path, port: int, quiet_seconds: float, durability: str | None) -> str:
    return f"""\
[node]
ae_title = "{NODE}"
port = {port}
peers = [{{ ae_title = "{SENDER}", host = "127.0.0.1", port = 104 }}]
[spool]
path = {json.dumps(str(folder / "stored"))}
reserve_bytes = 0
{f'durability = "{durability}"' if durability else ""}
[database]
url = {json.dumps(f"sqlite:///{folder / 'node.sqlite'}")}
[series]
quiet_seconds = {quiet_seconds}
"""


def available(isolated: bool) -> tuple[list[str], list[str]]:
    """Return the receivers that can run here, and of the others why not."""
    found, without = [OURS, WHOLE, PYNETDICOM], []
    if "durability" in type(Settings.model_fields["spool"].default).model_fields:
        found.insert(1, OURS_FILES)
    for receivers, program in (
        ((PLAIN, FORK), dcmtk("storescp")),
        ((ORTHANC,), shutil.which("Orthanc")),
    ):
        for receiver in receivers:
            if program is None:
                without.append(f"{receiver} is left out: it is not installed")
            elif not isolated:
                without.append(
                    f"{receiver} is left out: it binds every address, and a network of our own "
                    "failed"
                )
            else:
                found.append(receiver)
    return found, without


def isolate() -> None:
    """Start again in a network with a loopback and nothing else, where this machine permits it."""
    how = ["--net"] if os.getuid() == 0 else ["--user", "--map-root-user", "--net"]
    enter = ["unshare", *how, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        subprocess.run([*enter, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return
    os.execvp(enter[0], [*enter, sys.executable, *sys.orig_argv[1:], "--isolated"])


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:].strip()
