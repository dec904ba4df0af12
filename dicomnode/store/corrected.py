"""Deliveries about a Series that went to another patient, though its own images did not come."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import DeliveryKind, DeliveryState
from dicomnode.store.outbox import requeue_deliveries

WRONG_PATIENT = (
    "its patient was corrected after the images were delivered: have the whole Series sent again "
    "as it was corrected"
)


def correct_deliveries(session: Session, series_uids: Sequence[str], now: datetime) -> None:
    """Take what was asked for about these Series along to the patient whose they are now.

    Reports are made anew. Images are sent as they came, and those that are held still name the
    former patient: what waits goes on waiting for others, and what was delivered is given up, so
    that a person sees it. Either is asked for anew once the images come as they were corrected.
    """
    delivery = schema.Delivery
    rows = session.execute(
        select(delivery.id, delivery.kind, delivery.state)
        .where(
            delivery.subject.in_(series_uids),
            or_(delivery.kind == DeliveryKind.REPORT, delivery.kind == DeliveryKind.FORWARD),
            delivery.state.in_((DeliveryState.WAITING, DeliveryState.DONE)),
        )
        .order_by(delivery.id)
        .with_for_update()
    ).all()
    is_wrong = {
        row.id: row.kind == DeliveryKind.FORWARD and row.state == DeliveryState.DONE for row in rows
    }
    # What waits may be on its way this moment: under a new version, that settles nothing.
    requeue_deliveries(session, now, [id_ for id_, wrong in is_wrong.items() if not wrong])
    session.execute(
        update(delivery)
        .where(delivery.id.in_([id_ for id_, wrong in is_wrong.items() if wrong]))
        .values(
            state=DeliveryState.FAILED,
            reason=WRONG_PATIENT,
            due_at=now,
            version=delivery.version + 1,
        )
    )
