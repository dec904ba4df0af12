"""Steady load for an hour: memory, threads and descriptors stay flat, and nothing is missing.

    python -m tests.soak.steady --minutes 60 --rate 100 --folder /var/tmp/steady

Several associations come and go with new patients of two timepoints each, some compressed, some
over two associations, some aborted within a slice; beside them are C-ECHO checks, connections that
are closed at once, and a stranger who is rejected. The folder keeps the node, `samples.jsonl` and
`steady.json`; the same command goes on where an earlier one was cut off.

Exit status 1 where something acknowledged is in no curve, an offset is missing, a process of the
node died, or memory, threads or descriptors grew by more than the bounds.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pynetdicom.sop_class import Verification

from benchmarks.ingest.senders import Requestor
from tests.e2e.conftest import Node, association
from tests.soak.visits import Timepoint, Visits, series_uid

ECHO = (Verification, ["1.2.840.10008.1.2"])
SENDERS = 4
QUIET_S = 5.0
METHODS = 3  # offsets of a pair
ECHO_S, PROBE_S, STRANGER_S = 5.0, 2.0, 20.0  # between two
SHARE_SPLIT, SHARE_ABORTED = 0.1, 0.1  # of the timepoints
WARM_UP_S, WARM_UP_SHARE = 300.0, 0.2  # the lesser: not counted
# What a receiver opens with its first C-STORE and keeps: the segment after, the bell, a directory.
OPENED_BY_STORING = 4
MEASURES = ("rss_mib", "uss_mib", "anonymous_mib", "threads", "descriptors")
# The bound is on anonymous memory: pages of torch count as the worker's own (USS) as soon as no
# other process on the machine has it loaded, which moved USS by 77 MiB while RSS stood still.
# An association more or less at the moment of a look is no leak.
GROWTH_THREADS, GROWTH_DESCRIPTORS = 4, 4
FREED_S = 60.0  # until a receiver without associations holds what it held before
DRAIN_S = 300.0


@dataclass
class Faults:
    """What must not happen; `who` did what how often."""

    what: Counter[str] = field(default_factory=Counter)

    def add(self, message: str) -> None:
        self.what[message] += 1
        if self.what[message] <= 3:
            say(f"FAULT {message}")


class Pace:
    """Lets slices go at a steady rate, whoever sends them."""

    def __init__(self, rate: float) -> None:
        self._step, self._next = 1.0 / rate, time.monotonic()
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            # A pause of the machine is not made up for by a burst of more than a second.
            self._next = max(self._next + self._step, time.monotonic() - 1.0)
            due = self._next
        time.sleep(max(0.0, due - time.monotonic()))


class Senders:
    """Send visit after visit until told to stop, and tell what was acknowledged."""

    def __init__(
        self, port: int, visits: Visits, rate: float, seed: int, sent: Path, faults: Faults
    ) -> None:
        self.acknowledged = 0
        self.associations = self.aborted = 0
        self.done: list[tuple[int, int, int]] = []  # token, timepoint, slices
        self._port, self._faults, self._sent = port, faults, sent
        self._visits, self._pace, self._rng = iter(visits), Pace(rate), random.Random(seed)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(SENDERS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let what was begun come to its end."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                timepoints, draw = next(self._visits), self._rng.random()
            for timepoint in timepoints:
                try:
                    self._send(timepoint, draw)
                except (OSError, RuntimeError, ValueError) as exc:
                    self._faults.add(f"a sender failed: {type(exc).__name__}: {exc}")
                    self._stop.wait(1.0)
                    break
                row = (timepoint.token, timepoint.number, len(timepoint.slices))
                with self._lock:
                    self.done.append(row)
                    with open(self._sent, "a") as file:
                        file.write(json.dumps(row) + "\n")

    def _send(self, timepoint: Timepoint, draw: float) -> None:
        half = len(timepoint.slices) // 2
        if draw < SHARE_SPLIT:
            self._associate(timepoint, timepoint.slices[:half])
            self._associate(timepoint, timepoint.slices[half:])
        elif draw < SHARE_SPLIT + SHARE_ABORTED:
            # Cut off within the slice after these, which is sent again.
            self._associate(timepoint, timepoint.slices[:half], cut=timepoint.slices[half])
            self._associate(timepoint, timepoint.slices[half:])
        else:
            self._associate(timepoint, timepoint.slices)

    def _associate(
        self,
        timepoint: Timepoint,
        slices: Sequence[tuple[str, bytes]],
        cut: tuple[str, bytes] | None = None,
    ) -> None:
        requestor = Requestor(self._port, "TEST", timepoint.transfer_syntax)
        try:
            requestor.set_nagle(False)
            for uid, data in slices:
                self._pace.wait()
                status = requestor.status_of([b"".join(requestor.encode(uid, data))])
                if status != 0x0000:
                    self._faults.add(f"a slice was answered 0x{status:04X}")
                    raise RuntimeError("refused")
                with self._lock:
                    self.acknowledged += 1
            if cut is not None:
                pdus = b"".join(requestor.encode(*cut))
                requestor.send(pdus[: len(pdus) // 2])
                requestor.abort()
        finally:
            requestor.close()
        with self._lock:
            self.associations += 1
            self.aborted += cut is not None


class Others:
    """Health checks, probes and strangers, until told to stop."""

    def __init__(self, port: int, faults: Faults) -> None:
        self.count: Counter[str] = Counter()
        self.slowest_echo_s = 0.0
        self._port, self._faults = port, faults
        self._stop = threading.Event()
        turns = ((self._echo, ECHO_S), (self._probe, PROBE_S), (self._stranger, STRANGER_S))
        self._threads = [threading.Thread(target=self._run, args=turn) for turn in turns]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, turn: Callable[[], None], every_s: float) -> None:
        while not self._stop.wait(every_s):
            turn()
            self.count[turn.__name__.strip("_")] += 1

    def _echo(self) -> None:
        start = time.monotonic()
        with association(self._port, ECHO) as assoc:
            if not (assoc.is_established and assoc.send_c_echo().get("Status") == 0x0000):
                self._faults.add("a C-ECHO was not answered")
        self.slowest_echo_s = max(self.slowest_echo_s, time.monotonic() - start)

    def _probe(self) -> None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self._port), timeout=10.0).close()

    def _stranger(self) -> None:
        with association(self._port, calling_ae_title="STRANGER") as assoc:
            if not assoc.is_rejected:
                self._faults.add("a stranger was not rejected")


class Verifier:
    """Looks from outside whether all that was sent became curves and offsets."""

    def __init__(self, database: Path) -> None:
        self.curves = self.offsets = 0
        self.slowest_s = 0.0  # from the last acknowledgement until a look found the curve
        self._database = database
        self._series: dict[tuple[int, int], tuple[int, float]] = {}
        self._pairs: set[int] = set()

    def expect(self, token: int, number: int, slices: int) -> None:
        """Expect a curve of a timepoint, and with the second one the offsets."""
        self._series[token, number] = (slices, time.monotonic())
        if number == 2:
            self._pairs.add(token)

    @property
    def waiting(self) -> int:
        """How many curves and pairs are not there yet."""
        return len(self._series) + len(self._pairs)

    def look(self) -> list[str]:
        """Cross off what is there now, and return what is there and is wrong."""
        wrong = []
        with contextlib.closing(
            sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=30.0)
        ) as database:
            for (token, number), (slices, since) in list(self._series.items()):
                uid = series_uid(token, number)
                row = database.execute(
                    "SELECT state, count FROM series LEFT JOIN curve ON series_id = id "
                    "WHERE series_uid = ?",
                    [uid],
                ).fetchone()
                if row is None or row[0] == "open" or (row[0] == "curve" and row[1] < slices):
                    continue  # a Series that was cut off is finished again when the rest is in
                if row != ("curve", slices):
                    wrong.append(f"{uid}: {row}, sent {slices}")
                self.curves += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - since)
                del self._series[token, number]
            for token in list(self._pairs):
                (stored,) = database.execute(
                    "SELECT count(*) FROM offset "
                    "JOIN series AS fixed ON fixed.id = fixed_series_id "
                    "JOIN series AS moving ON moving.id = moving_series_id "
                    "WHERE fixed.series_uid = ? AND moving.series_uid = ? "
                    "AND status IS NOT NULL",
                    [series_uid(token, 2), series_uid(token, 1)],
                ).fetchone()
                if stored == METHODS:
                    self.offsets += stored
                    self._pairs.discard(token)
        return wrong


Sample = dict[str, Any]


def sample(node: Node, elapsed_s: float, leg: int) -> Sample:
    """Return what the node holds now: by process, and on disk."""
    processes: dict[str, dict[str, float]] = {}
    supervisor = node.supervisor
    for name, found in (
        ("supervisor", [supervisor]),
        ("receiver", node.processes("receiver")),
        ("worker", node.processes("worker")),
    ):
        for i, process in enumerate(sorted(found, key=lambda p: p.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = process.memory_full_info()
                processes[f"{name} {i}" if i else name] = {
                    "pid": process.pid,
                    "rss_mib": memory.rss / 2**20,
                    "uss_mib": memory.uss / 2**20,
                    "anonymous_mib": (memory.rss - memory.shared) / 2**20,
                    "threads": process.num_threads(),
                    "descriptors": process.num_fds(),
                    "cpu_s": sum(process.cpu_times()[:2]),
                }
    database = Path(node.database_url.removeprefix("sqlite:///"))
    return {
        "leg": leg,
        "elapsed_s": elapsed_s,
        "processes": processes,
        "spool_mib": sum(_blocks(path) for path in _files(node.spool.path)) / 2**20,
        "database_mib": sum(map(_blocks, database.parent.glob(f"{database.name}*"))) / 2**20,
    }


def summary(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return a row for each process and measure: start, middle, end, slope an hour, growth.

    Of the longest leg, after its warm-up; start, middle and end are medians of a sixth each.
    """
    legs = Counter(s["leg"] for s in samples)
    leg = [s for s in samples if s["leg"] == legs.most_common(1)[0][0]]
    begin, end = leg[0]["elapsed_s"], leg[-1]["elapsed_s"]
    warm = begin + min(WARM_UP_S, WARM_UP_SHARE * (end - begin))
    steady = [s for s in leg if s["elapsed_s"] >= warm]
    hours = np.array([s["elapsed_s"] for s in steady]) / 3600.0
    series: dict[tuple[str, str], list[float]] = {}
    for s in steady:
        for name, process in s["processes"].items():
            for measure in MEASURES:
                series.setdefault((name, measure), []).append(process[measure])
        for measure in ("spool_mib", "database_mib"):
            series.setdefault(("disk", measure), []).append(s[measure])
    rows = []
    for (name, measure), values in series.items():
        if len(values) != len(steady) or len(values) < 6:
            continue  # it was not there all the time: that is a fault of its own
        y, sixth = np.array(values), len(values) // 6
        middle = slice(len(y) // 2 - sixth // 2, len(y) // 2 + (sixth + 1) // 2)
        first, last = float(np.median(y[:sixth])), float(np.median(y[-sixth:]))
        rows.append(
            {
                "process": name,
                "measure": measure,
                "start": round(first, 2),
                "middle": round(float(np.median(y[middle])), 2),
                "end": round(last, 2),
                "slope_per_hour": round(float(np.polyfit(hours, y, 1)[0]), 2),
                "growth": round(last - first, 2),
            }
        )
    return rows


@dataclass
class Outcome:
    """What `run` found."""

    minutes: float
    slices: int
    curves: int
    offsets: int
    missing: int
    rows: list[dict[str, Any]]
    faults: dict[str, int]
    associations: int
    aborted: int
    others: dict[str, int]
    slowest_echo_s: float
    slowest_curve_s: float
    cpu_share: dict[str, float]  # of one core

    @property
    def sound(self) -> bool:
        return not (self.missing or self.faults)


def run(
    folder: Path, *, minutes: float, rate: float, every_s: float, grow_mib: float, matrix: int,
    seed: int,
) -> Outcome:  # fmt: skip
    """Load a node in a folder until it had so many minutes of it, over all runs there."""
    folder.mkdir(parents=True, exist_ok=True)
    samples_file, sent = folder / "samples.jsonl", folder / "sent.jsonl"
    samples: list[Sample] = list(_json_lines(samples_file))
    leg = 1 + max((s["leg"] for s in samples), default=0)
    before_s = max((s["elapsed_s"] for s in samples), default=0.0)
    faults = Faults()
    node = Node(folder / "node", quiet_seconds=QUIET_S)
    node.tracebacks_of = {"pynetdicom.dul"}
    verifier = Verifier(Path(node.database_url.removeprefix("sqlite:///")))
    for row in _json_lines(sent):
        verifier.expect(*row)
    say("encoding the slices")
    visits = Visits(matrix, 100_000_000_000 * leg + seed * 1_000_000)
    try:
        node.start()
        idle = _receivers_hold(node)
        began = time.monotonic()
        senders = Senders(node.port, visits, rate, seed + leg, sent, faults)
        others = Others(node.port, faults)
        told = 0.0
        checked = 0
        try:
            while (elapsed := before_s + time.monotonic() - began) < 60.0 * minutes:
                time.sleep(min(every_s, 60.0 * minutes - elapsed))
                elapsed = before_s + time.monotonic() - began
                samples.append(sample(node, elapsed, leg))
                with open(samples_file, "a") as file:
                    file.write(json.dumps(samples[-1]) + "\n")
                new = senders.done[checked:]
                checked += len(new)
                for row in new:
                    verifier.expect(*row)
                for message in verifier.look():
                    faults.add(f"wrong: {message}")
                if elapsed - told > 60.0:
                    told = elapsed
                    say(_progress(samples[-1], senders, verifier))
        finally:
            others.stop()
            senders.stop()
        for row in senders.done[checked:]:
            verifier.expect(*row)
        deadline = time.monotonic() + DRAIN_S
        while verifier.waiting and time.monotonic() < deadline:
            time.sleep(1.0)
            for message in verifier.look():
                faults.add(f"wrong: {message}")
        _check_end(node, idle, faults)
        status = node.stop()
        if status != 0:
            faults.add(f"the node stopped with status {status}")
        node.check_log()
    finally:
        node.close()
    rows = summary(samples)
    for row in rows:
        bound = {
            "anonymous_mib": grow_mib,
            "threads": GROWTH_THREADS,
            "descriptors": GROWTH_DESCRIPTORS,
        }.get(row["measure"])
        if bound is not None and row["growth"] > bound:
            faults.add(f"{row['process']}: {row['measure']} grew by {row['growth']}")
    outcome = Outcome(
        minutes=round(samples[-1]["elapsed_s"] / 60.0, 2),
        slices=senders.acknowledged,
        curves=verifier.curves,
        offsets=verifier.offsets,
        missing=verifier.waiting,
        rows=rows,
        faults=dict(faults.what),
        associations=senders.associations,
        aborted=senders.aborted,
        others=dict(others.count),
        slowest_echo_s=round(others.slowest_echo_s, 3),
        slowest_curve_s=round(verifier.slowest_s, 1),
        cpu_share=_cpu_share([s for s in samples if s["leg"] == leg]),
    )
    (folder / "steady.json").write_text(json.dumps(asdict(outcome), indent=1))
    return outcome


def _receivers_hold(node: Node) -> tuple[int, int]:
    """Return threads and descriptors of the receivers, once they served a first association."""
    with association(node.port, ECHO) as assoc:
        assert assoc.send_c_echo().Status == 0x0000
    time.sleep(1.0)
    processes = node.processes("receiver")
    return sum(p.num_threads() for p in processes), sum(p.num_fds() for p in processes)


def _check_end(node: Node, idle: tuple[int, int], faults: Faults) -> None:
    deadline = time.monotonic() + FREED_S
    files = idle[1] + OPENED_BY_STORING
    while (now := _receivers_hold(node)) and (now[0] > idle[0] or now[1] > files):
        if time.monotonic() > deadline:
            faults.add(f"receivers hold {now} threads and descriptors, {idle} before the load")
            break
    if node.spool.pending(1):
        faults.add("the spool is not empty")
    for reason, count in node.quarantined().items():
        faults.add(f"in quarantine: {count} {reason}")
    for event in node.events():
        if event.get("event") == "part died":
            faults.add(f"{event['part']} died with status {event['status']}")


def _cpu_share(leg: Sequence[Sample]) -> dict[str, float]:
    if len(leg) < 2:
        return {}
    wall_s = leg[-1]["elapsed_s"] - leg[0]["elapsed_s"]
    share = {
        name: round((process["cpu_s"] - leg[0]["processes"][name]["cpu_s"]) / wall_s, 3)
        for name, process in leg[-1]["processes"].items()
        if name in leg[0]["processes"]
    }
    times = psutil.Process().cpu_times()
    return {**share, "senders": round((times.user + times.system) / wall_s, 3)}


def _progress(last: Sample, senders: Senders, verifier: Verifier) -> str:
    memory = ", ".join(f"{n} {p['anonymous_mib']:.0f} MiB" for n, p in last["processes"].items())
    return (
        f"{last['elapsed_s'] / 60:.0f} min: {senders.acknowledged} acknowledged, "
        f"{verifier.curves} curves, {verifier.waiting} waiting; {memory}"
    )


def show(outcome: Outcome) -> None:
    """Print an outcome as a table in Markdown."""
    print(
        f"{outcome.minutes:.0f} minutes, {outcome.slices} slices acknowledged over "
        f"{outcome.associations} associations ({outcome.aborted} aborted), "
        f"{outcome.curves} curves, {outcome.offsets} offsets, missing {outcome.missing}; "
        f"{outcome.others}; slowest C-ECHO "
        f"{outcome.slowest_echo_s:.2f} s, slowest curve {outcome.slowest_curve_s:.0f} s; "
        f"CPU, of one core: {outcome.cpu_share}"
    )
    print("\n| process | measure | start | middle | end | slope an hour |")
    print("|---|---|---:|---:|---:|---:|")
    for row in outcome.rows:
        print(
            f"| {row['process']} | {row['measure'].replace('_mib', ', MiB')} | {row['start']:g} "
            f"| {row['middle']:g} | {row['end']:g} | {row['slope_per_hour']:+g} |"
        )
    for fault, count in outcome.faults.items():
        print(f"FAULT {fault} ({count})")


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root) / name for name in names)


def _blocks(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _json_lines(path: Path) -> Iterator[Any]:
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last one may be cut off
                yield json.loads(line)


def say(message: str) -> None:
    """Tell the person who waits."""
    print(message, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Load a node as told, print what it held, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.steady", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=100.0, help="slices a second")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/dicomnode-steady"))
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--grow-mib", type=float, default=24.0, help="anonymous memory, at most")
    parser.add_argument("--matrix", type=int, default=256, help="rows and columns of a slice")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # comes to `finally`
    outcome = run(
        options.folder,
        minutes=options.minutes,
        rate=options.rate,
        every_s=options.every,
        grow_mib=options.grow_mib,
        matrix=options.matrix,
        seed=options.seed,
    )
    show(outcome)
    return 0 if outcome.sound else 1


if __name__ == "__main__":
    sys.exit(main())
