"""`python -m training`: index, train, folds, ablate, evaluate, calibrate, export, compare."""

# What needs torch is imported inside the commands that use it: the processes of `index`
# import this module, and there may be one for each core.
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from dicomnode.core import region
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.core.robust import Covariance
from dicomnode.errors import ConfigError, NodeError
from training import archive, fill, workers
from training import bank as banks
from training.durable import write_json

if TYPE_CHECKING:
    from training.pairs import Pair

COVARIANCE = "covariance.json"

_path = click.Path(path_type=Path)
_existing = click.Path(exists=True, path_type=Path)
_bank_option = click.option("--bank", required=True, type=_existing, help="Folder of a slice bank.")
_run_option = click.option("--run", required=True, type=_path, help="Folder of a training run.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class _Commands(click.Group):
    """Imports `train`, a command of its own that needs no rich, when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "train"])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name == "train":
            from training import train

            return train.main
        return super().get_command(ctx, name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (NodeError, ValueError) as exc:
            raise click.ClickException(str(exc)) from exc


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Build the body-part regressor from archived studies.

    \b
    python -m training index /archive --bank bank
    python -m training train --bank bank --config training/configs/compact.toml --run runs/1
    python -m training folds --bank bank --config training/configs/compact.toml --out runs/folds
    python -m training evaluate --bank bank --run runs/1 --out runs/1
    python -m training calibrate --bank bank --run runs/1
    python -m training export --bank bank --run runs/1 --name site-1 --out my-bundle
    python -m training compare my-bundle other-bundle --bank bank
    """


@main.command()
@click.argument("archives", nargs=-1, required=True, type=_existing)
@click.option("--bank", required=True, type=_path, help="Folder to write the slice bank to.")
@click.option("--phantoms", default=0, show_default=True, help="Phantom patients to add.")
@click.option(
    "--workers",
    "count",
    default=os.cpu_count() or 1,
    show_default="one a core",
    type=click.IntRange(1),
    help="Processes that read headers and decode.",
)
@click.option(
    "--ray", "ray", metavar="ADDRESS", help='Work on this Ray cluster instead; "local" starts one.'
)
@_json_option
def index(
    archives: tuple[Path, ...],
    bank: Path,
    phantoms: int,
    count: int,
    ray: str | None,
    as_json: bool,
) -> None:
    """Walk folders of DICOM and write every slice fit for training to a bank.

    The bank then holds what these folders hold. Killed, or run again when studies have come or
    gone, it does only what is left to do.

    \b
    Example: python -m training index /archive/2023 /archive/2024 --bank bank
    """
    started = time.perf_counter()
    bank.mkdir(parents=True, exist_ok=True)
    with workers.opened(count, ray) as spread, _progress() as bar:
        task = bar.add_task("reading headers", total=None)
        found = archive.index(
            archives,
            spread=spread,
            cache=bank / "headers.jsonl",
            progress=lambda n: bar.advance(task, n),
        )
        bar.update(task, total=found.files)
        total = sum(len(s.z_mm) for s in found.series)
        decoding = bar.add_task("decoding slices", total=total or None)
        try:
            filled = fill.build(
                bank,
                found.series,
                phantoms=phantoms,
                spread=spread,
                progress=lambda n: bar.advance(decoding, n),
            )
        except BlockingIOError as exc:
            raise click.ClickException(f"another process fills {bank}") from exc
    taken = [s for s in filled.bank.series if not s.patient.startswith(banks.PHANTOM_PREFIX)]
    refused = found.refused
    summary = {
        "archives": [str(a) for a in archives],
        "files": found.files,
        "patients": len({s.patient for s in taken}),
        "series": len(taken),
        "slices": sum(len(s.z_mm) for s in taken),
        "phantoms": phantoms,
        "decoded_series": filled.decoded,  # by this run; the others were in the bank
        "refused": {
            "files": dict(refused.files.most_common()),
            "series": dict((refused.series + filled.refused_series).most_common()),
            "slices": dict((refused.slices + filled.refused_slices).most_common()),
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(bank / "index.json", summary)
    click.echo(json.dumps(summary, indent=1) if as_json else _summary_text(summary))


def _summary_text(summary: dict[str, Any]) -> str:
    lines = ["{series} series of {patients} patients, {slices} slices".format(**summary)]
    kept = summary["series"] + summary["phantoms"] - summary["decoded_series"]
    if kept > 0:
        lines.append(f"{kept} series were in the bank before")
    for kind, reasons in summary["refused"].items():
        word = "set aside" if kind == "slices" else "refused"
        lines += [f"{word}, {reason}: {count} {kind}" for reason, count in reasons.items()]
    return "\n".join(lines)


@main.command("folds")
@_bank_option
@click.option("--config", required=True, type=_existing, help="TOML file of each run.")
@click.option("--out", required=True, type=_path, help="Folder of the runs and of folds.json.")
@click.option("--folds", "count", default=5, show_default=True, type=click.IntRange(2))
@click.option("--only", multiple=True, type=click.IntRange(0), help="Train just this fold.")
@click.option("--steps", type=click.IntRange(1), help="In place of the config's.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
def folds_(
    bank: Path,
    config: Path,
    out: Path,
    count: int,
    only: tuple[int, ...],
    steps: int | None,
    device: str,
    threads: int | None,
) -> None:
    """Train leave-patients-out: a run a fold, resumable one by one.

    \b
    Example: python -m training folds --bank bank --config compact.toml --out runs/folds
    """
    import torch

    from training import folds, train

    if threads:
        torch.set_num_threads(threads)
    settings = train.TrainConfig.from_toml(config)
    settings = replace(settings, steps=steps or settings.steps)
    with _progress() as bar:
        numbers = only or tuple(range(count))
        tasks = {k: bar.add_task(f"fold {k}", total=settings.steps) for k in numbers}

        def report(fold: int, p: train.Progress) -> None:
            bar.update(tasks[fold], completed=p.step)
            bar.console.print(f"fold {fold}  {train.line(p)}", highlight=False)

        slices = banks.load(bank)
        folds.run(slices, settings, out, count=count, only=numbers, device=device, report=report)


@main.command("ablate")
@_bank_option
@click.option("--config", required=True, type=_existing, help="TOML file of each run.")
@click.option("--out", required=True, type=_path, help="Folder of the runs and of the table.")
@click.option("--without", "names", multiple=True, help="Term to take away; each where none is.")
@click.option("--fold", default=0, show_default=True, type=click.IntRange(0))
@click.option("--steps", type=click.IntRange(1), help="In place of the config's.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
def ablate_(
    bank: Path,
    config: Path,
    out: Path,
    names: tuple[str, ...],
    fold: int,
    steps: int | None,
    device: str,
    threads: int | None,
) -> None:
    """Train short runs with one term of the method taken away, and print what that costs.

    \b
    Example: python -m training ablate --bank bank --config compact.toml --out runs/ablate
    """
    import torch

    from training import ablate, train

    if threads:
        torch.set_num_threads(threads)
    settings = train.TrainConfig.from_toml(config)
    settings = replace(settings, steps=steps or settings.steps)
    terms = ablate.named(names)
    with _progress() as bar:
        every = (ablate.WHOLE, *(t.name for t in terms))
        tasks = {name: bar.add_task(name, total=settings.steps) for name in every}
        rows = ablate.run(
            banks.load(bank),
            settings,
            out,
            terms=terms,
            fold=fold,
            device=device,
            report=lambda name, p: bar.update(tasks[name], completed=p.step),
        )
    text = ablate.to_markdown(rows, settings)
    click.echo(text)
    write_json(out / "ablation.json", rows)
    (out / "ablation.md").write_text(text)


@main.command("evaluate")
@click.option("--bank", type=_existing, help="Folder of a slice bank.")
@click.option("--run", type=_existing, help="Folder of a training run.")
@click.option("--out", type=_path, help="Folder for evaluation.json and .md, or for Table 1.")
@click.option("--table1", multiple=True, type=_existing, help="Folder of DICOM: Table 1 on it.")
@click.option("--folds", type=_existing, help="Folder of `folds`: each patient by its own run.")
@click.option(
    "--marks", multiple=True, type=_existing, help="JSON of marked vertebrae of a Series."
)
@click.option("--method", "methods", multiple=True, help="Of Table 1; all where none is named.")
@click.option("--workers", default=2, show_default=True, help="Processes of Table 1; 0: this one.")
@click.option("--quick", is_flag=True, help="A few pairs, to try it out.")
def evaluate_(
    bank: Path | None,
    run: Path | None,
    out: Path | None,
    table1: tuple[Path, ...],
    folds: Path | None,
    marks: tuple[Path, ...],
    methods: tuple[str, ...],
    workers: int,
    quick: bool,
) -> None:
    """Print correlation, slope, landmarks and same-patient offsets, by part of the body.

    With --table1, the table of alignment errors in place of them, on pairs made from an archive:

    \b
    python -m training evaluate --bank bank --folds runs/folds --out runs/folds
    python -m training evaluate --table1 /archive --folds runs/folds --out runs/table1
    """
    if table1:
        _table1(table1, bank, run, folds, out, methods, workers, quick)
        return
    if not bank or bool(run) == bool(folds):
        raise click.UsageError("name --bank and one of --run and --folds, or --table1")
    from training import evaluate

    slices = banks.load(bank)
    with _progress() as bar:
        task = bar.add_task("scoring", total=len(slices.slices))
        if folds:
            reading = evaluate.read_folds(folds, slices, lambda n: bar.advance(task, n))
        else:
            assert run is not None  # one of the two is named
            reading = evaluate.read_run(run, slices, lambda n: bar.advance(task, n))
    series = evaluate.series_figures(slices, reading)
    found = series, evaluate.pair_figures(slices, reading)
    marked = [evaluate.mark_figures(slices, reading, path) for path in marks]
    text = evaluate.to_markdown(*found, marked)
    click.echo(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "evaluation.md").write_text(text)
        write_json(out / "evaluation.json", evaluate.to_json(*found, marked))
        evaluate.plot(slices, reading, series, out / "evaluation.png")


@main.command("calibrate")
@_bank_option
@_run_option
@click.option(
    "--zero",
    nargs=2,
    type=(str, float),
    help="SERIES_UID Z_MM of height 0; the middle of S1 by proportion where none is named.",
)
@click.option("--patients", multiple=True, default=("*",), help="Pattern of patients that count.")
@click.option("--pairs", type=_existing, help="Folder of Table 1: learn how curves err, too.")
def calibrate_(
    bank: Path,
    run: Path,
    zero: tuple[str, float] | None,
    patients: tuple[str, ...],
    pairs: Path | None,
) -> None:
    """Fit the map of scores to body height, and place the regions of the body on it.

    Landmarks found from HU alone are the fixed points. Writes heights.json, regions.json and
    regions.md to the run; with --pairs, covariance.json, without which the robust method refuses.
    """
    from training import calibrate, covariance, evaluate, landmarks, train

    slices = banks.load(bank)
    net, _, _ = train.load(run)
    with _progress() as bar:
        task = bar.add_task("scoring", total=len(slices.slices))
        scores = evaluate.score_bank(net, slices, progress=lambda n: bar.advance(task, n))
        task = bar.add_task("finding landmarks", total=len(slices.slices))
        try:
            result = calibrate.calibrate(
                slices,
                scores,
                find=landmarks.find,
                zero=zero,
                patients=patients,
                progress=lambda n: bar.advance(task, n),
            )
        except ValueError as exc:
            raise click.ClickException(f"{exc}; name a reference: --zero SERIES_UID Z_MM") from exc
    (run / "heights.json").write_text(json.dumps(asdict(result.heights), indent=1))
    (run / "regions.json").write_text(json.dumps(result.to_json(), indent=1))
    (run / "regions.md").write_text(result.to_markdown())
    click.echo(result.heights)
    click.echo(result.to_markdown())
    if pairs:
        learned = covariance.fit(_teaching(pairs))
        write_json(run / COVARIANCE, learned.to_dict())
        click.echo(learned)


@main.command("export")
@_bank_option
@_run_option
@click.option("--name", required=True)
@click.option("--out", required=True, type=_path, help="Folder of the bundle.")
@click.option("--zero", default="", help="What height 0 means, in words; else as calibrated.")
@click.option("--commit", default="", help="Commit of the code that trained it.")
def export_(bank: Path, run: Path, name: str, out: Path, zero: str, commit: str) -> None:
    """Write a run as a weight bundle; calibrate it first."""
    from training import evaluate, export, train

    if not (run / "heights.json").exists():
        raise click.ClickException(f"{run} is not calibrated: python -m training calibrate")
    _, config, _ = train.load(run)
    heights = evaluate.heights_of(run, config.mm_per_score)
    path = run / "regions.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    learned = None
    if (run / COVARIANCE).exists():
        learned = Covariance.from_dict(json.loads((run / COVARIANCE).read_text()))
    click.echo(
        export.bundle(
            run,
            banks.load(bank),
            heights,
            name=name,
            out=out,
            zero=zero or table.get("zero", ""),
            commit=commit,
            regions=region.from_manifest(table),
            covariance=learned,
        )
    )


def _teaching(folder: Path) -> "list[Pair]":
    """Return the pairs of Table 1 that are many enough to learn from."""
    from training import pairs, protocol

    kinds = (protocol.Kind.FOLLOW_UP, protocol.Kind.STRESS)
    return [p for p in pairs.load(folder) if p.kind in kinds]


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
    from training import covariance, pairs, protocol, readers, table

    if not out:
        raise click.UsageError("--table1 needs --out, where its pairs are kept")
    spec = banks.load(bank).spec if bank else PreprocessSpec()
    folded = readers.Folds(default=run, spec=spec)
    if folds:
        folded = readers.Folds.from_json(folds / "folds.json", spec)
    config = protocol.QUICK if quick else protocol.ProtocolConfig()
    if unknown := sorted(set(methods) - set(table.methods())):
        raise click.UsageError(f"no method {unknown[0]!r}: {', '.join(table.methods())}")
    with _progress() as bar:
        task = bar.add_task("reading headers", total=None)
        found = archive.index(archives, progress=lambda n: bar.advance(task, n))
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        left_out = pairs.make(
            found.series, out, config, folded, spec=spec, workers=workers, progress=report
        )
        made = pairs.load(out)
        # Robust learns how curves err from other patients than those it is measured on.
        task = bar.add_task("learning covariances", total=covariance.SPLITS)
        try:
            learned = covariance.by_split(_teaching(out), progress=lambda n: bar.advance(task, n))
        except ConfigError as exc:
            learned = {}
            click.echo(f"robust refuses: {exc}", err=True)
        compared = table.methods(methods, learned)
        task = bar.add_task("aligning", total=len(made))
        results = table.measure(made, compared, lambda n: bar.advance(task, n))
    figures = table.figures(results, draws=200 if quick else 2000)
    text = table.to_markdown(figures)
    click.echo(text)
    for reason, count in (found.refused.series + left_out).most_common():
        click.echo(f"left out, {reason}: {count}")
    values = {"figures": figures, "left_out": left_out, "results": table.to_json(results)}
    (out / "table1.json").write_text(json.dumps(values, indent=1))
    (out / "table1.md").write_text(text)
    table.plot(results, out / "table1.png")


@main.command("compare")
@click.argument("first", type=_existing)
@click.argument("second", type=_existing)
@_bank_option
@click.option("--out", type=_path, help="Folder for comparison.json and comparison.md.")
@click.option(
    "--table1", multiple=True, type=_existing, help="Folder of DICOM: Table 1 on it, too."
)
@click.option("--quick", is_flag=True, help="A few pairs of Table 1, to try it out.")
@_json_option
def compare_(
    first: Path,
    second: Path,
    bank: Path,
    out: Path | None,
    table1: tuple[Path, ...],
    quick: bool,
    as_json: bool,
) -> None:
    """Print the figures of two weight bundles on one bank, and their differences.

    A bundle does not tell whom it saw: on patients that trained one of them, that one is
    flattered.

    \b
    Example: python -m training compare my-bundle other-bundle --bank bank
    """
    from dicomnode import weights
    from training import compare

    if table1 and not out:
        raise click.UsageError("--table1 needs --out, where its pairs are kept")

    bundles = weights.load(first), weights.load(second)
    slices = banks.load(bank)
    with _progress() as bar:
        total = 2 * sum(len(s.z_mm) for s in slices.series)
        task = bar.add_task("scoring", total=total)
        result = compare.compare(bundles, slices, progress=lambda n: bar.advance(task, n))
        if table1 and out:
            task = bar.add_task("Table 1", total=None)
            result["table1"] = compare.table1(
                (first, second),
                archive.index(table1).series,
                out / "table1",
                quick=quick,
                progress=lambda phase, done, total: bar.update(task, description=phase),
            )
    text = compare.to_markdown(result)
    click.echo(json.dumps(result, indent=1) if as_json else text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.md").write_text(text)
        write_json(out / "comparison.json", result)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    main()
