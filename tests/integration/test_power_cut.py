"""A power cut at any moment: what was put is found bit by bit, in every state it may leave.

`DICOMNODE_TEST_SOAK=100` looks at so many times more states.
"""

import os
import random
import threading
from pathlib import Path

import pytest

from dicomnode.errors import SpoolFull
from dicomnode.model import Reason, SpooledInstance
from dicomnode.spool import Spool
from dicomnode.spool.disk import SECTOR, Disk, PowerCut

SOAK = int(os.environ.get("DICOMNODE_TEST_SOAK", "1"))
WRITERS, PUTS, CUTS = 3, 8, 12
SEGMENT = 32 << 10


class Load:
    """Threads that put, and one that takes, on a disk that takes notes."""

    def __init__(self, path: Path, seed: int, before: "Load | None" = None) -> None:
        self.disk = PowerCut(path)
        self.spool = Spool(path, segment_bytes=SEGMENT, disk=self.disk)
        self.other = Spool(path, segment_bytes=SEGMENT, disk=self.disk)  # as of another process
        self.put: dict[str, tuple[int, bytes | None]] = {}  # name -> moment of the answer, bytes
        self.begun: list[bytes] = []
        self.removed: dict[str, int] = {}  # name -> moment before
        self.aside: dict[str, tuple[int, int, bytes]] = {}  # file -> before, after, bytes
        self._seed = seed
        if before is not None:
            self.begun = before.begun
            # What it left, and what came back; looking may set a segment free.
            for entry in self.spool.pending(10_000):
                data = before.put.get(entry.name, (0, None))[1]
                if entry.name in before.put:
                    self.put[entry.name] = self.disk.now, data

    def run(self) -> None:
        writers = [threading.Thread(target=self._write, args=(n,)) for n in range(WRITERS)]
        done = threading.Event()
        worker = threading.Thread(target=self._take, args=(done,))
        for thread in (*writers, worker):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        worker.join()
        self.spool.close()
        self.other.close()

    def _write(self, writer: int) -> None:
        rng = random.Random(f"{self._seed} {writer}")
        spool = self.other if writer == WRITERS - 1 else self.spool
        association = f"{writer:016x}"
        for n in range(PUTS):
            size = rng.choice((0, 1, 100, 4032, 4033, 9000, rng.randrange(20_000), 40_000))
            data = rng.randbytes(size)
            self.begun.append(data)
            entry = spool.put([data[:7], data[7:]], association)
            self.put[entry.name] = self.disk.now, data
            if n % 3 == 2:
                event = spool.put_event(association, "released")
                self.put[event.name] = self.disk.now, None

    def _take(self, done: threading.Event) -> None:
        rng = random.Random(self._seed)
        while not done.is_set():
            for entry in self.spool.pending(3):
                before = self.disk.now
                if isinstance(entry, SpooledInstance):
                    data = bytes(self.spool.read(entry))
                    assert data in self.begun
                    if rng.random() < 0.3:
                        aside = self.spool.quarantine(entry, Reason.CORRUPT)
                        self.aside[aside.name] = before, self.disk.now, data
                self.spool.remove(entry)
                self.removed[entry.name] = before
            done.wait(rng.random() * 0.002)


@pytest.mark.parametrize("seed", range(8 * SOAK))
def test_what_was_put_survives_a_power_cut(tmp_path, seed, caplog):
    load = Load(tmp_path / "spool", seed)
    load.run()
    end = load.disk.now
    rng = random.Random(seed)
    cuts = [end, *(rng.randrange(1, end + 1) for _ in range(CUTS * 3))]
    for n, moment in enumerate(cuts):
        path = tmp_path / f"cut {n}"
        load.disk.lay_out(moment, path, rng)
        check(load, path, moment)
    assert "damaged" not in caplog.text  # a power cut is no damage


@pytest.mark.parametrize("seed", range(2 * SOAK))
def test_power_cuts_may_follow_each_other(tmp_path, seed, caplog):
    rng = random.Random(seed)
    load = None
    for life in range(6):
        path = tmp_path / f"life {life}"
        load = Load(path, 1000 * seed + life, load)
        load.run()
        moment = rng.randrange(load.disk.now // 2, load.disk.now + 1)
        load.disk.lay_out(moment, tmp_path / f"life {life + 1}", rng)
        load.disk.lay_out(moment, tmp_path / f"look {life}", rng)
        check(load, tmp_path / f"look {life}", moment)
        for name, (answered, _) in list(load.put.items()):
            if answered > moment:
                del load.put[name]
    assert "damaged" not in caplog.text


def check(load: Load, path: Path, moment: int) -> None:
    spool = Spool(path, segment_bytes=SEGMENT)
    if moment % 2:  # before or after a new writer came
        spool.put_event("f" * 16, "started")
    waiting = {entry.name: entry for entry in spool.pending(10_000)}
    for name, (answered, data) in load.put.items():
        if answered > moment or load.removed.get(name, moment) < moment:
            continue
        assert name in waiting, f"put by {answered}, gone after a cut at {moment}"
        entry = waiting[name]
        if isinstance(entry, SpooledInstance):
            assert bytes(spool.read(entry)) == data
    for entry in waiting.values():  # and nothing that nobody wrote
        if isinstance(entry, SpooledInstance):
            assert bytes(spool.read(entry)) in load.begun
    for file, (_, after, data) in load.aside.items():
        if after <= moment:
            assert (path / "quarantine" / file).read_bytes() == data
    spool.remove(*waiting.values())
    assert spool.pending(1) == []
    spool.close()


class Forgetful(PowerCut):
    """Answers a sync without one: what the test above must catch."""

    def sync(self, fd: int) -> None:
        pass


def test_the_model_catches_a_disk_that_does_not_sync(tmp_path):
    disk = Forgetful(tmp_path / "spool")
    spool = Spool(tmp_path / "spool", segment_bytes=SEGMENT, disk=disk)
    put = spool.put(b"x" * 5000, "0" * 16)
    lost = 0
    for seed in range(20):
        disk.lay_out(disk.now, tmp_path / f"cut {seed}", random.Random(seed))
        after = Spool(tmp_path / f"cut {seed}")
        lost += after.pending(1) != [put]
    assert lost > 0


def test_the_model_leaves_what_was_synced_and_any_mixture_of_what_was_not(tmp_path):
    (tmp_path / "a").mkdir()
    disk = PowerCut(tmp_path / "a")
    fd = disk.create(tmp_path / "a" / "file")
    disk.allocate(fd, 4 * SECTOR)
    disk.write(fd, [b"1" * 4 * SECTOR], 0)
    disk.sync(fd)
    disk.sync_directory(tmp_path / "a")
    disk.write(fd, [b"2" * 2 * SECTOR], 0)
    disk.rename(tmp_path / "a" / "file", tmp_path / "a" / "renamed")
    seen = set()
    for seed in range(200):
        target = tmp_path / str(seed)
        disk.lay_out(disk.now, target, random.Random(seed))
        (file,) = target.iterdir()
        data = file.read_bytes()
        seen.add((file.name, data[::SECTOR]))
    assert seen == {
        (name, first + second + b"11")
        for name in ("file", "renamed")
        for first in (b"1", b"2")
        for second in (b"1", b"2")
    }
    os.close(fd)


class Failing(Disk):
    """Fails the syncs of one file after so many, as a disk does that goes bad."""

    def __init__(self, good: int) -> None:
        self.left = good

    def sync(self, fd: int) -> None:
        self.left -= 1
        if self.left == -1:
            raise OSError(5, "Input/output error")
        super().sync(fd)


def test_after_a_failed_sync_the_next_segment_serves(tmp_path):
    spool = Spool(tmp_path, disk=Failing(3))
    put = [spool.put(b"1", "0" * 16), spool.put(b"2", "0" * 16)]  # one sync is the header's
    with pytest.raises(SpoolFull, match="Input/output"):
        spool.put(b"3", "0" * 16)
    put.append(spool.put(b"4", "0" * 16))
    found = [entry for entry in spool.pending(10) if entry in put]
    assert found == put
    assert put[0].place.number == put[1].place.number != put[2].place.number
    assert [bytes(spool.read(entry)) for entry in found] == [b"1", b"2", b"4"]
