"""The command that finds Series by what they cover: mine."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicomnode import config as configuration
from dicomnode.cli.database import config_path, opened
from dicomnode.cli.options import FILE, config_option, json_option
from dicomnode.cli.output import nothing, print_json, progress, table_console

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from dicomnode.core.region import Region
    from dicomnode.mining import Expression


@click.command()
@click.argument("expression")
@click.option("--out", type=FILE, help="Write all of it to a .parquet or .csv, a row a Series.")
@click.option("--slices", "slices_path", type=FILE, help="Write its slices likewise, a row each.")
@click.option("--pairs", "pairs_path", type=FILE, help="Write its pairs: those it is fixed in.")
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
@config_option
@json_option
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
    model = configuration.load(config_path(config)).score.model
    regions = region.from_manifest(manifest.read_manifest(model))
    with opened(config) as engine:
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
                    print_json(present.histogram_json(histogram))
                elif found:
                    table_console().print(present.histogram_table(histogram))
            elif not exporting:
                page = store.find_page(session, asked, before=before, limit=limit)
                found = len(page.matches)
                if as_json:
                    rows = [present.match_json(m) for m in page.matches]
                    print_json({"series": rows, "next": page.next})
                elif found:
                    table_console().print(present.match_table(page.matches))
                if page.next is not None:
                    click.echo(f"there are more: --before {page.next}", err=True)
        if exporting:
            found = _export(engine, asked, regions, files, key_path, as_json)
    if not found:
        nothing("no such Series")


def _print_sql(statement: str, parameters: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"sql": statement, "parameters": {k: _plain(v) for k, v in parameters.items()}})
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
    with progress("looking at Series", total) as advance:
        rows = export.write(
            engine, asked, regions, **files, pseudonyms=pseudonyms, progress=advance
        )
    if as_json:
        print_json({str(path): count for path, count in rows.items()})
    for path, count in rows.items():
        click.echo(f"{count} rows in {path}", err=True)
    return sum(rows.values())
