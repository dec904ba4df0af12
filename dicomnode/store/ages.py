"""How old Studies are, and which one is the newest of its patient."""

from collections.abc import Collection
from datetime import date, datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import PatientKey
from dicomnode.store.identity import patient_keys
from dicomnode.store.pairs import curves_of_keys


def study_times(session: Session, study_uids: Collection[str]) -> dict[str, datetime | None]:
    """Return Study Instance UID -> Study Date and Time, None where the headers told none."""
    series = schema.Series
    rows = session.execute(
        select(series.study_uid, func.max(series.study_datetime))
        .where(series.study_uid.in_(study_uids))
        .group_by(series.study_uid)
    )
    return {uid: when for uid, when in rows}


def newest_studies(session: Session, study_uids: Collection[str]) -> set[str]:
    """Return those Studies than which today's patient has none of a later day with a curve.

    Of a day there may be several: chest and abdomen, one after the other, are both read today.
    """
    series = schema.Series
    query = select(series.study_uid, series.patient_id, series.issuer, series.study_datetime)
    newest: dict[PatientKey, date] = {}
    found: set[str] = set()
    for study_uid, *key_of, when in session.execute(query.where(series.study_uid.in_(study_uids))):
        key = PatientKey(*key_of)
        if key not in newest:
            curves = curves_of_keys(session, patient_keys(session, key))
            newest[key] = max((_day(at) for _, _, at, _ in curves), default=date.min)
        if _day(when) >= newest[key]:
            found.add(study_uid)
    return found


def _day(when: datetime | None) -> date:
    return date.min if when is None else when.date()
