"""The database: its engine, its migrations, and several processes at once; SQLite and Postgres."""

import multiprocessing
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from threading import Barrier, Timer
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError
from sqlalchemy.orm import Session

from db import engine as engines
from db import migrate
from db.schema import Base, Quarantined, Series, Slice, UTCDateTime

NOON = datetime(2024, 5, 17, 12, 0, 0, 123456, tzinfo=UTC)
HEAD = migrate.head()
NEXT, AFTER = (f"{int(HEAD) + n:04d}" for n in (1, 2))
LATER = f'''"""A migration, as a later version would bring it."""

from alembic import op

revision = "{NEXT}"
down_revision = "{HEAD}"


def upgrade() -> None:
    with op.batch_alter_table("series") as batch:
        batch.alter_column("manufacturer", new_column_name="maker")
'''


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    """An engine that is disposed."""
    engine = engines.create(url)
    try:
        yield engine
    finally:
        engine.dispose()


def series(uid: str = "1.2.3") -> Series:
    return Series(
        series_uid=uid,
        study_uid="1.2",
        patient_id="",
        issuer="",
        modality="CT",
        body_part_examined="",
        manufacturer="",
        state="open",
        revision=0,
        received=0,
        set_aside={},
        first_arrival_at=NOON,
        last_arrival_at=NOON,
    )


def quarantined(name: str, arrived_at: datetime = NOON) -> Quarantined:
    return Quarantined(name=name, reason="corrupt", detail="", arrived_at=arrived_at)


def described(engine: Engine) -> dict[str, Any]:
    """All that the database itself knows of its tables, Alembic's aside."""
    inspector = inspect(engine)
    return {
        table: {
            "columns": {
                column["name"]: {**column, "type": column["type"].compile(engine.dialect)}
                for column in inspector.get_columns(table)
            },
            "primary key": inspector.get_pk_constraint(table),
            "foreign keys": sorted(inspector.get_foreign_keys(table), key=lambda k: k["name"]),
            "unique": sorted(inspector.get_unique_constraints(table), key=lambda k: k["name"]),
            "checks": inspector.get_check_constraints(table),
            "indexes": sorted(map(_index, inspector.get_indexes(table)), key=lambda k: k["name"]),
        }
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


def _index(described: Any) -> dict[str, Any]:
    """An index with its condition as text: two conditions of the same words are not equal."""
    options = {key: str(value) for key, value in described.get("dialect_options", {}).items()}
    return {**described, "dialect_options": options}


# Two processes that do the same at the same moment.


_barrier: Barrier


def _set_barrier(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _meet(work: Callable[[str], None], url: str) -> None:
    _barrier.wait(timeout=30)
    work(url)


def in_two_processes(work: Callable[[str], None], url: str) -> None:
    """Run `work(url)` in two processes at once; raise what either raises."""
    spawn = multiprocessing.get_context("spawn")
    barrier = (spawn.Barrier(2),)
    with ProcessPoolExecutor(2, spawn, initializer=_set_barrier, initargs=barrier) as pool:
        # Each waits in `_meet`, so neither process can take both.
        for future in [pool.submit(_meet, work, url) for _ in range(2)]:
            future.result(timeout=60)


def upgrade_and_check(url: str) -> None:
    with opened(url) as engine:
        migrate.upgrade(engine)
        migrate.check(engine)


def count_to_200(url: str) -> None:
    with opened(url) as engine:
        for _ in range(200):
            # Reads, then writes: the transaction that fails when it begins as a reader.
            with Session(engine) as session, session.begin():
                row = session.scalars(select(Series)).one()
                row.received = row.received + 1


# The schema


def test_migrating_an_empty_database_leaves_nothing_to_autogenerate(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Base.metadata) == []


def test_migrating_an_empty_database_gives_what_the_models_create(
    database_url: str, engine: Engine
) -> None:
    migrated = described(engine)
    Base.metadata.drop_all(engine)
    assert described(engine) == {}
    Base.metadata.create_all(engine)
    assert migrated == described(engine)


def test_every_stored_time_but_the_scanners_is_utc() -> None:
    times = {
        f"{table.name}.{column.name}"
        for table in Base.metadata.tables.values()
        for column in table.columns
        if column.type.python_type is datetime and not isinstance(column.type, UTCDateTime)
    }
    assert times == {"series.study_datetime"}


def test_stored_time_comes_back_in_utc(engine: Engine) -> None:
    berlin = timezone(timedelta(hours=2))
    with Session(engine) as session, session.begin():
        session.add(quarantined("a", NOON.astimezone(berlin)))
    with Session(engine) as session:
        arrived_at = session.scalars(select(Quarantined.arrived_at)).one()
        found = session.scalars(
            select(Quarantined.name).where(
                Quarantined.arrived_at == NOON.astimezone(timezone(timedelta(hours=-7)))
            )
        ).one()
    assert arrived_at == NOON
    assert arrived_at.tzinfo is UTC
    assert found == "a"


def test_naive_time_is_refused(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(quarantined("a", NOON.replace(tzinfo=None)))
        with pytest.raises(StatementError, match="a stored time needs a timezone"):
            session.commit()


def test_row_that_refers_to_nothing_is_refused(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Slice(series_id=7, sop_instance_uid="1", frame=1, frame_of_reference_uid="1"))
        with pytest.raises(IntegrityError):
            session.commit()


# Migrations


def test_upgrade_twice_is_fine(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        session.add(series())
    migrate.upgrade(engine)
    migrate.check(engine)
    with Session(engine) as session:
        assert session.scalars(select(Series.series_uid)).all() == ["1.2.3"]


def test_two_processes_may_upgrade_at_once(database_url: str) -> None:
    in_two_processes(upgrade_and_check, database_url)
    with opened(database_url) as engine:
        assert migrate.current(engine) == migrate.head()
        assert set(described(engine)) == set(Base.metadata.tables)


def test_check_refuses_a_database_without_schema(database_url: str) -> None:
    with opened(database_url) as engine:
        assert migrate.current(engine) is None
        with pytest.raises(migrate.SchemaError, match=f"no schema yet; this code needs {HEAD}"):
            migrate.check(engine)


@pytest.fixture
def later_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns the code into a later version, which has a migration more."""
    later = tmp_path / "later"
    shutil.copytree(migrate.MIGRATIONS, later)
    (later / "versions" / f"{NEXT}_rename_maker.py").write_text(LATER)
    return lambda: monkeypatch.setattr(migrate, "MIGRATIONS", later)


def test_check_refuses_an_older_database(engine: Engine, later_version: Callable[[], None]) -> None:
    later_version()
    with pytest.raises(migrate.SchemaError, match=f"older than this code, at {HEAD} of {NEXT}"):
        migrate.check(engine)
    migrate.upgrade(engine)
    migrate.check(engine)


def test_check_and_upgrade_refuse_a_newer_database(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(migrate.SchemaError, match=f"newer than this code, at 9999 against {HEAD}"):
        migrate.check(engine)
    with pytest.raises(migrate.SchemaError, match="newer than this code"):
        migrate.upgrade(engine)


def test_rebuilding_a_table_keeps_the_rows_that_refer_to_it(
    engine: Engine, later_version: Callable[[], None]
) -> None:
    with Session(engine) as session, session.begin():
        session.add(series())
        session.flush()
        session.add(Slice(series_id=1, sop_instance_uid="1", frame=1, frame_of_reference_uid="1"))
    later_version()
    migrate.upgrade(engine)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(maker) FROM series")) == 1
        assert connection.scalar(text("SELECT count(*) FROM slice")) == 1
        if engine.dialect.name == "sqlite":
            assert connection.scalar(text("PRAGMA foreign_keys")) == 1


def test_failed_migration_leaves_the_database_as_it_was(
    engine: Engine, later_version: Callable[[], None]
) -> None:
    before = described(engine)
    later_version()
    script = migrate.MIGRATIONS / "versions" / f"{NEXT}_rename_maker.py"
    script.write_text(script.read_text() + "    raise ZeroDivisionError\n")
    with pytest.raises(ZeroDivisionError):
        migrate.upgrade(engine)
    assert described(engine) == before
    assert migrate.current(engine) == HEAD


def test_revise_writes_the_next_number(engine: Engine, later_version: Callable[[], None]) -> None:
    later_version()
    migrate.upgrade(engine)
    path = migrate.revise(engine, "name the maker again")
    assert path.name == f"{AFTER}_name_the_maker_again.py"
    assert f'down_revision = "{NEXT}"' in path.read_text()
    migrate.upgrade(engine)
    assert migrate.current(engine) == AFTER


# Engines


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_sqlite_pragmas_are_set_on_every_connection(database_url: str) -> None:
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    with opened(database_url) as engine, engine.connect() as one:
        # A second connection beside a reader, for one that may write holds the lock.
        with engines.reader(engine).connect() as other:
            for connection in (one, other):
                found = {
                    name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                    for name in expected
                }
                assert found == expected


def test_first_connection_to_sqlite_waits_for_another_first_one(tmp_path: Path) -> None:
    path = tmp_path / "node.sqlite"
    # Held so, a file that is not yet in WAL mode fails the change of mode without any wait.
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = Timer(0.2, other.execute, ["COMMIT"])
    release.start()
    with opened(f"sqlite:///{path}") as engine:
        migrate.upgrade(engine)
    release.join()
    other.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_two_processes_write_to_sqlite_without_a_lock_error(database_url: str) -> None:
    with opened(database_url) as engine:
        migrate.upgrade(engine)
        with Session(engine) as session, session.begin():
            session.add(series())
        in_two_processes(count_to_200, database_url)
        with Session(engine) as session:
            assert session.scalars(select(Series.received)).one() == 400


def test_reader_does_not_wait_for_a_writer(engine: Engine) -> None:
    with Session(engine) as writing, Session(engines.reader(engine)) as reading:
        writing.add(series())
        writing.flush()
        assert reading.scalars(select(Series)).all() == []


def test_reader_cannot_write_and_leaves_the_pool_able_to(engine: Engine) -> None:
    with Session(engines.reader(engine)) as session:
        session.add(series())
        with pytest.raises(DBAPIError, match=r"read-?only"):
            session.commit()
    with Session(engine) as session, session.begin():
        session.add(series())


def test_failed_transaction_is_rolled_back(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError), Session(engine) as session, session.begin():
        session.add(series())
        session.flush()
        raise ZeroDivisionError
    with Session(engine) as session:
        assert session.scalars(select(Series)).all() == []


def test_folder_of_a_sqlite_file_is_made(tmp_path: Path) -> None:
    with opened(f"sqlite:///{tmp_path}/a/b/node.sqlite") as engine:
        migrate.upgrade(engine)
    assert (tmp_path / "a" / "b" / "node.sqlite").is_file()


def test_postgres_url_takes_psycopg_and_gives_up_on_a_silent_server() -> None:
    with opened("postgresql://node@db.example/node?connect_timeout=3&sslmode=require") as engine:
        assert engine.driver == "psycopg"
        assert engine.url.query["connect_timeout"] == "3"  # the URL's own goes first
        assert engine.url.query["tcp_user_timeout"] == "60000"
        assert engine.url.query["sslmode"] == "require"


@pytest.mark.parametrize(
    "url",
    [
        "mysql://node:secret@host/node",
        "postgresql+psycopg2://node:secret@host/node",
        "postgresql://node:secret@host:port/node",
        "node.sqlite",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///node.sqlite?mode=ro",
        "sqlite://folder/node.sqlite",
        "",
    ],
)
def test_other_url_is_refused_with_what_is_expected(url: str) -> None:
    with pytest.raises(ValueError, match="expected sqlite:///") as caught:
        engines.create(url)
    assert "secret" not in str(caught.value)


LONG = {
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 1e9) "
    "SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(60)",
}


def test_what_takes_too_long_is_stopped_and_the_connection_goes_on(database_url):
    with opened(database_url) as engine:
        with engine.connect() as connection:  # one that knows no limit, to be let go of
            connection.execute(text("SELECT 1"))
        engines.limit_time(engine, 0.3)
        for kind in (engine, engines.reader(engine)):
            with kind.connect() as connection:
                start = time.monotonic()
                with pytest.raises(DBAPIError, match=r"interrupted|statement timeout"):
                    connection.execute(text(LONG[engine.dialect.name]))
                assert time.monotonic() - start < 20
                connection.rollback()
                assert connection.scalar(text("SELECT 1")) == 1
