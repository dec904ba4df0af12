"""The writing side of the journal: appends to preallocated segments, one sync for all who wait.

Each process writes to a slot of its own, a folder below `journal/`; the worker reads them all.
"""

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dicomnode.spool import names, segment
from dicomnode.spool.disk import Bytes, Disk, close
from dicomnode.spool.names import Entry
from dicomnode.spool.segment import PAGE, RECORD_BYTES, Header, Record

logger = logging.getLogger(__name__)

SEGMENT, FREE, NEW, DONE, DAMAGED = ".seg", ".free", ".new", ".done", ".damaged"
FREE_SEGMENTS = 4  # kept for use again in each slot; more go when a backlog was worked off
# Events may go into the reserve, in a segment no larger than this.
EVENT_SEGMENT_BYTES = 16 * PAGE
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOTHING = bytes(PAGE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry lies in the journal."""

    slot: int
    number: int
    nonce: bytes
    index: int
    offset: int  # of the payload
    length: int
    crc: int | None  # of the payload; None where the record is known to be damaged


@dataclass(slots=True, eq=False)
class _Segment:
    """A segment that is written to; all but `fd`, `path` and `header` change under a lock."""

    path: Path
    fd: int
    header: Header
    offset: int = PAGE  # where the next record goes
    index: int = 0
    appended: int = PAGE  # all before it is written
    synced: int = PAGE  # all before it is on stable storage
    syncing: bool = False
    failed: OSError | None = None
    users: int = 0  # that wait for a sync
    retired: bool = False
    followed: bool = False  # somebody saw to the segment after it


@dataclass(slots=True)
class _Ahead:
    """A segment that is made ready by a thread of its own."""

    thread: threading.Thread
    made: list[_Segment] = field(default_factory=list)


class Journal:
    """One process's right to append, until it is closed or the process dies."""

    def __init__(self, root: Path, disk: Disk, segment_bytes: int, reserve_bytes: int) -> None:
        self._disk, self._reserve_bytes = disk, reserve_bytes
        self._segment_bytes = max(segment_bytes // PAGE, 2) * PAGE
        self._append = threading.Lock()
        self._state = threading.Condition()
        self._current: _Segment | None = None
        self._ahead: _Ahead | None = None
        self._open: set[_Segment] = set()
        self.slot, self.path, self._lock_fd = _take_slot(root, disk)
        try:
            numbers = [number_of(path) for path in self.path.iterdir() if path.suffix != DONE]
            self._tidy()
            # No number comes twice, even where all that had one are gone.
            self._number = max([*numbers, time.time_ns() // 1_000_000])
            self._time_ns = _last_time(self.path)
        except BaseException:
            close(self._lock_fd)
            raise

    def put(self, parts: Sequence[Bytes], association_id: str, kind: str) -> Entry:
        """Return the entry once it is on stable storage.

        Raises
        ------
        OSError
            If the disk did not take it, or not for certain: it may come up all the same.
        """
        views: list[Bytes] = [memoryview(part).cast("B") for part in parts]
        length, crc = sum(map(len, views)), segment.checksum(views)
        size = segment.span(length)
        padding = _NOTHING[: size - RECORD_BYTES - length]
        with self._append:
            if self._lock_fd < 0:
                raise OSError(errno.EBADF, "the spool was closed")
            seg = self._room(size, kind != "dcm")
            self._time_ns = max(self._time_ns + 1, time.time_ns())  # whatever the clock does
            name = names.make(self._time_ns, self.slot, association_id, kind)
            record = Record(
                kind, association_id, self._time_ns, length, seg.synced, seg.index, crc, seg.offset
            )
            try:
                # Whole pages, so that none is read first; and the header last: a reader, and
                # whoever comes after a kill, sees a record that is complete, or none.
                blank = _NOTHING[:RECORD_BYTES]
                self._disk.write(seg.fd, [blank, *views, padding], record.offset)
                self._disk.write(seg.fd, [record.pack(seg.header.nonce)], record.offset)
            except BaseException as exc:
                self._poison(seg, exc)
                raise
            seg.offset, seg.index = record.end, seg.index + 1
            with self._state:
                seg.appended = record.end
                seg.users += 1
            if seg.offset > seg.header.size // 2 and not seg.followed:
                seg.followed = True
                self._prepare_ahead()
        try:
            self._flush(seg, record.end)
        finally:
            with self._state:
                seg.users -= 1
                self._let_go(seg)
        number, nonce = seg.header.number, seg.header.nonce
        place = Place(
            self.slot, number, nonce, record.index, record.offset + RECORD_BYTES, length, crc
        )
        return names.entry(name, place)

    def close(self) -> None:
        """Give up the slot; what was put stays."""
        with self._append:
            self._drop_ahead()
            with self._state:
                self._state.wait_for(lambda: not any(seg.users for seg in self._open))
            if self._current is not None:
                self._end(self._current)
            close(self._lock_fd)
            self._lock_fd = -1

    def abandon(self) -> None:
        """Close what was inherited from another process, and leave the slot to it."""
        for fd in [self._lock_fd, *(seg.fd for seg in self._open)]:
            close(fd)

    def _tidy(self) -> None:
        """Remove what the writer before left half made."""
        for path in self.path.iterdir():
            is_made = path.with_suffix(SEGMENT).exists()
            if path.suffix == NEW or (path.suffix == DONE and not is_made):
                self._disk.unlink(path)

    # The sync

    def _flush(self, seg: _Segment, end: int) -> None:
        """Return once a sync that began after all before `end` was written has succeeded.

        The first who waits makes it, for all who wait by then; who comes while it runs waits for
        the next one. Nothing is held meanwhile: others append.
        """
        with self._state:
            while True:
                if seg.synced >= end:
                    return
                if seg.failed is not None:
                    raise OSError(seg.failed.errno, seg.failed.strerror) from seg.failed
                if not seg.syncing:
                    break
                self._state.wait()
            seg.syncing = True
            upto = seg.appended
        try:
            self._disk.sync(seg.fd)
        except BaseException as exc:
            # What the kernel holds of it now is anybody's guess: no second sync can tell.
            self._poison(seg, exc)
            raise
        else:
            seg.synced = upto
        finally:
            with self._state:
                seg.syncing = False
                self._state.notify_all()

    def _poison(self, seg: _Segment, exc: BaseException) -> None:
        with self._state:
            seg.failed = exc if isinstance(exc, OSError) else OSError(errno.EIO, "cut off")
            self._state.notify_all()

    # Segments

    def _room(self, size: int, is_event: bool) -> _Segment:
        seg = self._current
        if seg is not None and seg.failed is None and os.fstat(seg.fd).st_nlink == 0:
            self._poison(seg, FileNotFoundError(errno.ENOENT, "the segment was removed"))
        if seg is not None and seg.failed is None and seg.offset + size <= seg.header.size:
            return seg
        ahead = self._take_ahead()
        if ahead is not None and size > ahead.header.size - PAGE:
            # Records are read in the order of their segments' numbers, so it cannot wait.
            self._discard(ahead)
            ahead = None
        if ahead is None:
            try:
                ahead = self._prepare(self._next_number(), size + PAGE, is_event)
            except OSError:
                if seg is None or not self._is_done(seg):
                    raise
                self._retire()  # its room is enough, perhaps
                self._disk.unlink(seg.path)
                self._disk.unlink(seg.path.with_suffix(DONE))
                ahead = self._prepare(self._next_number(), size + PAGE, is_event)
        self._retire()
        self._current = ahead
        return ahead

    def _is_done(self, seg: _Segment) -> bool:
        """Whether all that was written to a segment was dealt with."""
        nonce = seg.header.nonce
        wanted = b"".join(segment.token(nonce, index) for index in range(seg.index))
        try:
            return seg.path.with_suffix(DONE).read_bytes()[: len(wanted)] == wanted
        except OSError:
            return False

    def _end(self, seg: _Segment) -> None:
        """Say that nothing follows in a segment; the worker finds out anyway, only later."""
        if seg.failed is None and seg.offset + PAGE <= seg.header.size:
            end = Record(
                segment.END, "0" * 16, self._time_ns, 0, seg.synced, seg.index, 0, seg.offset
            )
            with contextlib.suppress(OSError):
                self._disk.write(seg.fd, [end.pack(seg.header.nonce)], seg.offset)
        self._retire()

    def _retire(self) -> None:
        seg, self._current = self._current, None
        if seg is not None:
            with self._state:
                seg.retired = True
                self._let_go(seg)

    def _let_go(self, seg: _Segment) -> None:
        if seg.retired and not seg.users and seg in self._open:
            self._open.discard(seg)
            close(seg.fd)
        self._state.notify_all()

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _prepare_ahead(self) -> None:
        # A thread for each segment, and none that waits: at 64 MiB one in a hundred slices.
        number = self._next_number()

        def prepare() -> None:
            with contextlib.suppress(OSError):  # who needs it tries again, and is told
                ahead.made.append(self._prepare(number, 2 * PAGE, False))

        ahead = _Ahead(threading.Thread(target=prepare, name="segment", daemon=True))
        with contextlib.suppress(RuntimeError):  # no more threads: then it is made when needed
            ahead.thread.start()
            self._ahead = ahead

    def _take_ahead(self) -> _Segment | None:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        ahead.thread.join()
        return ahead.made[0] if ahead.made else None

    def _drop_ahead(self) -> None:
        ahead = self._take_ahead()
        if ahead is not None:
            self._discard(ahead)

    def _discard(self, seg: _Segment) -> None:
        with contextlib.suppress(OSError):
            self._disk.unlink(seg.path)
            self._disk.unlink(seg.path.with_suffix(DONE))
        with self._state:
            self._open.discard(seg)
        close(seg.fd)

    def _prepare(self, number: int, least: int, is_event: bool) -> _Segment:
        """Return an empty segment, its header and its name on stable storage."""
        if least <= self._segment_bytes:
            for free in sorted(self.path.glob(f"*{FREE}")):
                seg = self._recycle(free, number)
                if seg is not None:
                    return seg
        size = max(self._segment_bytes, least)
        # On a small disk a smaller one, so that others find room, and it is soon given back.
        room = self._disk.free_bytes(self.path) - self._reserve_bytes
        while size > max(room // 4, least):
            size = max(size // 2 // PAGE * PAGE, least)
        while True:
            spared = is_event and size <= max(EVENT_SEGMENT_BYTES, least)
            try:
                if not spared and self._disk.free_bytes(self.path) - size < self._reserve_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self._make(number, size)
            except OSError as exc:
                if exc.errno not in FULL or size == least:
                    raise
            size = max(size // 2 // PAGE * PAGE, least)

    def _make(self, number: int, size: int) -> _Segment:
        path = self.path / f"{number:016d}{NEW}"
        fd = self._disk.create(path)
        try:
            self._make_done(path, number, size)  # a full disk is to take notes to the end
            self._disk.allocate(fd, size)
            return self._begin(fd, path, number, size)
        except BaseException:
            close(fd)
            with contextlib.suppress(OSError):
                self._disk.unlink(path)
                self._disk.unlink(path.with_suffix(DONE))
            raise

    def _make_done(self, path: Path, number: int, size: int) -> None:
        fd = self._disk.create(path.with_name(f"{number:016d}{DONE}"))
        try:
            self._disk.allocate(fd, segment.tokens_size(size))
        finally:
            close(fd)

    def _recycle(self, path: Path, number: int) -> _Segment | None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # the worker needed the room
            return None
        try:
            if os.fstat(fd).st_size == self._segment_bytes:
                with contextlib.suppress(OSError):
                    self._make_done(path, number, self._segment_bytes)
                return self._begin(fd, path, number, self._segment_bytes)
        except OSError:
            pass  # the worker was quicker, or the disk does not take it any more
        except BaseException:
            close(fd)
            raise
        close(fd)
        with contextlib.suppress(OSError):
            self._disk.unlink(path)
        return None

    def _begin(self, fd: int, path: Path, number: int, size: int) -> _Segment:
        recyclable = size == self._segment_bytes
        header = Header(number, secrets.token_bytes(8), size, time.time_ns(), recyclable)
        self._disk.write(fd, [header.pack()], 0)
        self._disk.sync(fd)  # and only then the name, so that one with a name has its header
        final = path.with_name(f"{number:016d}{SEGMENT}")
        self._disk.rename(path, final)
        self._disk.sync_directory(self.path)
        seg = _Segment(final, fd, header)
        with self._state:
            self._open.add(seg)
        return seg


def number_of(path: Path) -> int:
    """Return the number in a segment's name, 0 where there is none."""
    return int(path.stem) if path.stem.isdigit() else 0


def slots(root: Path) -> Iterator[tuple[int, Path]]:
    """Yield each slot's number and folder."""
    for path in sorted(root.iterdir()):
        if path.name.isdigit() and len(path.name) == 6:
            yield int(path.name), path


def lock_slot(path: Path) -> int | None:
    """Return a descriptor that holds the slot, None while another does."""
    fd = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        close(fd)
        return None
    except BaseException:
        close(fd)
        raise
    return fd


def _take_slot(root: Path, disk: Disk) -> tuple[int, Path, int]:
    if not root.is_dir():  # it was there: made anew, it would hide that somebody moved it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for slot in itertools.count():
        path = root / f"{slot:06d}"
        disk.make_directory(path)
        fd = lock_slot(path)
        if fd is not None:
            return slot, path, fd
    raise AssertionError


def _last_time(path: Path) -> int:
    """Return the time of the last record in a slot, so that none before it is ever given."""
    for file in sorted(path.glob(f"*{SEGMENT}"), reverse=True):
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            header = segment.read_header(fd)
            if header is None:
                continue
            last = header.created_ns
            record = segment.read_record(fd, PAGE, header)
            while record is not None:
                last = record.time_ns
                record = segment.read_record(fd, record.end, header)
            return last
        finally:
            close(fd)
    return 0
