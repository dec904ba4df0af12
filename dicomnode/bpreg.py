"""Scores in the shape of bpreg 1.1.0 (MIC-DKFZ/BodyPartRegression), for tools that read its files.

The names and what they mean are bpreg's (bpreg/settings/body-part-metadata.md); the numbers are
this bundle's. Its scale, 0 at the start of the pelvis and 100 at the end of the eyes, is laid
through the levels that both know.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dicomnode.core import region
from dicomnode.core.region import Limit, Region
from dicomnode.errors import WeightsError
from dicomnode.model import Flag, Floats, ScoreCurve

# bpreg's landmark, its score in the public model's look-up table, and our region's end.
ANCHORS = (
    ("pelvis_start", 0.0, "pelvis", "low"),
    ("pelvis_end", 28.8, "pelvis", "high"),
    ("lung_start", 44.1, "lungs", "low"),
    ("lung_end", 75.4, "lungs", "high"),
)
EYES_END = 100.0
# bpreg's body parts, and ours.
PARTS = {
    "legs": "thighs",
    "pelvis": "pelvis",
    "abdomen": "abdomen",
    "chest": "chest",
    "shoulder-neck": "neck",
    "head": "head",
}
TAGS = {"pelvis": "PELVIS", "abdomen": "ABDOMEN", "chest": "CHEST", "neck": "NECK", "head": "HEAD"}
SMOOTHING_MM = 10.0
SLOPE_THRESHOLD = 0.28  # of bpreg: a slope ratio further from 1 makes the spacing invalid

JSON = dict[str, Any]


def metadata(scored: ScoreCurve, regions: Sequence[Region]) -> JSON:
    """Return what bpreg would write of a Series, slices from feet to head.

    Raises
    ------
    WeightsError
        If the bundle's regions lack the levels that the scale is laid through.
    """
    from scipy.ndimage import gaussian_filter1d  # 0.2 s, which other commands need not wait

    per_mm, zero = _scale(regions)
    spacing = float(np.median(np.diff(scored.z_mm)))
    raw = zero + per_mm * scored.height_mm
    smooth_mm = gaussian_filter1d(scored.height_mm, SMOOTHING_MM / spacing)
    observed = float(np.polyfit(scored.z_mm, zero + per_mm * smooth_mm, 1)[0])
    ratio = abs(observed) / per_mm
    valid = abs(1 - ratio) <= SLOPE_THRESHOLD
    examined = {name: _indices(smooth_mm, regions, ours) for name, ours in PARTS.items()}
    return {
        "cleaned slice scores": (zero + per_mm * smooth_mm).tolist(),
        "z": (scored.z_mm - scored.z_mm[0]).tolist(),
        "unprocessed slice scores": raw.tolist(),
        "body part examined": examined,
        "body part examined tag": _tag(scored, regions, examined) if valid else "NONE",
        "look-up table": _table(regions, per_mm, zero),
        "reverse z-ordering": float(Flag.REVERSED in scored.quality.flags),
        "valid z-spacing": float(valid),
        "expected slope": per_mm,
        "observed slope": observed,
        "slope ratio": ratio,
        "expected z-spacing": observed * spacing / per_mm,
        "z-spacing": spacing,
        "settings": {
            "slice score processing": {
                "slope_mean": per_mm,
                "r_slope_threshold": SLOPE_THRESHOLD,
                "smoothing_sigma": SMOOTHING_MM,
            },
            "body part examined dict": PARTS,
            "model": scored.model,
        },
    }


def _scale(regions: Sequence[Region]) -> tuple[float, float]:
    """Return bpreg's score per mm of body height, and its score at height 0."""
    known = [(limit.height_mm, score) for _, score, limit in _anchors(regions)]
    if len(known) < 2:
        raise WeightsError("the bundle has no regions to lay bpreg's scale through")
    heights, scores = np.array(known, float).T
    per_mm, zero = np.polyfit(heights, scores, 1)
    return float(per_mm), float(zero)


def _anchors(regions: Sequence[Region]) -> list[tuple[str, float, Limit]]:
    found = []
    for name, score, ours, end in ANCHORS:
        known = region.lookup(regions, ours)
        limit = known and (known.low if end == "low" else known.high)
        if limit and limit.height_mm is not None:
            found.append((name, score, limit))
    return found


def _table(regions: Sequence[Region], per_mm: float, zero: float) -> JSON:
    return {
        name: {
            "mean": zero + per_mm * (limit.height_mm or 0.0),
            "std": per_mm * (limit.sd_mm or 0.0),
        }
        for name, _, limit in _anchors(regions)
    }


def _indices(height_mm: Floats, regions: Sequence[Region], name: str) -> list[float]:
    """Return which slices lie in a region, as the real numbers that bpreg writes."""
    known = region.lookup(regions, name)
    if known is None or (known.low_mm is None and known.high_mm is None):
        return []
    low = -np.inf if known.low_mm is None else known.low_mm
    high = np.inf if known.high_mm is None else known.high_mm
    return [float(i) for i in np.flatnonzero((low <= height_mm) & (height_mm < high))]


def _tag(scored: ScoreCurve, regions: Sequence[Region], examined: dict[str, list[float]]) -> str:
    """Return the body parts that are shown, head first, with those between; else the commonest."""
    per_mm, zero = _scale(regions)
    filled = region.stretches(scored.z_mm, scored.height_mm)
    shown = []
    for name in TAGS:
        known = region.lookup(regions, name)
        if known is None or known.low_mm is None:
            shown.append(False)
            continue
        # The head has no known upper end; bpreg's own scale puts one at the eyes.
        high_mm = (EYES_END - zero) / per_mm if known.high_mm is None else known.high_mm
        low, high = region.to_um(known.low_mm), region.to_um(high_mm)
        shown.append(region.filled_um(filled, low, high) >= region.COVERED * (high - low) > 0)
    names = list(TAGS.values())
    if any(shown):
        first, last = shown.index(True), len(shown) - 1 - shown[::-1].index(True)
        return "-".join(reversed(names[first : last + 1]))
    ours = {theirs: len(examined[part]) for part, theirs in _OF_PART.items()}
    commonest = max(ours, key=lambda name: ours[name])
    return commonest if ours[commonest] else "NONE"


_OF_PART = {part: TAGS[ours] for part, ours in PARTS.items() if ours in TAGS}
