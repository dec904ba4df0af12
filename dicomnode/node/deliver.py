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
from dicomnode.outgoing.asking import destinations
from dicomnode.outgoing.to_peer import ToPeer
from dicomnode.outgoing.to_webhook import ToWebhook
from dicomnode.outgoing.work import (
    CONFIGURED,
    LEASE,
    LEAST_ATTEMPTS,
    LONGEST,
    NOT_CONFIGURED,
    Clock,
    Work,
    backoff,
    shown,
)

logger = logging.getLogger(__name__)

BATCH = 20  # deliveries taken at a time
# A peer that is down is tried again so often at least, for all that waits for it.
LONGEST_PAUSE = timedelta(minutes=10)
SET_BACK = timedelta(minutes=1)  # less than that is a clock that is held to time
# Beyond the longest wait: 6 hours and a quarter, for what a peer lost again and again.
FARTHEST = timedelta(hours=8)
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
        self._farthest = FARTHEST + timedelta(seconds=settings.deliver.settle_seconds)
        self._failures = 0  # one after the other
        self._pause_between: tuple[datetime, datetime] | None = None
        self._seen: datetime | None = None  # the time, at the last step
        self._told = Seldom()

    def step(self, now: datetime) -> int:
        """Deliver some of what is due, and return how much that was."""
        if self._is_set_back(now):
            self._pull_back(now, now)
        if self._pause_between is not None:
            start, end = self._pause_between
            if start <= now < end:  # before: the clock was set back since
                return 0
        try:
            return self._step(now)
        except StoreUnavailable:
            raise
        except (TransientError, ConfigError) as exc:
            self._pause(exc)
            return 1

    def _is_set_back(self, now: datetime) -> bool:
        seen, self._seen = self._seen, now
        return seen is not None and now < seen - SET_BACK

    def _pull_back(self, now: datetime, after: datetime) -> int:
        work = self.work
        with store.writing(work.engine) as session:
            pulled = store.pull_back(session, work.destination, now, after)
        if pulled:
            extra = {"destination": shown(work.destination), "deliveries": pulled}
            logger.warning("clock set back", extra=extra)
        return pulled

    def _step(self, now: datetime) -> int:
        work = self.work
        with store.reading(work.engine) as session:
            due_at = store.next_delivery_at(session, work.destination)
        if due_at is not None and due_at > now + self._farthest:
            return self._pull_back(now, now + self._farthest)
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
                if work.leave(self._pause_after(exc), str(exc)) and not work.delivered:
                    # Nor would what is due behind it have come through.
                    with store.writing(work.engine) as session:
                        store.note_unreached(session, work.destination, work.clock(), str(exc))
                raise
            except Exception as exc:  # must not stop what is behind it
                work.fail_all(exc)
                return len(taken)
        self._failures, self._pause_between = 0, None
        return len(taken)

    def _pause_after(self, exc: Exception) -> timedelta:
        wanted = timedelta(seconds=getattr(exc, "after_s", 0.0))
        pause = max(backoff(self._failures, self.work.luck()), min(wanted, LONGEST))
        return min(pause, max(LONGEST_PAUSE, wanted))

    def _pause(self, exc: Exception) -> None:
        now = self.work.clock()
        self._pause_between = now, now + self._pause_after(exc)
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
                    failed_before=now - self.work.give_up,
                    attempts=LEAST_ATTEMPTS,
                )
            if failed:
                logger.error("deliveries given up", extra={**where, "deliveries": failed})


class Strays:
    """Gives up what waits for a destination that is configured no more.

    Not at once: an exchange that still runs with the settings of before must not give up what a
    worker with newer ones asks for.
    """

    name = "deliver strays"

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._known = destinations(settings)
        self._engine = engine
        self._looked_at: datetime | None = None

    def step(self, now: datetime) -> int:
        """Look once a minute, and return how much was given up."""
        if self._looked_at is not None and abs(now - self._looked_at) < STRAYS:
            return 0
        self._looked_at = now
        with store.reading(self._engine) as session:
            strays = store.waiting_for(session) - self._known
        failed = 0
        for kind, destination, rule in sorted(strays):
            with store.writing(self._engine) as session:
                count = store.fail_deliveries(
                    session,
                    destination,
                    now,
                    NOT_CONFIGURED,
                    kind=kind,
                    rule=rule,
                    asked_before=now - CONFIGURED,
                )
            if not count:
                continue
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
