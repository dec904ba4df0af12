"""The offset that aligns a moving curve onto a fixed one: the paper's two methods, and ours.

`z_fixed = z_moving + offset_mm` for the same anatomy. Scores of two curves are comparable
only when one bundle gave them.

References
----------
Meine and Hering 2019, "Efficient Prealignment of CT Scans for Registration through a
Bodypart Regressor", section 2.2.
"""

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from dicomnode.core import robust
from dicomnode.core.robust import Covariance
from dicomnode.model import Floats, Method, Offset, OffsetStatus, ScoreCurve

SPACING_MM = 1.0  # both curves are resampled to it for l1
# Over a few slices any two curves agree somewhere: below this overlap no shift is tried,
# or below half the shorter curve, where that is less.
MIN_OVERLAP_MM = 30.0
# The fast method divides by the score difference of the outer fixed slices.
MIN_SLOPE = 1e-6
ROWS = 128  # shifts at a time: 64 to 256 are as fast


def align(
    fixed: ScoreCurve,
    moving: ScoreCurve,
    method: Method,
    covariance: Covariance | None = None,
) -> Offset:
    """Return the offset of moving onto fixed by the method.

    `covariance` is the bundle's; the robust method refuses without one.

    Raises
    ------
    ValueError
        If the curves were scored by different bundles.
    """
    if fixed.model != moving.model:
        raise ValueError(f"curves of different bundles: {fixed.model} and {moving.model}")
    match method:
        case Method.FAST:
            return fast(fixed, moving)
        case Method.L1:
            return l1(fixed, moving)
        case Method.ROBUST:
            return robust.robust(fixed, moving, covariance)


def fast(fixed: ScoreCurve, moving: ScoreCurve) -> Offset:
    """Return the offset from three slices: first and last fixed, centre moving.

    The line through the two fixed slices tells at which position the fixed scan has,
    or would have, the centre moving slice's score; `extrapolated` in the latter case.
    """
    first, last = float(fixed.score[0]), float(fixed.score[-1])
    centre = len(moving.z_mm) // 2
    extent = float(fixed.z_mm[-1] - fixed.z_mm[0])
    slope = (last - first) / extent  # score a mm
    if slope < MIN_SLOPE:
        return _refuse(Method.FAST, "the fixed scan's score does not grow towards the head")
    z_fixed = float(fixed.z_mm[0]) + (float(moving.score[centre]) - first) / slope
    offset_mm = z_fixed - float(moving.z_mm[centre])
    inside = fixed.z_mm[0] <= z_fixed <= fixed.z_mm[-1]
    return Offset(
        method=Method.FAST,
        status=OffsetStatus.OK if inside else OffsetStatus.EXTRAPOLATED,
        offset_mm=offset_mm,
        overlap_mm=overlap_mm(fixed.z_mm, moving.z_mm + offset_mm),
    )


def l1(fixed: ScoreCurve, moving: ScoreCurve) -> Offset:
    """Return the shift with the lowest mean absolute score difference over the overlap.

    Both curves are resampled to 1 mm; every shift with enough overlap is tried, so that
    one curve may lie inside the other or hang over either end. `extrapolated` where the
    two scans share no score: the answer is then the end of the search, not a match.
    """
    f, m = _resample(fixed), _resample(moving)
    least = max(1, int(min(MIN_OVERLAP_MM / SPACING_MM, len(f) / 2, len(m) / 2)))
    shift, _ = _best_shift(f, m, least)
    offset_mm = float(fixed.z_mm[0] - moving.z_mm[0]) + shift * SPACING_MM
    shared = min(f.max(), m.max()) >= max(f.min(), m.min())
    return Offset(
        method=Method.L1,
        status=OffsetStatus.OK if shared else OffsetStatus.EXTRAPOLATED,
        offset_mm=offset_mm,
        overlap_mm=overlap_mm(fixed.z_mm, moving.z_mm + offset_mm),
    )


def overlap_mm(z_fixed: Floats, z_moving_aligned: Floats) -> float:
    """Return the length both scans cover, mm, 0 where they do not meet."""
    top = min(z_fixed[-1], z_moving_aligned[-1])
    return max(0.0, float(top - max(z_fixed[0], z_moving_aligned[0])))


def _resample(curve: ScoreCurve) -> Floats:
    z = np.arange(curve.z_mm[0], curve.z_mm[-1] + SPACING_MM / 2, SPACING_MM)
    return np.interp(z, curve.z_mm, curve.score)


def _best_shift(f: Floats, m: Floats, least: int) -> tuple[int, float]:
    """Return (samples by which m is shifted against f, mean absolute difference there).

    Every shift is a window of one array: (shifts, len(m)). To go through all of them in float64,
    NaN where the window hangs over, takes 4.5 ms for two curves of 600 samples. Here float32
    rules out the shifts that cannot be the best one, whatever its rounding was, which takes
    0.3 ms, and float64 decides between the few that are left.
    """
    pad = len(m) - least
    shifts = np.flatnonzero(_may_be_best(f, m, pad))
    padded = np.concatenate([np.full(pad, np.nan), f, np.full(pad, np.nan)])
    difference = np.abs(sliding_window_view(padded, len(m))[shifts] - m)
    cost = np.nanmean(difference, axis=1)
    best = int(np.argmin(cost))
    return int(shifts[best]) - pad, float(cost[best])


def _may_be_best(f: Floats, m: Floats, pad: int) -> npt.NDArray[np.bool_]:
    """Return which shifts may have the lowest mean absolute difference: (shifts,)."""
    middle = (f.mean() + m.mean()) / 2  # small numbers, small rounding
    f, m = f - middle, m - middle
    m32 = m.astype(np.float32)
    zeros = np.zeros(pad, np.float32)
    windows = sliding_window_view(np.concatenate([zeros, f.astype(np.float32), zeros]), len(m))
    sums = np.empty(len(windows), np.float32)
    ones = np.ones(len(m), np.float32)
    buffer = np.empty((ROWS, len(m)), np.float32)  # stays in the cache
    for i in range(0, len(windows), ROWS):
        part = windows[i : i + ROWS]
        difference = np.abs(
            np.subtract(part, m32, out=buffer[: len(part)]), out=buffer[: len(part)]
        )
        np.dot(difference, ones, out=sums[i : i + ROWS])
    # Samples of m that hang over added |0 - m|, without rounding: take that away again.
    added = np.concatenate([[0.0], np.abs(m32).cumsum(dtype=float)])
    shift = np.arange(len(windows)) - pad
    first, past = (-shift).clip(0), (len(f) - shift).clip(None, len(m))
    count = past - first
    cost = (sums - added[first] - (added[-1] - added[past])) / count
    # A sum of n terms errs by less than n units of rounding of the sum of their sizes (Higham,
    # Accuracy and Stability of Numerical Algorithms, 2002, eq. 4.4), each term by less than one
    # unit of its own size and of those it came from; doubled for terms of second order.
    unit = np.finfo(np.float32).eps / 2
    sizes = float(np.abs(f).max() + np.abs(m).max())
    error = 2 * unit * ((len(m) + 2) * sums.astype(float) + len(m) * sizes) / count
    return np.asarray(cost - error <= (cost + error).min())


def _refuse(method: Method, reason: str) -> Offset:
    return Offset(method=method, status=OffsetStatus.REFUSED, reason=reason)
