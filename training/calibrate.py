"""The map of scores to body height in mm, and the regions of the body on it.

Reads a bank and its scores, gives a `Calibration`; nobody has marked anything in the bank.
"""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.core import anatomy, curve, phantom, preprocess
from dicomnode.core.curve import HeightMap
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.core.region import Limit, Region
from dicomnode.model import Floats
from training import regions
from training.bank import PHANTOM_PREFIX, Bank
from training.regions import LandmarkHeight

# Finds landmarks in the inputs (N, size, size) uint8 of a Series at N positions, mm: name -> mm.
Finder = Callable[[npt.NDArray[np.uint8], Floats, PreprocessSpec], Mapping[str, float]]

# Shorter Series hardly tell a slope.
MIN_EXTENT_MM = 150.0
# A finder that puts a landmark of the drawn adult further than this from where it was drawn has
# missed it, as a drawing is not a body.
MISSED_MM = 40.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """What gives the scores of a run a meaning."""

    heights: HeightMap
    zero: str  # what height 0 is, in words
    landmarks: dict[str, LandmarkHeight]
    regions: tuple[Region, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all but the map as JSON values."""
        return {
            "zero": self.zero,
            "landmarks": {name: asdict(found) for name, found in self.landmarks.items()},
            "regions": [r.to_dict() for r in self.regions],
        }

    def to_markdown(self) -> str:
        """Return the tables of a model card."""
        lines = [f"Height 0: {self.zero}.", ""]
        lines += ["| landmark | body height, mm | sd between patients, mm | patients |"]
        lines += ["|---|---|---|---|"]
        for name, found in sorted(self.landmarks.items(), key=lambda item: item[1].height_mm):
            lines.append(
                f"| {name} | {found.height_mm:.1f} | {found.sd_mm:.1f} | {found.patients} |"
            )
        lines += ["", "| region | SCT code | meaning | from, mm | to, mm | from is a | to is a |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for r in self.regions:
            name = f"{r.part}: {r.name}" if r.part else f"**{r.name}**"
            lines.append(
                f"| {name} | {r.code} | {r.meaning} | {_cell(r.low)} | {_cell(r.high)} "
                f"| {r.low.support} | {r.high.support} |"
            )
        return "\n".join(lines) + "\n"


def calibrate(
    bank: Bank,
    scores: dict[str, Floats],
    *,
    find: Finder,
    zero: tuple[str, float] | None = None,
    patients: tuple[str, ...] = ("*",),
    progress: Callable[[int], None] = lambda n: None,
) -> Calibration:
    """Return the map of a run and the regions on it.

    Parameters
    ----------
    scores
        Series Instance UID -> scores, feet to head.
    find
        Finds landmarks from HU; the drawn adult goes through it too, so that a landmark is
        where the finder puts it, not where its name says.
    zero : (str, float), optional
        Series Instance UID and position, mm, of the anatomy that is to have height 0; the
        middle of S1 by proportion between landmarks where none is named.
    patients
        Patterns of the patients that count.
    progress
        Told the number of slices searched.

    Raises
    ------
    ValueError
        If no Series of these patients is long enough, the reference is not in the bank, or no
        reference is named and no landmark was found.
    """
    heights = fit(bank, scores, zero=zero, patients=patients)
    reference = drawn_landmarks(find, bank.spec)
    found = find_landmarks(bank, find, patients, progress)
    landmarks = landmark_heights(bank, heights, scores, found)
    residual = heights.residual_sd_mm
    if zero is None:
        at_mm, sd_mm = regions.zero(landmarks, residual, reference)
        words = f"the middle of S1 by proportion between landmarks, +- {sd_mm:.0f} mm"
        heights = replace(heights, intercept_mm=heights.intercept_mm - at_mm)
        landmarks = landmark_heights(bank, heights, scores, found)
    else:
        words = f"{zero[1]:g} mm in Series {zero[0]}"
    table = regions.region_table(landmarks, residual, reference)
    return Calibration(heights, words, landmarks, tuple(table))


def fit(
    bank: Bank,
    scores: dict[str, Floats],
    *,
    zero: tuple[str, float] | None = None,
    patients: tuple[str, ...] = ("*",),
) -> HeightMap:
    """Return the linear map whose slope is 1 for the median Series.

    Parameters
    ----------
    scores
        Series Instance UID -> scores, feet to head.
    zero : (str, float), optional
        Series Instance UID and position, mm, of the anatomy that is to have height 0; score 0
        has it where none is named.
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
        if _counts(s.patient, patients):
            slopes.append((s, curve.robust_slope(z_mm, scores[s.series_uid])))
    if not slopes:
        raise ValueError(f"no series of {patients} covers {MIN_EXTENT_MM:.0f} mm")
    mm_per_score = 1.0 / float(np.median([slope for _, slope in slopes]))
    residuals = []
    for s, _ in slopes:
        height_mm = scores[s.series_uid] * mm_per_score
        fitted = np.polyval(np.polyfit(s.z_mm, height_mm, 1), s.z_mm)
        residuals.append(height_mm - fitted)
    score_at_zero = 0.0
    if zero is not None:
        reference = next((s for s in bank.series if s.series_uid == zero[0]), None)
        if reference is None:
            raise ValueError(f"no series {zero[0]} in the bank")
        score_at_zero = float(np.interp(zero[1], reference.z_mm, scores[reference.series_uid]))
    return HeightMap(
        mm_per_score=mm_per_score,
        intercept_mm=-score_at_zero * mm_per_score,
        residual_sd_mm=float(np.concatenate(residuals).std()),
    )


def find_landmarks(
    bank: Bank,
    find: Finder,
    patients: tuple[str, ...] = ("*",),
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, dict[str, float]]:
    """Return Series Instance UID -> name -> position, mm, of the landmarks that Series show.

    Phantoms are passed over: where a landmark lies in them tells what was drawn.
    """
    found = {}
    for s in bank.series:
        if _counts(s.patient, patients) and not s.patient.startswith(PHANTOM_PREFIX):
            z_mm = np.asarray(s.z_mm, float)
            found[s.series_uid] = dict(find(np.array(bank.inputs(s)), z_mm, bank.spec))
        progress(len(s.z_mm))
    return found


def landmark_heights(
    bank: Bank,
    heights: HeightMap,
    scores: Mapping[str, Floats],
    found: Mapping[str, Mapping[str, float]],
) -> dict[str, LandmarkHeight]:
    """Return the body height of each landmark: median and spread over patients.

    `found` is Series Instance UID -> name -> position, mm; a patient of several Series counts
    once, by their mean.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for s in bank.series:
        for name, z_mm in found.get(s.series_uid, {}).items():
            height_mm = float(np.interp(z_mm, s.z_mm, heights(scores[s.series_uid])))
            values.setdefault(name, {}).setdefault(s.patient, []).append(height_mm)
    return {name: regions.robust_height(v) for name, v in sorted(values.items())}


def drawn_landmarks(find: Finder, spec: PreprocessSpec) -> dict[str, float]:
    """Return the height of each landmark in the drawn adult, mm above the promontory.

    It is where the finder puts it: where the lung's area falls below a threshold is some
    20 mm above its lowest tip. What the finder misses in a drawing is where it was drawn.
    """
    adult = phantom.PhantomPatient(seed=0, arms="down")
    lowest, highest = min(anatomy.LANDMARKS.values()), max(anatomy.LANDMARKS.values())
    z_mm = np.arange(lowest - 100.0, highest + 20.0, spec.pixel_mm)
    image_hu = phantom.volume(
        adult, z_mm, pixel_mm=spec.pixel_mm, matrix=spec.size, noise_hu=10.0, table=False
    )
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    spacing = (spec.pixel_mm, spec.pixel_mm)
    inputs = np.stack([preprocess.to_input(image, spacing, identity, spec) for image in image_hu])
    found = {
        name: z
        for name, z in find(inputs, z_mm, spec).items()
        if name in regions.REFERENCE and abs(z - regions.REFERENCE[name]) <= MISSED_MM
    }
    return {**regions.REFERENCE, **found}


def _counts(patient: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(patient, p) for p in patterns)


def _cell(limit: Limit) -> str:
    if limit.height_mm is None:
        return "-"
    return f"{limit.height_mm:.0f} +- {limit.sd_mm:.0f}"
