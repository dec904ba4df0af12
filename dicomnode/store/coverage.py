"""What mining asks of a curve: written with the curve, in a few numbers a Series.

Reads a curve, writes `coverage`, and `stretch` where slices are missing. Both go with the curve:
the database drops them when it drops that.
"""

from collections.abc import Callable

import numpy as np
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from db import schema
from dicomnode.core import region
from dicomnode.core.curve import HeightMap
from dicomnode.model import Flag, ScoreCurve
from dicomnode.store.rows import to_curve
from dicomnode.store.session import insert, reading, upsert, writing

# A cell names the steps of body height in which a curve begins and ends.
STEP_UM = 20 * region.UM_PER_MM
STEPS = 256  # from 2.56 m below height 0; what lies further counts in the first or last one
# A flag's bit is stored: a new one gets the next, and none is ever used again.
BITS = {
    Flag.DUPLICATE_POSITION: 1 << 0,
    Flag.GAP: 1 << 1,
    Flag.UNEVEN_SPACING: 1 << 2,
    Flag.FRAME_OF_REFERENCE_VARIES: 1 << 3,
    Flag.LOW_CORRELATION: 1 << 4,
    Flag.REVERSED: 1 << 5,
    Flag.SLOPE: 1 << 6,
    Flag.SLICES_REFUSED: 1 << 7,
    Flag.OTHER_MODEL: 1 << 8,
    Flag.PATIENT_POSITION: 1 << 9,
    Flag.TILT: 1 << 10,
}
MAX_SPACING_UM = region.LIMIT_UM
BACKFILL = 200  # curves in a transaction: a node beside waits no longer than for a second


def step(height_um: int) -> int:
    """Return the step that holds a body height, 0 to STEPS - 1."""
    return min(max(height_um // STEP_UM + STEPS // 2, 0), STEPS - 1)


def cell(low_um: int, high_um: int) -> int:
    """Return the number of the cell of a curve that begins and ends there."""
    return step(low_um) * STEPS + step(high_um)


def flags_of(bits: int) -> tuple[Flag, ...]:
    """Return the flags of stored bits."""
    return tuple(flag for flag, bit in BITS.items() if bits & bit)


def store_coverage(session: Session, series_id: int, curve: ScoreCurve) -> None:
    """Write what mining asks of a curve that this transaction stored."""
    filled = region.stretches(curve.z_mm, curve.height_mm)
    low_um, high_um = filled[0][0], filled[-1][1]
    spacing_um = round(float(np.median(np.diff(curve.z_mm))) * region.UM_PER_MM)
    values = {
        "series_id": series_id,
        "bundle": _number(session, curve.model),
        "cell": cell(low_um, high_um),
        "low_um": low_um,
        "high_um": high_um,
        "stretches": len(filled),
        "slices": len(curve.z_mm),
        "spacing_um": min(spacing_um, MAX_SPACING_UM),
        "flags": sum(BITS[flag] for flag in curve.quality.flags),
        "quality": curve.quality.pearson_r,
        "slope": curve.quality.slope,
    }
    upsert(session, schema.Coverage, [values])
    if len(filled) > 1:
        rows = [{"series_id": series_id, "low_um": low, "high_um": high} for low, high in filled]
        upsert(session, schema.Stretch, rows)


def count_uncovered(engine: Engine) -> int:
    """Return how many curves mining knows nothing of: those stored before schema 0003."""
    with reading(engine) as session:
        query = select(func.count()).select_from(schema.Curve).outerjoin(*_OF_CURVE)
        return session.scalar(query.where(schema.Coverage.series_id.is_(None))) or 0


def cover_curves(engine: Engine, progress: Callable[[int], None] = lambda n: None) -> int:
    """Write what mining asks of curves that were stored before schema 0003; return how many.

    What is done stays done: killed, it goes on where it was.
    """
    done, after = 0, 0
    while True:
        with writing(engine) as session:
            rows = session.execute(
                select(schema.Series.series_uid, schema.Curve, schema.Model.manifest)
                .join(schema.Curve, schema.Curve.series_id == schema.Series.id)
                .join(schema.Model, schema.Model.digest == schema.Curve.model)
                .outerjoin(*_OF_CURVE)
                .where(schema.Coverage.series_id.is_(None), schema.Curve.series_id > after)
                .order_by(schema.Curve.series_id)
                .limit(BACKFILL)
                # A Series finished meanwhile writes its own, or waits for this.
                .with_for_update(of=schema.Curve)
            ).all()
            for uid, row, manifest in rows:
                curve = to_curve(uid, row, HeightMap(**manifest["heights"]))
                store_coverage(session, row.series_id, curve)
                after = row.series_id
        if not rows:
            return done
        done += len(rows)
        progress(len(rows))


_OF_CURVE = (schema.Coverage, schema.Coverage.series_id == schema.Curve.series_id)


def _number(session: Session, digest: str) -> int:
    """Return the number of a bundle, a new one where it has none."""
    query = select(schema.Bundle.id).where(schema.Bundle.digest == digest)
    number = session.scalar(query)
    if number is None:
        values = {"digest": digest}
        session.execute(insert(session, schema.Bundle).values(values).on_conflict_do_nothing())
        number = session.scalars(query).one()
    return number
