"""Computes the offset of each pair that waits for one.

Reads two curves, writes the offset.
"""

import logging
import time
from datetime import UTC, datetime

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.core import align
from dicomnode.core.robust import Covariance
from dicomnode.model import Method, Offset, OffsetStatus, ScoreCurve

# Pairs a transaction: few enough that slices are not kept waiting.
PAIRS = 50


logger = logging.getLogger(__name__)


class AlignStage:
    """Works off pending pairs, oldest first."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def step(self) -> int:
        """Store the offsets of some pending pairs, and return how many."""
        with store.reading(self.engine) as session:
            if not store.pending_offsets(session, 1):
                return 0
        with store.writing(self.engine) as session:
            pending = store.pending_offsets(session, PAIRS)
            curves = store.curves_of(
                session, {uid for p in pending for uid in (p.fixed_series, p.moving_series)}
            )
            covariances = {
                model: store.covariance_of(session, model)
                for model in {c.model for c in curves.values()}
            }
            for pair in pending:
                start = time.perf_counter()
                fixed, moving = curves[pair.fixed_series], curves[pair.moving_series]
                offset = _align(fixed, moving, pair.method, covariances[fixed.model])
                seconds = time.perf_counter() - start
                store.store_offset(session, pair, offset, datetime.now(UTC), seconds)
        return len(pending)


def _align(
    fixed: ScoreCurve, moving: ScoreCurve, method: Method, covariance: Covariance | None
) -> Offset:
    try:
        return align.align(fixed, moving, method, covariance)
    except Exception as exc:
        # One pair that cannot be computed must not stop those behind it.
        logger.exception("pair not aligned", extra={"fixed": fixed.series_uid})
        return Offset(method, OffsetStatus.REFUSED, reason=f"failed: {type(exc).__name__}")
