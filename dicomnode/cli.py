"""The command line: a thin face over `query`, `files` and `node.serve`.

Tables and JSON go to stdout, messages and progress to stderr. Exit status 0; 1: nothing found,
or refused; 2: wrong usage or setting.
"""

import csv
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dicomnode import config as configuration
from dicomnode import log
from dicomnode.errors import ConfigError, NodeError, WeightsError
from dicomnode.model import Method, Offset, OffsetStatus, Refusal, ScoreCurve, SeriesState

DEFAULT_CONFIG = Path("node.toml")
METHODS = click.Choice([m.value for m in Method])


class _Group(click.Group):
    """Turns what the node raises on purpose into a message and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigError, WeightsError) as exc:
            click.echo(f"Error: {exc}", err=True)
            ctx.exit(2)
        except NodeError as exc:
            click.echo(f"Error: {exc}", err=True)
            ctx.exit(1)


_config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Settings file; node.toml in this folder where there is one.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_model_option = click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Weight bundle; the one that came with the node.",
)
_device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dicomnode-ssbr")
def main() -> None:
    """A DICOM node that scores CT slices by body height and aligns timepoints.

    \b
    dicomnode demo                          see it work, with phantom patients
    dicomnode score FOLDER                  score files, without a node
    dicomnode serve --config node.toml      run the node
    """


@main.command()
@click.option("--keep", is_flag=True, help="Keep the node and its data when all is shown.")
def demo(keep: bool) -> None:
    """Send phantom patients through a node of its own, and compare its offsets to the truth.

    \b
    Example:  dicomnode demo
    """
    from dicomnode import demo as demonstration

    sys.exit(demonstration.run(keep=keep))


@main.command()
@_config_option
@click.option("--only", type=click.Choice(["receive", "work"]), help="Run one part alone.")
@click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
@click.option("--log-level", default="INFO", show_default=True)
@click.option("--until-eof", is_flag=True, hidden=True, help="Stop when stdin ends.")
def serve(
    config: Path | None, only: str | None, log_json: bool, log_level: str, until_eof: bool
) -> None:
    """Run the node: receiver and worker, until SIGTERM or Ctrl-C.

    \b
    Example:  dicomnode serve --config node.toml
    """
    config = _config_path(config)
    settings = configuration.load(config)
    log.setup(log_level.upper(), log_json)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if until_eof:  # the supervisor holds the other end: it closes when that process is gone
        threading.Thread(target=_stop_at_eof, args=(stop,), daemon=True).start()
    if only == "receive":
        from dicomnode.node import receive

        receive.run(settings, stop)
    elif only == "work":
        from dicomnode.node import serve as parts

        parts.work(settings, stop)
    else:
        from dicomnode.node import serve as parts

        sys.exit(
            parts.supervise(config, stop, ["--log-level", log_level] + ["--log-json"] * log_json)
        )


@main.command()
@_config_option
@_json_option
def check(config: Path | None, as_json: bool) -> None:
    """Print the resolved settings, and try database, spool, weights, device and each peer.

    \b
    Example:  dicomnode check --config node.toml
    """
    from dicomnode import checks

    settings = configuration.load(_config_path(config))
    results = [c for c in checks.run(settings)]
    if as_json:
        values = settings.model_dump(mode="json")
        values["database"]["url"] = checks.safe_url(settings.database.url)
        _print_json({"settings": values, "checks": [asdict(c) for c in results]})
    else:
        for line in checks.lines(settings):
            click.echo(line)
        for c in results:
            mark = click.style("ok  ", fg="green") if c.ok else click.style("FAIL", fg="red")
            click.echo(f"{mark} {c.name}: {c.message}")
    sys.exit(0 if all(c.ok for c in results) else 1)


@main.command("import")
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@_config_option
def import_(paths: tuple[Path, ...], config: Path | None) -> None:
    """Take files through the same stages as if they had been sent; folders at any depth.

    A node that is running on the same spool does the work; else it is done here.

    \b
    Example:  dicomnode import /archive/2024
    """
    from dicomnode import backfill

    settings = configuration.load(_config_path(config))
    log.setup("WARNING", json=False)
    with _progress("importing") as advance:
        summary = backfill.run(list(paths), settings, advance)
    click.echo(
        f"{summary.files} files taken, {summary.skipped} are no DICOM; "
        f"the database holds {summary.curves} curves, {summary.pairs} offsets",
        err=True,
    )


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@_model_option
@_device_option
@_json_option
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--png", "png_path", type=click.Path(dir_okay=False, path_type=Path))
def score(
    paths: tuple[Path, ...],
    model: Path | None,
    device: str,
    as_json: bool,
    csv_path: Path | None,
    png_path: Path | None,
) -> None:
    """Score files without a node or a database: one curve a Series.

    \b
    Example:  dicomnode score CT/ --png curves.png
    """
    found = _score(paths, model, device)
    curves = [s.outcome for s in found.series if isinstance(s.outcome, ScoreCurve)]
    if csv_path:
        _write_csv(csv_path, curves)
    if png_path and curves:
        from dicomnode import plot

        plot.curve_png([(_short(c.series_uid), c) for c in curves], png_path)
    if as_json:
        _print_json([_scored_json(s) for s in found.series])
    else:
        for s in found.series:
            _print_scored(s)
    for reason, count in found.unreadable.items():
        click.echo(f"{count} files not read: {reason}", err=True)
    sys.exit(0 if curves else 1)


@main.command()
@click.option("--patient", help="Patient ID.")
@click.option("--study", help="Study Instance UID.")
@click.option("--state", type=click.Choice([s.value for s in SeriesState]))
@click.option("--limit", default=200, show_default=True)
@_config_option
@_json_option
def series(
    patient: str | None,
    study: str | None,
    state: str | None,
    limit: int,
    config: Path | None,
    as_json: bool,
) -> None:
    """List Series and where they stand, the newest first; open ones with slices scored so far.

    \b
    Example:  dicomnode series --state quarantined
    """
    from dicomnode import store

    with _database(config) as engine, store.reading(engine) as session:
        rows = store.list_series(
            session,
            patient_id=patient,
            study_uid=study,
            state=SeriesState(state) if state else None,
            limit=limit,
        )
        quarantined = store.count_quarantined(session)
    if as_json:
        _print_json([_series_json(r) for r in rows])
    else:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for title, justify in (
            ("series", "left"), ("study", "left"), ("patient", "left"), ("state", "left"),
            ("slices", "right"), ("r", "right"), ("slope", "right"), ("body height, mm", "right"),
            ("set aside, flags", "left"),
        ):  # fmt: skip
            table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for r in rows:
            table.add_row(*_series_cells(r))
        _console().print(table)
    if quarantined:
        total = sum(quarantined.values())
        detail = ", ".join(f"{reason} {n}" for reason, n in sorted(quarantined.items()))
        click.echo(f"{total} files in quarantine: {detail}", err=True)
    if not rows:
        click.echo("no such Series", err=True)
    sys.exit(0 if rows else 1)


@main.command()
@click.argument("series_uid")
@_config_option
@_json_option
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--png", "png_path", type=click.Path(dir_okay=False, path_type=Path))
def curve(
    series_uid: str,
    config: Path | None,
    as_json: bool,
    csv_path: Path | None,
    png_path: Path | None,
) -> None:
    """Show the body-height curve of one Series.

    \b
    Example:  dicomnode curve 1.2.840.113619.2.55 --png curve.png
    """
    from dicomnode import plot, query

    with _database(config) as engine:
        found = query.series_curve(engine, series_uid)
    if found is None:
        _nothing("the node never saw this Series")
        return
    if found.curve is None:
        row = found.series
        if row.state is SeriesState.OPEN:
            _nothing(f"still arriving: {row.scored} slices scored of {row.received} received")
        _nothing(f"no curve: {row.state}:{row.reason}")
        return
    c = found.curve
    if csv_path:
        _write_csv(csv_path, [c])
    if png_path:
        plot.curve_png([(_short(series_uid), c)], png_path)
    if as_json:
        _print_json(_curve_json(c))
        return
    click.echo(plot.curve_text(c.z_mm, c.height_mm))
    click.echo(_quality_line(c))


@main.command()
@click.argument("fixed_study")
@click.argument("moving_study")
@click.option("--method", type=METHODS, help="The best stored one where none is named.")
@_config_option
@_json_option
@click.option("--transform", type=click.Path(dir_okay=False, path_type=Path), help="ITK .tfm")
@click.option("--png", "png_path", type=click.Path(dir_okay=False, path_type=Path))
def offset(
    fixed_study: str,
    moving_study: str,
    method: str | None,
    config: Path | None,
    as_json: bool,
    transform: Path | None,
    png_path: Path | None,
) -> None:
    """Tell the offset that aligns one Study onto another: z_fixed = z_moving + offset.

    \b
    Example:  dicomnode offset FIXED_STUDY_UID MOVING_STUDY_UID --transform start.tfm
    """
    from dicomnode import query

    with _database(config) as engine:
        answer = query.pair(engine, fixed_study, moving_study, Method(method) if method else None)
    if answer is None:
        _nothing("no pair of curves of these two Studies; see `dicomnode series --study UID`")
        return
    s = answer.stored
    _answer_offset(
        answer.fixed,
        answer.moving,
        s.offset,
        as_json=as_json,
        transform=transform,
        png_path=png_path,
        studies=(s.fixed_study, s.moving_study),
        computed_at=s.computed_at.isoformat(),
        seconds=s.seconds,
    )


@main.command()
@click.argument("fixed_path", type=click.Path(exists=True, path_type=Path))
@click.argument("moving_path", type=click.Path(exists=True, path_type=Path))
@click.option("--method", type=METHODS, default=Method.L1.value, show_default=True)
@_model_option
@_device_option
@_json_option
@click.option("--transform", type=click.Path(dir_okay=False, path_type=Path), help="ITK .tfm")
@click.option("--png", "png_path", type=click.Path(dir_okay=False, path_type=Path))
def align(
    fixed_path: Path,
    moving_path: Path,
    method: str,
    model: Path | None,
    device: str,
    as_json: bool,
    transform: Path | None,
    png_path: Path | None,
) -> None:
    """Tell the offset between two folders, without a node.

    \b
    Example:  dicomnode align 2024/CT 2023/CT --png pair.png
    """
    import time
    from datetime import UTC, datetime

    from dicomnode import files

    scored = [_score((path,), model, device) for path in (fixed_path, moving_path)]
    start = time.perf_counter()
    curves = [
        {s.outcome.series_uid: (s.header, s.outcome) for s in found.series
         if isinstance(s.outcome, ScoreCurve)}
        for found in scored
    ]  # fmt: skip
    best = files.best_offset(
        [c for _, c in curves[0].values()], [c for _, c in curves[1].values()], Method(method)
    )
    if best is None:
        for path, found in zip((fixed_path, moving_path), scored, strict=True):
            states = ", ".join(
                str(s.outcome) for s in found.series if isinstance(s.outcome, Refusal)
            )
            if not any(isinstance(s.outcome, ScoreCurve) for s in found.series):
                click.echo(f"no curve in {path}: {states or 'no CT Series'}", err=True)
        sys.exit(1)
    fixed, moving, result = best
    _answer_offset(
        fixed,
        moving,
        result,
        as_json=as_json,
        transform=transform,
        png_path=png_path,
        studies=(
            curves[0][fixed.series_uid][0].study_uid,
            curves[1][moving.series_uid][0].study_uid,
        ),
        computed_at=datetime.now(UTC).isoformat(),
        seconds=time.perf_counter() - start,
    )


@main.group()
def db() -> None:
    """Look after the database."""


@db.command()
@_config_option
def upgrade(config: Path | None) -> None:
    """Bring the database to the schema of this version; safe to repeat.

    \b
    Example:  dicomnode db upgrade --config node.toml
    """
    from db import migrate

    with _database(config, checked=False) as engine:
        migrate.upgrade(engine)
        click.echo(migrate.current(engine))


@db.command()
@_config_option
def current(config: Path | None) -> None:
    """Print the revision of the database, and the one this version needs.

    \b
    Example:  dicomnode db current
    """
    from db import migrate

    with _database(config, checked=False) as engine:
        now = migrate.current(engine)
    click.echo(f"{now or 'empty'} (this version needs {migrate.head()})")
    sys.exit(0 if now == migrate.head() else 1)


def _stop_at_eof(stop: threading.Event) -> None:
    sys.stdin.buffer.read()
    stop.set()


def _config_path(path: Path | None) -> Path | None:
    return path or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)


def _database(config: Path | None, *, checked: bool = True) -> Any:
    from dicomnode import store

    settings = configuration.load(_config_path(config))
    return store.opened(settings.database.url, checked=checked)


def _score(paths: Sequence[Path], model: Path | None, device: str) -> Any:
    from dicomnode import dicomio, files, weights
    from dicomnode.node.score import Scorer

    scorer = Scorer(weights.load(model), weights.pick_device(device), batch=32)
    total = sum(1 for _ in dicomio.find(list(paths)))
    with _progress("scoring", total) as advance:
        return files.score(list(paths), scorer, advance)


def _progress(title: str, total: int | None = None) -> Any:
    """A bar on stderr while a terminal is attached; gives a function that advances it."""
    import contextlib
    from collections.abc import Iterator

    @contextlib.contextmanager
    def shown() -> Iterator[Callable[..., None]]:
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
            task = bar.add_task(title, total=total)
            yield partial(bar.advance, task)

    return shown()


def _answer_offset(
    fixed: ScoreCurve,
    moving: ScoreCurve,
    result: Offset,
    *,
    as_json: bool,
    transform: Path | None,
    png_path: Path | None,
    studies: tuple[str, str],
    computed_at: str,
    seconds: float,
) -> None:
    from dicomnode import plot

    refused = result.status is OffsetStatus.REFUSED
    if transform and not refused:
        from dicomnode.objects import transform as itk

        itk.write(result, transform)
    if png_path:
        plot.pair_png(fixed, moving, result, png_path)
    if as_json:
        _print_json(
            {
                "fixed": {"study_uid": studies[0], "series_uid": fixed.series_uid},
                "moving": {"study_uid": studies[1], "series_uid": moving.series_uid},
                **{k: getattr(result, k) for k in _OFFSET_KEYS},
                "model": fixed.model,
                "computed_at": computed_at,
                "seconds": seconds,
            }
        )
    elif refused:
        click.echo(f"refused: {result.reason}", err=True)
    else:
        assert result.offset_mm is not None
        click.echo(plot.pair_text(fixed, moving, result))
        click.echo(
            f"{result.method}: z_fixed = z_moving {result.offset_mm:+.1f} mm, "
            f"overlap {result.overlap_mm:.0f} mm, {result.status}"
        )
        click.echo(f"fixed  {fixed.series_uid}\nmoving {moving.series_uid}")
    sys.exit(1 if refused else 0)


_OFFSET_KEYS = (
    "method", "offset_mm", "sigma_mm", "overlap_mm", "status", "reason", "dx_mm", "dy_mm",
)  # fmt: skip


def _scored_json(scored: Any) -> dict[str, Any]:
    header, outcome = scored.header, scored.outcome
    has_curve = isinstance(outcome, ScoreCurve)
    return {
        "patient_id": header.patient.patient_id,
        "study_uid": header.study_uid,
        "series_uid": header.series_uid,
        "state": SeriesState.CURVE if has_curve else outcome.reason.state,
        "reason": None if has_curve else outcome.reason,
        "model": outcome.model if has_curve else None,
        "slices": _slices_json(outcome) if has_curve else [],
        "quality": _quality_json(outcome) if has_curve else None,
        "coverage": [],
        "set_aside": scored.set_aside,
    }


def _curve_json(c: ScoreCurve) -> dict[str, Any]:
    return {
        "series_uid": c.series_uid,
        "model": c.model,
        "slices": _slices_json(c),
        "quality": _quality_json(c),
    }


def _slices_json(c: ScoreCurve) -> list[dict[str, Any]]:
    columns = zip(c.sop_instance_uids, c.frames, c.z_mm, c.score, c.height_mm, strict=True)
    return [
        {
            "sop_instance_uid": uid,
            "frame": frame,
            "z_mm": round(float(z), 4),
            "score": round(float(s), 5),
            "height_mm": round(float(h), 2),
        }
        for uid, frame, z, s, h in columns
    ]


def _quality_json(c: ScoreCurve) -> dict[str, Any]:
    q = c.quality
    return {"pearson_r": q.pearson_r, "slope": q.slope, "reasons": list(q.flags)}


def _series_json(r: Any) -> dict[str, Any]:
    return {
        "patient_id": r.patient.patient_id,
        "issuer": r.patient.issuer,
        "study_uid": r.study_uid,
        "series_uid": r.series_uid,
        "study_datetime": r.study_datetime.isoformat() if r.study_datetime else None,
        "modality": r.modality,
        "body_part_examined": r.body_part_examined,
        "state": r.state,
        "reason": r.reason,
        "evidence": r.evidence,
        "revision": r.revision,
        "received": r.received,
        "scored": r.scored,
        "expected": r.expected,
        "set_aside": r.set_aside,
        "last_arrival_at": r.last_arrival_at.isoformat(),
        "model": r.model,
        "height_mm": r.height_mm,
        "quality": None
        if r.quality is None
        else {
            "pearson_r": r.quality.pearson_r,
            "slope": r.quality.slope,
            "reasons": list(r.quality.flags),
        },
    }


def _series_cells(r: Any) -> list[str]:
    state = r.state if r.reason is None else f"{r.state}:{r.reason}"
    aside = [f"{reason} {n}" for reason, n in sorted(r.set_aside.items())]
    quality = r.quality
    return [
        _short(r.series_uid),
        _short(r.study_uid),
        r.patient.patient_id or "-",
        state,
        f"{r.scored}/{r.received}",
        f"{quality.pearson_r:.4f}" if quality else "",
        f"{quality.slope:.2f}" if quality else "",
        f"{r.height_mm[0]:.0f}..{r.height_mm[1]:.0f}" if r.height_mm else "",
        ", ".join([*aside, *(quality.flags if quality else ())]),
    ]


def _print_scored(scored: Any) -> None:
    from dicomnode import plot

    outcome = scored.outcome
    click.secho(f"Series {scored.header.series_uid}", bold=True)
    if isinstance(outcome, Refusal):
        click.echo(f"{outcome}\n")
        return
    click.echo(plot.curve_text(outcome.z_mm, outcome.height_mm))
    click.echo(_quality_line(outcome) + "\n")


def _quality_line(c: ScoreCurve) -> str:
    q = c.quality
    flags = f", {', '.join(q.flags)}" if q.flags else ""
    return (
        f"{len(c.z_mm)} positions, body height {c.height_mm.min():.0f} to {c.height_mm.max():.0f} mm"
        f", r {q.pearson_r:.4f}, slope {q.slope:.2f}{flags}"
    )


def _write_csv(path: Path, curves: Sequence[ScoreCurve]) -> None:
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["series_uid", "sop_instance_uid", "frame", "z_mm", "score", "height_mm"])
        for c in curves:
            for s in _slices_json(c):
                writer.writerow([c.series_uid, *s.values()])


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


def _nothing(message: str) -> None:
    click.echo(message, err=True)
    sys.exit(1)


def _short(uid: str) -> str:
    return uid


def _console() -> Console:
    # Piped, a table keeps its columns whole; in a terminal it folds.
    return Console() if sys.stdout.isatty() else Console(width=400)
