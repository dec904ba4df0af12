"""Which slice of a Series to open first for a region of the body."""

from dataclasses import dataclass

import numpy as np

from dicomnode.core import region
from dicomnode.core.region import Region, Showing
from dicomnode.model import Floats


@dataclass(frozen=True, slots=True)
class Opening:
    """A slice by its index in a curve, and why that one."""

    index: int  # shows the middle of the region, or is the nearest to it
    shown: Showing | None  # what the Series shows of the region, None: nothing
    # From the height of the slice to the region, 0 within it; positive where the region lies
    # towards the head.
    distance_mm: float


def opening(z_mm: Floats, height_mm: Floats, wanted: Region) -> Opening | None:
    """Return the slice in the middle of what a Series shows of a region.

    Of a region that it does not show, in the sense of `region.showing`, the nearest slice: one of
    its ends, or one beside the region where slices are missing. None where no limit of the region
    is known.

    Parameters
    ----------
    z_mm, height_mm : (N,) float64
        A curve: positions, strictly increasing, and body heights.
    wanted : Region
        A region with one known limit reaches, as far as is known, without end.
    """
    if wanted.low_mm is None and wanted.high_mm is None:
        return None
    low = -np.inf if wanted.low_mm is None else wanted.low_mm
    high = np.inf if wanted.high_mm is None else wanted.high_mm
    sound, height, _ = region.smoothed(z_mm, height_mm)
    where = np.flatnonzero(sound)
    distance = np.maximum(low - height, 0.0) - np.maximum(height - high, 0.0)
    found = next(iter(region.showing(z_mm, height_mm, [wanted])), None)
    if found is None:
        at = int(np.abs(distance).argmin())
    else:
        # Half way between the outermost slices, and not at the height half way: the order of
        # slices is known exactly, their heights to some millimetres.
        middle = (z_mm[found.first] + z_mm[found.last]) / 2
        at = int(np.abs(z_mm[where] - middle).argmin())
    return Opening(int(where[at]), found, float(distance[at]))
