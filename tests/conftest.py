"""Fixtures that more than one test module needs: databases, and a watch for canaries."""

import logging
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine, make_url

from db import engine as engines
from db import migrate
from dicomnode import log
from tests.dicom import leaks

POSTGRES_START_S = 30.0
POSTGRES_STOP_S = 15.0
POSTGRES_SETTINGS = (
    "listen_addresses=",  # the socket only
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "shared_buffers=32MB",
)

# Postgres lives as long as the pipe on stdin: should pytest be killed, the shell reads its end,
# stops the server and clears up.
SERVE = 'root=$1; shift; "$@" </dev/null & read -r _; kill -INT $!; wait $!; rm -rf "$root"'


class Watch(logging.Handler):
    """Gathers all that a node would log, as it would log it: message, `extra` and traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(log.JSONFormatter())
        self.addFilter(log._may_pass)  # what it keeps from the libraries
        self.leaks: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.leaks |= {f"{record.name}: {word}" for word in leaks(self.format(record))}


@pytest.fixture(scope="session")
def watch() -> Iterator[Watch]:
    handler = Watch()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


@pytest.fixture(autouse=True)
def nothing_of_a_patient_is_logged(watch: Watch) -> Iterator[None]:
    """Fail the test that brought something of a patient into the log, from whichever thread."""
    watch.leaks.clear()
    yield
    assert not watch.leaks, f"of a patient, in the log: {watch.leaks}"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of a Postgres on which tests may create databases.

    DICOMNODE_TEST_POSTGRES, where it is set; otherwise a server made for this session.
    """
    given = os.environ.get("DICOMNODE_TEST_POSTGRES")
    if given:
        # psycopg takes no SQLAlchemy driver in the scheme.
        yield make_url(given).set(drivername="postgresql").render_as_string(hide_password=False)
        return
    binaries = _postgres_binaries()
    if binaries is None:
        _skip("no initdb and postgres on PATH or under /usr/lib/postgresql/*/bin")
    user = _unprivileged_user()

    root = Path(tempfile.mkdtemp(prefix="dicomnode-pg-"))  # short: a socket's path has 107 bytes
    try:
        if user is not None:
            shutil.chown(root, user)
        with _serve_postgres(binaries, root, user):
            yield f"postgresql://postgres@/postgres?host={root}"
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database of the test's own; the test runs once on each kind.

    It is empty, but for tests that ask for `engine` as well: theirs has the tables.
    """
    ready = "engine" in request.fixturenames
    if request.param == "sqlite":
        if ready:
            shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "node.sqlite")
        yield f"sqlite:///{tmp_path / 'node.sqlite'}"
        return
    template = request.getfixturevalue("postgres_template") if ready else None
    with postgres_database(request.getfixturevalue("postgres_url"), template) as url:
        yield url


# To make all tables costs more than most tests do.
@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with all tables, to be copied."""
    path = tmp_path_factory.mktemp("template") / "node.sqlite"
    _upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> Iterator[str]:
    """Name of a database with all tables, to be copied."""
    with postgres_database(postgres_url) as url:
        _upgrade(url)
        name = make_url(url).database
        assert name is not None
        yield name


def _upgrade(url: str) -> None:
    engine = engines.create(url)
    migrate.upgrade(engine)
    engine.dispose()


@contextmanager
def postgres_database(server: str, template: str | None = None) -> Iterator[str]:
    """Give the URL of a Postgres database, empty or a copy of another; it is dropped at the end."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
        sql.Identifier(name), sql.Identifier(template or "template1")
    )
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(create)
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            drop = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            connection.execute(drop)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A database of the test's own with all tables, of each kind."""
    engine = engines.create(database_url)
    yield engine
    engine.dispose()


def _postgres_binaries() -> Path | None:
    found = shutil.which("postgres")
    folders = [Path(found).resolve().parent] if found else []
    installed = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    folders += sorted(installed, key=lambda folder: int(folder.parent.name), reverse=True)
    complete = (f for f in folders if (f / "initdb").exists() and (f / "postgres").exists())
    return next(complete, None)


def _unprivileged_user() -> str | None:
    """Return whom to run Postgres as, since it refuses root; None for ourselves."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    user = next((name for name in ("postgres", "nobody") if name in known), None)
    if user is None:
        _skip("Postgres does not run as root, and there is no user postgres or nobody")
    return user


@contextmanager
def _serve_postgres(binaries: Path, root: Path, user: str | None) -> Iterator[None]:
    """Make a cluster in `root` and serve it on a socket there, not caring for power cuts."""
    run_as: dict[str, Any] = {"cwd": root}
    if user is not None:
        run_as |= {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    initdb = [binaries / "initdb", "-D", root / "data", "-U", "postgres", "--auth=trust"]
    initdb += ["--encoding=UTF8", "--locale=C", "--no-sync"]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, **run_as)
    serve = ["sh", "-c", SERVE, "sh", root, binaries / "postgres", "-D", root / "data"]
    for setting in POSTGRES_SETTINGS:
        serve += ["-c", setting]
    with open(root / "log", "wb") as log:
        server = subprocess.Popen(
            [*serve, "-c", f"unix_socket_directories={root}"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C goes to pytest alone, which then comes to `finally`
            **run_as,
        )
    assert server.stdin is not None
    try:
        _wait_until_ready(root, server)
        yield
    finally:
        server.stdin.close()
        try:
            server.wait(timeout=POSTGRES_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_ready(root: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + POSTGRES_START_S
    while True:
        try:
            psycopg.connect(host=str(root), user="postgres", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                log = (root / "log").read_text(errors="replace")
                raise RuntimeError(f"Postgres did not start:\n{log}") from None
            time.sleep(0.05)


def _skip(reason: str) -> NoReturn:
    """Skip, but not on CI: there a missing Postgres is a fault and not a circumstance."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true and {reason}")
    pytest.skip(reason)
