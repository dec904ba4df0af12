"""Whether this process lives, and whether the node can do its work: for probes, without a token.

They say yes or no and nothing of patients, and are worked out once a second at most.
"""

import fcntl
import math
import os
import threading
import time
from pathlib import Path

from fastapi import APIRouter, Request, Response

from db import migrate
from dicomnode import store
from dicomnode.errors import NodeError
from dicomnode.spool.disk import Disk
from dicomnode.web.models import Readiness
from dicomnode.web.part import Part, part_of

router = APIRouter(tags=["health"])

FRESH_S = 1.0
STALE_S = 5.0  # so long in looking, the database counts as away


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Answer, which is all there is to it."""
    return {"status": "ok"}


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
def readyz(request: Request) -> Response:
    """Return whether database, spool and worker are there; 503 where one is not."""
    found = request.app.state.readiness.of(part_of(request))
    return Response(
        found.model_dump_json(), 200 if found.ready else 503, media_type="application/json"
    )


class Checks:
    """What was found last, kept for a moment: strangers may ask as often as they like."""

    def __init__(self) -> None:
        self._looking = threading.Lock()
        self._found = -math.inf, Readiness(ready=False, checks={})

    def of(self, part: Part) -> Readiness:
        """Return how the node stands."""
        then, found = self._found
        # One looks, the others are told what was found last: a database that does not answer
        # must not hold every thread there is.
        if time.monotonic() - then > FRESH_S and self._looking.acquire(blocking=False):
            try:
                checks = {
                    "database": _database(part),
                    "spool": _spool(part),
                    "worker": _worker(part.settings.spool.path),
                }
                found = Readiness(ready=all(checks.values()), checks=checks)
                self._found = time.monotonic(), found
            finally:
                self._looking.release()
        elif time.monotonic() - then > STALE_S:
            return Readiness(ready=False, checks={**found.checks, "database": False})
        return found


def _database(part: Part) -> bool:
    try:
        with store.available():
            migrate.check(part.engine)
    except (NodeError, migrate.SchemaError):
        return False
    return True


def _spool(part: Part) -> bool:
    path = part.settings.spool.path
    try:
        is_there = os.access(path, os.W_OK | os.X_OK)
        return is_there and Disk().free_bytes(path) >= part.settings.refuse_below_bytes
    except OSError:
        return False


def _worker(spool: Path) -> bool:
    """Whether a worker holds the spool's lease, which the kernel takes from one that dies."""
    try:
        fd = os.open(spool / ".lease", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared, and let go of at once: a worker that wants it in that moment tries again.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False
