"""Ties the zero of every Series to landmarks that Hounsfield units alone show.

Each term of the published loss is blind to a constant added to the scores of one volume; with
few patients a network then learns to know the volume, and gives each its own zero. Here the
constant of a Series is what brings its landmarks to where the population has them. Needs
numpy alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from training.bank import Bank, BankSeries
from training.sampler import Share, fitting

# How far a landmark strays from the body's height, sd, mm, of adults: lung apex and neck hardly
# move, the base goes with the breath. Printed by `python -m training calibrate`.
SPREAD_MM = {"lung_apex": 7.0, "neck": 10.0, "lung_base": 16.0}
# The zero of what is learned lies in the middle of most scans, at the heart: a start from
# zero is then near. `calibrate` moves it to where users want it.
ORIGIN, ORIGIN_MM = "lung_apex", 100.0
ROUNDS = 20


def population(series: Sequence[BankSeries]) -> dict[str, float]:
    """Return the height of each landmark, mm, of the median Series; `ORIGIN` at `ORIGIN_MM`.

    Only distances between landmarks of one Series count, at true mm. Landmarks that no Series
    shows together with others are left out.
    """
    found = {ORIGIN: ORIGIN_MM}
    shown = [dict(s.landmarks) for s in series]
    for _ in range(ROUNDS):
        zeros = [constant(marks, found) for marks in shown]
        for name in SPREAD_MM.keys() - {ORIGIN}:
            seen = [
                marks[name] + zero
                for marks, zero in zip(shown, zeros, strict=True)
                if name in marks and zero is not None and len(marks.keys() & SPREAD_MM.keys()) > 1
            ]
            if seen:
                found[name] = float(np.median(seen))
    return found


def constant(landmarks: Mapping[str, float], heights: Mapping[str, float]) -> float | None:
    """Return what is to be added to a Series' z, mm, so that its landmarks fit; None of none."""
    known = [name for name in landmarks if name in heights and name in SPREAD_MM]
    if not known:
        return None
    weight = np.array([SPREAD_MM[name] ** -2 for name in known])
    shift = np.array([heights[name] - landmarks[name] for name in known])
    return float((weight * shift).sum() / weight.sum())


def targets(bank: Bank, series: Sequence[BankSeries]) -> npt.NDArray[np.float32]:
    """Return the height of each slice of the bank, (N,) mm.

    NaN where the Series shows no landmark, or is not among those given.
    """
    height_mm = np.full(len(bank.slices), np.nan, np.float32)
    heights = population(series)
    for s in series:
        zero = constant(dict(s.landmarks), heights)
        if zero is not None:
            height_mm[s.start : s.stop] = np.asarray(s.z_mm) + zero
    return height_mm


def ceilings(
    bank: Bank, series: Sequence[BankSeries], shares: Sequence[Share]
) -> npt.NDArray[np.float32]:
    """Return below which height, mm, each slice of the bank is known to lie, (N,); else infinity.

    Of limbs, which no landmark ties to the trunk.
    """
    highest = np.full(len(bank.slices), np.inf, np.float32)
    for s in series:
        limit = shares[fitting(s.patient, shares)].below_mm
        if limit is not None:
            highest[s.start : s.stop] = limit
    return highest
