"""What the page asks: Series by number, a patient's Series and offsets, who has a Patient ID."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from db import schema
from dicomnode.model import Method, PatientKey
from dicomnode.store.answers import with_bundles
from dicomnode.store.pairs import trust
from dicomnode.store.rows import stored_offset
from dicomnode.store.values import SeriesRow, StoredOffset


def series_by_id(session: Session, ids: Sequence[int]) -> list[SeriesRow]:
    """Return the Series of these ids, in that order."""
    query = select(schema.Series, schema.Curve).outerjoin(schema.Curve)
    rows = session.execute(query.where(schema.Series.id.in_(ids))).all()
    found = {row.series_uid: row for row in with_bundles(session, rows)}
    uids = {s.id: s.series_uid for s, _ in rows}
    return [found[uids[i]] for i in ids if i in uids]


def issuers_of(session: Session, patient_id: str) -> list[str]:
    """Return the issuers under which a Patient ID is known here."""
    query = select(schema.Series.issuer).where(schema.Series.patient_id == patient_id)
    return sorted(session.scalars(query.distinct()))


def series_of_patient(session: Session, patient: PatientKey, limit: int) -> list[SeriesRow]:
    """Return Series of a patient, those that came last first."""
    query = (
        select(schema.Series, schema.Curve)
        .outerjoin(schema.Curve)
        .where(
            schema.Series.patient_id == patient.patient_id, schema.Series.issuer == patient.issuer
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
            fixed.patient_id == patient.patient_id,
            fixed.issuer == patient.issuer,
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
