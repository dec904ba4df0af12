"""Which slice of one Series shows what a slice of another one does, under an offset."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dicomnode.core import geometry
from dicomnode.model import Floats

NONE = -1  # in place of an index
# So many moving slices a straight line may miss by, and no more, to stand for all of them.
STRAIGHT = 0.5


@dataclass(frozen=True, slots=True)
class SliceMap:
    """For each of N fixed slices the nearest moving one."""

    index: npt.NDArray[np.intp]  # (N,) of the moving slice, NONE where there is none
    distance_mm: Floats  # (N,) towards the head, from the fixed slice to the moving one; or NaN


@dataclass(frozen=True, slots=True)
class Line:
    """`moving = intercept + slope * fixed`, in slices counted from 1, feet to head."""

    intercept: float
    slope: float


def slice_map(fixed_z_mm: Floats, moving_z_mm: Floats, offset_mm: float) -> SliceMap:
    """Return the moving slice nearest to each fixed one; of two as near, the lower.

    There is none where the nearest lies further away than half of the spacing that is usual
    there, of that Series which has the wider one: beyond the ends, and where slices are missing.

    Parameters
    ----------
    fixed_z_mm : (N,) float64
        Positions, strictly increasing, N >= 2.
    moving_z_mm : (M,) float64
        Likewise.
    offset_mm : float
        `z_fixed = z_moving + offset_mm` for the same anatomy.
    """
    fixed, moving = np.asarray(fixed_z_mm, float), np.asarray(moving_z_mm, float) + offset_mm
    above = np.searchsorted(moving, fixed).clip(1, len(moving) - 1)
    index = np.where(fixed - moving[above - 1] <= moving[above] - fixed, above - 1, above)
    distance = moving[index] - fixed
    usual = np.maximum(_spacing(fixed), _spacing(moving)[index])
    near = np.abs(distance) <= usual / 2 + geometry.SAME_POSITION_MM
    return SliceMap(np.where(near, index, NONE), np.where(near, distance, np.nan))


def line(fixed_z_mm: Floats, moving_z_mm: Floats, offset_mm: float) -> Line | None:
    """Return the map as a straight line, None where slices of either side are too uneven for one.

    It says where in the moving Series a fixed slice lies, also between slices and beyond the
    ends; rounded, it is the slice that `slice_map` gives, or, half way, the one beside.
    """
    fixed, moving = np.asarray(fixed_z_mm, float), np.asarray(moving_z_mm, float) + offset_mm
    fixed_step, fixed_start, fixed_off = _straight(fixed)
    moving_step, moving_start, moving_off = _straight(moving)
    if fixed_off + moving_off > STRAIGHT * moving_step:
        return None
    slope = fixed_step / moving_step
    return Line(1 + (fixed_start - moving_start) / moving_step - slope, slope)


def _spacing(z_mm: Floats) -> Floats:
    return geometry.slice_spacing(geometry.usual_steps(z_mm))


def _straight(z_mm: Floats) -> tuple[float, float, float]:
    """Return spacing, first position and largest distance of the line nearest to (N,) slices."""
    order = np.arange(len(z_mm))
    step, start = np.polyfit(order, z_mm, 1)
    return float(step), float(start), float(np.abs(start + step * order - z_mm).max())
