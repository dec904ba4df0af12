"""Finishes each Series on evidence that it is complete.

Reads slice rows, writes the curve together with the pairs that follow from it.
"""

import logging
from datetime import datetime, timedelta

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from dicomnode import store
from dicomnode.audit import Act, AuditLog
from dicomnode.core import curve
from dicomnode.errors import TransientError
from dicomnode.model import Evidence, Reason, Refusal, ScoreCurve
from dicomnode.outgoing.asking import Asking

logger = logging.getLogger(__name__)

RETRY = timedelta(minutes=10)


class AssembleStage:
    """Finishes what is complete, one transaction a Series."""

    def __init__(
        self,
        engine: Engine,
        quiet_seconds: float,
        lost_seconds: float,
        audit: AuditLog | None = None,
        asking: Asking | None = None,
    ) -> None:
        self.engine = engine
        self.audit = audit or AuditLog(None)
        self.asking = asking
        self.quiet = timedelta(seconds=quiet_seconds)
        self.lost = timedelta(seconds=lost_seconds)
        self.due: datetime | None = None  # when the next open Series will have been quiet
        self._failed: dict[int, datetime] = {}  # Series -> when to try again

    def step(self, horizon: datetime, now: datetime) -> int:
        """Finish every Series that is complete, and return how many were.

        Parameters
        ----------
        horizon : datetime
            Everything that arrived before is in the database: `now` where the spool is
            empty. Quiet is measured to it, so that a backlog does not look like silence.
        now : datetime
            The time that is stored.
        """
        with store.reading(self.engine) as session:
            waiting = store.open_series(session)
            lost = bool(waiting) and store.has_lost_associations(session, horizon, self.lost)
        if lost:
            with store.writing(self.engine) as session:
                store.end_lost_associations(session, horizon, self.lost)
                waiting = store.open_series(session)
        quiet_at = (store.quiet_at(series, self.quiet) for series in waiting)
        self.due = min((at for at in quiet_at if at is not None and at > horizon), default=None)
        finished = 0
        for series in waiting:
            evidence = store.next_completion(series, horizon, self.quiet)
            if evidence is not None and now >= self._failed.get(series.id, now):
                finished += self._try_to_finish(series, evidence, now)
        return finished

    def _try_to_finish(self, series: store.OpenSeries, evidence: Evidence, now: datetime) -> bool:
        try:
            return self._finish(series, evidence, now)
        except TransientError:
            raise
        except Exception:
            # One Series that cannot be finished must not stop those behind it.
            logger.exception("series not finished", extra={"series_uid": series.series_uid})
            self._failed[series.id] = now + RETRY
            return False

    def _finish(self, series: store.OpenSeries, evidence: Evidence, now: datetime) -> bool:
        with store.writing(self.engine) as session:
            claimed = store.claim_series(session, series.id)
            if claimed is None:
                return False
            study_uid, associations = store.origin_of(session, series.id)
            result = outcome(session, series.series_uid, claimed)
            pairs = store.finish_series(session, series.id, result, claimed, evidence, now)
            if self.asking is not None and isinstance(result, ScoreCurve):
                self.asking.curve_stored(session, series.series_uid, now)
        logger.info(
            "series finished",
            extra={
                "series_uid": series.series_uid,
                "outcome": "curve" if isinstance(result, ScoreCurve) else str(result),
                "slices": len(claimed.slices),
                "set_aside": len(claimed.set_aside),
                "evidence": str(evidence),
                "pairs": pairs,
            },
        )
        # The receiver reads no data set: its lines name the sender of each association, and this
        # one what they brought.
        self.audit.write(
            Act.SERIES_RECEIVED,
            study_uid=study_uid,
            series_uid=series.series_uid,
            instances=series.received,
            associations=associations,
            became="curve" if isinstance(result, ScoreCurve) else str(result),
        )
        return True


def outcome(session: Session, series_uid: str, claimed: store.Claimed) -> ScoreCurve | Refusal:
    """Return the curve of a Series that was claimed, or the reason why it has none."""
    if claimed.model is None:
        reasons = sorted(claimed.set_aside.values())
        return Refusal(series_uid, Reason(max(reasons, key=reasons.count)))
    return curve.assemble(
        claimed.slices,
        series_uid=series_uid,
        model=claimed.model,
        heights=store.heights_of(session, claimed.model),
        refused=len(claimed.set_aside),
        other_model=claimed.other_model,
    )
