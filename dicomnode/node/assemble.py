"""Finishes each Series on evidence that it is complete.

Reads slice rows, writes the curve together with the pairs that follow from it.
"""

import logging
from datetime import datetime, timedelta

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.core import curve
from dicomnode.model import Evidence, Reason, Refusal, ScoreCurve, ScoredSlice
from dicomnode.weights import Bundle

logger = logging.getLogger(__name__)


class AssembleStage:
    """Finishes what is complete, one transaction a Series."""

    def __init__(
        self, engine: Engine, bundle: Bundle, quiet_seconds: float, lost_seconds: float
    ) -> None:
        self.engine, self.bundle = engine, bundle
        self.quiet = timedelta(seconds=quiet_seconds)
        self.lost = timedelta(seconds=lost_seconds)

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
            if not store.open_series(session):
                return 0
        with store.writing(self.engine) as session:
            store.end_lost_associations(session, horizon - self.lost)
            waiting = store.open_series(session)
        finished = 0
        for series in waiting:
            evidence = store.next_completion(series, horizon, self.quiet)
            if evidence is not None:
                finished += self._finish(series, evidence, now)
        return finished

    def _finish(self, series: store.OpenSeries, evidence: Evidence, now: datetime) -> bool:
        with store.writing(self.engine) as session:
            slices = store.claim_series(session, series.id)
            if slices is None:
                return False
            aside = store.set_aside(session, series.id)
            outcome = self._outcome(series.series_uid, slices, aside)
            pairs = store.finish_series(session, series.id, outcome, slices, aside, evidence, now)
        logger.info(
            "series finished",
            extra={
                "series_uid": series.series_uid,
                "outcome": "curve" if isinstance(outcome, ScoreCurve) else str(outcome),
                "slices": len(slices),
                "set_aside": len(aside),
                "evidence": str(evidence),
                "pairs": pairs,
            },
        )
        return True

    def _outcome(
        self, series_uid: str, slices: list[ScoredSlice], aside: dict[str, str]
    ) -> ScoreCurve | Refusal:
        if not slices:
            reasons = sorted(aside.values())
            return Refusal(series_uid, Reason(max(reasons, key=reasons.count)))
        return curve.assemble(
            slices,
            series_uid=series_uid,
            model=self.bundle.digest,
            heights=self.bundle.heights,
            refused=len(aside),
        )
