"""Phase 2 of Table 1: every method on every pair, and what their errors come to.

Takes pairs that `training.pairs` made; gives figures as JSON values, Markdown and a plot. Intervals
are of 95 %, by a bootstrap over patients: pairs of one patient are no independent trials.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.core import align, fasta
from dicomnode.core.robust import Covariance
from dicomnode.model import Floats, Method, OffsetStatus
from training import protocol
from training.pairs import Pair
from training.protocol import CATEGORIES_MM, OVERLAPS, Kind

Z_90 = 1.645  # sigma_mm is calibrated where 90 % of errors lie within so many of it
SPLITS = 5  # of patients, for the calibration of sigma
BASE = "l1"  # what the other methods are compared with, pair by pair
# Meine and Hering 2019, Table 1: 277 pairs of 1 to 4, by readers.
PAPER = {"FASTA": (188, 41, 17, 31), "fast": (127, 113, 23, 14), "l1": (201, 64, 10, 2)}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method says of a pair; None where it refused, or gives no sigma."""

    offset_mm: float | None
    sigma_mm: float | None
    status: str
    seconds: float


# Methods are plug-ins: add a name and a function of a pair.
PairMethod = Callable[[Pair], Answer]


@dataclass(frozen=True, slots=True)
class Result:
    """One method on one pair."""

    method: str
    kind: Kind
    patient: str
    region: str
    number: int
    unseen: bool | None
    overlap: float
    truth_mm: float
    tolerance_mm: float
    offset_mm: float | None
    sigma_mm: float | None
    status: str
    seconds: float

    @property
    def error_mm(self) -> float:
        """Offset minus truth, NaN where it was refused."""
        return np.nan if self.offset_mm is None else self.offset_mm - self.truth_mm


def methods(
    names: Iterable[str] = (), covariances: Mapping[str, Covariance] | None = None
) -> dict[str, PairMethod]:
    """Return the methods to compare, of these names or all: those of `align`, then FASTA.

    `covariances` is patient -> what other patients taught the robust method.
    """
    known: dict[str, PairMethod] = {str(m): _by_curves(m, covariances or {}) for m in Method}
    known["FASTA"] = _by_fasta
    return {name: known[name] for name in names or known}


def measure(
    pairs: Sequence[Pair],
    methods: Mapping[str, PairMethod],
    progress: Callable[[int], None] = lambda n: None,
) -> list[Result]:
    """Return what each method says of each pair; `progress` is told of each pair."""
    results = []
    for pair in pairs:
        for name, method in methods.items():
            answer = method(pair)
            results.append(
                Result(
                    method=name,
                    kind=pair.kind,
                    patient=pair.patient,
                    region=pair.region,
                    number=pair.number,
                    unseen=pair.unseen,
                    overlap=pair.overlap,
                    truth_mm=pair.truth_mm,
                    tolerance_mm=pair.tolerance_mm,
                    **asdict(answer),
                )
            )
        progress(1)
    return results


class Bootstrap:
    """Resamples of patients: statistics of results with their 95 % intervals.

    The same patients are drawn for every method, so that differences are paired.
    """

    def __init__(self, patients: Iterable[str], draws: int = 2000, seed: int = 0) -> None:
        self.patients = sorted(set(patients))
        n = len(self.patients)
        # How often each patient is in each resample; the first row is the sample itself.
        times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
        self.times = np.vstack([np.ones(n, int), times])  # (1 + draws, patients)

    def weights(self, results: Sequence[Result]) -> npt.NDArray[np.int_]:
        """Return how often each result counts in each resample, (1 + draws, results)."""
        place = {p: i for i, p in enumerate(self.patients)}
        return self.times[:, [place[r.patient] for r in results]]

    def share(self, results: Sequence[Result], holds: npt.NDArray[np.bool_]) -> Floats:
        """Return the share of results for which something holds, of each resample."""
        weights = self.weights(results)
        total = weights.sum(1).astype(float)
        with np.errstate(invalid="ignore"):
            return np.asarray(weights @ holds.astype(float) / total)

    def quantile(self, results: Sequence[Result], values: Floats, q: float) -> Floats:
        """Return a quantile of values, NaN left out, of each resample."""
        kept = np.flatnonzero(~np.isnan(values))
        kept = kept[np.argsort(values[kept], kind="stable")]
        if not len(kept):
            return np.full(len(self.times), np.nan)
        reached = self.weights(results)[:, kept].cumsum(1)
        total = reached[:, -1:]
        # Smallest value with at least q of the weight: at the sample itself, its order statistic.
        first = (reached >= np.maximum(1, np.ceil(q * total - 1e-9))).argmax(1)
        return np.where(total[:, 0] > 0, values[kept][first], np.nan)


def figures(results: Sequence[Result], *, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Return all that is reported, as JSON values."""
    bootstrap = Bootstrap((r.patient for r in results), draws, seed)
    by_kind = {kind: [r for r in results if r.kind == kind] for kind in Kind}
    follow_ups, stress = by_kind[Kind.FOLLOW_UP], by_kind[Kind.STRESS]
    out: dict[str, Any] = {
        "categories_mm": CATEGORIES_MM,
        "weights_never_saw_the_patients": _all_unseen(results),
        "follow_up": {
            region: _group(members, bootstrap) for region, members in _regions(follow_ups).items()
        },
        "stress": {
            region: {
                group: _group(
                    [r for r in members if protocol.group_of(r.overlap) == group], bootstrap
                )
                for group in OVERLAPS
            }
            for region, members in _regions(stress).items()
        },
        "same_frame": {
            str(kind): _group(by_kind[kind], bootstrap)
            for kind in (Kind.SAME_FRAME, Kind.SAME_FRAME_CROPPED)
        },
        "known": [{**_plain(r), "error_mm": _number(r.error_mm)} for r in by_kind[Kind.KNOWN]],
        "sigma": {
            str(kind): {
                region: calibration(members, bootstrap, seed)
                for region, members in _regions(by_kind[kind]).items()
            }
            for kind in (Kind.FOLLOW_UP, Kind.STRESS)
        },
    }
    return out


def calibration(
    results: Sequence[Result], bootstrap: Bootstrap, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return, of each method that gives sigma, the share of |error| <= 1.645 sigma.

    As the method gives it (`as_given`), and with sigma times a factor that other patients
    taught (`split`): patients are split in five, and none calibrates itself.
    """
    out = {}
    for method, members in _methods(results).items():
        given = [r for r in members if r.sigma_mm and not np.isnan(r.error_mm)]
        if not given:
            continue
        ratio = np.array([abs(r.error_mm) / (Z_90 * (r.sigma_mm or np.nan)) for r in given])
        factor = split_factors([r.patient for r in given], ratio, seed)
        out[method] = {
            "pairs": len(given),
            "median_sigma_mm": float(np.median([r.sigma_mm or np.nan for r in given])),
            "as_given": _interval(bootstrap.share(given, ratio <= 1)),
            "split": _interval(bootstrap.share(given, ratio <= factor)),
            "factors": [_number(f) for f in sorted(set(factor.tolist()))],
        }
    return out


def split_factors(patients: Sequence[str], ratio: Floats, seed: int = 0) -> Floats:
    """Return by what to multiply each sigma so that 90 % of errors are inside, by other patients.

    Parameters
    ----------
    patients : (N,)
        Whose each error is.
    ratio : (N,) float64
        |error| / (1.645 sigma).

    Returns
    -------
    (N,) float64
        The 90 % quantile of the ratios of all patients of the other splits; NaN where there are
        none.
    """
    names = sorted(set(patients))
    order = np.random.default_rng(seed).permutation(len(names))
    split = {names[k]: i % SPLITS for i, k in enumerate(order.tolist())}
    of = np.array([split[p] for p in patients])
    factor = np.full(len(ratio), np.nan)
    for k in set(of.tolist()):
        others = ratio[of != k]
        if len(others):
            factor[of == k] = np.quantile(others, 0.9, method="higher")
    return factor


def to_markdown(figures: Mapping[str, Any]) -> str:
    """Return the tables of a model card."""
    unseen = figures["weights_never_saw_the_patients"]
    told = {True: "never saw", False: "**saw**", None: "may have seen"}[unseen]
    limits = ", ".join(f"<= {c:.0f}" for c in CATEGORIES_MM)
    lines = [
        f"The weights {told} the patients. Categories 1, 2, 3 by |error|, mm: {limits}; 4: beyond. "
        "Shares of all pairs in %, with 95 % intervals by a bootstrap over patients.",
    ]
    against = []
    for region, group in figures["follow_up"].items():
        title = f"Synthetic follow-ups, {region}"
        lines += ["", f"{title}: {_counted(group)}.", "", *_rows(group)]
        if region == "all":
            for method, counts in PAPER.items():
                shares = " | ".join(f"{100 * c / sum(counts):.1f}" for c in counts)
                lines.append(f"| the paper's {method}, by its readers | {shares} | | | | |")
        against += _differences(title, group)
    for region, groups in figures["stress"].items():
        lines += ["", f"Both scans cropped, {region}, by true overlap.", ""]
        lines += ["| overlap | pairs | method | 1 | 4 | refused | median, mm | 95 %, mm |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for share, group in groups.items():
            lines += _short_rows(share, group)
            against += _differences(f"both cropped, {region}, overlap {share}", group)
    if against:
        lines += ["", f"Against {BASE}, pair by pair.", ""]
        lines += [f"| pairs | method minus {BASE} | category 1, points | category 4, points |"]
        lines[-1] += " median, mm |"
        lines += ["|---|---|---|---|---|", *against]
    for kind, group in figures["same_frame"].items():
        if group:
            lines += ["", f"One scan reconstructed twice ({kind}): {_counted(group)}.", ""]
            lines += _rows(group)
    if figures["known"]:
        lines += ["", "| patient | truth, mm | method | offset, mm | error, mm | status |"]
        lines.append("|---|---|---|---|---|---|")
    for k in figures["known"]:
        truth = f"{k['truth_mm']:.0f} +- {k['tolerance_mm']:.0f}"
        cells = [k["patient"], truth, k["method"], _mm(k["offset_mm"]), _mm(k["error_mm"])]
        lines.append(f"| {' | '.join(cells)} | {k['status']} |")
    lines += _sigma_rows(figures["sigma"])
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """Write errors by method as a PNG: cumulative, histogram, and by true overlap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    follow_ups = _methods([r for r in results if r.kind is Kind.FOLLOW_UP])
    bins = np.linspace(-100, 100, 41)
    for method, members in follow_ups.items():
        error = np.array([r.error_mm for r in members])
        absolute = np.sort(np.nan_to_num(np.abs(error), nan=np.inf))
        left.step(
            absolute, 100 * np.arange(1, len(error) + 1) / len(error), where="post", label=method
        )
        inside = np.clip(error[~np.isnan(error)], bins[0], bins[-1])
        middle.hist(inside, bins, histtype="step", label=method)
    left.set(xscale="symlog", xlim=(1, 500), ylim=(0, 100))
    left.set(xlabel="|error|, mm", ylabel="synthetic follow-ups, %", title="within")
    for limit in CATEGORIES_MM:
        left.axvline(limit, color="0.8", zorder=0)
    middle.set(xlabel="error, mm; ends hold what lies beyond", ylabel="pairs", title="errors")
    stress = _methods([r for r in results if r.kind is Kind.STRESS])
    for i, (method, members) in enumerate(stress.items()):
        width = 0.8 / len(stress)
        for j, group in enumerate(OVERLAPS):
            error = np.abs([r.error_mm for r in members if protocol.group_of(r.overlap) == group])
            error = error[~np.isnan(error)]
            if len(error):
                low, mid, high = np.quantile(error, [0.05, 0.5, 0.95])
                at = j + (i - (len(stress) - 1) / 2) * width
                right.plot([at, at], [low, high], color=f"C{i}")
                right.plot(at, mid, "o", color=f"C{i}", label=method if j == 0 else None)
    right.set(yscale="symlog", xlabel="true overlap, of the shorter scan", ylabel="|error|, mm")
    right.set(title="both scans cropped: median, 5 to 95 %")
    right.set_xticks(range(len(OVERLAPS)), OVERLAPS)
    for axes in (left, middle, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def to_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return every result as JSON values."""
    return [_plain(r) for r in results]


def _by_curves(method: Method, covariances: Mapping[str, Covariance]) -> PairMethod:
    def run(pair: Pair) -> Answer:
        covariance = covariances.get(pair.patient)
        started = time.perf_counter()
        offset = align.align(pair.fixed, pair.moving, method, covariance)
        seconds = time.perf_counter() - started
        return Answer(offset.offset_mm, offset.sigma_mm, str(offset.status), seconds)

    return run


def _by_fasta(pair: Pair) -> Answer:
    fixed, moving = pair.volumes()
    started = time.perf_counter()
    try:
        offset_mm = fasta.align(fixed, moving).offset_mm
    except ValueError:  # a translation of its grid leaves no overlap
        return Answer(None, None, str(OffsetStatus.REFUSED), time.perf_counter() - started)
    return Answer(offset_mm, None, str(OffsetStatus.OK), time.perf_counter() - started)


def _group(results: Sequence[Result], bootstrap: Bootstrap) -> dict[str, Any]:
    """Return figures of some pairs by method, and of each method minus `BASE`; {} of no pairs."""
    if not results:
        return {}
    statistics = {m: _statistics(members, bootstrap) for m, members in _methods(results).items()}
    members = next(iter(_methods(results).values()))
    out: dict[str, Any] = {
        "pairs": len(members),
        "patients": len({r.patient for r in members}),
        "methods": {m: {k: _interval(v) for k, v in s.items()} for m, s in statistics.items()},
    }
    for m, found in _methods(results).items():
        out["methods"][m]["refused"] = int(sum(r.offset_mm is None for r in found))
        out["methods"][m]["status"] = _count(r.status for r in found)
        out["methods"][m]["median_seconds"] = float(np.median([r.seconds for r in found]))
    if BASE in statistics:
        base = statistics[BASE]
        out[f"minus_{BASE}"] = {
            m: {k: _interval(s[k] - base[k]) for k in s} for m, s in statistics.items() if m != BASE
        }
    return out


def _statistics(results: Sequence[Result], bootstrap: Bootstrap) -> dict[str, Floats]:
    """Return each statistic of one method's results, of the sample and of each resample."""
    error = np.abs([r.error_mm for r in results])
    category = np.array([0 if np.isnan(e) else protocol.category(e) for e in error])
    out = {f"category_{c}": bootstrap.share(results, category == c) for c in (1, 2, 3, 4)}
    out["median_mm"] = bootstrap.quantile(results, error, 0.5)
    out["p95_mm"] = bootstrap.quantile(results, error, 0.95)
    return out


def _interval(values: Floats) -> list[float | None]:
    """Return (of the sample, 2.5 %, 97.5 % of its resamples)."""
    resampled = values[1:][~np.isnan(values[1:])]
    low, high = np.quantile(resampled, [0.025, 0.975]) if len(resampled) else (np.nan, np.nan)
    return [_number(values[0]), _number(low), _number(high)]


def _regions(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return all results, then those of each region where there are several."""
    regions = sorted({r.region for r in results})
    out = {"all": list(results)} if results else {}
    if len(regions) > 1:
        out |= {region: [r for r in results if r.region == region] for region in regions}
    return out


def _methods(results: Sequence[Result]) -> dict[str, list[Result]]:
    out: dict[str, list[Result]] = {}
    for r in results:
        out.setdefault(r.method, []).append(r)
    return out


def _all_unseen(results: Sequence[Result]) -> bool | None:
    told = {r.unseen for r in results}
    return False if False in told else None if None in told else True


def _count(values: Iterable[str]) -> dict[str, int]:
    out: dict[str, int] = {}
    for value in values:
        out[value] = out.get(value, 0) + 1
    return out


def _plain(result: Result) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Kind) else v for k, v in asdict(result).items()}


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if np.isnan(value) else float(value)


def _counted(group: Mapping[str, Any]) -> str:
    return f"{group['pairs']} pairs of {group['patients']} patients"


def _rows(group: Mapping[str, Any]) -> list[str]:
    lines = [
        "| method | 1 | 2 | 3 | 4 | refused | median, mm | 95 %, mm | ms a pair |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, m in group["methods"].items():
        cells = [_with_interval(m[f"category_{c}"], 100) for c in (1, 2, 3, 4)]
        cells += [str(m["refused"]), _with_interval(m["median_mm"]), _mm(m["p95_mm"][0])]
        lines.append(f"| {method} | {' | '.join(cells)} | {1000 * m['median_seconds']:.2f} |")
    return lines


def _short_rows(title: str, group: Mapping[str, Any]) -> list[str]:
    lines = []
    for method, m in group.get("methods", {}).items():
        cells = [title, str(group["pairs"]), method]
        cells += [_with_interval(m["category_1"], 100), _with_interval(m["category_4"], 100)]
        cells += [str(m["refused"]), _with_interval(m["median_mm"]), _mm(m["p95_mm"][0])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _differences(title: str, group: Mapping[str, Any]) -> list[str]:
    """Return a row for each method against `BASE`."""
    lines = []
    for method, d in group.get(f"minus_{BASE}", {}).items():
        cells = [_with_interval(d[f"category_{c}"], 100, sign=True) for c in (1, 4)]
        cells.append(_with_interval(d["median_mm"], sign=True))
        lines.append(f"| {title} | {method} | {' | '.join(cells)} |")
    return lines


def _sigma_rows(sigma: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind, regions in sigma.items():
        for region, by_method in regions.items():
            for method, s in by_method.items():
                low, high = _mm(s["factors"][0], 2), _mm(s["factors"][-1], 2)
                lines.append(
                    f"| {kind} | {region} | {method} | {s['pairs']} | {s['median_sigma_mm']:.1f} "
                    f"| {_with_interval(s['as_given'], 100)} | {_with_interval(s['split'], 100)} "
                    f"| {low} to {high} |"
                )
    if not lines:
        return []
    head = [
        "",
        "Errors within 1.645 sigma, %; 90 is right. Split: sigma times a factor learnt on other "
        "patients.",
        "",
        "| pairs | region | method | pairs | median sigma, mm | as given | split | factor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return head + lines


def _with_interval(values: Sequence[float | None], times: float = 1, *, sign: bool = False) -> str:
    if values[0] is None:
        return "-"
    plus = "+" if sign else ""
    value, low, high = (f"{times * v:{plus}.1f}" if v is not None else "-" for v in values)
    return f"{value} ({low} to {high})"


def _mm(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
