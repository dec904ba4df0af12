"""What expressions find: pages, counts, histograms, and all of it as a file that is streamed."""

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from dicomnode import export, mining, present, store
from dicomnode.audit import Act
from dicomnode.mining import Expression
from dicomnode.mining.tree import Text, atoms
from dicomnode.store import Match
from dicomnode.web.access import Caller, Reader
from dicomnode.web.answer import API, Before, Limit, plain, problems
from dicomnode.web.models import (
    EXPRESSION,
    Count,
    ExpressionAsked,
    Format,
    Histogram,
    MatchPage,
    RegionKnown,
)
from dicomnode.web.models import Match as MatchFound
from dicomnode.web.part import Part
from dicomnode.web.problem import Problem

router = APIRouter(prefix=API, tags=["coverage"])

Question = Annotated[
    str,
    Query(
        max_length=4000,
        pattern=EXPRESSION,
        description="An expression in the language of `dicomnode mine`.",
        examples=["covers(liver, 0.9) and slices >= 100"],
    ),
]
OF_PATIENTS = {"patient_id", "issuer"}
PARQUET = "application/vnd.apache.parquet"
TYPES = {Format.CSV: "text/csv", Format.PARQUET: PARQUET}
FILES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page as JSON, or a file of all there is.",
        "content": {media_type: {} for media_type in TYPES.values()},
    }
}


@router.get("/coverage", response_model=MatchPage, responses=problems() | FILES)
def coverage(
    caller: Reader,
    q: Question,
    format: Format = Format.JSON,
    limit: Limit = 100,
    before: Before = None,
) -> Response:
    """Return Series that an expression finds; as `csv` or `parquet` all, as JSON in pages.

    An expression that names a patient is asked by POST.
    """
    _refuse_patients(_parse(caller.part, q))
    return _answer(caller, ExpressionAsked(q=q, format=format, limit=limit, before=before))


@router.post("/coverage", response_model=MatchPage, responses=problems() | FILES)
def coverage_by_post(caller: Reader, asked: ExpressionAsked) -> Response:
    """Return the same for an expression in a body, which may name a patient."""
    return _answer(caller, asked)


@router.get("/coverage/count", response_model=Count, responses=problems())
def count(caller: Reader, q: Question) -> Response:
    """Return how many Series an expression finds."""
    caller.saw(command="count")
    asked = _parse(caller.part, q)
    _refuse_patients(asked)
    with store.reading(caller.part.engine) as session:
        return plain(Count(series=store.count_matches(session, asked)))


@router.get("/coverage/histogram", response_model=Histogram, responses=problems())
def histogram(caller: Reader, q: Question) -> Response:
    """Return how many of the Series that an expression finds reach each body height."""
    caller.saw(command="histogram")
    asked = _parse(caller.part, q)
    _refuse_patients(asked)
    with store.reading(caller.part.engine) as session:
        found = store.find_histogram(session, asked)
    return plain(Histogram.model_validate(present.histogram_json(found)))


@router.get("/regions", response_model=list[RegionKnown], responses=problems())
def regions(caller: Reader) -> list[RegionKnown]:
    """Return the regions that expressions may name."""
    return [
        RegionKnown(
            region=r.name, code=r.code, meaning=r.meaning, low_mm=r.low_mm, high_mm=r.high_mm
        )
        for r in caller.part.regions
    ]


def _parse(part: Part, q: str) -> Expression:
    with store.reading(part.engine) as session:
        return mining.parse(q, part.regions, store.mining_tables(session))


def _refuse_patients(asked: Expression) -> None:
    """Refuse what names a patient in an address, which is kept in histories and logs."""
    if any(isinstance(a, Text) and a.field in OF_PATIENTS for a in atoms(asked.node)):
        raise Problem(422, "an expression that names a patient is asked by POST /api/v1/coverage")


def _answer(caller: Caller, asked: ExpressionAsked) -> Response:
    part = caller.part
    found = _parse(part, asked.q)
    if asked.format is Format.JSON:
        caller.saw(command="coverage")
        with store.reading(part.engine) as session:
            page = store.find_page(session, found, before=asked.before, limit=asked.limit)
        matches = [_match(part, match) for match in page.matches]
        return plain(MatchPage(series=matches, next=page.next))
    caller.saw(Act.EXPORT, command="coverage", format=asked.format)
    return StreamingResponse(
        told(caller, export.stream(part.engine, found, part.regions, f".{asked.format}")),
        media_type=TYPES[asked.format],
        headers={"Content-Disposition": f'attachment; filename="series.{asked.format}"'},
    )


def told(caller: Caller, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Pass chunks on, and record the end, so that what was broken off can be told from it."""
    size = 0
    for chunk in chunks:
        size += len(chunk)
        yield chunk
    caller.saw(Act.EXPORT, command="coverage", finished=True, bytes=size)


def _match(part: Part, match: Match) -> MatchFound:
    key = part.keys.key(match.patient)
    return MatchFound.model_validate(present.match_json(match) | {"patient_key": key})
