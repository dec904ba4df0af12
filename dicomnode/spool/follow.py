"""The reading side of the journal: follows every slot, and gives back what was dealt with."""

import contextlib
import heapq
import itertools
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from crc32c import crc32c

from dicomnode.errors import CorruptObject
from dicomnode.spool import names, segment
from dicomnode.spool.disk import Disk, close
from dicomnode.spool.journal import (
    DAMAGED,
    DONE,
    FREE,
    FREE_SEGMENTS,
    NEW,
    SEGMENT,
    Place,
    lock_slot,
    number_of,
    slots,
)
from dicomnode.spool.names import Entry
from dicomnode.spool.segment import PAGE, RECORD_BYTES, TOKEN_BYTES, Header, Record

logger = logging.getLogger(__name__)

# A folder that changed so shortly ago may change again without its time of change telling.
_SETTLED_NS = 100_000_000
_LOOK_S = 1.0  # between tries whether a slot's writer is gone
_CHUNK = 1 << 20


class _Folder:
    """A folder whose names are read again only when they changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = 0

    def changed(self) -> bool:
        """Whether names may have changed since the last call."""
        now = os.stat(self.path).st_mtime_ns
        if now == self._seen:
            return False
        self._seen = now if time.time_ns() - now > _SETTLED_NS else 0
        return True


@dataclass(slots=True, eq=False)
class _Segment:
    """What is known of a segment, and what in it waits."""

    path: Path
    slot: int
    fd: int
    header: Header
    is_old: bool  # it was there before this process looked: a power cut may have torn it
    offset: int = PAGE  # all before it was looked at
    index: int = 0
    time_ns: int = 0
    entries: dict[int, Entry] = field(default_factory=dict)  # index -> what waits
    unwritten: set[int] = field(default_factory=set)  # dealt with; the disk took no note of it
    is_ended: bool = False  # nothing will be appended
    is_read: bool = False  # and all that is in it was looked at
    done_fd: int = -1
    view: memoryview | None = None

    def is_done(self, index: int) -> bool:
        """Whether a record was dealt with, in this process or another."""
        if index in self.unwritten:
            return True
        if self.done_fd < 0 and not self._open_done():
            return False
        mark = os.pread(self.done_fd, TOKEN_BYTES, index * TOKEN_BYTES)
        return mark == segment.token(self.header.nonce, index)

    def note_done(self, index: int, disk: Disk) -> None:
        """Write down that a record was dealt with; not synced: a repeat does no harm."""
        try:
            if self.done_fd < 0 and not self._open_done():
                self.done_fd = disk.create(self.path.with_suffix(DONE))
            token = segment.token(self.header.nonce, index)
            disk.write(self.done_fd, [token], index * TOKEN_BYTES)
        except OSError:
            self.unwritten.add(index)  # on a full disk, going on is what frees it
        else:
            self.unwritten.discard(index)

    def drop_done(self) -> None:
        """Forget what others have dealt with since."""
        if not self.entries:
            return
        if self.done_fd < 0 and not self._open_done():
            return
        first, last = min(self.entries), max(self.entries)
        size = (last - first + 1) * TOKEN_BYTES
        marks = os.pread(self.done_fd, size, first * TOKEN_BYTES)
        if not marks.strip(b"\0"):
            return
        for index in list(self.entries):
            start = (index - first) * TOKEN_BYTES
            mark = marks[start : start + TOKEN_BYTES]
            if mark.strip(b"\0") and mark == segment.token(self.header.nonce, index):
                del self.entries[index]

    def map(self) -> memoryview:
        """Return the bytes of the segment, without a copy."""
        if self.view is None:
            size = min(self.header.size, os.fstat(self.fd).st_size)
            # It lives as long as a view of it.
            self.view = memoryview(mmap.mmap(self.fd, size, prot=mmap.PROT_READ))
        return self.view

    def close(self) -> None:
        """Let go of descriptors; views that were handed out stay."""
        for fd in (self.fd, self.done_fd):
            if fd >= 0:
                close(fd)
        self.fd = self.done_fd = -1
        self.view = None

    __del__ = close

    def _open_done(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self.done_fd = os.open(self.path.with_suffix(DONE), os.O_RDWR | os.O_CLOEXEC)
        return self.done_fd >= 0


class _Slot:
    """One slot, from its oldest segment that holds something on."""

    def __init__(self, number: int, path: Path, disk: Disk) -> None:
        self.number, self.path, self._disk = number, path, disk
        self._folder = _Folder(path)
        self._numbers: list[int] = []
        self._free: list[Path] = []
        self._segments: dict[int, _Segment] = {}
        self._old: set[int] | None = None  # what was there at the first look
        self._tried_at = -_LOOK_S
        self._abandoned = 0  # no segment up to this number has a writer

    def waiting(self, limit: int) -> list[Entry]:
        """Return the oldest entries, `limit` at most, in the order they were written in."""
        self.look()
        found: list[Entry] = []
        for number in list(self._numbers):
            seg = self.open(number)
            if seg is None:
                continue
            for index in list(seg.unwritten):
                seg.note_done(index, self._disk)
            seg.drop_done()
            self._read_on(seg, limit - len(found))
            if not seg.is_read:
                found += itertools.islice(seg.entries.values(), limit - len(found))
                break
            if not seg.entries:
                self._free_segment(seg)
                continue
            found += itertools.islice(seg.entries.values(), limit - len(found))
            if len(found) == limit:
                break
        if self._free and not self._numbers:
            self._leave_if_abandoned()
        return found

    def open(self, number: int) -> _Segment | None:
        """Return a segment, None where it is no more."""
        if number not in self._numbers:
            return None
        if number not in self._segments:
            path = self.path / f"{number:016d}{SEGMENT}"
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            try:
                header = segment.read_header(fd) or self._recover(fd, path)
                if header is None:
                    close(fd)
                    return None
                size = min(header.size, os.fstat(fd).st_size)
            except BaseException:
                close(fd)
                raise
            is_old = self._old is not None and number in self._old
            header = replace(header, number=number, size=size)
            seg = _Segment(path, self.number, fd, header, is_old)
            seg.time_ns = header.created_ns
            self._note_abandoned(seg)
            self._segments[number] = seg
        return self._segments[number]

    def _recover(self, fd: int, path: Path) -> Header | None:
        """Return what the records tell of a segment that has lost both copies of its header."""
        logger.error("segment damaged", extra={"file": f"{self.path.name}/{path.name}"})
        header = segment.recover_header(fd, number_of(path))
        if header is None:  # nothing in it can be told from noise: kept for a person to look at
            self._disk.rename(path, path.with_suffix(DAMAGED))
            self._numbers.remove(number_of(path))
        return header

    def free_if_done(self, seg: _Segment) -> None:
        """Give a segment back for use again, where all in it was dealt with."""
        if seg.is_read and not seg.entries:
            self._free_segment(seg)

    def close(self) -> None:
        """Let go of descriptors."""
        for seg in self._segments.values():
            seg.close()
        self._segments.clear()

    def look(self, *, again: bool = False) -> None:
        if not self._folder.changed() and not again:
            return
        paths = list(self.path.iterdir())
        self._numbers = sorted(number_of(path) for path in paths if path.suffix == SEGMENT)
        self._free = [path for path in paths if path.suffix == FREE]
        if self._old is None:
            self._old = set(self._numbers)
        for number in set(self._segments) - set(self._numbers):
            del self._segments[number]  # closed when nobody uses it any more

    def _read_on(self, seg: _Segment, limit: int) -> None:
        while len(seg.entries) < limit and not seg.is_read:
            is_ended = seg.is_ended
            record = segment.read_record(seg.fd, seg.offset, seg.header)
            if record is not None and record.kind != segment.END:
                self._add(seg, record)
            elif record is not None or seg.offset + PAGE > seg.header.size:
                seg.is_read = True
            elif not is_ended:
                if not self._has_ended(seg):
                    return
                # Looked at again, now that nothing more will come.
                seg.is_ended = True
            else:
                self._leap(seg)

    def _add(self, seg: _Segment, record: Record) -> None:
        is_sound = not seg.is_old or segment.payload_is_sound(seg.fd, record)
        if is_sound or _was_synced(seg, record.end, record.end):
            start = record.offset + RECORD_BYTES
            crc = record.payload_crc if is_sound else None
            place = Place(
                self.number,
                seg.header.number,
                seg.header.nonce,
                record.index,
                start,
                record.length,
                crc,
            )
            self._wait_for(seg, record.time_ns, record.association_id, record.kind, place)
        else:
            _tell_torn(seg, record.offset, record.end)
        seg.offset, seg.index, seg.time_ns = record.end, record.index + 1, record.time_ns

    def _leap(self, seg: _Segment) -> None:
        """Go to the next record behind what is none, if there is one."""
        following = segment.find_record(seg.fd, seg.offset + PAGE, seg.header)
        if following is None:
            seg.is_read = True
            return
        if _was_synced(seg, seg.offset + PAGE, following.offset):
            # Its header is damaged, so nobody knows whose it was; the rest is kept all the same.
            start = seg.offset + RECORD_BYTES
            place = Place(
                self.number,
                seg.header.number,
                seg.header.nonce,
                seg.index,
                start,
                following.offset - start,
                None,
            )
            self._wait_for(seg, seg.time_ns + 1, "0" * 16, "dcm", place)
        else:
            _tell_torn(seg, seg.offset, following.offset)
        seg.offset = following.offset

    def _wait_for(
        self, seg: _Segment, time_ns: int, association_id: str, kind: str, place: Place
    ) -> None:
        if not seg.is_done(place.index):
            name = names.make(time_ns, self.number, association_id, kind)
            if place.crc is None:
                logger.error("record damaged", extra={"file": name})
            seg.entries[place.index] = names.entry(name, place)

    def _has_ended(self, seg: _Segment) -> bool:
        self.look()
        number = seg.header.number
        for later in [n for n in self._numbers if n > number]:
            following = self.open(later)
            if following is not None and (
                following.offset > PAGE
                or segment.read_record(following.fd, PAGE, following.header) is not None
            ):
                return True  # its writer went on: it writes to one segment at a time
        return self._leave_if_abandoned()

    def _leave_if_abandoned(self) -> bool:
        """Whether no process writes to this slot; then what was kept for its use goes."""
        now = time.monotonic()
        if now - self._tried_at < _LOOK_S:
            return False
        self._tried_at = now
        lock = lock_slot(self.path)
        if lock is None:
            return False
        try:  # no writer; and the next one will begin a segment of its own
            self.look(again=True)
            unused, self._free = [*self._free, *self.path.glob(f"*{NEW}")], []
            for path in unused:
                with contextlib.suppress(OSError):
                    self._disk.unlink(path)
            self._abandoned = max(self._numbers, default=0)
        finally:
            close(lock)
        for seg in self._segments.values():
            self._note_abandoned(seg)
        return True

    def _note_abandoned(self, seg: _Segment) -> None:
        if seg.header.number <= self._abandoned:
            seg.is_ended = True
            seg.header = replace(seg.header, recyclable=False)

    def _free_segment(self, seg: _Segment) -> None:
        number = seg.header.number
        keep = seg.header.recyclable and len(self._free) < FREE_SEGMENTS
        with contextlib.suppress(OSError):
            if keep:
                free = seg.path.with_suffix(FREE)
                self._disk.rename(seg.path, free)
                self._free.append(free)
            else:
                self._disk.unlink(seg.path)
            self._disk.unlink(seg.path.with_suffix(DONE))
            seg.close()
            self._segments.pop(number, None)
            self._numbers.remove(number)


class Follower:
    """Reads what any process wrote to the journal; for several threads of one process."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self._root, self._disk = root, disk
        self._folder = _Folder(root)
        self._slots: dict[int, _Slot] = {}
        self._lock = threading.RLock()

    def pending(self, limit: int) -> list[Entry]:
        """Return what waits, oldest first; of one slot, in the order it was written in."""
        with self._lock:
            self._look()
            waiting = [slot.waiting(limit) for slot in self._slots.values()]
            merged = heapq.merge(*waiting, key=lambda entry: entry.name)
            return list(itertools.islice(merged, limit))

    def read(self, place: Place) -> memoryview:
        """Return the payload of a record, as it lies in the segment: valid until `remove`.

        Raises
        ------
        FileNotFoundError
            If it was removed meanwhile.
        CorruptObject
            If it is not what was written.
        """
        with self._lock:
            seg = self._segment(place)
            if seg is None or seg.is_done(place.index):
                raise FileNotFoundError(f"removed: record {place.index} of {place.number}")
            payload = seg.map()[place.offset : place.offset + place.length]
        if place.crc is not None and crc32c(payload) == place.crc:
            return payload
        with self._lock:  # or was it removed, and the segment used again, while it was read?
            if self._segment(place) is not seg:
                raise FileNotFoundError(f"removed: record {place.index} of {place.number}")
        raise CorruptObject(f"the journal is damaged: record {place.index} of {place.number}")

    def copy(self, place: Place) -> Iterator[bytes]:
        """Yield the payload as it lies there, sound or not; zeros for what cannot be read.

        Raises
        ------
        FileNotFoundError
            If it was removed.
        """
        with self._lock:
            seg = self._segment(place)
            if seg is None or seg.is_done(place.index):
                raise FileNotFoundError(f"removed: record {place.index} of {place.number}")
            fd = os.dup(seg.fd)
        try:
            end = place.offset + place.length
            for start in range(place.offset, end, _CHUNK):
                size = min(_CHUNK, end - start)
                try:
                    yield os.pread(fd, size, start)
                except OSError:
                    yield b"".join(_pages(fd, start, size))
        finally:
            close(fd)

    def waits(self, place: Place) -> bool:
        """Whether a record was not dealt with yet."""
        with self._lock:
            seg = self._segment(place)
            return seg is not None and not seg.is_done(place.index)

    def remove(self, places: list[Place]) -> None:
        """Note that records were dealt with, and free the segments that this empties."""
        with self._lock:
            for place in places:
                seg = self._segment(place)
                if seg is not None:
                    seg.note_done(place.index, self._disk)
                    seg.entries.pop(place.index, None)
                    self._slots[place.slot].free_if_done(seg)

    def close(self) -> None:
        """Let go of descriptors; views that were handed out stay."""
        with self._lock:
            for slot in self._slots.values():
                slot.close()
            self._slots.clear()

    def _look(self) -> None:
        if self._folder.changed():
            for number, path in slots(self._root):
                if number not in self._slots:
                    self._slots[number] = _Slot(number, path, self._disk)

    def _segment(self, place: Place) -> _Segment | None:
        self._look()
        slot = self._slots.get(place.slot)
        if slot is None:
            return None
        slot.look()
        seg = slot.open(place.number)
        return seg if seg is not None and seg.header.nonce == place.nonce else None


def _was_synced(seg: _Segment, offset: int, after: int) -> bool:
    """Whether a later record tells that all before `offset` had reached the disk.

    Else it may be what a power cut left of a write that nobody was told had succeeded.
    """
    while True:
        record = segment.read_record(seg.fd, after, seg.header) or segment.find_record(
            seg.fd, after, seg.header
        )
        if record is None:
            return False
        if record.synced >= offset:
            return True
        after = record.end


def _tell_torn(seg: _Segment, start: int, end: int) -> None:
    # Not an error: whoever sent it was not told that it is safe, and sends it again.
    extra = {"slot": seg.slot, "segment": seg.header.number, "bytes": end - start}
    logger.warning("unfinished record dropped", extra=extra)


def _pages(fd: int, start: int, size: int) -> Iterator[bytes]:
    for at in range(start, start + size, PAGE):
        length = min(PAGE, start + size - at)
        try:
            yield os.pread(fd, length, at)
        except OSError:
            yield bytes(length)
