"""A file for each entry: what `durability = "file"` writes, as earlier nodes did."""

import contextlib
import fcntl
import heapq
import itertools
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from dicomnode.spool import names
from dicomnode.spool.disk import Bytes, Disk
from dicomnode.spool.names import NAME, Entry


class Folder:
    """A folder of files; any number of processes may put."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path, self._disk = path, disk
        self._naming = threading.Lock()
        self._time_ns = 0
        self._counter = itertools.count()

    def put(self, parts: Sequence[Bytes], association_id: str, kind: str) -> Entry:
        """Return the entry once it is on stable storage."""
        with self._naming:
            # Never backwards, whatever the clock does; the counter orders equal times.
            self._time_ns = max(self._time_ns, time.time_ns())
            count = next(self._counter) % 1_000_000
            name = names.make(self._time_ns, count, association_id, kind)
        final = self.path / name
        part = self.path / f".{name}.part"  # same directory, so the rename is atomic
        try:
            with open(part, "xb") as file:
                # The kernel drops this lock when the process dies: `clean` goes by it.
                fcntl.flock(file, fcntl.LOCK_EX)
                file.writelines(parts)
                file.flush()
                self._disk.sync_whole(file.fileno())
                os.replace(part, final)
            self._disk.sync_directory(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        return names.entry(name)

    def pending(self, limit: int) -> list[Entry]:
        """Return what waits, oldest first, `limit` entries at most.

        There is no "after this name": of two Instances written at the same time, the one that
        arrived first may appear last.
        """
        with os.scandir(self.path) as files:
            ours = (file.name for file in files if NAME.fullmatch(file.name))
            oldest = heapq.nsmallest(limit, ours)
        return [names.entry(name) for name in oldest]

    def read(self, entry: Entry) -> bytes:
        """Return the bytes of an entry."""
        return (self.path / entry.name).read_bytes()

    def size(self, entry: Entry) -> int:
        """Return the bytes of an entry, 0 where it is not there."""
        try:
            return (self.path / entry.name).stat().st_size
        except FileNotFoundError:
            return 0

    def waits(self, entry: Entry) -> bool:
        """Whether an entry is there."""
        return (self.path / entry.name).exists()

    def remove(self, entry: Entry) -> None:
        """Remove an entry, if it is there."""
        (self.path / entry.name).unlink(missing_ok=True)

    def move(self, entry: Entry, aside: Path) -> None:
        """Give an entry a place elsewhere, on stable storage."""
        try:
            os.replace(self.path / entry.name, aside)
        except FileNotFoundError:
            if not aside.exists():  # else an earlier run was cut off after this step
                raise
        self._disk.sync_directory(aside.parent)
        self._disk.sync_directory(self.path)

    def clean(self) -> None:
        """Remove what processes that died left half written."""
        for part in self.path.glob(".*.part"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), open(part, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
