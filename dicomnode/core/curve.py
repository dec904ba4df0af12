"""Slice scores of one Series -> ScoreCurve: order, body height, quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dicomnode.core import admission, geometry, volumes
from dicomnode.errors import GeometryError
from dicomnode.model import Flag, Floats, Quality, Reason, Refusal, ScoreCurve, ScoredSlice

# A sound curve of an adult correlates above 0.98 and learns between 0.7 and 1.4 mm a mm
# (children are shorter than the average adult, so that their slope is larger).
LOW_CORRELATION = 0.95
SLOPE_RANGE = (0.6, 1.6)
# Where nothing tells how far the body lies from x = y = 0, 200 mm of it are 7 mm of z at this tilt.
TOLD_TILT_DEGREES = 2.0


@dataclass(frozen=True, slots=True)
class HeightMap:
    """Slice score -> body height: `height_mm = intercept_mm + mm_per_score * score`.

    `residual_sd_mm` is the spread of calibrated heights about the fitted lines of the
    series that calibrated the map.
    """

    mm_per_score: float
    intercept_mm: float
    residual_sd_mm: float

    def __call__(self, score: Any) -> Floats:
        """Return body height, mm, of scores of any shape."""
        return self.intercept_mm + self.mm_per_score * np.asarray(score, float)

    def inverse(self, height_mm: Any) -> Floats:
        """Return the score at a body height, mm, of any shape."""
        return (np.asarray(height_mm, float) - self.intercept_mm) / self.mm_per_score


def assemble(
    slices: Sequence[ScoredSlice],
    *,
    series_uid: str,
    model: str,
    heights: HeightMap,
    refused: int = 0,
    other_model: int = 0,
) -> ScoreCurve | Refusal:
    """Return the curve of a Series, or the reason why it has none.

    The same slices give the same curve in whatever order they arrived.

    Parameters
    ----------
    slices : sequence of ScoredSlice
        All scored slices of the Series.
    model : str
        Digest of the bundle that scored them.
    heights : HeightMap
        The bundle's map.
    refused : int
        Slices of the Series that could not be scored; flagged, not hidden.
    other_model : int
        Slices that another bundle scored, before the node was given this one; likewise.
    """
    given = sorted(slices, key=lambda s: (s.sop_instance_uid, s.frame))
    try:
        parallel = volumes.one_stack(given)
        slices = volumes.most_complete(parallel)
        stack = geometry.stack(
            np.array([s.image_position for s in slices], float),
            np.array([s.image_orientation for s in slices], float),
            long_axis(slices),
        )
    except GeometryError as exc:
        return Refusal(series_uid, exc.reason)
    if reason := admission.refuse_stack(stack.z_mm):
        return Refusal(series_uid, reason)
    kept = [slices[i] for i in stack.order]
    score = np.array([s.score for s in kept], np.float32)
    height_mm = heights(score)
    flags = list(stack.flags)
    if len(slices) < len(parallel) and Flag.DUPLICATE_POSITION not in flags:
        flags.append(Flag.DUPLICATE_POSITION)
    if len({s.frame_of_reference_uid for s in kept}) > 1:
        flags.append(Flag.FRAME_OF_REFERENCE_VARIES)
    if refused or len(parallel) < len(given):
        flags.append(Flag.SLICES_REFUSED)
    if any(geometry.contradicts(s.acquisition.patient_position, s.image_orientation) for s in kept):
        flags.append(Flag.PATIENT_POSITION)
    if _is_tilt_a_guess(kept):
        flags.append(Flag.TILT)
    if other_model:
        flags.append(Flag.OTHER_MODEL)
    return ScoreCurve(
        series_uid=series_uid,
        model=model,
        z_mm=stack.z_mm,
        score=score,
        height_mm=height_mm,
        sop_instance_uids=tuple(s.sop_instance_uid for s in kept),
        frames=tuple(s.frame for s in kept),
        quality=quality(stack.z_mm, height_mm, flags),
        body_centre_mm=body_centres(kept),
    )


def left_out(curve: ScoreCurve, slices: Sequence[ScoredSlice]) -> dict[tuple[str, int], Reason]:
    """Return SOP Instance UID and Frame -> why a scored slice is not in the curve of its Series."""
    members = set(zip(curve.sop_instance_uids, curve.frames, strict=True))
    kept = next(s for s in slices if (s.sop_instance_uid, s.frame) in members)
    return {
        (s.sop_instance_uid, s.frame): Reason.DUPLICATE_POSITION
        if geometry.are_parallel([s.image_orientation, kept.image_orientation])
        else Reason.NOT_ONE_STACK
        for s in slices
        if (s.sop_instance_uid, s.frame) not in members
    }


def long_axis(slices: Sequence[ScoredSlice]) -> tuple[float, float]:
    """Return x and y of the patient's long axis, mm, LPS: the middle of the body's centres.

    One line for all slices, so that a raised arm moves none of them past another. x = y = 0 where
    no slice shows all of the body.
    """
    known = [s.body_centre_mm for s in slices if s.body_centre_mm is not None]
    if not known:
        return 0.0, 0.0
    x_mm, y_mm = np.median(known, axis=0).tolist()
    return x_mm, y_mm


def _is_tilt_a_guess(slices: Sequence[ScoredSlice]) -> bool:
    normal = geometry.slice_normal(slices[0].image_orientation)
    tilted = geometry.tilt_degrees(normal) > TOLD_TILT_DEGREES
    return tilted and all(s.body_centre_mm is None for s in slices)


def body_centres(slices: Sequence[ScoredSlice]) -> Floats | None:
    """Return (N, 2) body centres, x and y mm, NaN where unknown; None where all are."""
    if all(s.body_centre_mm is None for s in slices):
        return None
    return np.array([s.body_centre_mm or (np.nan, np.nan) for s in slices], float)


def quality(z_mm: Floats, height_mm: Floats, flags: Sequence[Flag] = ()) -> Quality:
    """Return how straight body height is over position, both (N,) mm, N >= 2."""
    flags = list(flags)
    r = pearson_r(z_mm, height_mm)
    slope = robust_slope(z_mm, height_mm)
    if slope < 0:
        # LPS +z is the head whatever the patient's position on the table:
        # a falling curve means that the header is wrong.
        flags.append(Flag.REVERSED)
    elif not SLOPE_RANGE[0] <= slope <= SLOPE_RANGE[1]:
        flags.append(Flag.SLOPE)
    if abs(r) < LOW_CORRELATION:
        flags.append(Flag.LOW_CORRELATION)
    return Quality(r, slope, tuple(dict.fromkeys(flags)))


def pearson_r(x: Floats, y: Floats) -> float:
    """Return the correlation of two (N,) arrays; 0 where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else 0.0


def robust_slope(x: Floats, y: Floats) -> float:
    """Return the median slope of y over increasing x.

    Theil and Sen's estimator over the N/2 pairs that lie half the samples apart
    (Conover's short form: as robust, and linear in N).
    """
    half = max(1, len(x) // 2)
    return float(np.median((y[half:] - y[:-half]) / (x[half:] - x[:-half])))
