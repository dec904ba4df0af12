"""Commands for files, without a node: score, align, regions."""

import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dicomnode import config as configuration
from dicomnode.cli.database import config_path
from dicomnode.cli.options import (
    EXISTING,
    METHODS,
    config_option,
    csv_option,
    device_option,
    json_option,
    model_option,
    png_option,
    registration_option,
    transform_option,
)
from dicomnode.cli.output import (
    answer_offset,
    nothing,
    print_json,
    progress,
    table_console,
    write_curves,
    write_registration,
    write_report,
)
from dicomnode.errors import ObjectError
from dicomnode.model import Method, OffsetStatus, Refusal, ScoreCurve

if TYPE_CHECKING:
    from dicomnode.core.region import Region
    from dicomnode.files import ScoredFiles, ScoredSeries
    from dicomnode.objects.modules import Origin
    from dicomnode.objects.source import Source


@click.command()
@click.argument("paths", nargs=-1, required=True, type=EXISTING)
@model_option
@device_option
@json_option
@click.option(
    "--format",
    "shape",
    type=click.Choice(["bpreg"]),
    help="Print JSON as bpreg has it, by Series Instance UID.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="With --format: write a file a Series to this folder instead.",
)
@csv_option
@png_option
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a DICOM SR of what each Series covers into this folder, SERIES_UID.dcm.",
)
def score(
    paths: tuple[Path, ...],
    model: Path | None,
    device: str,
    as_json: bool,
    shape: str | None,
    out: Path | None,
    csv_path: Path | None,
    png_path: Path | None,
    report: Path | None,
) -> None:
    """Score files without a node or a database: one curve a Series.

    \b
    Example:  dicomnode score CT/ --png curves.png
              dicomnode score CT/ --format bpreg --out scores
    """
    from dicomnode import present

    if out and not shape:
        raise click.UsageError("--out needs --format")
    if shape and as_json:
        raise click.UsageError("--json and --format are two shapes")
    found = _score(paths, model, device)
    curves = [s.outcome for s in found.series if isinstance(s.outcome, ScoreCurve)]
    write_curves(curves, csv_path, png_path)
    if report:
        report.mkdir(parents=True, exist_ok=True)
        origin = _origin(model, datetime.now(UTC))
        sources = _sources(paths, curves)
        for curve in curves:
            file = report / f"{curve.series_uid}.dcm"
            write_report(file, curve, found.regions, sources[curve.series_uid], origin)
    if shape:
        _print_bpreg(curves, found.regions, out)
    elif as_json:
        print_json([present.scored_json(s, found.regions) for s in found.series])
    else:
        for s in found.series:
            _print_scored(s, found.regions)
    for reason, count in found.unreadable.items():
        click.echo(f"{count} files not read: {reason}", err=True)
    sys.exit(0 if curves else 1)


@click.command()
@model_option
@config_option
@json_option
def regions(model: Path | None, config: Path | None, as_json: bool) -> None:
    """List the regions a bundle knows: codes, body-height limits, spread, and what they rest on.

    The bundle is the one that the node scores with, where none is named.

    \b
    Example:  dicomnode regions --model my-bundle
    """
    from dicomnode import present, weights

    if model is None:
        model = configuration.load(config_path(config)).score.model
    bundle = weights.load(model)
    if as_json:
        print_json([r.to_dict() for r in bundle.regions])
    elif bundle.regions:
        table_console().print(present.region_table(bundle.regions))
    if not bundle.regions:
        nothing(f"bundle {bundle.name} has no regions: python -m training calibrate, then export")


@click.command()
@click.argument("fixed_path", type=EXISTING)
@click.argument("moving_path", type=EXISTING)
@click.option("--method", type=METHODS, default=Method.ROBUST.value, show_default=True)
@model_option
@device_option
@json_option
@transform_option
@registration_option
@png_option
def align(
    fixed_path: Path,
    moving_path: Path,
    method: str,
    model: Path | None,
    device: str,
    as_json: bool,
    transform: Path | None,
    registration: Path | None,
    png_path: Path | None,
) -> None:
    """Tell the offset between two folders, without a node.

    \b
    Example:  dicomnode align 2024/CT 2023/CT --png pair.png
    """
    from dicomnode import files, weights
    from dicomnode.query import PairAnswer
    from dicomnode.store import StoredOffset

    curves: list[list[ScoreCurve]] = []
    studies: dict[str, str] = {}
    for path in (fixed_path, moving_path):
        found = _score((path,), model, device)
        curves.append([s.outcome for s in found.series if isinstance(s.outcome, ScoreCurve)])
        studies |= {s.header.series_uid: s.header.study_uid for s in found.series}
        if not curves[-1]:
            states = ", ".join(str(s.outcome) for s in found.series) or "no CT Series"
            nothing(f"no curve in {path}: {states}")
    start = time.perf_counter()
    covariance = weights.covariance_of(weights.read_manifest(model))
    best = files.best_offset(curves[0], curves[1], Method(method), covariance)
    assert best is not None  # each side has a curve
    fixed, moving, result = best
    stored = StoredOffset(
        offset=result,
        fixed_study=studies[fixed.series_uid],
        fixed_series=fixed.series_uid,
        moving_study=studies[moving.series_uid],
        moving_series=moving.series_uid,
        model=fixed.model,
        computed_at=datetime.now(UTC),
        seconds=time.perf_counter() - start,
    )
    answer = PairAnswer(stored, fixed, moving)
    if registration and result.status is not OffsetStatus.REFUSED:
        sources = _sources((fixed_path, moving_path), (fixed, moving))
        origin = _origin(model, stored.computed_at)
        sides = sources[fixed.series_uid], sources[moving.series_uid]
        write_registration(registration, answer, *sides, origin)
    answer_offset(answer, as_json, transform, png_path)


def _score(paths: Sequence[Path], model: Path | None, device: str) -> "ScoredFiles":
    from dicomnode import device as devices
    from dicomnode import dicomio, files, weights
    from dicomnode.node.score import Scorer

    bundle, on = weights.load(model), weights.pick_device(device)
    scorer = Scorer(bundle, on, batch=64, dtype=devices.pick_dtype("auto", bundle, on))
    total = sum(1 for _ in dicomio.find(list(paths)))
    with progress("scoring", total) as advance:
        return files.score(list(paths), scorer, advance)


def _sources(paths: Sequence[Path], curves: Sequence[ScoreCurve]) -> "dict[str, Source]":
    from dicomnode import files

    found = files.sources(paths, curves)
    for curve in curves:
        if curve.series_uid not in found:
            raise ObjectError(f"the files of Series {curve.series_uid} went away")
    return found


def _origin(model: Path | None, made_at: datetime) -> "Origin":
    from dicomnode import weights
    from dicomnode.objects.modules import Origin

    manifest = weights.read_manifest(model)
    return Origin(weights.digest(manifest), str(manifest["name"]), made_at.astimezone())


def _print_scored(scored: "ScoredSeries", regions: "Sequence[Region]") -> None:
    from dicomnode import plot, present

    click.secho(f"Series {scored.header.series_uid}", bold=True)
    if isinstance(scored.outcome, Refusal):
        click.echo(f"{scored.outcome}\n")
    else:
        click.echo(plot.curve_text(scored.outcome.z_mm, scored.outcome.height_mm))
        click.echo(present.quality_line(scored.outcome, regions) + "\n")


def _print_bpreg(
    curves: Sequence[ScoreCurve], regions: "Sequence[Region]", folder: Path | None
) -> None:
    from dicomnode import bpreg

    found = {c.series_uid: bpreg.metadata(c, regions) for c in curves}
    if folder is None:
        print_json(found)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for series_uid, values in found.items():
        (folder / f"{series_uid}.json").write_text(json.dumps(values, indent=1) + "\n")
    click.echo(f"{len(found)} files in {folder}", err=True)
