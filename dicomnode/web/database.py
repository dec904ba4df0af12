"""The database of the page: it may come after the page, and go and come back meanwhile."""

import contextlib
import threading
import time

from sqlalchemy import Engine

from db import engine as engines
from dicomnode import store
from dicomnode.errors import NodeError, StoreUnavailable

AGAIN_S = 1.0  # after a failure, callers are refused so long without another try
STATEMENT_S = 30.0  # that one question may take


class Database:
    """The engine, once the database was there with the schema of this version."""

    def __init__(self, url: str, statement_s: float = STATEMENT_S) -> None:
        self._url, self._statement_s = url, statement_s
        self._trying = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._engine: Engine | None = None
        self._failed: tuple[float, NodeError] | None = None

    def engine(self) -> Engine:
        """Return the engine.

        Raises
        ------
        StoreUnavailable
            If the database does not answer.
        ConfigError
            If its schema is of another version.
        """
        if self._engine is not None:
            return self._engine
        # One caller tries: the others would only wait for the same answer, each in a thread.
        if not self._trying.acquire(blocking=False):
            raise StoreUnavailable("database: being opened")
        try:
            return self._engine or self._open()
        finally:
            self._trying.release()

    def close(self) -> None:
        """Let go of every connection."""
        self._stack.close()
        self._engine = None

    def _open(self) -> Engine:
        if self._failed is not None and time.monotonic() - self._failed[0] < AGAIN_S:
            raise self._failed[1]
        try:
            engine = self._stack.enter_context(store.opened(self._url))
        except NodeError as exc:
            self._failed = time.monotonic(), exc
            raise
        engines.limit_time(engine, self._statement_s)
        self._engine = engine
        return engine
