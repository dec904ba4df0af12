"""Commands about what goes out and comes in by itself: deliveries, fetches."""

from datetime import UTC, datetime
from pathlib import Path

import click

from dicomnode import config as configuration
from dicomnode.audit import Act
from dicomnode.cli.database import config_path, opened, write_audit
from dicomnode.cli.options import config_option, json_option
from dicomnode.cli.output import nothing, print_json, table_console
from dicomnode.model import DeliveryState, FetchState


@click.command()
@click.option("--state", type=click.Choice([s.value for s in FetchState]))
@click.option("--peer", help="AE title, or name of a DICOMweb server.")
@click.option(
    "--requeue",
    multiple=True,
    metavar="UID",
    help="Queue again what was given up: UID of a Series or Study, or all.",
)
@click.option("--limit", default=200, show_default=True)
@config_option
@json_option
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

    with opened(config) as engine:
        if requeue:
            uids = () if "all" in requeue else requeue
            with store.writing(engine) as session:
                count = store.requeue_fetches(session, datetime.now(UTC), uids)
            click.echo(f"{count} queued again", err=True)
            if not count:
                nothing("nothing of that was given up")
            return
        chosen = FetchState(state) if state else None
        with store.reading(engine) as session:
            inquiries = store.list_inquiries(session, state=chosen, peer=peer, limit=limit)
            found = store.list_fetches(session, state=chosen, peer=peer, limit=limit)
            turns = [turn for turn in store.list_turns(session) if turn.failures]
    if as_json:
        print_json(
            {
                "inquiries": [present.inquiry_json(i) for i in inquiries],
                "series": [present.fetch_json(f) for f in found],
                "away": [present.turn_json(turn) for turn in turns],
            }
        )
    else:
        if inquiries:
            table_console().print(present.inquiry_table(inquiries))
        if found:
            table_console().print(present.fetch_table(found))
    for turn in turns:
        click.echo(
            f"{turn.peer} is away, and is asked again at {turn.next_at:%Y-%m-%d %H:%M:%S} UTC: "
            f"{turn.reason}",
            err=True,
        )
    priors = configuration.load(config_path(config)).priors
    hours = configuration.hours_of_day(priors.hours)
    if not retrieval.is_within(hours, datetime.now().astimezone().time()):
        click.echo(f"priors wait for their hours, {priors.hours}", err=True)
    waiting = {i.peer for i in inquiries if i.state is FetchState.WAITING}
    waiting |= {f.what.peer for f in found if f.state is FetchState.WAITING}
    for name in sorted(waiting - set(priors.asked)):
        click.echo(f"{name} is not asked any more: [priors] does not name it", err=True)
    if not inquiries and not found:
        nothing("no peer was asked for such")


@click.group(invoke_without_command=True)
@click.option("--state", type=click.Choice([s.value for s in DeliveryState]))
@click.option("--destination", help="AE title, or URL of a webhook.")
@click.option("--of", "subject", help="UID of a Series, or of a pair the fixed Study.")
@click.option("--limit", default=200, show_default=True)
@config_option
@json_option
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
    with opened(config) as engine, store.reading(engine) as session:
        found = store.list_deliveries(
            session,
            state=DeliveryState(state) if state else None,
            destination=destination,
            subject=subject,
            limit=limit,
        )
        counts = store.count_deliveries(session)
    if as_json:
        print_json([present.delivery_json(d) for d in found])
    elif found:
        table_console().print(present.delivery_table(found))
        counted = ", ".join(f"{counts[s]} {s}" for s in DeliveryState if s in counts)
        click.echo(f"{len(found)} shown; in all {counted}", err=True)
    if not found:
        nothing("no such delivery")


@deliveries.command()
@click.argument("ids", nargs=-1, type=int)
@click.option("--all-failed", is_flag=True, help="All that were given up.")
@config_option
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
    with opened(config) as engine, store.writing(engine) as session:
        queued = store.requeue_deliveries(session, datetime.now(UTC), ids or None)
    write_audit(config, Act.REQUEUED, deliveries=queued)
    missing = sorted(set(ids) - set(queued))
    if queued:
        click.echo(f"queued: {', '.join(map(str, queued))}", err=True)
    if missing or not queued:
        nothing(f"no such delivery: {', '.join(map(str, missing))}" if missing else "none failed")


@deliveries.command()
@click.argument("ids", nargs=-1, type=int)
@click.option("--all-failed", is_flag=True, help="All that were given up.")
@config_option
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
    with opened(config) as engine, store.writing(engine) as session:
        dropped = store.drop_deliveries(session, datetime.now(UTC), "by hand", ids or None)
    write_audit(config, Act.DROPPED, deliveries=dropped)
    missing = sorted(set(ids) - set(dropped))
    if dropped:
        click.echo(f"dropped: {', '.join(map(str, dropped))}", err=True)
    if missing or not dropped:
        none = f"neither waits nor failed: {', '.join(map(str, missing))}"
        nothing(none if missing else "none failed")
