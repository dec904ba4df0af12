"""Sees to it that peers are asked for what a forward missed: questions for days, one by one.

Writes questions; who asks them is `fetch`.
"""

import math
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.core import retrieval

PART = "exchange"  # of the heartbeat
BEAT_S = 10.0
# Something may have been missed for so long before the last sign of life.
MARGIN = timedelta(minutes=10)


class CatchUp:
    """Asks peers for the days in which the node was down, and for today and yesterday."""

    name = "catch up"

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._peers, self._engine = settings.priors.catch_up, engine
        self._every = timedelta(minutes=settings.priors.catch_up_minutes)
        self._most = math.ceil(settings.priors.catch_up_hours / 24)
        self._started = False
        self._next = datetime.min.replace(tzinfo=UTC)

    def step(self, now: datetime) -> int:
        """Beat, and ask what is due to be asked; at the first step for all that may be missing."""
        if now < self._next <= now + timedelta(seconds=BEAT_S):
            return 0
        self._next = now + timedelta(seconds=BEAT_S)
        today = now.astimezone().date()
        with store.writing(self._engine) as session:
            if not self._started:
                last = store.last_beat(session, PART)
                up = (last - MARGIN).astimezone().date() if last else None
                days = retrieval.missed_days(up, today, self._most)
                for peer in self._peers:
                    store.ask_days(session, peer, days, now)
            else:
                days = retrieval.missed_days(None, today, 1)
                for peer in self._peers:
                    asked = store.asked_days(session, peer, days)
                    due = [day for day in days if self._is_due(asked, day, now)]
                    store.ask_days(session, peer, due, now)
            # With what was asked, or not at all: else a crash between would hide the time before.
            store.beat(session, PART, now)
        self._started = True
        return 0

    def _is_due(self, asked: dict[date, datetime | None], day: date, now: datetime) -> bool:
        if day not in asked:
            return True
        done_at = asked[day]
        return done_at is not None and not now - self._every < done_at <= now
