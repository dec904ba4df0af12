"""Storage Commitment: whom to ask for what, and what was answered."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import and_, or_, select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import Commitment, DeliveryState
from dicomnode.store.outbox import Delivery, any_of, delivery_of

OPEN = (Commitment.WANTED, Commitment.ASKED)


def next_commitment_at(session: Session, destination: str) -> datetime | None:
    """Return when a peer is next to be asked for its commitment, None where it is not."""
    return session.scalar(
        select(schema.Delivery.commitment_due_at)
        .where(
            schema.Delivery.destination == destination,
            schema.Delivery.commitment_due_at.is_not(None),
        )
        .order_by(schema.Delivery.commitment_due_at)
        .limit(1)
    )


def claim_commitments(
    session: Session, destination: str, now: datetime, lease: timedelta, limit: int
) -> list[Delivery]:
    """Take deliveries for which a peer is to be asked, and hide them from others for so long."""
    query = (
        select(schema.Delivery)
        .where(
            schema.Delivery.destination == destination,
            schema.Delivery.state == DeliveryState.DONE,
            schema.Delivery.commitment.in_(OPEN),
            schema.Delivery.commitment_due_at <= now,
        )
        .order_by(schema.Delivery.commitment_due_at, schema.Delivery.id)
        .limit(limit)
    )
    if session.get_bind().dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    rows = session.scalars(query).all()
    taken = [delivery_of(row) for row in rows]
    for row in rows:
        row.commitment_due_at = now + lease
    return taken


def postpone_commitments(
    session: Session,
    deliveries: Sequence[Delivery],
    due_at: datetime | None,
    commitment: Commitment | None,
    transaction_uid: str | None = None,
) -> None:
    """Note how asking went, and when to ask again, None: never.

    With a `transaction_uid` it was asked once more. What was answered meanwhile stays so.
    """
    values: dict[str, object] = {"commitment": commitment, "commitment_due_at": due_at}
    if transaction_uid is not None:
        values["transaction_uid"] = transaction_uid
        values["commitment_attempts"] = schema.Delivery.commitment_attempts + 1
    session.execute(
        update(schema.Delivery)
        .where(
            any_of(deliveries),
            schema.Delivery.state == DeliveryState.DONE,
            schema.Delivery.commitment.in_(OPEN),
        )
        .values(values)
    )


def record_committed(
    session: Session, peer: str, transaction_uid: str, sop_instance_uids: Sequence[str]
) -> int:
    """Note what a peer committed itself to, and return how many deliveries that are.

    Its word counts for what it was sent, whichever transaction it answers: a slow archive may
    answer one after it was asked again. An answer under another AE title of an archive is known
    by its transaction.
    """
    statement = (
        update(schema.Delivery)
        .where(
            schema.Delivery.sop_instance_uid.in_(sop_instance_uids),
            schema.Delivery.state == DeliveryState.DONE,
            schema.Delivery.commitment.is_not(None),
            or_(
                schema.Delivery.transaction_uid == transaction_uid,
                schema.Delivery.destination == peer,
            ),
        )
        .values(commitment=Commitment.COMMITTED, commitment_due_at=None)
    )
    return len(session.scalars(statement.returning(schema.Delivery.id)).all())


def failed_commitments(
    session: Session, transaction_uid: str, sop_instance_uids: Sequence[str]
) -> list[Delivery]:
    """Return the deliveries of a transaction that a peer says it does not keep."""
    rows = session.scalars(
        select(schema.Delivery).where(
            schema.Delivery.transaction_uid == transaction_uid,
            schema.Delivery.sop_instance_uid.in_(sop_instance_uids),
            schema.Delivery.state == DeliveryState.DONE,
            schema.Delivery.commitment == Commitment.ASKED,
        )
    )
    return [delivery_of(row) for row in rows]


def record_uncommitted(
    session: Session,
    delivery: Delivery,
    state: DeliveryState,
    due_at: datetime,
    failed_at: datetime,
    reason: str,
) -> None:
    """Note that a peer does not keep what it was sent; where the state says so, it is sent again.

    The answer to a transaction that is over changes nothing.
    """
    session.execute(
        update(schema.Delivery)
        .where(
            any_of([delivery]),
            and_(
                schema.Delivery.transaction_uid == delivery.transaction_uid,
                schema.Delivery.commitment == Commitment.ASKED,
            ),
        )
        .values(
            state=state,
            due_at=due_at,
            failed_at=failed_at,
            reason=reason,
            commitment=Commitment.FAILED,
            commitment_due_at=None,
        )
    )
