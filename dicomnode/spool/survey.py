"""What lies in a spool, counted without changing it: what `dicomnode spool` shows."""

import contextlib
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dicomnode.errors import ConfigError
from dicomnode.spool import segment
from dicomnode.spool.disk import close
from dicomnode.spool.journal import DAMAGED, DONE, FREE, SEGMENT, slots
from dicomnode.spool.names import NAME
from dicomnode.spool.segment import PAGE, TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Part:
    """A slot of the journal, or one of the folders of files."""

    name: str
    has_writer: bool | None  # None: of a folder
    segments: int
    free: int  # segments kept to be used again
    damaged: int  # segments that nothing could be read of
    disk_bytes: int
    waiting: int  # Instances and events
    waiting_bytes: int
    oldest: datetime | None  # arrival of the first that waits


FOLDERS = ("incoming", "quarantine", "held")


def survey(path: Path, folders: Sequence[str] = FOLDERS) -> list[Part]:
    """Return what is in each slot of a spool, and in some of its folders; it may be in use.

    Raises
    ------
    ConfigError
        If there is no spool.
    """
    if not path.is_dir():
        raise ConfigError(f"spool.path: {path}: no such folder")
    parts = []
    if (path / "journal").is_dir():
        parts = [_slot(folder) for _, folder in slots(path / "journal")]
    for name in folders:
        if (path / name).is_dir():
            parts.append((_held if name == "held" else _folder)(path / name))
    return parts


def _slot(folder: Path) -> Part:
    files = list(folder.iterdir())
    waiting = waiting_bytes = disk_bytes = 0
    times: list[int] = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # it was freed meanwhile
            disk_bytes += file.stat().st_size
            if file.suffix == SEGMENT:
                lengths, first = _waiting(file)
                waiting, waiting_bytes = waiting + len(lengths), waiting_bytes + sum(lengths)
                times += first
    counts = {suffix: sum(f.suffix == suffix for f in files) for suffix in (SEGMENT, FREE, DAMAGED)}
    return Part(
        f"journal/{folder.name}",
        _is_locked(folder / ".lock"),
        counts[SEGMENT],
        counts[FREE],
        counts[DAMAGED],
        disk_bytes,
        waiting,
        waiting_bytes,
        _time(min(times, default=None)),
    )


def _waiting(file: Path) -> tuple[list[int], list[int]]:
    """Return the lengths of the records that wait in a segment, and the time of the first."""
    lengths: list[int] = []
    first: list[int] = []
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = segment.read_header(fd)
        if header is None:
            return lengths, first
        marks = b""
        with contextlib.suppress(FileNotFoundError):
            marks = file.with_suffix(DONE).read_bytes()
        record = segment.read_record(fd, PAGE, header)
        while record is not None and record.kind != segment.END:
            start = record.index * TOKEN_BYTES
            if marks[start : start + TOKEN_BYTES] != segment.token(header.nonce, record.index):
                lengths.append(record.length)
                first = first or [record.time_ns]
            record = segment.read_record(fd, record.end, header)
    finally:
        close(fd)
    return lengths, first


def _folder(folder: Path) -> Part:
    sizes, times = [], []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if folder.name == "quarantine" or NAME.fullmatch(file.name):
                sizes.append(file.stat().st_size)
                times += [int(file.name[:20])] if file.name[:20].isdigit() else []
    oldest = _time(min(times, default=None))
    return Part(folder.name, None, 0, 0, 0, sum(sizes), len(sizes), sum(sizes), oldest)


def _held(folder: Path) -> Part:
    """Pixels that were scored and that a rule may still want: FOLDER/STUDY/SERIES/INSTANCE.dcm."""
    sizes, times = [], []
    for file in folder.glob("*/*/*.dcm"):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            sizes.append(status.st_size)
            times.append(status.st_mtime_ns)
    oldest = _time(min(times, default=None))
    return Part(folder.name, None, 0, 0, 0, sum(sizes), len(sizes), sum(sizes), oldest)


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        close(fd)
    return False


def _time(time_ns: int | None) -> datetime | None:
    return None if time_ns is None else datetime.fromtimestamp(time_ns / 1e9, UTC)
