"""A Postgres of one's own for a while: initdb in a folder, a socket there, no network."""

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

START_S = STOP_S = 120.0
# A quarter of a small server's memory, as its manual advises; the rest is as it comes, but for
# the log, which would take more room than the data while those are loaded.
SETTINGS = (
    "listen_addresses=",
    "shared_buffers=2GB",
    "effective_cache_size=8GB",
    "maintenance_work_mem=512MB",
    "max_wal_size=1GB",
    "wal_level=minimal",
    "max_wal_senders=0",
)


def binaries() -> Path | None:
    """Return the folder of initdb and postgres, None where there is none."""
    found = shutil.which("postgres")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("[0-9]*/bin"), reverse=True)
    return next((f for f in folders if (f / "initdb").exists()), None)


@contextmanager
def served(folder: Path, bin_folder: Path) -> Iterator[tuple[str, int]]:
    """Give URL and process id of a new server with its data in a folder, removed at the end."""
    root = folder / "postgres"
    root.mkdir()
    user = None
    if os.getuid() == 0:  # Postgres does not run as root
        known = {entry.pw_name for entry in pwd.getpwall()}
        user = next(name for name in ("postgres", "nobody") if name in known)
        shutil.chown(root, user, pwd.getpwnam(user).pw_gid)
        folder.chmod(0o755)
    group = pwd.getpwnam(user).pw_gid if user else None

    initdb = [bin_folder / "initdb", "-D", root / "data", "-U", "postgres", "--auth=trust"]
    initdb += ["--encoding=UTF8", "--locale=C", "--no-sync"]
    command = [bin_folder / "postgres", "-D", root / "data"]
    for setting in (*SETTINGS, f"unix_socket_directories={root}"):
        command += ["-c", setting]
    try:
        subprocess.run(
            initdb,
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=root,
            user=user,
            group=group,
        )
        with open(root / "log", "wb") as log:
            server = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=root, user=user, group=group
            )
        try:
            _wait_until_ready(root, server)
            yield f"postgresql://postgres@/postgres?host={root}", server.pid
        finally:
            server.terminate()
            try:
                server.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _wait_until_ready(root: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            psycopg.connect(host=str(root), user="postgres", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                log = (root / "log").read_text(errors="replace")
                raise RuntimeError(f"Postgres did not start:\n{log}") from None
            time.sleep(0.05)
