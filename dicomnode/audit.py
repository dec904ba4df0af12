"""The audit log: who did what to which study, when; apart from the operational log.

One JSON object a line, after the audit messages of PS3.15 A.5: `code` is the Event ID of the
DICOM terminology (DCM) and `type` the Event Type Code, so that a line can be turned into such a
message. It names AE titles, addresses, certificates, users and UIDs, never a patient attribute.
"""

import getpass
import json
import logging
import os
import threading
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# EventOutcomeIndicator, PS3.15 Table A.5.2-1
SUCCESS = 0
MINOR_FAILURE = 4


class Act(Enum):
    """What is recorded: our name of it, Event ID and Event Type Code (PS3.16), action code.

    The action code is that of PS3.15 A.5.2: Create, Read, Update, Delete, Execute.
    """

    STARTED = ("started", "110100", "110120", "E")  # Application Activity, Application Start
    STOPPED = ("stopped", "110100", "110121", "E")  # Application Activity, Application Stop
    # Begin Transferring DICOM Instances; an echo alone is an association too.
    ASSOCIATION_OPENED = ("association opened", "110102", None, "E")
    ASSOCIATION_ENDED = ("association ended", "110104", None, "C")  # DICOM Instances Transferred
    INSTANCES_SENT = ("instances sent", "110104", None, "R")  # DICOM Instances Transferred
    SERIES_RECEIVED = ("series received", "110103", None, "C")  # DICOM Instances Accessed
    # Security Alert, Node Authentication
    CONNECTION_REFUSED = ("connection refused", "110113", "110126", "E")
    ASSOCIATION_REJECTED = ("association rejected", "110113", "110126", "E")
    LINES_LOST = ("audit lines lost", "110113", None, "E")
    # DICOM Instances Accessed, of which there is no deletion but this one
    REJECTED = ("instances rejected", "110103", None, "D")
    DROPPED = ("deliveries dropped", "110106", None, "E")
    REQUEUED = ("deliveries requeued", "110106", None, "E")  # Export
    QUERY = ("query", "110112", None, "E")
    RETRIEVE = ("retrieve", "110104", None, "C")  # DICOM Instances Transferred
    IMPORT = ("import", "110107", None, "C")
    PATIENTS_LINKED = ("patients linked", "110110", None, "U")  # Patient Record
    PATIENTS_UNLINKED = ("patients unlinked", "110110", None, "U")
    MESSAGE_REFUSED = ("message refused", "110110", None, "U")
    EXPORT = ("export", "110106", None, "R")
    # User Authentication, Login and Logout
    SIGNED_IN = ("signed in", "110114", "110122", "E")
    SIGNED_OUT = ("signed out", "110114", "110123", "E")
    # User Authentication, Login; Security Alert, Use of Restricted Function
    SIGN_IN_REFUSED = ("sign-in refused", "110114", "110122", "E")
    REQUEST_REFUSED = ("request refused", "110113", "110132", "E")

    def __init__(self, event: str, code: str, type_code: str | None, action: str) -> None:
        self.event, self.code, self.type_code, self.action = event, code, type_code, action


class AuditLog:
    """Appends to one file that any number of processes share.

    A line is one write in append mode, so that lines of two processes do not mix. The file is
    opened anew once it was moved away (logrotate). Nothing here raises or waits: a line that the
    disk does not take is counted, the operational log says so once, and the count is written
    when the disk takes lines again.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path.absolute() if path is not None else None
        self.lost = 0
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._torn = False

    def write(self, act: Act, outcome: int = SUCCESS, **data: Any) -> bool:
        """Record an act; return whether the line is in the file.

        Parameters
        ----------
        act
            What was done.
        outcome
            EventOutcomeIndicator: 0 where it went well, 4 where it was refused or failed.
        **data
            Who, from where, to what. Never a patient attribute. What is None is left out.
        """
        if self.path is None:
            return False
        with self._lock:
            if self.lost and self._append(Act.LINES_LOST, MINOR_FAILURE, {"count": self.lost}):
                logger.info("audit written again", extra={"lost": self.lost})
                self.lost = 0
            if not self.lost and self._append(act, outcome, data):
                return True
            self.lost += 1
            return False

    def check(self) -> None:
        """Try whether lines can be written, without writing one.

        Raises
        ------
        OSError
            If they cannot.
        """
        if self.path is not None:
            with self._lock:
                self._open()

    def close(self) -> None:
        """Let go of the file; the next line opens it again."""
        with self._lock:
            self._close()

    def _append(self, act: Act, outcome: int, data: dict[str, Any]) -> bool:
        line = {
            "time": datetime.now(UTC).isoformat(),
            "event": act.event,
            "code": act.code,
            "type": act.type_code,
            "action": act.action,
            "outcome": outcome,
            "pid": os.getpid(),
            **data,
        }
        given = {key: value for key, value in line.items() if value is not None}
        text = json.dumps(given, default=str).encode() + b"\n"
        try:
            fd = self._open()
            # What was cut short, by us or by a process that died, ends there.
            whole = b"\n" + text if self._torn else text
            written = os.write(fd, whole)
            self._torn = written < len(whole)
            if self._torn:
                raise OSError(0, "the line was cut short")
        except OSError as exc:
            self._close()
            if not self.lost:
                logger.error(
                    "audit not written", extra={"file": str(self.path), "reason": exc.strerror}
                )
            return False
        return True

    def _open(self) -> int:
        assert self.path is not None
        if self._fd is not None:
            try:
                now = os.stat(self.path)
            except FileNotFoundError:
                self._close()
            else:
                ours = os.fstat(self._fd)
                if (now.st_dev, now.st_ino) != (ours.st_dev, ours.st_ino):
                    self._close()
        if self._fd is None:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(self.path, flags, 0o600)
            end = os.fstat(self._fd).st_size
            self._torn = end > 0 and os.pread(self._fd, 1, end - 1) != b"\n"
        return self._fd

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def user() -> str:
    """Return the name of the operating-system user of this process, or its number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container it may have none
        return str(os.getuid())
