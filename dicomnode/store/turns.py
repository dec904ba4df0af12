"""Whose turn it is to be asked, and since when the node is up."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode.store.session import insert


@dataclass(frozen=True, slots=True)
class PeerTurn:
    """When a peer may be asked again, and why not before."""

    peer: str
    next_at: datetime
    failures: int  # in a row, to reach it at all
    reason: str | None


WORKER = "worker"  # its heartbeat is the time up to which it took what arrived

# No turn counts for more, and no peer that is away is left alone for longer.
MOST_REQUESTS = 64
LONGEST = timedelta(minutes=30)


def take_turn(session: Session, peer: str, now: datetime, interval: timedelta) -> bool:
    """Take the turn to ask a peer for something; False where it is not due yet.

    The next one is so much later, for every process, and after a restart. One that lies further
    ahead than can be stems from before the clock was set back.
    """
    turns = insert(session, schema.Turn).values(peer=peer, next_at=now, failures=0)
    session.execute(turns.on_conflict_do_nothing())
    row = session.get_one(schema.Turn, peer, with_for_update=True, populate_existing=True)
    if not _is_due(row.next_at, now, interval):
        return False
    row.next_at = now + interval
    session.flush()
    return True


def may_ask(session: Session, peer: str, now: datetime, interval: timedelta) -> bool:
    """Whether `take_turn` would find it due."""
    turn = schema.Turn
    next_at = session.scalar(select(turn.next_at).where(turn.peer == peer))
    return next_at is None or _is_due(next_at, now, interval)


def charge(
    session: Session, peer: str, began: datetime, interval: timedelta, requests: int
) -> None:
    """Let a turn that took more than one request put off the next one for each of them."""
    later = began + interval * min(requests, MOST_REQUESTS)
    session.execute(
        update(schema.Turn)
        .where(schema.Turn.peer == peer, schema.Turn.next_at < later)
        .values(next_at=later)
    )


def put_off(
    session: Session, peer: str, now: datetime, delays: Sequence[timedelta], reason: str
) -> None:
    """Leave a peer that cannot be reached alone for a while, longer each time."""
    turns = insert(session, schema.Turn).values(peer=peer, next_at=now, failures=0)
    session.execute(turns.on_conflict_do_nothing())
    row = session.get_one(schema.Turn, peer, with_for_update=True, populate_existing=True)
    row.next_at = now + min(delays[min(row.failures, len(delays) - 1)], LONGEST)
    row.failures, row.reason = row.failures + 1, reason


def reached(session: Session, peer: str) -> None:
    """Note that a peer answered."""
    session.execute(
        update(schema.Turn)
        .where(schema.Turn.peer == peer, schema.Turn.failures > 0)
        .values(failures=0, reason=None)
    )


def list_turns(session: Session) -> list[PeerTurn]:
    """Return when each peer may be asked again."""
    rows = session.scalars(select(schema.Turn).order_by(schema.Turn.peer))
    return [PeerTurn(r.peer, r.next_at, r.failures, r.reason) for r in rows]


def last_beat(session: Session, part: str) -> datetime | None:
    """Return when a part of the node was last known to be up, None where it never was."""
    return session.scalar(select(schema.Heartbeat.at).where(schema.Heartbeat.part == part))


def beat(session: Session, part: str, now: datetime) -> None:
    """Note that a part of the node is up."""
    beats = insert(session, schema.Heartbeat).values(part=part, at=now)
    session.execute(beats.on_conflict_do_update(index_elements=["part"], set_={"at": now}))


def _is_due(next_at: datetime, now: datetime, interval: timedelta) -> bool:
    return not now < next_at <= now + max(interval * MOST_REQUESTS, LONGEST)
