"""What weights are worth on a bank: correlation, slope, landmarks, offsets of one patient's pairs.

Reads a bank and the runs that score it, gives figures by part of the body; Markdown, JSON and
PNG for the model card. With folds, each patient is scored by the run that never saw it.
"""

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dicomnode.core import align, curve
from dicomnode.core.curve import HeightMap
from dicomnode.errors import ConfigError
from dicomnode.model import Floats, Method, ScoreCurve
from training import folds, train
from training.bank import PHANTOM_PREFIX, Bank, BankSeries
from training.sampler import fitting
from training.validate import MIN_EXTENT_MM
from training.validate import score_bank as score_bank

MODEL = "evaluated"
HEIGHTS = "heights.json"
TRUNK, HEAD_NECK, LIMB, PHANTOM = "trunk", "head and neck", "limb", "phantom"
GROUPS = {"all": (TRUNK, HEAD_NECK), TRUNK: (TRUNK,), HEAD_NECK: (HEAD_NECK,)}
SLOPES, LEAST_R = (0.5, 1.5), 0.85  # that the plot shows
DRAWS = 2000  # of the bootstrap by patient


@dataclass(frozen=True, slots=True)
class Reading:
    """The body heights that weights gave a bank, mm, feet to head."""

    height_mm: Mapping[str, Floats]  # Series Instance UID -> (n,)
    unseen: frozenset[str]  # patients whose heights are by weights that never saw them
    limbs: frozenset[str]  # patients that are limbs, as the config of the run says


@dataclass(frozen=True, slots=True)
class SeriesFigures:
    """How one Series is read."""

    patient: str
    series_uid: str
    part: str
    slices: int
    extent_mm: float
    seen: bool  # whether the weights were trained on this patient
    pearson_r: float
    slope: float  # learned mm a true mm
    lowest_mm: float
    highest_mm: float
    landmarks_mm: dict[str, float]  # name -> body height at which it is read


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


@dataclass(frozen=True, slots=True)
class MarkFigures:
    """Body heights at marked anatomy of one Series, against where it truly is."""

    series_uid: str
    seen: bool
    marks: int
    slope: float  # learned mm a true mm, least squares
    residual_sd_mm: float


def heights_of(run: Path, mm_per_score: float) -> HeightMap:
    """Return the map of a run; the unit that the loss asked for, where it is not calibrated."""
    path = run / HEIGHTS
    if path.exists():
        return HeightMap(**json.loads(path.read_text()))
    return HeightMap(mm_per_score, 0.0, 0.0)


def read_run(run: Path, bank: Bank, progress: Callable[[int], None] = lambda n: None) -> Reading:
    """Return how one run reads all of a bank."""
    return _read([(run, None)], bank, progress)


def read_folds(
    folder: Path, bank: Bank, progress: Callable[[int], None] = lambda n: None
) -> Reading:
    """Return how the runs of `training folds` read a bank, each the patients it never saw.

    Raises
    ------
    ConfigError
        If a fold is not trained yet, or saw a patient that it is to score.
    """
    listing = json.loads((folder / folds.LISTING).read_text())
    runs = [
        (folder / name, frozenset(p for p, n in listing.items() if n == name))
        for name in sorted(set(listing.values()))
    ]
    return _read(runs, bank, progress)


def _read(
    runs: Iterable[tuple[Path, frozenset[str] | None]],
    bank: Bank,
    progress: Callable[[int], None],
) -> Reading:
    height_mm: dict[str, Floats] = {}
    unseen: set[str] = set()
    limbs: set[str] = set()
    for run, wanted in runs:
        try:
            net, config, step = train.load(run)
        except FileNotFoundError as exc:
            raise ConfigError(f"{run} is not trained: python -m training folds") from exc
        if wanted is not None and (step < config.steps or not wanted <= set(config.held_out)):
            raise ConfigError(f"{run} is not finished, or was trained on a patient of its fold")
        heights = heights_of(run, config.mm_per_score)
        series = [s for s in bank.series if wanted is None or s.patient in wanted]
        scores = score_bank(net, bank, series=series, progress=progress)
        height_mm |= {uid: heights(score) for uid, score in scores.items()}
        unseen |= {s.patient for s in series} & set(config.held_out)
        limbs |= {
            s.patient
            for s in series
            if any(fnmatch.fnmatch(s.patient, pattern) for pattern in config.exclude)
            or config.shares[fitting(s.patient, config.shares)].below_mm is not None
        }
    return Reading(height_mm, frozenset(unseen), frozenset(limbs))


def series_figures(bank: Bank, reading: Reading) -> list[SeriesFigures]:
    """Return how each Series is read, unseen patients first."""
    apex = _median_apex(bank, reading)
    figures = []
    for s in bank.series:
        if s.series_uid not in reading.height_mm:
            continue
        z_mm, height_mm = np.asarray(s.z_mm), reading.height_mm[s.series_uid]
        quality = curve.quality(z_mm, height_mm)
        figures.append(
            SeriesFigures(
                patient=s.patient,
                series_uid=s.series_uid,
                part=_part(s, height_mm, apex, reading.limbs),
                slices=len(z_mm),
                extent_mm=float(z_mm[-1] - z_mm[0]),
                seen=s.patient not in reading.unseen,
                pearson_r=quality.pearson_r,
                slope=quality.slope,
                lowest_mm=float(height_mm.min()),
                highest_mm=float(height_mm.max()),
                landmarks_mm={
                    name: float(np.interp(z, z_mm, height_mm)) for name, z in s.landmarks
                },
            )
        )
    return sorted(figures, key=lambda f: (f.seen, f.patient, f.series_uid))


def pair_figures(bank: Bank, reading: Reading) -> list[PairFigures]:
    """Return the offsets of every two Series of one patient."""
    by_patient: dict[str, list[BankSeries]] = {}
    for s in bank.series:
        if s.series_uid in reading.height_mm:
            by_patient.setdefault(s.patient, []).append(s)
    figures = []
    for patient, members in by_patient.items():
        members = sorted(members, key=lambda s: s.z_mm[0] - s.z_mm[-1])  # longest first
        for fixed, moving in combinations(members, 2):
            f, m = (curve_of(s, reading.height_mm[s.series_uid]) for s in (fixed, moving))
            figures.append(
                PairFigures(
                    patient=patient,
                    fixed=fixed.series_uid,
                    moving=moving.series_uid,
                    seen=patient not in reading.unseen,
                    same_study=fixed.study_uid == moving.study_uid,
                    l1_mm=align.align(f, m, Method.L1).offset_mm,
                    fast_mm=align.align(f, m, Method.FAST).offset_mm,
                )
            )
    return figures


def mark_figures(bank: Bank, reading: Reading, marks: Path) -> MarkFigures:
    """Return how anatomy that somebody marked is read.

    Parameters
    ----------
    marks
        JSON: `{"series": UID, "vertebrae": {name: {"z_mm": position}}}`.

    Raises
    ------
    ConfigError
        If the bank does not hold the Series.
    """
    values = json.loads(marks.read_text())
    s = next((s for s in bank.series if s.series_uid == values["series"]), None)
    if s is None or s.series_uid not in reading.height_mm:
        raise ConfigError(f"{marks}: no Series {values['series']} in the bank")
    z_mm = np.array([v["z_mm"] for v in values["vertebrae"].values()])
    inside = (z_mm >= s.z_mm[0]) & (z_mm <= s.z_mm[-1])
    height_mm = np.interp(z_mm[inside], s.z_mm, reading.height_mm[s.series_uid])
    line = np.polyfit(z_mm[inside], height_mm, 1)
    residual = height_mm - np.polyval(line, z_mm[inside])
    seen = s.patient not in reading.unseen
    sd = float(residual.std(ddof=2))
    return MarkFigures(s.series_uid, seen, int(inside.sum()), float(line[0]), sd)


def summary(series: Sequence[SeriesFigures]) -> list[dict[str, Any]]:
    """Return a line for each part of the body, unseen patients apart from seen ones.

    Of Series of at least `MIN_EXTENT_MM`; the interval is a bootstrap by patient, 95 %.
    """
    lines = []
    for seen in (False, True):
        for part in (TRUNK, HEAD_NECK, LIMB, PHANTOM):
            members = [
                f
                for f in series
                if (f.seen, f.part) == (seen, part) and f.extent_mm >= MIN_EXTENT_MM
            ]
            if not members:
                continue
            r = np.array([f.pearson_r for f in members])
            slope = np.array([f.slope for f in members])
            lines.append(
                {
                    "part": part,
                    "seen": seen,
                    "patients": len({f.patient for f in members}),
                    "series": len(members),
                    "mean_r": float(r.mean()),
                    "mean_r_95": _interval([f.patient for f in members], r),
                    "median_r": float(np.median(r)),
                    "least_r": float(r.min()),
                    "mean_slope": float(slope.mean()),
                    "sd_slope": float(slope.std()),
                    "slopes_within_10_percent": float((np.abs(slope - 1) <= 0.1).mean()),
                }
            )
    return lines


def landmark_summary(series: Sequence[SeriesFigures]) -> list[dict[str, Any]]:
    """Return where landmarks from HU are read, and their spread between patients, mm.

    A patient counts once, by the mean of its Series.
    """
    lines = []
    for seen in (False, True):
        for parts, label in (
            ((TRUNK, HEAD_NECK), "all"),
            ((TRUNK,), TRUNK),
            ((HEAD_NECK,), HEAD_NECK),
        ):
            found: dict[str, dict[str, list[float]]] = {}
            for f in series:
                if f.seen == seen and f.part in parts:
                    for name, height_mm in f.landmarks_mm.items():
                        found.setdefault(name, {}).setdefault(f.patient, []).append(height_mm)
            for name, patients in sorted(found.items()):
                values = np.array([np.mean(v) for v in patients.values()])
                if len(values) >= 2:
                    lines.append(
                        {
                            "landmark": name,
                            "part": label,
                            "seen": seen,
                            "patients": len(values),
                            "mean_mm": float(values.mean()),
                            "sd_mm": float(values.std(ddof=1)),
                        }
                    )
    return lines


def to_json(
    series: Sequence[SeriesFigures],
    pairs: Sequence[PairFigures],
    marks: Sequence[MarkFigures] = (),
) -> dict[str, Any]:
    """Return all figures as JSON values."""
    return {
        "summary": summary(series),
        "landmarks": landmark_summary(series),
        "marks": [asdict(m) for m in marks],
        "series": [asdict(s) for s in series],
        "pairs": [asdict(p) for p in pairs],
    }


def to_markdown(
    series: Sequence[SeriesFigures],
    pairs: Sequence[PairFigures],
    marks: Sequence[MarkFigures] = (),
) -> str:
    """Return the tables of a model card."""
    lines = [
        f"Series of at least {MIN_EXTENT_MM:.0f} mm:",
        "",
        "| part | weights saw them | patients | series | mean r (95 %) | median r | least r "
        "| mean slope | sd of slope | within 0.9 to 1.1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for s in summary(series):
        low, high = s["mean_r_95"]
        lines.append(
            f"| {s['part']} | {_yes(s['seen'])} | {s['patients']} | {s['series']} "
            f"| {s['mean_r']:.4f} ({low:.4f} to {high:.4f}) | {s['median_r']:.4f} "
            f"| {s['least_r']:.4f} | {s['mean_slope']:.3f} | {s['sd_slope']:.3f} "
            f"| {100 * s['slopes_within_10_percent']:.0f} % |"
        )
    lines += ["", "| landmark | part | weights saw them | patients | body height, mm | sd, mm |"]
    lines += ["|---|---|---|---|---|---|"]
    for m in landmark_summary(series):
        lines.append(
            f"| {m['landmark']} | {m['part']} | {_yes(m['seen'])} | {m['patients']} "
            f"| {m['mean_mm']:.0f} | {m['sd_mm']:.1f} |"
        )
    if marks:
        lines += ["", "| marked series | weights saw it | marks | slope | sd about the line, mm |"]
        lines += ["|---|---|---|---|---|"]
    for k in marks:
        lines.append(
            f"| {k.series_uid} | {_yes(k.seen)} | {k.marks} | {k.slope:.3f} "
            f"| {k.residual_sd_mm:.1f} |"
        )
    if pairs:
        lines += ["", "| patient | weights saw it | one study | l1, mm | fast, mm |"]
        lines.append("|---|---|---|---|---|")
    for p in pairs:
        cells = ["refused" if v is None else f"{v:.1f}" for v in (p.l1_mm, p.fast_mm)]
        lines.append(
            f"| {p.patient} | {_yes(p.seen)} | {_yes(p.same_study)} | {cells[0]} | {cells[1]} |"
        )
    lines += ["", "| patient | part | weights saw it | slices | mm | r | slope |"]
    lines.append("|---|---|---|---|---|---|---|")
    for f in series:
        if f.part != PHANTOM:
            lines.append(
                f"| {f.patient} | {f.part} | {_yes(f.seen)} | {f.slices} | {f.extent_mm:.0f} "
                f"| {f.pearson_r:.4f} | {f.slope:.2f} |"
            )
    return "\n".join(lines) + "\n"


def plot(bank: Bank, reading: Reading, series: Sequence[SeriesFigures], path: Path) -> None:
    """Write a PNG: curves on one axis, correlation and slope of each, landmarks by patient.

    Phantoms are left out; what correlates less than the axis shows lies at its lower end.
    """
    from matplotlib.figure import Figure

    colours = {TRUNK: "tab:blue", HEAD_NECK: "tab:orange", LIMB: "tab:red"}
    series = [f for f in series if f.part in colours]
    figure = Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    members = {s.series_uid: s for s in bank.series}
    for f in series:
        z_mm, height_mm = np.asarray(members[f.series_uid].z_mm), reading.height_mm[f.series_uid]
        left.plot(z_mm + np.median(height_mm - z_mm), height_mm, lw=0.6, color=colours[f.part])
        if f.extent_mm >= MIN_EXTENT_MM:
            at = np.clip(f.slope, *SLOPES), max(f.pearson_r, LEAST_R)
            middle.plot(*at, ".", color=colours[f.part])
    span = left.get_ylim()
    left.plot(span, span, "k:", lw=1)
    left.set(xlabel="position, mm, each Series at its median", ylabel="body height, mm")
    middle.set(xlabel="slope, learned mm a true mm", ylabel="Pearson r")
    middle.set_ylim(LEAST_R - 0.01, 1.005)
    middle.axvspan(0.9, 1.1, color="k", alpha=0.05)
    names = sorted({name for f in series for name in f.landmarks_mm})
    for row, name in enumerate(names):
        shown = [f for f in series if name in f.landmarks_mm]
        jitter = np.linspace(-0.3, 0.3, len(shown))
        for f, y in zip(shown, jitter, strict=True):
            right.plot(f.landmarks_mm[name], row + y, ".", color=colours[f.part])
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="body height at the landmark, mm")
    used = {f.part for f in series}
    for part in (p for p in colours if p in used):
        middle.plot([], [], ".", color=colours[part], label=part)
    middle.legend()
    figure.savefig(path, dpi=110)


def _median_apex(bank: Bank, reading: Reading) -> float:
    found = [
        float(np.interp(z, s.z_mm, reading.height_mm[s.series_uid]))
        for s in bank.series
        if s.series_uid in reading.height_mm
        for name, z in s.landmarks
        if name == "lung_apex"
    ]
    return float(np.median(found)) if found else np.inf


def _part(s: BankSeries, height_mm: Floats, apex_mm: float, limbs: frozenset[str]) -> str:
    if s.patient.startswith(PHANTOM_PREFIX):
        return PHANTOM
    if s.patient in limbs:
        return LIMB
    return HEAD_NECK if float(np.median(height_mm)) > apex_mm else TRUNK


def _interval(patients: Sequence[str], values: Floats) -> tuple[float, float]:
    """95 % interval of the mean by a bootstrap that draws patients, not Series."""
    groups = [values[[p == name for p in patients]] for name in sorted(set(patients))]
    sums = np.array([g.sum() for g in groups])
    counts = np.array([len(g) for g in groups])
    drawn = np.random.default_rng(0).integers(0, len(groups), (DRAWS, len(groups)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def curve_of(series: BankSeries, height_mm: Floats) -> ScoreCurve:
    """Return the curve of a Series of a bank, which has no UIDs; heights serve as scores."""
    z_mm = np.asarray(series.z_mm)
    n = len(z_mm)
    return ScoreCurve(
        series_uid=series.series_uid,
        model=MODEL,
        z_mm=z_mm,
        score=height_mm.astype(np.float32),
        height_mm=height_mm,
        sop_instance_uids=tuple(str(i) for i in range(n)),
        frames=(1,) * n,
        quality=curve.quality(z_mm, height_mm),
    )
