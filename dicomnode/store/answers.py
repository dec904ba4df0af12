"""What is asked of the store: Series, curves, counts."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db import schema
from dicomnode.core import region
from dicomnode.core.curve import HeightMap
from dicomnode.core.region import Region
from dicomnode.core.robust import Covariance
from dicomnode.model import ScoreCurve, SeriesState
from dicomnode.store.intake import claimed_slices
from dicomnode.store.rows import series_row, to_curve
from dicomnode.store.values import Claimed, SeriesRow


def list_series(
    session: Session,
    *,
    patient_id: str | None = None,
    study_uid: str | None = None,
    series_uid: str | None = None,
    state: SeriesState | None = None,
    limit: int = 1000,
) -> list[SeriesRow]:
    """Return Series, newest arrival first."""
    query = select(schema.Series, schema.Curve).outerjoin(schema.Curve)
    for column, value in (
        (schema.Series.patient_id, patient_id),
        (schema.Series.study_uid, study_uid),
        (schema.Series.series_uid, series_uid),
        (schema.Series.state, state),
    ):
        if value is not None:
            query = query.where(column == value)
    rows = session.execute(
        query.order_by(schema.Series.last_arrival_at.desc(), schema.Series.id).limit(limit)
    ).all()
    return with_bundles(session, rows)


def with_bundles(session: Session, rows: Sequence[Any]) -> list[SeriesRow]:
    """Return Series, of rows of Series and Curve, with what is known of them elsewhere."""
    without = [s.id for s, c in rows if c is None or s.state == SeriesState.OPEN]
    live: dict[int, dict[str | None, int]] = {}
    for series_id, reason, count in session.execute(
        select(schema.Slice.series_id, schema.Slice.reason, func.count())
        .where(schema.Slice.series_id.in_(without))
        .group_by(schema.Slice.series_id, schema.Slice.reason)
    ):
        live.setdefault(series_id, {})[reason] = count
    models = {c.model for _, c in rows if c is not None}
    bundles = {
        m.digest: (_heights(m.manifest), region.from_manifest(m.manifest))
        for m in session.scalars(select(schema.Model).where(schema.Model.digest.in_(models)))
    }
    return [
        series_row(s, c, live.get(s.id, {}), bundles.get(c.model) if c else None) for s, c in rows
    ]


def count_quarantined(session: Session) -> dict[str, int]:
    """Return reason -> files in quarantine."""
    rows = session.execute(
        select(schema.Quarantined.reason, func.count()).group_by(schema.Quarantined.reason)
    )
    return {reason: count for reason, count in rows}


def list_quarantined(session: Session, limit: int) -> list[tuple[str, str, str]]:
    """Return (file, reason, detail) of files in quarantine, newest first."""
    rows = session.execute(
        select(schema.Quarantined.name, schema.Quarantined.reason, schema.Quarantined.detail)
        .order_by(schema.Quarantined.arrived_at.desc())
        .limit(limit)
    )
    return [(name, reason, detail) for name, reason, detail in rows]


def count_series(session: Session) -> dict[SeriesState, int]:
    """Return state -> Series."""
    rows = session.execute(select(schema.Series.state, func.count()).group_by(schema.Series.state))
    return {SeriesState(state): count for state, count in rows}


def count_offsets(session: Session) -> int:
    """Return how many offsets are stored, refused ones included."""
    return (
        session.scalar(
            select(func.count()).select_from(schema.Offset).where(schema.Offset.status.is_not(None))
        )
        or 0
    )


def curve_of(session: Session, series_uid: str) -> ScoreCurve | None:
    """Return the finished curve of a Series."""
    return next(iter(curves_of(session, [series_uid]).values()), None)


def curves_of(session: Session, series_uids: Iterable[str]) -> dict[str, ScoreCurve]:
    """Return Series Instance UID -> finished curve, those without one left out."""
    rows = session.execute(
        select(schema.Series.series_uid, schema.Curve, schema.Model.manifest)
        .join(schema.Curve, schema.Curve.series_id == schema.Series.id)
        .join(schema.Model, schema.Model.digest == schema.Curve.model)
        .where(schema.Series.series_uid.in_(list(series_uids)))
    )
    return {uid: to_curve(uid, curve, _heights(manifest)) for uid, curve, manifest in rows}


def is_waiting(session: Session, association_id: str) -> bool:
    """Whether a Series that an association carried is not finished yet."""
    return bool(
        session.scalar(
            select(func.count())
            .select_from(schema.Arrival)
            .where(schema.Arrival.association_id == association_id)
        )
    )


def open_slices(session: Session, series_uid: str) -> Claimed | None:
    """Return what was scored so far of a Series that is still arriving, None where it is not."""
    series_id = session.scalar(
        select(schema.Series.id).where(
            schema.Series.series_uid == series_uid, schema.Series.state == SeriesState.OPEN
        )
    )
    return None if series_id is None else claimed_slices(session, series_id)


def heights_of(session: Session, model: str) -> HeightMap:
    """Return the map of a bundle that scored something here."""
    return _heights(manifest_of(session, model))


def covariance_of(session: Session, model: str) -> Covariance | None:
    """Return what a bundle that scored something here says of its curves' errors."""
    values = manifest_of(session, model).get("covariance")
    return None if values is None else Covariance.from_dict(values)


def regions_of(session: Session, model: str) -> tuple[Region, ...]:
    """Return the regions of a bundle that scored something here."""
    return region.from_manifest(manifest_of(session, model))


def manifest_of(session: Session, model: str) -> dict[str, Any]:
    """Return the manifest of a bundle that scored something here."""
    return session.get_one(schema.Model, model).manifest


def _heights(manifest: dict[str, Any]) -> HeightMap:
    return HeightMap(**manifest["heights"])


def studies_of(session: Session, series_uids: Iterable[str]) -> dict[str, str]:
    """Return Series Instance UID -> Study Instance UID, of those the node knows."""
    rows = session.execute(
        select(schema.Series.series_uid, schema.Series.study_uid).where(
            schema.Series.series_uid.in_(list(series_uids))
        )
    )
    return {series_uid: study_uid for series_uid, study_uid in rows}


def is_growing(session: Session, study_uids: Iterable[str]) -> bool:
    """Whether a Series of these Studies is still arriving."""
    query = (
        select(schema.Series.id)
        .where(
            schema.Series.study_uid.in_(list(study_uids)),
            schema.Series.state == SeriesState.OPEN,
        )
        .limit(1)
    )
    return session.scalar(query) is not None
