"""The command line: a thin face over `query`, `files` and `node.serve`.

Tables and JSON go to stdout, messages and progress to stderr. Exit status 0; 1: nothing found,
or refused; 2: wrong usage or setting.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dicomnode import config as configuration
from dicomnode import log
from dicomnode.audit import Act, AuditLog, user
from dicomnode.core import placeholder
from dicomnode.errors import ConfigError, ExpressionError, NodeError, ObjectError, WeightsError
from dicomnode.model import (
    DeliveryState,
    FetchState,
    Method,
    OffsetStatus,
    PatientKey,
    Refusal,
    ScoreCurve,
    SeriesState,
)

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from dicomnode.core.region import Region
    from dicomnode.files import ScoredFiles, ScoredSeries
    from dicomnode.mining import Expression
    from dicomnode.objects.modules import Origin
    from dicomnode.objects.source import Source
    from dicomnode.query import PairAnswer

# What needs torch, a database or matplotlib is imported where it is used: `--help` and the
# receiver start without.

DEFAULT_CONFIG = Path("node.toml")
METHODS = click.Choice([m.value for m in Method])
# Piped, a table keeps its columns whole; in a terminal it folds.
PIPED_WIDTH = 400


class _Group(click.Group):
    """Turns what the node raises on purpose into a message and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NodeError as exc:
            click.echo(f"Error: {exc}", err=True)
            ctx.exit(2 if isinstance(exc, ConfigError | WeightsError | ExpressionError) else 1)


_file = click.Path(dir_okay=False, path_type=Path)
_existing = click.Path(exists=True, path_type=Path)
_config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Settings file; node.toml in this folder where there is one.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_csv_option = click.option("--csv", "csv_path", type=_file, help="Write slices to this file.")
_png_option = click.option("--png", "png_path", type=_file, help="Draw to this file.")
_transform_option = click.option(
    "--transform", type=_file, help="Write an ITK transform (.tfm), fixed to moving points."
)
_registration_option = click.option(
    "--registration", type=_file, help="Write a DICOM Spatial Registration, moving onto fixed."
)
_model_option = click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Weight bundle; the one that came with the node.",
)
_device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, mps, cuda or cuda:N."
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dicomnode-ssbr")
def main() -> None:
    """A DICOM node that scores CT slices by body height and aligns timepoints.

    \b
    dicomnode demo                          see it work, with phantom patients
    dicomnode score FOLDER                  score files, without a node
    dicomnode serve --config node.toml      run the node
    """
    # What pydicom warns of quotes values of the data set: whatever the command, it stays silent.
    log.setup("WARNING", json=False)


@main.command()
@click.option("--keep", is_flag=True, help="Keep the node up when all is shown.")
def demo(keep: bool) -> None:
    """Send phantom patients through a node of its own, and compare its offsets to the truth.

    \b
    Example:  dicomnode demo
    """
    from dicomnode import demo as demonstration

    sys.exit(demonstration.run(keep=keep))


@main.command()
@_config_option
@click.option(
    "--only", type=click.Choice(["receive", "work", "exchange", "web"]), help="Run one part alone."
)
@click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
    default="INFO",
    show_default=True,
)
@click.option("--until-eof", is_flag=True, hidden=True, help="Stop when stdin ends.")
@click.option("--listen-fd", type=int, hidden=True, help="Inherited socket that listens.")
def serve(
    config: Path | None,
    only: str | None,
    log_json: bool,
    log_level: str,
    until_eof: bool,
    listen_fd: int | None,
) -> None:
    """Run the node: receivers, worker, exchange, page, until SIGTERM or Ctrl-C.

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
    if only == "receive" and (listen_fd is not None or settings.receivers == 1):
        from dicomnode.node import receive  # alone: it needs neither torch nor a database

        listening = None if listen_fd is None else socket.socket(fileno=listen_fd)
        receive.run(settings, stop, listening)
        return
    if only == "exchange":
        from dicomnode.node import exchange

        exchange.run(settings, stop)
        return
    if only == "web":
        from dicomnode.web import run as page

        page.run(settings, stop)
        return
    from dicomnode.node import serve as parts

    if only == "work":
        parts.work(settings, stop)
    else:
        options = ["--log-level", log_level] + ["--log-json"] * log_json
        worker = only != "receive"
        sys.exit(parts.supervise(settings, config, stop, options, worker=worker))


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
    log.setup("CRITICAL", json=False)  # each check tells its own story
    results = list(checks.run(settings))
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
@click.argument("paths", nargs=-1, required=True, type=_existing)
@_config_option
def import_(paths: tuple[Path, ...], config: Path | None) -> None:
    """Take files through the same stages as if they had been sent; folders at any depth.

    A node that is running on the same spool does the work; else it is done here.

    \b
    Example:  dicomnode import /archive/2024
    """
    from dicomnode import backfill, dicomio

    settings = configuration.load(_config_path(config))
    total = sum(1 for _ in dicomio.find(list(paths)))
    with _progress("importing", total) as advance:
        summary = backfill.run(list(paths), settings, advance)
    _audit(config, Act.IMPORT, files=summary.files)  # not the paths: they may name patients
    click.echo(
        f"{summary.files} files taken; "
        f"the database holds {summary.curves} curves, {summary.pairs} offsets",
        err=True,
    )
    for reason, count in summary.skipped.items():
        click.echo(f"{count} files skipped: {reason}", err=True)
    sys.exit(0 if summary.files else 1)


@main.command()
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Weight bundle; the node's own, [score] model, where none is named.",
)
@click.option("--series", "series_uid", help="Series Instance UID; every Series without it.")
@_config_option
@_json_option
def rescore(model: Path | None, series_uid: str | None, config: Path | None, as_json: bool) -> None:
    """Score curves of another bundle anew, from the inputs that were kept, and their pairs.

    For when the bundle changed. Each curve gets a new revision. Stop it and start it again as you
    like: what is done is done. The node may run meanwhile.

    \b
    Example:  dicomnode rescore --config node.toml
    """
    from dicomnode import device, store, weights
    from dicomnode import rescore as rescoring
    from dicomnode.node.score import Scorer
    from dicomnode.outgoing.asking import Asking

    settings = configuration.load(_config_path(config))
    own = weights.load(settings.score.model)
    bundle = weights.load(model) if model else own
    on = weights.pick_device(settings.score.device)
    dtype = device.pick_dtype(settings.score.dtype, bundle, on)
    scorer = Scorer(bundle, on, settings.score.batch, dtype)
    with store.opened(settings.database.url) as engine:
        if series_uid is not None:
            with store.reading(engine) as session:
                rows = store.list_series(session, series_uid=series_uid)
            if not rows:
                _nothing("the node never saw this Series")
            if rows[0].state is SeriesState.OPEN:
                _nothing("still arriving: a Series is scored anew once it is finished")
        plan = rescoring.plan(engine, bundle, series_uid)
        with _progress("rescoring", len(plan.series)) as advance:
            summary = rescoring.run(engine, scorer, plan.series, advance, Asking(settings))
    if as_json:
        _print_json(
            {
                "model": bundle.digest,
                "rescored": summary.rescored,
                "pairs": summary.pairs,
                "without_inputs": plan.without_inputs,
                "other_input": plan.other_input,
                "changed": summary.changed,
            }
        )
    click.echo(
        f"{len(summary.rescored)} Series scored anew by {bundle.name}, {bundle.digest[:16]}; "
        f"{summary.pairs} pairs aligned anew",
        err=True,
    )
    again = "import their files again, or have them sent again (--json names them)"
    for left, why in (
        (plan.without_inputs, f"without kept inputs: {again}"),
        (plan.other_input, f"whose inputs were made another way than this bundle's: {again}"),
        (summary.changed, "that changed meanwhile: run this again"),
    ):
        if left:
            click.echo(f"{len(left)} Series {why}", err=True)
    if bundle.digest != own.digest:
        click.echo("[score] model is another bundle: what arrives is scored by that one", err=True)
    sys.exit(1 if plan.without_inputs or plan.other_input or summary.changed else 0)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=_existing)
@_model_option
@_device_option
@_json_option
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
@_csv_option
@_png_option
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
    _write_curves(curves, csv_path, png_path)
    if report:
        report.mkdir(parents=True, exist_ok=True)
        origin = _origin(model, datetime.now(UTC))
        sources = _sources(paths, curves)
        for curve in curves:
            file = report / f"{curve.series_uid}.dcm"
            _write_report(file, curve, found.regions, sources[curve.series_uid], origin)
    if shape:
        _print_bpreg(curves, found.regions, out)
    elif as_json:
        _print_json([present.scored_json(s, found.regions) for s in found.series])
    else:
        for s in found.series:
            _print_scored(s, found.regions)
    for reason, count in found.unreadable.items():
        click.echo(f"{count} files not read: {reason}", err=True)
    sys.exit(0 if curves else 1)


@main.command()
@_model_option
@_config_option
@_json_option
def regions(model: Path | None, config: Path | None, as_json: bool) -> None:
    """List the regions a bundle knows: codes, body-height limits, spread, and what they rest on.

    The bundle is the one that the node scores with, where none is named.

    \b
    Example:  dicomnode regions --model my-bundle
    """
    from dicomnode import present, weights

    if model is None:
        model = configuration.load(_config_path(config)).score.model
    bundle = weights.load(model)
    if as_json:
        _print_json([r.to_dict() for r in bundle.regions])
    elif bundle.regions:
        _console().print(present.region_table(bundle.regions))
    if not bundle.regions:
        _nothing(f"bundle {bundle.name} has no regions: python -m training calibrate, then export")


@main.command()
@_config_option
@_json_option
def spool(config: Path | None, as_json: bool) -> None:
    """Show what waits in the spool, slot by slot of the journal, and since when; changes nothing.

    \b
    Example:  dicomnode spool --json
    """
    from dicomnode import present
    from dicomnode.spool.survey import survey

    parts = survey(configuration.load(_config_path(config)).spool.path)
    if as_json:
        _print_json([present.spool_json(part) for part in parts])
    else:
        _console().print(present.spool_table(parts))


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
    from dicomnode import present, store

    with _database(config) as engine, store.reading(engine) as session:
        # That a patient was asked for, but not which: the audit log names none.
        _audit(
            config,
            Act.QUERY,
            command="series",
            study_uid=study,
            by_patient=True if patient else None,
            state=state,
        )
        rows = store.list_series(
            session,
            patient_id=patient,
            study_uid=study,
            state=SeriesState(state) if state else None,
            limit=limit,
        )
        quarantined = store.count_quarantined(session)
        asked = state == SeriesState.QUARANTINED
        details = store.list_quarantined(session, limit) if asked else []
    if as_json:
        _print_json([present.series_json(r) for r in rows])
    elif rows:
        _console().print(present.series_table(rows))
    for name, reason, detail in details:
        click.echo(f"{name}  {reason}  {detail}", err=True)
    if quarantined:
        detail = ", ".join(f"{reason} {n}" for reason, n in sorted(quarantined.items()))
        click.echo(f"{sum(quarantined.values())} files in quarantine: {detail}", err=True)
    if not rows:
        _nothing("no such Series")


@main.command()
@click.option("--state", type=click.Choice([s.value for s in FetchState]))
@click.option("--peer", help="AE title, or name of a DICOMweb server.")
@click.option(
    "--requeue",
    multiple=True,
    metavar="UID",
    help="Queue again what was given up: UID of a Series or Study, or all.",
)
@click.option("--limit", default=200, show_default=True)
@_config_option
@_json_option
def fetches(
    state: str | None,
    peer: str | None,
    requeue: tuple[str, ...],
    limit: int,
    config: Path | None,
    as_json: bool,
) -> None:
    """List what peers are asked for, the newest first: priors, and what a forward missed.

    First the questions, by the Study that asks or the day, then the Series that follow from them.

    \b
    Example:  dicomnode fetches --state failed
              dicomnode fetches --requeue all
    """
    from dicomnode import present, store
    from dicomnode.core import retrieval

    with _database(config) as engine:
        if requeue:
            uids = () if "all" in requeue else requeue
            with store.writing(engine) as session:
                count = store.requeue_fetches(session, datetime.now(UTC), uids)
            click.echo(f"{count} queued again", err=True)
            if not count:
                _nothing("nothing of that was given up")
            return
        chosen = FetchState(state) if state else None
        with store.reading(engine) as session:
            inquiries = store.list_inquiries(session, state=chosen, peer=peer, limit=limit)
            found = store.list_fetches(session, state=chosen, peer=peer, limit=limit)
            turns = [turn for turn in store.list_turns(session) if turn.failures]
    if as_json:
        _print_json(
            {
                "inquiries": [present.inquiry_json(i) for i in inquiries],
                "series": [present.fetch_json(f) for f in found],
                "away": [present.turn_json(turn) for turn in turns],
            }
        )
    else:
        if inquiries:
            _console().print(present.inquiry_table(inquiries))
        if found:
            _console().print(present.fetch_table(found))
    for turn in turns:
        click.echo(
            f"{turn.peer} is away, and is asked again at {turn.next_at:%Y-%m-%d %H:%M:%S} UTC: "
            f"{turn.reason}",
            err=True,
        )
    priors = configuration.load(_config_path(config)).priors
    hours = configuration.hours_of_day(priors.hours)
    if not retrieval.is_within(hours, datetime.now().astimezone().time()):
        click.echo(f"priors wait for their hours, {priors.hours}", err=True)
    waiting = {i.peer for i in inquiries if i.state is FetchState.WAITING}
    waiting |= {f.what.peer for f in found if f.state is FetchState.WAITING}
    for name in sorted(waiting - set(priors.asked)):
        click.echo(f"{name} is not asked any more: [priors] does not name it", err=True)
    if not inquiries and not found:
        _nothing("no peer was asked for such")


@main.command()
@click.argument("expression")
@click.option("--out", type=_file, help="Write all of it to a .parquet or .csv, a row a Series.")
@click.option("--slices", "slices_path", type=_file, help="Write its slices likewise, a row each.")
@click.option("--pairs", "pairs_path", type=_file, help="Write its pairs: those it is fixed in.")
@click.option(
    "--pseudonyms",
    "key_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="In these files: names by HMAC-SHA256 with the key in this file, dates moved.",
)
@click.option("--sql", "as_sql", is_flag=True, help="Show the SQL and its parameters, ask nothing.")
@click.option("--count", "as_count", is_flag=True, help="Print how many there are.")
@click.option("--histogram", "as_histogram", is_flag=True, help="Print how many reach each height.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
@click.option("--before", type=click.IntRange(1), help="Go on from a page before.")
@_config_option
@_json_option
def mine(
    expression: str,
    out: Path | None,
    slices_path: Path | None,
    pairs_path: Path | None,
    key_path: Path | None,
    as_sql: bool,
    as_count: bool,
    as_histogram: bool,
    limit: int,
    before: int | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Find Series by what they cover; docs/mining.md has the language.

    \b
    Example:  dicomnode mine 'covers(liver, 0.9) and not overlaps(head) and slices >= 100'
              dicomnode mine 'covers(lungs, 1)' --out lungs.parquet
    """
    from dicomnode import manifest, mining, present, store
    from dicomnode.core import region

    files = {"series": out, "slices": slices_path, "pairs": pairs_path}
    exporting = any(files.values())
    if sum([exporting, as_sql, as_count, as_histogram]) > 1:
        raise click.UsageError("files, --sql, --count and --histogram are asked for one by one")
    if key_path and not exporting:
        raise click.UsageError("--pseudonyms is for files: --out, --slices or --pairs")
    model = configuration.load(_config_path(config)).score.model
    regions = region.from_manifest(manifest.read_manifest(model))
    with _database(config) as engine:
        with store.reading(engine) as session:
            asked = mining.parse(expression, regions, store.mining_tables(session))
            if as_sql:
                _print_sql(*store.statement_of(session, asked), as_json)
                return
            if as_count:
                found = store.count_matches(session, asked)
                click.echo(json.dumps({"series": found}) if as_json else found)
            elif as_histogram:
                histogram = store.find_histogram(session, asked)
                found = histogram.total
                if as_json:
                    _print_json(present.histogram_json(histogram))
                elif found:
                    _console().print(present.histogram_table(histogram))
            elif not exporting:
                page = store.find_page(session, asked, before=before, limit=limit)
                found = len(page.matches)
                if as_json:
                    rows = [present.match_json(m) for m in page.matches]
                    _print_json({"series": rows, "next": page.next})
                elif found:
                    _console().print(present.match_table(page.matches))
                if page.next is not None:
                    click.echo(f"there are more: --before {page.next}", err=True)
        if exporting:
            found = _export(engine, asked, regions, files, key_path, as_json)
    if not found:
        _nothing("no such Series")


@main.command()
@click.argument("series_uid")
@_config_option
@_json_option
@_csv_option
@_png_option
@click.option("--report", type=_file, help="Write a DICOM SR of what the Series covers.")
def curve(
    series_uid: str,
    config: Path | None,
    as_json: bool,
    csv_path: Path | None,
    png_path: Path | None,
    report: Path | None,
) -> None:
    """Show the body-height curve of one Series.

    \b
    Example:  dicomnode curve 1.2.840.113619.2.55 --png curve.png
    """
    from dicomnode import plot, present, query

    with _database(config) as engine:
        _audit(config, Act.QUERY, command="curve", series_uid=series_uid)
        found = query.series_curve(engine, series_uid)
        if report and found and found.curve:
            known = query.source_of(engine, found.curve)
            _write_report(report, known.curve, known.regions, known.source, known.origin)
    if found is None:
        _nothing("the node never saw this Series")
    row = found.series
    if found.curve is None:
        if row.state is not SeriesState.OPEN:
            _nothing(f"no curve: {row.state}:{row.reason}")
        if len(found.live_z_mm) > 1:
            click.echo(plot.curve_text(found.live_z_mm, found.live_height_mm))
        _nothing(f"still arriving: {row.scored} slices scored of {row.received} received")
    _write_curves([found.curve], csv_path, png_path)
    if as_json:
        _print_json(present.curve_json(found.curve, found.regions))
    else:
        click.echo(plot.curve_text(found.curve.z_mm, found.curve.height_mm))
        click.echo(present.quality_line(found.curve, found.regions))


@main.command()
@click.argument("fixed_study")
@click.argument("moving_study")
@click.option("--method", type=METHODS, help="The best one where none is named.")
@_config_option
@_json_option
@_transform_option
@_registration_option
@_png_option
def offset(
    fixed_study: str,
    moving_study: str,
    method: str | None,
    config: Path | None,
    as_json: bool,
    transform: Path | None,
    registration: Path | None,
    png_path: Path | None,
) -> None:
    """Tell the offset that aligns one Study onto another: z_fixed = z_moving + offset.

    \b
    Example:  dicomnode offset FIXED_STUDY_UID MOVING_STUDY_UID --transform start.tfm
    """
    from dicomnode import query

    with _database(config) as engine:
        _audit(config, Act.QUERY, command="offset", study_uid=[fixed_study, moving_study])
        answer = query.pair(engine, fixed_study, moving_study, Method(method) if method else None)
        if answer is None:
            _nothing("no pair of curves of these two Studies; see `dicomnode series --study UID`")
        if registration and answer.stored.offset.status is not OffsetStatus.REFUSED:
            fixed, moving = (query.source_of(engine, c) for c in (answer.fixed, answer.moving))
            origin = fixed.origin_with(moving)
            _write_registration(registration, answer, fixed.source, moving.source, origin)
    _answer_offset(answer, as_json, transform, png_path)


@main.command()
@click.argument("series_uid")
@click.argument("region")
@_config_option
@_json_option
def view(series_uid: str, region: str, config: Path | None, as_json: bool) -> None:
    """Tell which slice of a Series to open first for a region, by name or SNOMED CT code.

    Exit status 1 where the region is not shown; then the nearest slice is told.

    \b
    Example:  dicomnode view 1.2.840.113619.2.55 liver
              dicomnode view 1.2.840.113619.2.55 10200004 --json
    """
    from dicomnode import present, query

    with _database(config) as engine:
        _audit(config, Act.QUERY, command="view", series_uid=series_uid)
        found = query.view(engine, series_uid, region)
    if found is None:
        _nothing("no curve of this Series; see `dicomnode series`")
    if as_json:
        _print_json(present.view_json(found))
    else:
        click.echo(present.view_line(found), err=found.place is None)
    sys.exit(0 if found.place else 1)


@main.command()
@click.argument("fixed_study")
@click.argument("moving_study")
@click.option("--method", type=METHODS, help="The best one where none is named.")
@_config_option
@_json_option
def slices(
    fixed_study: str,
    moving_study: str,
    method: str | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Tell which slice of one Study shows what a slice of another does, by their offset.

    Each slice of the fixed Series with the nearest of the moving one, feet to head; "-" where
    there is none within half a slice.

    \b
    Example:  dicomnode slices FIXED_STUDY_UID MOVING_STUDY_UID
              dicomnode slices FIXED_STUDY_UID MOVING_STUDY_UID --method l1 --json
    """
    from dicomnode import present, query

    with _database(config) as engine:
        _audit(config, Act.QUERY, command="slices", study_uid=[fixed_study, moving_study])
        named = Method(method) if method else None
        found = query.slice_map(engine, fixed_study, moving_study, named)
    if found is None:
        _nothing("no pair of curves of these two Studies; see `dicomnode series --study UID`")
    if as_json:
        _print_json(present.map_json(found))
    elif found.slices:
        _console().print(present.map_table(found))
    if not found.slices:
        _nothing(f"refused: {found.stored.offset.reason}")
    if all(m.moving is None for m in found.slices):
        _nothing("no slice of one lies beside one of the other")


@main.command()
@click.argument("fixed_path", type=_existing)
@click.argument("moving_path", type=_existing)
@click.option("--method", type=METHODS, default=Method.ROBUST.value, show_default=True)
@_model_option
@_device_option
@_json_option
@_transform_option
@_registration_option
@_png_option
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
            _nothing(f"no curve in {path}: {states}")
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
        _write_registration(registration, answer, *sides, origin)
    _answer_offset(answer, as_json, transform, png_path)


@main.command()
@click.argument("role", type=click.Choice(["read", "admin"]))
@click.argument("name")
@_config_option
def token(role: str, name: str, config: Path | None) -> None:
    """Make a token that lets NAME into the page, and print it; it is shown this once.

    Its SHA-256 is written to [web] token_file. Take its line out to shut NAME out again; the page
    reads the file anew by itself.

    \b
    Example:  dicomnode token read viewer --config node.toml
    """
    from dicomnode.web import tokens

    path = configuration.load(_config_path(config)).web.token_file
    if path is None:
        raise ConfigError("web.token_file: not set, so there is no file to write to")
    click.echo(tokens.add(path, tokens.Holder(name, tokens.Role(role))))


@main.group(invoke_without_command=True)
@click.option("--state", type=click.Choice([s.value for s in DeliveryState]))
@click.option("--destination", help="AE title, or URL of a webhook.")
@click.option("--of", "subject", help="UID of a Series, or of a pair the fixed Study.")
@click.option("--limit", default=200, show_default=True)
@_config_option
@_json_option
@click.pass_context
def deliveries(
    ctx: click.Context,
    state: str | None,
    destination: str | None,
    subject: str | None,
    limit: int,
    config: Path | None,
    as_json: bool,
) -> None:
    """List what went out by itself, what waits, and what was given up and why.

    \b
    Example:  dicomnode deliveries --state failed
    """
    from dicomnode import present, store

    ctx.obj = config
    if ctx.invoked_subcommand is not None:
        return
    with _database(config) as engine, store.reading(engine) as session:
        found = store.list_deliveries(
            session,
            state=DeliveryState(state) if state else None,
            destination=destination,
            subject=subject,
            limit=limit,
        )
        counts = store.count_deliveries(session)
    if as_json:
        _print_json([present.delivery_json(d) for d in found])
    elif found:
        _console().print(present.delivery_table(found))
        counted = ", ".join(f"{counts[s]} {s}" for s in DeliveryState if s in counts)
        click.echo(f"{len(found)} shown; in all {counted}", err=True)
    if not found:
        _nothing("no such delivery")


@deliveries.command()
@click.argument("ids", nargs=-1, type=int)
@click.option("--all-failed", is_flag=True, help="All that were given up.")
@_config_option
@click.pass_obj
def requeue(
    named: Path | None, ids: tuple[int, ...], all_failed: bool, config: Path | None
) -> None:
    """Deliver again, whatever became of it: at once, and with all its attempts anew.

    \b
    Example:  dicomnode deliveries requeue 17 18
    """
    from dicomnode import store

    config = config or named  # before `requeue`, or behind it
    if bool(ids) == all_failed:
        raise click.UsageError("name deliveries by their ids, or --all-failed")
    with _database(config) as engine, store.writing(engine) as session:
        queued = store.requeue_deliveries(session, datetime.now(UTC), ids or None)
    _audit(config, Act.REQUEUED, deliveries=queued)
    missing = sorted(set(ids) - set(queued))
    if queued:
        click.echo(f"queued: {', '.join(map(str, queued))}", err=True)
    if missing or not queued:
        _nothing(f"no such delivery: {', '.join(map(str, missing))}" if missing else "none failed")


@deliveries.command()
@click.argument("ids", nargs=-1, type=int)
@click.option("--all-failed", is_flag=True, help="All that were given up.")
@_config_option
@click.pass_obj
def drop(named: Path | None, ids: tuple[int, ...], all_failed: bool, config: Path | None) -> None:
    """Let go of what waits or was given up: pixels that only it wanted go with it.

    \b
    Example:  dicomnode deliveries drop 17 18
    """
    from dicomnode import store

    config = config or named  # before `drop`, or behind it
    if bool(ids) == all_failed:
        raise click.UsageError("name deliveries by their ids, or --all-failed")
    with _database(config) as engine, store.writing(engine) as session:
        dropped = store.drop_deliveries(session, datetime.now(UTC), "by hand", ids or None)
    _audit(config, Act.DROPPED, deliveries=dropped)
    missing = sorted(set(ids) - set(dropped))
    if dropped:
        click.echo(f"dropped: {', '.join(map(str, dropped))}", err=True)
    if missing or not dropped:
        none = f"neither waits nor failed: {', '.join(map(str, missing))}"
        _nothing(none if missing else "none failed")


@main.group()
def patient() -> None:
    """Say which Patient IDs are one patient, or take that back.

    A patient is written as ID^^^ISSUER, as in HL7; ID^^^ is one without an issuer. The ID alone
    will do where the node knows it with one issuer.
    """


@patient.command()
@click.argument("merged", metavar="FROM")
@click.argument("into", metavar="INTO")
@click.option("--force", is_flag=True, help="Also where the node knows nothing of one of them yet.")
@_config_option
@_json_option
def merge(merged: str, into: str, force: bool, config: Path | None, as_json: bool) -> None:
    """Make two Patient IDs one patient: pairs of all their Studies are computed.

    Headers stay as they are, and what arrives under either ID later belongs to both.

    \b
    Example:  dicomnode patient merge 4711^^^HOSPITAL 0815^^^HOSPITAL
    """
    from dicomnode import present, store

    settings = configuration.load(_config_path(config))
    own = settings.node
    priors = store.AskPriors(settings.priors.names, settings.priors.recent_days)
    with _database(config) as engine:
        with store.writing(engine) as session:
            keys = [
                _patient_key(session, text, own.default_issuer, force) for text in (merged, into)
            ]
            names = own.placeholder_ids
            if any(placeholder.is_placeholder(key.patient_id, names) for key in keys):
                raise click.UsageError(
                    "a placeholder is nobody (node.placeholder_ids): all who ever had it would "
                    "become one patient"
                )
            try:
                how = store.LinkSource.CLI, datetime.now(UTC), "", priors
                changed = store.link_patients(session, keys[0], keys[1], *how)
            except ValueError as exc:
                raise click.UsageError(str(exc)) from exc
    link = changed.link
    if changed.is_new:
        _audit(config, Act.PATIENTS_LINKED, source="cli", link=link.id, pairs=changed.pairs)
    if as_json:
        _print_json({**present.link_json(link), "pairs": changed.pairs})
    elif changed.is_new:
        click.echo(f"link {link.id}: one patient; {changed.pairs} pairs are computed")
    else:
        click.echo(f"one patient already, by link {link.id}")


@patient.command()
@click.argument("link_id", metavar="ID", type=click.IntRange(1))
@_config_option
@_json_option
def unmerge(link_id: int, config: Path | None, as_json: bool) -> None:
    """Take a link back, by its number in `dicomnode patient links`: pairs across it are dropped.

    \b
    Example:  dicomnode patient unmerge 17
    """
    from dicomnode import present, store

    with _database(config) as engine, store.writing(engine) as session:
        changed = store.unlink_patients(session, link_id, datetime.now(UTC))
    if changed is None:
        _nothing("no such link; see `dicomnode patient links`")
    if changed.is_new:
        _audit(config, Act.PATIENTS_UNLINKED, source="cli", link=link_id, pairs=changed.pairs)
    if as_json:
        found = {"pairs": changed.pairs, "together": changed.together}
        _print_json({**present.link_json(changed.link), **found, "delivered": changed.delivered})
        return
    if not changed.is_new:
        click.echo(f"link {link_id} was taken back before")
    elif changed.together:
        click.echo(f"link {link_id} taken back; other links still make them one patient")
    else:
        click.echo(f"link {link_id} taken back; {changed.pairs} pairs dropped")
    if changed.delivered:
        click.echo(
            f"{changed.delivered} registrations of such pairs were delivered, and stay where they "
            "are: see `dicomnode deliveries`",
            err=True,
        )


@patient.command()
@click.option("--patient", "text", help="Of this patient alone, as ID^^^ISSUER.")
@click.option("--all", "every", is_flag=True, help="Those that were taken back, too.")
@click.option("--limit", default=200, show_default=True)
@_config_option
@_json_option
def links(text: str | None, every: bool, limit: int, config: Path | None, as_json: bool) -> None:
    """List which Patient IDs were made one patient, by whom and when, the newest first.

    \b
    Example:  dicomnode patient links --patient 4711^^^HOSPITAL --all
    """
    from dicomnode import present, store

    default = configuration.load(_config_path(config)).node.default_issuer
    with _database(config) as engine, store.reading(engine) as session:
        _audit(config, Act.QUERY, command="patient links", by_patient=True if text else None)
        asked = None if text is None else _patient_key(session, text, default, True)
        found = store.list_links(session, patient=asked, every=every, limit=limit)
    if as_json:
        _print_json([present.link_json(link) for link in found])
    elif found:
        _console().print(present.link_table(found))
    if not found:
        _nothing("no such link")


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
    from dicomnode import store

    with _database(config, checked=False) as engine, _schema_errors():
        migrate.upgrade(engine)
        click.echo(migrate.current(engine))
        if missing := store.count_uncovered(engine):
            with _progress("what curves cover", missing) as advance:
                done = store.cover_curves(engine, advance)
            click.echo(f"what {done} curves cover was stored, for mining", err=True)


@db.command()
@_config_option
def current(config: Path | None) -> None:
    """Print the revision of the database, and the one this version needs.

    \b
    Example:  dicomnode db current
    """
    from db import migrate

    with _database(config, checked=False) as engine, _schema_errors():
        now = migrate.current(engine)
    click.echo(f"{now or 'empty'} (this version needs {migrate.head()})")
    sys.exit(0 if now == migrate.head() else 1)


def _patient_key(session: "Session", text: str, default_issuer: str, force: bool) -> PatientKey:
    """Return the patient that somebody wrote as ID or ID^^^ISSUER."""
    from dicomnode import store

    patient_id, named, issuer = text.partition("^^^")
    key = PatientKey(patient_id.strip(" "), issuer.strip(" "))
    if not key.known:
        raise click.UsageError("an empty Patient ID is nobody")
    if any(len(v) > 64 or "\\" in v or not v.isprintable() for v in (key.patient_id, key.issuer)):
        raise click.UsageError("not what a Patient ID or its issuer may be (PS3.5, LO)")
    issuers = store.issuers_of(session, key.patient_id)
    if not named:
        if len(issuers) > 1:
            known = ", ".join(repr(name) for name in issuers)
            raise click.UsageError(f"{text}: known of several issuers, {known}: write ID^^^ISSUER")
        key = PatientKey(key.patient_id, issuers[0] if issuers else default_issuer)
    if key.issuer not in issuers and not force:
        _nothing(
            f"{text}: no Series and no link has this patient; --force remembers it all the same"
        )
    return key


def _stop_at_eof(stop: threading.Event) -> None:
    # Not through sys.stdin: its lock, held by this thread, is fatal to an interpreter that ends.
    while os.read(0, 4096):
        pass
    stop.set()


def _config_path(path: Path | None) -> Path | None:
    return path or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)


def _database(config: Path | None, *, checked: bool = True) -> "AbstractContextManager[Engine]":
    from dicomnode import store

    settings = configuration.load(_config_path(config))
    return store.opened(settings.database.url, checked=checked)


def _audit(config: Path | None, act: Act, **data: Any) -> None:
    log_ = AuditLog(configuration.load(_config_path(config)).audit_log)
    log_.write(act, user=user(), **data)
    log_.close()


@contextlib.contextmanager
def _schema_errors() -> Iterator[None]:
    from db import migrate
    from dicomnode import store

    try:
        with store.available():
            yield
    except migrate.SchemaError as exc:
        raise ConfigError(f"database.url: {exc}") from exc


def _score(paths: Sequence[Path], model: Path | None, device: str) -> "ScoredFiles":
    from dicomnode import device as devices
    from dicomnode import dicomio, files, weights
    from dicomnode.node.score import Scorer

    bundle, on = weights.load(model), weights.pick_device(device)
    scorer = Scorer(bundle, on, batch=64, dtype=devices.pick_dtype("auto", bundle, on))
    total = sum(1 for _ in dicomio.find(list(paths)))
    with _progress("scoring", total) as advance:
        return files.score(list(paths), scorer, advance)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
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


def _write_curves(
    curves: Sequence[ScoreCurve], csv_path: Path | None, png_path: Path | None
) -> None:
    from dicomnode import plot, present

    if csv_path and curves:
        present.write_csv(csv_path, curves)
    if png_path and curves:
        plot.curve_png(curves, png_path)


def _answer_offset(
    answer: "PairAnswer", as_json: bool, transform: Path | None, png_path: Path | None
) -> NoReturn:
    from dicomnode import plot, present

    stored, result = answer.stored, answer.stored.offset
    refused = result.status is OffsetStatus.REFUSED
    if transform and not refused:
        from dicomnode.objects import transform as itk

        itk.write(result, transform)
    if png_path:
        plot.pair_png(answer.fixed, answer.moving, result, png_path)
    if as_json:
        _print_json(present.offset_json(stored))
    elif refused:
        click.echo(f"refused: {result.reason}", err=True)
    else:
        click.echo(plot.pair_text(answer.fixed, answer.moving, result))
        click.echo(present.offset_lines(stored))
    sys.exit(1 if refused else 0)


def _write_registration(
    path: Path, answer: "PairAnswer", fixed: "Source", moving: "Source", origin: "Origin"
) -> None:
    from dicomnode.objects import modules, registration

    ds = registration.registration(fixed, moving, answer.stored.offset, origin)
    modules.save(ds, path)
    _tell_unknown(path, fixed)


def _write_report(
    path: Path,
    curve: ScoreCurve,
    regions: "Sequence[Region]",
    source: "Source",
    origin: "Origin",
) -> None:
    from dicomnode.objects import coverage_report, modules

    modules.save(coverage_report.coverage_report(source, curve, regions, origin), path)
    _tell_unknown(path, source)


def _tell_unknown(path: Path, source: "Source") -> None:
    if source.unknown:
        click.echo(f"{path}: left empty, unknown here: {', '.join(source.unknown)}", err=True)


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
        _print_json(found)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for series_uid, values in found.items():
        (folder / f"{series_uid}.json").write_text(json.dumps(values, indent=1) + "\n")
    click.echo(f"{len(found)} files in {folder}", err=True)


def _print_sql(statement: str, parameters: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json({"sql": statement, "parameters": {k: _plain(v) for k, v in parameters.items()}})
        return
    click.echo(statement)
    for name, value in parameters.items():
        click.echo(f"{name} = {_plain(value)!r}")


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _export(
    engine: "Engine",
    asked: "Expression",
    regions: "Sequence[Region]",
    files: dict[str, Path | None],
    key_path: Path | None,
    as_json: bool,
) -> int:
    """Write the files that were asked for, and return how many rows they have."""
    from dicomnode import export, store

    pseudonyms = export.Pseudonyms.of(key_path) if key_path else None
    with store.reading(engine) as session:
        total = store.newest_id(session)
    with _progress("looking at Series", total) as advance:
        rows = export.write(
            engine, asked, regions, **files, pseudonyms=pseudonyms, progress=advance
        )
    if as_json:
        _print_json({str(path): count for path, count in rows.items()})
    for path, count in rows.items():
        click.echo(f"{count} rows in {path}", err=True)
    return sum(rows.values())


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


def _nothing(message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(1)
