"""What it costs to put a slice into the spool, by both of its ways, at several senders at a time.

CPU time and syncs of the disk a slice, and CPU time to read and remove it again; medians over
rounds, the first of which, with nothing to use again, does not count. Ratios are journal / file,
below 1 is better. `--sync-ms` makes each sync last longer, as on a slower disk.
"""

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dicomnode.model import SpooledInstance
from dicomnode.spool import Disk, Durability, Spool

SLICE_BYTES = 526_336
SLICES, QUICK_SLICES = 384, 32
SENDERS = (1, 4, 8)
ROUNDS, QUICK_ROUNDS = 6, 2
ASSOCIATION = "0" * 16
WAYS: tuple[Durability, ...] = ("journal", "file")


class Counting(Disk):
    """Counts syncs, and makes them last."""

    def __init__(self, sync_s: float) -> None:
        self.sync_s, self.syncs = sync_s, 0

    def sync(self, fd: int) -> None:
        """See `Disk`."""
        self.syncs += 1
        time.sleep(self.sync_s)
        super().sync(fd)

    def sync_whole(self, fd: int) -> None:
        """See `Disk`."""
        self.syncs += 1
        time.sleep(self.sync_s)
        super().sync_whole(fd)

    def sync_directory(self, path: Path) -> None:
        """See `Disk`."""
        self.syncs += 1
        time.sleep(self.sync_s)
        super().sync_directory(path)


def measure(
    way: Durability, senders: int, slices: int, sync_s: float, folder: Path
) -> Iterator[list[float]]:
    """Yield ms, CPU ms and syncs a slice to put it, and CPU ms to take it, round by round."""
    disk = Counting(sync_s)
    spool = Spool(folder, durability=way, disk=disk)
    meta, data = os.urandom(400), os.urandom(SLICE_BYTES)

    def send() -> None:
        for _ in range(slices // senders):
            spool.put([meta, data], ASSOCIATION)

    while True:
        threads = [threading.Thread(target=send) for _ in range(senders)]
        disk.syncs, cpu, began = 0, time.process_time(), time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall, put = time.monotonic() - began, time.process_time() - cpu
        while entries := spool.pending(32):
            for entry in entries:
                assert isinstance(entry, SpooledInstance)
                spool.read(entry)
            spool.remove(*entries)
        taken = time.process_time() - cpu - put
        yield [
            1000 * wall / slices,
            1000 * put / slices,
            disk.syncs / slices,
            1000 * taken / slices,
        ]


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="On the disk to measure.")
@click.option("--sync-ms", default=0.0, show_default=True, help="Added to each sync.")
@click.option("--quick", is_flag=True, help="Few slices and rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(folder: Path | None, sync_ms: float, quick: bool, as_json: bool) -> None:
    """Measure both ways in turn, round by round.

    \b
    Example:  python -m benchmarks.spool --sync-ms 5
    """
    slices, rounds = (QUICK_SLICES, QUICK_ROUNDS) if quick else (SLICES, ROUNDS)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for senders in SENDERS:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            runs = {
                way: measure(way, senders, slices, sync_ms / 1000, Path(made, way)) for way in WAYS
            }
            taken: dict[Durability, list[list[float]]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way in WAYS:
                    taken[way].append(next(runs[way]))
        found = {
            way: [statistics.median(column) for column in zip(*taken[way][1:], strict=True)]
            for way in WAYS
        }
        names = ("wall_ms", "put_cpu_ms", "syncs", "take_cpu_ms")
        for way in WAYS:
            row = dict(zip(names, (round(v, 3) for v in found[way]), strict=True))
            rows.append({"way": way, "senders": senders, **row})
        for i, name in enumerate(names):
            ratios[f"{name}_{senders}"] = round(found["journal"][i] / found["file"][i], 3)
    if as_json:
        click.echo(json.dumps({"rows": rows, "ratios": ratios}, indent=1))
        return
    for row in rows:
        click.echo("  ".join(f"{key} {value}" for key, value in row.items()))
    click.echo("journal / file: " + ", ".join(f"{k} {v}" for k, v in ratios.items()))


if __name__ == "__main__":
    main()
