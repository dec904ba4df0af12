"""The outbox: what is to go where, and how that went."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Update, and_, func, literal, or_, select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import Commitment, DeliveryKind, DeliveryState
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
    failed_at: datetime | None  # the first time since then
    due_at: datetime
    done_at: datetime | None  # when it was delivered last, whatever it is asked for since
    reason: str | None
    sop_class_uid: str | None
    sop_instance_uid: str | None
    transaction_uid: str | None
    commitment: Commitment | None
    commitment_attempts: int


# Of an ask that was not served yet. What was sent last stays known, by its UID and its time.
NOT_SENT: dict[str, Any] = {
    "reason": None,
    "transaction_uid": None,
    "commitment": None,
    "commitment_due_at": None,
    "commitment_attempts": 0,
}


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
        anew |= {**NOT_SENT, "failed_at": None}
        statement = insert(session, schema.Delivery).values(values)
        session.execute(
            statement.on_conflict_do_update(
                index_elements=["kind", "destination", "rule", "subject", "other"],
                set_={**anew, "version": schema.Delivery.version + 1},
            )
        )


def known_asks(session: Session, asks: Collection[Ask]) -> set[Ask]:
    """Return those of some asks that were asked for before, whatever became of them."""
    rows = schema.Delivery
    columns = rows.kind, rows.destination, rows.subject, rows.other, rows.rule
    subjects = sorted({ask.subject for ask in asks})
    found = session.execute(select(*columns).where(rows.subject.in_(subjects)))
    return {Ask(DeliveryKind(kind), *what) for kind, *what in found} & set(asks)


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
    taken = [delivery_of(row) for row in rows]
    for row in rows:
        row.due_at = now + lease
        row.attempts += 1
    return taken


def still_waits(session: Session, delivery: Delivery) -> bool:
    """Whether what was taken is still to be sent: neither dropped nor asked for anew meanwhile."""
    waits = schema.Delivery.state == DeliveryState.WAITING
    query = select(schema.Delivery.id).where(any_of([delivery]), waits)
    return session.scalar(query) is not None


def hold_deliveries(session: Session, deliveries: Sequence[Delivery], due_at: datetime) -> None:
    """Keep what was taken hidden from others for longer; what was asked for anew is not ours."""
    waits = schema.Delivery.state == DeliveryState.WAITING
    session.execute(_free(any_of(deliveries), waits).values(due_at=due_at))


def settle_delivery(
    session: Session,
    delivery: Delivery,
    state: DeliveryState,
    now: datetime,
    *,
    due_at: datetime | None = None,
    attempts: int | None = None,
    failed_at: datetime | None = None,
    commitment_due_at: datetime | None = None,
    reason: str | None = None,
    sop_class_uid: str | None = None,
    sop_instance_uid: str | None = None,
) -> bool:
    """Note how an attempt went; False where it was asked for anew or dropped meanwhile.

    What was given up meanwhile, and arrived all the same, did arrive.

    `due_at` is the time of the next attempt, where the state is `WAITING`; `attempts` sets their
    number back, where this was none; `failed_at` is when the first one failed, None: as it was.
    `commitment_due_at` is when the peer is to be asked for its
    commitment, None where it is not.
    """
    values = {
        **NOT_SENT,
        "state": state,
        "reason": reason,
        "due_at": due_at or now,
    }
    replaced = [DeliveryState.WAITING]
    if state is not DeliveryState.WAITING:
        replaced.append(DeliveryState.FAILED)
    if state is DeliveryState.DONE:
        values["done_at"] = now
    if attempts is not None:
        values["attempts"] = attempts
    if failed_at is not None:
        values["failed_at"] = failed_at
    if commitment_due_at is not None:
        values |= {"commitment": Commitment.WANTED, "commitment_due_at": commitment_due_at}
    if sop_instance_uid is not None:
        values |= {"sop_class_uid": sop_class_uid, "sop_instance_uid": sop_instance_uid}
    found = session.execute(
        update(schema.Delivery)
        .where(any_of([delivery]), schema.Delivery.state.in_(replaced))
        .values(values)
        .returning(schema.Delivery.id)
    )
    if found.scalar() is not None:
        return True
    if state is DeliveryState.DONE:  # who was told is to hear of what it became since
        told = update(schema.Delivery).where(schema.Delivery.id == delivery.id)
        session.execute(told.values(done_at=now))
    return False


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
    return [delivery_of(row) for row in session.scalars(query)]


def next_delivery_at(session: Session, destination: str | None = None) -> datetime | None:
    """Return when the next delivery is due, None where none waits."""
    query = (
        select(schema.Delivery.due_at)
        .where(schema.Delivery.state == DeliveryState.WAITING)
        .order_by(schema.Delivery.due_at)
        .limit(1)
    )
    if destination is not None:
        query = query.where(schema.Delivery.destination == destination)
    return session.scalar(query)


def waiting_for(session: Session) -> set[tuple[DeliveryKind, str, str]]:
    """Return (kind, destination, rule) of all that waits."""
    columns = schema.Delivery.kind, schema.Delivery.destination, schema.Delivery.rule
    rows = session.execute(
        select(*columns).where(schema.Delivery.state == DeliveryState.WAITING).distinct()
    )
    return {(DeliveryKind(kind), destination, rule) for kind, destination, rule in rows}


def fail_deliveries(
    session: Session,
    destination: str,
    now: datetime,
    reason: str,
    *,
    kind: DeliveryKind | None = None,
    rule: str | None = None,
    asked_before: datetime | None = None,
    failed_before: datetime | None = None,
    attempts: int = 0,
) -> int:
    """Give up what waits for a destination, or some of it, and return how many that were.

    With `failed_before` what was tried at least so often, and failed by then for the first time.
    """
    rows = schema.Delivery
    wanted = [rows.state == DeliveryState.WAITING, rows.destination == destination]
    if kind is not None:
        wanted.append(rows.kind == kind)
    if rule is not None:
        wanted.append(rows.rule == rule)
    if asked_before is not None:
        wanted.append(rows.asked_at <= asked_before)
    if failed_before is not None:
        wanted += [rows.failed_at <= failed_before, rows.attempts >= attempts]
    failed = _free(*wanted).values(state=DeliveryState.FAILED, reason=reason, due_at=now)
    return len(session.scalars(failed.returning(rows.id)).all())


def note_unreached(session: Session, destination: str, now: datetime, reason: str) -> None:
    """Count an attempt of all that is due: nothing of it could be brought to its destination."""
    rows = schema.Delivery
    due = rows.state == DeliveryState.WAITING, rows.destination == destination, rows.due_at <= now
    values = {
        "attempts": rows.attempts + 1,
        "failed_at": func.coalesce(rows.failed_at, literal(now, schema.UTCDateTime())),
        "reason": reason,
    }
    session.execute(_free(*due).values(values))


def pull_back(session: Session, destination: str, now: datetime, after: datetime) -> int:
    """Make due now what is due later than nothing can be, and return how many that were.

    So it is where the clock was set back.
    """
    rows = schema.Delivery
    late = rows.state == DeliveryState.WAITING, rows.destination == destination, rows.due_at > after
    pulled = _free(*late).values(due_at=now)
    return len(session.scalars(pulled.returning(rows.id)).all())


def requeue_deliveries(
    session: Session, now: datetime, ids: Sequence[int] | None = None
) -> list[int]:
    """Ask anew for deliveries, whatever became of them; for all that failed where none is named.

    Returns
    -------
    list of int
        Those that are there, and wait now.
    """
    chosen = (
        schema.Delivery.state == DeliveryState.FAILED
        if ids is None
        else schema.Delivery.id.in_(ids)
    )
    statement = (
        update(schema.Delivery)
        .where(chosen)
        .values(
            **NOT_SENT,
            state=DeliveryState.WAITING,
            attempts=0,
            failed_at=None,
            asked_at=now,
            due_at=now,
            version=schema.Delivery.version + 1,
        )
    )
    return sorted(session.scalars(statement.returning(schema.Delivery.id)))


def drop_deliveries(
    session: Session, now: datetime, reason: str, ids: Sequence[int] | None = None
) -> list[int]:
    """Let go of deliveries that wait or failed; of all that failed where none is named.

    What is being sent goes on: how it went is then not noted any more.

    Returns
    -------
    list of int
        Those that were there, and are dropped now.
    """
    open_states = (DeliveryState.WAITING, DeliveryState.FAILED)
    chosen = (
        schema.Delivery.state == DeliveryState.FAILED
        if ids is None
        else and_(schema.Delivery.id.in_(ids), schema.Delivery.state.in_(open_states))
    )
    statement = (
        update(schema.Delivery)
        .where(chosen)
        .values(
            state=DeliveryState.DROPPED,
            reason=reason,
            due_at=now,
            version=schema.Delivery.version + 1,
        )
    )
    return sorted(session.scalars(statement.returning(schema.Delivery.id)))


def count_deliveries(session: Session) -> dict[DeliveryState, int]:
    """Return state -> deliveries."""
    rows = session.execute(
        select(schema.Delivery.state, func.count()).group_by(schema.Delivery.state)
    )
    return {DeliveryState(state): count for state, count in rows}


def _free(*where: ColumnElement[bool]) -> Update:
    """Return the update of such rows, but for those that another transaction holds.

    Those are asked for anew at this moment, or settled. To wait for them would be a deadlock: who
    asks takes rows in an order of its own.
    """
    rows = schema.Delivery
    ids = select(rows.id).where(*where).with_for_update(skip_locked=True)
    return update(rows).where(rows.id.in_(ids)).execution_options(synchronize_session=False)


def any_of(deliveries: Sequence[Delivery]) -> Any:
    """Those deliveries, as they were asked for when they were taken."""
    return or_(
        *(
            and_(schema.Delivery.id == d.id, schema.Delivery.version == d.version)
            for d in deliveries
        )
    )


def delivery_of(row: schema.Delivery) -> Delivery:
    return Delivery(
        id=row.id,
        what=Ask(DeliveryKind(row.kind), row.destination, row.subject, row.other, row.rule),
        version=row.version,
        state=DeliveryState(row.state),
        attempts=row.attempts,
        asked_at=row.asked_at,
        failed_at=row.failed_at,
        due_at=row.due_at,
        done_at=row.done_at,
        reason=row.reason,
        sop_class_uid=row.sop_class_uid,
        sop_instance_uid=row.sop_instance_uid,
        transaction_uid=row.transaction_uid,
        commitment=Commitment(row.commitment) if row.commitment else None,
        commitment_attempts=row.commitment_attempts,
    )
