"""Which Series peers are asked for: ordered once, and held against what is here."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import schema
from dicomnode.core.admission import EXPIRED
from dicomnode.model import FetchState, Reason
from dicomnode.store.fetches import DAY, NEVER_SENT, UNDER_WAY, Order, hand_on
from dicomnode.store.hidden import rejections_of
from dicomnode.store.identity import in_parts
from dicomnode.store.intake import frame_of_key
from dicomnode.store.session import insert

PART = 10_000  # SQLite takes 32,766 parameters in a statement
MOST_HANDED_ON = 1000


@dataclass(frozen=True, slots=True)
class Held:
    """What is here of a Series."""

    received: int  # distinct Instances
    rejected: int  # those of them that were taken back, and that no archive is asked for again
    last_arrival_at: datetime


def order_series(
    session: Session, orders: Sequence[Order], now: datetime, due_at: datetime
) -> list[str]:
    """Ask for Series, in the transaction that settles the question they follow from.

    What was asked for before is not asked for again, but where a peer has more of it now, where
    some of what was here was taken back, or where it was given up and another subject asks, or
    another peer has it. What one peer is asked for already, another that has it is asked for in
    its stead should it fail. Why it was asked for first stays: a Study that came as a prior is no
    new one, whatever follows.

    Returns
    -------
    list of str
        UIDs of the Series that are asked for now.
    """
    ordered = []
    for order in sorted(orders, key=lambda o: o.series_uid):
        anew = {
            "peer": order.peer,
            "asked_by": order.asked_by,
            "expected": order.expected,
            "state": FetchState.WAITING,
            "attempts": 0,
            "asked_at": now,
            "due_at": due_at,
            **NEVER_SENT,
        }
        first = {
            "series_uid": order.series_uid,
            "study_uid": order.study_uid,
            "cause": order.cause,
            "study_date": order.study_date.strftime(DAY) if order.study_date else "",
            "version": 1,
            "others": [],
        }
        made = session.execute(
            insert(session, schema.Fetch)
            .values({**first, **anew})
            .on_conflict_do_nothing(index_elements=["series_uid"])
            .returning(schema.Fetch.id)
        )
        if made.scalar() is not None:
            ordered.append(order.series_uid)
            continue
        row = session.scalars(
            select(schema.Fetch)
            .where(schema.Fetch.series_uid == order.series_uid)
            .with_for_update()
            .execution_options(populate_existing=True)
        ).one()
        is_new_peer = order.peer not in (row.peer, *row.others)
        if row.state in UNDER_WAY:
            if is_new_peer:
                row.others = [*row.others, order.peer]
            continue
        if not _is_due_again(row, order, is_new_peer):
            continue
        others = [peer for peer in (*row.others, row.peer) if peer != order.peer]
        for name, value in anew.items():
            setattr(row, name, value)
        row.others, row.done_at, row.reason = others, None, None
        row.version += 1
        ordered.append(order.series_uid)
    session.flush()
    return ordered


def _is_due_again(row: schema.Fetch, order: Order, is_new_peer: bool) -> bool:
    """Whether to ask again for what lacks, though asking for it was over."""
    if row.expected is not None and (order.expected or 0) > row.expected:
        return True
    if row.state == FetchState.FAILED:
        return is_new_peer or row.asked_by != order.asked_by
    # It was here, and is not now: taken back, perhaps replaced. Once more is enough to know.
    return row.fruitless == 0


def hand_over(session: Session, peer: str, allowed: Collection[str], now: datetime) -> int:
    """Let others be asked for what waits for a peer that is away; return for how much."""
    rows = session.scalars(
        select(schema.Fetch)
        .where(
            schema.Fetch.peer == peer,
            schema.Fetch.state == FetchState.WAITING,
            schema.Fetch.due_at <= now,
        )
        .order_by(schema.Fetch.series_uid)  # as they are ordered: neither waits for the other
        .limit(MOST_HANDED_ON)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).all()
    count = sum(hand_on(row, allowed) for row in rows)
    session.flush()
    return count


def held_series(session: Session, series_uids: Iterable[str]) -> dict[str, Held]:
    """Return what is here of these Series."""
    found: dict[str, Held] = {}
    columns = schema.Series
    for part in in_parts(sorted(set(series_uids)), PART):
        query = select(
            columns.id,
            columns.series_uid,
            columns.received,
            columns.last_arrival_at,
            columns.set_aside,
        )
        rows = session.execute(query.where(columns.series_uid.in_(part))).all()
        rejected = _rejected(session, {r.id: r.set_aside for r in rows})
        for r in rows:
            found[r.series_uid] = Held(r.received, rejected[r.id], r.last_arrival_at)
    return found


def _rejected(session: Session, set_aside: dict[int, dict[str, str]]) -> Counter[int]:
    """Return id of a Series -> its Instances that were taken back.

    Without those whose time was over (Data Retention Policy Expired): sent again they would count
    as new, and by our own asking.
    """
    slices = schema.Slice
    query = select(slices.series_id, slices.sop_instance_uid).where(
        slices.series_id.in_(set_aside), slices.reason == Reason.REJECTED
    )
    found = {(id_, uid) for id_, uid in session.execute(query)}
    for id_, reasons in set_aside.items():
        keys = (key for key, reason in reasons.items() if reason == Reason.REJECTED)
        found |= {(id_, frame_of_key(key)[0]) for key in keys}
    if not found:
        return Counter()
    codes = rejections_of(session, {uid for _, uid in found})
    return Counter(id_ for id_, uid in found if uid in codes and EXPIRED not in codes[uid])
