"""Records what peers report of Storage Commitments: from the folder of reports to the database."""

import logging
import random
from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.errors import CorruptObject
from dicomnode.model import DeliveryState
from dicomnode.outgoing.work import LEAST_ATTEMPTS, first_failure
from dicomnode.scu.commitment import reason_of
from dicomnode.spool.reports import Report, Reports

logger = logging.getLogger(__name__)

BATCH = 100
# What a peer says it does not keep is sent again: not at once, lest both go round and round.
FIRST = timedelta(minutes=1)
LONGEST = timedelta(hours=6)
NEVER = 0x0122  # the peer does not commit itself to this SOP Class: sending again would not help


class Commitments:
    """Takes reports from their folder."""

    name = "commitments"

    def __init__(
        self, settings: Settings, engine: Engine, luck: Callable[[], float] = random.random
    ) -> None:
        self._engine = engine
        self._reports = Reports.of(settings.spool)
        self._reports.clean()
        self._give_up = timedelta(hours=settings.deliver.give_up_hours)
        self._luck = luck

    def step(self, now: datetime) -> int:
        """Record some reports, oldest first, and return how many."""
        paths = self._reports.pending(BATCH)
        for path in paths:
            try:
                report = self._reports.read(path)
            except FileNotFoundError:  # another exchange took it
                continue
            except CorruptObject as exc:
                logger.error("report not read", extra={"reason": str(exc)})
            else:
                self._record(report, now)
            self._reports.remove(path)
        return len(paths)

    def _record(self, report: Report, now: datetime) -> None:
        failures = dict(report.failed)
        with store.writing(self._engine) as session:
            committed = store.record_committed(
                session, report.peer, report.transaction_uid, report.committed
            )
            failed = store.failed_commitments(session, report.transaction_uid, list(failures))
            for delivery in failed:
                why = failures[delivery.sop_instance_uid or ""]
                reason = f"commitment failed: {reason_of(why)}"
                state = self._next_state(delivery, why, now)
                due_at = now + self._wait(delivery.attempts)
                since = first_failure(delivery, now)
                store.record_uncommitted(session, delivery, state, due_at, since, reason)
        extra = {
            "destination": report.peer,
            "transaction_uid": report.transaction_uid,
            "committed": committed,
            "failed": len(failed),
        }
        if failed:
            logger.warning(
                "commitment failed", extra={**extra, "reasons": sorted(set(failures.values()))}
            )
        else:
            logger.info("commitment answered", extra=extra)

    def _next_state(self, delivery: store.Delivery, why: int, now: datetime) -> DeliveryState:
        if why == NEVER:
            return DeliveryState.DONE
        old = now - first_failure(delivery, now) >= self._give_up
        if old and delivery.attempts >= LEAST_ATTEMPTS:
            return DeliveryState.FAILED
        return DeliveryState.WAITING

    def _wait(self, attempts: int) -> timedelta:
        return min(FIRST * (1 << min(attempts, 20)), LONGEST) * (0.75 + 0.5 * self._luck())
