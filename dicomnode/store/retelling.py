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


def retell_pairs(session: Session, study_uids: Collection[str], now: datetime) -> None:
    """Ask anew for what was told of pairs of these Studies: one lost an offset, or its patient."""
    rows = schema.Delivery
    of_them = or_(rows.subject.in_(study_uids), rows.other.in_(study_uids))
    retell(session, now, rows.kind.in_(OF_PAIRS), rows.other != "", of_them)


def retell_reports(session: Session, series_uids: Collection[str], now: datetime) -> None:
    """Ask anew for the reports of these Series: they name another patient now."""
    rows = schema.Delivery
    retell(session, now, rows.kind == DeliveryKind.REPORT, rows.subject.in_(series_uids))


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
