"""CPU time of the receiver a slice, with and without the fast lane, and of idle associations.

    python -m benchmarks.lane [--slices 400] [--idle 20]

User and system time of the receiver's process, as the kernel counts it; the sender is another
process. Neither the disk's speed nor what else the machine does is in it.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.ingest import NODE, SENDER, Requestor

SLICE_BYTES = 526_000
IDLE_S = 5.0
PDU_BYTES = (16_382, 65_536, 131_072, 262_144)

# Announces a PDU length, and does nothing with what it stores where "null" is asked for.
RECEIVER = """
import dataclasses, signal, sys, threading
from dicomnode.config import Settings
from dicomnode.node import receive
settings, store, pdu_bytes = Settings.model_validate_json(sys.argv[1]), sys.argv[2], sys.argv[3]
limits = dataclasses.replace(receive.Limits(), announced_pdu_bytes=int(pdu_bytes))
receive.Limits = lambda: limits
if store == "null":
    receive.handle_store = lambda *args, **kwargs: 0
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
receiver = receive.Receiver(settings)
receiver.start()
print(receiver.port, flush=True)
stop.wait()
receiver.stop()
"""


@contextlib.contextmanager
def receiver(fast_lane: bool, store: str, pdu_bytes: int) -> Iterator[tuple[int, psutil.Process]]:
    """Give port and process of a receiver of its own, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="dicomnode-lane-") as folder:
        peers = [{"ae_title": SENDER, "host": "127.0.0.1", "port": 104}]
        settings = {
            "node": {"port": 0, "ae_title": NODE, "peers": peers, "fast_lane": fast_lane},
            "spool": {"path": str(Path(folder) / "spool"), "reserve_bytes": 0},
        }
        process = subprocess.Popen(
            [sys.executable, "-c", RECEIVER, json.dumps(settings), store, str(pdu_bytes)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline()), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


def cpu_s(process: psutil.Process) -> tuple[float, float]:
    """Return user and system time of a process."""
    times = process.cpu_times()
    return times.user, times.system


def slice_ms(port: int, process: psutil.Process, slices: int) -> tuple[float, float]:
    """Return user and system ms of one slice, over some of one association."""
    with contextlib.closing(Requestor(port)) as requestor:
        requestor.set_nagle(False)
        message = requestor.encode("1.2.3.4", bytes(SLICE_BYTES))
        requestor.store([message] * 20)
        before = cpu_s(process)
        requestor.store([message] * slices)
        after = cpu_s(process)
    user, system = (1e3 * (b - a) / slices for a, b in zip(before, after, strict=True))
    return user, system


def idle_share(port: int, process: psutil.Process, associations: int) -> float:
    """Return the share of a core that idle associations cost, each after one slice."""
    with contextlib.ExitStack() as stack:
        for _ in range(associations):
            requestor = stack.enter_context(contextlib.closing(Requestor(port)))
            requestor.store([requestor.encode("1.2.3.4", bytes(1000))])
        before = sum(cpu_s(process))
        time.sleep(IDLE_S)
        return (sum(cpu_s(process)) - before) / IDLE_S


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.lane", description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--idle", type=int, default=20, help="idle associations")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{SLICE_BYTES} bytes a slice, one association; CPU ms a slice, user + system")
    rows = [(lane, store, 131_072) for store in ("null", "spool") for lane in (False, True)]
    rows += [(lane, "null", pdu) for pdu in PDU_BYTES for lane in (False, True)]
    for fast_lane, store, pdu_bytes in rows:
        with receiver(fast_lane, store, pdu_bytes) as (port, process):
            user, system = min(
                (slice_ms(port, process, args.slices) for _ in range(args.repeats)), key=sum
            )
        name = "lane" if fast_lane else "pynetdicom"
        print(f"{name:10} {store:5} PDU {pdu_bytes:6}: {user:.2f} + {system:.2f}", flush=True)
    for fast_lane in (False, True):
        with receiver(fast_lane, "null", 131_072) as (port, process):
            share = idle_share(port, process, args.idle)
        name = "lane" if fast_lane else "pynetdicom"
        print(f"{name:10} {args.idle} idle associations: {100 * share:.1f} % of a core", flush=True)


if __name__ == "__main__":
    main()
