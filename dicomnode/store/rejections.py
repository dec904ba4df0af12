"""Rejection notes: what they name is hidden, and the Series it belongs to is finished anew."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import Reason, Rejection, SeriesState
from dicomnode.store.hidden import lock_rejections, rejected_of
from dicomnode.store.identity import hold_identity
from dicomnode.store.intake import drop_curve, frame_of_key, reopen
from dicomnode.store.retelling import retell_pairs
from dicomnode.store.rows import instances
from dicomnode.store.session import insert_new, upsert


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a rejection note did here."""

    instances: int  # that it hid, of those that are here
    series: tuple[str, ...]  # Series Instance UIDs that are finished anew without them


def record_rejection(
    session: Session, note: Rejection, association_id: str, arrived_at: datetime
) -> Hidden:
    """Remember what a note rejects, and hide what of it is here; a repeat changes nothing.

    Curve and offsets of a Series that shows something of it are dropped at once; the Series is
    open again until the association that brought the note has ended, and is finished without.
    What is not here yet is hidden when it comes: see `hidden.without_rejected`.
    """
    lock_rejections(session, notes=True)
    # Alone, since slices of the same transaction may move a Series to another patient: two that
    # hold it shared and both want it alone would wait for each other.
    hold_identity(session, exclusive=True)
    rows = [
        {
            "sop_instance_uid": uid,
            "note_uid": note.sop_instance_uid,
            "code": note.code,
            "rejected_at": arrived_at,
            "restored_at": None,
        }
        for uid in sorted(note.instances)
    ]
    insert_new(session, schema.Rejection, rows)
    hidden = rejected_of(session, note.instances)
    touched: list[str] = []
    count = 0
    for series_id in _candidates(session, note):
        found = _hide(session, series_id, hidden, association_id, arrived_at)
        if found is not None:
            touched.append(found[0])
            count += found[1]
    return Hidden(count, tuple(touched))


def count_rejected(session: Session) -> dict[str, int]:
    """Return document title (DCM) -> Instances that notes of it hide now, here or not."""
    rows = session.execute(
        select(schema.Rejection.code, func.count(schema.Rejection.sop_instance_uid.distinct()))
        .where(schema.Rejection.restored_at.is_(None))
        .group_by(schema.Rejection.code)
    )
    return {code: count for code, count in rows}


def _candidates(session: Session, note: Rejection) -> list[int]:
    """The Series in which its Instances may be: those it names, and all of the Studies it names.

    A content item names no Series, and an archive may have moved Instances to another one.
    """
    studies = sorted(note.studies | {note.study_uid})
    found: dict[str, int] = {}
    for column, uids in (
        (schema.Series.series_uid, sorted(note.series)),
        (schema.Series.study_uid, studies),
    ):
        for start in range(0, len(uids), 10_000):
            query = select(schema.Series.series_uid, schema.Series.id)
            rows = session.execute(query.where(column.in_(uids[start : start + 10_000])))
            found |= {uid: id_ for uid, id_ in rows}
    return [found[uid] for uid in sorted(found)]  # one order, so that two workers cannot deadlock


def _hide(
    session: Session, series_id: int, hidden: set[str], association_id: str, arrived_at: datetime
) -> tuple[str, int] | None:
    """Hide Instances of one Series; return its UID and how many that were, None where none."""
    series = session.scalars(
        select(schema.Series)
        .where(schema.Series.id == series_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()
    shown = {uid for uid, reason in _members(session, series) if reason != Reason.REJECTED}
    found = sorted(shown & hidden)
    if not found:
        return None
    if series.state != SeriesState.OPEN:
        reopen(session, series)
    if drop_curve(session, series.id):
        retell_pairs(session, [series.study_uid], arrived_at)
    for start in range(0, len(found), 10_000):
        session.execute(
            update(schema.Slice)
            .where(
                schema.Slice.series_id == series.id,
                schema.Slice.sop_instance_uid.in_(found[start : start + 10_000]),
            )
            .values(_NOTHING | {"reason": Reason.REJECTED}),
            execution_options={"synchronize_session": False},
        )
    values = {
        "series_id": series.id,
        "association_id": association_id,
        "last_at": arrived_at,
        "ended": None,
    }
    upsert(session, schema.Arrival, [values])
    session.expire_all()
    return series.series_uid, len(found)


_NOTHING = dict.fromkeys(
    (
        "model",
        "score",
        "image_position",
        "image_orientation",
        "body_centre",
        "acquisition",
        "preview",
    )
)


def _members(session: Session, series: schema.Series) -> list[tuple[str, str | None]]:
    """SOP Instance UID of each Frame, and why it was set aside; None where it was not."""
    query = select(schema.Slice.sop_instance_uid, schema.Slice.reason)
    rows = session.execute(query.where(schema.Slice.series_id == series.id))
    found = [(uid, reason) for uid, reason in rows]
    if series.state == SeriesState.OPEN:
        return found
    found += [(frame_of_key(key)[0], reason) for key, reason in series.set_aside.items()]
    row = session.get(schema.Curve, series.id)
    if row is not None:
        found += [(uid, None) for uid, _, _ in instances(row)]
    return found
