"""How the parts of a node stand, in a sentence each: the tiles of the live page."""

import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from dicomnode import store
from dicomnode.errors import NodeError
from dicomnode.held import Held
from dicomnode.model import DeliveryState, FetchState
from dicomnode.spool import pulse
from dicomnode.spool.survey import survey
from dicomnode.web.part import Part
from dicomnode.web.words import ago

SPOOL_S = 3.0  # between looks into the spool, which reads as much as waits
HELD_S = 30.0  # between looks at held pixels: as many folders as there are Series
QUEUE_S = 600.0  # so long what arrived first may wait
SILENT_S = 60.0  # so long a worker may say nothing: no step of it takes longer
OVERDUE_S = 600.0  # so long after its time a delivery may wait: for a turn, not for nobody
SAID = {
    "database": ("Database", "answers", "does not answer"),
    "spool": ("Spool", "takes what is sent", "takes nothing: no room, or no such folder"),
    "worker": ("Worker", "at work", "does not run: what is sent waits in the spool"),
}

Tile = dict[str, Any]


def tile(name: str, said: str, *, fine: bool = True) -> Tile:
    """Return a tile; one that is not `fine` is for somebody to look at."""
    return {"name": name, "fine": fine, "said": said}


def check(name: str, fine: bool) -> Tile:
    """Return one of the checks that probes ask for."""
    title, yes, no = SAID[name]
    return tile(title, yes if fine else no, fine=fine)


def device(part: Part, worker: bool, now: datetime) -> Tile:
    """Return what the worker says of its device, where one is there to say it."""
    if not worker:
        return tile("Device", f"no worker is on it ({part.settings.score.device})", fine=False)
    found = pulse.read(part.settings.spool.path)
    if found is None:
        return tile("Device", "the worker starts")
    name = f"{found.device}: " if found.device else ""
    if (silent_s := (now - found.at).total_seconds()) > SILENT_S:
        return tile("Device", f"{name}nothing heard of it for {ago(silent_s)}", fine=False)
    if found.waits is not None:
        # What a device says of itself begins with its name.
        name = "" if found.device and found.waits.startswith(found.device.split(",")[0]) else name
        lasts = ago((now - found.since).total_seconds())
        return tile("Device", f"{name}{found.waits}, for {lasts}", fine=False)
    return tile("Device", found.device or "the worker starts")


def deliveries(session: Session, now: datetime) -> Tile:
    """Return what waits to go out, and what was given up."""
    counts = store.count_undelivered(session)
    failed, waiting = counts.get(DeliveryState.FAILED, 0), counts.get(DeliveryState.WAITING, 0)
    said = f"{waiting:,} waiting" + (f", {failed:,} given up" if failed else "")
    due_at = store.next_delivery_at(session)
    late_s = (now - due_at).total_seconds() if due_at else 0.0
    if late_s > OVERDUE_S:
        said += f", overdue for {ago(late_s)}: does the exchange run?"
    return tile("Deliveries", said, fine=not failed and late_s <= OVERDUE_S)


def fetches(part: Part, session: Session, now: datetime) -> Tile | None:
    """Return what peers are asked for, and whom nobody reaches; None where nobody ever is.

    What was given up long ago is no news.
    """
    turns = store.list_turns(session)
    peers = {*part.settings.priors.asked, *(turn.peer for turn in turns)}
    if not peers:
        return None
    counts = store.count_fetches(session, peers, now - timedelta(days=1))
    failed = counts.pop(FetchState.FAILED, 0)
    said = f"{sum(counts.values()):,} asked for" + (f", {failed:,} given up" if failed else "")
    away = [turn.peer for turn in turns if turn.failures]
    if away:
        said += f"; not reached: {', '.join(away)}"
    return tile("Fetches", said, fine=not failed and not away)


def quarantine(session: Session) -> Tile:
    """Return how many files wait for somebody to look at them."""
    count = sum(store.count_quarantined(session).values())
    said = f"{count:,} file{'s' if count > 1 else ''} to look at" if count else "empty"
    return tile("Quarantine", said, fine=not count)


class Kept:
    """A tile that takes some reading, kept for a moment: open pages ask every few seconds."""

    def __init__(self, look: Callable[[Part], Tile | None], fresh_s: float) -> None:
        self._look, self._fresh_s = look, fresh_s
        self._looking = threading.Lock()
        self._found: tuple[float, Tile | None] = -math.inf, None

    def of(self, part: Part) -> Tile | None:
        """Return what is shown of it."""
        then, found = self._found
        # One looks, the others are told what was found last: a long queue takes long to read.
        if time.monotonic() - then > self._fresh_s and self._looking.acquire(blocking=False):
            try:
                found = self._look(part)
                self._found = time.monotonic(), found
            finally:
                self._looking.release()
        return found


def queue() -> Kept:
    """Return the tile of what waits in the spool."""
    return Kept(_queue, SPOOL_S)


def held() -> Kept:
    """Return the tile of pixels that rules may still want."""
    return Kept(_held, HELD_S)


def _queue(part: Part) -> Tile:
    try:
        parts = survey(part.settings.spool.path, ("incoming",))
    except (NodeError, OSError):
        return tile("Queue", "the spool cannot be read", fine=False)
    waiting = sum(p.waiting for p in parts)
    if not waiting:
        return tile("Queue", "nothing waits")
    said = f"{waiting:,} waiting, {sum(p.waiting_bytes for p in parts) / 1e6:,.1f} MB"
    oldest = min((p.oldest for p in parts if p.oldest), default=None)
    waits_s = (datetime.now(UTC) - oldest).total_seconds() if oldest else 0.0
    return tile("Queue", f"{said}, for {ago(waits_s)}", fine=waits_s <= QUEUE_S)


def _held(part: Part) -> Tile | None:
    settings = part.settings
    try:
        found = [series.changed_at for series in Held(settings.held_path).series()]
    except OSError:
        return tile("Held pixels", "the folder cannot be read", fine=False)
    if not found:
        return tile("Held pixels", "none") if settings.holds else None
    lasts = ago((datetime.now(UTC) - min(found)).total_seconds())
    return tile("Held pixels", f"{len(found):,} Series, the oldest for {lasts}")
