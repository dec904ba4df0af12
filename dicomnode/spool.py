"""The spool: where what was received waits, on stable storage, for the worker.

A folder with `incoming/` and `quarantine/`. Names are of our own making and sort by arrival;
nothing of a data set ever becomes part of a path.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from dicomnode.errors import ConfigError, SpoolBusy, SpoolFull
from dicomnode.model import Reason, SpooledEvent, SpooledInstance

Entry = SpooledInstance | SpooledEvent
Bytes = bytes | bytearray | memoryview

EVENT_KINDS = ("released", "aborted", "started")

_NAME = re.compile(rf"(\d{{20}})-\d{{6}}-([0-9a-f]{{16}})\.(dcm|{'|'.join(EVENT_KINDS)})")


class Spool:
    """Instances and ends of associations between the receiver and the worker.

    Any number of processes may put; one, which holds the `lease`, takes.
    """

    def __init__(self, path: Path, reserve_bytes: int = 0) -> None:
        self.path = path.absolute()
        self.reserve_bytes = reserve_bytes
        self._incoming = self.path / "incoming"
        self._quarantine = self.path / "quarantine"
        self._naming = threading.Lock()
        self._time_ns = 0
        self._counter = itertools.count()
        try:
            _make_directory(self._incoming)
            _make_directory(self._quarantine)
        except OSError as exc:
            raise ConfigError(f"spool.path: {self.path}: {exc.strerror}") from exc

    def put(self, data: Bytes | Sequence[Bytes], association_id: str) -> SpooledInstance:
        """Return the Instance once it is on stable storage and will survive a power cut.

        Parameters
        ----------
        data
            A DICOM Part 10 file, whole or in parts.
        association_id
            16 hexadecimal digits, the same for all Instances of one association.

        Raises
        ------
        SpoolFull
            If the disk takes no more, or `reserve_bytes` would no longer be free.
        """
        parts = [data] if isinstance(data, Bytes) else data
        size = sum(map(len, parts))
        with self._refusals():
            free = self.free_bytes()
        if free - size < self.reserve_bytes:
            raise SpoolFull(
                f"{size} bytes more would leave less than {self.reserve_bytes} bytes "
                f"free in {self.path}"
            )
        name, arrived_at = self._write(parts, association_id, "dcm")
        return SpooledInstance(name, association_id, arrived_at)

    def put_event(self, association_id: str, kind: str) -> SpooledEvent:
        """Return the event once it is on stable storage.

        An event is an empty file, so it may go into the reserve.
        """
        if kind not in EVENT_KINDS:
            raise ValueError(f"no kind of event: {kind!r}")
        name, arrived_at = self._write([], association_id, kind)
        return SpooledEvent(name, association_id, kind, arrived_at)

    def pending(self, limit: int) -> list[Entry]:
        """Return what waits, oldest first, `limit` entries at most.

        There is no "after this name": of two Instances written at the same time, the one that
        arrived first may appear last.
        """
        with os.scandir(self._incoming) as files:
            matches = (_NAME.fullmatch(file.name) for file in files)
            ours = (match for match in matches if match)
            oldest = heapq.nsmallest(limit, ours, key=lambda match: match[0])
        return [self._entry(match) for match in oldest]

    def read(self, entry: SpooledInstance) -> Bytes:
        """Return the bytes of an Instance: a DICOM Part 10 file.

        Raises
        ------
        FileNotFoundError
            If it was removed meanwhile.
        """
        return (self._incoming / entry.name).read_bytes()

    def waits(self, entry: Entry) -> bool:
        """Whether an entry was neither removed nor set aside yet."""
        return (self._incoming / entry.name).exists()

    def remove(self, *entries: Entry) -> None:
        """Forget entries that were dealt with; a second time does no harm.

        Not made durable: an entry that a power cut brings back is dealt with again.
        """
        for entry in entries:
            (self._incoming / entry.name).unlink(missing_ok=True)

    def quarantine(self, entry: SpooledInstance, reason: Reason) -> Path:
        """Set an Instance aside for a person to look at, and return where it lies now."""
        path = self._incoming / entry.name
        aside = self._quarantine / f"{path.stem}-{reason}.dcm"
        with self._refusals():
            try:
                os.replace(path, aside)
            except FileNotFoundError:
                if not aside.exists():  # else an earlier run was cut off after this step
                    raise
            fsync_directory(self._quarantine)
            fsync_directory(self._incoming)
        return aside

    def clean(self) -> None:
        """Remove what processes that died left half written."""
        for part in self._incoming.glob(".*.part"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), open(part, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()

    def free_bytes(self) -> int:
        """Return the bytes an unprivileged process can still write to the disk."""
        disk = os.statvfs(self._incoming)
        return disk.f_bavail * disk.f_frsize

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
            yield

    def _write(
        self, parts: Sequence[Bytes], association_id: str, suffix: str
    ) -> tuple[str, datetime]:
        name = self._new_name(association_id, suffix)
        final = self._incoming / name
        part = self._incoming / f".{name}.part"  # same directory, so the rename is atomic
        try:
            with self._refusals():
                with open(part, "xb") as file:
                    # The kernel drops this lock when the process dies: `clean` goes by it.
                    fcntl.flock(file, fcntl.LOCK_EX)
                    file.writelines(parts)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(part, final)
                fsync_directory(self._incoming)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        return name, _arrival(name[:20])

    def _new_name(self, association_id: str, suffix: str) -> str:
        with self._naming:
            # Never backwards, whatever the clock does; the counter orders equal times.
            self._time_ns = max(self._time_ns, time.time_ns())
            count = next(self._counter) % 1_000_000
            name = f"{self._time_ns:020d}-{count:06d}-{association_id}.{suffix}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"no association id: {association_id!r}")
        return name

    def _entry(self, match: re.Match[str]) -> Entry:
        name, association_id, kind = match[0], match[2], match[3]
        if kind == "dcm":
            return SpooledInstance(name, association_id, _arrival(match[1]))
        return SpooledEvent(name, association_id, kind, _arrival(match[1]))

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            # Full, read-only, gone, no more file handles: none of it is the object's fault,
            # so the sender is to keep it.
            raise SpoolFull(f"{self.path}: {exc.strerror}") from exc


def fsync_directory(path: Path) -> None:
    """Bring the names in a directory to stable storage."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_directory(path: Path) -> None:
    # For the owner alone: what lies here identifies patients.
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        fsync_directory(path.parent)


def _arrival(time_ns: str) -> datetime:
    return datetime.fromtimestamp(int(time_ns) / 1e9, UTC)
