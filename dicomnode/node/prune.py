"""Drops the network inputs that were kept long enough.

Reads and writes kept inputs; curves and offsets stay.
"""

import logging
from datetime import datetime, timedelta

from sqlalchemy import Engine

from dicomnode import store

# Series a transaction, some 2 MB each: few enough that slices are not kept waiting.
SERIES = 20

logger = logging.getLogger(__name__)


class PruneStage:
    """Drops the inputs of finished Series by the age of their last slice."""

    def __init__(self, engine: Engine, previews_days: float) -> None:
        self.engine = engine
        self.age = timedelta(days=previews_days)

    def step(self, now: datetime) -> int:
        """Drop the inputs of some Series, and return of how many."""
        with store.writing(self.engine) as session:
            pruned = store.prune_previews(session, now - self.age, SERIES)
        if pruned:
            logger.info("previews dropped", extra={"series": pruned})
        return pruned
