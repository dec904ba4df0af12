"""Questions shared by CLI, REST and page: read only, answered from the database."""

from dataclasses import dataclass
from datetime import UTC, datetime, time

import numpy as np
from pydicom.dataset import Dataset
from sqlalchemy import Engine, select

from db import schema
from dicomnode import store
from dicomnode.core import admission, align, geometry
from dicomnode.core.region import Region
from dicomnode.core.robust import Covariance
from dicomnode.errors import ObjectError
from dicomnode.model import Floats, Method, ScoreCurve
from dicomnode.objects import source
from dicomnode.objects.source import Source
from dicomnode.store import SeriesRow, StoredOffset


@dataclass(frozen=True, slots=True)
class SeriesCurve:
    """A Series with its curve; where it is still open, with what was scored so far."""

    series: SeriesRow
    curve: ScoreCurve | None
    live_z_mm: Floats  # (n,) positions along the long axis, feet to head
    live_height_mm: Floats  # (n,)
    regions: tuple[Region, ...] = ()  # of the bundle that made the curve


def series_curve(engine: Engine, series_uid: str) -> SeriesCurve | None:
    """Return a Series and its curve, None where the node never saw it."""
    with store.reading(engine) as session:
        rows = store.list_series(session, series_uid=series_uid)
        if not rows:
            return None
        found = store.curve_of(session, series_uid)
        opened = store.open_slices(session, series_uid)
        if opened is None or opened.model is None:
            regions = store.regions_of(session, found.model) if found else ()
            return SeriesCurve(rows[0], found, np.empty(0), np.empty(0), regions)
        heights = store.heights_of(session, opened.model)
    normal = geometry.slice_normal(np.array(opened.slices[0].image_orientation))
    z_mm = geometry.axis_positions(np.array([s.image_position for s in opened.slices]), normal)
    order = np.argsort(z_mm)
    height_mm = heights([s.score for s in opened.slices])
    return SeriesCurve(rows[0], found, z_mm[order], height_mm[order])


@dataclass(frozen=True, slots=True)
class PairAnswer:
    """The best offset of a study pair, with the two curves it aligns."""

    stored: StoredOffset
    fixed: ScoreCurve
    moving: ScoreCurve


def pair(
    engine: Engine, fixed_study: str, moving_study: str, method: Method | None = None
) -> PairAnswer | None:
    """Return the most trustworthy offset of moving onto fixed, None where there is no pair.

    Pairs of one patient are stored with the newer study fixed. Any other pair, or the same
    one the other way round, is computed here from its stored curves.
    """
    with store.reading(engine) as session:
        offsets = store.offsets_of(
            session, fixed_study=fixed_study, moving_study=moving_study, method=method
        )
        studies = {
            row.series_uid: study
            for study in (fixed_study, moving_study)
            for row in store.list_series(session, study_uid=study)
        }
        curves = store.curves_of(session, studies)
        covariances = {
            model: store.covariance_of(session, model)
            for model in {c.model for c in curves.values()}
        }
    offsets = [o for o in offsets if o.fixed_series in curves and o.moving_series in curves]
    if not offsets:
        offsets = _compute(curves, covariances, studies, fixed_study, moving_study, method)
    if not offsets:
        return None
    best = offsets[0]
    return PairAnswer(best, curves[best.fixed_series], curves[best.moving_series])


def _compute(
    curves: dict[str, ScoreCurve],
    covariances: dict[str, Covariance | None],
    studies: dict[str, str],
    fixed_study: str,
    moving_study: str,
    method: Method | None,
) -> list[StoredOffset]:
    found = []
    for f in (uid for uid in curves if studies[uid] == fixed_study):
        for m in (uid for uid in curves if studies[uid] == moving_study and uid != f):
            if curves[f].model != curves[m].model:
                continue
            start = datetime.now(UTC)
            covariance = covariances[curves[f].model]
            offset = align.align(curves[f], curves[m], method or Method.ROBUST, covariance)
            now = datetime.now(UTC)
            found.append(
                StoredOffset(
                    offset=offset,
                    fixed_study=fixed_study,
                    fixed_series=f,
                    moving_study=moving_study,
                    moving_series=m,
                    model=curves[f].model,
                    computed_at=now,
                    seconds=(now - start).total_seconds(),
                )
            )
    return sorted(found, key=store.trust)


@dataclass(frozen=True, slots=True)
class KnownSource:
    """A Series as an object refers to it, as far as the database knows it."""

    source: Source
    revision: int  # of its curve
    computed_at: datetime  # the curve
    model_name: str  # of the bundle that made it


def source_of(engine: Engine, curve: ScoreCurve) -> KnownSource:
    """Return the Series of a stored curve; what the database does not keep is empty.

    Raises
    ------
    ObjectError
        If it is not known which SOP Class its Instances have.
    """
    if set(curve.frames) != {1}:
        raise ObjectError(f"the SOP Class of Series {curve.series_uid} was not kept")
    with store.reading(engine) as session:
        (row,) = store.list_series(session, series_uid=curve.series_uid)
        frames_of_reference, computed_at = session.execute(
            select(schema.Curve.frames_of_reference, schema.Curve.computed_at)
            .join(schema.Series)
            .where(schema.Series.series_uid == curve.series_uid)
        ).one()
        name = str(store.manifest_of(session, curve.model)["name"])
    classes = dict.fromkeys(curve.sop_instance_uids, admission.CT_IMAGE)
    header = Dataset()
    header.StudyInstanceUID, header.SeriesInstanceUID = row.study_uid, row.series_uid
    header.PatientID = row.patient.patient_id
    header.BodyPartExamined = row.body_part_examined
    if row.study_datetime is not None:
        header.StudyDate = row.study_datetime.strftime("%Y%m%d")
        if row.study_datetime.time() != time.min:  # midnight: the header told no time
            header.StudyTime = row.study_datetime.strftime("%H%M%S")
    instances = source.instances_of(curve, classes)
    known = source.of_header(header, instances, frames_of_reference)
    return KnownSource(known, row.revision, computed_at, name)
