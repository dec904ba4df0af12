"""Questions to all that the node ever saw, and what they find, counted and listed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from dicomnode import export, mining, present, store
from dicomnode.audit import Act
from dicomnode.core import region
from dicomnode.errors import ExpressionError
from dicomnode.mining import Expression
from dicomnode.store import Histogram, Match, Page, Tally
from dicomnode.web.access import Caller
from dicomnode.web.coverage import TYPES, told
from dicomnode.web.models import MAX_ID, Format
from dicomnode.web.pages.route import Posted, Visitor, pages, show
from dicomnode.web.part import Part
from dicomnode.web.problem import Problem

router = pages()

ROWS = 50
MAX_TEXT = 4000
SHOWN = 12  # scanners and tags in a table, the most frequent
EXAMPLES = (
    "covers(liver, 0.9) and quality > 0.9",
    "covers(chest) and not overlaps(head) and slices >= 100",
    "body_part_examined = 'ABDOMEN' and not overlaps(abdomen)",
    "prior(within=365d) and covers(lungs, 0.9)",
    "state = quarantined",
)


@dataclass(frozen=True, slots=True)
class Found:
    """What an expression found."""

    count: int
    page: Page
    histogram: Histogram
    tally: Tally


@router.get("/mine")
def form(request: Request, caller: Visitor) -> Response:
    """Return the page with nothing asked yet."""
    return _show(request, caller, "")


@router.post("/mine")
def ask(request: Request, sent: Posted) -> Response:
    """Answer a question, which is in no address: it may name a patient."""
    caller, fields = sent
    text = _text(fields)
    before = _before(fields)
    part = caller.part
    caller.saw(command="mine page")
    try:
        asked = _parse(part, text)
    except ExpressionError as exc:
        return _show(request, caller, text, error=exc)
    with store.reading(part.engine) as session:
        count = store.count_matches(session, asked)
        page = store.find_page(session, asked, before=before, limit=ROWS)
        histogram = store.find_histogram(session, asked)
        tally = store.tally(session, asked, count)
    return _show(request, caller, text, found=Found(count, page, histogram, tally), before=before)


@router.post("/mine/export")
def save(request: Request, sent: Posted) -> Response:
    """Return all that a question finds as a file."""
    caller, fields = sent
    try:
        format = Format(fields.get("format", ""))
    except ValueError:
        raise Problem(422, "format: csv or parquet") from None
    if format is Format.JSON:
        raise Problem(422, "format: csv or parquet")
    part = caller.part
    asked = _parse(part, _text(fields))
    caller.saw(Act.EXPORT, command="mine page", format=format)
    return StreamingResponse(
        told(caller, export.stream(part.engine, asked, part.regions, f".{format}")),
        media_type=TYPES[format],
        headers={"Content-Disposition": f'attachment; filename="series.{format}"'},
    )


def _text(fields: Mapping[str, str]) -> str:
    text = fields.get("q", "").replace("\r\n", "\n")
    if len(text) > MAX_TEXT or not all(c.isprintable() or c in "\n\t" for c in text):
        raise Problem(422, f"a question has at most {MAX_TEXT} characters, all of them printable")
    return text


def _before(fields: Mapping[str, str]) -> int | None:
    given = fields.get("before", "")
    if not given:
        return None
    if not (given.isascii() and given.isdigit()) or not 1 <= int(given[:20]) <= MAX_ID:
        raise Problem(422, "before: a number that a page gave")
    return int(given)


def _parse(part: Part, text: str) -> Expression:
    with store.reading(part.engine) as session:
        return mining.parse(text, part.regions, store.mining_tables(session))


def _show(
    request: Request,
    caller: Caller,
    text: str,
    *,
    found: Found | None = None,
    error: ExpressionError | None = None,
    before: int | None = None,
) -> Response:
    part = caller.part
    return show(
        request,
        caller,
        "mine.html",
        q=text,
        examples=EXAMPLES,
        words=mining.words(part.regions),
        found=found,
        rows=[_row(part, m) for m in found.page.matches] if found else [],
        bars=_bars(found.histogram) if found else [],
        months=_most(found.tally.months) if found else [],
        makers=_most(dict(list(found.tally.manufacturers.items())[:SHOWN])) if found else [],
        tags=_tags(found.tally) if found else [],
        shown=SHOWN,
        before=before,
        error=error,
        excerpt=str(error).removeprefix(error.message + "\n") if error else "",
    )


def _row(part: Part, match: Match) -> dict[str, Any]:
    return {
        "match": match,
        "key": part.keys.key(match.patient),
        "covers": ", ".join(region.shown(match.coverage)),
    }


def _bars(histogram: Histogram) -> list[dict[str, Any]]:
    """Return the steps of body height, head first."""
    values = present.histogram_json(histogram)["steps"]
    most = max(histogram.series, default=1)
    return [s | {"share": s["series"] / most} for s in reversed(values)]


def _most(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    most = max(counts.values(), default=1)
    return [{"name": n or "unknown", "series": c, "share": c / most} for n, c in counts.items()]


def _tags(tally: Tally) -> list[dict[str, Any]]:
    """Return what curves cover that bear each tag, as shares of these."""
    return [
        {
            "name": tag or "(empty)",
            "series": count,
            "parts": [
                {"name": p, "series": n, "share": n / count}
                for p in tally.parts
                for n in (tally.shown.get(tag, {}).get(p, 0),)
            ],
        }
        for tag, count in list(tally.tags.items())[:SHOWN]
    ]
