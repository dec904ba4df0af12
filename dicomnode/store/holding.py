"""Held pixels: by whom they are still wanted, and whose they are to be."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import DeliveryKind, DeliveryState, PatientKey, ScoredSlice, SeriesState
from dicomnode.store.identity import patient_keys
from dicomnode.store.intake import claimed_slices
from dicomnode.store.rows import instances

# SQLite takes 32,766 parameters in a statement.
_MANY = 1000


@dataclass(frozen=True, slots=True)
class Forward:
    """A delivery of a Series itself that is not over."""

    rule: str
    state: DeliveryState  # waiting or failed
    due_at: datetime  # of the next attempt; of one that was given up, when that was


@dataclass(frozen=True, slots=True)
class Wanting:
    """What may still want the pixels of a Series."""

    state: SeriesState
    forwards: tuple[Forward, ...] = ()


@dataclass(frozen=True, slots=True)
class Whose:
    """The Study of a Series, and every patient key of its patient as of today."""

    study_uid: str
    patients: frozenset[PatientKey]

    def has(self, study_uid: str, patient: PatientKey) -> bool:
        """Whether an image that says this is of that Study and patient.

        One that does not name the issuer may have got one when it came: its ID tells.
        """
        if study_uid != self.study_uid:
            return False
        if patient.issuer:
            return patient in self.patients
        return any(patient.patient_id == known.patient_id for known in self.patients)


def whose(session: Session, series_uid: str) -> Whose | None:
    """Return whose a Series is now, None where it is not known."""
    query = select(schema.Series.study_uid, schema.Series.patient_id, schema.Series.issuer)
    row = session.execute(query.where(schema.Series.series_uid == series_uid)).one_or_none()
    if row is None:
        return None
    keys = patient_keys(session, PatientKey(row.patient_id, row.issuer))
    return Whose(row.study_uid, frozenset(keys))


def delivered_of_study(session: Session, study_uid: str, destination: str) -> dict[str, int]:
    """Return Series Instance UID -> id of those of a Study that a destination got as they came."""
    rows = session.execute(
        select(schema.Series.series_uid, schema.Series.id)
        .join(schema.Delivery, schema.Delivery.subject == schema.Series.series_uid)
        .where(
            schema.Series.study_uid == study_uid,
            schema.Delivery.kind == DeliveryKind.FORWARD,
            schema.Delivery.destination == destination,
            schema.Delivery.sop_instance_uid.is_not(None),
        )
        .distinct()
    )
    return {uid: id_ for uid, id_ in rows}


def have_any(
    session: Session, series_ids: Collection[int], sop_instance_uids: frozenset[str]
) -> bool:
    """Whether the curve of one of these Series is made of one of these Instances, or more."""
    curves = session.scalars(select(schema.Curve).where(schema.Curve.series_id.in_(series_ids)))
    return any(
        not sop_instance_uids.isdisjoint(uid for uid, _, _ in instances(curve)) for curve in curves
    )


def wanting(session: Session, series_uids: Sequence[str]) -> dict[str, Wanting]:
    """Return Series Instance UID -> what may want its pixels; unknown Series are left out."""
    found: dict[str, Wanting] = {}
    for start in range(0, len(series_uids), _MANY):
        some = series_uids[start : start + _MANY]
        # In this order: a Series that is seen as finished was asked for before, if at all.
        series = select(schema.Series.series_uid, schema.Series.state)
        states = session.execute(series.where(schema.Series.series_uid.in_(some))).all()
        forwards: dict[str, list[Forward]] = {}
        rows = session.execute(
            select(
                schema.Delivery.subject,
                schema.Delivery.rule,
                schema.Delivery.state,
                schema.Delivery.due_at,
            ).where(
                schema.Delivery.subject.in_(some),
                schema.Delivery.kind == DeliveryKind.FORWARD,
                schema.Delivery.state.in_((DeliveryState.WAITING, DeliveryState.FAILED)),
            )
        )
        for uid, rule, state, due_at in rows:
            forwards.setdefault(uid, []).append(Forward(rule, DeliveryState(state), due_at))
        for uid, state in states:
            found[uid] = Wanting(SeriesState(state), tuple(forwards.get(uid, ())))
    return found


def slices_beside(session: Session, series_id: int) -> tuple[ScoredSlice, ...]:
    """Return scored slices of a finished Series that are in no curve: second ones at a position."""
    return claimed_slices(session, series_id).slices
