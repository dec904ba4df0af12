"""What the page asks: the newest Series, a patient's Series and offsets."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session, aliased

from db import schema
from dicomnode.model import DeliveryState, Method, PatientKey, SeriesState
from dicomnode.store.answers import with_bundles
from dicomnode.store.identity import of_keys, patient_keys
from dicomnode.store.pairs import offsets_of, trust
from dicomnode.store.rows import stored_offset
from dicomnode.store.values import SeriesRow, StoredOffset

LOOKED_AT = 50_000


def series_by_id(session: Session, ids: Sequence[int]) -> list[SeriesRow]:
    """Return the Series of these ids, in that order."""
    query = select(schema.Series, schema.Curve).outerjoin(schema.Curve)
    rows = session.execute(query.where(schema.Series.id.in_(ids))).all()
    found = {row.series_uid: row for row in with_bundles(session, rows)}
    uids = {s.id: s.series_uid for s, _ in rows}
    return [found[uids[i]] for i in ids if i in uids]


def newest_series(session: Session, limit: int) -> list[SeriesRow]:
    """Return Series that are open, and the newest of the others; those that came last first.

    A few more than `limit` numbers are looked at, whatever the node holds: a Series of long ago
    that was opened again is among them while it is open.
    """
    top = session.scalar(select(func.max(schema.Series.id))) or 0
    query = select(schema.Series, schema.Curve).outerjoin(schema.Curve)
    opened = query.where(schema.Series.state == SeriesState.OPEN)
    opened = opened.order_by(schema.Series.id.desc()).limit(limit)
    newest = query.where(schema.Series.id > top - limit)
    rows = {s.id: (s, c) for s, c in session.execute(opened)}
    rows |= {s.id: (s, c) for s, c in session.execute(newest)}
    found = with_bundles(session, list(rows.values()))
    found.sort(key=lambda row: row.last_arrival_at, reverse=True)
    return sorted(found, key=lambda row: row.state is not SeriesState.OPEN)[:limit]


def arrivals_since(session: Session, since: datetime) -> dict[SeriesState, tuple[int, int]]:
    """Return state -> Series that began to arrive since then, and the Instances of these.

    Of the newest `LOOKED_AT` Series: there is no index by the time of arrival, and no need of one.
    """
    top = session.scalar(select(func.max(schema.Series.id))) or 0
    rows = session.execute(
        select(schema.Series.state, func.count(), func.sum(schema.Series.received))
        .where(schema.Series.id > top - LOOKED_AT, schema.Series.first_arrival_at >= since)
        .group_by(schema.Series.state)
    )
    return {SeriesState(state): (count, int(received)) for state, count, received in rows}


def count_undelivered(session: Session) -> dict[DeliveryState, int]:
    """Return state -> deliveries that wait for somebody or something; not those that are done."""
    waiting = [DeliveryState.WAITING, DeliveryState.FAILED]
    rows = session.execute(
        select(schema.Delivery.state, func.count())
        .where(schema.Delivery.state.in_(waiting))
        .group_by(schema.Delivery.state)
    )
    return {DeliveryState(state): count for state, count in rows}


def pairs_of_study(session: Session, study_uid: str) -> list[StoredOffset]:
    """Return the best offset of each pair of Studies that a Study is in, fixed or moving."""
    asked = [{"fixed_study": study_uid}, {"moving_study": study_uid}]
    best: dict[tuple[str, str], StoredOffset] = {}
    for side in asked:
        for offset in offsets_of(session, method=Method.ROBUST, **side):
            best.setdefault((offset.fixed_study, offset.moving_study), offset)
    return list(best.values())


def times_of_studies(session: Session, study_uids: Iterable[str]) -> dict[str, datetime | None]:
    """Return Study Instance UID -> its time, of those the node knows."""
    rows = session.execute(
        select(schema.Series.study_uid, func.min(schema.Series.study_datetime))
        .where(schema.Series.study_uid.in_(sorted(study_uids)))
        .group_by(schema.Series.study_uid)
    )
    return {study_uid: when for study_uid, when in rows}


def series_of_patient(session: Session, patient: PatientKey, limit: int) -> list[SeriesRow]:
    """Return Series of a patient, those that came last first."""
    query = (
        select(schema.Series, schema.Curve)
        .outerjoin(schema.Curve)
        .where(
            of_keys(schema.Series.patient_id, schema.Series.issuer, patient_keys(session, patient))
        )
        .order_by(schema.Series.id.desc())
        .limit(limit)
    )
    return with_bundles(session, session.execute(query).all())


def pairs_of_patient(
    session: Session, patient: PatientKey, limit: int
) -> tuple[list[StoredOffset], bool]:
    """Return the best offset of each pair of a patient's Studies, and whether that is all.

    `limit` is of pairs of Series that are looked at, the newest, of which two Studies may have
    many. Their `robust` offsets alone are: they come before the others, refused or not.
    """
    fixed, moving = aliased(schema.Series), aliased(schema.Series)
    query = (
        select(
            schema.Offset, fixed.study_uid, fixed.series_uid, moving.study_uid, moving.series_uid
        )
        .join(fixed, fixed.id == schema.Offset.fixed_series_id)
        .join(moving, moving.id == schema.Offset.moving_series_id)
        .where(
            of_keys(fixed.patient_id, fixed.issuer, patient_keys(session, patient)),
            schema.Offset.status.is_not(None),
            schema.Offset.method == Method.ROBUST,
        )
        .order_by(schema.Offset.id.desc())
        .limit(limit + 1)
    )
    rows = session.execute(query).all()
    best: dict[tuple[str, str], StoredOffset] = {}
    for row in rows[:limit]:
        offset = stored_offset(*row)
        pair = (offset.fixed_study, offset.moving_study)
        if pair not in best or trust(offset) < trust(best[pair]):
            best[pair] = offset
    return list(best.values()), len(rows) <= limit
