"""Logging to stderr, as text or as one JSON object a line.

Events are short and constant; data comes in `extra=` and is carried along. Patient attributes
are never logged, neither by us nor by the libraries below.
"""

import json as jsonlib
import logging
import warnings
from datetime import UTC, datetime
from typing import Any

# At DEBUG both print data sets; at WARNING pydicom quotes the value it warns of.
_LIBRARIES = {
    "pynetdicom": logging.WARNING,
    "pydicom": logging.ERROR,
    "alembic": logging.WARNING,  # a dozen lines about itself at each start
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
