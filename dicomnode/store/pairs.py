"""Offsets: which pairs wait for one, and what was found."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, exists, func, select, update
from sqlalchemy.orm import Session, aliased

from db import schema
from dicomnode.core import robust
from dicomnode.model import Method, Offset, OffsetStatus, PatientKey, SeriesState
from dicomnode.store.rows import stored_offset
from dicomnode.store.values import FoundPair, PendingOffset, StoredOffset

OTHER_BUNDLE = "scored by different bundles"


def ask_offsets(session: Session, series: schema.Series, model: str) -> int:
    """Write the work that a new curve brings: every curve of the patient's other studies."""
    if not PatientKey(series.patient_id, series.issuer).known:
        return 0
    if session.get_bind().dialect.name == "postgresql":
        # Two workers that finish two studies of one patient at once would each not see the
        # other's curve yet. SQLite has one writer at a time.
        key = f"{series.issuer}\\{series.patient_id}"
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(key, 0))))
    rows = session.execute(
        select(schema.Series, schema.Series.state, schema.Curve.model)
        .join(schema.Curve)
        .where(
            schema.Series.patient_id == series.patient_id,
            schema.Series.issuer == series.issuer,
            schema.Series.study_uid != series.study_uid,
        )
    ).all()
    # Here and not in the query: SQLite, asked for patient and state, looks through the index of
    # states, which is every curve of the node (160 ms for a million Series).
    others = [
        (other, other_model) for other, state, other_model in rows if state == SeriesState.CURVE
    ]
    now = series.finished_at
    refused = {"status": OffsetStatus.REFUSED, "reason": OTHER_BUNDLE, "computed_at": now}
    for other, other_model in others:
        # Both time directions: whichever study is newer is fixed, however late the prior came.
        fixed, moving = sorted((series, other), key=_age, reverse=True)
        for method in Method:
            session.add(
                schema.Offset(
                    fixed_series_id=fixed.id,
                    moving_series_id=moving.id,
                    method=method,
                    model=model,
                    **({} if other_model == model else refused),
                )
            )
    return sum(other_model == model for _, other_model in others)


def _age(series: schema.Series) -> tuple[datetime, str]:
    return series.study_datetime or datetime.min, series.study_uid


def pending_offsets(session: Session, limit: int) -> list[PendingOffset]:
    """Return pairs that wait for an offset, oldest first."""
    fixed, moving = aliased(schema.Series), aliased(schema.Series)
    rows = session.execute(
        select(
            schema.Offset.id,
            schema.Offset.method,
            fixed.series_uid,
            moving.series_uid,
            fixed.revision,
            moving.revision,
        )
        .join(fixed, fixed.id == schema.Offset.fixed_series_id)
        .join(moving, moving.id == schema.Offset.moving_series_id)
        .where(schema.Offset.status.is_(None))
        .order_by(schema.Offset.id)
        .limit(limit)
    )
    return [PendingOffset(i, Method(m), f, v, fr, vr) for i, m, f, v, fr, vr in rows]


def store_offsets(
    session: Session, found: Sequence[tuple[PendingOffset, Offset, float]], now: datetime
) -> None:
    """Store offsets and the seconds that each took, but for curves that were revised meanwhile.

    Those wait, to be computed from the curves of today.
    """
    if not found:
        return
    rows = [
        {
            "offset_id": pending.id,
            "fixed_uid": pending.fixed_series,
            "fixed_at": pending.fixed_revision,
            "moving_uid": pending.moving_series,
            "moving_at": pending.moving_revision,
            "status": offset.status,
            "offset_mm": offset.offset_mm,
            "overlap_mm": offset.overlap_mm,
            "sigma_mm": offset.sigma_mm,
            "dx_mm": offset.dx_mm,
            "dy_mm": offset.dy_mm,
            "reason": offset.reason,
            "computed_at": now,
            "seconds": seconds,
        }
        for pending, offset, seconds in found
    ]
    session.connection().execute(_STORE, rows)


def _unrevised(series_id: Any, name: str) -> Any:
    series = aliased(schema.Series)
    return exists().where(
        series.id == series_id,
        series.series_uid == bindparam(f"{name}_uid"),
        series.revision == bindparam(f"{name}_at"),
    )


# A revision deletes the rows of its pairs with its curve: on Postgres this waits for it, and then
# finds nothing to store.
_STORE = (
    update(schema.Offset)
    .where(
        schema.Offset.id == bindparam("offset_id"),
        _unrevised(schema.Offset.fixed_series_id, "fixed"),
        _unrevised(schema.Offset.moving_series_id, "moving"),
    )
    .values(
        {
            name: bindparam(name)
            for name in (
                "status",
                "offset_mm",
                "overlap_mm",
                "sigma_mm",
                "dx_mm",
                "dy_mm",
                "reason",
                "computed_at",
                "seconds",
            )
        }
    )
)


def offsets_of(
    session: Session,
    *,
    fixed_study: str | None = None,
    moving_study: str | None = None,
    method: Method | None = None,
) -> list[StoredOffset]:
    """Return stored offsets of a study pair, most trustworthy first.

    See `trust`.
    """
    fixed, moving = aliased(schema.Series), aliased(schema.Series)
    query = (
        select(
            schema.Offset, fixed.study_uid, fixed.series_uid, moving.study_uid, moving.series_uid
        )
        .join(fixed, fixed.id == schema.Offset.fixed_series_id)
        .join(moving, moving.id == schema.Offset.moving_series_id)
        .where(schema.Offset.status.is_not(None))
    )
    for column, value in (
        (fixed.study_uid, fixed_study),
        (moving.study_uid, moving_study),
        (schema.Offset.method, method),
    ):
        if value is not None:
            query = query.where(column == value)
    found = [stored_offset(*row) for row in session.execute(query)]
    return sorted(found, key=trust)


def pairs_of_fixed(session: Session, series_ids: Sequence[int]) -> list[FoundPair]:
    """Return stored offsets of every pair in which one of these Series is the fixed one."""
    fixed, moving = aliased(schema.Series), aliased(schema.Series)
    rows = session.execute(
        select(schema.Offset, fixed, moving.study_uid, moving.series_uid)
        .join(fixed, fixed.id == schema.Offset.fixed_series_id)
        .join(moving, moving.id == schema.Offset.moving_series_id)
        .where(schema.Offset.fixed_series_id.in_(series_ids), schema.Offset.status.is_not(None))
        .order_by(fixed.id, moving.id, schema.Offset.method)
    )
    return [
        FoundPair(
            PatientKey(f.patient_id, f.issuer),
            stored_offset(row, f.study_uid, f.series_uid, study, series),
        )
        for row, f, study, series in rows
    ]


def trust(stored: StoredOffset) -> tuple[int, int, int, float]:
    """Sort key of offsets, most trustworthy first.

    A robust answer comes before those of the paper's methods, a robust refusal too: it knows
    that theirs is a guess, unless its bundle never told it how curves err. Then `ok` before
    `extrapolated` before `refused`, l1 before fast, the longer overlap.
    """
    o = stored.offset
    knows = o.method is Method.ROBUST and o.reason != robust.NO_COVARIANCE
    return (
        0 if knows else 1,
        list(OffsetStatus).index(o.status),
        [Method.L1, Method.FAST, Method.ROBUST].index(o.method),
        -(o.overlap_mm or 0.0),
    )
