"""The door through which the spool changes its disk, and a recorder of what goes through it.

Everything that a power cut could undo goes through a `Disk`; `PowerCut` is one that also notes
it, and lays out what a cut at any moment may leave behind.
"""

import contextlib
import errno
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Bytes = bytes | bytearray | memoryview

SECTOR = 512
_IOV_MAX = 1024  # Linux: buffers in one pwritev
_ZEROS = bytes(1 << 20)


class Disk:
    """The calls that change files, for the owner alone: what lies there identifies patients."""

    def make_directory(self, path: Path) -> None:
        """Make a folder, and those above it, on stable storage."""
        if not path.is_dir():
            self.make_directory(path.parent)
            path.mkdir(mode=0o700, exist_ok=True)
            self.sync_directory(path.parent)

    def create(self, path: Path) -> int:
        """Return a descriptor of a new, empty file."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def allocate(self, fd: int, size: int) -> None:
        """Give a file its size, and the blocks for it."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, size)
                return
            except OSError as exc:
                if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        for start in range(0, size, len(_ZEROS)):  # macOS, and file systems that cannot
            Disk.write(self, fd, [_ZEROS[: size - start]], start)

    def write(self, fd: int, parts: Sequence[Bytes], offset: int) -> None:
        """Write all of the parts, one behind the other; until `sync` they may be lost."""
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        while views:
            written = os.pwritev(fd, views[:_IOV_MAX], offset)
            offset += written
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]

    def sync(self, fd: int) -> None:
        """Bring what was written to a file before this call to stable storage."""
        getattr(os, "fdatasync", os.fsync)(fd)  # macOS has none

    def sync_whole(self, fd: int) -> None:
        """Bring a file to stable storage with all that is known of it."""
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name; until `sync_directory` it may have either."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        """Bring the names in a folder to stable storage."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self, path: Path) -> int:
        """Return the bytes an unprivileged process can still write."""
        disk = os.statvfs(path)
        return disk.f_bavail * disk.f_frsize


@dataclass(slots=True)
class _Step:
    """One change: of the bytes of a file, or of a name. `until` is the step that made it last."""

    kind: str  # "create", "size", "write", "rename", "unlink"
    file: int
    path: Path | None = None
    target: Path | None = None
    offset: int = 0
    data: bytes = b""
    done: bool = True
    until: int | None = None


class PowerCut(Disk):
    """A disk that does what is asked, and can show what a power cut would have left of it.

    The model is harsher than a real file system: what was synced is there; of what was not, each
    sector of 512 bytes has any of the contents it had since, sizes and names any of the states
    since, each file on its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._steps: list[_Step] = []
        self._lock = threading.Lock()
        self._files: dict[Path, int] = {}
        self._opened: dict[int, int] = {}  # inode -> file
        self._count = 0
        for path in sorted(root.rglob("*")):  # what is there is taken to be safe
            if path.is_file():
                self._count += 1
                self._files[path] = self._opened[path.stat().st_ino] = self._count
                data = path.read_bytes()
                self._steps.append(_Step("create", self._count, path, until=-1))
                self._steps.append(_Step("write", self._count, data=data, until=-1))

    @property
    def now(self) -> int:
        """The moment up to which something happened: what `lay_out` wants to be told."""
        with self._lock:
            return len(self._steps)

    def create(self, path: Path) -> int:
        """See `Disk`."""
        with self._lock:
            fd = super().create(path)
            self._count += 1
            self._files[path] = self._opened[os.fstat(fd).st_ino] = self._count
            self._steps.append(_Step("create", self._count, path))
        return fd

    def allocate(self, fd: int, size: int) -> None:
        """See `Disk`."""
        super().allocate(fd, size)
        with self._lock:
            self._steps.append(_Step("size", self._file(fd), offset=size))

    def write(self, fd: int, parts: Sequence[Bytes], offset: int) -> None:
        """See `Disk`."""
        data = b"".join(parts)
        with self._lock:
            step = _Step("write", self._file(fd), offset=offset, data=data, done=False)
            self._steps.append(step)
        super().write(fd, parts, offset)
        step.done = True

    def sync(self, fd: int) -> None:
        """See `Disk`."""
        with self._lock:
            file = self._file(fd)
            covered = [
                step
                for step in self._steps
                if step.file == file and step.kind in ("write", "size") and step.done
            ]
        super().sync(fd)
        with self._lock:
            now = len(self._steps)
            for step in covered:
                step.until = now if step.until is None else step.until
            self._steps.append(_Step("sync", file))

    def rename(self, source: Path, target: Path) -> None:
        """See `Disk`."""
        with self._lock:
            super().rename(source, target)
            file = self._files[target] = self._files.pop(source)
            self._steps.append(_Step("rename", file, source, target))

    def unlink(self, path: Path) -> None:
        """See `Disk`."""
        with self._lock:
            super().unlink(path)
            file = self._files.pop(path, None)
            if file is not None:
                self._steps.append(_Step("unlink", file, path))

    def sync_directory(self, path: Path) -> None:
        """See `Disk`."""
        with self._lock:
            begun = len(self._steps)
        super().sync_directory(path)
        with self._lock:
            now = len(self._steps)
            for step in self._steps[:begun]:
                if step.path is not None and step.path.parent == path and step.until is None:
                    step.until = now
            self._steps.append(_Step("sync", 0))

    def lay_out(self, moment: int, target: Path, rng: random.Random) -> None:
        """Write below `target` one of the states that a cut at that moment may leave."""
        with self._lock:
            steps = self._steps[:moment]
        # How much of what was not synced made it: nothing, all, or anything in between.
        luck = rng.choice((0.0, 1.0, rng.random(), rng.random()))
        for file in sorted({step.file for step in steps if step.file}):
            own = [step for step in steps if step.file == file]
            name = self._name(own, moment, luck, rng)
            if name is None:
                continue
            path = target / name.relative_to(self.root)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._bytes(own, moment, luck, rng))

    def _name(self, own: list[_Step], moment: int, luck: float, rng: random.Random) -> Path | None:
        names = [step for step in own if step.path is not None]
        sure = 0
        for i, step in enumerate(names, 1):
            if step.until is not None and step.until < moment:
                sure = i
        upto = sure + sum(1 for _ in names[sure:] if rng.random() < luck)
        if not upto:
            return None
        last = names[upto - 1]
        return {"create": last.path, "rename": last.target}.get(last.kind)

    def _bytes(self, own: list[_Step], moment: int, luck: float, rng: random.Random) -> bytes:
        data = bytearray()
        loose: list[_Step] = []
        for step in own:
            if step.kind not in ("write", "size"):
                continue
            if step.until is None or step.until >= moment:
                loose.append(step)
            elif step.kind == "size":
                data.extend(bytes(max(0, step.offset - len(data))))
            else:
                _lay(data, step.offset, step.data)
        # Of an unsynced sector any earlier content may be there: the writes to it up to one.
        keep: dict[int, bool] = {}
        for step in loose:
            if step.kind == "size":
                if rng.random() < luck:
                    data.extend(bytes(max(0, step.offset - len(data))))
                continue
            end = step.offset + len(step.data)
            for sector in range(step.offset // SECTOR, -(-end // SECTOR)):
                if keep.setdefault(sector, True) and rng.random() < luck:
                    start, stop = max(step.offset, sector * SECTOR), min(end, (sector + 1) * SECTOR)
                    _lay(data, start, step.data[start - step.offset : stop - step.offset])
                else:
                    keep[sector] = False
        return bytes(data)

    def _file(self, fd: int) -> int:
        return self._opened[os.fstat(fd).st_ino]


def _lay(data: bytearray, offset: int, part: bytes) -> None:
    data.extend(bytes(max(0, offset - len(data))))
    data[offset : offset + len(part)] = part


def close(fd: int) -> None:
    """Close a descriptor, whatever the disk says now."""
    with contextlib.suppress(OSError):
        os.close(fd)
