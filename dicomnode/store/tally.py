"""What an expression finds, counted: by month, by scanner, and what tags say against curves."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import extract, func
from sqlalchemy.orm import Session

from dicomnode.core import region
from dicomnode.mining.tree import Expression
from dicomnode.store.coverage import STEP_UM, STEPS
from dicomnode.store.search import COVERAGE, SERIES, Search, mining_tables


@dataclass(frozen=True, slots=True)
class Tally:
    """How many of the Series that an expression finds fall under what."""

    months: Mapping[str, int]  # YYYY-MM of the Study, in order; "": unknown
    manufacturers: Mapping[str, int]  # most first
    # Body Part Examined -> curves with that tag, most first.
    tags: Mapping[str, int]
    # Body Part Examined -> body part -> curves with that tag that cover half of that part.
    shown: Mapping[str, Mapping[str, int]]
    parts: tuple[str, ...] = field(default=())  # body parts, feet to head


def tally(session: Session, expression: Expression) -> Tally:
    """Return what an expression finds, counted.

    What a curve covers is told by its cell alone, to 20 mm at either end, and a curve with
    missing slices counts as if it had them: to look at each curve takes longer by far.
    """
    asked = Search.of(session, expression)
    year, month = (extract(unit, SERIES.study_datetime) for unit in ("year", "month"))
    months: dict[str, int] = defaultdict(int)
    makers: dict[str, int] = defaultdict(int)
    cells: dict[tuple[str, int, int], int] = defaultdict(int)
    for query in asked.parts(year, month, func.count(), of_series=True):
        for y, m, count in session.execute(query.group_by(year, month)):
            months["" if y is None else f"{int(y):04}-{int(m):02}"] += count
    for query in asked.parts(SERIES.manufacturer, func.count(), of_series=True):
        for maker, count in session.execute(query.group_by(SERIES.manufacturer)):
            makers[maker] += count
    by = (SERIES.body_part_examined, COVERAGE.bundle, COVERAGE.cell)
    for query in asked.parts(*by, func.count(), of_series=True):
        for tag, bundle, cell, count in session.execute(query.group_by(*by)):
            if cell is not None:  # a Series without a curve
                cells[tag, bundle, cell] += count
    tables = mining_tables(session)
    parts = {
        number: [r for r in tables.get(digest, ()) if not r.part and r.span_um is not None]
        for digest, number in asked.numbers.items()
    }
    tags: dict[str, int] = defaultdict(int)
    shown: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for (tag, bundle, cell), count in cells.items():
        tags[tag] += count
        for r, share in region.shares([_stretch(cell)], parts[bundle]):
            if share >= region.COVERED:
                shown[tag][r.name] += count
    names = {r.name: r.span_um or (0, 0) for regions in parts.values() for r in regions}
    return Tally(
        months=dict(sorted(months.items())),
        manufacturers=_most(makers),
        tags=_most(tags),
        shown={tag: dict(found) for tag, found in shown.items()},
        parts=tuple(sorted(names, key=lambda name: names[name])),
    )


def _stretch(cell: int) -> tuple[int, int]:
    """Return the middles of the steps in which a curve begins and ends, in micrometres."""
    low, high = ((step - STEPS // 2) * STEP_UM + STEP_UM // 2 for step in divmod(cell, STEPS))
    return low, max(high, low + 1)


def _most(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
