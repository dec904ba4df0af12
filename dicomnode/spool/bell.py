"""Tells the worker that something was put, whichever process did: a byte in a named pipe.

Nothing depends on it but how soon the worker looks: a spool on a file system without pipes is
looked at in small steps.
"""

import contextlib
import os
import select
import threading
import time
from pathlib import Path

from dicomnode.spool.disk import close

STEP_S = 0.05  # between looks where nobody rings


class Bell:
    """Rung by those who put, heard by the one that holds the lease."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ringing = self._listening = -1
        # A descriptor that one thread closes must not be written to by another: it may be a file by
        # then.
        self._lock = threading.Lock()

    def ring(self) -> None:
        """Wake whoever listens; without one, nothing happens."""
        # Nobody listens (ENXIO), or it rings already (EAGAIN).
        with self._lock, contextlib.suppress(OSError):
            if self._ringing < 0:
                self._ringing = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(self._ringing, b"\n")
            except BrokenPipeError:  # who listened is gone; the next one may have made it anew
                fd, self._ringing = self._ringing, -1
                close(fd)

    def listen(self) -> None:
        """Hear every ring from now on."""
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileExistsError):
                os.mkfifo(self._path, 0o600)
            # For writing too, so that it stays open when those who ring go.
            self._listening = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def wait(self, seconds: float) -> None:
        """Return when it was rung since the last call, or after so many seconds."""
        if self._listening < 0:
            time.sleep(min(seconds, STEP_S))
            return
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        if poll.poll(max(0.0, seconds) * 1000):
            with contextlib.suppress(BlockingIOError):
                while len(os.read(self._listening, 1 << 16)) == 1 << 16:
                    pass

    def close(self) -> None:
        """Let go of both ends."""
        with self._lock:
            for fd in (self._ringing, self._listening):
                if fd >= 0:
                    close(fd)
            self._ringing = self._listening = -1
