"""Runs what talks to peers by itself, each service in a thread of its own.

A peer that hangs keeps one of them waiting, and no other: neither the receivers nor the worker
that scores.
"""

import contextlib
import logging
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

from sqlalchemy import Engine

from dicomnode import notify, store
from dicomnode.config import Settings
from dicomnode.errors import ConfigError, TransientError

logger = logging.getLogger(__name__)

IDLE_S = 1.0  # a service without work looks so often whether there is some
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # after an error; the last one again and again
STOP_S = 10.0  # a service that does not end by itself in this time is left to the process's end


class Service(Protocol):
    """One kind of work; steps are bounded, and may each be repeated after a crash."""

    name: str

    def step(self, now: datetime) -> int:
        """Do a little of what is due, and return how much that was."""


def services_of(settings: Settings, engine: Engine) -> Sequence[Service]:
    """Return the services that the settings ask for."""
    return ()


def run(settings: Settings, stop: threading.Event) -> None:
    """Run every service until `stop` is set; errors of the database are waited out."""
    with contextlib.ExitStack() as stack:
        engine = None
        while engine is None and not stop.is_set():
            try:
                engine = stack.enter_context(store.opened(settings.database.url, create=True))
            except ConfigError:
                raise
            except TransientError as exc:
                logger.warning("exchange waits", extra={"reason": str(exc)})
                stop.wait(RETRY_S[1])
        if engine is None:
            return
        threads = [
            threading.Thread(target=keep_on, args=(service, stop), name=service.name, daemon=True)
            for service in services_of(settings, engine)
        ]
        for thread in threads:
            thread.start()
        notify.ready()
        while not stop.wait(IDLE_S):
            notify.alive()
        notify.stopping()
        for thread in threads:
            thread.join(STOP_S)


def keep_on(service: Service, stop: threading.Event) -> None:
    """Step a service until `stop` is set; what fails is tried again, later and later."""
    failures = 0
    while not stop.is_set():
        try:
            done = service.step(datetime.now(UTC))
            failures = 0
            if not done:
                stop.wait(IDLE_S)
            continue
        except TransientError as exc:
            logger.warning("service waits", extra={"part": service.name, "reason": str(exc)})
        except Exception:  # must outlive one job
            logger.exception("service step failed", extra={"part": service.name})
        stop.wait(RETRY_S[min(failures, len(RETRY_S) - 1)])
        failures += 1
