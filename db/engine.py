"""The engine: SQLite for several processes, or Postgres, from one URL.

An engine belongs to the process that made it: a process that forks makes a new one in the child.
"""

import math
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError

EXPECTED = "expected sqlite:///relative.sqlite, sqlite:////absolute.sqlite or postgresql://..."
BUSY_TIMEOUT_S = 30.0
PROGRESS_STEPS = 20_000  # of SQLite's machine between looks at the clock: about a millisecond

# libpq's own defaults wait for ever to connect, and two hours to notice that the server's machine
# is gone; these give up after 10 s, and after about a minute. What the URL says goes first.
POSTGRES_DEFAULTS = {
    "connect_timeout": "10",  # s
    "keepalives_idle": "30",  # s
    "keepalives_interval": "10",  # s
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",  # ms
}


def create(url: str) -> Engine:
    """Return an engine whose transactions may write; dispose it when done.

    SQLite's file gets its folder made; the file itself comes with the first connection.

    Raises
    ------
    ValueError
        If the URL names neither a SQLite file nor a Postgres server. A password is not repeated.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"not a database URL: {EXPECTED}") from None
    if parsed.drivername == "sqlite":
        return _sqlite(parsed)
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return _postgres(parsed)
    raise ValueError(f"no such kind of database, {parsed.drivername!r}: {EXPECTED}")


def reader(engine: Engine) -> Engine:
    """Return the same engine, the same pool, for transactions that only read.

    On SQLite such a transaction neither takes the write lock nor waits for it. A write in it is an
    error on both databases.
    """
    return engine.execution_options(sqlite_readonly=True, postgresql_readonly=True)


def limit_time(engine: Engine, seconds: float) -> None:
    """Stop what takes longer from now on: a statement on Postgres, a transaction on SQLite."""
    if engine.dialect.name == "postgresql":

        def set_timeout(dbapi_connection: Any, record: Any) -> None:
            # Outside a transaction: what is set within one goes with its rollback.
            dbapi_connection.autocommit = True
            dbapi_connection.execute(f"SET statement_timeout = {int(seconds * 1000)}")
            dbapi_connection.autocommit = False

        event.listen(engine, "connect", set_timeout)
    else:

        def watch(dbapi_connection: sqlite3.Connection, record: Any) -> None:
            def is_late() -> bool:
                return time.monotonic() > float(record.info.get("until", math.inf))

            dbapi_connection.set_progress_handler(is_late, PROGRESS_STEPS)

        def begin(connection: Connection) -> None:
            connection.info["until"] = time.monotonic() + seconds

        event.listen(engine, "connect", watch)
        event.listen(engine, "begin", begin)
    engine.dispose()  # connections of before know no limit


def _sqlite(url: URL) -> Engine:
    if url.host or url.username or url.query:
        raise ValueError(f"a SQLite URL is a path and nothing else: {EXPECTED}")
    if url.database in (None, "", ":memory:"):
        raise ValueError(f"SQLite in memory cannot be shared by processes: {EXPECTED}")
    assert url.database is not None
    Path(url.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(
        url,
        hide_parameters=True,  # an error would quote them, and with them a patient
        # `timeout` is SQLite's busy_timeout. `isolation_level` None stops sqlite3 from sending
        # BEGIN by itself, before the first INSERT only: _begin_sqlite does it.
        connect_args={"timeout": BUSY_TIMEOUT_S, "isolation_level": None},
    )
    event.listen(engine, "connect", _connect_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _connect_sqlite(dbapi_connection: sqlite3.Connection, record: object) -> None:
    cursor = dbapi_connection.cursor()
    try:
        _set_wal(cursor)
        # A spooled object is deleted after the commit that used it, so that commit must survive a
        # power cut. In WAL mode only FULL syncs the log at every commit; NORMAL, which many guides
        # advise, may lose the last ones.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")  # off by default, and per connection
        # Debian builds SQLite so that it writes zeros over all that it deletes. The inputs of a
        # Series move to another row when it is finished: that took 35 ms for 600 slices, half of
        # it for zeros. What was deleted may stay in the file until its page is used again.
        cursor.execute("PRAGMA secure_delete = FAST")
        # In pages, 32 MiB; SQLite's own 4 MiB is one Series of 600 slices, so that each of its
        # commits waited for its pages to be copied into the database: 20 ms for a pair.
        cursor.execute("PRAGMA wal_autocheckpoint = 8000")
    finally:
        cursor.close()


def _set_wal(cursor: sqlite3.Cursor) -> None:
    """Keep a write-ahead log: readers and the one writer do not wait for each other."""
    # The file remembers the mode; only its very first connections change it. Of two that do so
    # at once, SQLite fails one without waiting for the busy_timeout (852 of 3000 in a trial), so
    # the waiting is done here.
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            (mode,) = cursor.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise ValueError(
            f"SQLite cannot keep a write-ahead log here (journal_mode {mode!r}): "
            "is the file on a network share?"
        )


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction with the lock that it will need.

    A plain BEGIN takes the write lock at the first write. If another process has written since
    this one first read, SQLite then fails at once with "database is locked", whatever the
    busy_timeout: two that have read and now both want to write would wait for each other for ever.
    BEGIN IMMEDIATE takes the lock first, where waiting helps, so that what was read still holds
    when it is written. Writing is the default since forgetting it costs an error in production;
    forgetting `reader` costs a wait. sqlite3's own `autocommit=False` (Python 3.12), SQLAlchemy's
    other advice, always sends a plain BEGIN.
    """
    readonly = bool(connection.get_execution_options().get("sqlite_readonly", False))
    connection.exec_driver_sql(f"PRAGMA query_only = {int(readonly)}")
    connection.exec_driver_sql("BEGIN" if readonly else "BEGIN IMMEDIATE")


def _postgres(url: URL) -> Engine:
    # psycopg 3 is what the package installs; SQLAlchemy 2.0 takes plain postgresql:// for psycopg2.
    url = url.set(drivername="postgresql+psycopg")
    url = url.update_query_dict({k: v for k, v in POSTGRES_DEFAULTS.items() if k not in url.query})
    return create_engine(url, pool_pre_ping=True, hide_parameters=True)
