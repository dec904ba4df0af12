"""How often a stranger may do something before it is counted and no more than that."""

import threading
import time
from collections.abc import Hashable


class Allowance:
    """So many at once for each key, and one more after each while; memory is bounded.

    Keys that were not heard of for longest are forgotten first.
    """

    def __init__(self, burst: int, seconds: float, keys: int = 1000) -> None:
        self._burst, self._seconds, self._keys = burst, seconds, keys
        self._lock = threading.Lock()
        self._left: dict[Hashable, tuple[float, float]] = {}  # key -> left, when that was

    def take(self, key: Hashable) -> bool:
        """Take one, and return whether there was one left to take."""
        now = time.monotonic()
        with self._lock:
            left, then = self._left.pop(key, (float(self._burst), now))
            left = min(float(self._burst), left + (now - then) / self._seconds)
            taken = left >= 1.0
            if len(self._left) >= self._keys:
                del self._left[next(iter(self._left))]
            self._left[key] = (left - 1.0 if taken else left, now)
            return taken
