"""Where the bars and links of a patient's timeline lie: numbers in, numbers out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

LEFT, RIGHT, TOP, BOTTOM = 90.0, 80.0, 16.0, 56.0  # around the plot, in units of the picture
HEIGHT = 420.0  # of the plot
WIDTH = 980.0  # of the plot, where Studies do not need more
GAP = 52.0  # between Studies, at least: their dates are beneath
BAR = 14.0
TICK_MM = 100.0
MARGIN_MM = 40.0


@dataclass(frozen=True, slots=True)
class Covered:
    """A Series of a Study, and the body heights that it reaches over, mm."""

    study_uid: str
    series_uid: str
    when: datetime | None
    low_mm: float
    high_mm: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A Series as it is drawn."""

    of: Covered
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Column:
    """A Study: where it stands, and its date."""

    study_uid: str
    when: datetime | None
    x: float


@dataclass(frozen=True, slots=True)
class Link:
    """A pair, from the prior to the newer Study."""

    fixed: str
    moving: str
    path: str  # of SVG


@dataclass(frozen=True, slots=True)
class Drawing:
    """Everything that is drawn, in units of the picture."""

    width: float
    height: float
    bars: tuple[Bar, ...]
    columns: tuple[Column, ...]
    links: tuple[Link, ...]
    ticks: tuple[tuple[float, float], ...]  # body height, mm, and y
    low_mm: float
    high_mm: float

    def y(self, height_mm: float) -> float:
        """Return where a body height lies, the head up."""
        share = (self.high_mm - height_mm) / (self.high_mm - self.low_mm)
        return round(TOP + HEIGHT * min(max(share, 0.0), 1.0), 1)


def draw(series: Sequence[Covered], pairs: Sequence[tuple[str, str]]) -> Drawing:
    """Return how Series of a patient lie over body height and time.

    Studies stand at their time, the oldest on the left, but no nearer to each other than their
    dates can be read; those without a date come last.

    Parameters
    ----------
    series : sequence of Covered
        At least one.
    pairs : sequence of (fixed, moving)
        Study Instance UIDs.
    """
    low = math.floor((min(s.low_mm for s in series) - MARGIN_MM) / TICK_MM) * TICK_MM
    high = math.ceil((max(s.high_mm for s in series) + MARGIN_MM) / TICK_MM) * TICK_MM
    columns = _columns(series)
    width = LEFT + RIGHT + max(WIDTH, columns[-1].x - LEFT + GAP)
    at = {column.study_uid: column.x for column in columns}
    frame = Drawing(width, TOP + HEIGHT + BOTTOM, (), columns, (), (), low, high)
    bars: list[Bar] = []
    within: dict[str, int] = {}
    for s in series:
        k = within.setdefault(s.study_uid, 0)
        within[s.study_uid] = k + 1
        y = frame.y(s.high_mm)
        # Series of one Study side by side, as many as there is room for, then over each other.
        x = at[s.study_uid] - BAR / 2 + min(k, 2) * (BAR + 3)
        bars.append(Bar(s, round(x, 1), y, BAR, round(max(frame.y(s.low_mm) - y, 2.0), 1)))
    ticks = tuple(
        (mm, frame.y(mm))
        for mm in (low + TICK_MM * k for k in range(int((high - low) / TICK_MM) + 1))
    )
    links = tuple(
        _link(fixed, moving, bars) for fixed, moving in pairs if {fixed, moving} <= set(at)
    )
    return Drawing(width, frame.height, tuple(bars), columns, links, ticks, low, high)


def _columns(series: Sequence[Covered]) -> tuple[Column, ...]:
    times: dict[str, datetime | None] = {}
    for s in series:
        times.setdefault(s.study_uid, s.when)
    order = sorted(times, key=lambda uid: (times[uid] is None, times[uid] or datetime.min, uid))
    known = [t for uid in order if (t := times[uid]) is not None]
    first = known[0] if known else None
    seconds = (known[-1] - known[0]).total_seconds() if known else 0.0
    found: list[Column] = []
    for uid in order:
        when = times[uid]
        x = LEFT + GAP / 2
        if when is not None and first is not None and seconds:
            x += (WIDTH - GAP) * (when - first).total_seconds() / seconds
        if found:
            x = max(x, found[-1].x + GAP)
        found.append(Column(uid, when, round(x, 1)))
    return tuple(found)


def _link(fixed: str, moving: str, bars: Sequence[Bar]) -> Link:
    """Return a line from the middle of what the prior covers to that of the newer Study."""
    ends = []
    for study_uid in (moving, fixed):
        bar = next(bar for bar in bars if bar.of.study_uid == study_uid)
        ends.append((bar.x, bar.y + bar.height / 2))
    (x0, y0), (x1, y1) = sorted(ends)
    start, end = x0 + BAR, x1
    bend = (start + end) / 2
    path = f"M{start:.1f} {y0:.1f} C{bend:.1f} {y0:.1f} {bend:.1f} {y1:.1f} {end:.1f} {y1:.1f}"
    return Link(fixed, moving, path)
