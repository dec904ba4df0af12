"""Offsets: which pairs wait for one, and what was found."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Select,
    and_,
    bindparam,
    case,
    collate,
    delete,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session, aliased

from db import schema
from dicomnode.core import robust
from dicomnode.model import Method, Offset, OffsetStatus, PatientKey, SeriesState
from dicomnode.store.identity import group_of, hold_identity, members_of, of_keys
from dicomnode.store.rows import stored_offset
from dicomnode.store.session import insert, insert_new
from dicomnode.store.values import FoundPair, PendingOffset, StoredOffset

OTHER_BUNDLE = "scored by different bundles"


def ask_offsets(session: Session, series: schema.Series, model: str) -> int:
    """Write the work that a new curve brings: every curve of the patient's other studies."""
    key = PatientKey(series.patient_id, series.issuer)
    if not key.known:
        return 0
    hold_identity(session)
    group = group_of(session, key)
    if session.get_bind().dialect.name == "postgresql":
        # Two workers that finish two studies of one patient at once would each not see the
        # other's curve yet. SQLite has one writer at a time.
        name = f"{series.issuer}\\{series.patient_id}" if group is None else f"\\{group}\\"
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
    keys = [key] if group is None else members_of(session, group)
    rows: list[dict[str, Any]] = []
    waiting = 0
    for other, study, when, other_model in curves_of_keys(session, keys):
        if study == series.study_uid:
            continue
        # Both time directions: whichever study is newer is fixed, however late the prior came.
        own = _age(series.study_datetime, series.study_uid), series.id
        (_, moving), (_, fixed) = sorted((own, (_age(when, study), other)))
        refused = other_model != model
        waiting += not refused
        rows += [
            {
                "fixed_series_id": fixed,
                "moving_series_id": moving,
                "method": method,
                "model": model,
                "status": OffsetStatus.REFUSED if refused else None,
                "reason": OTHER_BUNDLE if refused else None,
                "computed_at": series.finished_at if refused else None,
            }
            for method in Method
        ]
    insert_new(session, schema.Offset, rows)
    return waiting


def ask_offsets_between(
    session: Session, ours: Sequence[PatientKey], theirs: Sequence[PatientKey], now: datetime
) -> int:
    """Write the work that one patient of two brings: every curve of one with those of the other."""
    mine, others = curves_of_keys(session, ours), curves_of_keys(session, theirs)
    counts = Counter((study, model) for _, study, _, model in others)
    models = Counter(model for *_, model in others)
    waiting = sum(models[model] - counts[study, model] for _, study, _, model in mine)
    if mine and others:
        # By the database itself: two patients of 500 Series each are 750,000 rows.
        for method in Method:
            session.execute(_insert_between(session, ours, theirs, method, now))
    return waiting


def drop_offsets_between(
    session: Session, ours: Sequence[PatientKey], theirs: Sequence[PatientKey]
) -> int:
    """Delete every offset between two patients, and return how many pairs of Series had some."""
    dropped = 0
    for fixed, moving in ((ours, theirs), (theirs, ours)):
        result = session.execute(
            delete(schema.Offset)
            .where(
                schema.Offset.fixed_series_id.in_(series_of_keys(fixed, schema.Series.id)),
                schema.Offset.moving_series_id.in_(series_of_keys(moving, schema.Series.id)),
            )
            .execution_options(synchronize_session=False)
        )
        dropped += result.rowcount  # type: ignore[attr-defined]  # a CursorResult
    return dropped // len(Method)


def series_of_keys(keys: Sequence[PatientKey], column: Any) -> Select[Any]:
    """Return the query for a column of the Series of a patient, whatever their state."""
    return select(column).where(of_keys(schema.Series.patient_id, schema.Series.issuer, keys))


def _insert_between(
    session: Session,
    ours: Sequence[PatientKey],
    theirs: Sequence[PatientKey],
    method: Method,
    now: datetime,
) -> Any:
    """Return the statement that pairs all curves of one patient with all of another."""
    one, other = aliased(schema.Series), aliased(schema.Series)
    its, others = aliased(schema.Curve), aliased(schema.Curve)
    # As Python compares: UIDs by their characters, whatever the locale of the database.
    locale = "C" if session.get_bind().dialect.name == "postgresql" else "BINARY"
    undated = datetime.min
    at, other_at = (func.coalesce(s.study_datetime, undated) for s in (one, other))
    is_newer = or_(
        at > other_at,
        and_(at == other_at, collate(one.study_uid, locale) > collate(other.study_uid, locale)),
    )
    alike = its.model == others.model
    columns = {
        "fixed_series_id": case((is_newer, one.id), else_=other.id),
        "moving_series_id": case((is_newer, other.id), else_=one.id),
        "method": literal(str(method)),
        "model": its.model,
        "status": case((alike, null()), else_=literal(str(OffsetStatus.REFUSED))),
        "reason": case((alike, null()), else_=literal(OTHER_BUNDLE)),
        "computed_at": case((alike, null()), else_=literal(now, schema.UTCDateTime())),
    }
    query = (
        select(*columns.values())
        .select_from(one)
        .join(its, its.series_id == one.id)
        .join(other, other.study_uid != one.study_uid)
        .join(others, others.series_id == other.id)
        .where(
            of_keys(one.patient_id, one.issuer, ours),
            of_keys(other.patient_id, other.issuer, theirs),
            # Joined to nothing, so that no index of it is taken: see `curves_of_keys`.
            *((s.state + "") == str(SeriesState.CURVE) for s in (one, other)),
        )
    )
    new = insert(session, schema.Offset).from_select(list(columns), query)
    return new.on_conflict_do_nothing()


def curves_of_keys(
    session: Session, keys: Sequence[PatientKey]
) -> list[tuple[int, str, datetime | None, str]]:
    """Return Series, Study, its time and bundle of each finished curve of a patient."""
    series = schema.Series
    query = (
        select(series.id, series.study_uid, series.study_datetime, schema.Curve.model, series.state)
        .join(schema.Curve, schema.Curve.series_id == series.id)
        .where(of_keys(series.patient_id, series.issuer, keys))
        .order_by(series.id)
    )
    # The state here and not in the query: SQLite, asked for both, looks through the index of
    # states, which is every curve of the node (160 ms for a million Series).
    return [
        (id_, study, when, model)
        for id_, study, when, model, state in session.execute(query)
        if state == SeriesState.CURVE
    ]


def _age(when: datetime | None, study_uid: str) -> tuple[datetime, str]:
    return when or datetime.min, study_uid


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


def drop_offsets(session: Session, series_id: int) -> None:
    """Drop the offsets of all pairs of a Series."""
    offsets = schema.Offset
    session.execute(
        delete(offsets).where(
            or_(offsets.fixed_series_id == series_id, offsets.moving_series_id == series_id)
        )
    )


def store_offsets(
    session: Session, found: Sequence[tuple[PendingOffset, Offset, float]], now: datetime
) -> None:
    """Store offsets and the seconds that each took, but for curves that were revised meanwhile.

    Those wait, to be computed from the curves of today.
    """
    if not found:
        return
    hold_identity(session)
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
