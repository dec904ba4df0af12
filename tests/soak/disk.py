"""A disk whose power can be cut: a file system of its own that forgets what was not synced.

The ioctl is what the file systems' own crash tests use (xfstests, `_scratch_shutdown`): the file
system stops at once, and neither dirty pages nor its log are written. What it had handed to the
device counts as written, synced or not: an order of writes within a device is not tried.
A sync that is under way while the ioctl is may return though it was in vain (Linux 6.18: 2 of 9116
writes to a preallocated file, both within the 3 ms of it): what was acknowledged from the beginning
of `cut` on proves nothing. Nobody hears an acknowledgement that was given after a power cut.
"""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

# linux/fs/ext4/ext4.h: EXT4_IOC_SHUTDOWN = _IOR('X', 125, __u32), EXT4_GOING_FLAGS_NOLOGFLUSH
SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2


class Disk:
    """ext4 in a file, mounted at `path`."""

    def __init__(self, image: Path, path: Path) -> None:
        self.path, self._image = path, image

    def cut(self) -> None:
        """Stop writing now, as if the power had failed."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def restore(self) -> None:
        """Bring it back as a start after the cut finds it; nobody may hold a file open."""
        _run("umount", str(self.path))
        self.mount()

    def mount(self) -> None:
        """Mount it, which replays what its log holds."""
        _run("mount", "-o", "loop", str(self._image), str(self.path))


@contextlib.contextmanager
def mounted(folder: Path, size_mib: int) -> Iterator[Disk]:
    """Give an empty disk.

    Raises
    ------
    RuntimeError
        If this machine does not permit it: mounting needs root, a loop device and ext4.
    """
    if os.getuid() != 0:
        raise RuntimeError("mounting a file system needs root")
    if shutil.which("mkfs.ext4") is None:
        raise RuntimeError("mkfs.ext4 is not installed")
    image, path = folder / "disk.img", folder / "disk"
    path.mkdir(parents=True)
    with open(image, "wb") as file:
        file.truncate(size_mib << 20)
    _run("mkfs.ext4", "-q", str(image))
    disk = Disk(image, path)
    disk.mount()
    try:
        yield disk
    finally:
        _run("umount", "--lazy", str(path))
        image.unlink()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
