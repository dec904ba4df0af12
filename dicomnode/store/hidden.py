"""Which Instances a rejection note hides."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.core.admission import EXPIRED
from dicomnode.model import Reason
from dicomnode.store.values import SliceResult

# Any number will do, as long as it stays: it names the lock between slices and notes.
LOCK = 0x72_65_6A_65_63_74  # "reject"


def lock_rejections(session: Session, *, notes: bool) -> None:
    """Keep slices and notes of two workers apart until this transaction ends.

    Either of them would not see what the other is about to store: a slice of a Series that is
    new would escape its note. Slices do not wait for slices. SQLite has one writer at a time.
    """
    if session.get_bind().dialect.name == "postgresql":
        lock = func.pg_advisory_xact_lock if notes else func.pg_advisory_xact_lock_shared
        session.execute(select(lock(LOCK)))


def rejected_of(session: Session, sop_instance_uids: Iterable[str]) -> set[str]:
    """Return which of these Instances are hidden."""
    return {row.sop_instance_uid for row in _in_force(session, sop_instance_uids)}


def rejections_of(session: Session, sop_instance_uids: Iterable[str]) -> dict[str, set[str]]:
    """Return Instance -> document titles (DCM) of the notes that hide it, of those that are."""
    found: dict[str, set[str]] = {}
    for row in _in_force(session, sop_instance_uids):
        found.setdefault(row.sop_instance_uid, set()).add(row.code)
    return found


def without_rejected(session: Session, results: Sequence[SliceResult]) -> list[SliceResult]:
    """Return slices as they are to be stored: those of rejected Instances without a score.

    What was rejected stays hidden however often it is sent again. Only where its time was over in
    the archive (Data Retention Policy Expired) does an Instance that is sent after the note count
    as new: the rejection is then no longer in force.

    References
    ----------
    IHE RAD TF-3 4.66.4.2.3.1, 4.66.4.3.3 ("shall not accept subsequent occurrence"), 4.66.4.4.3.
    """
    lock_rejections(session, notes=False)
    rows = _in_force(session, {r.header.sop_instance_uid for r in results})
    if not rows:
        return list(results)
    arrived: dict[str, datetime] = {}
    for r in results:
        uid = r.header.sop_instance_uid
        arrived[uid] = max(r.arrived_at, arrived.get(uid, r.arrived_at))
    over = [
        {
            "uid": row.sop_instance_uid,
            "note": row.note_uid,
            "restored_at": arrived[row.sop_instance_uid],
        }
        for row in rows
        if row.code == EXPIRED and arrived[row.sop_instance_uid] > row.rejected_at
    ]
    if over:
        session.connection().execute(_RESTORE, over)
    ended = {(one["uid"], one["note"]) for one in over}
    hidden = {
        row.sop_instance_uid for row in rows if (row.sop_instance_uid, row.note_uid) not in ended
    }
    return [_hidden(r) if r.header.sop_instance_uid in hidden else r for r in results]


_RESTORE = (
    update(schema.Rejection)
    .where(
        schema.Rejection.sop_instance_uid == bindparam("uid"),
        schema.Rejection.note_uid == bindparam("note"),
    )
    .values(restored_at=bindparam("restored_at"))
)


def _hidden(result: SliceResult) -> SliceResult:
    return replace(result, score=None, reason=Reason.REJECTED, body_centre_mm=None, preview=None)


def _in_force(session: Session, sop_instance_uids: Iterable[str]) -> list[schema.Rejection]:
    uids = sorted(sop_instance_uids)
    rows: list[schema.Rejection] = []
    # In parts: SQLite takes 32,766 parameters in a statement.
    for start in range(0, len(uids), 10_000):
        query = select(schema.Rejection).where(
            schema.Rejection.sop_instance_uid.in_(uids[start : start + 10_000]),
            schema.Rejection.restored_at.is_(None),
        )
        rows += session.scalars(query.execution_options(populate_existing=True))
    return rows
