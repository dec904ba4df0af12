"""Two Studies side by side, aligned by their offset, and scrolled as one."""

from typing import Any

from fastapi import Request, Response

from dicomnode import query, store
from dicomnode.core import strip
from dicomnode.model import Method, OffsetStatus, ScoreCurve
from dicomnode.query import PairMap
from dicomnode.web.answer import FixedUID, MovingUID
from dicomnode.web.pages.picture import strip_address
from dicomnode.web.pages.route import Visitor, pages, show
from dicomnode.web.pages.series import bands, slices_of
from dicomnode.web.problem import Problem

router = pages()

JSON = dict[str, Any]
REVISED = "a Series of the pair is being revised: try again"
NINETY = 1.645  # 90 % of errors lie within so many sigma


@router.get("/studies/{fixed}/offsets/{moving}")
def pair(
    request: Request,
    caller: Visitor,
    fixed: FixedUID,
    moving: MovingUID,
    method: Method | None = None,
) -> Response:
    """Return the page of a pair of Studies, by the best offset or by that of a method."""
    part = caller.part
    caller.saw(command="pair page", study_uid=[fixed, moving])
    found = query.slice_map(part.engine, fixed, moving, method)
    if found is None:
        raise Problem(404, "no pair of curves of these two Studies")
    others = {m: query.pair(part.engine, fixed, moving, m) for m in Method}
    best = found.stored
    with store.reading(part.engine) as session:
        uids = [best.fixed_series, best.moving_series]
        curves = store.curves_of(session, uids)
        rows = [next(iter(store.list_series(session, series_uid=uid)), None) for uid in uids]
        kept = [store.has_previews(session, uid) for uid in uids]
        if any(uid not in curves for uid in uids) or any(row is None for row in rows):
            raise Problem(404, REVISED)
        if found.slices and len(found.slices) != len(curves[best.fixed_series].z_mm):
            raise Problem(404, REVISED)
        regions = store.regions_of(session, best.model)
    sides = [
        {"row": row, "key": part.keys.key(row.patient), "curve": curves[row.series_uid], "kept": k}
        for row, k in zip(rows, kept, strict=True)
        if row is not None
    ]
    figure = _figure(found, sides, regions) if found.slices else None
    return show(
        request,
        caller,
        "pair.html",
        fixed=fixed,
        moving=moving,
        best=best,
        within=None if best.offset.sigma_mm is None else NINETY * best.offset.sigma_mm,
        asked=method,
        others=[o.stored for o in others.values() if o is not None],
        sides=sides,
        figure_=figure,
        refused=best.offset.status is OffsetStatus.REFUSED,
        ninety=NINETY,
    )


def _figure(found: PairMap, sides: list[JSON], regions: Any) -> JSON:
    """Return both Series on one axis, z of the fixed one."""
    offset = found.stored.offset
    assert offset.offset_mm is not None
    shifts = (0.0, offset.offset_mm)
    curves: list[ScoreCurve] = [side["curve"] for side in sides]
    spans = [strip.span(curve.z_mm) for curve in curves]
    low = min(s[0] + shift for s, shift in zip(spans, shifts, strict=True))
    high = max(s[1] + shift for s, shift in zip(spans, shifts, strict=True))
    drawn = []
    strips = []
    for side, curve, shift, name in zip(sides, curves, shifts, ("current", "prior"), strict=True):
        revision = side["row"].revision
        values = slices_of(curve, revision, name, side["kept"])
        drawn.append(values | {"shift": shift})
        address = strip_address(curve, revision, low - shift, high - shift)
        strips.append(address if side["kept"] else None)
    matched = [-1 if m.moving is None else m.moving.index for m in found.slices]
    shown = [i for i, at in enumerate(matched) if at >= 0]
    return {
        "strips": strips,
        "chart": {
            "low": low,
            "high": high,
            "curves": drawn,
            "bands": bands(curves[0], regions),
            "within": None if offset.sigma_mm is None else NINETY * offset.sigma_mm,
            "start": shown[len(shown) // 2] if shown else len(matched) // 2,
            "map": matched,
        },
    }
