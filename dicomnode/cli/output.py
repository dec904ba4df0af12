"""What commands print and write: tables, JSON, bars, files."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dicomnode.model import OffsetStatus, ScoreCurve

if TYPE_CHECKING:
    from dicomnode.core.region import Region
    from dicomnode.objects.modules import Origin
    from dicomnode.objects.source import Source
    from dicomnode.query import PairAnswer


# Piped, a table keeps its columns whole; in a terminal it folds.
PIPED_WIDTH = 400


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while a terminal is attached; give a function that advances it."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield partial(bar.advance, bar.add_task(title, total=total))


def write_curves(
    curves: Sequence[ScoreCurve], csv_path: Path | None, png_path: Path | None
) -> None:
    """Write curves to the files that were asked for."""
    from dicomnode import plot, present

    if csv_path and curves:
        present.write_csv(csv_path, curves)
    if png_path and curves:
        plot.curve_png(curves, png_path)


def answer_offset(
    answer: "PairAnswer", as_json: bool, transform: Path | None, png_path: Path | None
) -> NoReturn:
    """Show an offset, write the files that were asked for, and end the command."""
    from dicomnode import plot, present

    stored, result = answer.stored, answer.stored.offset
    refused = result.status is OffsetStatus.REFUSED
    if transform and not refused:
        from dicomnode.objects import transform as itk

        itk.write(result, transform)
    if png_path:
        plot.pair_png(answer.fixed, answer.moving, result, png_path)
    if as_json:
        print_json(present.offset_json(stored))
    elif refused:
        click.echo(f"refused: {result.reason}", err=True)
    else:
        click.echo(plot.pair_text(answer.fixed, answer.moving, result))
        click.echo(present.offset_lines(stored))
    sys.exit(1 if refused else 0)


def write_registration(
    path: Path, answer: "PairAnswer", fixed: "Source", moving: "Source", origin: "Origin"
) -> None:
    """Write a Spatial Registration of a pair, and tell what it leaves empty."""
    from dicomnode.objects import modules, registration

    ds = registration.registration(fixed, moving, answer.stored.offset, origin)
    modules.save(ds, path)
    tell_unknown(path, fixed)


def write_report(
    path: Path,
    curve: ScoreCurve,
    regions: "Sequence[Region]",
    source: "Source",
    origin: "Origin",
) -> None:
    """Write a report of what a curve covers, and tell what it leaves empty."""
    from dicomnode.objects import coverage_report, modules

    modules.save(coverage_report.coverage_report(source, curve, regions, origin), path)
    tell_unknown(path, source)


def tell_unknown(path: Path, source: "Source") -> None:
    if source.unknown:
        click.echo(f"{path}: left empty, unknown here: {', '.join(source.unknown)}", err=True)


def table_console() -> Console:
    """Return a console for tables: as wide as the terminal; piped, wide enough."""
    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=1))


def nothing(message: str) -> NoReturn:
    """Say what was not found, and end with status 1."""
    click.echo(message, err=True)
    sys.exit(1)
