"""A coronal strip through kept network inputs: what a curve looks like, beside the curve."""

import numpy as np
import numpy.typing as npt

from dicomnode.core import geometry
from dicomnode.model import Floats

Grey = npt.NDArray[np.uint8]

MAX_ROWS = 2000  # of a picture


def middle(stack: Grey) -> Grey:
    """Return the coronal plane through the middle of a stack, where inputs are centred on the body.

    Parameters
    ----------
    stack : (N, size, size) uint8
        Inputs, feet to head.

    Returns
    -------
    (N, size) uint8
        The mean of the two middle rows of each.
    """
    half = stack.shape[1] // 2
    pair = stack[:, half - 1 : half + 1].astype(np.uint16)
    lines: Grey = (pair.sum(axis=1) // 2).astype(np.uint8)
    return lines


def strip(lines: Grey, z_mm: Floats, low_mm: float, high_mm: float, pixel_mm: float) -> Grey:
    """Return lines of slices as a picture whose rows are even in z, head up.

    Between neighbours it is interpolated. Where a slice is missing, and further than half a
    slice beyond the ends, nothing is shown.

    Parameters
    ----------
    lines : (N, C) uint8
        One line a slice.
    z_mm : (N,) float64
        Positions, strictly increasing, N >= 2.
    low_mm, high_mm : float
        What the picture reaches over, mm; its lower and upper edge.
    pixel_mm : float
        Height of a row, mm, give or take what makes their number a whole one.

    Returns
    -------
    (R, C, 2) uint8
        Grey value and opacity, 255 where something is shown and 0 elsewhere.
    """
    if not high_mm > low_mm:
        raise ValueError(f"from {low_mm} to {high_mm} mm there is nothing to show")
    z = np.asarray(z_mm, float)
    rows = int(np.clip(round((high_mm - low_mm) / pixel_mm), 1, MAX_ROWS))
    at = high_mm - (np.arange(rows) + 0.5) * (high_mm - low_mm) / rows
    above = np.searchsorted(z, at).clip(1, len(z) - 1)
    share = ((at - z[above - 1]) / (z[above] - z[above - 1])).clip(0, 1)[:, None]
    grey = lines[above - 1] * (1 - share) + lines[above] * share

    usual = geometry.usual_steps(z)
    half = geometry.slice_spacing(usual) / 2
    is_gap = np.diff(z) > geometry.GAP_RATIO * usual
    nearest = np.where(at - z[above - 1] <= z[above] - at, above - 1, above)
    beside = np.abs(at - z[nearest]) <= half[nearest]
    inside = (at >= z[0]) & (at <= z[-1]) & ~is_gap[above - 1]
    picture = np.zeros((rows, lines.shape[1], 2), np.uint8)
    shown = inside | beside
    picture[shown, :, 0] = np.rint(grey[shown])
    picture[shown, :, 1] = 255
    return picture


def span(z_mm: Floats) -> tuple[float, float]:
    """Return what slices reach over, half a slice beyond the ends included, mm."""
    half = geometry.slice_spacing(geometry.usual_steps(np.asarray(z_mm, float))) / 2
    return float(z_mm[0] - half[0]), float(z_mm[-1] + half[-1])
