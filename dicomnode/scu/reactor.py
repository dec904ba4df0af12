"""Keeps pynetdicom's own thread from taking an answer that we wait for."""

import threading
import time

from pynetdicom import Association

HOLD_S = 10.0  # the thread looks a thousand times a second; a busy machine may let it wait


def hold(assoc: Association) -> None:
    """Make sure that the reactor of an association stands still while we wait for an answer.

    pynetdicom takes it for standing still a moment before it does: an answer that is quicker, on a
    machine that is busy, and it takes the answer for a request and drops it (twice in 600 under
    load). It would then be waited for in vain.
    """
    assoc._reactor_checkpoint = _Checkpoint(assoc)


class _Checkpoint(threading.Event):
    """Where the reactor waits while it is clear; who clears it goes on once it does."""

    def __init__(self, assoc: Association) -> None:
        super().__init__()
        self._assoc = assoc
        self._inside = threading.Event()
        self.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, as the reactor does."""
        if self.is_set():
            return True
        self._inside.set()
        return super().wait(timeout)

    def clear(self) -> None:
        """Return once the reactor waits."""
        if not self.is_set():
            return
        # In this order: a reactor on its way out of the wait before passes here once more.
        self._inside.clear()
        super().clear()
        deadline = time.monotonic() + HOLD_S
        while not self._inside.wait(0.05):
            if not self._assoc.is_alive() or time.monotonic() > deadline:
                return
