"""Curves of another bundle: which there are, their kept inputs, and their scores exchanged."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import Evidence, Reason, SeriesState
from dicomnode.store.identity import hold_identity
from dicomnode.store.intake import claimed_slices, reopen
from dicomnode.store.previews import read_previews
from dicomnode.store.rows import instances
from dicomnode.store.values import Claimed, KeptInputs, StaleSeries


def count_stale(session: Session, model: str) -> int:
    """Return how many curves another bundle scored."""
    query = select(func.count()).select_from(schema.Curve)
    return session.scalar(query.where(schema.Curve.model.in_(_others(session, model)))) or 0


def stale_series(session: Session, model: str, series_uid: str | None = None) -> list[StaleSeries]:
    """Return finished Series that bundles other than `model` scored, in part or whole.

    Of Series that have a curve by `model`, or none at all, only those are given whose other
    slices have their inputs: they may still come into a curve.
    """
    others = _others(session, model)
    curves = (
        select(
            schema.Series.id,
            schema.Series.series_uid,
            schema.Curve.model,
            schema.Curve.count,
            func.coalesce(schema.Preview.count, 0),
        )
        .join(schema.Curve, schema.Curve.series_id == schema.Series.id)
        .outerjoin(schema.Preview, schema.Preview.series_id == schema.Series.id)
        .where(schema.Series.state == SeriesState.CURVE, schema.Curve.model.in_(others))
    )
    slices = (
        select(
            schema.Series.id,
            schema.Series.series_uid,
            schema.Slice.model,
            func.count(),
            func.count(schema.Slice.preview),
        )
        .join(schema.Slice, schema.Slice.series_id == schema.Series.id)
        .where(schema.Series.state != SeriesState.OPEN, schema.Slice.model.in_(others))
        .group_by(schema.Series.id, schema.Series.series_uid, schema.Slice.model)
    )
    if series_uid is not None:
        curves = curves.where(schema.Series.series_uid == series_uid)
        slices = slices.where(schema.Series.series_uid == series_uid)
    with_curve = session.execute(curves).all()
    models: dict[tuple[int, str], set[str]] = defaultdict(set)
    missing: Counter[tuple[int, str]] = Counter()
    for id_, uid, other, count, kept in [*with_curve, *session.execute(slices)]:
        models[id_, uid].add(str(other))
        missing[id_, uid] += count - kept
    needed = {id_ for id_, *_ in with_curve}
    return [
        StaleSeries(id_, uid, frozenset(of), missing[id_, uid] == 0)
        for (id_, uid), of in sorted(models.items())
        if id_ in needed or missing[id_, uid] == 0
    ]


def kept_inputs(session: Session, series_id: int, model: str) -> KeptInputs | None:
    """Return the inputs of a finished Series that bundles other than `model` scored.

    None where it is open again, or an input is not kept any more.
    """
    series = session.get(schema.Series, series_id)
    if series is None or series.state == SeriesState.OPEN or series.evidence is None:
        return None
    found: list[tuple[tuple[str, int], bytes | None]] = []
    curve = session.get(schema.Curve, series_id)
    if curve is not None and curve.model != model:
        previews = read_previews(session, series_id)
        if previews is None:
            return None
        members = ((uid, frame) for uid, frame, _ in instances(curve))
        found += zip(members, previews, strict=True)
    rows = session.execute(
        select(schema.Slice.sop_instance_uid, schema.Slice.frame, schema.Slice.preview).where(
            schema.Slice.series_id == series_id,
            schema.Slice.model != model,
            schema.Slice.score.is_not(None),
        )
    )
    found += [((uid, frame), preview) for uid, frame, preview in rows]
    inputs = [preview for _, preview in found if preview is not None]
    if not found or len(inputs) < len(found):
        return None
    slices = tuple(key for key, _ in found)
    return KeptInputs(series_id, series.revision, Evidence(series.evidence), slices, tuple(inputs))


def exchange_scores(
    session: Session, kept: KeptInputs, model: str, scores: Mapping[tuple[str, int], float]
) -> Claimed | None:
    """Lock a finished Series, reopen it under new scores, and return its slices.

    To be finished within the same transaction. A slice whose new score is no number is set aside,
    without its input. None where the Series changed since `kept` was
    read: it is then left as it is.
    """
    hold_identity(session)  # before the row is locked: its pairs are asked for anew
    series = session.scalar(
        select(schema.Series)
        .where(schema.Series.id == kept.series_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if series is None or series.state == SeriesState.OPEN or series.revision != kept.revision:
        return None
    reopen(session, series)
    rows = session.scalars(select(schema.Slice).where(schema.Slice.series_id == series.id))
    for row in rows:
        if (row.sop_instance_uid, row.frame) in scores:
            score = scores[row.sop_instance_uid, row.frame]
            if math.isfinite(score):
                row.model, row.score = model, score
            else:
                row.model = row.score = row.preview = None
                row.reason = Reason.NO_SCORE
    session.flush()
    return claimed_slices(session, series.id)


def _others(session: Session, model: str) -> list[str]:
    return list(session.scalars(select(schema.Model.digest).where(schema.Model.digest != model)))
