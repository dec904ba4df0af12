"""Back-fill from files, through the same spool and stages as what is sent."""

import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from sqlalchemy import Engine

from dicomnode import dicomio, store
from dicomnode.config import Settings
from dicomnode.errors import SpoolBusy
from dicomnode.model import SeriesState, SpooledEvent
from dicomnode.node import serve
from dicomnode.spool import Spool

# Files that wait in the spool at a time: enough to keep the device busy, few enough for the disk.
AHEAD = 512
LOOK_S = 0.2


@dataclass(slots=True)
class Summary:
    """What a back-fill did, and what the database now holds."""

    files: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # why -> files
    curves: int = 0
    pairs: int = 0


def run(
    paths: list[Path], settings: Settings, progress: Callable[[int], None] = lambda n: None
) -> Summary:
    """Put every file under the paths through the node's stages, and wait until they are done.

    A node that runs on the same spool does the work; otherwise it is done here.

    Raises
    ------
    SpoolFull
        If the disk of the spool has no room; start again when it has: a repeat does no harm.
    """
    summary = Summary()
    ends: list[SpooledEvent] = []
    fed = False
    while True:
        try:
            with serve.opened_worker(settings) as (worker, spool, engine):
                if not fed:
                    ends = _feed(paths, spool, summary, progress, worker.step)
                while _is_waiting(spool, engine, ends):
                    if not worker.step():
                        time.sleep(LOOK_S)
                while worker.step():  # the offsets that follow from the last curve
                    pass
                return _with_counts(engine, summary)
        except SpoolBusy:
            pass
        with contextlib.closing(Spool.of(settings.spool)) as spool:
            if not fed:
                ends = _feed(paths, spool, summary, progress, lambda: time.sleep(LOOK_S))
                fed = True
            with store.opened(settings.database.url) as engine:
                if not _is_waiting(spool, engine, ends):
                    return _with_counts(engine, summary)
        time.sleep(LOOK_S)  # should the node stop, the next round finds its lease free


def _feed(
    paths: list[Path],
    spool: Spool,
    summary: Summary,
    progress: Callable[[int], None],
    work: Callable[[], object],
) -> list[SpooledEvent]:
    """Spool every DICOM file, each folder as an association of its own, and return their ends."""
    ends: list[SpooledEvent] = []
    waiting = 0
    for _, folder in groupby(dicomio.find(paths), key=lambda path: path.parent):
        association_id = secrets.token_hex(8)
        try:
            for path in folder:
                progress(1)
                data = _part10(path, summary)
                if data is None:
                    continue
                spool.put(data, association_id)
                summary.files += 1
                waiting += 1
                if waiting >= AHEAD:
                    while len(spool.pending(AHEAD // 2)) >= AHEAD // 2:
                        work()
                    waiting = AHEAD // 2
        finally:
            ends.append(spool.put_event(association_id, "released"))
            waiting += 1
    return ends


def _part10(path: Path, summary: Summary) -> bytes | None:
    """The bytes of a DICOM Part 10 file; of another, None, and why it was skipped."""
    if not path.is_file():  # a dangling link, a pipe
        summary.skipped["no regular file"] += 1
        return None
    try:
        with open(path, "rb") as file:
            head = file.read(132)
            if head[128:] != b"DICM":  # an archive's own files among its images are no loss
                summary.skipped["no DICOM"] += 1
                return None
            return head + file.read()
    except OSError as exc:
        summary.skipped[exc.strerror or "not readable"] += 1
        return None


def _is_waiting(spool: Spool, engine: Engine, ends: list[SpooledEvent]) -> bool:
    """Whether something that was fed is not in a finished Series yet."""
    if any(spool.waits(end) for end in ends):
        return True
    with store.reading(engine) as session:
        return any(store.is_waiting(session, end.association_id) for end in ends)


def _with_counts(engine: Engine, summary: Summary) -> Summary:
    with store.reading(engine) as session:
        summary.curves = store.count_series(session).get(SeriesState.CURVE, 0)
        summary.pairs = store.count_offsets(session)
    return summary
