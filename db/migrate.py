"""Bring a database to the schema of this code, or say that it is not there.

`python -m db.migrate "add offset"` writes the next migration, for a person to tidy.
"""

import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from db import engine as engines

# Alembic needs no file of its own: this folder is package data, in the checkout and in a wheel.
MIGRATIONS = Path(__file__).with_name("migrations")

# Any number will do, as long as it stays: it names the lock that upgrades of one database share.
POSTGRES_LOCK = 0x64_69_63_6F_6D_6E_6F_64  # "dicomnod"
SQLITE_LOCK_TIMEOUT_MS = 600_000


class SchemaError(Exception):
    """The database has not the schema of this code; the message says what to do."""


def head() -> str:
    """Return the revision that this code needs."""
    revision = _scripts().get_current_head()
    assert revision is not None
    return revision


def current(engine: Engine) -> str | None:
    """Return the revision of the database, None if it was never upgraded."""
    with engines.reader(engine).connect() as connection:
        return _current(connection)


def check(engine: Engine) -> None:
    """Raise SchemaError unless the database is at `head()`."""
    found, needed = current(engine), head()
    if found is None:
        raise SchemaError(f"the database has no schema yet; this code needs {needed}: upgrade it")
    _refuse_newer(found)
    if found != needed:
        raise SchemaError(
            f"the database is older than this code, at {found} of {needed}: upgrade it"
        )


def upgrade(engine: Engine) -> None:
    """Bring the database to `head()`: all in one transaction, or not at all.

    Several processes may do this at once: the first does the work while the others wait, then
    find it done.

    Raises
    ------
    SchemaError
        If the database is newer than this code, or a migration left a row that refers to nothing.
    """
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            _upgrade_sqlite(connection)
        else:
            with connection.begin():
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({POSTGRES_LOCK})")
                _run(connection)


def revise(engine: Engine, message: str) -> Path:
    """Write the next numbered migration: what the models have and this upgraded database has not.

    Returns
    -------
    Path
        The new file, for a person to tidy.
    """
    number = f"{int(head()) + 1:04d}"
    with engine.connect() as connection, connection.begin():
        script = command.revision(_config(connection), message, autogenerate=True, rev_id=number)
    assert script is not None and not isinstance(script, list)
    return Path(script.path)


def _upgrade_sqlite(connection: Connection) -> None:
    """Upgrade in one BEGIN IMMEDIATE transaction, which is the lock as well."""
    # Alembic changes a SQLite table by copying it and dropping the original, and with foreign keys
    # on, the drop deletes the rows that refer to it by ON DELETE CASCADE: every curve, when the
    # Series table changes. The pragma does nothing inside a transaction, so it goes before, on a
    # connection that does not return to the pool.
    connection.detach()
    cursor = connection.connection.cursor()
    cursor.execute("PRAGMA foreign_keys = OFF")
    cursor.execute(f"PRAGMA busy_timeout = {SQLITE_LOCK_TIMEOUT_MS}")
    cursor.close()
    with connection.begin():
        _run(connection)
        orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
        if orphans:
            tables = ", ".join(sorted({orphan[0] for orphan in orphans}))
            raise SchemaError(f"{len(orphans)} rows refer to nothing after upgrade, in {tables}")


def _run(connection: Connection) -> None:
    _refuse_newer(_current(connection))
    command.upgrade(_config(connection), "head")


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(found: str | None) -> None:
    """A revision that this code has no file of was made by a later version."""
    if found is not None and found not in {s.revision for s in _scripts().walk_revisions()}:
        raise SchemaError(
            f"the database is newer than this code, at {found} against {head()}: "
            "run the version that upgraded it, or a later one"
        )


def _config(connection: Connection | None = None) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        scratch = engines.create(f"sqlite:///{folder}/scratch.sqlite")
        upgrade(scratch)
        print(revise(scratch, sys.argv[1]))
        scratch.dispose()
