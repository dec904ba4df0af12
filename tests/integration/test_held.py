"""Held pixels: on stable storage when they are said to be, under names that are UIDs."""

import errno
import os
import random
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dicomnode.errors import HeldUnavailable
from dicomnode.held import Held, Pixels
from dicomnode.spool.disk import Bytes, Disk, PowerCut

STUDY, SERIES = "1.2.840.1", "1.2.840.1.1"


def pixels(number: int, data: Bytes = b"", series_uid: str = SERIES) -> Pixels:
    return Pixels(STUDY, series_uid, f"{series_uid}.{number}", data or bytes([number]) * 3000)


def found(held: Held, series_uid: str = SERIES) -> dict[str, bytes]:
    return {uid: f.read_bytes() for uid, f in held.instances(STUDY, series_uid).items()}


@pytest.fixture
def held(tmp_path) -> Held:
    held = Held(tmp_path / "held")
    held.make()
    return held


def test_what_was_put_is_found_by_its_uids(held):
    held.put([pixels(n) for n in range(1, 101)])  # more than are open at a time
    held.put([pixels(1, series_uid="1.9")])
    assert found(held) == {f"{SERIES}.{n}": bytes([n]) * 3000 for n in range(1, 101)}
    assert {s.series_uid for s in held.series()} == {SERIES, "1.9"}
    assert (held.path / STUDY / SERIES / f"{SERIES}.7.dcm").is_file()
    assert held.instances(STUDY, "1.10") == {}
    held.close()


def test_only_the_user_of_the_node_may_look(held):
    held.put([pixels(1)])
    folder = held.path / STUDY / SERIES
    modes = [p.stat().st_mode & 0o777 for p in (held.path, folder, *folder.iterdir())]
    assert modes == [0o700, 0o700, 0o600]


def test_a_repeat_replaces_and_of_two_in_one_go_the_last_counts(held):
    held.put([pixels(1, b"first"), pixels(1, b"second")])
    assert found(held) == {f"{SERIES}.1": b"second"}
    held.put([pixels(1, b"third")])
    assert found(held) == {f"{SERIES}.1": b"third"}


@pytest.mark.parametrize(
    "bad", ["", "..", "1.2/../../etc", "/etc", "1.2\0", "1." * 40, "1.2 ", "٣"]
)
def test_what_is_no_uid_becomes_no_path(held, tmp_path, bad):
    for place in range(3):
        uids = [STUDY, SERIES, "1.5"]
        uids[place] = bad
        with pytest.raises(ValueError, match="no UID"):
            held.put([pixels(1), Pixels(*uids, b"data")])
    for uids in ([bad, SERIES], [STUDY, bad]):
        with pytest.raises(ValueError, match="no UID"):
            held.instances(*uids)
        with pytest.raises(ValueError, match="no UID"):
            held.drop(*uids)
    assert [p.name for p in tmp_path.rglob("*")] == ["held"]


def test_what_is_dropped_is_gone_with_its_folders_and_nothing_else_is(held):
    held.put([pixels(1), pixels(2), pixels(1, series_uid="1.9")])
    held.drop(STUDY, SERIES)
    assert found(held) == {} and len(found(held, "1.9")) == 1
    held.drop(STUDY, SERIES)
    held.drop(STUDY, "1.9")
    assert list(held.path.iterdir()) == []


def test_what_lies_there_besides_is_no_series(held):
    held.put([pixels(1)])
    (held.path / "lost+found").mkdir()
    (held.path / "1.2.3").write_text("a file")
    (held.path / STUDY / SERIES / "notes.txt").write_text("by hand")
    assert [s.series_uid for s in held.series()] == [SERIES]
    assert list(found(held)) == [f"{SERIES}.1"]


def test_a_series_tells_when_something_was_added(held):
    before = datetime.now(UTC) - timedelta(seconds=1)
    held.put([pixels(1)])
    (series,) = held.series()
    assert before <= series.changed_at <= datetime.now(UTC) + timedelta(seconds=1)


@pytest.mark.parametrize("seed", range(30))
def test_a_power_cut_leaves_whole_files_and_all_that_were_put(tmp_path, seed):
    rng = random.Random(seed)
    disk = PowerCut(tmp_path / "disk")
    held = Held(tmp_path / "disk", disk)
    held.make()
    held.put([pixels(n) for n in range(1, 4)])
    sure = disk.now
    held.put([pixels(n, bytes([n]) * 4000) for n in range(3, 7)])
    end = disk.now
    for moment in (rng.randrange(sure), sure, rng.randrange(sure, end), end):
        target = tmp_path / f"cut{moment}"
        target.mkdir(exist_ok=True)
        disk.lay_out(moment, target, rng)
        left = found(Held(target))
        for uid, data in left.items():
            assert data in (bytes([data[0]]) * 3000, bytes([data[0]]) * 4000), uid
        numbers = {data[0] for data in left.values()}
        assert numbers >= (
            set(range(1, 7)) if moment == end else {1, 2, 3} if moment >= sure else set()
        )
    held.close()


def test_a_file_of_a_process_that_died_is_no_instance_and_in_nobodys_way(held):
    held.put([pixels(1)])
    (held.path / STUDY / SERIES / f".{SERIES}.2.dcm.part").write_bytes(b"half")
    assert list(found(held)) == [f"{SERIES}.1"]
    held.put([pixels(2)])
    assert found(held)[f"{SERIES}.2"] == bytes([2]) * 3000
    held.drop(STUDY, SERIES)
    assert list(held.path.iterdir()) == []


class Failing(Disk):
    """Fails at one kind of call, once so many of them went well."""

    def __init__(self, call: str, number: int, after: int = 0) -> None:
        self.call, self.number, self.after = call, number, after
        self.lock = threading.Lock()

    def _fail(self, call: str) -> None:
        with self.lock:
            self.after -= call == self.call
            if call == self.call and self.after < 0:
                raise OSError(self.number, os.strerror(self.number))

    def create(self, path: Path) -> int:
        self._fail("create")
        return super().create(path)

    def sync(self, fd: int) -> None:
        self._fail("sync")
        super().sync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._fail("rename")
        super().rename(source, target)


@pytest.mark.parametrize("call", ["create", "sync", "rename"])
@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, HeldUnavailable), (errno.EIO, OSError)]
)
def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path, call, number, error):
    held = Held(tmp_path, Failing(call, number, after=2))
    with pytest.raises(error):
        held.put([pixels(n) for n in range(1, 9)])
    assert not list(tmp_path.rglob("*.part"))
    assert all(data == bytes([data[0]]) * 3000 for data in found(held).values())
    held.close()
