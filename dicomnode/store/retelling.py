"""What was told and is not so any more: asked for anew, so that who was told hears of it.

When it is due, who makes it finds what is true then: another offset, another patient, or nothing.
"""

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import ColumnElement, and_, case, literal, or_, select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import DeliveryKind, DeliveryState
from dicomnode.store.outbox import NOT_SENT

# What may have been told: what waits may be on its way at this moment.
TOLD = (DeliveryState.WAITING, DeliveryState.DONE)
OF_PAIRS = (DeliveryKind.REGISTRATION, DeliveryKind.WEBHOOK)
WRONG_PATIENT = (
    "its patient was corrected after the images were delivered: have the whole Series sent again "
    "as it was corrected"
)


def retell_pairs(session: Session, study_uids: Collection[str], now: datetime) -> None:
    """Ask anew for what was told of pairs of these Studies: one lost an offset, or its patient."""
    rows = schema.Delivery
    of_them = or_(rows.subject.in_(study_uids), rows.other.in_(study_uids))
    retell(session, now, rows.kind.in_(OF_PAIRS), rows.other != "", of_them)


def retell_reports(session: Session, series_uids: Collection[str], now: datetime) -> None:
    """Ask anew for the reports of these Series: they name another patient now."""
    rows = schema.Delivery
    retell(session, now, rows.kind == DeliveryKind.REPORT, rows.subject.in_(series_uids))


def hold_images(session: Session, series_uids: Collection[str], now: datetime) -> set[str]:
    """Give up what was delivered of the images of these Series: their patient is another one now.

    Images are sent as they came, and those that are held still name the former patient. What waits
    goes on waiting for others, under a new version, as it may be on its way this moment; what was
    delivered is for a person to see.

    Returns
    -------
    set of str
        Those whose images were ever asked for: to be asked for anew once they come corrected.
    """
    rows = schema.Delivery
    found = session.execute(
        select(rows.id, rows.subject, rows.state)
        .where(rows.subject.in_(series_uids), rows.kind == DeliveryKind.FORWARD)
        .order_by(rows.id)
        .with_for_update()
    ).all()
    retell(session, now, rows.id.in_([r.id for r in found if r.state == DeliveryState.WAITING]))
    session.execute(
        update(rows)
        .where(rows.id.in_([r.id for r in found if r.state == DeliveryState.DONE]))
        .values(
            state=DeliveryState.FAILED,
            reason=WRONG_PATIENT,
            due_at=now,
            version=rows.version + 1,
        )
        .execution_options(synchronize_session=False)
    )
    return {r.subject for r in found}


def retell(session: Session, now: datetime, *where: ColumnElement[bool]) -> None:
    """Ask anew for such deliveries, as far as somebody may have been told."""
    rows = schema.Delivery
    ids = (
        select(rows.id)
        .where(rows.state.in_(TOLD), and_(*where))
        .order_by(rows.id)
        .with_for_update()
    )
    waits = rows.state == DeliveryState.WAITING
    at = literal(now, schema.UTCDateTime())
    session.execute(
        update(rows)
        .where(rows.id.in_(session.scalars(ids).all()))
        .values(
            {
                **NOT_SENT,
                "state": DeliveryState.WAITING,
                "attempts": 0,
                "failed_at": None,
                "asked_at": now,
                # What waits, waits until nothing changes any more, or is being sent.
                "due_at": case((waits, rows.due_at), else_=at),
                "version": rows.version + 1,
            }
        )
        .execution_options(synchronize_session=False)
    )
