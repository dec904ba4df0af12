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
from dicomnode.audit import AuditLog
from dicomnode.config import Settings
from dicomnode.errors import ConfigError, TransientError
from dicomnode.node import deliver
from dicomnode.node.commit import Commitments
from dicomnode.node.hl7 import HL7Listener
from dicomnode.rules import Rules

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
    services: list[Service] = [
        *deliver.services(settings, engine),
        Commitments(settings, engine),
    ]
    if settings.priors.asked:
        from dicomnode.node.catch_up import CatchUp
        from dicomnode.node.fetch import Fetcher
        from dicomnode.scu.archive import archive_of

        audit = AuditLog(settings.audit_log)
        if settings.priors.catch_up:
            services.append(CatchUp(settings, engine))
        services += [
            Fetcher(settings, engine, archive_of(settings, name), audit)
            for name in settings.priors.asked
        ]
    if settings.hl7.port is not None:
        services.append(HL7Listener(settings, engine))
    return services


def run(settings: Settings, stop: threading.Event) -> None:
    """Run every service until `stop` is set; errors of the database are waited out.

    Raises
    ------
    ConfigError
        If a rule cannot be read.
    """
    Rules.of(settings)
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
        services = services_of(settings, engine)
        for service in services:
            # What a service holds open, beside its thread.
            stack.callback(getattr(service, "close", lambda: None))
        threads = [
            threading.Thread(target=keep_on, args=(service, stop), name=service.name, daemon=True)
            for service in services
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
