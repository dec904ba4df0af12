"""Engine, sessions, and the one statement in which SQLite and Postgres differ."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    OperationalError,
)
from sqlalchemy.orm import Session

from db import engine as db_engine
from db import migrate, schema
from dicomnode.errors import ConfigError, StoreUnavailable


@contextmanager
def opened(url: str, *, create: bool = False, checked: bool = True) -> Iterator[Engine]:
    """Give the engine of a database whose schema is the one of this version.

    Parameters
    ----------
    create : bool
        Whether an empty database gets its schema. One of another version never does by
        itself: that is for `dicomnode db upgrade`, when the operator has a backup.
    checked : bool
        Whether the schema is looked at.

    Raises
    ------
    ConfigError
        If the URL is wrong, or the schema is older or newer.
    StoreUnavailable
        If the database does not answer.
    """
    try:
        if not create and checked and (file := sqlite_file(url)) and not file.exists():
            raise ConfigError(f"database.url: no database at {file}: the node makes it at start")
        engine = db_engine.create(url)
    except ValueError as exc:
        raise ConfigError(f"database.url: {exc}") from exc
    try:
        _look_at_schema(engine, create, checked)
        yield engine
    finally:
        engine.dispose()


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL, None for another database.

    Raises
    ------
    ValueError
        If it is no URL.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ValueError(f"not a database URL: {db_engine.EXPECTED}") from None
    is_file = parsed.get_backend_name() == "sqlite" and parsed.database
    return Path(parsed.database).absolute() if is_file and parsed.database else None


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """Give a session that only reads: on SQLite it neither takes nor awaits the write lock."""
    with available(), Session(db_engine.reader(engine)) as session:
        yield session


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """Give a session whose transaction is committed when the block ends."""
    with available(), Session(engine) as session, session.begin():
        yield session


@contextmanager
def available() -> Iterator[None]:
    """Translate "the database does not answer" into StoreUnavailable.

    Raises
    ------
    StoreUnavailable
        If the connection is refused or lost, or a lock is held too long.
    """
    try:
        yield
    except (DataError, IntegrityError):  # what was to be stored is wrong, not the database
        raise
    except DBAPIError as exc:
        # A fail-over makes a server read-only: no OperationalError, but it passes all the same.
        raise StoreUnavailable(f"database: {_first_line(exc)}") from exc


def _look_at_schema(engine: Engine, create: bool, checked: bool) -> None:
    try:
        if create and migrate.current(engine) is None:
            migrate.upgrade(engine)
        elif checked:
            migrate.check(engine)
    except migrate.SchemaError as exc:
        raise ConfigError(f"database.url: {exc} (dicomnode db upgrade)") from exc
    except OperationalError as exc:
        raise StoreUnavailable(f"database: {_first_line(exc)}") from exc
    except DatabaseError as exc:  # the file is not a database
        raise ConfigError(f"database.url: {_first_line(exc)}") from exc


def _first_line(exc: DBAPIError) -> str:
    return (str(exc.orig).splitlines() or [type(exc.orig).__name__])[0]


def insert(session: Session, table: type[schema.Base]) -> Any:
    """INSERT with ON CONFLICT: the same words in both dialects, but not the same class."""
    dialect = session.get_bind().dialect.name
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


def upsert(session: Session, table: type[schema.Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows of the same columns, or overwrite those with the same primary key.

    Of rows with the same key the last one counts.
    """
    _insert_many(session, _statement(session.get_bind().dialect.name, table, True), rows)


def insert_new(session: Session, table: type[schema.Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows of the same columns, but for those whose primary key is there."""
    _insert_many(session, _statement(session.get_bind().dialect.name, table, False), rows)


def _insert_many(session: Session, statement: Any, rows: Sequence[dict[str, Any]]) -> None:
    # One statement for all rows, whatever their number, is compiled once and for all: as one
    # VALUES of all rows, which is another statement for each number, it took a third of a
    # millisecond a slice. psycopg sends such rows in one go (pipeline mode).
    if rows:
        session.flush()  # what they refer to
        session.connection().execute(statement, rows)


@functools.cache
def _statement(dialect: str, table: type[schema.Base], overwrite: bool) -> Any:
    columns = table.__table__
    new = (postgresql if dialect == "postgresql" else sqlite).insert(columns)
    if not overwrite:
        return new.on_conflict_do_nothing()
    keys = [column.name for column in columns.primary_key]
    others = {c.name: new.excluded[c.name] for c in columns.columns if c.name not in keys}
    return new.on_conflict_do_update(index_elements=keys, set_=others)
