"""Takes what is due from the outbox to where it is to be: a service for each destination.

Reads deliveries, makes what they stand for, sends it, and writes how that went. A crash between
sending and writing sends the same once more: what is made is the same, its UID or id too.
"""

import logging
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.audit import AuditLog
from dicomnode.config import Settings
from dicomnode.errors import ConfigError, StoreUnavailable, TransientError
from dicomnode.log import Seldom
from dicomnode.node.to_peer import ToPeer
from dicomnode.node.to_webhook import ToWebhook
from dicomnode.node.work import (
    LEASE,
    LEAST_ATTEMPTS,
    LONGEST,
    NOT_CONFIGURED,
    Clock,
    Work,
    backoff,
    shown,
)
from dicomnode.outgoing.asking import destinations

logger = logging.getLogger(__name__)

BATCH = 20  # deliveries taken at a time
# A peer that is down is tried again so often at least, for all that waits for it.
LONGEST_PAUSE = timedelta(minutes=10)
STRAYS = timedelta(minutes=1)  # between looks for what is configured no more


class Courier(Protocol):
    """What brings deliveries to one destination."""

    def carry(self, work: Work, taken: Sequence[store.Delivery]) -> None:
        """Bring what was taken, each made when it is its turn, and settle each.

        Raises
        ------
        TransientError, ConfigError
            If the destination cannot be had: what is not settled is tried again later.
        """

    def after(self, work: Work, now: datetime) -> int:
        """Do what else is to be done while nothing is due, and return how much that was."""


class Deliver:
    """Delivers to one destination, one step a batch."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        destination: str,
        courier: Courier,
        *,
        clock: Clock = lambda: datetime.now(UTC),
        luck: Callable[[], float] = random.random,
    ) -> None:
        self.name = f"deliver {shown(destination)}"
        self.work = Work(settings, engine, destination, clock, luck)
        self._courier = courier
        self._failures = 0  # one after the other
        self._paused_until: datetime | None = None
        self._told = Seldom()

    def step(self, now: datetime) -> int:
        """Deliver some of what is due, and return how much that was."""
        if self._paused_until is not None and now < self._paused_until:
            return 0
        try:
            return self._step(now)
        except StoreUnavailable:
            raise
        except (TransientError, ConfigError) as exc:
            self._pause(exc)
            return 1

    def _step(self, now: datetime) -> int:
        work = self.work
        with store.reading(work.engine) as session:
            due_at = store.next_delivery_at(session, work.destination)
        if due_at is None or due_at > now:
            return self._courier.after(work, now)
        with store.writing(work.engine) as session:
            taken = store.claim_deliveries(session, now, LEASE, BATCH, destination=work.destination)
        if not taken:  # another exchange was quicker
            return 0
        with work.holding(taken):
            try:
                self._courier.carry(work, taken)
            except StoreUnavailable:
                raise
            except (TransientError, ConfigError) as exc:  # a certificate, or a key, is missing
                if work.delivered:
                    self._failures = 0
                work.leave(self._pause_after(exc), str(exc))
                raise
            except Exception as exc:  # must not stop what is behind it
                work.fail_all(exc)
                return len(taken)
        self._failures, self._paused_until = 0, None
        return len(taken)

    def _pause_after(self, exc: Exception) -> timedelta:
        wanted = timedelta(seconds=getattr(exc, "after_s", 0.0))
        pause = max(backoff(self._failures, self.work.luck()), min(wanted, LONGEST))
        return min(pause, max(LONGEST_PAUSE, wanted))

    def _pause(self, exc: Exception) -> None:
        now = self.work.clock()
        self._paused_until = now + self._pause_after(exc)
        self._failures += 1
        where = {"destination": shown(self.work.destination), "reason": str(exc)}
        if times := self._told.due(str(exc)):
            logger.warning("destination not reached", extra={**where, "times": times})
        if self._failures >= LEAST_ATTEMPTS:
            with store.writing(self.work.engine) as session:
                failed = store.fail_deliveries(
                    session,
                    self.work.destination,
                    now,
                    str(exc),
                    asked_before=now - self.work.give_up,
                )
            if failed:
                logger.error("deliveries given up", extra={**where, "deliveries": failed})


class Strays:
    """Gives up what waits for a destination that is configured no more."""

    name = "deliver strays"

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._known = destinations(settings)
        self._engine = engine
        self._looked_at: datetime | None = None

    def step(self, now: datetime) -> int:
        """Look once a minute, and return how much was given up."""
        if self._looked_at is not None and now - self._looked_at < STRAYS:
            return 0
        self._looked_at = now
        with store.reading(self._engine) as session:
            strays = store.waiting_for(session) - self._known
        failed = 0
        for kind, destination, rule in sorted(strays):
            with store.writing(self._engine) as session:
                count = store.fail_deliveries(
                    session, destination, now, NOT_CONFIGURED, kind=kind, rule=rule
                )
            where = {"destination": shown(destination), "kind": str(kind)}
            logger.error(
                "deliveries given up",
                extra={**where, "deliveries": count, "reason": NOT_CONFIGURED},
            )
            failed += count
        return failed


def services(settings: Settings, engine: Engine) -> list[Deliver | Strays]:
    """Return a service for each destination, and one for what has none."""
    audit = AuditLog(settings.audit_log)
    names = dict.fromkeys(name for _, name, _ in sorted(destinations(settings)))
    couriers: dict[str, Courier] = {}
    for name in names:
        peer = settings.peer(name)
        couriers[name] = ToPeer(settings, peer, audit) if peer else ToWebhook()
    return [
        *(Deliver(settings, engine, name, courier) for name, courier in couriers.items()),
        Strays(settings, engine),
    ]
