"""Kept network inputs: beside each slice while a Series is open, in one row afterwards."""

from collections.abc import Iterable
from datetime import datetime
from itertools import pairwise

import numpy as np
from sqlalchemy import LargeBinary, Select, delete, func, select, update
from sqlalchemy.orm import Session, undefer

from db import schema
from dicomnode.model import SeriesState
from dicomnode.store.rows import array


def keep_previews(
    session: Session, series: schema.Series, slices: Iterable[tuple[str, int]]
) -> None:
    """Gather the inputs of a curve's slices, (SOP Instance UID, frame), into one row.

    Nothing is kept where one is missing: a curve is scored anew as a whole.
    """
    rows = session.execute(
        select(schema.Slice.sop_instance_uid, schema.Slice.frame, schema.Slice.preview).where(
            schema.Slice.series_id == series.id, schema.Slice.preview.is_not(None)
        )
    )
    found = {(uid, frame): preview for uid, frame, preview in rows if preview is not None}
    slices = list(slices)
    if not all(key in found for key in slices):
        return
    previews = [found[key] for key in slices]
    session.add(
        schema.Preview(
            series_id=series.id,
            count=len(previews),
            arrived_at=series.last_arrival_at,
            sizes=np.array([len(p) for p in previews], "<u4").tobytes(),
            data=b"".join(previews),
        )
    )


def take_previews(session: Session, series: schema.Series) -> list[bytes] | None:
    """Return the inputs of a curve, parallel to it, and drop their row; None where none is kept."""
    previews = read_previews(session, series.id)
    session.execute(delete(schema.Preview).where(schema.Preview.series_id == series.id))
    return previews


def read_previews(session: Session, series_id: int) -> list[bytes] | None:
    """Return the inputs of a curve, parallel to it; None where none is kept."""
    row = session.scalar(
        select(schema.Preview)
        .where(schema.Preview.series_id == series_id)
        .options(undefer(schema.Preview.data))
    )
    if row is None:
        return None
    ends = np.cumsum(array(row.sizes, "<u4"), dtype=np.int64).tolist()
    previews = [row.data[start:end] for start, end in pairwise([0, *ends])]
    session.expunge(row)  # its bytes need not stay in the session
    return previews


def previews_of(session: Session, series_uid: str) -> list[bytes] | None:
    """Return the inputs of a finished Series, packed, parallel to its curve; None: not kept."""
    series_id = session.scalar(_finished(series_uid))
    return None if series_id is None else read_previews(session, series_id)


def preview_of(session: Session, series_uid: str, index: int) -> bytes | None:
    """Return one of them: of some megabytes, the few kilobytes that are wanted."""
    row = session.execute(
        select(schema.Preview.series_id, schema.Preview.sizes).where(
            schema.Preview.series_id == _finished(series_uid).scalar_subquery()
        )
    ).one_or_none()
    if row is None:
        return None
    ends = np.cumsum(array(row.sizes, "<u4"), dtype=np.int64).tolist()
    if not 0 <= index < len(ends):
        return None
    start = ends[index - 1] if index else 0
    part = func.substr(schema.Preview.data, start + 1, ends[index] - start, type_=LargeBinary())
    return session.scalar(select(part).where(schema.Preview.series_id == row.series_id))


def has_previews(session: Session, series_uid: str) -> bool:
    """Whether the inputs of a finished Series are kept."""
    found = select(schema.Preview.series_id).where(
        schema.Preview.series_id == _finished(series_uid).scalar_subquery()
    )
    return session.scalar(found) is not None


def _finished(series_uid: str) -> Select[int]:
    return select(schema.Series.id).where(
        schema.Series.series_uid == series_uid, schema.Series.state == SeriesState.CURVE
    )


def prune_previews(session: Session, before: datetime, limit: int) -> int:
    """Drop inputs of finished Series whose last slice came before, and return of how many.

    At most `limit` Series at a time: SQLite has one writer, which must not be kept waiting.
    """
    curves = session.scalars(
        select(schema.Preview.series_id)
        .where(schema.Preview.arrived_at < before)
        .order_by(schema.Preview.arrived_at)
        .limit(limit)
    ).all()
    session.execute(delete(schema.Preview).where(schema.Preview.series_id.in_(curves)))
    # Scored slices that are in no curve.
    others = session.scalars(
        select(schema.Slice.series_id)
        .join(schema.Series, schema.Series.id == schema.Slice.series_id)
        .where(
            schema.Slice.preview.is_not(None),
            schema.Series.state != SeriesState.OPEN,
            schema.Series.last_arrival_at < before,
        )
        .distinct()
        .limit(limit)
    ).all()
    session.execute(
        update(schema.Slice).where(schema.Slice.series_id.in_(others)).values(preview=None)
    )
    return len({*curves, *others})
