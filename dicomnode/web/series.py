"""Series, their curves, and where to begin to look in them."""

import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from dicomnode import mining, present, query, store
from dicomnode.mining.tree import And, Expression, Node, Or, Text
from dicomnode.model import PatientKey, SeriesState
from dicomnode.store import SeriesRow
from dicomnode.web.access import Reader
from dicomnode.web.answer import API, UID, Before, Limit, SeriesUID, plain, problems, tagged
from dicomnode.web.models import Curve, Series, SeriesPage, View
from dicomnode.web.part import Part
from dicomnode.web.problem import Problem

router = APIRouter(prefix=API, tags=["series"])

COVERS = re.compile(r"([A-Za-z0-9][A-Za-z0-9_ -]{0,63})(?:,([0-9.]{1,8}))?")


def series_of(part: Part, row: SeriesRow) -> Series:
    """Return a Series as it is answered."""
    key = part.keys.key(row.patient)
    return Series.model_validate(present.series_json(row) | {"patient_key": key})


@router.get("/series", response_model=SeriesPage, responses=problems(404))
def list_series(
    caller: Reader,
    patient: Annotated[
        str | None,
        Query(
            max_length=1024,
            description="Key of a patient, never a Patient ID; of merged ones, any of their keys.",
        ),
    ] = None,
    study: Annotated[
        str | None, Query(max_length=64, pattern=UID, description="Study Instance UID.")
    ] = None,
    state: SeriesState | None = None,
    covers: Annotated[
        list[str] | None,
        Query(max_length=20, description="REGION or REGION,FRACTION; of several, all of them."),
    ] = None,
    before: Before = None,
    limit: Limit = 100,
) -> Response:
    """Return Series and where they stand, those that came last first."""
    part = caller.part
    nodes: list[Node] = []
    whose = part.patient(patient) if patient is not None else None  # then it is a key, to be logged
    caller.saw(command="series", patient_key=patient, study_uid=study, state=state)
    if study is not None:
        nodes.append(Text("study_uid", (study,)))
    if state is not None:
        nodes.append(Text("state", (state,)))
    with store.reading(part.engine) as session:
        if whose is not None:
            nodes.append(_of_patient(store.patient_keys(session, whose)))
        tables = store.mining_tables(session) if covers else {}
        for text in covers or ():
            nodes.append(mining.parse(_question(text), part.regions, tables).node)
        nodes = nodes or [Text("state", tuple(SeriesState))]  # every one
        asked = Expression("", And(tuple(nodes)), every_series=True)
        page = store.find_page(session, asked, before=before, limit=limit)
        rows = store.series_by_id(session, [m.id for m in page.matches])
    found = [series_of(part, row) for row in rows]
    return plain(SeriesPage(series=found, next=page.next))


def _of_patient(keys: Sequence[PatientKey]) -> Node:
    """Return the condition to be of one of a patient's keys."""
    ids: dict[str, list[str]] = {}
    for key in keys:
        ids.setdefault(key.issuer, []).append(key.patient_id)
    each = ((Text("issuer", (i,)), Text("patient_id", tuple(found))) for i, found in ids.items())
    return Or(tuple(And(both) for both in each))


def _question(text: str) -> str:
    """Return `liver,0.9` in the language of expressions."""
    found = COVERS.fullmatch(text)
    if found is None:
        raise Problem(422, "covers: expected REGION or REGION,FRACTION")
    fraction = f", {found[2]}" if found[2] else ""
    return f'covers("{found[1]}"{fraction})'


@router.get("/series/{series_uid}", response_model=Series, responses=problems(404))
def one_series(request: Request, caller: Reader, series_uid: SeriesUID) -> Response:
    """Return one Series and where it stands."""
    caller.saw(command="series", series_uid=series_uid)
    with store.reading(caller.part.engine) as session:
        rows = store.list_series(session, series_uid=series_uid)
    if not rows:
        raise Problem(404, "the node never saw this Series")
    return tagged(request, series_of(caller.part, rows[0]))


@router.get("/series/{series_uid}/curve", response_model=Curve, responses=problems(404))
def curve(request: Request, caller: Reader, series_uid: SeriesUID) -> Response:
    """Return the curve of a Series, feet to head; 404 while it has none."""
    caller.saw(command="curve", series_uid=series_uid)
    found = query.series_curve(caller.part.engine, series_uid)
    if found is None:
        raise Problem(404, "the node never saw this Series")
    if found.curve is None:
        row = found.series
        why = f"{row.state}:{row.reason}" if row.reason else str(row.state)
        raise Problem(404, f"no curve: {why}", state=row.state, reason=row.reason)
    values = present.curve_json(found.curve, found.regions)
    return tagged(request, Curve.model_validate(values))


@router.get("/series/{series_uid}/view", response_model=View, responses=problems(404))
def view(
    request: Request,
    caller: Reader,
    series_uid: SeriesUID,
    region: Annotated[
        str,
        Query(
            min_length=1,
            max_length=64,
            pattern=r"^[^\x00-\x1f\x7f]*$",
            description="Name, or SNOMED CT code.",
            examples=["liver"],
        ),
    ],
) -> Response:
    """Return which slice of a Series to open first for a region."""
    caller.saw(command="view", series_uid=series_uid)
    found = query.view(caller.part.engine, series_uid, region)
    if found is None:
        raise Problem(404, "no curve of this Series")
    return tagged(request, View.model_validate(present.view_json(found)))
