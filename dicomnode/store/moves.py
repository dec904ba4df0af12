"""When a Series goes to another patient or Study: by what most of its Instances say.

A copy from before a correction differs from its Series exactly as a correction does: one archive
sends what it has put right, another one what it never did. What tells them apart is how much says
so, and what the Series was before: see docs/design/0013-who-is-one-patient.md.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, undefer

from db import schema
from dicomnode.errors import StoreUnavailable
from dicomnode.model import PatientKey, SeriesState
from dicomnode.store.identity import hold_identity
from dicomnode.store.pairs import ask_offsets, drop_offsets
from dicomnode.store.retelling import hold_images, retell_pairs, retell_reports
from dicomnode.store.rows import instances
from dicomnode.store.values import SliceResult

# What a header says of the patient as such (PS3.3 C.7.1.1); DICOM keywords.
PATIENT = {"PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"}

# Of which Series it is said: PatientID, issuer, Study Instance UID.
Told = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Heard:
    """What slices say of their Series."""

    speaker: SliceResult | None  # the last sound one that says what holds; None: all say otherwise
    told: Told | None  # where the Series is to go; None: it stays


def hold(session: Session, by_series: Mapping[str, Sequence[SliceResult]]) -> bool:
    """Lock who is one patient, before any row; return whether alone.

    Alone where a slice says another patient or Study than its Series has: it may move it.
    """
    if session.get_bind().dialect.name != "postgresql":
        return True
    rows, uids = schema.Series, sorted(by_series)
    query = select(rows.series_uid, rows.study_uid, rows.patient_id, rows.issuer)
    known = session.execute(query.where(rows.series_uid.in_(uids))).all()
    alone = any(_against(row, by_series[row.series_uid]) for row in known)
    hold_identity(session, exclusive=alone)
    return alone


def hear(
    session: Session,
    series: schema.Series,
    results: Sequence[SliceResult],
    *,
    is_new: bool,
    alone: bool,
) -> Heard:
    """Note what slices say of their Series, a locked row, and return whether it is to move.

    It is once more than half of the Instances that have a score here last said so.

    Raises
    ------
    StoreUnavailable
        If another worker moved or made the Series while this one waited for a lock, and holds it
        shared: the transaction is to be done again.
    """
    if is_new:
        _join(session, series)
    own = _own(series)
    against = _without_late(session, series, _against(series, results))
    if against and not (alone or is_new):
        raise StoreUnavailable("a Series changed its patient meanwhile")
    if against or series.dissent:
        agree = {r.header.sop_instance_uid for r in results if _is_heard(r)} - set(against)
        dissent = {**(series.dissent or {}), **{uid: list(t) for uid, t in against.items()}}
        series.dissent = {uid: t for uid, t in dissent.items() if uid not in agree} or None
    told = None
    if against and not is_new:
        here = _scored(session, series) | {
            r.header.sop_instance_uid for r in results if r.score is not None
        }
        said = ((t[0], t[1], t[2]) for uid, t in (series.dissent or {}).items() if uid in here)
        ((most, count),) = Counter(said).most_common(1)
        told = most if 2 * count > len(here) and most in against.values() else None
    speakers = (r for r in results if r.score is not None and _told(series, r) == (told or own))
    return Heard(next(reversed(list(speakers)), None), told)


def move(session: Session, series: schema.Series, heard: Heard) -> None:
    """Take a Series to where its Instances say, and where the patient changed its Study along.

    Offsets of its pairs are dropped at once: they are between two patients, or within one Study.
    """
    assert heard.told is not None and heard.speaker is not None
    before, study_before = PatientKey(series.patient_id, series.issuer), series.study_uid
    patient_id, issuer, series.study_uid = heard.told
    _rename(series, PatientKey(patient_id, issuer))
    series.study_datetime = heard.speaker.header.study_datetime
    series.moved_along = False
    drop_offsets(session, series.id)
    now = heard.speaker.arrived_at
    if series.study_uid == study_before:
        _move_study(session, series, before, now)
    retell_pairs(session, [study_before, series.study_uid], now)


def _move_study(session: Session, series: schema.Series, before: PatientKey, now: datetime) -> None:
    """Take the other Series of a Study along to the patient that one of them was corrected to.

    A Study has one patient (PS3.3 A.1.2), and an archive may send again what changed alone. Series
    of yet another patient stay: they have the UID of the Study by mistake. So do those that were
    corrected from that very patient before: one that goes back may be a copy of then.
    """
    found = session.scalars(
        select(schema.Series)
        .where(
            schema.Series.study_uid == series.study_uid,
            schema.Series.id != series.id,
            schema.Series.patient_id == before.patient_id,
            schema.Series.issuer == before.issuer,
        )
        .order_by(schema.Series.id)
        .options(undefer(schema.Series.header))
        .with_for_update()
        .execution_options(populate_existing=True)
    ).all()
    others = [o for o in found if [series.patient_id, series.issuer] not in (o.former or [])]
    for other in others:
        _rename(other, PatientKey(series.patient_id, series.issuer))
        if other.header is not None:
            # Else its objects would bear the name of one patient beside the ID of another.
            kept = {k: v for k, v in other.header.items() if k not in PATIENT}
            told = {k: v for k, v in (series.header or {}).items() if k in PATIENT}
            other.header = {**kept, **told}
        other.study_datetime = series.study_datetime
        drop_offsets(session, other.id)
    session.flush()
    for other in others:
        curve = session.get(schema.Curve, other.id)
        if curve is not None and other.state == SeriesState.CURVE:
            ask_offsets(session, other, curve.model)
    along = [other.series_uid for other in others]
    retell_reports(session, along, now)
    sent_on = hold_images(session, along, now)
    for other in others:
        other.moved_along = other.series_uid in sent_on


def _rename(series: schema.Series, patient: PatientKey) -> None:
    """Give a Series another patient, and remember whose it was."""
    before, now = [series.patient_id, series.issuer], [patient.patient_id, patient.issuer]
    if before != now:
        series.former = [key for key in series.former or [] if key not in (before, now)] + [before]
    series.patient_id, series.issuer = now
    series.dissent = None


def _against(series: Any, results: Iterable[SliceResult]) -> dict[str, Told]:
    """Return SOP Instance UID -> what it says, of those that say otherwise than their Series."""
    said = {r.header.sop_instance_uid: _told(series, r) for r in results if _is_heard(r)}
    return {uid: told for uid, told in said.items() if told != _own(series)}


def _join(session: Session, series: schema.Series) -> None:
    """Give a new Series the patient of its Study, where that was corrected from the new one's.

    It was on its way when the correction came, or another archive does not know of that.
    """
    rows, own = schema.Series, [series.patient_id, series.issuer]
    query = select(rows.patient_id, rows.issuer, rows.former).order_by(rows.id)
    mates = session.execute(
        query.where(rows.study_uid == series.study_uid, rows.id != series.id)
    ).all()
    if series.patient_id and own not in [[m.patient_id, m.issuer] for m in mates]:
        for mate in mates:
            if own in (mate.former or []):
                _rename(series, PatientKey(mate.patient_id, mate.issuer))
                series.moved_along = True  # should rules want its images, they name the former one
                return


def _without_late(
    session: Session, series: schema.Series, against: dict[str, Told]
) -> dict[str, Told]:
    """Leave out Instances that were not here yet and say whose their Series was before.

    Who takes a correction back sends again what is here; these are what was still to come.
    """
    former = {(key[0], key[1]) for key in series.former or []}
    late = [uid for uid, told in against.items() if told[:2] in former]
    here = _scored(session, series) if late else set()
    return {uid: told for uid, told in against.items() if uid not in late or uid in here}


def _is_heard(result: SliceResult) -> bool:
    """Whether a slice has a say: a sound one that names a patient, of a sender that is believed."""
    return result.score is not None and result.corrects and result.header.patient.known


def _told(series: Any, result: SliceResult) -> Told:
    header, patient = result.header, result.header.patient
    issuer = patient.issuer
    if patient.patient_id == series.patient_id and (header.issuer_is_default or not issuer):
        issuer = series.issuer  # a sender that does not name the issuer does not take it away
    return patient.patient_id, issuer, header.study_uid


def _own(series: Any) -> Told:
    return series.patient_id, series.issuer, series.study_uid


def _scored(session: Session, series: schema.Series) -> set[str]:
    """SOP Instance UIDs of what has a score here."""
    rows = schema.Slice
    found = set(
        session.scalars(
            select(rows.sop_instance_uid)
            .where(rows.series_id == series.id, rows.score.is_not(None))
            .distinct()
        )
    )
    if series.state != SeriesState.OPEN:
        row = session.get(schema.Curve, series.id)
        found |= {uid for uid, _, _ in instances(row)} if row is not None else set()
    return found
