"""Questions shared by CLI, REST and page: read only, answered from the database."""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.core import align
from dicomnode.model import Method, ScoreCurve, ScoredSlice, SeriesState
from dicomnode.store import SeriesRow, StoredOffset


@dataclass(frozen=True, slots=True)
class SeriesCurve:
    """A Series with its curve, or with the slices scored so far where it is still open."""

    series: SeriesRow
    curve: ScoreCurve | None
    live: tuple[ScoredSlice, ...] = ()


def series_curve(engine: Engine, series_uid: str) -> SeriesCurve | None:
    """Return a Series and its curve, None where the node never saw it."""
    with store.reading(engine) as session:
        rows = store.list_series(session, series_uid=series_uid)
        if not rows:
            return None
        live = store.open_slices(session, series_uid) if rows[0].state is SeriesState.OPEN else []
        return SeriesCurve(rows[0], store.curve_of(session, series_uid), tuple(live))


@dataclass(frozen=True, slots=True)
class PairAnswer:
    """The best offset of a study pair, with the two curves it aligns."""

    stored: StoredOffset
    fixed: ScoreCurve
    moving: ScoreCurve


def pair(
    engine: Engine, fixed_study: str, moving_study: str, method: Method | None = None
) -> PairAnswer | None:
    """Return the most trustworthy offset of moving onto fixed, None where there is no pair.

    Pairs of one patient are stored with the newer study fixed. Any other pair, or the same
    one the other way round, is computed here from its stored curves.
    """
    with store.reading(engine) as session:
        offsets = store.offsets_of(
            session, fixed_study=fixed_study, moving_study=moving_study, method=method
        )
        studies = {
            row.series_uid: study
            for study in (fixed_study, moving_study)
            for row in store.list_series(session, study_uid=study, state=SeriesState.CURVE)
        }
        curves = store.curves_of(session, studies)
    offsets = [o for o in offsets if o.fixed_series in curves and o.moving_series in curves]
    if not offsets:
        offsets = _compute(curves, studies, fixed_study, moving_study, method)
    if not offsets:
        return None
    best = offsets[0]
    return PairAnswer(best, curves[best.fixed_series], curves[best.moving_series])


def _compute(
    curves: dict[str, ScoreCurve],
    studies: dict[str, str],
    fixed_study: str,
    moving_study: str,
    method: Method | None,
) -> list[StoredOffset]:
    found = []
    for f in (uid for uid in curves if studies[uid] == fixed_study):
        for m in (uid for uid in curves if studies[uid] == moving_study and uid != f):
            if curves[f].model != curves[m].model:
                continue
            start = datetime.now(UTC)
            offset = align.align(curves[f], curves[m], method or Method.L1)
            now = datetime.now(UTC)
            found.append(
                StoredOffset(
                    offset=offset,
                    fixed_study=fixed_study,
                    fixed_series=f,
                    moving_study=moving_study,
                    moving_series=m,
                    model=curves[f].model,
                    computed_at=now,
                    seconds=(now - start).total_seconds(),
                )
            )
    return sorted(found, key=store.trust)
