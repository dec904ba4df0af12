"""Leave-patients-out: every patient is held out by exactly one of a few runs.

Writes `folds.json` (patient -> folder of the run that never saw it) and a run a fold.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from dicomnode.errors import ConfigError
from training import train
from training.bank import Bank
from training.durable import write_json
from training.train import Progress, TrainConfig

LISTING = "folds.json"


def deal(patients: Iterable[str], count: int) -> dict[str, int]:
    """Return patient -> fold, dealt in order of name, so that each collection is spread evenly.

    Raises
    ------
    ConfigError
        If there are fewer patients than folds.
    """
    names = sorted(set(patients))
    if count < 2 or len(names) < count:
        raise ConfigError(f"{len(names)} patients cannot be dealt to {count} folds")
    return {name: i % count for i, name in enumerate(names)}


def run(
    bank: Bank,
    config: TrainConfig,
    folder: Path,
    *,
    count: int = 5,
    only: Iterable[int] | None = None,
    device: str = "cpu",
    report: Callable[[int, Progress], None] = lambda fold, p: None,
) -> None:
    """Train each fold, or some, in `folder/fold-K`; what is finished is not trained again."""
    dealt = deal((s.patient for s in bank.series), count)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / LISTING, {name: f"fold-{fold}" for name, fold in dealt.items()})
    for fold in range(count) if only is None else only:
        held_out = tuple(sorted(name for name, f in dealt.items() if f == fold))
        train.train(
            bank,
            replace(config, held_out=held_out),
            folder / f"fold-{fold}",
            device=device,
            report=partial(report, fold),
        )
