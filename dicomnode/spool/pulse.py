"""What the worker at a spool says of itself: on which device it works, and whether it goes on.

One small file beside the lease, which says only that there is a worker. It is rewritten where
something changed; its time of change says when the worker was last heard of, so that a full disk
does not make a worker look dead.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

FILE = ".worker.json"
BEAT_S = 5.0  # between signs of life


@dataclass(frozen=True, slots=True)
class Pulse:
    """How a worker stands, as it said last."""

    device: str | None  # with its name and dtype; None: it does not know yet
    waits: str | None  # why it does not go on; None: it does
    since: datetime  # that it stands so
    at: datetime  # when it was last heard of


class Sign:
    """Says how this worker stands. That a file cannot be written is no reason not to work."""

    def __init__(self, spool: Path) -> None:
        self._path = spool / FILE
        self._device: str | None = None
        self._said: tuple[str | None, str | None] | None = None
        self._beat_at = 0.0

    def works_on(self, device: str) -> None:
        """Say on which device it works."""
        self._device = device
        self.goes_on()

    def goes_on(self) -> None:
        """Say that it goes on; often, it costs little."""
        self._say(None)

    def waits(self, why: str) -> None:
        """Say why it does not go on."""
        self._say(why)

    def _say(self, waits: str | None) -> None:
        now = time.monotonic()
        is_new = self._said != (self._device, waits)
        if not is_new and now - self._beat_at < BEAT_S:
            return
        self._beat_at = now
        with contextlib.suppress(OSError):
            if is_new or not self._path.exists():
                since = datetime.now(UTC).isoformat()
                part = self._path.with_suffix(".part")
                values = {"device": self._device, "waits": waits, "since": since}
                part.write_text(json.dumps(values))
                os.replace(part, self._path)
                self._said = self._device, waits
            else:
                os.utime(self._path)


def forget(spool: Path) -> None:
    """Forget what a worker of before said."""
    with contextlib.suppress(OSError):
        (spool / FILE).unlink()


def read(spool: Path) -> Pulse | None:
    """Return what the worker at a spool said last, None where it said nothing."""
    path = spool / FILE
    try:
        with open(path, encoding="utf-8") as file:
            at = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
            values = json.load(file)
        since = datetime.fromisoformat(values["since"])
        return Pulse(values["device"], values["waits"], since, at)
    except (OSError, ValueError, KeyError, TypeError):
        return None
