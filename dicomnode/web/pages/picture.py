"""PNG of what the network saw: one slice, or a coronal strip through all of a Series."""

from typing import Annotated

import numpy as np
from fastapi import Path, Query, Response

from dicomnode import store
from dicomnode.core import png, preview, strip
from dicomnode.log import Seldom
from dicomnode.model import ScoreCurve
from dicomnode.web.access import Caller
from dicomnode.web.answer import SeriesUID
from dicomnode.web.pages.route import Visitor, pages
from dicomnode.web.problem import Problem

router = pages()

PIXEL_MM = 3.5  # of an input, as `PreprocessSpec` has it by default
TOLD_S = 60.0
# The address of a picture holds the revision of its curve: what is there does not change.
KEPT = {"Cache-Control": "private, max-age=600"}

Millimetres = Annotated[float, Query(ge=-1e6, le=1e6, allow_inf_nan=False)]

_seldom = Seldom(TOLD_S)


@router.get("/series/{series_uid}/slices/{index}.png")
def slice_png(
    caller: Visitor,
    series_uid: SeriesUID,
    index: Annotated[int, Path(ge=0, le=100_000, description="In the curve, feet to head.")],
) -> Response:
    """Return the input of one slice as the network saw it."""
    _saw(caller, series_uid)
    with store.reading(caller.part.engine) as session:
        packed = store.preview_of(session, series_uid, index)
    if packed is None:
        raise Problem(404, "this slice is not kept")
    return Response(png.encode(preview.unpack(packed)), media_type="image/png", headers=KEPT)


@router.get("/series/{series_uid}/strip.png")
def strip_png(
    caller: Visitor,
    series_uid: SeriesUID,
    low: Annotated[Millimetres | None, Query(alias="from")] = None,
    high: Annotated[Millimetres | None, Query(alias="to")] = None,
) -> Response:
    """Return a coronal strip from one z to another; left out, over all of the Series."""
    _saw(caller, series_uid)
    with store.reading(caller.part.engine) as session:
        curve = store.curve_of(session, series_uid)
        packed = store.previews_of(session, series_uid) if curve else None
    if curve is None or packed is None or len(packed) != len(curve.z_mm):
        raise Problem(404, "the slices of this Series are not kept")
    ends = strip.span(curve.z_mm)
    low, high = ends[0] if low is None else low, ends[1] if high is None else high
    if not high > low:
        raise Problem(422, "from lies below to")
    # One at a time: all of a long Series at once is 50 MB.
    lines = np.concatenate([strip.middle(preview.unpack(p)[None]) for p in packed])
    # A Series far away from the window is not to make a picture of a million rows.
    pixel_mm = max(PIXEL_MM, (high - low) / strip.MAX_ROWS)
    picture = strip.strip(lines, curve.z_mm, low, high, pixel_mm)
    return Response(png.encode(picture), media_type="image/png", headers=KEPT)


def strip_address(curve: ScoreCurve, revision: int, low: float, high: float) -> str:
    """Return where the strip of a curve is, over a window of its z."""
    return f"/series/{curve.series_uid}/strip.png?from={low:.3f}&to={high:.3f}&r={revision}"


def _saw(caller: Caller, series_uid: str) -> None:
    """Record that somebody looks at slices: once a minute, not for each of a hundred."""
    if count := _seldom.due((caller.holder.name, caller.address, series_uid)):
        caller.saw(command="previews", series_uid=series_uid, count=count if count > 1 else None)
