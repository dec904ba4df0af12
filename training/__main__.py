"""`python -m training`: index, train, evaluate, calibrate, export, compare."""

# What needs torch is imported inside the commands that use it: the processes of `index`
# import this module, and there may be one for each core.
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from dicomnode.core.curve import HeightMap
from dicomnode.errors import NodeError
from training import archive, fill, workers
from training import bank as banks
from training.durable import write_json

if TYPE_CHECKING:
    from training.train import TrainConfig

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
    python -m training evaluate --bank bank --run runs/1 --out runs/1
    python -m training calibrate --bank bank --run runs/1 --zero SERIES_UID 221.5
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


@main.command("evaluate")
@_bank_option
@_run_option
@click.option("--out", type=_path, help="Folder for evaluation.json and evaluation.md.")
def evaluate_(bank: Path, run: Path, out: Path | None) -> None:
    """Print correlation, slope and same-patient offsets, by patients seen and unseen."""
    from training import evaluate, train

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
    from training import calibrate, evaluate, train

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
    from training import export, train

    if not (run / "heights.json").exists():
        raise click.ClickException(f"{run} is not calibrated: python -m training calibrate")
    _, config, _ = train.load(run)
    heights = _heights(run, config)
    click.echo(
        export.bundle(run, banks.load(bank), heights, name=name, out=out, zero=zero, commit=commit)
    )


@main.command("compare")
@click.argument("first", type=_existing)
@click.argument("second", type=_existing)
@_bank_option
@click.option("--out", type=_path, help="Folder for comparison.json and comparison.md.")
@_json_option
def compare_(first: Path, second: Path, bank: Path, out: Path | None, as_json: bool) -> None:
    """Print the figures of two weight bundles on one bank, and their differences.

    \b
    Example: python -m training compare my-bundle other-bundle --bank bank
    """
    from dicomnode import weights
    from training import compare

    bundles = weights.load(first), weights.load(second)
    slices = banks.load(bank)
    with _progress() as bar:
        total = 2 * sum(len(s.z_mm) for s in slices.series)
        task = bar.add_task("scoring", total=total)
        result = compare.compare(bundles, slices, progress=lambda n: bar.advance(task, n))
    text = compare.to_markdown(result)
    click.echo(json.dumps(result, indent=1) if as_json else text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.md").write_text(text)
        write_json(out / "comparison.json", result)


def _heights(run: Path, config: "TrainConfig") -> HeightMap:
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
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    main()
