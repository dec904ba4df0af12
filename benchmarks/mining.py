"""How long questions to a large database take, on Postgres and on SQLite.

A made-up archive (`benchmarks.archive`) of so many Series and twice as many offsets is put into a
database of its own, which is then asked through the functions that the node uses:

- page: `covers(liver, 0.9) and quality > 0.9`, the newest hundred with all that a table shows
- page further back: the same, from the middle of the archive on
- page of a rare kind: `covers(larynx, 0.9) and not overlaps(chest) and not overlaps(head)`
- count, histogram, tally (months, scanners, tags against curves; of very many, of a sample): of all
  that the first expression finds; and of nearly all there is
- pair: the best offset of two Studies and their curves; timeline: all Series of a patient, and the
  offsets of every pair of the patient's Studies

Times are medians over repeats, each with another pair, patient or place to begin; `cpu_ms` is the
mean of what this process and the server with all of its took of the processors meanwhile, which a
busy machine does not change as much. `ratios` are to the limits that are promised (100 ms a page
on Postgres, 300 ms on SQLite, 2 s a count or histogram, and as much for a tally), below 1 is
better. `insert_ratio` is the median time in which a finished Series of 24 slices is stored, the
full database's to that of one that held nothing before: 500 are stored in turn, one here, one
there. It is the worse one of both databases.
"""

import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sqlalchemy import Engine

from benchmarks import archive, postgres
from db import engine as engines
from db import migrate
from dicomnode import query, store, weights
from dicomnode.core import curve, region
from dicomnode.core.admission import CT_IMAGE
from dicomnode.mining import Expression, parse
from dicomnode.model import Evidence, PatientKey, ScoreCurve, SliceHeader
from dicomnode.store import SliceResult

POSTGRES, SQLITE = "postgres", "sqlite"
SERIES, QUICK_SERIES = 10_000_000, 20_000
REPEATS, QUICK_REPEATS = 25, 3
INSERTS, QUICK_INSERTS = 500, 20
SLICES = 24  # of a Series that is stored
PAGE = 100
MOST = 300  # Series and pairs of a timeline
LIKELY = "covers(liver, 0.9) and quality > 0.9"
RARE = "covers(larynx, 0.9) and not overlaps(chest) and not overlaps(head)"
NEARLY_ALL = "quality > 0.5 and not overlaps(thyroid)"
PAGE_MS = {POSTGRES: 100.0, SQLITE: 300.0}
SUM_MS = 2000.0
INSERT_RATIO = 1.5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--series", "count", type=click.IntRange(QUICK_SERIES), help="Series in the database."
)
@click.option("--database", "only", type=click.Choice([POSTGRES, SQLITE]), help="One of both.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="/var/tmp",
    show_default=True,
    help="Where the databases are made, and removed: 16 GB for ten million.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quick", is_flag=True, help="Few Series, few repeats: shows that it works.")
def main(count: int | None, only: str | None, folder: Path, as_json: bool, quick: bool) -> None:
    """Measure how long mining, pairs and timelines take in a large database.

    \b
    Example:  python -m benchmarks.mining --series 1000000 --json
    """
    series = count or (QUICK_SERIES if quick else SERIES)
    result = measure(series, folder, [only] if only else [POSTGRES, SQLITE], quick)
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        _print(result)


def measure(series: int, folder: Path, databases: list[str], quick: bool = False) -> dict[str, Any]:
    """Return what `--json` prints."""
    rows, inserts, sizes = [], [], {}
    for database in databases:
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(_databases(database, folder))
            if opened is None:
                _say("postgres is left out: no initdb on PATH or under /usr/lib/postgresql")
                continue
            full, empty, server = opened
            start = time.perf_counter()
            with _bar(f"filling {database}", series) as advance:
                archive.fill(full, series, advance)
            archive.register(empty)
            _settle(full)
            sizes[database] = archive.size_of(full)
            took = time.perf_counter() - start
            _say(f"{database}: {series:,} Series in {took:.0f} s, {sizes[database] / 1e9:.2f} GB")
            rows += _questions(database, full, server, series, QUICK_REPEATS if quick else REPEATS)
            inserts.append(_inserts(database, full, empty, QUICK_INSERTS if quick else INSERTS))
    limits = {
        f"{row['database']} {row['query']}": _round(row["median_ms"] / row["limit_ms"])
        for row in rows
    }
    worst = max((i["ratio"] for i in inserts), default=None)
    return {
        "series": series,
        "offsets": archive.OFFSETS_PER_SERIES * series,
        "rows": rows,
        "insert_ratio": worst,
        "inserts": inserts,
        "bytes": sizes,
        "ratios": limits | {"insert": worst and _round(worst / INSERT_RATIO)},
    }


@contextlib.contextmanager
def _databases(kind: str, folder: Path) -> Iterator[tuple[Engine, Engine, int | None] | None]:
    """Give two upgraded databases, to be filled and to be left empty, and the server's process.

    They are removed at the end.
    """
    root = Path(tempfile.mkdtemp(prefix="dicomnode-mining-", dir=folder))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        pid = None
        if kind == SQLITE:
            urls = [f"sqlite:///{root}/full.sqlite", f"sqlite:///{root}/empty.sqlite"]
        elif (binaries := postgres.binaries()) is None:
            yield None
            return
        else:
            server, pid = stack.enter_context(postgres.served(root, binaries))
            admin = engines.create(server)
            with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                for name in ("filled", "empty"):
                    connection.exec_driver_sql(f"CREATE DATABASE {name}")
            admin.dispose()
            urls = [server.replace("/postgres?", f"/{name}?") for name in ("filled", "empty")]
        pair = engines.create(urls[0]), engines.create(urls[1])
        for engine in pair:
            stack.callback(engine.dispose)
            migrate.upgrade(engine)
        yield *pair, pid


def _settle(engine: Engine) -> None:
    """Do what autovacuum would have done by now; SQLite needs nothing."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM (ANALYZE)")
            connection.exec_driver_sql("CHECKPOINT")


def _questions(
    database: str, engine: Engine, server: int | None, series: int, repeats: int
) -> list[dict[str, Any]]:
    regions = region.from_manifest(weights.read_manifest())
    with store.reading(engine) as session:
        tables = store.mining_tables(session)
    likely, rare, nearly_all = (parse(t, regions, tables) for t in (LIKELY, RARE, NEARLY_ALL))
    rng = np.random.default_rng(2)
    pairs = iter(_pairs(engine, rng, repeats + 1))
    patients = iter(rng.integers(1, series // 3, repeats + 1).tolist())
    places = iter(rng.integers(series // 2, series, 2 * repeats + 2).tolist())
    page_ms = PAGE_MS[database]

    def pair() -> object:
        fixed, moving = next(pairs)
        answer = query.pair(engine, fixed, moving)
        assert answer is not None and answer.stored.fixed_study == fixed
        return answer

    def timeline() -> object:
        wanted = PatientKey(archive.patient_id(next(patients)), archive.ISSUER)
        with store.reading(engine) as session:
            found = store.series_of_patient(session, wanted, MOST)
            offsets, is_all = store.pairs_of_patient(session, wanted, MOST)
        assert len(found) > 1 and offsets and is_all
        return found

    def tally(expression: Expression) -> object:
        with store.reading(engine) as session:
            found = store.tally(session, expression, store.count_matches(session, expression))
        assert found.months
        return found

    questions: list[tuple[str, float, Callable[[], object], int]] = [
        (f"page: {LIKELY}", page_ms, partial(_page, engine, likely), repeats),
        (
            "page, further back",
            page_ms,
            lambda: _page(engine, likely, next(places)),
            repeats,
        ),
        (f"page, rare: {RARE}", page_ms, partial(_page, engine, rare), repeats),
        ("count", SUM_MS, partial(_sum, engine, likely, store.count_matches), repeats // 3 or 1),
        (
            "histogram",
            SUM_MS,
            partial(_sum, engine, likely, store.find_histogram),
            repeats // 3 or 1,
        ),
        (
            "count, nearly all",
            SUM_MS,
            partial(_sum, engine, nearly_all, store.count_matches),
            repeats // 3 or 1,
        ),
        (
            "histogram, nearly all",
            SUM_MS,
            partial(_sum, engine, nearly_all, store.find_histogram),
            repeats // 3 or 1,
        ),
        ("tally, with its count", SUM_MS, partial(tally, likely), repeats // 3 or 1),
        ("tally, nearly all", SUM_MS, partial(tally, nearly_all), repeats // 3 or 1),
        ("pair", page_ms, pair, repeats),
        ("timeline", page_ms, timeline, repeats),
    ]
    rows = []
    for name, limit_ms, call, times in questions:
        call()
        cpu = _cpu_s(server)
        median_ms = _round(1e3 * statistics.median(_timed(call) for _ in range(times)))
        cpu_ms = _round(1e3 * (_cpu_s(server) - cpu) / times)
        _say(f"{database}: {name}: {median_ms} ms, {cpu_ms} ms of processors")
        row = {"database": database, "query": name, "median_ms": median_ms}
        rows.append(row | {"cpu_ms": cpu_ms, "limit_ms": limit_ms})
    return rows


def _cpu_s(server: int | None) -> float:
    """Return what this process took so far, and a server with all that it ever started."""
    total = time.process_time()
    if server is not None:
        root = psutil.Process(server)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended, and counts in its parent
                total += sum(process.cpu_times()[:4])  # its own, and of children that ended
    return total


def _page(engine: Engine, expression: Expression, before: int | None = None) -> store.Page:
    with store.reading(engine) as session:
        page = store.find_page(session, expression, before=before, limit=PAGE)
    assert page.matches
    return page


def _sum(engine: Engine, expression: Expression, ask: Callable[..., Any]) -> Any:
    with store.reading(engine) as session:
        found = ask(session, expression)
    assert getattr(found, "total", found)
    return found


def _pairs(engine: Engine, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Return Studies that have an offset: of each four patients, the first has three."""
    nine = len(archive.STUDIES_OF_PATIENT) * 2 + 1
    with store.reading(engine) as session:
        newest = session.connection().exec_driver_sql("SELECT max(id) FROM series").scalar_one()
    first = nine * rng.integers(0, newest // nine, count) + 1
    return [(archive.study_uid(n + 1), archive.study_uid(n)) for n in first.tolist()]


def _inserts(database: str, full: Engine, empty: Engine, count: int) -> dict[str, Any]:
    """Return how long a finished Series takes to be stored, first and last."""
    rng = np.random.default_rng(3)
    times: dict[str, list[float]] = {"first": [], "last": []}
    for k in range(count + 5):
        for name, engine in (("first", empty), ("last", full)):
            # A follow-up of a patient whom the full database knows already.
            patient = archive.patient_id(int(rng.integers(1, QUICK_SERIES // 3)))
            took = _timed(partial(_store, engine, f"1.3.{rng.integers(1 << 40)}.{k}", patient, k))
            times[name].append(took)
    first, last = (1e3 * statistics.median(t[5:]) for t in (times["first"], times["last"]))
    _say(f"{database}: a Series stored in {first:.1f} ms, with all there in {last:.1f} ms")
    return {
        "database": database,
        "first_ms": _round(first),
        "last_ms": _round(last),
        "ratio": _round(last / first),
    }


def _store(engine: Engine, uid: str, patient: str, day: int) -> None:
    manifest = weights.read_manifest()
    digest, heights = weights.digest(manifest), weights.heights_of(manifest)
    now = archive.NOW + timedelta(days=1 + day)
    results = [
        SliceResult(
            header=SliceHeader(
                sop_class_uid=CT_IMAGE,
                sop_instance_uid=f"{uid}.{k}",
                series_uid=uid,
                study_uid=f"{uid}.0",
                patient=PatientKey(patient, archive.ISSUER),
                study_datetime=now.replace(tzinfo=None),
                modality="CT",
                image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
                image_position=(-200.0, -200.0, 5.0 * k),
                image_orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
                pixel_spacing=(0.8, 0.8),
                rows=512,
                columns=512,
                frame_of_reference_uid=f"{uid}.9",
            ),
            association_id="0123456789abcdef",
            arrived_at=now,
            score=float(heights.inverse(5.0 * k)),
        )
        for k in range(SLICES)
    ]
    with store.writing(engine) as session:
        store.record_slices(session, digest, results)
    with store.writing(engine) as session:
        (waiting,) = (s for s in store.open_series(session) if s.series_uid == uid)
        claimed = store.claim_series(session, waiting.id)
        assert claimed is not None
        outcome = curve.assemble(claimed.slices, series_uid=uid, model=digest, heights=heights)
        assert isinstance(outcome, ScoreCurve)
        store.finish_series(session, waiting.id, outcome, claimed, Evidence.EXPECTED_COUNT, now)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _say(message: str) -> None:
    click.echo(message, err=True)


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)


def _print(result: dict[str, Any]) -> None:
    table = Table("database", "query", "median", "processors", "limit")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in result["rows"]:
        figures = [f"{row[key]:,.1f} ms" for key in ("median_ms", "cpu_ms", "limit_ms")]
        table.add_row(row["database"], row["query"], *figures)
    for row in result["inserts"]:
        kind = f"a Series stored, first {row['first_ms']:.1f} ms, last {row['last_ms']:.1f} ms"
        table.add_row(row["database"], kind, f"x {row['ratio']:.2f}", "", f"x {INSERT_RATIO:.2f}")
    console = Console()
    console.print(f"{result['series']:,} Series, {result['offsets']:,} offsets")
    console.print(table)
    for name, ratio in result["ratios"].items():
        console.print(f"{name}: {'not measured' if ratio is None else f'{ratio:.3g}'}")


if __name__ == "__main__":
    main()
