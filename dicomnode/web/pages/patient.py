"""All Studies of a patient on one axis of body height, and how they align."""

from typing import Annotated

from fastapi import Path, Request, Response

from dicomnode import store
from dicomnode.web.answer import KEY
from dicomnode.web.pages import timeline
from dicomnode.web.pages.route import Visitor, pages, show
from dicomnode.web.pages.timeline import Covered
from dicomnode.web.problem import Problem

router = pages()

MAX_SERIES, MAX_PAIRS = 300, 3000


@router.get("/patients/{key}")
def patient(
    request: Request, caller: Visitor, key: Annotated[str, Path(max_length=1024, pattern=KEY)]
) -> Response:
    """Return the page of a patient."""
    part = caller.part
    whose = part.patient(key)  # what is no key may be a Patient ID, and is not logged
    caller.saw(command="patient page", patient_key=key)
    with store.reading(part.engine) as session:
        keys = store.patient_keys(session, whose)
        rows = store.series_of_patient(session, whose, MAX_SERIES + 1)
        pairs, every_pair = store.pairs_of_patient(session, whose, MAX_PAIRS)
    if not rows:
        raise Problem(404, "no Series of this patient")
    complete = every_pair and len(rows) <= MAX_SERIES
    rows = sorted(rows[:MAX_SERIES], key=lambda r: (str(r.study_datetime or ""), r.series_uid))
    covered = [
        Covered(row.study_uid, row.series_uid, row.study_datetime, *row.height_mm)
        for row in rows
        if row.height_mm is not None
    ]
    pairs.sort(key=lambda p: (p.fixed_study, p.moving_study))
    drawing = None
    parts = []
    if covered:
        drawing = timeline.draw(covered, [(p.fixed_study, p.moving_study) for p in pairs])
        parts = [r for r in part.regions if not r.part and r.span_um is not None]
    return show(
        request,
        caller,
        "patient.html",
        whose=whose,
        others=[other for other in keys if other != whose],
        rows=rows,
        pairs=pairs,
        when={row.study_uid: row.study_datetime for row in rows},
        complete=complete,
        drawing=drawing,
        parts=parts,
        box=timeline,
    )
