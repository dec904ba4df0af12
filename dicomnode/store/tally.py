"""What an expression finds, counted: by month, by scanner, and what tags say against curves."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    Integer,
    Select,
    String,
    cast,
    extract,
    func,
    literal,
    null,
    select,
    union_all,
)
from sqlalchemy.orm import Session

from dicomnode.core import region
from dicomnode.mining.tree import Expression
from dicomnode.store.coverage import STEP_UM, STEPS
from dicomnode.store.search import COVERAGE, SERIES, Search, mining_tables, newest_id

# Of more, an even sample is counted: that reads each Series, 3 to 7 us of them where
# they are in memory, and people wait for it.
TALLIED = 100_000
# Of runs of Series that came one after the other, which lie together on the disk.
RUNS = 25
MONTHS, MAKERS, CELLS = range(3)


@dataclass(frozen=True, slots=True)
class Tally:
    """How many of the Series that an expression finds fall under what."""

    counted: int  # of how many; fewer than it finds where these are a sample
    months: Mapping[str, int]  # YYYY-MM of the Study, in order; "": unknown
    manufacturers: Mapping[str, int]  # most first
    # Body Part Examined -> curves with that tag, most first.
    tags: Mapping[str, int]
    # Body Part Examined -> body part -> curves with that tag that cover half of that part.
    shown: Mapping[str, Mapping[str, int]]
    parts: tuple[str, ...] = field(default=())  # body parts, feet to head


def tally(session: Session, expression: Expression, count: int) -> Tally:
    """Return what an expression finds, counted.

    What a curve covers is told by its cell alone, to 20 mm at either end, and a curve with
    missing slices counts as if it had them: to look at each curve takes longer by far.

    Parameters
    ----------
    count
        How many Series it finds; of more than `TALLIED`, about so many are counted, evenly spread
        over the order in which they came.
    """
    asked = Search.of(session, expression)
    months: dict[str, int] = defaultdict(int)
    makers: dict[str, int] = defaultdict(int)
    cells: dict[tuple[str, int, int], int] = defaultdict(int)
    for query in _queries(session, asked, count):
        for kind, number, text, bundle, cell, found in session.execute(_counted(query)):
            if kind == MONTHS:
                months["" if number is None else f"{number // 12:04}-{number % 12 + 1:02}"] += found
            elif kind == MAKERS:
                makers[text] += found
            elif cell is not None:  # a Series without a curve
                cells[text, bundle, cell] += found
    tables = mining_tables(session)
    parts = {
        number: [r for r in tables.get(digest, ()) if not r.part and r.span_um is not None]
        for digest, number in asked.numbers.items()
    }
    tags: dict[str, int] = defaultdict(int)
    shown: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for (tag, bundle, cell), found in cells.items():
        tags[tag] += found
        for r, share in region.shares([_stretch(cell)], parts[bundle]):
            if share >= region.COVERED:
                shown[tag][r.name] += found
    names = {r.name: r.span_um or (0, 0) for regions in parts.values() for r in regions}
    return Tally(
        counted=sum(months.values()),
        months=dict(sorted(months.items())),
        manufacturers=_most(makers),
        tags=_most(tags),
        shown={tag: dict(found) for tag, found in shown.items()},
        parts=tuple(sorted(names, key=lambda name: names[name])),
    )


def _queries(session: Session, asked: Search, count: int) -> Iterator[Select[Any]]:
    """Yield queries for what is counted of each Series; each is in one of them at most."""
    year, month = (extract(unit, SERIES.study_datetime) for unit in ("year", "month"))
    columns = (
        cast(year * 12 + month - 1, Integer).label("month"),
        SERIES.manufacturer.label("maker"),
        SERIES.body_part_examined.label("tag"),
        COVERAGE.bundle.label("bundle"),
        COVERAGE.cell.label("cell"),
    )
    if count <= TALLIED:
        yield from asked.parts(*columns, of_series=True)
        return
    newest, share = newest_id(session), TALLIED / count
    runs = max(1, min(RUNS, int(newest * share)))
    for k in range(runs):
        first = newest * k / runs
        yield asked.run(round(first), round(first + newest * share / runs), *columns)


def _counted(query: Select[Any]) -> Any:
    """Return the query that counts what another one finds in three ways, in one pass over it."""
    found = query.cte("found").c
    no_number, no_text = cast(null(), Integer), cast(null(), String)
    ways = (
        (MONTHS, [found.month], [found.month, no_text, no_number, no_number]),
        (MAKERS, [found.maker], [no_number, found.maker, no_number, no_number]),
        (
            CELLS,
            [found.tag, found.bundle, found.cell],
            [no_number, found.tag, found.bundle, found.cell],
        ),
    )
    return union_all(
        *(select(literal(kind), *shown, func.count()).group_by(*by) for kind, by, shown in ways)
    )


def _stretch(cell: int) -> tuple[int, int]:
    """Return the middles of the steps in which a curve begins and ends, in micrometres."""
    low, high = ((step - STEPS // 2) * STEP_UM + STEP_UM // 2 for step in divmod(cell, STEPS))
    return low, max(high, low + 1)


def _most(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
