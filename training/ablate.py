"""What each term beyond the paper is worth: the same short run with one of them taken away.

Trains on all patients but one fold and reads that fold; Markdown and JSON. Runs are short, so
that the differences count and not the figures.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dicomnode.errors import ConfigError
from training import evaluate, folds, train
from training.bank import Bank
from training.train import Progress, TrainConfig

WHOLE = "as configured"


@dataclass(frozen=True, slots=True)
class Term:
    """A part of the method, and how to take it away."""

    name: str
    source: str
    without: dict[str, Any]  # fields of `TrainConfig`


TERMS = (
    Term("order", "Yan et al. 2018, equation 2", {"order": 0.0}),
    Term("distance", "Yan et al. 2018, equation 3", {"distance": 0.0}),
    Term("millimetres", "after bpreg's physical order loss", {"millimetres": 0.0}),
    Term("anchored", "ours: landmarks from HU", {"anchored": 0.0}),
    Term("ends", "ours: scans' ends drawn more often", {"ends": 0.0}),
    Term("augmentation", "after bpreg, per stack", {"augmentation": None}),
    Term("ema", "Polyak and Juditsky 1992, averaged weights", {"ema": 0.0}),
)


def named(names: Iterable[str]) -> tuple[Term, ...]:
    """Return the terms of these names, all of them of none.

    Raises
    ------
    ConfigError
        If one is not known.
    """
    known = {t.name: t for t in TERMS}
    names = tuple(names) or tuple(known)
    if unknown := sorted(set(names) - known.keys()):
        raise ConfigError(f"no term {unknown[0]!r}: {', '.join(known)}")
    return tuple(known[name] for name in names)


def run(
    bank: Bank,
    config: TrainConfig,
    folder: Path,
    *,
    terms: Iterable[Term] = TERMS,
    fold: int = 0,
    count: int = 5,
    device: str = "cpu",
    report: Callable[[str, Progress], None] = lambda name, p: None,
) -> list[dict[str, Any]]:
    """Return a row for the config and for each term taken away; resumable, as every run is."""
    dealt = folds.deal((s.patient for s in bank.series), count)
    held_out = tuple(sorted(name for name, f in dealt.items() if f == fold))
    rows = []
    for name, without in ((WHOLE, {}), *((t.name, t.without) for t in terms)):
        place = folder / name.replace(" ", "-")
        train.train(
            bank,
            replace(config, held_out=held_out, **without),
            place,
            device=device,
            report=partial(report, name),
        )
        only = replace(bank, series=tuple(s for s in bank.series if s.patient in held_out))
        series = evaluate.series_figures(only, evaluate.read_run(place, only))
        rows.append({"without": name, **_figures(series)})
    return rows


def to_markdown(rows: list[dict[str, Any]], config: TrainConfig) -> str:
    """Return the table of a model card."""
    sources = {t.name: t.source for t in TERMS}
    lines = [
        f"One fold, {config.steps} steps a run; sd of a landmark between patients that no run saw.",
        "",
        "| without | what it is | mean r, trunk | mean r, head and neck | sd of slope "
        "| lung apex, sd mm | lung base, sd mm |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            "-" if row[key] is None else f"{row[key]:.{digits}f}"
            for key, digits in (
                ("r_trunk", 4),
                ("r_head_neck", 4),
                ("sd_slope", 3),
                ("lung_apex_sd_mm", 1),
                ("lung_base_sd_mm", 1),
            )
        ]
        name = "nothing" if row["without"] == WHOLE else row["without"]
        lines.append(f"| {name} | {sources.get(row['without'], '')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figures(series: list[evaluate.SeriesFigures]) -> dict[str, float | None]:
    parts = {line["part"]: line for line in evaluate.summary(series)}
    spread = {
        line["landmark"]: line["sd_mm"]
        for line in evaluate.landmark_summary(series)
        if line["part"] == "all"
    }

    def of(part: str, key: str) -> float | None:
        return parts[part][key] if part in parts else None

    slopes = [f.slope for f in series if f.part in (evaluate.TRUNK, evaluate.HEAD_NECK)]
    mean = sum(slopes) / len(slopes) if slopes else 0.0
    return {
        "r_trunk": of(evaluate.TRUNK, "mean_r"),
        "r_head_neck": of(evaluate.HEAD_NECK, "mean_r"),
        "sd_slope": (sum((s - mean) ** 2 for s in slopes) / len(slopes)) ** 0.5 if slopes else None,
        "lung_apex_sd_mm": spread.get("lung_apex"),
        "lung_base_sd_mm": spread.get("lung_base"),
    }
