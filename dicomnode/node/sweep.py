"""Drops held pixels that nobody wants any more.

Reads what is held and what the database says of it, removes files; the database stays as it is.
"""

import logging
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.held import Held, HeldSeries
from dicomnode.model import DeliveryState, SeriesState
from dicomnode.store import Forward, Wanting

logger = logging.getLogger(__name__)

# Of a Series that the database does not know. Pixels are held before rows are stored, so that each
# is one for a moment; for longer, where the database was restored from a backup.
UNKNOWN = timedelta(days=1)
TELL = timedelta(minutes=10)  # between lines that say that the disk is short


class SweepStage:
    """Looks through the held pixels of one spool, under its lease.

    The worker alone puts and drops, both in one thread: nothing comes between a look at the
    database and what is dropped after it.
    """

    def __init__(
        self,
        engine: Engine,
        held: Held,
        rules: Collection[str],
        rule_days: float,
        watermark_bytes: int = 0,
    ) -> None:
        """Make a stage.

        Parameters
        ----------
        rules
            Names of the rules that there are: nobody serves the others.
        rule_days
            How long pixels wait for a person once a delivery was given up.
        watermark_bytes
            Below so many free bytes they do not wait, the oldest first.
        """
        self.engine, self.held = engine, held
        self.rules = frozenset(rules)
        self.age = timedelta(days=rule_days)
        self.watermark_bytes = watermark_bytes
        self._told: datetime | None = None

    def step(self, now: datetime) -> int:
        """Drop all that nobody wants, and return of how many Series that was."""
        try:
            found = list(self.held.series())
        except OSError as exc:  # in its way alone: what else the worker does goes on
            logger.warning("pixels not dropped", extra={"reason": exc.strerror})
            return 0
        if not found:
            return 0
        with store.reading(self.engine) as session:
            known = store.wanting(session, list({s.series_uid for s in found}))
        unwanted = [s for s in found if not self._is_wanted(s, known.get(s.series_uid), now)]
        dropped = sum(self._drop(series) for series in unwanted)
        gone = set(unwanted)
        left = [series for series in found if series not in gone]
        return dropped + self._make_room(left, known, now)

    def _is_wanted(self, held: HeldSeries, wanting: Wanting | None, now: datetime) -> bool:
        if wanting is None:
            return held.changed_at > now - UNKNOWN
        if wanting.state is SeriesState.OPEN:
            return True
        if any(self._is_served(f) or f.due_at > now - self.age for f in wanting.forwards):
            return True
        if wanting.forwards:
            extra = {"series_uid": held.series_uid, "reason": "rule_days are over"}
            logger.warning("pixels given up", extra=extra)
        return False

    def _is_served(self, forward: Forward) -> bool:
        """Whether it is tried again by itself."""
        return forward.state is DeliveryState.WAITING and forward.rule in self.rules

    def _make_room(
        self, held: list[HeldSeries], known: Mapping[str, Wanting], now: datetime
    ) -> int:
        """Where the disk is short, drop what only a person could still send; return how many."""
        dropped = 0
        for series in sorted(held, key=lambda s: s.changed_at):
            if self.held.free_bytes() >= self.watermark_bytes:
                return dropped
            wanting = known.get(series.series_uid)
            if wanting is None or wanting.state is SeriesState.OPEN:
                continue
            if not any(map(self._is_served, wanting.forwards)):
                extra = {"series_uid": series.series_uid, "reason": "the disk is short"}
                logger.warning("pixels given up", extra=extra)
                dropped += self._drop(series)
        left = len(held) - dropped
        if left and (self._told is None or now > self._told + TELL):
            free_bytes = self.held.free_bytes()
            if free_bytes < self.watermark_bytes:
                self._told = now
                told = {"series": left, "free_bytes": free_bytes}
                logger.warning("held pixels fill the disk", extra=told)
        return dropped

    def _drop(self, series: HeldSeries) -> bool:
        try:
            self.held.drop(series.study_uid, series.series_uid)
        except OSError as exc:
            extra = {"series_uid": series.series_uid, "reason": exc.strerror}
            logger.warning("pixels not dropped", extra=extra)
            return False
        return True
