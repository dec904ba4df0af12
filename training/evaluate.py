"""What a network is worth on a bank: correlation, slope, offsets of same-patient pairs.

Reads a bank, gives figures by Series; Markdown and JSON for the model card.
"""

from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from dicomnode.core import align, curve
from dicomnode.core.curve import HeightMap
from dicomnode.model import Floats, Method, ScoreCurve
from training.bank import Bank, BankSeries
from training.validate import score_bank as score_bank

MODEL = "evaluated"


@dataclass(frozen=True, slots=True)
class SeriesFigures:
    """How one Series is read."""

    patient: str
    series_uid: str
    slices: int
    extent_mm: float
    seen: bool  # whether the weights were trained on this patient
    pearson_r: float
    slope: float  # learned mm a true mm
    lowest_mm: float
    highest_mm: float


@dataclass(frozen=True, slots=True)
class PairFigures:
    """The offset of two Series of one patient, the longer one fixed."""

    patient: str
    fixed: str
    moving: str
    seen: bool
    same_study: bool
    l1_mm: float | None
    fast_mm: float | None


def series_figures(
    bank: Bank, scores: dict[str, Floats], heights: HeightMap, held_out: tuple[str, ...]
) -> list[SeriesFigures]:
    """Return how each Series is read, unseen patients first."""
    figures = []
    for s in bank.series:
        z_mm, height_mm = np.asarray(s.z_mm), heights(scores[s.series_uid])
        quality = curve.quality(z_mm, height_mm)
        figures.append(
            SeriesFigures(
                patient=s.patient,
                series_uid=s.series_uid,
                slices=len(z_mm),
                extent_mm=float(z_mm[-1] - z_mm[0]),
                seen=s.patient not in held_out,
                pearson_r=quality.pearson_r,
                slope=quality.slope,
                lowest_mm=float(height_mm.min()),
                highest_mm=float(height_mm.max()),
            )
        )
    return sorted(figures, key=lambda f: (f.seen, f.patient, f.series_uid))


def pair_figures(
    bank: Bank, scores: dict[str, Floats], heights: HeightMap, held_out: tuple[str, ...]
) -> list[PairFigures]:
    """Return the offsets of every two Series of one patient."""
    by_patient: dict[str, list[BankSeries]] = {}
    for s in bank.series:
        by_patient.setdefault(s.patient, []).append(s)
    figures = []
    for patient, members in by_patient.items():
        members = sorted(members, key=lambda s: s.z_mm[0] - s.z_mm[-1])  # longest first
        for fixed, moving in combinations(members, 2):
            f = curve_of(fixed, scores[fixed.series_uid], heights)
            m = curve_of(moving, scores[moving.series_uid], heights)
            figures.append(
                PairFigures(
                    patient=patient,
                    fixed=fixed.series_uid,
                    moving=moving.series_uid,
                    seen=patient not in held_out,
                    same_study=fixed.study_uid == moving.study_uid,
                    l1_mm=align.align(f, m, Method.L1).offset_mm,
                    fast_mm=align.align(f, m, Method.FAST).offset_mm,
                )
            )
    return figures


def to_json(series: list[SeriesFigures], pairs: list[PairFigures]) -> dict[str, list[object]]:
    """Return all figures as JSON values."""
    return {"series": [asdict(s) for s in series], "pairs": [asdict(p) for p in pairs]}


def to_markdown(series: list[SeriesFigures], pairs: list[PairFigures]) -> str:
    """Return the tables of a model card: a line for each group, then each Series, each pair."""
    lines = [
        "| patients | weights saw them | series | mean r | least r | mean slope | sd of slope |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, bool], list[SeriesFigures]] = {}
    for f in series:
        groups.setdefault((_collection(f.patient), f.seen), []).append(f)
    for (name, seen), members in sorted(groups.items(), key=lambda g: (g[0][1], g[0][0])):
        r = np.array([m.pearson_r for m in members])
        slope = np.array([m.slope for m in members])
        lines.append(
            f"| {name} | {'yes' if seen else 'no'} | {len(members)} | {r.mean():.4f} "
            f"| {r.min():.4f} | {slope.mean():.2f} | {slope.std():.2f} |"
        )
    if pairs:
        lines += ["", "| patient | weights saw it | one study | l1, mm | fast, mm |"]
        lines.append("|---|---|---|---|---|")
    for p in pairs:
        cells = ["refused" if v is None else f"{v:.1f}" for v in (p.l1_mm, p.fast_mm)]
        words = ["yes" if flag else "no" for flag in (p.seen, p.same_study)]
        lines.append(f"| {p.patient} | {words[0]} | {words[1]} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def curve_of(series: BankSeries, score: Floats, heights: HeightMap) -> ScoreCurve:
    """Return the curve of a Series of a bank, whose slices have no UIDs."""
    z_mm, height_mm = np.asarray(series.z_mm), heights(score)
    n = len(z_mm)
    return ScoreCurve(
        series_uid=series.series_uid,
        model=MODEL,
        z_mm=z_mm,
        score=score.astype(np.float32),
        height_mm=height_mm,
        sop_instance_uids=tuple(str(i) for i in range(n)),
        frames=(1,) * n,
        quality=curve.quality(z_mm, height_mm),
    )


def _collection(patient: str) -> str:
    """The collection a patient's name begins with: letters up to the first figure."""
    head = patient.split("_")[0].split("-")[0]
    return head.rstrip("0123456789") or patient
