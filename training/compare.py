"""Two weight bundles on one bank, side by side; Markdown and JSON.

Reads a bank and two bundles, gives figures of each and their differences with an interval.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode import weights
from dicomnode.core import align, curve
from dicomnode.core.curve import HeightMap
from dicomnode.errors import WeightsError
from dicomnode.model import Floats, Method
from dicomnode.weights import Bundle
from training import evaluate, pairs, protocol, readers, table, validate
from training.archive import ArchivedSeries
from training.bank import PHANTOM_PREFIX, Bank
from training.validate import MIN_EXTENT_MM

DRAWS = 2000  # of patients, for an interval
WARM_UP = 64  # slices scored before the clock starts

# Figures of the patients of a bank, one value for each Series or pair: patient -> values.
Samples = dict[str, list[float]]
Measure = Callable[[Bank, dict[str, Floats], HeightMap], Samples]


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the table: what is measured, and how the values of a bank become one number."""

    name: str
    measure: Measure
    summary: Callable[[npt.NDArray[np.float64]], float]
    decimals: int = 2


def correlations(bank: Bank, scores: dict[str, Floats], heights: HeightMap) -> Samples:
    """Return Pearson r of score against position of each Series of at least 150 mm."""
    return _by_series(bank, scores, curve.pearson_r)


def slopes(bank: Bank, scores: dict[str, Floats], heights: HeightMap) -> Samples:
    """Return learned mm a true mm of each Series of at least 150 mm."""
    return _by_series(bank, scores, lambda z, s: curve.robust_slope(z, heights(s)))


def same_study_errors(bank: Bank, scores: dict[str, Floats], heights: HeightMap) -> Samples:
    """Return |l1 offset|, mm, of every two Series of one Study, whose true offset is 0.

    A Study is one visit and mostly one position of the patient on the table; where it is not,
    both bundles err alike.
    """
    found: Samples = {}
    by_study: dict[str, list[Any]] = {}
    for s in bank.series:
        by_study.setdefault(s.study_uid, []).append(s)
    for members in by_study.values():
        for a, b in combinations(sorted(members, key=lambda s: s.z_mm[0] - s.z_mm[-1]), 2):
            f, m = (evaluate.curve_of(s, heights(scores[s.series_uid])) for s in (a, b))
            offset_mm = align.align(f, m, Method.L1).offset_mm
            if offset_mm is not None:
                found.setdefault(a.patient, []).append(abs(offset_mm))
    return found


def landmark(name: str) -> Measure:
    """Return what gives the body height, mm, at which a landmark of each Series is read."""

    def heights_at(bank: Bank, scores: dict[str, Floats], heights: HeightMap) -> Samples:
        found: Samples = {}
        for s in bank.series:
            if name in (marks := dict(s.landmarks)):
                at = float(np.interp(marks[name], s.z_mm, heights(scores[s.series_uid])))
                found.setdefault(s.patient, []).append(at)
        return found

    return heights_at


# A further figure is a line here and a function as those above.
FIGURES = (
    Figure("mean Pearson r", correlations, lambda v: float(v.mean()), 4),
    Figure("least Pearson r", correlations, lambda v: float(v.min()), 4),
    Figure("mean slope", slopes, lambda v: float(v.mean())),
    Figure("sd of slope", slopes, lambda v: float(v.std())),
    Figure("lung apex, sd mm", landmark("lung_apex"), lambda v: float(v.std()), 1),
    Figure("lung base, sd mm", landmark("lung_base"), lambda v: float(v.std()), 1),
    Figure("l1 within a study, mean error mm", same_study_errors, lambda v: float(v.mean()), 1),
    Figure("l1 within a study, largest error mm", same_study_errors, lambda v: float(v.max()), 1),
)


def compare(
    bundles: tuple[Bundle, Bundle],
    bank: Bank,
    *,
    figures: tuple[Figure, ...] = FIGURES,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Return the figures of two bundles as JSON values; phantoms are left out.

    `difference` is the second bundle minus the first, over the same patients; `low` and `high`
    bound it with 95 % by a bootstrap over patients, null where there is but one.

    Raises
    ------
    WeightsError
        If the bank does not hold the inputs that a bundle wants.
    """
    for bundle in bundles:
        if bundle.spec != bank.spec:
            raise WeightsError(f"{bundle.name} wants other inputs than this bank holds")
    real = [s for s in bank.series if not s.patient.startswith(PHANTOM_PREFIX)]
    bank = replace(bank, series=tuple(real))
    scored = [_score(bundle, bank, progress) for bundle in bundles]
    measured: dict[Measure, list[Samples]] = {}  # several figures may be of one measure
    rows = []
    for figure in figures:
        if figure.measure not in measured:
            measured[figure.measure] = [
                figure.measure(bank, scores, bundle.heights)
                for bundle, (scores, _) in zip(bundles, scored, strict=True)
            ]
        rows.append(_row(figure, measured[figure.measure], seed))
    return {
        "slices": sum(len(s.z_mm) for s in bank.series),
        "series": len(bank.series),
        "patients": len({s.patient for s in bank.series}),
        "bundles": [
            {"name": b.name, "digest": b.digest, "ms_per_slice": ms}
            for b, (_, ms) in zip(bundles, scored, strict=True)
        ],
        "figures": rows,
    }


def table1(
    bundles: tuple[Path, Path],
    archive: Sequence[ArchivedSeries],
    folder: Path,
    *,
    quick: bool = False,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> list[dict[str, Any]]:
    """Return, of each bundle and method, the shares of categories over Table 1's follow-ups.

    The same pairs for both; `folder` keeps them, so that a repeat scores no pair twice.

    Parameters
    ----------
    bundles
        Folders of the two.
    """
    config = protocol.QUICK if quick else protocol.ProtocolConfig()
    rows = []
    for place in bundles:
        bundle = weights.load(place)
        reader = readers.Folds(default=place)
        pairs.make(archive, folder, config, reader, spec=bundle.spec, progress=progress)
        made = [p for p in pairs.load(folder) if p.kind is protocol.Kind.FOLLOW_UP]
        known = dict.fromkeys((p.patient for p in made), bundle.covariance)
        covariances = {name: c for name, c in known.items() if c is not None}
        for name, method in table.methods([str(m) for m in Method], covariances).items():
            errors = [r.error_mm for r in table.measure(made, {name: method})]
            answered = [protocol.category(e) for e in errors if not np.isnan(e)]
            shares = [answered.count(k) / max(1, len(errors)) for k in (1, 2, 3, 4)]
            rows.append(
                {
                    "bundle": bundle.name,
                    "method": name,
                    "pairs": len(errors),
                    "refused": len(errors) - len(answered),
                    "categories": shares,
                }
            )
    return rows


def to_markdown(result: dict[str, Any]) -> str:
    """Return the table of a comparison."""
    a, b = result["bundles"]
    lines = [
        f"{result['series']} series of {result['patients']} patients, {result['slices']} slices",
        "",
        f"| | {a['name']} | {b['name']} | difference (95 %) | n |",
        "|---|---|---|---|---|",
    ]
    for row in result["figures"]:
        digits = row["decimals"]
        cells = ["none" if v is None else f"{v:.{digits}f}" for v in row["values"]]
        change = "" if row["difference"] is None else f"{row['difference']:+.{digits}f}"
        if row["low"] is not None:
            change += f" ({row['low']:+.{digits}f} to {row['high']:+.{digits}f})"
        lines.append(f"| {row['figure']} | {cells[0]} | {cells[1]} | {change} | {row['n']} |")
    lines.append(
        f"| ms a slice | {a['ms_per_slice']:.3f} | {b['ms_per_slice']:.3f} "
        f"| x {b['ms_per_slice'] / a['ms_per_slice']:.2f} | |"
    )
    if rows := result.get("table1"):
        lines += ["", "| bundle | method | pairs | 1, % | 2 | 3 | 4 | refused |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows or []:
        shares = " | ".join(f"{100 * share:.1f}" for share in row["categories"])
        lines.append(
            f"| {row['bundle']} | {row['method']} | {row['pairs']} | {shares} | {row['refused']} |"
        )
    return "\n".join(lines) + "\n"


def _score(
    bundle: Bundle, bank: Bank, progress: Callable[[int], None]
) -> tuple[dict[str, Floats], float]:
    """Scores of all Series, and ms a slice."""
    first = bank.series[:1]
    warm = [s for s in first for _ in range(max(1, WARM_UP // len(s.z_mm)))]
    validate.score_bank(bundle.network, bank, series=warm)
    started = time.perf_counter()
    scores = validate.score_bank(bundle.network, bank, progress=progress)
    slices = sum(len(s.z_mm) for s in bank.series)
    return scores, 1e3 * (time.perf_counter() - started) / max(1, slices)


def _row(figure: Figure, samples: list[Samples], seed: int) -> dict[str, Any]:
    """One figure of both bundles; patients that only one of them gives are left out."""
    shared = sorted(samples[0].keys() & samples[1].keys())
    row: dict[str, Any] = {
        "figure": figure.name,
        "decimals": figure.decimals,
        "values": [None, None],
        "difference": None,
        "low": None,
        "high": None,
        "n": sum(len(samples[0][p]) for p in shared),
        "patients": len(shared),
    }
    if not shared:
        return row

    def values(patients: list[str]) -> list[float]:
        return [
            figure.summary(np.concatenate([of[p] for p in patients]).astype(float))
            for of in samples
        ]

    first, second = values(shared)
    row |= {"values": [first, second], "difference": second - first}
    if len(shared) > 1:
        rng = np.random.default_rng(seed)
        draws = []
        for _ in range(DRAWS):
            a, b = values([shared[i] for i in rng.integers(0, len(shared), len(shared))])
            draws.append(b - a)
        low, high = np.quantile(draws, (0.025, 0.975))
        row |= {"low": float(low), "high": float(high)}
    return row


def _by_series(
    bank: Bank, scores: dict[str, Floats], measure: Callable[[Floats, Floats], float]
) -> Samples:
    found: Samples = {}
    for s in bank.series:
        z_mm = np.asarray(s.z_mm)
        if z_mm[-1] - z_mm[0] >= MIN_EXTENT_MM:
            found.setdefault(s.patient, []).append(measure(z_mm, scores[s.series_uid]))
    return found
