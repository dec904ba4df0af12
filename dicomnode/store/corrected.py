"""Deliveries about a Series that went to another patient, though its own images did not come."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import DeliveryKind, DeliveryState
from dicomnode.store.outbox import requeue_deliveries

WRONG_PATIENT = (
    "its patient was corrected after the images were delivered: have the whole Series sent again "
    "as it was corrected"
)


def correct_deliveries(session: Session, series_uids: Sequence[str], now: datetime) -> set[str]:
    """Take what was asked for about these Series along to the patient whose they are now.

    Reports are made anew. Images are sent as they came, and those that are held still name the
    former patient: what waits goes on waiting for others, and what was delivered is given up, so
    that a person sees it.

    Returns
    -------
    set of str
        Those whose images were ever asked for: to be asked for anew once they come corrected.
    """
    delivery = schema.Delivery
    rows = session.execute(
        select(delivery.id, delivery.subject, delivery.kind, delivery.state)
        .where(
            delivery.subject.in_(series_uids),
            delivery.kind.in_((DeliveryKind.REPORT, DeliveryKind.FORWARD)),
        )
        .order_by(delivery.id)
        .with_for_update()
    ).all()
    open_ = [row for row in rows if row.state in (DeliveryState.WAITING, DeliveryState.DONE)]
    wrong = [
        row.id
        for row in open_
        if row.kind == DeliveryKind.FORWARD and row.state == DeliveryState.DONE
    ]
    # What waits may be on its way this moment: under a new version, that settles nothing.
    requeue_deliveries(session, now, [row.id for row in open_ if row.id not in wrong])
    session.execute(
        update(delivery)
        .where(delivery.id.in_(wrong))
        .values(
            state=DeliveryState.FAILED,
            reason=WRONG_PATIENT,
            due_at=now,
            version=delivery.version + 1,
        )
    )
    return {row.subject for row in rows if row.kind == DeliveryKind.FORWARD}
