"""Computes the offset of each pair that waits for one.

Reads two curves, writes the offset.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from dicomnode import store
from dicomnode.core import align
from dicomnode.core.robust import Covariance
from dicomnode.errors import TransientError
from dicomnode.model import Method, Offset, OffsetStatus, ScoreCurve
from dicomnode.outgoing.asking import Asking

# Pairs a step: few enough that slices are not kept waiting.
PAIRS = 50


logger = logging.getLogger(__name__)


class AlignStage:
    """Works off pending pairs, oldest first."""

    def __init__(
        self,
        engine: Engine,
        asking: Asking | None = None,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.engine = engine
        self.asking = asking
        self.clock = clock

    def step(self) -> int:
        """Store the offsets of some pending pairs, and return how many."""
        with store.reading(self.engine) as session:
            pending = store.pending_offsets(session, PAIRS)
            if not pending:
                return 0
            try:
                found = _offsets(session, pending)
            except TransientError:
                raise
            except Exception:  # one of them: it must not stop the others
                found = [one for pair in pending for one in _try(session, pair)]
        now = self.clock()
        with store.writing(self.engine) as session:
            store.store_offsets(session, found, now)
            if self.asking is not None:
                self.asking.offsets_stored(session, [pair for pair, _, _ in found], now)
        return len(found)


Found = tuple[store.PendingOffset, Offset, float]  # and the seconds it took


def _offsets(session: Session, pending: list[store.PendingOffset]) -> list[Found]:
    curves = store.curves_of(
        session, {uid for p in pending for uid in (p.fixed_series, p.moving_series)}
    )
    covariances = {
        model: store.covariance_of(session, model) for model in {c.model for c in curves.values()}
    }
    found = []
    for pair in pending:
        fixed, moving = curves.get(pair.fixed_series), curves.get(pair.moving_series)
        if fixed is None or moving is None:
            continue  # revised since the pairs were read, and the pair with it
        start = time.perf_counter()
        offset = _align(fixed, moving, pair.method, covariances[fixed.model])
        found.append((pair, offset, time.perf_counter() - start))
    return found


def _try(session: Session, pair: store.PendingOffset) -> list[Found]:
    """Return the offset of one pair, refused where its curves cannot be read."""
    try:
        return _offsets(session, [pair])
    except TransientError:
        raise
    except Exception as exc:
        logger.exception("pair not aligned", extra={"fixed": pair.fixed_series})
        return [(pair, _failed(pair.method, exc), 0.0)]


def _failed(method: Method, exc: Exception) -> Offset:
    return Offset(method, OffsetStatus.REFUSED, reason=f"failed: {type(exc).__name__}")


def _align(
    fixed: ScoreCurve, moving: ScoreCurve, method: Method, covariance: Covariance | None
) -> Offset:
    try:
        return align.align(fixed, moving, method, covariance)
    except Exception as exc:
        # One pair that cannot be computed must not stop those behind it.
        logger.exception("pair not aligned", extra={"fixed": fixed.series_uid})
        return _failed(method, exc)
