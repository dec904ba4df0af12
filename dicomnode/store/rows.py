"""Rows to frozen values and back; nobody outside the store sees a row."""

import json
import zlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import Text, cast, select

from db import schema
from dicomnode.core import region
from dicomnode.core.curve import HeightMap
from dicomnode.core.region import Region
from dicomnode.model import (
    Evidence,
    Flag,
    Floats,
    Method,
    Offset,
    OffsetStatus,
    PatientKey,
    Quality,
    Reason,
    ScoreCurve,
    ScoredSlice,
    SeriesState,
)
from dicomnode.store.values import SeriesRow, StoredOffset


def curve_row(
    series: schema.Series, curve: ScoreCurve, slices: list[ScoredSlice], now: datetime
) -> schema.Curve:
    """Return the row of a finished curve; slices run parallel to it."""
    frames = list(dict.fromkeys(s.frame_of_reference_uid for s in slices))
    place = {f: i for i, f in enumerate(frames)}
    classes = list(dict.fromkeys(s.sop_class_uid or None for s in slices))
    kind = {c: i for i, c in enumerate(classes)}
    members = [
        [
            s.sop_instance_uid,
            s.frame,
            place[s.frame_of_reference_uid],
            kind[s.sop_class_uid or None],
        ]
        for s in slices
    ]
    return schema.Curve(
        series_id=series.id,
        model=curve.model,
        revision=series.revision,
        count=len(slices),
        z_mm=curve.z_mm.astype("<f8").tobytes(),
        score=curve.score.astype("<f4").tobytes(),
        image_position=np.array([s.image_position for s in slices], "<f8").tobytes(),
        image_orientation=list(slices[0].image_orientation),
        instances=zlib.compress(json.dumps(members, separators=(",", ":")).encode()),
        frames_of_reference=frames,
        sop_classes=classes,
        height_min_mm=float(curve.height_mm.min()),
        height_max_mm=float(curve.height_mm.max()),
        pearson_r=curve.quality.pearson_r,
        slope=curve.quality.slope,
        flags=list(curve.quality.flags),
        computed_at=now,
        body_centre=None
        if curve.body_centre_mm is None
        else curve.body_centre_mm.astype("<f8").tobytes(),
    )


def to_curve(series_uid: str, row: schema.Curve, heights: HeightMap) -> ScoreCurve:
    """Return the curve of a row, by its bundle's map."""
    score = array(row.score, "<f4").astype(np.float32)
    members = instances(row)
    return ScoreCurve(
        series_uid=series_uid,
        model=row.model,
        z_mm=array(row.z_mm, "<f8").astype(np.float64),
        score=score,
        height_mm=heights(score),
        sop_instance_uids=tuple(uid for uid, _, _ in members),
        frames=tuple(frame for _, frame, _ in members),
        quality=quality_of(row),
        body_centre_mm=body_centres(row),
    )


def series_row(
    s: schema.Series,
    curve: schema.Curve | None,
    live: dict[str | None, int],
    bundle: tuple[HeightMap, tuple[Region, ...]] | None,
) -> SeriesRow:
    """Return a Series as asked for.

    `live` is reason (None: scored) -> slices, while open; `bundle` is what the curve was made by.
    """
    is_open = s.state == SeriesState.OPEN
    if is_open:
        aside = {str(reason): n for reason, n in live.items() if reason is not None}
    else:
        aside = {r: list(s.set_aside.values()).count(r) for r in set(s.set_aside.values())}
    return SeriesRow(
        series_uid=s.series_uid,
        study_uid=s.study_uid,
        patient=PatientKey(s.patient_id, s.issuer),
        study_datetime=s.study_datetime,
        modality=s.modality,
        body_part_examined=s.body_part_examined,
        state=SeriesState(s.state),
        reason=Reason(s.reason) if s.reason else None,
        evidence=Evidence(s.evidence) if s.evidence else None,
        revision=s.revision,
        received=s.received,
        scored=curve.count if curve and not is_open else live.get(None, 0),
        expected=s.expected,
        set_aside=aside,
        first_arrival_at=s.first_arrival_at,
        last_arrival_at=s.last_arrival_at,
        quality=quality_of(curve) if curve else None,
        height_mm=(curve.height_min_mm, curve.height_max_mm) if curve else None,
        model=curve.model if curve else None,
        coverage=_coverage(curve, *bundle) if curve and bundle else (),
    )


def stored_offset(
    row: schema.Offset, fixed_study: str, fixed_series: str, moving_study: str, moving_series: str
) -> StoredOffset:
    """Return the offset of a row that has one, with the pair it belongs to."""
    assert row.status is not None and row.computed_at is not None
    return StoredOffset(
        offset=Offset(
            method=Method(row.method),
            status=OffsetStatus(row.status),
            offset_mm=row.offset_mm,
            overlap_mm=row.overlap_mm,
            sigma_mm=row.sigma_mm,
            reason=row.reason,
            dx_mm=row.dx_mm,
            dy_mm=row.dy_mm,
        ),
        fixed_study=fixed_study,
        fixed_series=fixed_series,
        moving_study=moving_study,
        moving_series=moving_series,
        model=row.model,
        computed_at=row.computed_at,
        seconds=row.seconds or 0.0,
    )


# What is read of a slice to finish its Series: all but its input. Lists stay text, since
# `scored_slices` reads those of all rows at once, in an eighth of the time.
SLICES = select(
    schema.Slice.sop_instance_uid,
    schema.Slice.frame,
    schema.Slice.model,
    schema.Slice.score,
    schema.Slice.reason,
    cast(schema.Slice.image_position, Text),
    cast(schema.Slice.image_orientation, Text),
    schema.Slice.frame_of_reference_uid,
    cast(schema.Slice.body_centre, Text),
    schema.Slice.sop_class_uid,
)


def scored_slices(rows: Sequence[Any]) -> tuple[ScoredSlice, ...]:
    """Return slices that have a score, of rows of `SLICES`."""
    positions, orientations, centres = (_lists(rows, column) for column in (5, 6, 8))
    return tuple(
        ScoredSlice(
            sop_instance_uid=row[0],
            frame=row[1],
            image_position=tuple(position),
            image_orientation=tuple(orientation),
            score=row[3],
            frame_of_reference_uid=row[7],
            body_centre_mm=(centre[0], centre[1]) if centre else None,
            sop_class_uid=row[9] or "",
        )
        for row, position, orientation, centre in zip(
            rows, positions, orientations, centres, strict=True
        )
    )


def _lists(rows: Sequence[Any], column: int) -> list[Any]:
    lists: list[Any] = json.loads(f"[{','.join(row[column] or 'null' for row in rows)}]")
    return lists


def quality_of(row: schema.Curve) -> Quality:
    """Return the quality of a stored curve."""
    return Quality(row.pearson_r, row.slope, tuple(Flag(f) for f in row.flags))


def body_centres(row: schema.Curve) -> Floats | None:
    """Return (N, 2) body centres of a stored curve, x and y mm, None where none is known."""
    if row.body_centre is None:
        return None
    return array(row.body_centre, "<f8").astype(np.float64).reshape(-1, 2)


def instances(row: schema.Curve) -> list[tuple[str, int, int]]:
    """Return (SOP Instance UID, frame, index into frames_of_reference) of each slice."""
    return [(uid, frame, f) for uid, frame, f, *_ in json.loads(zlib.decompress(row.instances))]


def sop_classes(row: schema.Curve) -> list[str | None]:
    """Return the SOP Class UID of each slice, None where it was not kept."""
    members = json.loads(zlib.decompress(row.instances))
    if row.sop_classes is None:
        return [None] * len(members)
    return [row.sop_classes[member[3]] for member in members]


def _coverage(
    row: schema.Curve, heights: HeightMap, regions: tuple[Region, ...]
) -> tuple[tuple[Region, float], ...]:
    if not regions:
        return ()
    z_mm, score = array(row.z_mm, "<f8"), array(row.score, "<f4")
    return tuple(region.coverage(z_mm, heights(score), regions))


def array(data: bytes, dtype: str) -> np.ndarray[Any, Any]:
    """Return stored bytes as an array."""
    return np.frombuffer(data, dtype)
