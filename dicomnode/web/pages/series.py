"""One Series: its curve, what it looks like beside the curve, and its slices."""

from typing import Any

import numpy as np
from fastapi import Request, Response

from dicomnode import query, store
from dicomnode.core import region, strip
from dicomnode.core.region import Region
from dicomnode.model import ScoreCurve
from dicomnode.query import SeriesCurve
from dicomnode.web.answer import SeriesUID
from dicomnode.web.pages.picture import strip_address
from dicomnode.web.pages.route import Visitor, pages, show
from dicomnode.web.problem import Problem

router = pages()

JSON = dict[str, Any]


@router.get("/series/{series_uid}")
def series(request: Request, caller: Visitor, series_uid: SeriesUID) -> Response:
    """Return the page of a Series."""
    part = caller.part
    caller.saw(command="series page", series_uid=series_uid)
    found = query.series_curve(part.engine, series_uid)
    if found is None:
        raise Problem(404, "the node never saw this Series")
    with store.reading(part.engine) as session:
        has_previews = found.curve is not None and store.has_previews(session, series_uid)
        pairs = store.pairs_of_study(session, found.series.study_uid)
        pairs = [p for p in pairs if series_uid in (p.fixed_series, p.moving_series)]
        studies = {uid for p in pairs for uid in (p.fixed_study, p.moving_study)}
        when = store.times_of_studies(session, studies)
    values: JSON = {"chart": None, "strip": None, "regions": []}
    if found.curve is not None:
        values = _curve(found, found.curve, has_previews)
    return show(
        request,
        caller,
        "series.html",
        row=found.series,
        key=part.keys.key(found.series.patient),
        curve=found.curve,
        has_previews=has_previews,
        pairs=pairs,
        when=when,
        live=len(found.live_z_mm),
        **values,
    )


def _curve(found: SeriesCurve, curve: ScoreCurve, has_previews: bool) -> JSON:
    low, high = strip.span(curve.z_mm)
    revision = found.series.revision
    return {
        "chart": {
            "low": low,
            "high": high,
            "curves": [slices_of(curve, revision, "score", has_previews)],
            "bands": bands(curve, found.regions),
            "start": len(curve.z_mm) // 2,
        },
        "strip": strip_address(curve, revision, low, high) if has_previews else None,
        "regions": [
            {
                "name": s.region.name,
                "meaning": s.region.meaning,
                "part": s.region.part,
                "share": None if s.share is None else round(100 * s.share),
                "extent": s.extent,
                "first": s.first,
                "last": s.last,
                "middle": (s.first + s.last) // 2,
            }
            for s in region.showing(curve.z_mm, curve.height_mm, found.regions)
        ],
    }


def slices_of(curve: ScoreCurve, revision: int, name: str, has_previews: bool) -> JSON:
    """Return a curve as charts take it, and where its slices are."""
    return {
        "name": name,
        "z": [round(z, 3) for z in curve.z_mm.tolist()],
        "height": [round(h, 1) for h in curve.height_mm.tolist()],
        "slices": f"/series/{curve.series_uid}/slices/" if has_previews else None,
        "revision": revision,
    }


def bands(curve: ScoreCurve, regions: tuple[Region, ...]) -> list[JSON]:
    """Return which stretch of z shows each body part, feet to head; organs are listed apart."""
    z = curve.z_mm
    edges = np.concatenate([[strip.span(z)[0]], (z[1:] + z[:-1]) / 2, [strip.span(z)[1]]])
    return [
        {
            "name": s.region.name,
            "low": round(float(edges[s.first]), 3),
            "high": round(float(edges[s.last + 1]), 3),
        }
        for s in region.showing(z, curve.height_mm, regions)
        if not s.region.part
    ]
