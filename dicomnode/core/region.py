"""Body height -> named regions of the body, and the share of each that a Series covers.

The table of regions belongs to a weight bundle: its limits are body heights of that bundle.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.core import curve, geometry
from dicomnode.errors import WeightsError
from dicomnode.model import Floats

SCHEME = "SCT"  # SNOMED CT, as PS3.16 names it
KEY = "regions"  # of a bundle's manifest
# A series that covers half of a region is said to show it.
COVERED = 0.5
# Rounding aside, all of a region.
WHOLE = 0.9995
# A slice further than this from the line through its Series, and further than five median
# deviations, is read wrongly (metal, a limb beside the trunk): it says nothing of coverage.
OUTLIER_MM = 50.0
OUTLIER_DEVIATIONS = 5.0
# Heights are compared in whole micrometres: a share is then the same to the last bit wherever it
# is worked out, here or in a database.
UM_PER_MM = 1000
LIMIT_UM = 1_000_000_000  # no height lies further from 0; it fits four bytes, as do differences


class Support(StrEnum):
    """How a limit is known."""

    LANDMARK = "landmark"  # measured, at a landmark found from HU in several patients
    PROPORTION = "proportion"  # placed between landmarks by published relations of anatomy
    UNSUPPORTED = "unsupported"  # the data do not reach there: no height is claimed


class Extent(StrEnum):
    """How much of a region a Series shows, given how its ends vary between patients."""

    COMPLETE = "complete"  # one sd beyond each end is covered too
    PARTIAL = "partial"  # one sd within the ends, something is missing
    INDETERMINATE = "indeterminate"  # neither can be said, or an end is not known


@dataclass(frozen=True, slots=True)
class Limit:
    """One end of a region; height and sd between patients, mm, are None where unsupported."""

    support: Support
    height_mm: float | None = None
    sd_mm: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.height_mm, self.sd_mm) if v is not None]
        if len(given) != (0 if self.support is Support.UNSUPPORTED else 2):
            raise ValueError(f"a limit known by {self.support} with {len(given)} of height and sd")
        if not all(math.isfinite(v) for v in given):
            raise ValueError("a limit that is not finite")
        if self.sd_mm is not None and self.sd_mm < 0:
            raise ValueError(f"a negative sd, {self.sd_mm}")


@dataclass(frozen=True, slots=True)
class Region:
    """A body part or an organ, from `low` (feet) to `high` (head)."""

    name: str
    code: str  # SNOMED CT
    meaning: str  # of the code, as PS3.16 Annex D has it
    low: Limit
    high: Limit
    part: str = ""  # the body part that an organ belongs to, empty for a body part

    def __post_init__(self) -> None:
        if not self.name or not self.meaning:
            raise ValueError("a region without name or meaning")
        if not self.code.isascii() or not self.code.isdigit():
            raise ValueError(f"code {self.code!r} is no SNOMED CT identifier")
        if self.low_mm is not None and self.high_mm is not None and self.low_mm >= self.high_mm:
            raise ValueError(f"low_mm {self.low_mm} is not below high_mm {self.high_mm}")

    @property
    def low_mm(self) -> float | None:
        """Body height of the lower end, None where unsupported."""
        return self.low.height_mm

    @property
    def high_mm(self) -> float | None:
        """Body height of the upper end, None where unsupported."""
        return self.high.height_mm

    @property
    def spread_mm(self) -> float:
        """The greater sd of its ends between patients, of those that are known."""
        return max(self.low.sd_mm or 0.0, self.high.sd_mm or 0.0)

    @property
    def span_um(self) -> tuple[int, int] | None:
        """Lower and upper end in micrometres, None where one of them is unsupported."""
        if self.low_mm is None or self.high_mm is None:
            return None
        low = to_um(self.low_mm)
        return low, max(to_um(self.high_mm), low + 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the row that a manifest holds."""
        values: dict[str, Any] = {"name": self.name, "part": self.part, "scheme": SCHEME}
        values |= {"code": self.code, "meaning": self.meaning}
        for end, limit in (("low", self.low), ("high", self.high)):
            values[f"{end}_mm"] = limit.height_mm
            values[f"{end}_sd_mm"] = limit.sd_mm
            values[f"{end}_support"] = str(limit.support)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Region":
        """Return the region of a row.

        Raises
        ------
        LookupError, TypeError, ValueError
            If a value is missing or wrong.
        """
        if values["scheme"] != SCHEME:
            raise ValueError(f"scheme {values['scheme']!r}, expected {SCHEME}")
        texts = {key: values[key] for key in ("name", "code", "meaning", "part")}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"{key} is {text!r}, not text")
        return cls(**texts, low=_limit(values, "low"), high=_limit(values, "high"))


def from_manifest(manifest: Mapping[str, Any]) -> tuple[Region, ...]:
    """Return the regions of a bundle's manifest, none where it was not calibrated.

    Raises
    ------
    WeightsError
        If the table is not one; the message names the row.
    """
    rows = manifest.get(KEY, [])
    if not isinstance(rows, list):
        raise WeightsError(f"{KEY}: a list is expected, not {type(rows).__name__}")
    regions: list[Region] = []
    for i, row in enumerate(rows):
        where = f"{KEY}[{i}]"
        if not isinstance(row, dict):
            raise WeightsError(f"{where}: a region is expected, not {row!r}")
        try:
            found = Region.from_dict(row)
        except KeyError as exc:
            raise WeightsError(f"{where} ({row.get('name')}): no {exc.args[0]}") from exc
        except (TypeError, ValueError) as exc:
            raise WeightsError(f"{where} ({row.get('name')}): {exc}") from exc
        if lookup(regions, found.name) or lookup(regions, found.code):
            raise WeightsError(f"{where} ({found.name}): its name or code is there already")
        regions.append(found)
    return tuple(regions)


def lookup(regions: Iterable[Region], key: str) -> Region | None:
    """Return the region of a name, in any case, or of a SNOMED CT code."""
    wanted = key.strip().lower()
    return next((r for r in regions if wanted in (r.name, r.code)), None)


def covered(z_mm: Floats, height_mm: Floats) -> Floats:
    """Return the intervals of body height that the slices of a Series fill.

    Neighbours fill what lies between them unless a slice is missing there; each stretch
    ends half a slice beyond its last slices. A curve that falls is read as one that rises:
    its order is the header's fault, its slices are there all the same.

    Parameters
    ----------
    z_mm : (N,) float64
        Positions, strictly increasing, N >= 2.
    height_mm : (N,) float64
        Body heights; noise and wrong slices are smoothed away.

    Returns
    -------
    (K, 2) float64
        Lower and upper ends, mm, in ascending order, disjoint.
    """
    sound, height, slope = smoothed(z_mm, height_mm)
    usual = geometry.usual_steps(z_mm)
    run = np.concatenate([[0], np.cumsum(np.diff(z_mm) > geometry.GAP_RATIO * usual)])
    # Half of what a slice stands for; a slice at an end has one neighbour, others the lesser.
    half_mm = 0.5 * geometry.slice_spacing(usual) * np.clip(abs(slope), *curve.SLOPE_RANGE)
    run, half_mm = run[sound], half_mm[sound]
    ends = []
    for r in np.unique(run):
        at = np.flatnonzero(run == r)
        first, last = (at[0], at[-1]) if slope >= 0 else (at[-1], at[0])
        ends.append((height[first] - half_mm[first], height[last] + half_mm[last]))
    merged: list[tuple[float, float]] = []
    for low, high in sorted(ends):
        if merged and low <= merged[-1][1]:
            low, high = merged[-1][0], max(high, merged.pop()[1])
        merged.append((float(low), float(high)))
    return np.array(merged)


def stretches(z_mm: Floats, height_mm: Floats) -> tuple[tuple[int, int], ...]:
    """Return what `covered` does in whole micrometres, ascending, with space between."""
    merged: list[tuple[int, int]] = []
    for low_mm, high_mm in covered(z_mm, height_mm):
        low = to_um(low_mm)
        high = max(to_um(high_mm), low + 1)
        if merged and low <= merged[-1][1]:
            low, high = merged[-1][0], max(high, merged.pop()[1])
        merged.append((low, high))
    return tuple(merged)


def filled_um(filled: Iterable[tuple[int, int]], low_um: int, high_um: int) -> int:
    """Return how much of a span disjoint stretches fill, all in micrometres."""
    return sum(max(0, min(high, high_um) - max(low, low_um)) for low, high in filled)


def to_um(height_mm: float) -> int:
    """Return a body height in whole micrometres, within `LIMIT_UM` of 0."""
    return round(min(max(height_mm * UM_PER_MM, -LIMIT_UM), LIMIT_UM))


def coverage(
    z_mm: Floats, height_mm: Floats, regions: Sequence[Region]
) -> list[tuple[Region, float]]:
    """Return the share of each region that the slices of a Series cover.

    Parameters
    ----------
    z_mm, height_mm : (N,) float64
        A curve: positions, strictly increasing, and body heights.
    regions : sequence of Region
        A bundle's table.

    Returns
    -------
    list of (Region, float)
        In the order of the table: 0 (none of it) to 1. A region with an unsupported limit has
        no share and is left out.
    """
    if all(region.span_um is None for region in regions):
        return []
    return shares(stretches(z_mm, height_mm), regions)


def shares(
    filled: Sequence[tuple[int, int]], regions: Sequence[Region]
) -> list[tuple[Region, float]]:
    """Return what `coverage` does, of the stretches of a Series."""
    found = []
    for region in regions:
        if (span := region.span_um) is not None:
            found.append((region, filled_um(filled, *span) / (span[1] - span[0])))
    return found


@dataclass(frozen=True, slots=True)
class Showing:
    """A region that a Series shows, and by which slices."""

    region: Region
    share: float | None  # as `coverage` has it, None where an end is not known
    extent: Extent
    first: int  # index of the lowest slice of the curve that shows some of it
    last: int


def showing(z_mm: Floats, height_mm: Floats, regions: Sequence[Region]) -> list[Showing]:
    """Return the regions of which a Series shows something, in the order of the table.

    An end of a region lies elsewhere in every patient: what is covered of a region counts
    only where it is longer than one sd of that (or half of the region, where that is less).
    The slices are judged as `covered` judges them, without those read wrongly.

    Parameters
    ----------
    z_mm, height_mm : (N,) float64
        A curve: positions, strictly increasing, and body heights.
    regions : sequence of Region
        A bundle's table. A region with one known limit counts from there.
    """
    filled = covered(z_mm, height_mm)
    share_of = {region.name: share for region, share in coverage(z_mm, height_mm, regions)}
    sound, height, _ = smoothed(z_mm, height_mm)
    found = []
    for r in regions:
        if r.low_mm is None and r.high_mm is None:
            continue
        low = -math.inf if r.low_mm is None else r.low_mm
        high = math.inf if r.high_mm is None else r.high_mm
        common = _length(filled, low, high)
        if common <= min(r.spread_mm, (high - low) / 2):
            continue
        at = np.flatnonzero((height >= low) & (height <= high))
        if not len(at):  # between two slices, or beyond the last: the nearest one
            at = np.array([np.argmin(np.maximum(low - height, height - high))])
        where = np.flatnonzero(sound)[at]
        ends = int(where[0]), int(where[-1])
        found.append(Showing(r, share_of.get(r.name), _extent(filled, r), *ends))
    return found


def _extent(filled: Floats, r: Region) -> Extent:
    if r.low_mm is None or r.high_mm is None:
        return Extent.INDETERMINATE
    low_sd, high_sd = r.low.sd_mm or 0.0, r.high.sd_mm or 0.0
    low, high = r.low_mm - low_sd, r.high_mm + high_sd
    if _length(filled, low, high) >= WHOLE * (high - low):
        return Extent.COMPLETE
    low, high = r.low_mm + low_sd, r.high_mm - high_sd
    if low >= high:  # a small organ that varies by more than its size: its middle
        low = high = (r.low_mm + r.high_mm) / 2
        missing = not ((filled[:, 0] <= low) & (low <= filled[:, 1])).any()
    else:
        missing = _length(filled, low, high) < WHOLE * (high - low)
    return Extent.PARTIAL if missing else Extent.INDETERMINATE


def _length(filled: Floats, low: float, high: float) -> float:
    """Return the length that (K, 2) disjoint intervals have in common with one, mm."""
    common = np.minimum(filled[:, 1], high) - np.maximum(filled[:, 0], low)
    return float(np.clip(common, 0, None).sum())


def shown(shares: Sequence[tuple[Region, float]]) -> list[str]:
    """Return the names of the body parts a Series shows; of its organs where it shows no part."""
    names = [(r.name, r.part) for r, share in shares if share >= COVERED]
    return [name for name, part in names if not part] or [name for name, _ in names]


def smoothed(z_mm: Floats, height_mm: Floats) -> tuple[npt.NDArray[np.bool_], Floats, float]:
    """Return which slices are read rightly, the heights of these, and their slope.

    Parameters
    ----------
    z_mm, height_mm : (N,) float64
        A curve: positions, strictly increasing, and body heights.

    Returns
    -------
    (N,) bool, (M,) float64, float
        The heights rise with the position throughout, or fall throughout, as the slope does.
    """
    from scipy.optimize import isotonic_regression  # 0.2 s, which most commands need not wait

    z, height = np.asarray(z_mm, float), np.asarray(height_mm, float)
    slope = curve.robust_slope(z, height)
    residual = height - slope * z
    residual = np.abs(residual - np.median(residual))
    sound = residual <= max(OUTLIER_MM, OUTLIER_DEVIATIONS * float(np.median(residual)))
    return sound, isotonic_regression(height[sound], increasing=slope >= 0).x, slope


def _limit(values: Mapping[str, Any], end: str) -> Limit:
    numbers = [values[f"{end}_mm"], values[f"{end}_sd_mm"]]
    for key, number in zip((f"{end}_mm", f"{end}_sd_mm"), numbers, strict=True):
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise TypeError(f"{key} is {number!r}, not a number")
    try:
        return Limit(Support(values[f"{end}_support"]), *numbers)
    except ValueError as exc:
        raise ValueError(f"{end}: {exc}") from exc
