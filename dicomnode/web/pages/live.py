"""What arrives now, how the node stands, and what came today."""

from datetime import UTC, datetime
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from dicomnode import store
from dicomnode.core import region
from dicomnode.log import Seldom
from dicomnode.model import Flag, PatientKey, SeriesState
from dicomnode.store import SeriesRow
from dicomnode.web import words
from dicomnode.web.pages import tiles
from dicomnode.web.pages.route import Posted, Visitor, pages, show
from dicomnode.web.part import Part
from dicomnode.web.problem import Problem

router = pages()

ROWS = 40
TOLD_S = 600.0
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
    now, state = datetime.now(UTC), request.app.state
    with store.reading(part.engine) as session:
        rows = store.newest_series(session, ROWS)
        today = store.arrivals_since(session, since.astimezone(UTC))
        stored = [
            tiles.deliveries(session, now),
            tiles.fetches(part, session, now),
            tiles.quarantine(session),
        ]
    checks = state.readiness.of(part).checks
    health = [
        *(tiles.check(name, fine) for name, fine in checks.items()),
        tiles.device(part, checks.get("worker", False), now),
        state.queue.of(part),
        *stored,
        state.held.of(part),
    ]
    return {
        "at": f"{now.astimezone():%H:%M:%S}",
        "health": [tile for tile in health if tile is not None],
        "today": [
            {
                "name": words.STATES[kind],
                "series": f"{today.get(kind, (0, 0))[0]:,}",
                "images": f"{today.get(kind, (0, 0))[1]:,}",
            }
            for kind in SeriesState
        ],
        "series": [_row(part, row) for row in rows],
    }


def _row(part: Part, row: SeriesRow) -> dict[str, Any]:
    quality = row.quality
    aside = [f"{words.reason(code)}: {count}" for code, count in sorted(row.set_aside.items())]
    flags = [words.flag(code) for code in quality.flags] if quality else []
    if aside:  # which says the same, and of what
        flags = [flag for flag in flags if flag != words.FLAGS[Flag.SLICES_REFUSED]]
    return {
        "series_uid": row.series_uid,
        "patient": row.patient.patient_id or "none",
        "patient_key": part.keys.key(row.patient),
        "study": f"{row.study_datetime:%Y-%m-%d}" if row.study_datetime else "unknown",
        "tag": row.body_part_examined or "none",
        "state": str(row.state),
        "stated": words.STATES[row.state],
        "reason": words.reason(row.reason) if row.reason else "",
        "scored": row.scored,
        "received": row.received,
        "expected": row.expected,
        "covers": ", ".join(region.shown(row.coverage)),
        "quality": f"{quality.pearson_r:.3f}" if quality else "",
        "notes": ", ".join([*aside, *flags]),
        "arrived": _when(row.last_arrival_at.astimezone()),
    }


def _when(time: datetime) -> str:
    """Return a time of today as such, an older one as its day."""
    return f"{time:%H:%M:%S}" if time.date() == datetime.now().date() else f"{time:%Y-%m-%d}"
