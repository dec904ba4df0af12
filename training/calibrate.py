"""The map of scores to body height in mm, from the Series of a bank."""

import fnmatch

import numpy as np

from dicomnode.core import curve
from dicomnode.core.curve import HeightMap
from dicomnode.model import Floats
from training.bank import Bank

# Shorter Series hardly tell a slope.
MIN_EXTENT_MM = 150.0


def fit(
    bank: Bank,
    scores: dict[str, Floats],
    *,
    zero: tuple[str, float],
    patients: tuple[str, ...] = ("*",),
) -> HeightMap:
    """Return the linear map whose slope is 1 for the median Series.

    Parameters
    ----------
    scores
        Series Instance UID -> scores, feet to head.
    zero : (str, float)
        Series Instance UID and position, mm, of the anatomy that is to have height 0.
    patients
        Patterns of the patients that count.

    Raises
    ------
    ValueError
        If no Series of these patients is long enough, or the reference is not in the bank.
    """
    slopes = []
    for s in bank.series:
        z_mm = np.asarray(s.z_mm)
        if z_mm[-1] - z_mm[0] < MIN_EXTENT_MM:
            continue
        if any(fnmatch.fnmatch(s.patient, p) for p in patients):
            slopes.append((s, curve.robust_slope(z_mm, scores[s.series_uid])))
    if not slopes:
        raise ValueError(f"no series of {patients} covers {MIN_EXTENT_MM:.0f} mm")
    mm_per_score = 1.0 / float(np.median([slope for _, slope in slopes]))
    residuals = []
    for s, _ in slopes:
        height_mm = scores[s.series_uid] * mm_per_score
        fitted = np.polyval(np.polyfit(s.z_mm, height_mm, 1), s.z_mm)
        residuals.append(height_mm - fitted)
    reference = next((s for s in bank.series if s.series_uid == zero[0]), None)
    if reference is None:
        raise ValueError(f"no series {zero[0]} in the bank")
    score_at_zero = float(np.interp(zero[1], reference.z_mm, scores[reference.series_uid]))
    return HeightMap(
        mm_per_score=mm_per_score,
        intercept_mm=-score_at_zero * mm_per_score,
        residual_sd_mm=float(np.concatenate(residuals).std()),
    )
