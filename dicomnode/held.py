"""Pixels that stay after they were scored: each Instance a DICOM file, as it was received.

    FOLDER/STUDY/SERIES/INSTANCE.dcm

The names are UIDs, which are looked at before they become part of a path: nothing else of a data
set does. Folders and files are for the node's user alone.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dicomnode.core import admission
from dicomnode.errors import HeldUnavailable
from dicomnode.spool.disk import Bytes, Disk, close
from dicomnode.spool.journal import FULL

SUFFIX = ".dcm"
# Syncs that wait at a time: a file system serves several by one write of its own journal. On ext4,
# of 64 slices of 0.5 MB, 0.5 ms each instead of 0.9; 0.25 ms of CPU, 0.09 of them to write.
SYNCS = 8
# Files open at a time.
OPEN = 64


@dataclass(frozen=True, slots=True)
class Pixels:
    """One Instance that is to be held: a DICOM Part 10 file, and whose."""

    study_uid: str
    series_uid: str
    sop_instance_uid: str
    data: Bytes


@dataclass(frozen=True, slots=True)
class HeldSeries:
    """A Series of which something is held."""

    study_uid: str
    series_uid: str
    changed_at: datetime  # when a file was last added


class Held:
    """A folder of held pixels. One process puts and drops, any number read."""

    def __init__(self, path: Path, disk: Disk | None = None) -> None:
        self.path = path.absolute()
        self._disk = disk or Disk()
        self._pool: ThreadPoolExecutor | None = None

    def make(self) -> None:
        """Make the folder, on stable storage.

        Raises
        ------
        OSError
            If the disk does not let us.
        """
        self._disk.make_directory(self.path)

    def close(self) -> None:
        """Let its threads end."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def put(self, instances: Sequence[Pixels]) -> None:
        """Return once all of these are on stable storage and will survive a power cut.

        One that is there already is replaced as a whole: who reads it meanwhile gets either.

        Raises
        ------
        HeldUnavailable
            If the disk takes no more. Some may be there.
        OSError
            If something else is in the way, of one of these or of all.
        ValueError
            If a UID is none: it may not become part of a path.
        """
        # Of the same Instance the last one counts, as in the database.
        files = list({self._file(one): one.data for one in instances}.items())
        folders = list(dict.fromkeys(file.parent for file, _ in files))
        try:
            for folder in folders:
                self._disk.make_directory(folder)
            for start in range(0, len(files), OPEN):
                self._write(files[start : start + OPEN])
            for folder in folders:
                self._disk.sync_directory(folder)
        except OSError as exc:
            if exc.errno in FULL:
                raise HeldUnavailable(f"{self.path}: {exc.strerror}") from exc
            raise

    def check(self) -> None:
        """Return where the disk takes anything: it is then one Series that is in its own way.

        Raises
        ------
        HeldUnavailable
            If it takes nothing.
        """
        try:
            self._write([(self.path / "check", b"check")])
            self._disk.unlink(self.path / "check")
        except OSError as exc:
            raise HeldUnavailable(f"{self.path}: {exc.strerror}") from exc

    def instances(self, study_uid: str, series_uid: str) -> dict[str, Path]:
        """Return SOP Instance UID -> file of what is held of a Series.

        Raises
        ------
        ValueError
            If a UID is none.
        """
        folder = self._folder(study_uid, series_uid)
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            return {}
        return {n.removesuffix(SUFFIX): folder / n for n in names if _is_instance(n)}

    def series(self) -> Iterator[HeldSeries]:
        """Yield each Series of which something is held, in no order."""
        for study in _folders(self.path):
            for series in _folders(study):
                with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
                    changed_at = datetime.fromtimestamp(series.stat().st_mtime, UTC)
                    yield HeldSeries(study.name, series.name, changed_at)

    def drop(self, study_uid: str, series_uid: str) -> None:
        """Forget what is held of a Series; a second time does no harm.

        Not made durable: what a power cut brings back is dropped again.
        """
        folder = self._folder(study_uid, series_uid)
        with contextlib.suppress(FileNotFoundError):
            for file in sorted(folder.iterdir()):
                self._disk.unlink(file)
            folder.rmdir()
        with contextlib.suppress(OSError):  # another Series of the Study is there
            folder.parent.rmdir()

    def free_bytes(self) -> int:
        """Return the bytes an unprivileged process can still write to the disk."""
        return self._disk.free_bytes(self.path)

    def _folder(self, study_uid: str, series_uid: str) -> Path:
        if not (admission.is_uid(study_uid) and admission.is_uid(series_uid)):
            raise ValueError("no UID, so no name of a folder")
        return self.path / study_uid / series_uid

    def _file(self, one: Pixels) -> Path:
        if not admission.is_uid(one.sop_instance_uid):
            raise ValueError("no UID, so no name of a file")
        return self._folder(one.study_uid, one.series_uid) / f"{one.sop_instance_uid}{SUFFIX}"

    def _write(self, files: Sequence[tuple[Path, Bytes]]) -> None:
        """Write files beside their names, sync all of them, and only then give them their names."""
        opened: dict[Path, int] = {}
        try:
            for file, data in files:
                part = file.with_name(f".{file.name}.part")
                self._disk.unlink(part)  # of a process that died
                opened[part] = self._disk.create(part)
                self._disk.write(opened[part], [data], 0)
            self._sync(list(opened.values()))
            for part, (file, _) in zip(opened, files, strict=True):
                self._disk.rename(part, file)
        except BaseException:
            for part in opened:
                with contextlib.suppress(OSError):
                    self._disk.unlink(part)
            raise
        finally:
            for fd in opened.values():
                close(fd)

    def _sync(self, fds: Sequence[int]) -> None:
        if len(fds) == 1:
            self._disk.sync(fds[0])
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(SYNCS, "hold")
        # All are waited for, whichever fails: afterwards they are closed.
        syncs = [self._pool.submit(self._disk.sync, fd) for fd in fds]
        failed = [exc for sync in syncs if (exc := sync.exception()) is not None]
        if failed:
            raise failed[0]


def _folders(path: Path) -> Iterator[Path]:
    try:
        with os.scandir(path) as found:
            names = [e.name for e in found if admission.is_uid(e.name) and e.is_dir()]
    except FileNotFoundError:
        return
    yield from (path / name for name in names)


def _is_instance(name: str) -> bool:
    return name.endswith(SUFFIX) and admission.is_uid(name.removesuffix(SUFFIX))
