"""Logging to stderr, as text or as one JSON object a line.

Events are short and constant; data comes in `extra=` and is carried along. Patient attributes
are never logged, neither by us nor by the libraries below.
"""

import json as jsonlib
import logging
import threading
import time
import warnings
from collections.abc import Hashable
from datetime import UTC, datetime
from typing import Any

# At DEBUG both print data sets; at WARNING pydicom quotes the value it warns of.
_LIBRARIES = {
    "pynetdicom": logging.WARNING,
    "pydicom": logging.ERROR,
    "alembic": logging.WARNING,  # a dozen lines about itself at each start
    # Below, both tell whole URLs: a patient, a token.
    "httpx2": logging.WARNING,
    "httpcore2": logging.WARNING,
    # Whatever it says of a request, a stranger can make it say; what matters is told by `web`.
    "uvicorn": logging.CRITICAL,
}
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def setup(level: str, json: bool) -> None:
    """Send what is logged at `level` ("INFO", ...) and above to stderr, and nowhere else."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if json else TextFormatter())
    # A filter, not a level: pydicom sets the level of its logger when it is imported.
    handler.addFilter(_may_pass)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", module="pydicom")


class Seldom:
    """Thins out events of one kind that a stranger can cause at will.

    The first of each key deserves a line, then one a while, with their number.
    """

    def __init__(self, seconds: float = 600.0, keys: int = 1000) -> None:
        self._seconds, self._keys = seconds, keys
        self._lock = threading.Lock()
        self._seen: dict[Hashable, tuple[float, int]] = {}  # key -> when told, unsaid since

    def due(self, key: Hashable) -> int:
        """Count an event; return how many its line stands for, 0 where none is due."""
        now = time.monotonic()
        with self._lock:
            told, unsaid = self._seen.get(key, (-self._seconds, 0))
            if now - told < self._seconds:
                self._seen[key] = (told, unsaid + 1)
                return 0
            self._seen.pop(key, None)
            if len(self._seen) >= self._keys:
                del self._seen[next(iter(self._seen))]  # told longest ago
            self._seen[key] = (now, 0)
            return unsaid + 1


class JSONFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, then what came in `extra=`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line = {
            "time": _time(record).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return jsonlib.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The same for a terminal: `time LEVEL logger: event key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text, with the traceback beneath."""
        event = f"{record.name}: {record.getMessage()}"
        data = "".join(f" {key}={value}" for key, value in _extra(record).items())
        line = f"{_time(record):%Y-%m-%d %H:%M:%S} {record.levelname} {event}{data}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _may_pass(record: logging.LogRecord) -> bool:
    return record.levelno >= _LIBRARIES.get(record.name.partition(".")[0], logging.NOTSET)


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
