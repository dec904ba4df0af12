"""What is measured: how fast slices are acknowledged and scored, and when the offset is there."""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.ingest.receivers import WHOLE, Running, running
from benchmarks.ingest.senders import RUN_S, ack_times_ms, send
from benchmarks.ingest.slices import Slices, shares

SEND_S = 1.5  # a row is sent no more slices than it takes in this time
PROBE_S = 1.0
LEAST = 4  # slices an association, however slow
QUIET_S = 5.0  # the node's default
OFFSET_POLL_S = 0.002

Say = Callable[[str], None]


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


def measure(
    folder: Path,
    receivers: Sequence[str],
    associations: Sequence[int],
    *,
    slices: int,
    probes: int,
    repeats: int,
    settings: Mapping[str, str],
    say: Say,
) -> dict[Key, Figures]:
    """Return the figures of every receiver at every number of associations, Nagle off and on.

    Parameters
    ----------
    slices, probes
        Sent for the rate and for the latencies, over all associations together.
    """
    counts = shares(slices, associations)
    say(f"making {sum(counts)} slices in {len(counts)} series")
    data = Slices(folder / "data", counts)
    figures: dict[Key, Figures] = {}
    # The whole round again and again: what else the machine does meets every receiver.
    for repeat in range(repeats):
        for receiver in receivers:
            for nagle in (False, True):
                with running(receiver, folder / "receiver", nagle, data, settings=settings) as at:
                    for n in associations:
                        key = Key(receiver, n, nagle)
                        row = figures.setdefault(key, Figures())
                        _measure_row(at, data, n, slices, probes, row)
                        say(f"{repeat + 1}/{repeats} {_progress(key, row)}")
    return figures


def _measure_row(at: Running, data: Slices, n: int, slices: int, probes: int, row: Figures) -> None:
    data.renew()
    probed = -(-min(probes, slices) // n)
    latencies = ack_times_ms(
        at.port, data, n, probed, at.nagle, in_turn=at.in_turn, seconds=PROBE_S
    )
    row.ack_ms += latencies
    series_uids = {data.series_uid(s) for s in range(n)}
    at.await_scores(series_uids, len(latencies))
    data.renew()
    # Slices an association: its share, or fewer where a slice takes long.
    at_once = 1 if at.in_turn else n
    in_time = int(SEND_S * 1e3 / float(np.median(latencies)) * at_once / n)
    share = min(-(-slices // n), max(LEAST, in_time))
    series = [paths[:share] for paths in data.paths[:n]]
    # What the last sender or a receiver that does not sync left to write is not ours to wait for.
    os.sync()
    count = sum(map(len, series))
    series_uids = {data.series_uid(s) for s in range(n)}
    cpu_s = at.cpu_s()
    first, last = send(at.port, series, at.folder, at.nagle)
    row.slices_per_s.append(count / max(last - first, 1e-3))  # its clock counts milliseconds
    if at.await_scores(series_uids, count):
        row.scored_per_s.append(count / (time.time() - first))
    row.cpu_ms_per_slice.append((at.cpu_s() - cpu_s) / count * 1e3)


def offset_times_ms(
    folder: Path, *, slices: int, repeats: int, settings: Mapping[str, str], say: Say
) -> list[float]:
    """Return the time from the last slice acknowledged to the offset stored, less the quiet time.

    Two Studies of one patient are sent to a whole node at once, over an association each.
    """
    say(f"making two series of {slices} slices of one patient")
    data = Slices(folder / "pair", [slices, slices], one_patient=True)
    times = []
    with running(
        WHOLE, folder / "receiver", False, data, settings=settings, quiet_seconds=QUIET_S
    ) as at:
        for repeat in range(repeats):
            data.renew()
            os.sync()
            _, last = send(at.port, data.paths, at.folder, nagle=False)
            seen = _offset_seen(at, {data.series_uid(0), data.series_uid(1)})
            times.append((seen - last - QUIET_S) * 1e3)
            say(f"{repeat + 1}/{repeats} offset stored {times[-1]:.0f} ms after the quiet time")
    return times


# `computed_at` would be a moment earlier: what counts is when others can read it.
STORED = """\
SELECT count(*) FROM offset
JOIN series AS fixed ON fixed.id = fixed_series_id
JOIN series AS moving ON moving.id = moving_series_id
WHERE fixed.series_uid IN (?, ?) AND moving.series_uid IN (?, ?) AND status IS NOT NULL
"""
PENDING = STORED.replace("NOT NULL", "NULL")


def _offset_seen(at: Running, series_uids: set[str]) -> float:
    """Wait until every offset of this pair is stored, and return when, in `time.time`."""
    uids = [*series_uids, *series_uids]
    deadline = time.time() + RUN_S
    with contextlib.closing(
        sqlite3.connect(f"file:{at.database}?mode=ro", uri=True, isolation_level=None)
    ) as database:
        while time.time() < deadline:
            (stored,) = database.execute(STORED, uids).fetchone()
            now = time.time()
            if stored and database.execute(PENDING, uids).fetchone() == (0,):
                return now
            time.sleep(OFFSET_POLL_S)
    raise RuntimeError(f"no offset in {RUN_S:.0f} s")


def senders(n: int) -> str:
    """Say how many associations."""
    return f"{n} association{'s' * (n > 1)}"


def _progress(key: Key, row: Figures) -> str:
    scored = f", {row.scored_per_s[-1]:.0f} scored" if row.scored_per_s else ""
    return (
        f"{key.receiver}, {senders(key.associations)}, "
        f"Nagle {'on' if key.nagle else 'off'}: {row.slices_per_s[-1]:.0f} slices/s{scored}"
    )
