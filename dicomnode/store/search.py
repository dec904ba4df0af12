"""Expressions asked of the database: a page, a count, a histogram, or all of it in windows.

A tree becomes SQLAlchemy Core: every value of the text is a bound parameter, and no part of the
text is ever SQL. What is unknown compares as false, as in `mining.evaluate`, not as NULL.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any

import numpy as np
from sqlalchemy import (
    Boolean,
    ColumnElement,
    Engine,
    Integer,
    Select,
    and_,
    case,
    exists,
    false,
    func,
    literal_column,
    not_,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from db import schema
from dicomnode.core import region
from dicomnode.core.region import Region
from dicomnode.mining.evaluate import ORDERS, Record
from dicomnode.mining.tree import (
    And,
    Atom,
    Bundle,
    Day,
    Expression,
    Filled,
    Flagged,
    Node,
    Not,
    Number,
    Or,
    Prior,
    Span,
    Text,
    atoms,
)
from dicomnode.model import Flag, Floats, PatientKey, Reason, SeriesState
from dicomnode.store.coverage import BITS, STEP_UM, STEPS, flags_of, step
from dicomnode.store.identity import of_keys, patient_keys
from dicomnode.store.session import reading

SERIES, COVERAGE, STRETCH = schema.Series, schema.Coverage, schema.Stretch
MEMBER = schema.PatientMember

# Most questions find a page among the newest Series. Where so many were walked back through and
# the page is not full, what is asked for is rare: only then is the index of cells worth more.
NEAR = 50_000
FAR = 1_000_000
MAX_BOXES = 16  # beyond, one around all: they are combined with each other
WINDOW = 20_000  # Series looked at in one go, where all are wanted: memory stays flat

TEXTS: dict[str, Any] = {
    "modality": SERIES.modality,
    "manufacturer": SERIES.manufacturer,
    "body_part_examined": SERIES.body_part_examined,
    "patient_id": SERIES.patient_id,
    "issuer": SERIES.issuer,
    "study_uid": SERIES.study_uid,
    "series_uid": SERIES.series_uid,
    "state": SERIES.state,
    "reason": SERIES.reason,
}
TIMES: dict[str, Any] = {"study_date": SERIES.study_datetime, "arrived": SERIES.first_arrival_at}
NUMBERS: dict[str, Any] = {
    "slices": COVERAGE.slices,
    "spacing": COVERAGE.spacing_um,
    "quality": COVERAGE.quality,
    "slope": COVERAGE.slope,
    "low": COVERAGE.low_um,
    "high": COVERAGE.high_um,
}


@dataclass(frozen=True, slots=True)
class Match:
    """One Series that an expression found."""

    id: int
    series_uid: str
    study_uid: str
    patient: PatientKey
    study_datetime: datetime | None
    modality: str
    body_part_examined: str
    manufacturer: str
    state: SeriesState
    reason: Reason | None
    received: int  # Instances
    model: str | None  # digest of the bundle; this and what follows is None without a curve
    slices: int | None
    spacing_mm: float | None
    quality: float | None
    slope: float | None
    height_mm: tuple[float, float] | None  # lowest, highest that slices fill
    flags: tuple[Flag, ...]
    coverage: tuple[tuple[Region, float], ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Some of what an expression found, newest first, and where the rest begins."""

    matches: tuple[Match, ...]
    next: int | None  # `before` of the page that follows; None: there is none


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many curves reach over each step of body height, feet to head."""

    edges_mm: Floats  # (K + 1,) float64
    series: tuple[int, ...]  # (K,) those that reach over some of the step
    total: int


def mining_tables(session: Session) -> dict[str, tuple[Region, ...]]:
    """Return digest -> regions of each bundle that made a curve."""
    rows = session.execute(
        select(schema.Model.digest, schema.Model.manifest).join(
            schema.Bundle, schema.Bundle.digest == schema.Model.digest
        )
    )
    return {digest: region.from_manifest(manifest) for digest, manifest in rows}


def find_page(
    session: Session, expression: Expression, *, before: int | None = None, limit: int = 100
) -> Page:
    """Return what an expression finds, newest first, from the Series before `before` on."""
    search = Search.of(session, expression)
    newest = newest_id(session)
    top = newest if before is None else min(before - 1, newest)
    wanted = limit + 1  # one more tells whether there is a next page
    found: list[int] = []
    walk = NEAR
    while top > 0 and len(found) < wanted and walk <= FAR:
        near = search.ids().where(search.key > top - walk, search.key <= top)
        near = near.order_by(search.key.desc()).limit(wanted - len(found))
        more = list(session.scalars(near))
        found, top = found + more, top - walk
        # As many again as it took for these, if it goes on like this; twice that to be sure.
        walk = 2 * walk * (wanted - len(found)) // len(more) + 1 if more else FAR + 1
    if top > 0 and len(found) < wanted:
        far: list[int] = []
        for query in search.parts(search.key):
            # Not by the key itself: Postgres, which takes what is asked for to be evenly spread,
            # would walk back through all there is. What is rare is sorted at once.
            rare = query.where(search.key <= top).order_by(
                (search.key + literal_column("0")).desc()
            )
            far += session.scalars(rare.limit(wanted - len(found)))
        found += sorted(far, reverse=True)[: wanted - len(found)]
    ids = found[:limit]
    return Page(tuple(matches(session, ids)), ids[-1] if len(found) > limit else None)


def count_matches(session: Session, expression: Expression) -> int:
    """Return how many Series an expression finds."""
    search = Search.of(session, expression)
    return sum(session.scalar(q) or 0 for q in search.parts(func.count()))


def find_histogram(session: Session, expression: Expression) -> Histogram:
    """Return how many of the curves that an expression finds reach over each step of height."""
    search = Search.of(session, expression)
    begin, end = np.zeros(STEPS + 1, np.int64), np.zeros(STEPS + 1, np.int64)
    for query in search.parts(COVERAGE.cell, func.count()):
        for cell, count in session.execute(query.group_by(COVERAGE.cell)):
            if cell is not None:  # a Series without a curve
                begin[cell // STEPS] += count
                end[cell % STEPS + 1] += count
    series = np.cumsum(begin - end)[:-1]
    shown = np.flatnonzero(series)
    first, last = (shown[0], shown[-1] + 1) if len(shown) else (0, 0)
    edges_um = (np.arange(first, last + 1) - STEPS // 2) * STEP_UM
    counts = tuple(int(n) for n in series[first:last])
    return Histogram(edges_um / region.UM_PER_MM, counts, int(begin.sum()))


def newest_id(session: Session) -> int:
    """Return the number of the Series that came last, 0 where there is none."""
    return session.scalar(select(func.max(SERIES.id))) or 0


def windows(engine: Engine, expression: Expression) -> Iterator[tuple[int, list[int]]]:
    """Yield (how many numbers were looked at, ids found) until all that is found was given.

    Oldest first, a transaction each: what arrives meanwhile may or may not be among them.
    """
    with reading(engine) as session:
        search = Search.of(session, expression)
        last = newest_id(session)
    for low in range(1, last + 1, WINDOW):
        high = min(low + WINDOW - 1, last)
        query = search.ids().where(search.key >= low, search.key <= high).order_by(search.key)
        with reading(engine) as session:
            ids = list(session.scalars(query))
        yield high - low + 1, ids


def statement_of(session: Session, expression: Expression) -> tuple[str, dict[str, Any]]:
    """Return the SQL of an expression, and the values of its parameters."""
    search = Search.of(session, expression)
    query = search.ids().order_by(search.key.desc())
    options = {"render_postcompile": True}  # the members of `in`, each with a name
    compiled = query.compile(session.get_bind(), compile_kwargs=options)
    return str(compiled), dict(compiled.params)


def matches(session: Session, ids: Sequence[int]) -> list[Match]:
    """Return the Series of these ids, in that order."""
    rows = session.execute(
        select(SERIES, COVERAGE, schema.Bundle.digest)
        .outerjoin(COVERAGE, COVERAGE.series_id == SERIES.id)
        .outerjoin(schema.Bundle, schema.Bundle.id == COVERAGE.bundle)
        .where(SERIES.id.in_(ids))
    )
    tables, filled = mining_tables(session), _stretches(session, ids)
    found = {s.id: _match(s, c, digest, tables, filled) for s, c, digest in rows}
    return [found[id_] for id_ in ids if id_ in found]


def state_of(session: Session, series_uid: str) -> SeriesState | None:
    """Return where a Series stands, None where the node does not know it."""
    state = session.scalar(select(SERIES.state).where(SERIES.series_uid == series_uid))
    return None if state is None else SeriesState(state)


def match_of(session: Session, series_uid: str) -> Match | None:
    """Return one Series with its curve, None where it has none."""
    query = select(SERIES.id).join(COVERAGE, COVERAGE.series_id == SERIES.id)
    series_id = session.scalar(query.where(SERIES.series_uid == series_uid))
    return None if series_id is None else matches(session, [series_id])[0]


def records(session: Session, ids: Sequence[int]) -> dict[int, Record]:
    """Return what `mining.evaluate` may ask of the Series of these ids."""
    rows = session.execute(
        select(SERIES, COVERAGE, schema.Bundle.digest)
        .outerjoin(COVERAGE, COVERAGE.series_id == SERIES.id)
        .outerjoin(schema.Bundle, schema.Bundle.id == COVERAGE.bundle)
        .where(SERIES.id.in_(ids))
    )
    filled = _stretches(session, ids)
    return {s.id: _record(session, s, c, digest, filled) for s, c, digest in rows}


@dataclass(frozen=True, slots=True)
class Search:
    """An expression with the numbers that this database gives to bundles."""

    expression: Expression
    numbers: Mapping[str, int]  # digest -> number
    linked: bool = False  # whether some patient has several keys

    @classmethod
    def of(cls, session: Session, expression: Expression) -> "Search":
        if session.get_bind().dialect.name == "postgresql":
            # To compile a question takes longer (0.3 s) than most take to be answered.
            session.execute(text("SET LOCAL jit = off"))
        rows = session.execute(select(schema.Bundle.digest, schema.Bundle.id))
        linked = any(isinstance(atom, Prior) for atom in atoms(expression.node)) and (
            session.scalar(select(MEMBER.group_id).limit(1)) is not None
        )
        return cls(expression, {digest: number for digest, number in rows}, linked)

    @property
    def key(self) -> Any:
        """The column that orders what is found: a Series that came first has the lower number."""
        return SERIES.id if self.expression.every_series else COVERAGE.series_id

    def ids(self) -> Select[int]:
        """Return the query for the ids of what is found, in no order."""
        return self._of(self.key).where(self._clause(self.expression.node, gaps=None))

    def parts(self, *columns: Any, of_series: bool = False) -> list[Select[Any]]:
        """Return queries that together are over all that is found, each Series in one of them.

        `of_series` says that the columns are of the Series, too.

        The few curves with missing slices are asked by themselves: they need a subquery, for
        which Postgres gives up working in several processes, and the ends of such a curve do
        not tell what it fills.
        """
        node = self.expression.node
        asked = self._of(*columns, of_series=of_series)
        if self.expression.every_series:
            return [asked.where(self._clause(node, gaps=None))]
        if not any(isinstance(a, Filled) for a in atoms(node)):
            return [asked.where(self._clause(node, gaps=None), *self._cells())]
        whole = asked.where(COVERAGE.stretches == 1)
        # A constant and no parameter: that is how a planner knows the index of these alone.
        with_gaps = asked.where(COVERAGE.stretches > literal_column("1"))
        return [
            whole.where(self._clause(node, gaps=False), *self._cells()),
            with_gaps.where(self._clause(node, gaps=True)),
        ]

    def run(self, after: int, last: int, *columns: Any) -> Select[Any]:
        """Return the query over those found whose numbers lie above one and up to another.

        The columns may be of the Series, too.
        """
        query = self._of(*columns, of_series=True)
        query = query.where(self._clause(self.expression.node, gaps=None))
        # Of both sides of the join: Postgres does not conclude the one from the other, and might
        # read all Series for some.
        for key in dict.fromkeys((self.key, SERIES.id)):
            query = query.where(key > after, key <= last)
        return query

    def _cells(self) -> list[ColumnElement[bool]]:
        """Return where in the index of cells every match without missing slices is."""
        boxes = _boxes(self.expression.node, True, frozenset(self.numbers))
        if not boxes:
            return [false()]
        # One range, though boxes may lie apart: of several, SQLite visits each by itself and
        # then looks for what it found twice, which took seven times as long as to read on.
        box = _around(boxes)
        low = step(box.low_min) * STEPS + step(box.high_min)
        high = step(box.low_max) * STEPS + step(box.high_max)
        if low == 0 and high == STEPS * STEPS - 1:
            return []
        # The ends as well: what they leave out, the index tells without a look at the row.
        return [
            COVERAGE.cell.between(low, high),
            COVERAGE.low_um.between(box.low_min, box.low_max),
            COVERAGE.high_um.between(box.high_min, box.high_max),
        ]

    def _of(self, *columns: Any, of_series: bool = False) -> Select[Any]:
        if self.expression.every_series:
            of = select(*columns).select_from(SERIES)
            return of.outerjoin(COVERAGE, COVERAGE.series_id == SERIES.id)
        of = select(*columns).select_from(COVERAGE)
        atoms_of_series = (isinstance(a, Text | Day | Prior) for a in atoms(self.expression.node))
        if of_series or any(atoms_of_series):
            of = of.join(SERIES, SERIES.id == COVERAGE.series_id)
        return of

    def _clause(self, node: Node, gaps: bool | None, positive: bool = True) -> ColumnElement[bool]:
        """Return the condition of a node, or of its opposite.

        `gaps` tells whether the rows looked at are of curves with missing slices; None: of both.
        """
        match node:
            case Not(part):
                return self._clause(part, gaps, not positive)
            case And(parts) | Or(parts):
                clauses = [self._clause(part, gaps, positive) for part in parts]
                return (and_ if isinstance(node, And) == positive else or_)(*clauses)
        found = self._atom(node, gaps)
        if positive:
            return found
        if self._may_be_null(node):
            return not_(func.coalesce(found, false(), type_=Boolean))
        return not_(found)

    def _may_be_null(self, atom: Atom) -> bool:
        if isinstance(atom, Text):
            return atom.field == "reason"
        return self.expression.every_series and not isinstance(atom, Day | Prior)

    def _atom(self, atom: Atom, gaps: bool | None) -> ColumnElement[bool]:
        match atom:
            case Filled(Span() as span):
                return _filled(span, gaps)
            case Filled(None, by_bundle):
                spans: dict[Span, list[int]] = {}
                for digest, span in by_bundle:
                    if digest in self.numbers:
                        spans.setdefault(span, []).append(self.numbers[digest])
                return or_(
                    false(),
                    *(
                        and_(COVERAGE.bundle.in_(numbers), _filled(span, gaps))
                        for span, numbers in spans.items()
                    ),
                )
            case Bundle(prefixes):
                numbers = [n for digest, n in self.numbers.items() if digest.startswith(prefixes)]
                return COVERAGE.bundle.in_(numbers) if numbers else false()
            case Flagged(flags):
                bits = sum(BITS[Flag(flag)] for flag in flags)
                return COVERAGE.flags.bitwise_and(bits) != 0
            case Number(field, order, value):
                return ORDERS[order](NUMBERS[field], value)  # type: ignore[return-value]  # of a column
            case Text(field, values, None):
                return TEXTS[field].in_(values)  # type: ignore[no-any-return]  # a column is Any
            case Text(field, _, part):
                return _Within(TEXTS[field], part)
            case Day(field, first, end):
                column, zone = TIMES[field], UTC if field == "arrived" else None
                return and_(
                    true() if first is None else column >= _midnight(first, zone),
                    true() if end is None else column < _midnight(end, zone),
                    column.is_not(None),
                )
            case Prior(days):
                return or_(_prior(days), _linked_prior(days)) if self.linked else _prior(days)
        raise AssertionError(atom)  # the match above names every Atom


def _filled(span: Span, gaps: bool | None) -> ColumnElement[bool]:
    low, high, need = span.low_um, span.high_um, span.need_um
    # Of one stretch, that is all there is to say; of several, their ends have to as well.
    clauses = [COVERAGE.low_um <= high - need, COVERAGE.high_um >= low + need]
    if need < high - low:
        clauses.append(COVERAGE.high_um - COVERAGE.low_um >= need)
    if gaps is False:
        return and_(*clauses)
    upper = case((STRETCH.high_um < high, STRETCH.high_um), else_=high)
    lower = case((STRETCH.low_um > low, STRETCH.low_um), else_=low)
    filled = (
        select(func.sum(upper - lower))
        .where(
            STRETCH.series_id == COVERAGE.series_id, STRETCH.high_um > low, STRETCH.low_um < high
        )
        .correlate(COVERAGE)
        .scalar_subquery()
    )
    # Of stretches that all lie elsewhere, the sum is NULL.
    enough = func.coalesce(filled, 0) >= need
    return and_(*clauses, enough if gaps else or_(COVERAGE.stretches == 1, enough))


def _midnight(day: date, zone: Any) -> datetime:
    return datetime.combine(day, time(), zone)


def _prior(days: int | None) -> ColumnElement[bool]:
    """Whether there is a prior under the same patient key."""
    query = (
        select(1)
        .select_from(PRIOR)
        .join(COVERAGE_OF_PRIOR, COVERAGE_OF_PRIOR.series_id == PRIOR.id)
        .where(
            PRIOR.patient_id == SERIES.patient_id,
            PRIOR.issuer == SERIES.issuer,
            SERIES.patient_id != "",  # nobody has no priors
        )
    )
    return exists(_before(query, SERIES, days).correlate(SERIES))


def _linked_prior(days: int | None) -> ColumnElement[bool]:
    """Whether there is a prior under another key of the patient.

    Patients of several keys are few: what they have is found once, not for each Series.
    """
    own, other, one = aliased(MEMBER), aliased(MEMBER), aliased(SERIES)
    query = (
        select(one.id)
        .select_from(own)
        .join(one, and_(one.patient_id == own.patient_id, one.issuer == own.issuer))
        .join(other, other.group_id == own.group_id)
        .join(PRIOR, and_(PRIOR.patient_id == other.patient_id, PRIOR.issuer == other.issuer))
        .join(COVERAGE_OF_PRIOR, COVERAGE_OF_PRIOR.series_id == PRIOR.id)
    )
    return SERIES.id.in_(_before(query, one, days))


def _before(query: Select[Any], series: Any, days: int | None) -> Select[Any]:
    """Return a query for those that are priors of a Series alone."""
    query = query.where(
        PRIOR.study_uid != series.study_uid, PRIOR.study_datetime < series.study_datetime
    )
    if days is None:
        return query
    return query.where(_DaysBetween(PRIOR.study_datetime, series.study_datetime) <= days)


PRIOR = aliased(SERIES)
COVERAGE_OF_PRIOR = aliased(COVERAGE)


class _DaysBetween(FunctionElement[int]):
    """Days from one time's date to another's."""

    type = Integer()
    inherit_cache = True


@compiles(_DaysBetween, "sqlite")
def _days_sqlite(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    first, last = (compiler.process(c, **kw) for c in element.clauses)
    return f"CAST(julianday(date({last})) - julianday(date({first})) AS INTEGER)"


@compiles(_DaysBetween, "postgresql")
def _days_postgres(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    first, last = (compiler.process(c, **kw) for c in element.clauses)
    return f"(CAST({last} AS DATE) - CAST({first} AS DATE))"


class _Within(FunctionElement[bool]):
    """Whether a text has another, of lower case, within; A to Z in any case."""

    type = Boolean()
    inherit_cache = True


@compiles(_Within, "sqlite")
def _within_sqlite(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    text, part = (compiler.process(c, **kw) for c in element.clauses)
    return f"(instr(lower({text}), {part}) > 0)"


@compiles(_Within, "postgresql")
def _within_postgres(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    text, part = (compiler.process(c, **kw) for c in element.clauses)
    # By the locale "C", lower() knows A to Z, as that of SQLite does.
    return f'(strpos(lower({text} COLLATE "C"), {part}) > 0)'


@dataclass(frozen=True, slots=True)
class _Box:
    """Where the ends of a curve may lie, micrometres, both bounds included."""

    low_min: int = -region.LIMIT_UM
    low_max: int = region.LIMIT_UM
    high_min: int = -region.LIMIT_UM
    high_max: int = region.LIMIT_UM

    @property
    def possible(self) -> bool:
        """Whether a curve may have its ends here."""
        return self.low_min <= min(self.low_max, self.high_max) and self.high_min <= self.high_max

    def __and__(self, other: "_Box") -> "_Box | None":
        box = _Box(
            max(self.low_min, other.low_min),
            min(self.low_max, other.low_max),
            max(self.high_min, other.high_min),
            min(self.high_max, other.high_max),
        )
        return box if box.possible else None


def _boxes(node: Node, positive: bool, digests: frozenset[str]) -> list[_Box]:
    """Return boxes of which every match without missing slices lies in one.

    They may hold others as well. `digests` are those of all bundles that made curves.
    """
    match node:
        case Not(part):
            return _boxes(part, not positive, digests)
        case And(parts) | Or(parts):
            each = [_boxes(part, positive, digests) for part in parts]
            if isinstance(node, Or) == positive:
                return _few([box for found in each for box in found])
            common = [_Box()]
            for found in each:
                joined = (a & b for a in common for b in found)
                common = _few([box for box in joined if box is not None])
            return common
        case Filled(span, by_bundle):
            known = [s for digest, s in by_bundle if digest in digests]
            spans = known if span is None else [span]
            if positive:
                return _few([_filling(s) for s in spans])
            if span is None and digests - {digest for digest, _ in by_bundle}:
                return [_Box()]  # curves of a bundle without the region
            return _few([box for s in spans for box in _not_filling(s)])
        case Number("low" | "high" as field, order, value):
            return _of_end(field, order, int(value), positive)
    return [_Box()]


def _filling(s: Span) -> _Box:
    return _Box(low_max=s.high_um - s.need_um, high_min=s.low_um + s.need_um)


def _not_filling(s: Span) -> list[_Box]:
    most, least = s.high_um - s.need_um, s.low_um + s.need_um
    above, below = _Box(low_min=most + 1, high_min=most + 1), _Box(high_max=least - 1)
    # Or it lies within the span, and is too short.
    short = _Box(s.low_um + 1, most, least, s.high_um - 1)
    return [box for box in (above, below, short) if box.possible]


def _of_end(field: str, order: str, value: int, positive: bool) -> list[_Box]:
    if not positive:
        order = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "=": "!="}[order]
    least = value if order in (">=", "=") else value + 1 if order == ">" else -region.LIMIT_UM
    most = value if order in ("<=", "=") else value - 1 if order == "<" else region.LIMIT_UM
    ends = _Box(low_min=least, low_max=most, high_min=least)
    if field == "high":
        ends = _Box(low_max=most, high_min=least, high_max=most)
    return [ends] if ends.possible else []


def _few(boxes: list[_Box]) -> list[_Box]:
    """Return the boxes, or where they are many, one around all."""
    return boxes if len(boxes) <= MAX_BOXES else [_around(boxes)]


def _around(boxes: Sequence[_Box]) -> _Box:
    return _Box(
        min(b.low_min for b in boxes),
        max(b.low_max for b in boxes),
        min(b.high_min for b in boxes),
        max(b.high_max for b in boxes),
    )


def _stretches(session: Session, ids: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """Return id -> stretches of the curves that have several."""
    found: dict[int, list[tuple[int, int]]] = {}
    query = select(STRETCH.series_id, STRETCH.low_um, STRETCH.high_um)
    query = query.where(STRETCH.series_id.in_(ids)).order_by(STRETCH.series_id, STRETCH.low_um)
    for series_id, low, high in session.execute(query):
        found.setdefault(series_id, []).append((low, high))
    return found


def _match(
    s: schema.Series,
    c: schema.Coverage | None,
    digest: str | None,
    tables: Mapping[str, Sequence[Region]],
    filled: Mapping[int, Sequence[tuple[int, int]]],
) -> Match:
    mm = region.UM_PER_MM
    shares: list[tuple[Region, float]] = []
    if c is not None and digest is not None:
        shares = region.shares(filled.get(s.id, [(c.low_um, c.high_um)]), tables[digest])
    return Match(
        id=s.id,
        series_uid=s.series_uid,
        study_uid=s.study_uid,
        patient=PatientKey(s.patient_id, s.issuer),
        study_datetime=s.study_datetime,
        modality=s.modality,
        body_part_examined=s.body_part_examined,
        manufacturer=s.manufacturer,
        state=SeriesState(s.state),
        reason=Reason(s.reason) if s.reason else None,
        received=s.received,
        model=digest,
        slices=c.slices if c else None,
        spacing_mm=c.spacing_um / mm if c else None,
        quality=c.quality if c else None,
        slope=c.slope if c else None,
        height_mm=(c.low_um / mm, c.high_um / mm) if c else None,
        flags=flags_of(c.flags) if c else (),
        coverage=tuple(shares),
    )


def _record(
    session: Session,
    s: schema.Series,
    c: schema.Coverage | None,
    digest: str | None,
    filled: Mapping[int, Sequence[tuple[int, int]]],
) -> Record:
    others = session.scalars(
        select(SERIES.study_datetime)
        .join(COVERAGE, COVERAGE.series_id == SERIES.id)
        .where(
            of_keys(
                SERIES.patient_id,
                SERIES.issuer,
                patient_keys(session, PatientKey(s.patient_id, s.issuer)),
            ),
            SERIES.patient_id != "",
            SERIES.study_uid != s.study_uid,
        )
    )
    return Record(
        texts={name: getattr(s, column.key) for name, column in TEXTS.items()},
        times={name: getattr(s, column.key) for name, column in TIMES.items()},
        bundle=digest,
        stretches=tuple(filled.get(s.id, [(c.low_um, c.high_um)])) if c else (),
        numbers={name: getattr(c, column.key) for name, column in NUMBERS.items()} if c else {},
        flags=frozenset(flags_of(c.flags)) if c else frozenset(),
        others=tuple(others),
    )
