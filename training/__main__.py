"""`python -m training`: index, train, evaluate, calibrate, export."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from dicomnode.core.curve import HeightMap
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import WeightsError
from training import archive, calibrate, evaluate, export, pairs, protocol, readers, table, train
from training import bank as banks

_path = click.Path(path_type=Path)
_existing = click.Path(exists=True, path_type=Path)
_bank_option = click.option("--bank", required=True, type=_existing, help="Folder of a slice bank.")
_run_option = click.option("--run", required=True, type=_path, help="Folder of a training run.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Build the body-part regressor from archived studies.

    \b
    python -m training index /archive --bank bank
    python -m training train --bank bank --config training/configs/compact.toml --run runs/1
    python -m training evaluate --bank bank --run runs/1 --out runs/1
    python -m training calibrate --bank bank --run runs/1 --zero SERIES_UID 221.5
    python -m training export --bank bank --run runs/1 --name site-1 --out my-bundle
    """


@main.command()
@click.argument("archives", nargs=-1, required=True, type=_existing)
@click.option("--bank", required=True, type=_path, help="Folder to write the slice bank to.")
@click.option("--phantoms", default=0, show_default=True, help="Phantom patients to add.")
@click.option("--workers", default=2, show_default=True, help="Processes that decode.")
def index(archives: tuple[Path, ...], bank: Path, phantoms: int, workers: int) -> None:
    """Walk folders of DICOM and write every slice fit for training to a bank."""
    with _progress() as bar:
        task = bar.add_task("reading headers", total=None)
        found = archive.index(archives, lambda n: bar.advance(task, n))
        total = sum(len(s.z_mm) for s in found.series)
        task = bar.add_task("decoding slices", total=total or None)
        banks.build(
            bank,
            found.series,
            phantoms=phantoms,
            workers=workers,
            progress=lambda n: bar.advance(task, n),
        )
    patients = len({s.patient for s in found.series})
    click.echo(f"{len(found.series)} series of {patients} patients, {total} slices")
    for reason, count in found.refused.most_common():
        click.echo(f"refused, {reason}: {count}")


@main.command("train")
@_bank_option
@_run_option
@click.option("--config", required=True, type=_existing, help="TOML file of the run.")
@click.option("--held-out", multiple=True, help="A patient to keep out of training.")
@click.option("--steps", type=int, help="In place of the config's.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="CPU threads.")
def train_(
    bank: Path,
    run: Path,
    config: Path,
    held_out: tuple[str, ...],
    steps: int | None,
    device: str,
    threads: int | None,
) -> None:
    """Train, or go on where a run stopped."""
    settings = train.TrainConfig.from_toml(config)
    settings = replace(settings, held_out=held_out or settings.held_out)
    settings = replace(settings, steps=steps or settings.steps)
    if threads:
        torch.set_num_threads(threads)
    with _progress() as bar:
        task = bar.add_task("training", total=settings.steps)

        def report(p: train.Progress) -> None:
            terms = "  ".join(f"{k} {v:.4f}" for k, v in p.loss.items())
            bar.update(task, completed=p.step)
            bar.console.print(f"step {p.step}  {terms}  {p.steps_per_s:.2f} steps/s")

        train.train(banks.load(bank), settings, run, device=device, report=report)


@main.command("evaluate")
@click.option("--bank", type=_existing, help="Folder of a slice bank.")
@click.option("--run", type=_existing, help="Folder of a training run.")
@click.option("--out", type=_path, help="Folder for evaluation.json and .md, or for Table 1.")
@click.option("--table1", multiple=True, type=_existing, help="Folder of DICOM: Table 1 on it.")
@click.option("--folds", type=_existing, help='JSON for Table 1: {"patient": "runs/fold-k"}.')
@click.option("--method", "methods", multiple=True, help="Of Table 1; all where none is named.")
@click.option("--workers", default=2, show_default=True, help="Processes of Table 1; 0: this one.")
@click.option("--quick", is_flag=True, help="A few pairs, to try it out.")
def evaluate_(
    bank: Path | None,
    run: Path | None,
    out: Path | None,
    table1: tuple[Path, ...],
    folds: Path | None,
    methods: tuple[str, ...],
    workers: int,
    quick: bool,
) -> None:
    """Print correlation, slope and same-patient offsets, by patients seen and unseen.

    With --table1, the table of alignment errors in place of them, on pairs made from an archive:

    \b
    python -m training evaluate --table1 /archive --folds runs/folds.json --out runs/table1
    """
    if table1:
        _table1(table1, bank, run, folds, out, methods, workers, quick)
        return
    if not bank or not run:
        raise click.UsageError("name --bank and --run, or --table1")
    slices = banks.load(bank)
    net, config, _ = train.load(run)
    with _progress() as bar:
        task = bar.add_task("scoring", total=len(slices.slices))
        scores = evaluate.score_bank(net, slices, progress=lambda n: bar.advance(task, n))
    heights = _heights(run, config)
    series = evaluate.series_figures(slices, scores, heights, config.held_out)
    pairs = evaluate.pair_figures(slices, scores, heights, config.held_out)
    text = evaluate.to_markdown(series, pairs)
    click.echo(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "evaluation.md").write_text(text)
        (out / "evaluation.json").write_text(json.dumps(evaluate.to_json(series, pairs), indent=1))


@main.command("calibrate")
@_bank_option
@_run_option
@click.option("--zero", nargs=2, type=(str, float), required=True, help="SERIES_UID Z_MM")
@click.option("--patients", multiple=True, default=("*",), help="Pattern of patients that count.")
def calibrate_(bank: Path, run: Path, zero: tuple[str, float], patients: tuple[str, ...]) -> None:
    """Fit the map of scores to body height, with 0 where the reference Series has Z_MM."""
    slices = banks.load(bank)
    net, _, _ = train.load(run)
    with _progress() as bar:
        task = bar.add_task("scoring", total=len(slices.slices))
        scores = evaluate.score_bank(net, slices, progress=lambda n: bar.advance(task, n))
    heights = calibrate.fit(slices, scores, zero=zero, patients=patients)
    (run / "heights.json").write_text(json.dumps(asdict(heights), indent=1))
    click.echo(heights)


@main.command("export")
@_bank_option
@_run_option
@click.option("--name", required=True)
@click.option("--out", required=True, type=_path, help="Folder of the bundle.")
@click.option("--zero", default="", help="What height 0 means, in words.")
@click.option("--commit", default="", help="Commit of the code that trained it.")
def export_(bank: Path, run: Path, name: str, out: Path, zero: str, commit: str) -> None:
    """Write a run as a weight bundle; calibrate it first."""
    if not (run / "heights.json").exists():
        raise click.ClickException(f"{run} is not calibrated: python -m training calibrate")
    _, config, _ = train.load(run)
    heights = _heights(run, config)
    click.echo(
        export.bundle(run, banks.load(bank), heights, name=name, out=out, zero=zero, commit=commit)
    )


def _table1(
    archives: tuple[Path, ...],
    bank: Path | None,
    run: Path | None,
    folds: Path | None,
    out: Path | None,
    methods: tuple[str, ...],
    workers: int,
    quick: bool,
) -> None:
    """Make, score and align the pairs of Table 1; go on where an earlier run stopped."""
    if not out:
        raise click.UsageError("--table1 needs --out, where its pairs are kept")
    spec = banks.load(bank).spec if bank else PreprocessSpec()
    folded = readers.Folds(default=run, spec=spec)
    if folds:
        folded = readers.Folds.from_json(folds, spec)
    config = protocol.QUICK if quick else protocol.ProtocolConfig()
    try:
        compared = table.methods(methods)
    except KeyError as exc:
        raise click.UsageError(f"no method {exc}: {', '.join(table.methods())}") from exc
    with _progress() as bar:
        task = bar.add_task("reading headers", total=None)
        found = archive.index(archives, lambda n: bar.advance(task, n))
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        try:
            left_out = pairs.make(
                found.series, out, config, folded, spec=spec, workers=workers, progress=report
            )
        except WeightsError as exc:
            raise click.ClickException(str(exc)) from exc
        made = pairs.load(out)
        task = bar.add_task("aligning", total=len(made))
        results = table.measure(made, compared, lambda n: bar.advance(task, n))
    figures = table.figures(results, draws=200 if quick else 2000)
    text = table.to_markdown(figures)
    click.echo(text)
    for reason, count in (found.refused + left_out).most_common():
        click.echo(f"left out, {reason}: {count}")
    values = {"figures": figures, "left_out": left_out, "results": table.to_json(results)}
    (out / "table1.json").write_text(json.dumps(values, indent=1))
    (out / "table1.md").write_text(text)
    table.plot(results, out / "table1.png")


def _heights(run: Path, config: train.TrainConfig) -> HeightMap:
    path = run / "heights.json"
    if path.exists():
        return HeightMap(**json.loads(path.read_text()))
    return HeightMap(config.mm_per_score, 0.0, 0.0)  # the unit that the loss asked for


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=False,
    )


if __name__ == "__main__":
    main()
