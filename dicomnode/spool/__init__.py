"""The spool: where what was received waits, on stable storage, for the worker.

A folder with `journal/` or `incoming/`, after the setting, and `quarantine/`. Names are of our
own making and sort by arrival; nothing of a data set ever becomes part of a path.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from dicomnode.config import SpoolSettings
from dicomnode.errors import ConfigError, SpoolBusy, SpoolFull
from dicomnode.model import Reason, SpooledEvent, SpooledInstance
from dicomnode.spool import pulse
from dicomnode.spool.bell import Bell
from dicomnode.spool.disk import Bytes, Disk, close
from dicomnode.spool.folder import Folder
from dicomnode.spool.follow import Follower
from dicomnode.spool.journal import FULL, Journal, Place
from dicomnode.spool.names import EVENT_KINDS, NAME, Entry

Durability = Literal["journal", "file"]

SEGMENT_BYTES = 64 << 20
# An entry that could not be set aside, or be held, lets others pass for so long.
STUCK_S = 30.0

__all__ = ["EVENT_KINDS", "SEGMENT_BYTES", "Disk", "Durability", "Entry", "Spool"]


class Spool:
    """Instances and ends of associations between the receiver and the worker.

    Any number of processes may put; one, which holds the `lease`, takes. `durability` says how
    entries are written; both kinds are read, so that a spool survives a change of it.
    """

    def __init__(
        self,
        path: Path,
        reserve_bytes: int = 0,
        durability: Durability = "journal",
        segment_bytes: int = SEGMENT_BYTES,
        disk: Disk | None = None,
    ) -> None:
        self.path = path.absolute()
        self.reserve_bytes, self.segment_bytes = reserve_bytes, segment_bytes
        self.durability = durability
        self._disk = disk or Disk()
        self._quarantine = self.path / "quarantine"
        self._journals = self.path / "journal"
        self._folder = Folder(self.path / "incoming", self._disk)
        self._follower = Follower(self._journals, self._disk)
        self._journal: tuple[int, Journal] | None = None  # of the process that opened it
        self._opening = threading.Lock()
        self._bell = Bell(self.path / ".bell")
        self._stuck: dict[str, float] = {}  # name -> until when
        try:
            for folder in (self._folder.path, self._journals, self._quarantine):
                self._disk.make_directory(folder)
        except OSError as exc:
            raise ConfigError(f"spool.path: {self.path}: {exc.strerror}") from exc

    @classmethod
    def of(cls, settings: SpoolSettings) -> "Spool":
        """Return the spool that the settings describe."""
        return cls(
            settings.path, settings.reserve_bytes, settings.durability, settings.segment_bytes
        )

    def put(self, data: Bytes | Sequence[Bytes], association_id: str) -> SpooledInstance:
        """Return the Instance once it is on stable storage and will survive a power cut.

        Parameters
        ----------
        data
            A DICOM Part 10 file, whole or in parts, which are not joined.
        association_id
            16 hexadecimal digits, the same for all Instances of one association.

        Raises
        ------
        SpoolFull
            If the disk takes no more, or `reserve_bytes` would no longer be free. It may come up
            all the same: it is not certain that it is lost.
        """
        parts = [data] if isinstance(data, Bytes) else data
        size = sum(memoryview(part).nbytes for part in parts)
        entry = self._put(parts, association_id, "dcm", size)
        assert isinstance(entry, SpooledInstance)
        return entry

    def put_event(self, association_id: str, kind: str) -> SpooledEvent:
        """Return the event once it is on stable storage.

        An event is next to nothing, so it may go into the reserve.
        """
        if kind not in EVENT_KINDS:
            raise ValueError(f"no kind of event: {kind!r}")
        entry = self._put([], association_id, kind, None)
        assert isinstance(entry, SpooledEvent)
        return entry

    def pending(self, limit: int) -> list[Entry]:
        """Return what waits, oldest first, `limit` entries at most.

        What one process wrote comes in the order in which it was written. There is no "after this
        name": of two Instances written at the same time, the one that arrived first may appear
        last.
        """
        limit_and_stuck = limit + len(self._stuck)
        both = (self._folder.pending(limit_and_stuck), self._follower.pending(limit_and_stuck))
        merged = heapq.merge(*both, key=lambda entry: entry.name)
        return list(itertools.islice(self._without_stuck(merged), limit))

    def read(self, entry: SpooledInstance) -> Bytes:
        """Return the bytes of an Instance, a DICOM Part 10 file; good until it is removed.

        Raises
        ------
        FileNotFoundError
            If it was removed meanwhile.
        CorruptObject
            If it is not what was put: the disk has damaged it.
        """
        if isinstance(entry.place, Place):
            return self._follower.read(entry.place)
        return self._folder.read(entry)

    def size(self, entry: SpooledInstance) -> int:
        """Return how many bytes an Instance has, 0 where it was removed meanwhile."""
        return entry.place.length if isinstance(entry.place, Place) else self._folder.size(entry)

    def waits(self, entry: Entry) -> bool:
        """Whether an entry was neither removed nor set aside yet."""
        if isinstance(entry.place, Place):
            return self._follower.waits(entry.place)
        return self._folder.waits(entry)

    def remove(self, *entries: Entry) -> None:
        """Forget entries that were dealt with; a second time does no harm.

        Not made durable: an entry that a power cut brings back is dealt with again.
        """
        for entry in entries:
            if not isinstance(entry.place, Place):
                self._folder.remove(entry)
        self._follower.remove([e.place for e in entries if isinstance(e.place, Place)])

    def quarantine(self, entry: SpooledInstance, reason: Reason) -> Path:
        """Set an Instance aside for a person to look at, and return where it lies now.

        Raises
        ------
        SpoolFull
            If the disk does not take it. It stays where it was, and lets others pass for a while.
        """
        aside = self._quarantine / f"{Path(entry.name).stem}-{reason}.dcm"
        try:
            with self._refusals():
                if not isinstance(entry.place, Place):
                    self._folder.move(entry, aside)
                elif self.waits(entry) or not aside.exists():
                    self._copy(entry.place, aside)
                    self.remove(entry)
        except SpoolFull:
            self.set_back(entry)
            raise
        return aside

    def set_back(self, entry: SpooledInstance) -> None:
        """Let others pass an entry for a while: it cannot be dealt with now."""
        self._stuck[entry.name] = time.monotonic() + STUCK_S

    def is_stuck(self, name: str) -> bool:
        """Whether an entry could not be set aside, and lets others pass for a while."""
        return name in self._stuck

    def wait(self, seconds: float) -> None:
        """Return as soon as any process may have put something, or after so many seconds.

        Under the lease only; without it, what happens is noticed in small steps.
        """
        self._bell.wait(seconds)

    def clean(self) -> None:
        """Remove what processes that died left half written."""
        self._folder.clean()

    def free_bytes(self) -> int:
        """Return the bytes an unprivileged process can still write to the disk."""
        return self._disk.free_bytes(self.path)

    def close(self) -> None:
        """Let go of everything held; what was put stays, and the next use opens it again."""
        with self._opening:
            if self._journal is not None and self._journal[0] == os.getpid():
                self._journal[1].close()
            self._journal = None
        self._follower.close()
        self._bell.close()

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the right to take from this spool, until the block ends or the process dies.

        Raises
        ------
        SpoolBusy
            If another worker holds it.
        """
        with open(self.path / ".lease", "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise SpoolBusy(f"spool.path: another worker is at {self.path}") from exc
            pulse.forget(self.path)
            self._bell.listen()
            try:
                yield
            finally:
                self._bell.close()

    def _put(
        self, parts: Sequence[Bytes], association_id: str, kind: str, size: int | None
    ) -> Entry:
        if not NAME.fullmatch(f"{0:020d}-{0:06d}-{association_id}.{kind}"):
            raise ValueError(f"no association id: {association_id!r}")
        with self._refusals():
            try:
                writer = self._folder if self.durability == "file" else self._open_journal()
                if size is not None:
                    self._keep_reserve(writer.path, size)
                entry = writer.put(parts, association_id, kind)
            except OSError as exc:
                # Without a byte left, an empty file often still finds a place.
                if size is not None or exc.errno not in FULL:
                    raise
                entry = self._folder.put(parts, association_id, kind)
        self._bell.ring()
        return entry

    def _keep_reserve(self, path: Path, size: int) -> None:
        # Asked of the folder itself: one that was moved or removed takes nothing.
        if self._disk.free_bytes(path) - size < self.reserve_bytes:
            raise SpoolFull(
                f"{size} bytes more would leave less than {self.reserve_bytes} bytes "
                f"free in {self.path}"
            )

    def _open_journal(self) -> Journal:
        with self._opening:
            if self._journal is not None and self._journal[0] != os.getpid():
                self._journal[1].abandon()  # a fork has a slot of its own
                self._journal = None
            if self._journal is None:
                journal = Journal(
                    self._journals, self._disk, self.segment_bytes, self.reserve_bytes
                )
                self._journal = os.getpid(), journal
            return self._journal[1]

    def _copy(self, place: Place, aside: Path) -> None:
        part = aside.with_name(f".{aside.name}.part")
        self._disk.unlink(part)
        fd = self._disk.create(part)
        try:
            offset = 0
            for chunk in self._follower.copy(place):
                self._disk.write(fd, [chunk], offset)
                offset += len(chunk)
            self._disk.sync(fd)
            self._disk.rename(part, aside)
            self._disk.sync_directory(self._quarantine)
        except BaseException:
            with contextlib.suppress(OSError):
                self._disk.unlink(part)
            raise
        finally:
            close(fd)

    def _without_stuck(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        now = time.monotonic()
        self._stuck = {name: until for name, until in self._stuck.items() if until > now}
        return (entry for entry in entries if entry.name not in self._stuck)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            # Full, read-only, gone, no more file handles: none of it is the object's fault,
            # so the sender is to keep it.
            raise SpoolFull(f"{self.path}: {exc.strerror}") from exc
