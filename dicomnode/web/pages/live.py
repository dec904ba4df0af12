"""What arrives now, how the node stands, and what came today."""

import math
import threading
import time
from datetime import UTC, datetime
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from dicomnode import store
from dicomnode.core import region
from dicomnode.errors import NodeError
from dicomnode.log import Seldom
from dicomnode.model import DeliveryState, PatientKey, SeriesState
from dicomnode.spool.survey import survey
from dicomnode.store import SeriesRow
from dicomnode.web.pages.route import Posted, Visitor, pages, show
from dicomnode.web.part import Part
from dicomnode.web.problem import Problem

router = pages()

ROWS = 40
SPOOL_S = 3.0  # between looks into the spool, which reads as much as waits
SAID = {
    "database": ("Database", "answers", "does not answer"),
    "spool": ("Spool", "takes what is sent", "takes nothing: no room, or no such folder"),
    "worker": ("Worker", "at work", "does not run: what is sent waits in the spool"),
}
TOLD_S = 600.0
STATES = {
    SeriesState.OPEN: "arriving",
    SeriesState.CURVE: "curve",
    SeriesState.IGNORED: "ignored",
    SeriesState.QUARANTINED: "quarantined",
}

_seldom = Seldom(TOLD_S)


@router.get("/")
def live(request: Request, caller: Visitor) -> Response:
    """Return the page."""
    caller.saw(command="live page")
    return show(request, caller, "live.html", now=_values(request, caller.part))


@router.get("/live.json")
def live_json(request: Request, caller: Visitor) -> Response:
    """Return what is on the page, for the page to show anew."""
    # Asked every few seconds by whoever has the page open: one line stands for many.
    if count := _seldom.due((caller.holder.name, caller.address)):
        caller.saw(command="live page", count=count if count > 1 else None)
    return JSONResponse(_values(request, caller.part))


@router.post("/patients")
def find_patient(request: Request, sent: Posted) -> Response:
    """Lead to the page of a patient, whose ID is in no address."""
    caller, fields = sent
    part = caller.part
    patient_id = fields.get("patient_id", "").strip()
    if not 0 < len(patient_id) <= 64 or not patient_id.isprintable():
        raise Problem(422, "expected a Patient ID, of at most 64 characters")
    caller.saw(command="lookup", by_patient=True)
    with store.reading(part.engine) as session:
        known = [PatientKey(patient_id, issuer) for issuer in store.issuers_of(session, patient_id)]
        firsts = store.first_keys(session, known)
    # Of keys that are one patient, the first leads there as well as the others.
    patients = {firsts[key]: key for key in reversed(known)}
    keys = {key.issuer: part.keys.key(key) for key in sorted(patients.values(), key=known.index)}
    if len(keys) == 1:
        return RedirectResponse(f"/patients/{next(iter(keys.values()))}", 303)
    return show(request, caller, "patients.html", 200 if keys else 404, keys=keys)


def _values(request: Request, part: Part) -> dict[str, Any]:
    since = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
    with store.reading(part.engine) as session:
        rows = store.newest_series(session, ROWS)
        today = store.arrivals_since(session, since.astimezone(UTC))
        deliveries = store.count_undelivered(session)
        quarantined = sum(store.count_quarantined(session).values())
    checks = request.app.state.readiness.of(part).checks
    return {
        "at": f"{datetime.now().astimezone():%H:%M:%S}",
        "health": [_check(name, fine) for name, fine in checks.items()]
        + [
            request.app.state.queue.of(part),
            _deliveries(deliveries),
            {
                "name": "Quarantine",
                "fine": quarantined == 0,
                "said": f"{quarantined:,} files to look at" if quarantined else "empty",
            },
            {"name": "Device", "fine": True, "said": f"{part.settings.score.device} (setting)"},
        ],
        "today": [
            {
                "name": STATES[state],
                "series": f"{today.get(state, (0, 0))[0]:,}",
                "images": f"{today.get(state, (0, 0))[1]:,}",
            }
            for state in SeriesState
        ],
        "series": [_row(part, row) for row in rows],
    }


def _check(name: str, fine: bool) -> dict[str, Any]:
    title, yes, no = SAID[name]
    return {"name": title, "fine": fine, "said": yes if fine else no}


def _deliveries(counts: dict[DeliveryState, int]) -> dict[str, Any]:
    failed, waiting = counts.get(DeliveryState.FAILED, 0), counts.get(DeliveryState.WAITING, 0)
    said = f"{waiting:,} waiting" + (f", {failed:,} failed" if failed else "")
    return {"name": "Deliveries", "fine": not failed, "said": said}


def _row(part: Part, row: SeriesRow) -> dict[str, Any]:
    quality = row.quality
    aside = [f"{reason} {count}" for reason, count in sorted(row.set_aside.items())]
    return {
        "series_uid": row.series_uid,
        "patient": row.patient.patient_id or "none",
        "patient_key": part.keys.key(row.patient),
        "study": f"{row.study_datetime:%Y-%m-%d}" if row.study_datetime else "unknown",
        "tag": row.body_part_examined or "none",
        "state": str(row.state),
        "stated": STATES[row.state],
        "reason": str(row.reason or ""),
        "scored": row.scored,
        "received": row.received,
        "expected": row.expected,
        "covers": ", ".join(region.shown(row.coverage)),
        "quality": f"{quality.pearson_r:.3f}" if quality else "",
        "notes": ", ".join([*aside, *(quality.flags if quality else ())]),
        "arrived": _when(row.last_arrival_at.astimezone()),
    }


def _when(time: datetime) -> str:
    """Return a time of today as such, an older one as its day."""
    return f"{time:%H:%M:%S}" if time.date() == datetime.now().date() else f"{time:%Y-%m-%d}"


class Queue:
    """What waits in the spool, kept for a moment: pages that are open ask every few seconds."""

    def __init__(self) -> None:
        self._looking = threading.Lock()
        self._found = -math.inf, _queue(True, "being looked at")

    def of(self, part: Part) -> dict[str, Any]:
        """Return what is shown of it."""
        then, found = self._found
        # One looks, the others are told what was found last: a long queue takes long to read.
        if time.monotonic() - then > SPOOL_S and self._looking.acquire(blocking=False):
            try:
                found = self._look(part)
                self._found = time.monotonic(), found
            finally:
                self._looking.release()
        return found

    def _look(self, part: Part) -> dict[str, Any]:
        try:
            parts = [p for p in survey(part.settings.spool.path) if p.name != "quarantine"]
        except (NodeError, OSError):
            return _queue(False, "the spool cannot be read")
        waiting = sum(p.waiting for p in parts)
        if not waiting:
            return _queue(True, "nothing waits")
        said = f"{waiting:,} waiting, {sum(p.waiting_bytes for p in parts) / 1e6:,.1f} MB"
        oldest = min((p.oldest for p in parts if p.oldest), default=None)
        return _queue(True, said + (f", since {oldest.astimezone():%H:%M:%S}" if oldest else ""))


def _queue(fine: bool, said: str) -> dict[str, Any]:
    return {"name": "Queue", "fine": fine, "said": said}
