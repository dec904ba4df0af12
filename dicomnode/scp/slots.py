"""Counts that several processes share and that a crash cannot spoil.

A slot is a lock on an empty file: the kernel frees it with the process that held it.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class Slot:
    """One of the slots; held until it is released or its process ends."""

    def __init__(self, index: int, fd: int) -> None:
        self.index = index
        self._fd: int | None = fd

    def release(self) -> None:
        """Give it back; a second time does no harm."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class Slots:
    """So many slots of one name, in a folder that the processes have in common."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self._folder, self._name, self._count = folder, name, count
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def take(self) -> Slot | None:
        """Return the first slot that nobody holds; None where all are held.

        Raises
        ------
        OSError
            If the folder cannot be written.
        """
        for index in range(self._count):
            if slot := self._lock(index):
                return slot
        return None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the other processes from this block meanwhile."""
        with open(self._folder / f"{self._name}.lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def left_behind(self) -> Iterator[Slot]:
        """Take each slot that was held once and is not any more; forget it when it is released.

        Only within `alone`, where `take` is called there too.
        """
        for path in sorted(self._folder.glob(f"{self._name}-*")):
            index = int(path.name.rpartition("-")[2])
            if slot := self._lock(index):
                try:
                    yield slot
                    path.unlink()
                finally:
                    slot.release()

    def _lock(self, index: int) -> Slot | None:
        path = self._folder / f"{self._name}-{index}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return Slot(index, fd)
