"""Questions shared by CLI, REST and page: read only, answered from the database."""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from sqlalchemy import Engine

from dicomnode import store
from dicomnode.core import align, geometry, opening, slicemap
from dicomnode.core import region as regional
from dicomnode.core.curve import long_axis
from dicomnode.core.region import Extent, Region
from dicomnode.core.robust import Covariance
from dicomnode.core.slicemap import Line
from dicomnode.errors import ObjectError, RegionError
from dicomnode.model import Floats, Method, OffsetStatus, ScoreCurve
from dicomnode.store import KnownSource, SeriesRow, StoredOffset


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
    position = np.array([s.image_position for s in opened.slices])
    z_mm = geometry.axis_positions(position, normal, long_axis(opened.slices))
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
class Place:
    """One slice of a curve."""

    sop_instance_uid: str
    frame: int  # counted from 1, as in PS3.3
    index: int  # in the curve, feet to head, counted from 0
    z_mm: float  # along the patient's long axis
    height_mm: float  # body height


@dataclass(frozen=True, slots=True)
class View:
    """Where to begin to look at a region in a Series."""

    series_uid: str
    model: str  # digest of the bundle whose regions these are
    region: Region
    extent: Extent | None  # None: nothing of it is shown
    share: float | None  # of the region that is covered, None where one of its ends is not known
    # To open first: the middle of what is shown of the region; None where it is not shown.
    place: Place | None
    nearest: Place | None  # then, the slice nearest to it; None where no limit of it is known
    # From there to the region, body height: positive where it lies towards the head.
    distance_mm: float | None


def view(engine: Engine, series_uid: str, region: str) -> View | None:
    """Return which slice of a Series to open first for a region; None where it has no curve.

    Parameters
    ----------
    region
        The region's name, in any case, or its SNOMED CT code.

    Raises
    ------
    RegionError
        If the bundle that made the curve does not know it; the message names those it knows.
    """
    with store.reading(engine) as session:
        curve = store.curve_of(session, series_uid)
        if curve is None:
            return None
        regions = store.regions_of(session, curve.model)
    wanted = regional.lookup(regions, region)
    if wanted is None:
        names = ", ".join(r.name for r in regions) or "none: it was not calibrated"
        raise RegionError(f"no region {region[:64]!a}; bundle {curve.model[:16]} has {names}")
    found = opening.opening(curve.z_mm, curve.height_mm, wanted)
    if found is None:
        return View(series_uid, curve.model, wanted, None, None, None, None, None)
    place = _place(curve, found.index)
    if found.shown is None:
        shares = regional.coverage(curve.z_mm, curve.height_mm, [wanted])
        share = shares[0][1] if shares else None
        return View(series_uid, curve.model, wanted, None, share, None, place, found.distance_mm)
    shown = found.shown
    return View(series_uid, curve.model, wanted, shown.extent, shown.share, place, None, None)


@dataclass(frozen=True, slots=True)
class Matched:
    """A fixed slice, and the moving one that shows the same, where there is one."""

    fixed: Place
    moving: Place | None
    distance_mm: float | None  # towards the head, from the fixed slice to the moving one


@dataclass(frozen=True, slots=True)
class PairMap:
    """The slices of a fixed Series with those of a moving one, under the offset between them."""

    stored: StoredOffset
    slices: tuple[Matched, ...]  # every fixed slice, feet to head; empty of a refused offset
    line: Line | None  # the same as a straight line, None where the slices are too uneven


def slice_map(
    engine: Engine, fixed_study: str, moving_study: str, method: Method | None = None
) -> PairMap | None:
    """Return which slice of one Study shows what a slice of the other does; None without a pair.

    Of the two Series, and by the offset, that `pair` gives.
    """
    found = pair(engine, fixed_study, moving_study, method)
    if found is None:
        return None
    offset_mm = found.stored.offset.offset_mm
    if found.stored.offset.status is OffsetStatus.REFUSED or offset_mm is None:
        return PairMap(found.stored, (), None)
    sides = found.fixed.z_mm, found.moving.z_mm
    nearest = slicemap.slice_map(*sides, offset_mm)
    matched = tuple(
        Matched(_place(found.fixed, i), None, None)
        if at == slicemap.NONE
        else Matched(_place(found.fixed, i), _place(found.moving, at), distance)
        for i, (at, distance) in enumerate(
            zip(nearest.index.tolist(), nearest.distance_mm.tolist(), strict=True)
        )
    )
    return PairMap(found.stored, matched, slicemap.line(*sides, offset_mm))


def _place(curve: ScoreCurve, index: int) -> Place:
    return Place(
        curve.sop_instance_uids[index],
        curve.frames[index],
        index,
        float(curve.z_mm[index]),
        float(curve.height_mm[index]),
    )


def source_of(engine: Engine, curve: ScoreCurve) -> KnownSource:
    """Return the Series of a stored curve as an object refers to it.

    Raises
    ------
    ObjectError
        If it is not known which SOP Class its Instances have, or the curve was revised meanwhile.
    """
    with store.reading(engine) as session:
        found = store.source_of(session, curve.series_uid)
    slices = curve.sop_instance_uids, curve.frames, curve.model
    if found is None or slices != (
        found.curve.sop_instance_uids,
        found.curve.frames,
        found.curve.model,
    ):
        raise ObjectError(f"Series {curve.series_uid} was revised meanwhile: ask again")
    return found
