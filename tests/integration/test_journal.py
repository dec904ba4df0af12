"""The journal behind the spool: segments, group commit, damage, kills. See also test_power_cut."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dicomnode.cli import main
from dicomnode.errors import CorruptObject, SpoolFull
from dicomnode.model import Reason, SpooledEvent, SpooledInstance
from dicomnode.spool import Spool, journal, segment
from dicomnode.spool.disk import Disk
from dicomnode.spool.journal import Place
from dicomnode.spool.names import Entry
from dicomnode.spool.segment import PAGE, RECORD_BYTES

A = "0123456789abcdef"
B = "fedcba9876543210"
SMALL = 8 * PAGE  # a header, six records of a page, and the end


@pytest.fixture
def small(tmp_path):
    """A spool of small segments."""
    spool = Spool(tmp_path / "spool", segment_bytes=SMALL)
    yield spool
    spool.close()


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def names_of(spool: Spool, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in (spool.path / "journal").glob(f"*/{pattern}"))


def place(entry: Entry) -> Place:
    assert isinstance(entry.place, Place)
    return entry.place


def file_of(spool: Spool, entry: Entry) -> Path:
    where = place(entry)
    return spool.path / "journal" / f"{where.slot:06d}" / f"{where.number:016d}.seg"


def page(n: int) -> bytes:
    """Return a payload that fills a page with its header, unlike any other."""
    return random.Random(n).randbytes(PAGE - RECORD_BYTES)


def everything(spool: Spool) -> list[bytes | str]:
    """Return what a worker would find: payloads, kinds of events, "corrupt"."""
    found: list[bytes | str] = []
    for entry in spool.pending(10_000):
        if isinstance(entry, SpooledEvent):
            found.append(entry.kind)
            continue
        try:
            found.append(bytes(spool.read(entry)))
        except CorruptObject:
            found.append("corrupt")
    return found


# Slots and segments


def test_segments_follow_each_other(small):
    put = [small.put(page(n), A) for n in range(30)]
    assert len({place(entry).number for entry in put}) == 5
    assert small.pending(100) == put
    assert [bytes(small.read(entry)) for entry in put] == [page(n) for n in range(30)]
    assert small.pending(9) == put[:9]


def test_entries_keep_their_names_over_restarts(small):
    put = [small.put(page(n), A) for n in range(10)] + [small.put_event(A, "released")]
    assert Spool(small.path).pending(100) == put
    small.close()
    assert Spool(small.path).pending(100) == put


def test_slots_are_merged_by_arrival(small):
    others = [Spool(small.path, segment_bytes=SMALL) for _ in range(5)]
    put = [others[n % 5].put(page(n), A) for n in range(40)]
    assert {place(entry).slot for entry in put} == set(range(5))
    assert small.pending(100) == put
    assert small.pending(7) == put[:7]
    small.remove(*put[::2])
    assert small.pending(100) == put[1::2]


def test_within_a_slot_order_is_that_of_writing_whatever_the_clock_does(small, monkeypatch):
    put = [small.put(b"", A)]
    small.close()
    monkeypatch.setattr(time, "time_ns", lambda: 1)  # the node starts anew in 1970
    again = Spool(small.path, segment_bytes=SMALL)
    put += [again.put(b"", A), again.put_event(A, "released")]
    assert again.pending(10) == put == sorted(put, key=lambda entry: entry.name)


def test_a_slot_that_is_new_is_noticed(small):
    assert small.pending(1) == []
    other = Spool(small.path)
    for n in range(20):
        put = other.put(page(n), A)
        assert small.pending(1) == [put]
        small.remove(put)
        assert not other.waits(put)


def test_a_process_takes_a_slot_that_is_free(small):
    other = Spool(small.path)
    assert [place(s.put(b"", A)).slot for s in (small, other)] == [0, 1]
    small.close()
    third = Spool(small.path)
    assert place(third.put(b"", A)).slot == 0
    assert len(small.pending(10)) == 3


def test_a_record_larger_than_a_segment_has_one_of_its_own(small):
    put = [
        small.put(page(0), A),
        small.put(bytes(10 * SMALL), A),
        small.put(page(1), A),
        small.put(bytes(SMALL), B),
        small.put_event(A, "released"),
    ]
    assert small.pending(10) == put
    assert bytes(small.read(put[1])) == bytes(10 * SMALL)
    assert file_of(small, put[1]).stat().st_size > 10 * SMALL
    small.remove(*put[:3])
    assert not file_of(small, put[1]).exists()
    assert small.pending(10) == put[3:]


@pytest.mark.parametrize("flip", [None, 0, 2_500_000])
def test_a_large_record_is_looked_at_whole_after_a_restart(small, flip):
    data = random.Random(0).randbytes(2_500_001)
    put = small.put(data, A)
    after = [small.put_event(A, "released"), small.put(page(0), A)]
    small.close()
    if flip is not None:
        overwrite(file_of(small, put), place(put).offset + flip, bytes([data[flip] ^ 1]))
    reader = Spool(small.path)
    if flip is None:
        assert reader.pending(10) == [put, *after]
        assert bytes(reader.read(put)) == data
    else:
        assert everything(reader) == ["corrupt", "released", page(0)]


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_preallocate_will_do(tmp_path, monkeypatch, error):
    def posix_fallocate(fd, offset, size):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    spool = Spool(tmp_path, segment_bytes=SMALL)
    put = [spool.put(page(n), A) for n in range(20)]
    assert Spool(tmp_path).pending(100) == put
    assert file_of(spool, put[0]).stat().st_size == SMALL


@pytest.mark.parametrize("length", [0, 1, PAGE - RECORD_BYTES, PAGE - RECORD_BYTES + 1])
def test_a_record_takes_whole_pages(small, length):
    put = [small.put(bytes(length), A), small.put(b"next", A)]
    offsets = [place(entry).offset - RECORD_BYTES for entry in put]
    assert offsets == [PAGE, PAGE + PAGE * (1 + (length > PAGE - RECORD_BYTES))]
    assert [bytes(small.read(entry)) for entry in put] == [bytes(length), b"next"]


def test_parts_reach_the_disk_as_they_are(tmp_path):
    class Watching(Disk):
        written: list = []  # noqa: RUF012 - of this test alone

        def write(self, fd, parts, offset):
            self.written += parts
            super().write(fd, parts, offset)

    disk = Watching()
    head, body = bytearray(b"head"), memoryview(bytearray(100_000))
    spool = Spool(tmp_path, disk=disk)
    entry = spool.put([head, body], A)
    assert bytes(spool.read(entry)) == b"head" + bytes(100_000)
    buffers = [part.obj for part in disk.written if isinstance(part, memoryview)]
    assert any(b is head for b in buffers) and any(b is body.obj for b in buffers)


def test_more_parts_than_one_call_takes(small):
    parts = [bytes([n % 256]) * (n % 3) for n in range(3000)]
    assert bytes(small.read(small.put(parts, A))) == b"".join(parts)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwritev = os.pwritev

    def short(fd, buffers, offset):
        first = memoryview(buffers[0])[:1000]
        return pwritev(fd, [first], offset)

    monkeypatch.setattr(os, "pwritev", short)
    spool = Spool(tmp_path)
    data = random.Random(0).randbytes(10_000)
    assert bytes(spool.read(spool.put([data[:17], data[17:]], A))) == data


# Used again


def test_segments_are_used_again(small):
    inodes = set()
    for n in range(200):
        entry = small.put(page(n), A)
        inodes.add(file_of(small, entry).stat().st_ino)
        assert small.pending(10) == [entry]
        small.remove(entry)
    assert len(inodes) <= 4


def test_records_of_an_earlier_life_are_never_seen(small):
    rng = random.Random(0)
    seen = 0
    for n in range(300):
        entry = small.put(page(n)[: rng.randrange(PAGE)], A)
        for reader in (small, Spool(small.path)) if n % 10 == 0 else (small,):
            assert reader.pending(10) == [entry]
        seen += 1
        small.remove(entry)
    assert seen == 300
    assert len(names_of(small, "*.free")) + len(names_of(small, "*.seg")) <= 3


def test_after_a_backlog_a_few_segments_are_kept(small):
    put = [small.put(page(n), A) for n in range(100)]
    small.pending(1000)
    small.remove(*put)
    assert small.pending(1) == []
    assert len(names_of(small, "*.free")) == journal.FREE_SEGMENTS
    assert len(names_of(small, "*.seg")) <= 2


def test_nothing_is_left_of_a_writer_that_is_gone(small):
    put = [small.put(page(n), A) for n in range(20)]
    small.close()
    reader = Spool(small.path)
    assert reader.pending(100) == put
    reader.remove(*put)
    assert reader.pending(100) == []
    assert names_of(small, "*[0-9]*") == []
    small.put(b"again", A)
    assert everything(reader) == [b"again"]


def test_a_segment_waits_for_the_last_of_its_records(small):
    put = [small.put(page(n), A) for n in range(14)]
    small.pending(100)
    kept = put.pop(3)
    data = small.read(kept)
    small.remove(*put)
    for n in range(100):  # what would overwrite it
        entry = small.put(page(100 + n), B)
        small.remove(*[e for e in small.pending(100) if e == entry])
    assert bytes(data) == page(3)
    assert small.pending(10) == [kept]


def test_a_view_outlives_the_spool(small):
    data = small.read(small.put(page(1), A))
    small.close()
    assert bytes(data) == page(1)


def test_what_one_process_removed_another_does_not_see(small):
    put = [small.put(page(n), A) for n in range(10)]
    other = Spool(small.path)
    assert other.pending(100) == put
    small.remove(put[0], put[4])
    assert [other.waits(entry) for entry in put[:2]] == [False, True]
    assert other.pending(100) == Spool(small.path).pending(100) == put[1:4] + put[5:]
    with pytest.raises(FileNotFoundError):
        other.read(put[0])


def test_a_setting_of_another_size_is_taken_up(small):
    put = [small.put(page(n), A) for n in range(30)]
    small.pending(100)
    small.remove(*put)
    small.close()
    larger = Spool(small.path, segment_bytes=4 * SMALL)
    put = [larger.put(page(n), A) for n in range(100)]
    assert larger.pending(200) == put
    assert file_of(larger, put[-1]).stat().st_size == 4 * SMALL


@pytest.mark.parametrize("count", [8, 14, 20, 26, 32, 38])
def test_a_segment_is_not_used_again_while_one_who_put_there_waits(tmp_path, count):
    """Worked off before its sync was over, it is given back with its writer still at it."""
    disk = Slow()
    spool = Spool(tmp_path, segment_bytes=SMALL, disk=disk)
    spool.put(page(0), A)
    disk.is_slow = True
    answered: list[Entry] = []
    late = threading.Thread(target=lambda: answered.append(spool.put(page(1), A)))
    late.start()
    eventually(lambda: len(disk.begun) == 1)
    disk.is_slow = False  # that one is held alone
    large = spool.put(page(2) * 5, A)  # it has no room there
    reader = Spool(tmp_path)
    reader.remove(*[e for e in reader.pending(10) if e != large])
    waiting = [large]
    for n in range(count):
        waiting.append(spool.put(page(n), A))
        reader.pending(100)
        if len(waiting) > 10:
            reader.remove(waiting.pop(0))
    disk.go.release()
    late.join(20)
    assert len(answered) == 1
    assert reader.pending(100) == Spool(tmp_path).pending(100) == waiting
    first = count - len(waiting)
    for n, entry in enumerate(waiting, first):
        assert bytes(reader.read(entry)) == (page(2) * 5 if entry == large else page(n))
    spool.close()


# The sync


class Slow(Disk):
    """Takes its time to sync, and counts."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.is_slow = False
        self.begun: list[float] = []

    def sync(self, fd: int) -> None:
        if self.is_slow:
            self.begun.append(time.monotonic())
            assert self.go.acquire(timeout=20)
        super().sync(fd)


def test_one_sync_serves_all_that_wait(tmp_path):
    disk = Slow()
    spool = Spool(tmp_path, disk=disk)
    spool.put(b"", A)
    disk.is_slow = True
    answered: list[Entry] = []

    def put() -> None:
        answered.append(spool.put(b"x", A))

    threads = [threading.Thread(target=put) for _ in range(8)]
    threads[0].start()
    eventually(lambda: len(disk.begun) == 1)
    for thread in threads[1:]:
        thread.start()
    eventually(lambda: len(Spool(tmp_path).pending(10)) == 9)  # written, not answered
    assert answered == []
    disk.go.release()  # it began before seven of them were written
    eventually(lambda: len(answered) == 1)
    eventually(lambda: len(disk.begun) == 2)
    assert len(answered) == 1
    disk.go.release()
    for thread in threads:
        thread.join(20)
    assert len(answered) == 8
    assert len(disk.begun) == 2
    disk.is_slow = False
    spool.close()


def test_each_answer_waits_for_a_sync_that_began_after_its_writing(tmp_path):
    class Watching(Disk):
        def __init__(self) -> None:
            self.written = self.synced = 0
            self.seen: dict[int, int] = {}

        def write(self, fd, parts, offset):
            super().write(fd, parts, offset)
            self.seen[fd] = max(self.seen.get(fd, 0), offset + sum(map(len, parts)))

        def sync(self, fd):
            upto = self.seen.get(fd, 0)
            super().sync(fd)
            time.sleep(0.001)  # so that others write meanwhile
            done[fd] = max(done.get(fd, 0), upto)
            self.synced += 1

    done: dict[int, int] = {}
    disk = Watching()
    spool = Spool(tmp_path, disk=disk)
    early: list[Entry] = []

    def put(n: int) -> None:
        for k in range(40):
            entry = spool.put(page(100 * n + k), A)
            if max(done.values()) < place(entry).offset + place(entry).length:
                early.append(entry)

    threads = [threading.Thread(target=put, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert early == []
    assert disk.synced < 8 * 40 / 2
    assert len(spool.pending(1000)) == 8 * 40
    spool.close()


class Breaking(Disk):
    """Fails when it is told to, then and there."""

    def __init__(self) -> None:
        self.error: int | None = None
        self.call = ""

    def _fail(self, call: str) -> None:
        if self.error is not None and call == self.call:
            error, self.error = self.error, None
            raise OSError(error, os.strerror(error))

    def write(self, fd, parts, offset):
        if self.error is not None and self.call == "write":
            super().write(fd, [b"half of it"], offset + 100)
        self._fail("write")
        super().write(fd, parts, offset)

    def sync(self, fd):
        self._fail("sync")
        super().sync(fd)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "sync"])
def test_a_segment_that_failed_is_never_written_again(tmp_path, call, error):
    disk = Breaking()
    spool = Spool(tmp_path, segment_bytes=SMALL, disk=disk)
    put = [spool.put(page(0), A), spool.put(page(1), A)]
    disk.error, disk.call = error, call
    with pytest.raises(SpoolFull, match=os.strerror(error)):
        spool.put(page(2), A)
    before = file_of(spool, put[0]).read_bytes()
    put += [spool.put(page(n), A) for n in range(3, 20)]
    assert file_of(spool, put[0]).read_bytes() == before
    assert [entry for entry in spool.pending(100) if entry in put] == put
    assert len(spool.pending(100)) <= len(put) + 1  # nobody was told that the third is safe
    assert [bytes(spool.read(entry)) for entry in put[2:]] == [page(n) for n in range(3, 20)]


def test_all_that_wait_for_a_sync_that_fails_are_refused(tmp_path):
    class Failing(Slow):
        def sync(self, fd):
            super().sync(fd)
            if self.is_slow:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk = Failing()
    spool = Spool(tmp_path, disk=disk)
    kept = spool.put(b"kept", A)
    disk.is_slow = True
    refused: list[str] = []

    def put() -> None:
        with pytest.raises(SpoolFull) as caught:
            spool.put(b"x", A)
        refused.append(str(caught.value))

    threads = [threading.Thread(target=put) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(Spool(tmp_path).pending(10)) == 5)
    disk.go.release()
    for thread in threads:
        thread.join(20)
    assert len(refused) == 4 and len(disk.begun) == 1
    disk.is_slow = False
    new = spool.put(b"new", A)
    assert place(new).number != place(kept).number
    assert [spool.pending(10)[0], spool.pending(10)[-1]] == [kept, new]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EROFS])
def test_no_new_segment_is_a_refusal(tmp_path, error):
    class NoMore(Disk):
        has_room = True

        def create(self, path):
            if not self.has_room:
                raise OSError(error, os.strerror(error))
            return super().create(path)

    disk = NoMore()
    spool = Spool(tmp_path, segment_bytes=SMALL, disk=disk)
    put = [spool.put(page(0), A)]
    disk.has_room = False
    put += [spool.put(page(n), A) for n in range(1, 6)]  # what is preallocated is there
    with pytest.raises(SpoolFull, match=os.strerror(error)):
        spool.put(page(6), A)
    disk.has_room = True
    put.append(spool.put(page(8), A))
    assert spool.pending(100) == put


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_an_event_is_an_empty_file(tmp_path, error):
    class Full(Disk):
        def allocate(self, fd, size):
            raise OSError(error, os.strerror(error))

    spool = Spool(tmp_path, disk=Full())
    with pytest.raises(SpoolFull, match=os.strerror(error)):
        spool.put(b"x", A)
    put = spool.put_event(A, "aborted")
    assert spool.pending(10) == [put]
    assert [path.name for path in (tmp_path / "incoming").iterdir()] == [put.name]
    assert names_of(spool, "*[0-9]*") == []


def test_a_segment_that_cannot_be_used_again_is_given_up(tmp_path):
    class Bad(Disk):
        bad: int | None = None

        def write(self, fd, parts, offset):
            if offset == 0 and os.fstat(fd).st_ino == self.bad:
                self.bad = None  # another file may have its number next
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().write(fd, parts, offset)

    disk = Bad()
    spool = Spool(tmp_path, segment_bytes=SMALL, disk=disk)
    put = [spool.put(page(n), A) for n in range(8)]
    disk.bad = file_of(spool, put[0]).stat().st_ino
    spool.pending(100)
    spool.remove(*put)
    put = [spool.put(page(n), A) for n in range(30)]
    assert spool.pending(100) == put


# What a dead writer leaves, and damage


@pytest.fixture
def written(small):
    """A spool whose writer is gone: four records, all known to be on the disk."""
    put = [small.put(page(0), A), small.put(page(1) * 2, A), small.put(page(2), B)]
    put.append(small.put_event(A, "released"))
    small.close()
    return small, put


def copy(spool: Spool, target: Path) -> Path:
    shutil.copytree(spool.path, target, ignore=shutil.ignore_patterns(".bell"))
    return target


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with open(file, "r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def last_record(tmp_path: Path) -> tuple[Spool, Entry]:
    """A spool whose writer was killed, and the last entry in it."""
    spool = Spool(tmp_path / "torn", segment_bytes=SMALL)
    spool.put(page(0), A)
    last = spool.put(page(1)[:700], A)
    assert spool._journal is not None
    spool._journal[1].abandon()  # as a kill would
    spool._journal = None
    return spool, last


@pytest.mark.parametrize("how", ["zeros", "noise", "cut"])
def test_a_torn_tail_at_any_offset_is_the_end(tmp_path, how, caplog):
    spool, last = last_record(tmp_path)
    file, end = file_of(spool, last), place(last).offset + 700
    whole = file.read_bytes()
    start = place(last).offset - RECORD_BYTES
    for offset in range(start, end, 1 if how == "zeros" else 7):
        if how == "cut":
            file.write_bytes(whole[:offset])
        else:
            rest = end - offset
            noise = bytes(rest) if how == "zeros" else random.Random(offset).randbytes(rest)
            file.write_bytes(whole[:offset] + noise + whole[end:])
        reader = Spool(spool.path)
        assert everything(reader) == [page(0)], offset
        reader.close()
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("which", range(4))
def test_a_bit_that_flipped_anywhere_costs_one_record_at_most(written, tmp_path, which, caplog):
    spool, put = written
    whole = [page(0), page(1) * 2, page(2), "released"]
    entry = put[which]
    start = place(entry).offset - RECORD_BYTES
    size = segment.span(place(entry).length)
    rng = random.Random(which)
    used = RECORD_BYTES + place(entry).length
    offsets = [*range(60), *(rng.randrange(60, used) for _ in range(20 if used > 64 else 0))]
    for offset in offsets:
        target = copy(spool, tmp_path / f"{offset}")
        file = target / file_of(spool, entry).relative_to(spool.path)
        byte = file.read_bytes()[start + offset]
        overwrite(file, start + offset, bytes([byte ^ 1 << rng.randrange(8)]))
        caplog.clear()
        reader = Spool(target)
        found = everything(reader)
        is_reserved = 56 <= offset < 60
        wanted = [*whole[:which], "corrupt", *whole[which + 1 :]]
        assert found == (whole if is_reserved else wanted), offset
        assert is_reserved or "record damaged" in caplog.text
        for one in reader.pending(10):
            if isinstance(one, SpooledInstance):
                aside = reader.quarantine(one, Reason.CORRUPT)
                assert one.name != entry.name or aside.stat().st_size <= size
            else:
                reader.remove(one)
        assert reader.pending(10) == []
        reader.close()


def test_what_is_damaged_is_set_aside_with_all_its_bytes(written):
    spool, put = written
    file, offset = file_of(spool, put[1]), place(put[1]).offset
    overwrite(file, offset - RECORD_BYTES, bytes(RECORD_BYTES))  # its header is gone
    overwrite(file, place(put[2]).offset + 10, b"flipped")
    reader = Spool(spool.path)
    assert everything(reader) == [page(0), "corrupt", "corrupt", "released"]
    entries = [e for e in reader.pending(10) if isinstance(e, SpooledInstance)]
    first, second = (reader.quarantine(e, Reason.CORRUPT).read_bytes() for e in entries[1:])
    assert first.startswith(page(1) * 2)
    assert second == page(2)[:10] + b"flipped" + page(2)[17:]
    assert everything(reader) == [page(0), "released"]


@pytest.mark.parametrize("copies", [(0,), (2048,), (0, 2048)])
def test_a_segment_whose_header_is_damaged_is_read_all_the_same(written, copies, caplog):
    spool, put = written
    for start in copies:
        overwrite(file_of(spool, put[0]), start + 20, b"flipped")
    reader = Spool(spool.path)
    assert everything(reader) == [page(0), page(1) * 2, page(2), "released"]
    assert reader.pending(10) == put
    assert ("segment damaged" in caplog.text) == (len(copies) == 2)


@pytest.mark.parametrize("size", [0, 100, SMALL])
def test_a_segment_of_noise_is_kept_and_stops_nothing(small, size, caplog):
    put = [small.put(page(n), A) for n in range(3)]
    noise = small.path / "journal" / "000000" / f"{1:016d}.seg"
    noise.write_bytes(random.Random(0).randbytes(size))
    reader = Spool(small.path)
    assert reader.pending(10) == put
    assert "segment damaged" in caplog.text
    assert noise.with_suffix(".damaged").stat().st_size == size


def test_damage_that_is_noticed_when_it_is_read(small, caplog):
    """As when a page rots between the writing and the reading of a living process."""
    entry, after = small.put(page(0), A), small.put(page(1), A)
    assert small.pending(10) == [entry, after]
    overwrite(file_of(small, entry), place(entry).offset + 99, b"!")
    with pytest.raises(CorruptObject, match="the journal is damaged"):
        small.read(entry)
    small.quarantine(entry, Reason.CORRUPT)
    assert everything(small) == [page(1)]


@pytest.mark.parametrize("content", [b"", b"\0" * PAGE, b"\xff" * PAGE, os.urandom(PAGE)])
def test_notes_that_a_power_cut_spoilt_hide_nothing(written, content):
    spool, put = written
    spool.remove(put[0])
    file_of(spool, put[0]).with_suffix(".done").write_bytes(content)
    assert Spool(spool.path).pending(10) == put


def test_notes_that_are_gone_hide_nothing(written):
    spool, put = written
    spool.remove(put[0])
    file_of(spool, put[0]).with_suffix(".done").unlink()
    reader = Spool(spool.path)
    assert reader.pending(10) == put
    reader.remove(*put[:3])
    assert Spool(spool.path).pending(10) == put[3:]


def test_what_cannot_be_set_aside_lets_others_pass(tmp_path, monkeypatch):
    class Full(Disk):
        def create(self, path):
            if path.parent.name == "quarantine":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().create(path)

    spool = Spool(tmp_path, disk=Full())
    put = [spool.put(page(n), A) for n in range(3)]
    with pytest.raises(SpoolFull, match="No space left"):
        spool.quarantine(put[0], Reason.CORRUPT)
    assert spool.waits(put[0])
    assert spool.pending(2) == put[1:]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    assert spool.pending(10) == put
    assert list((tmp_path / "quarantine").iterdir()) == []


# Kills, and processes at the same time

WRITER = """
import random, sys
from pathlib import Path
from dicomnode.spool import Spool
path, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng, spool = random.Random(seed), Spool(path, segment_bytes=1 << 18)
association = f"{seed:016x}"
for n in range(count):
    data = f"{seed} {n} ".encode() + rng.randbytes(rng.choice((0, 10, 5_000, 60_000, 300_000)))
    entry = spool.put([data[:50], data[50:]], association)
    print(entry.name, flush=True)
print(spool.put_event(association, "released").name, flush=True)
"""


def start(spool: Spool, seed: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(spool.path), str(seed), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def payloads(seed: int, count: int) -> list[bytes]:
    rng = random.Random(seed)
    sizes = (0, 10, 5_000, 60_000, 300_000)
    return [f"{seed} {n} ".encode() + rng.randbytes(rng.choice(sizes)) for n in range(count)]


@pytest.mark.parametrize("seed", range(4 * int(os.environ.get("DICOMNODE_TEST_SOAK", "1"))))
def test_what_a_killed_writer_put_is_there(tmp_path, seed, caplog):
    rng = random.Random(seed)
    spool = Spool(tmp_path)
    process = start(spool, seed, 10_000)
    assert process.stdout is not None
    put = [process.stdout.readline().strip() for _ in range(rng.randrange(1, 60))]
    time.sleep(rng.random() * 0.005)
    process.kill()
    rest = process.stdout.read().splitlines(keepends=True)
    put += [line.strip() for line in rest if line.endswith("\n")]
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    wanted = payloads(seed, len(put) + 1)
    found = spool.pending(100_000)
    assert [entry.name for entry in found[: len(put)]] == put
    assert len(found) <= len(put) + 1  # the one that was cut off before its answer
    for entry, data in zip(found, wanted, strict=False):
        assert isinstance(entry, SpooledInstance)
        assert bytes(spool.read(entry)) == data
    assert caplog.text == ""


def test_a_reader_follows_several_processes(tmp_path, caplog):
    spool, count = Spool(tmp_path), 60
    processes = [start(spool, seed, count) for seed in (1, 2, 3)]
    rng = random.Random(0)
    found: dict[str, list[bytes]] = {}
    ended: set[str] = set()
    with spool.lease():
        deadline = time.monotonic() + 60
        while len(ended) < 3:
            assert time.monotonic() < deadline
            entries = spool.pending(rng.choice((1, 3, 40)))
            for entry in entries:
                assert entry.association_id not in ended
                if isinstance(entry, SpooledEvent):
                    ended.add(entry.association_id)
                else:
                    found.setdefault(entry.association_id, []).append(bytes(spool.read(entry)))
            rng.shuffle(entries)
            for entry in entries:
                spool.remove(entry)
            if not entries:
                spool.wait(0.1)
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(20) in (0, 120, 1)
    assert found == {f"{seed:016x}": payloads(seed, count) for seed in (1, 2, 3)}
    assert spool.pending(10) == []
    assert caplog.text == ""


FORKED = """
import os, sys
from pathlib import Path
from dicomnode.spool import Spool
spool = Spool(Path(sys.argv[1]))
spool.put(b"before", "0" * 16)
child = os.fork()
spool.put(b"child" if child == 0 else b"parent", "0" * 16)
status = os.waitpid(child, 0)[1] if child else 0
spool.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_writes_to_a_slot_of_its_own(tmp_path):
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], check=True, timeout=30)
    spool = Spool(tmp_path)
    assert sorted(everything(spool), key=str) == [b"before", b"child", b"parent"]
    assert {place(entry).slot for entry in spool.pending(10)} == {0, 1}


# What an operator sees


def shown(spool: Spool, *options: str) -> str:
    config = spool.path / "node.toml"
    config.write_text(f'[spool]\npath = "{spool.path}"\n')
    result = CliRunner().invoke(main, ["spool", "--config", str(config), *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_shows_what_waits_and_changes_nothing(small):
    put = [small.put(page(n), A) for n in range(10)]
    small.remove(put[0], *put[7:9])
    files = Spool(small.path, durability="file")
    files.put(b"12345", B)
    files.quarantine(files.put(b"123", B), Reason.CORRUPT)
    before = sorted(small.path.rglob("*"))
    slot, incoming, quarantine = json.loads(shown(small, "--json"))
    assert slot["name"] == "journal/000000" and slot["has_writer"]
    assert (slot["waiting"], slot["waiting_bytes"]) == (7, 7 * len(page(0)))
    assert slot["oldest"] == put[1].arrived_at.isoformat()
    assert slot["segments"] in (2, 3) and slot["damaged"] == 0
    assert (incoming["waiting"], incoming["waiting_bytes"]) == (1, 5)
    assert (quarantine["waiting"], quarantine["waiting_bytes"]) == (1, 3)
    (small.path / "node.toml").unlink()
    assert sorted(small.path.rglob("*")) == before
    small.close()
    table = shown(small).splitlines()
    assert table[1].split()[:2] == ["journal/000000", "no"]
    assert len(table) == 4


def test_the_command_asks_for_a_spool_that_is_there(tmp_path):
    spool = Spool(tmp_path)
    config = tmp_path / "node.toml"
    config.write_text(f'[spool]\npath = "{spool.path / "none"}"\n')
    result = CliRunner().invoke(main, ["spool", "--config", str(config)])
    assert result.exit_code == 2 and "no such folder" in result.output


# The bell


def test_the_worker_wakes_when_something_is_put(tmp_path):
    spool, other = Spool(tmp_path), Spool(tmp_path)
    with spool.lease():
        timer = threading.Timer(0.05, lambda: other.put(b"x", A))
        begun = time.monotonic()
        timer.start()
        spool.wait(20)
        assert time.monotonic() - begun < 15
        eventually(lambda: len(spool.pending(1)) == 1)
        timer.join()
        spool.wait(0)


def test_a_ring_before_the_wait_is_not_missed_and_counts_once(tmp_path):
    spool, other = Spool(tmp_path), Spool(tmp_path, durability="file")
    with spool.lease():
        for _ in range(3):
            other.put(b"x", A)
        begun = time.monotonic()
        spool.wait(20)
        assert time.monotonic() - begun < 15
        begun = time.monotonic()
        spool.wait(0.1)
        assert time.monotonic() - begun >= 0.09


def test_a_bell_that_nobody_hears_or_that_is_full_stops_nobody(tmp_path):
    spool, other = Spool(tmp_path, segment_bytes=SMALL), Spool(tmp_path, segment_bytes=SMALL)
    other.put(b"x", A)
    with spool.lease():
        other.put(b"x", A)
        fd = os.open(tmp_path / ".bell", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(fd, bytes(4096))
        os.close(fd)
        other.put(b"x", A)
        begun = time.monotonic()
        spool.wait(20)
        assert time.monotonic() - begun < 15
    other.put(b"x", A)  # who heard is gone
    with spool.lease():
        other.put(b"x", A)
        assert len(spool.pending(10)) == 5


def test_without_pipes_the_worker_looks_in_small_steps(tmp_path, monkeypatch):
    def mkfifo(path, mode):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "mkfifo", mkfifo)
    spool = Spool(tmp_path)
    with spool.lease():
        begun = time.monotonic()
        spool.wait(20)
        assert time.monotonic() - begun < 15
        put = spool.put(b"", A)
        assert spool.pending(1) == [put]


def test_the_benchmark_gives_ratios_of_both_ways(tmp_path):
    command = [sys.executable, "-m", "benchmarks.spool", "--quick", "--json", "--folder", tmp_path]
    result = subprocess.run(command, capture_output=True, check=True, text=True, timeout=120)
    figures = json.loads(result.stdout)
    assert [(row["way"], row["senders"]) for row in figures["rows"]] == [
        (way, senders) for senders in (1, 4, 8) for way in ("journal", "file")
    ]
    assert {row["syncs"] for row in figures["rows"] if row["way"] == "file"} == {2.0}
    assert figures["ratios"]["syncs_8"] < figures["ratios"]["syncs_1"] <= 0.6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [2, 0])
def test_a_page_that_the_disk_does_not_give_costs_what_lies_in_it(small, monkeypatch, bad):
    put = [small.put(page(n), A) for n in range(6)]
    small.put_event(A, "released")
    small.close()
    lost = place(put[bad]).offset - RECORD_BYTES  # the page with its header
    where = file_of(small, put[bad]).stat().st_ino
    pread = os.pread

    def failing(fd: int, size: int, offset: int) -> bytes:
        if offset <= lost < offset + size and os.fstat(fd).st_ino == where:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    other = Spool(small.path, segment_bytes=small.segment_bytes)
    found = everything(other)
    sound = [page(n) for n in range(6) if n != bad]
    assert [one for one in found if one != "corrupt"] == [*sound, "released"]
    assert found.count("corrupt") == 1
    other.close()
