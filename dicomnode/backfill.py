"""Back-fill from files, through the same spool and stages as what is sent."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from dicomnode import dicomio, store
from dicomnode.config import Settings
from dicomnode.errors import ConfigError
from dicomnode.model import SeriesState
from dicomnode.node import serve
from dicomnode.spool import Spool

# Files that wait in the spool at a time: enough to keep the device busy, few enough for the disk.
AHEAD = 512


@dataclass(frozen=True, slots=True)
class Summary:
    """What a back-fill did, and what the database now holds."""

    files: int
    skipped: int  # no DICOM Part 10 files
    curves: int
    pairs: int


def run(
    paths: list[Path], settings: Settings, progress: Callable[[int], None] = lambda n: None
) -> Summary:
    """Put every file under the paths through the node's stages, and wait until they are done.

    Raises
    ------
    SpoolFull
        If the disk of the spool has no room; start again when it has: a repeat does no harm.
    """
    try:
        with serve.opened_worker(settings) as (worker, spool, engine):
            count = _feed(paths, spool, progress, worker.step)
            _settle(worker, settings.series.quiet_seconds)
            return _summary(engine, *count)
    except ConfigError as exc:
        if "another worker" not in str(exc):
            raise
    # A running node has the lease: it works, we feed it.
    spool = Spool(settings.spool.path, settings.spool.reserve_bytes)
    count = _feed(paths, spool, progress, lambda: time.sleep(0.2))
    with store.opened(settings.database.url) as engine:
        while _busy(engine) or spool.pending(1):
            time.sleep(0.2)
        return _summary(engine, *count)


def _feed(
    paths: list[Path],
    spool: Spool,
    progress: Callable[[int], None],
    work: Callable[[], object],
) -> tuple[int, int]:
    """Return (files taken, files skipped)."""
    association_id = secrets.token_hex(8)
    taken = skipped = waiting = 0
    for path in dicomio.find(paths):
        progress(1)
        data = path.read_bytes()
        if data[128:132] != b"DICM":  # an archive's own files among its images are no loss
            skipped += 1
            continue
        spool.put(data, association_id)
        taken += 1
        waiting += 1
        if waiting >= AHEAD:
            while len(spool.pending(AHEAD // 2)) >= AHEAD // 2:
                work()
            waiting = AHEAD // 2
    spool.put_event(association_id, "released")
    while spool.pending(1):
        work()
    return taken, skipped


def _settle(worker: serve.Worker, quiet_seconds: float) -> None:
    """Step until what was taken has been quiet for long enough to be finished and aligned."""
    deadline = time.monotonic() + quiet_seconds + 1.0
    while worker.step() or time.monotonic() < deadline:
        time.sleep(0.05)


def _busy(engine: Engine) -> bool:
    with store.reading(engine) as session:
        return bool(store.open_series(session) or store.pending_offsets(session, 1))


def _summary(engine: Engine, taken: int, skipped: int) -> Summary:
    with store.reading(engine) as session:
        curves = store.count_series(session).get(SeriesState.CURVE, 0)
        return Summary(taken, skipped, curves, store.count_offsets(session))
