"""Answers of peers that wait for the exchange: one small file each, on stable storage.

The receiver knows no database. What a peer reports (Storage Commitment) it puts here, beside
what it spools, before it answers Success; the exchange reads it, and removes it once the
database has it.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dicomnode.config import SpoolSettings
from dicomnode.errors import CorruptObject, SpoolFull
from dicomnode.spool.disk import Disk

MAXIMUM = 10_000  # that wait; a peer may send as many as it likes
HALF_WRITTEN_S = 3600.0
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Report:
    """What a peer says of the objects of one transaction."""

    peer: str  # AE title
    transaction_uid: str
    committed: tuple[str, ...]  # SOP Instance UIDs
    failed: tuple[tuple[str, int], ...]  # SOP Instance UID, Failure Reason (0008,1197)


class Reports:
    """The folder; any number of processes may put, and take."""

    def __init__(self, spool: Path, disk: Disk | None = None) -> None:
        self.path = spool / ".reports"
        self._disk = disk or Disk()

    @classmethod
    def of(cls, settings: SpoolSettings) -> "Reports":
        """Return those of a spool."""
        return cls(settings.path)

    def put(self, report: Report) -> None:
        """Return once a report is on stable storage.

        Raises
        ------
        SpoolFull
            If the disk does not take it, or too many wait.
        """
        try:
            self._disk.make_directory(self.path)
            if sum(1 for _ in self._names()) >= MAXIMUM:
                raise SpoolFull(f"{MAXIMUM} reports wait in {self.path}")
            name = f"{time.time_ns():020d}-{uuid.uuid4().hex}{_SUFFIX}"
            part = self.path / f".{name}.part"
            try:
                fd = self._disk.create(part)
                try:
                    self._disk.write(fd, [json.dumps(asdict(report)).encode()], 0)
                    self._disk.sync_whole(fd)
                finally:
                    os.close(fd)
                self._disk.rename(part, self.path / name)
            except OSError:
                with contextlib.suppress(OSError):  # a peer tries again and again on a full disk
                    self._disk.unlink(part)
                raise
            self._disk.sync_directory(self.path)
        except OSError as exc:
            raise SpoolFull(f"{self.path}: {exc.strerror}") from exc

    def pending(self, limit: int) -> Sequence[Path]:
        """Return what waits, oldest first."""
        return [self.path / name for name in sorted(self._names())[:limit]]

    def read(self, path: Path) -> Report:
        """Return a report that waits.

        Raises
        ------
        CorruptObject
            If it is none.
        """
        try:
            values = json.loads(path.read_bytes())
            return Report(
                peer=str(values["peer"]),
                transaction_uid=str(values["transaction_uid"]),
                committed=tuple(map(str, values["committed"])),
                failed=tuple((str(uid), int(reason)) for uid, reason in values["failed"]),
            )
        except (ValueError, KeyError, TypeError) as exc:
            raise CorruptObject(f"{path.name}: {type(exc).__name__}") from exc

    def remove(self, path: Path) -> None:
        """Remove a report; after a crash it may come again."""
        self._disk.unlink(path)

    def clean(self) -> None:
        """Remove what processes that died left half written, an hour ago or more."""
        for part in self.path.glob(".*.part"):
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > HALF_WRITTEN_S:
                    self._disk.unlink(part)

    def _names(self) -> Iterator[str]:
        try:
            with os.scandir(self.path) as files:
                names = [f.name for f in files]
        except FileNotFoundError:
            return
        yield from (n for n in names if n.endswith(_SUFFIX) and not n.startswith("."))
