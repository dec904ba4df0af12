"""Which held pixels are still wanted, and by whom."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import schema
from dicomnode.model import DeliveryKind, DeliveryState, ScoredSlice, SeriesState
from dicomnode.store.intake import claimed_slices

# SQLite takes 32,766 parameters in a statement.
_MANY = 1000


@dataclass(frozen=True, slots=True)
class Forward:
    """A delivery of a Series itself that is not over."""

    rule: str
    state: DeliveryState  # waiting or failed
    due_at: datetime  # of the next attempt; of one that was given up, when that was


@dataclass(frozen=True, slots=True)
class Wanting:
    """What may still want the pixels of a Series."""

    state: SeriesState
    forwards: tuple[Forward, ...] = ()


def wanting(session: Session, series_uids: Sequence[str]) -> dict[str, Wanting]:
    """Return Series Instance UID -> what may want its pixels; unknown Series are left out."""
    found: dict[str, Wanting] = {}
    for start in range(0, len(series_uids), _MANY):
        some = series_uids[start : start + _MANY]
        # In this order: a Series that is seen as finished was asked for before, if at all.
        series = select(schema.Series.series_uid, schema.Series.state)
        states = session.execute(series.where(schema.Series.series_uid.in_(some))).all()
        forwards: dict[str, list[Forward]] = {}
        rows = session.execute(
            select(
                schema.Delivery.subject,
                schema.Delivery.rule,
                schema.Delivery.state,
                schema.Delivery.due_at,
            ).where(
                schema.Delivery.subject.in_(some),
                schema.Delivery.kind == DeliveryKind.FORWARD,
                schema.Delivery.state.in_((DeliveryState.WAITING, DeliveryState.FAILED)),
            )
        )
        for uid, rule, state, due_at in rows:
            forwards.setdefault(uid, []).append(Forward(rule, DeliveryState(state), due_at))
        for uid, state in states:
            found[uid] = Wanting(SeriesState(state), tuple(forwards.get(uid, ())))
    return found


def slices_beside(session: Session, series_id: int) -> tuple[ScoredSlice, ...]:
    """Return scored slices of a finished Series that are in no curve: second ones at a position."""
    return claimed_slices(session, series_id).slices
