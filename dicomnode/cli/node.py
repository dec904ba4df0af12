"""Commands that run a node: demo, serve, check, import, rescore, spool."""

import os
import signal
import socket
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import click

from dicomnode import config as configuration
from dicomnode import log
from dicomnode.audit import Act
from dicomnode.cli.database import config_path, write_audit
from dicomnode.cli.options import EXISTING, config_option, json_option
from dicomnode.cli.output import nothing, print_json, progress, table_console
from dicomnode.model import SeriesState


@click.command()
@click.option("--keep", is_flag=True, help="Keep the node up when all is shown.")
def demo(keep: bool) -> None:
    """Send phantom patients through a node of its own, and compare its offsets to the truth.

    \b
    Example:  dicomnode demo
    """
    from dicomnode import demo as demonstration

    sys.exit(demonstration.run(keep=keep))


@click.command()
@config_option
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
    config = config_path(config)
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


@click.command()
@config_option
@json_option
def check(config: Path | None, as_json: bool) -> None:
    """Print the resolved settings, and try database, spool, weights, device and each peer.

    \b
    Example:  dicomnode check --config node.toml
    """
    from dicomnode import checks

    settings = configuration.load(config_path(config))
    log.setup("CRITICAL", json=False)  # each check tells its own story
    results = list(checks.run(settings))
    if as_json:
        values = settings.model_dump(mode="json")
        values["database"]["url"] = checks.safe_url(settings.database.url)
        print_json({"settings": values, "checks": [asdict(c) for c in results]})
    else:
        for line in checks.lines(settings):
            click.echo(line)
        for c in results:
            mark = click.style("ok  ", fg="green") if c.ok else click.style("FAIL", fg="red")
            click.echo(f"{mark} {c.name}: {c.message}")
    sys.exit(0 if all(c.ok for c in results) else 1)


@click.command("import")
@click.argument("paths", nargs=-1, required=True, type=EXISTING)
@config_option
def import_(paths: tuple[Path, ...], config: Path | None) -> None:
    """Take files through the same stages as if they had been sent; folders at any depth.

    A node that is running on the same spool does the work; else it is done here.

    \b
    Example:  dicomnode import /archive/2024
    """
    from dicomnode import backfill, dicomio

    settings = configuration.load(config_path(config))
    total = sum(1 for _ in dicomio.find(list(paths)))
    with progress("importing", total) as advance:
        summary = backfill.run(list(paths), settings, advance)
    write_audit(config, Act.IMPORT, files=summary.files)  # not the paths: they may name patients
    click.echo(
        f"{summary.files} files taken; "
        f"the database holds {summary.curves} curves, {summary.pairs} offsets",
        err=True,
    )
    for reason, count in summary.skipped.items():
        click.echo(f"{count} files skipped: {reason}", err=True)
    sys.exit(0 if summary.files else 1)


@click.command()
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Weight bundle; the node's own, [score] model, where none is named.",
)
@click.option("--series", "series_uid", help="Series Instance UID; every Series without it.")
@config_option
@json_option
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

    settings = configuration.load(config_path(config))
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
                nothing("the node never saw this Series")
            if rows[0].state is SeriesState.OPEN:
                nothing("still arriving: a Series is scored anew once it is finished")
        plan = rescoring.plan(engine, bundle, series_uid)
        with progress("rescoring", len(plan.series)) as advance:
            summary = rescoring.run(engine, scorer, plan.series, advance, Asking(settings))
    if as_json:
        print_json(
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


@click.command()
@config_option
@json_option
def spool(config: Path | None, as_json: bool) -> None:
    """Show what waits in the spool, slot by slot of the journal, and since when; changes nothing.

    \b
    Example:  dicomnode spool --json
    """
    from dicomnode import present
    from dicomnode.spool.survey import survey

    parts = survey(configuration.load(config_path(config)).spool.path)
    if as_json:
        print_json([present.spool_json(part) for part in parts])
    else:
        table_console().print(present.spool_table(parts))


def _stop_at_eof(stop: threading.Event) -> None:
    # Not through sys.stdin: its lock, held by this thread, is fatal to an interpreter that ends.
    while os.read(0, 4096):
        pass
    stop.set()
