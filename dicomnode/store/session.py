"""Engine, sessions, and the one statement in which SQLite and Postgres differ."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError
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
        engine = db_engine.create(url)
    except ValueError as exc:
        raise ConfigError(f"database.url: {exc}") from exc
    try:
        _look_at_schema(engine, create, checked)
        yield engine
    finally:
        engine.dispose()


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
    except OperationalError as exc:
        raise StoreUnavailable(f"database: {type(exc.orig).__name__}") from exc
    except DBAPIError as exc:
        if not exc.connection_invalidated:
            raise
        raise StoreUnavailable(f"database: {type(exc.orig).__name__}") from exc


def _look_at_schema(engine: Engine, create: bool, checked: bool) -> None:
    try:
        with available():
            if create and migrate.current(engine) is None:
                migrate.upgrade(engine)
            elif checked:
                migrate.check(engine)
    except migrate.SchemaError as exc:
        raise ConfigError(f"database.url: {exc} (dicomnode db upgrade)") from exc
    except DatabaseError as exc:  # the file is not a database
        raise ConfigError(f"database.url: {type(exc.orig).__name__}: {exc.orig}") from exc


def insert(session: Session, table: type[schema.Base]) -> Any:
    """INSERT with ON CONFLICT: the same words in both dialects, but not the same class."""
    dialect = session.get_bind().dialect.name
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


def upsert(session: Session, table: type[schema.Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows of the same columns, or overwrite those with the same primary key.

    Of rows with the same key the last one counts.
    """
    keys = [column.name for column in table.__table__.primary_key]
    unique = {tuple(row[k] for k in keys): row for row in rows}
    statement = insert(session, table).values(list(unique.values()))
    others = {k: statement.excluded[k] for k in rows[0] if k not in keys}
    session.execute(statement.on_conflict_do_update(index_elements=keys, set_=others))
