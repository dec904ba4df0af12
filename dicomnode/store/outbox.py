"""The outbox: what is to go where, and how that went."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import DeliveryKind, DeliveryState
from dicomnode.store.session import insert


@dataclass(frozen=True, slots=True)
class Ask:
    """One thing that is to be at one destination."""

    kind: DeliveryKind
    destination: str  # AE title, or URL
    subject: str  # UID of a Series; of a pair, the fixed Study
    other: str = ""  # of a pair, the moving Study
    rule: str = ""  # name of the rule that asks


@dataclass(frozen=True, slots=True)
class Delivery:
    """An ask, and how it stands."""

    id: int
    what: Ask
    version: int  # how often it was asked for
    state: DeliveryState
    attempts: int
    asked_at: datetime
    due_at: datetime
    done_at: datetime | None
    reason: str | None
    sop_class_uid: str | None
    sop_instance_uid: str | None
    transaction_uid: str | None
    commitment: str | None


def ask_deliveries(session: Session, asks: Sequence[Ask], now: datetime, due_at: datetime) -> None:
    """Ask for deliveries, in the transaction of what they tell of.

    What was asked for before is asked for anew: it becomes due again, with no attempts.
    """
    for ask in sorted(set(asks), key=repr):  # one order, so that two workers cannot deadlock
        values = {
            "kind": ask.kind,
            "destination": ask.destination,
            "rule": ask.rule,
            "subject": ask.subject,
            "other": ask.other,
            "version": 1,
            "state": DeliveryState.WAITING,
            "attempts": 0,
            "asked_at": now,
            "due_at": due_at,
        }
        anew = {k: values[k] for k in ("state", "attempts", "asked_at", "due_at")}
        statement = insert(session, schema.Delivery).values(values)
        session.execute(
            statement.on_conflict_do_update(
                index_elements=["kind", "destination", "rule", "subject", "other"],
                set_={**anew, "version": schema.Delivery.version + 1, "reason": None},
            )
        )


def claim_deliveries(
    session: Session,
    now: datetime,
    lease: timedelta,
    limit: int,
    kinds: Sequence[DeliveryKind] = tuple(DeliveryKind),
    destination: str | None = None,
) -> list[Delivery]:
    """Take deliveries that are due, oldest first, and hide them from others for so long.

    Should the process that took them die, they are due again when the lease is over.
    """
    query = (
        select(schema.Delivery)
        .where(
            schema.Delivery.state == DeliveryState.WAITING,
            schema.Delivery.due_at <= now,
            schema.Delivery.kind.in_(kinds),
        )
        .order_by(schema.Delivery.due_at, schema.Delivery.id)
        .limit(limit)
    )
    if destination is not None:
        query = query.where(schema.Delivery.destination == destination)
    # SQLite has one writer at a time, which is lock enough; Postgres skips what is claimed.
    if session.get_bind().dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    rows = session.scalars(query).all()
    taken = [_delivery(row) for row in rows]
    for row in rows:
        row.due_at = now + lease
        row.attempts += 1
    return taken


def settle_delivery(
    session: Session,
    delivery: Delivery,
    state: DeliveryState,
    now: datetime,
    *,
    due_at: datetime | None = None,
    reason: str | None = None,
    sop_class_uid: str | None = None,
    sop_instance_uid: str | None = None,
) -> bool:
    """Note how an attempt went; False where it was asked for anew meanwhile, and waits for that.

    `due_at` is the time of the next attempt, where the state is `WAITING`.
    """
    values = {
        "state": state,
        "reason": reason,
        "due_at": due_at or now,
        "done_at": now if state is DeliveryState.DONE else None,
    }
    if sop_instance_uid is not None:
        values |= {"sop_class_uid": sop_class_uid, "sop_instance_uid": sop_instance_uid}
    found = session.execute(
        update(schema.Delivery)
        .where(schema.Delivery.id == delivery.id, schema.Delivery.version == delivery.version)
        .values(values)
        .returning(schema.Delivery.id)
    )
    return found.scalar() is not None


def list_deliveries(
    session: Session,
    *,
    state: DeliveryState | None = None,
    destination: str | None = None,
    subject: str | None = None,
    before: int | None = None,
    limit: int | None = None,
) -> list[Delivery]:
    """Return deliveries, the newest first; `before` is the id of one to go on from."""
    query = select(schema.Delivery).order_by(schema.Delivery.id.desc()).limit(limit)
    for column, value in (
        (schema.Delivery.state, state),
        (schema.Delivery.destination, destination),
        (schema.Delivery.subject, subject),
    ):
        if value is not None:
            query = query.where(column == value)
    if before is not None:
        query = query.where(schema.Delivery.id < before)
    return [_delivery(row) for row in session.scalars(query)]


def next_delivery_at(session: Session) -> datetime | None:
    """Return when the next delivery is due, None where none waits."""
    query = (
        select(schema.Delivery.due_at)
        .where(schema.Delivery.state == DeliveryState.WAITING)
        .order_by(schema.Delivery.due_at)
        .limit(1)
    )
    return session.scalar(query)


def _delivery(row: schema.Delivery) -> Delivery:
    return Delivery(
        id=row.id,
        what=Ask(DeliveryKind(row.kind), row.destination, row.subject, row.other, row.rule),
        version=row.version,
        state=DeliveryState(row.state),
        attempts=row.attempts,
        asked_at=row.asked_at,
        due_at=row.due_at,
        done_at=row.done_at,
        reason=row.reason,
        sop_class_uid=row.sop_class_uid,
        sop_instance_uid=row.sop_instance_uid,
        transaction_uid=row.transaction_uid,
        commitment=row.commitment,
    )
