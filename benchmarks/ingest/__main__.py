"""`python -m benchmarks.ingest`."""

import json
import signal
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.ingest import rates, receivers, report
from benchmarks.ingest.senders import dcmtk

SLICES, QUICK_SLICES = 1000, 32  # a row, over all its associations
PROBES, QUICK_PROBES = 96, 16  # slices a row whose latency is taken
OFFSET_SLICES, QUICK_OFFSET_SLICES = 600, 40  # a series
REPEATS = 3


def _parse_numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError as exc:
        raise click.BadParameter(f"numbers with commas between, not {text!r}") from exc
    # pynetdicom's storescp takes 10 at a time.
    if not all(1 <= n <= 10 for n in numbers):
        raise click.BadParameter("1 to 10 associations")
    return numbers


def _parse_settings(pairs: tuple[str, ...]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise click.BadParameter(f"SECTION.KEY=VALUE, not {pair!r}")
        settings[f"{section}__{key}"] = value
    return settings


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quick", is_flag=True, help="Few slices, one repeat: shows that it works.")
@click.option("--slices", type=click.IntRange(2), help="Slices a row, over all associations.")
@click.option(
    "--associations",
    default="1,4,8",
    show_default=True,
    callback=lambda _, __, text: _parse_numbers(text),
    help="How many senders at a time.",
)
@click.option(
    "--only",
    multiple=True,
    help="Name of a receiver, as in the table: leave the others out. May be repeated.",
)
@click.option("--repeats", type=click.IntRange(1), help="Rounds over all receivers.")
@click.option("--offset/--no-offset", default=True, help="The time to the offset, as well.")
@click.option(
    "--setting",
    multiple=True,
    callback=lambda _, __, pairs: _parse_settings(pairs),
    help="Of our node, e.g. node.maximum_associations=8. May be repeated.",
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="/var/tmp",
    show_default=True,
    help="Where to work: on a disk, since in memory to be durable costs nothing.",
)
@click.option("--isolated", is_flag=True, hidden=True, help="The network is ours alone.")
def main(
    as_json: bool,
    quick: bool,
    slices: int | None,
    associations: tuple[int, ...],
    only: tuple[str, ...],
    repeats: int | None,
    offset: bool,
    setting: dict[str, str],
    folder: Path,
    isolated: bool,
) -> None:
    """Measure how fast this node and other receivers take and score CT slices.

    \b
    Example:  python -m benchmarks.ingest --associations 1,4,8
    """
    if dcmtk("storescu") is None:
        raise click.ClickException("DCMTK's storescu sends the slices, and is not installed")
    if not isolated:
        receivers.isolate()
    found, without = receivers.available(isolated)
    for reason in without:
        say(reason)
    if unknown := set(only) - set(found):
        raise click.BadParameter(f"no such receiver here: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # comes to `finally`
    rounds = repeats or (1 if quick else REPEATS)
    with tempfile.TemporaryDirectory(prefix="dicomnode-ingest-", dir=folder) as work:
        figures = rates.measure(
            Path(work),
            [receiver for receiver in found if not only or receiver in only],
            associations,
            slices=slices or (QUICK_SLICES if quick else SLICES),
            probes=QUICK_PROBES if quick else PROBES,
            repeats=rounds,
            settings=setting,
            say=say,
        )
        offset_ms = None
        if offset and (not only or receivers.WHOLE in only):
            offset_ms = rates.offset_times_ms(
                Path(work),
                slices=QUICK_OFFSET_SLICES if quick else OFFSET_SLICES,
                repeats=rounds,
                settings=setting,
                say=say,
            )
    result = report.summary(figures, offset_ms)
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        report.show(result)


def say(message: str) -> None:
    """Tell the person who waits."""
    click.echo(message, err=True)


if __name__ == "__main__":
    main()
