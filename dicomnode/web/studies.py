"""Pairs of Studies: offsets, slice maps, transforms and registrations; a patient's timeline."""

import tempfile
from io import BytesIO
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from dicomnode import present, query, store
from dicomnode.model import Method, OffsetStatus, PatientKey
from dicomnode.query import PairAnswer
from dicomnode.web.access import Caller, Reader
from dicomnode.web.answer import API, KEY, FixedUID, MovingUID, file, problems, tagged
from dicomnode.web.models import (
    Offset,
    PatientAsked,
    PatientFound,
    SliceMap,
    Timeline,
    TimelineStudy,
)
from dicomnode.web.problem import Problem
from dicomnode.web.series import series_of

router = APIRouter(prefix=API, tags=["studies"])

PAIR = "/studies/{fixed}/offsets/{moving}"
MAX_SERIES, MAX_PAIRS = 1000, 20_000  # of a patient
WHEN = {"computed_at": True, "seconds": True}  # of a pair worked out on demand they differ
NO_PAIR = "no pair of curves of these two Studies"


@router.get(PAIR, response_model=Offset, responses=problems(404))
def offset(
    request: Request,
    caller: Reader,
    fixed: FixedUID,
    moving: MovingUID,
    method: Method | None = None,
) -> Response:
    """Return the best offset of two Studies, or that of a method; `refused` is an answer too."""
    found = _pair(caller, "offset", fixed, moving, method)
    return tagged(request, Offset.model_validate(present.offset_json(found.stored)), WHEN)


@router.get(
    f"{PAIR}/transform",
    response_class=Response,
    responses=problems(404, 409)
    | {200: {"content": {"text/plain": {}}, "description": "An ITK transform file."}},
)
def transform(
    caller: Reader, fixed: FixedUID, moving: MovingUID, method: Method | None = None
) -> Response:
    """Return the offset as ITK has it, from fixed to moving points: a `.tfm` file."""
    from dicomnode.objects import transform as itk  # SimpleITK: a tenth of a second

    found = _accepted(_pair(caller, "transform", fixed, moving, method))
    with tempfile.TemporaryDirectory() as folder:  # ITK writes to files alone
        path = FilePath(folder) / "offset.tfm"
        itk.write(found.stored.offset, path)
        content = path.read_bytes()
    return file(content, "text/plain", f"{fixed}-{moving}.tfm")


@router.get(
    f"{PAIR}/registration",
    response_class=Response,
    responses=problems(404, 409)
    | {200: {"content": {"application/dicom": {}}, "description": "A DICOM Part 10 file."}},
)
def registration(
    caller: Reader, fixed: FixedUID, moving: MovingUID, method: Method | None = None
) -> Response:
    """Return the offset as a DICOM Spatial Registration, moving onto fixed."""
    from dicomnode.objects import registration as objects

    found = _accepted(_pair(caller, "registration", fixed, moving, method))
    engine = caller.part.engine
    known, prior = (query.source_of(engine, c) for c in (found.fixed, found.moving))
    origin = known.origin_with(prior)
    ds = objects.registration(known.source, prior.source, found.stored.offset, origin)
    content = BytesIO()
    ds.save_as(content, enforce_file_format=True)
    return file(content.getvalue(), "application/dicom", f"{ds.SOPInstanceUID}.dcm")


@router.get("/studies/{fixed}/slices/{moving}", response_model=SliceMap, responses=problems(404))
def slices(
    request: Request,
    caller: Reader,
    fixed: FixedUID,
    moving: MovingUID,
    method: Method | None = None,
) -> Response:
    """Return which slice of the moving Study shows what each slice of the fixed one does."""
    caller.saw(command="slices", study_uid=[fixed, moving])
    found = query.slice_map(caller.part.engine, fixed, moving, method)
    if found is None:
        raise Problem(404, NO_PAIR)
    answer = SliceMap.model_validate(present.map_json(found))
    return tagged(request, answer, {"offset": WHEN})


@router.get("/patients/{key}/timeline", response_model=Timeline, responses=problems(404))
def timeline(
    request: Request,
    caller: Reader,
    key: Annotated[
        str, Path(max_length=1024, pattern=KEY, description="`patient_key` of any answer.")
    ],
) -> Response:
    """Return all Studies of a patient, what they cover, and how they align."""
    part = caller.part
    patient = part.patient(key)  # what is no key may be a Patient ID, and is not logged
    caller.saw(command="timeline", patient_key=key)
    with store.reading(part.engine) as session:
        rows = store.series_of_patient(session, patient, MAX_SERIES + 1)
        pairs, every_pair = store.pairs_of_patient(session, patient, MAX_PAIRS)
    if not rows:
        raise Problem(404, "no Series of this patient")
    complete = every_pair and len(rows) <= MAX_SERIES
    studies: dict[str, TimelineStudy] = {}
    for row in sorted(rows[:MAX_SERIES], key=lambda r: (str(r.study_datetime or ""), r.study_uid)):
        when = row.study_datetime.isoformat() if row.study_datetime else None
        study = TimelineStudy(study_uid=row.study_uid, study_datetime=when, series=[])
        studies.setdefault(row.study_uid, study).series.append(series_of(part, row))
    answer = Timeline(
        patient_key=key,
        studies=list(studies.values()),
        pairs=[Offset.model_validate(present.offset_json(p)) for p in pairs],
        complete=complete,
    )
    return tagged(request, answer)


@router.post("/patients/lookup", response_model=list[PatientFound], responses=problems())
def look_up(caller: Reader, asked: PatientAsked) -> list[PatientFound]:
    """Return the keys of a Patient ID, one for each issuer under which it is known here."""
    caller.saw(command="lookup", by_patient=True)
    part = caller.part
    with store.reading(part.engine) as session:
        issuers = store.issuers_of(session, asked.patient_id)
    return [
        PatientFound(patient_key=key, issuer=issuer)
        for issuer in issuers
        if asked.issuer in (None, issuer)
        and (key := part.keys.key(PatientKey(asked.patient_id, issuer))) is not None
    ]


def _pair(
    caller: Caller, command: str, fixed: str, moving: str, method: Method | None
) -> PairAnswer:
    caller.saw(command=command, study_uid=[fixed, moving])
    found = query.pair(caller.part.engine, fixed, moving, method)
    if found is None:
        raise Problem(404, NO_PAIR)
    return found


def _accepted(found: PairAnswer) -> PairAnswer:
    offset = found.stored.offset
    if offset.status is OffsetStatus.REFUSED:
        raise Problem(409, f"the offset was refused: {offset.reason}")
    return found
