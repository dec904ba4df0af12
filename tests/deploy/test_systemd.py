"""The units are sound and tight, and the node says to systemd what they wait for."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
EXPOSURE = 2.0  # of 10; systemd calls it OK
CONFIG = """
[node]
port = 0
peers = [{ ae_title = "TEST", host = "127.0.0.1", port = 104 }]
[spool]
reserve_bytes = 1_000_000
[web]
port = 0
"""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The units as they are installed, with a program that they can start."""
    root = tmp_path_factory.mktemp("units")
    program = root / "dicomnode"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for path in UNITS.iterdir():
        if path.suffix in (".service", ".target"):
            text = path.read_text().replace("/opt/dicomnode/bin/dicomnode", str(program))
            (root / path.name).write_text(text)
        if path.suffix == ".service":
            (root / f"{path.name}.d").mkdir()
            shutil.copy(UNITS / "hardening.conf", root / f"{path.name}.d" / "10-hardening.conf")
    return root


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_is_sound(installed, name):
    found = analyze("verify", "--man=no", str(installed / name))
    ours = [line for line in found.stderr.splitlines() if "dicomnode" in line]
    assert (found.returncode, ours) == (0, [])


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_may_do_little(installed, name):
    path = str(installed / name)
    found = analyze("security", "--offline=yes", f"--threshold={EXPOSURE * 10:.0f}", path)
    assert found.returncode == 0, found.stdout


@needs_systemd
def test_a_unit_without_hardening_is_found_wanting(tmp_path):
    shutil.copy(UNITS / "dicomnode.service", tmp_path)
    path = str(tmp_path / "dicomnode.service")
    assert analyze("security", "--offline=yes", "--threshold=20", path).returncode != 0


def test_every_part_that_serve_knows_has_a_unit():
    from dicomnode.cli import main

    (only,) = [p for p in main.commands["serve"].params if p.name == "only"]  # type: ignore[attr-defined]  # a group
    units = {name.removeprefix("dicomnode-").removesuffix(".service") for name in SERVICES}
    assert set(only.type.choices) <= units  # type: ignore[attr-defined]  # a choice


@pytest.fixture
def systemd(tmp_path) -> Iterator[socket.socket]:
    """The socket at which systemd listens to what it started."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(60)
        yield sock


def start(folder: Path, only: str | None) -> subprocess.Popen[bytes]:
    (folder / "node.toml").write_text(CONFIG)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DICOMNODE_")}
    environment |= {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "900000"}
    command = [sys.executable, "-m", "dicomnode", "serve", "--config", "node.toml"]
    command += ["--only", only] if only else []
    environment["PYTHONPATH"] = str(UNITS.parents[1])
    return subprocess.Popen(command, cwd=folder, env=environment)


def hear(systemd: socket.socket, wanted: str) -> list[str]:
    """What was said up to the message that is waited for."""
    said: list[str] = []
    while wanted not in said:
        said.append(systemd.recv(4096).decode())
    return said


@pytest.mark.parametrize("only", [None, "receive", "work", "exchange", "web"])
def test_a_part_says_when_it_is_ready_alive_and_at_its_end(tmp_path, systemd, only):
    node = start(tmp_path, only)
    try:
        said = hear(systemd, "READY=1")
        assert "STOPPING=1" not in said
        hear(systemd, "WATCHDOG=1")
        hear(systemd, "WATCHDOG=1")
        node.send_signal(signal.SIGTERM)
        hear(systemd, "STOPPING=1")
        assert node.wait(60) == 0
    finally:
        node.kill()


def test_a_supervisor_alone_answers_and_says_what_died(tmp_path, systemd):
    node = start(tmp_path, None)
    try:
        hear(systemd, "STATUS=every part runs")
        deadline = time.monotonic() + 60
        for _ in range(2):  # the first time it is started again at once
            worker = None
            while worker is None:
                assert time.monotonic() < deadline
                children = psutil.Process(node.pid).children()
                worker = next((c for c in children if "work" in c.cmdline()), None)
            for variable in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
                assert variable not in worker.environ()
            worker.kill()
            psutil.wait_procs([worker], 10)
        hear(systemd, "STATUS=work died, to be restarted")
        hear(systemd, "STATUS=every part runs")
    finally:
        node.terminate()
        node.wait(60)
