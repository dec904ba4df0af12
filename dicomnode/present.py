"""Answers as people and programs read them: JSON of one shape everywhere, tables, CSV, lines."""

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from dicomnode.core import region
from dicomnode.core.region import Region
from dicomnode.files import ScoredSeries
from dicomnode.model import DeliveryState, Quality, ScoreCurve, SeriesState
from dicomnode.query import PairMap, Place, View
from dicomnode.spool.survey import Part
from dicomnode.store import Delivery, Histogram, Match, SeriesRow, StoredOffset

JSON = dict[str, Any]


def scored_json(scored: ScoredSeries, regions: Sequence[Region] = ()) -> JSON:
    """Return a Series scored from files, with its share of the bundle's regions."""
    header, outcome = scored.header, scored.outcome
    values: JSON = {
        "patient_id": header.patient.patient_id,
        "study_uid": header.study_uid,
        "series_uid": header.series_uid,
    }
    if isinstance(outcome, ScoreCurve):
        values |= {"state": SeriesState.CURVE, "reason": None, "model": outcome.model}
        values |= {"slices": slices_json(outcome), "quality": quality_json(outcome.quality)}
    else:
        values |= {"state": outcome.reason.state, "reason": outcome.reason, "model": None}
        values |= {"slices": [], "quality": None}
    shares = (
        region.coverage(outcome.z_mm, outcome.height_mm, regions)
        if isinstance(outcome, ScoreCurve)
        else []
    )
    return values | {"coverage": coverage_json(shares), "set_aside": scored.set_aside}


def curve_json(curve: ScoreCurve, regions: Sequence[Region] = ()) -> JSON:
    """Return a stored curve, with its share of its bundle's regions."""
    return {
        "series_uid": curve.series_uid,
        "model": curve.model,
        "slices": slices_json(curve),
        "quality": quality_json(curve.quality),
        "coverage": coverage_json(region.coverage(curve.z_mm, curve.height_mm, regions)),
    }


def slices_json(curve: ScoreCurve) -> list[JSON]:
    """Return the slices of a curve, feet to head."""
    columns = zip(
        curve.sop_instance_uids, curve.frames, curve.z_mm, curve.score, curve.height_mm, strict=True
    )
    return [
        {
            "sop_instance_uid": uid,
            "frame": frame,
            "z_mm": round(float(z), 4),
            "score": round(float(score), 5),
            "height_mm": round(float(height), 2),
        }
        for uid, frame, z, score, height in columns
    ]


def coverage_json(shares: Sequence[tuple[Region, float]]) -> list[JSON]:
    """Return the share of each region that a Series covers; empty where nothing is claimed."""
    return [{"region": r.name, "code": r.code, "fraction": round(f, 4)} for r, f in shares]


def quality_json(quality: Quality) -> JSON:
    """Return a curve's quality; its flags go by the name of reasons."""
    return {
        "pearson_r": quality.pearson_r,
        "slope": quality.slope,
        "reasons": list(quality.flags),
    }


def series_json(row: SeriesRow) -> JSON:
    """Return where a Series stands."""
    return {
        "patient_id": row.patient.patient_id,
        "issuer": row.patient.issuer,
        "study_uid": row.study_uid,
        "series_uid": row.series_uid,
        "study_datetime": row.study_datetime.isoformat() if row.study_datetime else None,
        "modality": row.modality,
        "body_part_examined": row.body_part_examined,
        "state": row.state,
        "reason": row.reason,
        "evidence": row.evidence,
        "revision": row.revision,
        "received": row.received,
        "scored": row.scored,
        "expected": row.expected,
        "set_aside": row.set_aside,
        "last_arrival_at": row.last_arrival_at.isoformat(),
        "model": row.model,
        "height_mm": row.height_mm,
        "quality": quality_json(row.quality) if row.quality else None,
        "coverage": coverage_json(row.coverage),
    }


def offset_json(stored: StoredOffset) -> JSON:
    """Return the offset of a pair; what was not estimated is null, never 0."""
    offset = stored.offset
    return {
        "fixed": {"study_uid": stored.fixed_study, "series_uid": stored.fixed_series},
        "moving": {"study_uid": stored.moving_study, "series_uid": stored.moving_series},
        "method": offset.method,
        "offset_mm": offset.offset_mm,
        "sigma_mm": offset.sigma_mm,
        "overlap_mm": offset.overlap_mm,
        "status": offset.status,
        "reason": offset.reason,
        "dx_mm": offset.dx_mm,
        "dy_mm": offset.dy_mm,
        "model": stored.model,
        "computed_at": stored.computed_at.isoformat(),
        "seconds": stored.seconds,
    }


def place_json(place: Place | None) -> JSON | None:
    """Return one slice as `slices_json` has it, and which it is; null where there is none."""
    if place is None:
        return None
    return {
        "sop_instance_uid": place.sop_instance_uid,
        "frame": place.frame,
        "index": place.index,
        "z_mm": round(place.z_mm, 4),
        "height_mm": round(place.height_mm, 2),
    }


def view_json(view: View) -> JSON:
    """Return the slice to open first, `slice`; of a region that is not shown, `nearest`."""
    return {
        "series_uid": view.series_uid,
        "model": view.model,
        "region": view.region.name,
        "code": view.region.code,
        "extent": view.extent,
        "fraction": None if view.share is None else round(view.share, 4),
        "slice": place_json(view.place),
        "nearest": place_json(view.nearest),
        "distance_mm": None if view.distance_mm is None else round(view.distance_mm, 2),
    }


def view_line(view: View) -> str:
    """Return the same for people."""
    name = view.region.name
    if view.nearest is not None and view.distance_mm is not None:
        side = "head" if view.distance_mm >= 0 else "feet"
        return (
            f"{name} is not shown: the nearest slice, {_placed(view.nearest)}, "
            f"is {abs(view.distance_mm):.0f} mm of body height from it; it lies towards the {side}"
        )
    if view.place is None:
        return f"{name}: the bundle does not know where it begins and ends"
    share = "" if view.share is None else f", {100 * view.share:.0f} % of it shown"
    return f"{name}, {view.extent}{share}: {_placed(view.place)}"


def _placed(place: Place) -> str:
    frame = f", frame {place.frame}" if place.frame != 1 else ""
    return f"{place.sop_instance_uid}{frame} at z {place.z_mm:.1f} mm"


def map_json(found: PairMap) -> JSON:
    """Return the slices of a pair: each fixed one, and the moving one that shows the same."""
    line = found.line
    return {
        "offset": offset_json(found.stored),
        "line": None if line is None else {"intercept": line.intercept, "slope": line.slope},
        "slices": [
            {
                "fixed": place_json(m.fixed),
                "moving": place_json(m.moving),
                "distance_mm": None if m.distance_mm is None else round(m.distance_mm, 4),
            }
            for m in found.slices
        ],
    }


def map_table(found: PairMap) -> Table:
    """Return the same as a table for a terminal, feet first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("fixed", overflow="fold")
    table.add_column("z, mm", justify="right")
    table.add_column("moving", overflow="fold")
    for title in ("z, mm", "off by, mm"):
        table.add_column(title, justify="right")
    for m in found.slices:
        moving, away = m.moving, m.distance_mm
        table.add_row(
            _named(m.fixed),
            f"{m.fixed.z_mm:.1f}",
            "-" if moving is None else _named(moving),
            "" if moving is None else f"{moving.z_mm:.1f}",
            "" if away is None else f"{away:+.1f}",
        )
    return table


def _named(place: Place) -> str:
    uid, frame = place.sop_instance_uid, place.frame
    return uid if frame == 1 else f"{uid}#{frame}"


def delivery_json(delivery: Delivery) -> JSON:
    """Return a delivery and how it stands."""
    what = delivery.what
    return {
        "id": delivery.id,
        "kind": what.kind,
        "destination": what.destination,
        "rule": what.rule or None,
        "subject": what.subject,
        "other": what.other or None,
        "state": delivery.state,
        "reason": delivery.reason,
        "attempts": delivery.attempts,
        "version": delivery.version,
        "asked_at": delivery.asked_at.isoformat(),
        "due_at": delivery.due_at.isoformat() if delivery.state == DeliveryState.WAITING else None,
        "done_at": delivery.done_at.isoformat() if delivery.done_at else None,
        "sop_instance_uid": delivery.sop_instance_uid,
        "commitment": delivery.commitment,
    }


def delivery_table(deliveries: Sequence[Delivery]) -> Table:
    """Return deliveries as a table for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("id", justify="right")
    for title in ("what", "to", "of", "state"):
        table.add_column(title, overflow="fold")
    table.add_column("tries", justify="right")
    for title in ("when", "reason, commitment"):
        table.add_column(title, overflow="fold")
    for d in deliveries:
        what = d.what
        when = d.due_at if d.state == DeliveryState.WAITING else d.done_at or d.asked_at
        notes = [d.reason, f"commitment {d.commitment}" if d.commitment else None]
        table.add_row(
            str(d.id),
            f"{what.kind} ({what.rule})" if what.rule else str(what.kind),
            what.destination,
            f"{what.subject} {what.other}".strip(),
            str(d.state),
            str(d.attempts),
            f"{when.astimezone():%Y-%m-%d %H:%M:%S}",
            "; ".join(note for note in notes if note),
        )
    return table


def series_table(rows: Sequence[SeriesRow]) -> Table:
    """Return Series as a table for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("series", "study", "patient", "state"):
        table.add_column(title, overflow="fold")
    for title in ("slices", "r", "slope", "body height, mm"):
        table.add_column(title, justify="right")
    for title in ("covers", "set aside, flags"):
        table.add_column(title, overflow="fold")
    for row in rows:
        quality = row.quality
        aside = [f"{reason} {count}" for reason, count in sorted(row.set_aside.items())]
        table.add_row(
            row.series_uid,
            row.study_uid,
            row.patient.patient_id or "-",
            row.state if row.reason is None else f"{row.state}:{row.reason}",
            f"{row.scored}/{row.received}",
            f"{quality.pearson_r:.4f}" if quality else "",
            f"{quality.slope:.2f}" if quality else "",
            f"{row.height_mm[0]:.0f}..{row.height_mm[1]:.0f}" if row.height_mm else "",
            ", ".join(region.shown(row.coverage)),
            ", ".join([*aside, *(quality.flags if quality else ())]),
        )
    return table


def spool_json(part: Part) -> JSON:
    """Return what is in a slot or folder of the spool."""
    values = asdict(part)
    return values | {"oldest": part.oldest.isoformat() if part.oldest else None}


def spool_table(parts: Sequence[Part]) -> Table:
    """Return what waits in the spool as a table for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("where", "writer"):
        table.add_column(title)
    for title in ("segments", "free", "damaged", "on disk, MB", "waiting", "MB"):
        table.add_column(title, justify="right")
    table.add_column("oldest")
    for part in parts:
        counts = (part.segments, part.free, part.damaged)
        table.add_row(
            part.name,
            {None: "", True: "yes", False: "no"}[part.has_writer],
            *("" if part.has_writer is None else str(n) for n in counts),
            f"{part.disk_bytes / 1e6:.1f}",
            str(part.waiting),
            f"{part.waiting_bytes / 1e6:.1f}",
            f"{part.oldest:%Y-%m-%d %H:%M:%S} UTC" if part.oldest else "",
        )
    return table


def match_json(match: Match) -> JSON:
    """Return a Series that an expression found."""
    return {
        "patient_id": match.patient.patient_id,
        "issuer": match.patient.issuer,
        "study_uid": match.study_uid,
        "series_uid": match.series_uid,
        "study_datetime": match.study_datetime.isoformat() if match.study_datetime else None,
        "modality": match.modality,
        "body_part_examined": match.body_part_examined,
        "manufacturer": match.manufacturer,
        "state": match.state,
        "reason": match.reason,
        "model": match.model,
        "slices": match.slices,
        "spacing_mm": match.spacing_mm,
        "quality": match.quality,
        "slope": match.slope,
        "height_mm": match.height_mm,
        "flags": match.flags,
        "coverage": coverage_json(match.coverage),
    }


def match_table(matches: Sequence[Match]) -> Table:
    """Return Series that an expression found as a table for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("series", "patient", "date", "body part"):
        table.add_column(title, overflow="fold")
    for title in ("slices", "mm", "r", "body height, mm"):
        table.add_column(title, justify="right")
    for title in ("covers", "state, flags"):
        table.add_column(title, overflow="fold")
    for m in matches:
        table.add_row(
            m.series_uid,
            m.patient.patient_id or "-",
            f"{m.study_datetime:%Y-%m-%d}" if m.study_datetime else "-",
            m.body_part_examined or "-",
            "" if m.slices is None else str(m.slices),
            "" if m.spacing_mm is None else f"{m.spacing_mm:g}",
            "" if m.quality is None else f"{m.quality:.4f}",
            f"{m.height_mm[0]:.0f}..{m.height_mm[1]:.0f}" if m.height_mm else "",
            ", ".join(region.shown(m.coverage)),
            ", ".join([m.state if m.reason is None else f"{m.state}:{m.reason}", *m.flags]),
        )
    return table


def histogram_json(histogram: Histogram) -> JSON:
    """Return how many curves reach over each step of body height."""
    edges = histogram.edges_mm.tolist()
    steps = zip(edges, edges[1:], histogram.series, strict=False)
    return {
        "series": histogram.total,
        "steps": [{"from_mm": low, "to_mm": high, "series": n} for low, high, n in steps],
    }


def histogram_table(histogram: Histogram, width: int = 50) -> Table:
    """Return the same as bars, head first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("body height, mm", justify="right")
    table.add_column("series", justify="right")
    table.add_column("")
    most = max(histogram.series, default=1)
    edges = histogram.edges_mm
    for k in reversed(range(len(histogram.series))):
        count = histogram.series[k]
        bar = "\N{FULL BLOCK}" * max(round(width * count / most), min(count, 1))
        table.add_row(f"{edges[k]:.0f}..{edges[k + 1]:.0f}", str(count), bar)
    return table


def region_table(regions: Sequence[Region]) -> Table:
    """Return the regions of a bundle as a table for a terminal, organs under their part."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("region", "code", "meaning"):
        table.add_column(title)
    for title in ("from, mm", "+-", "to, mm", "+-"):
        table.add_column(title, justify="right")
    table.add_column("known by")
    for r in regions:
        supports = dict.fromkeys(str(limit.support) for limit in (r.low, r.high))
        table.add_row(
            f"  {r.name}" if r.part else r.name,
            f"{region.SCHEME} {r.code}",
            r.meaning,
            *(
                "-" if value is None else f"{value:.0f}"
                for limit in (r.low, r.high)
                for value in (limit.height_mm, limit.sd_mm)
            ),
            ", ".join(supports),
        )
    return table


def quality_line(curve: ScoreCurve, regions: Sequence[Region] = ()) -> str:
    """Return what to know of a curve, in one line."""
    names = region.shown(region.coverage(curve.z_mm, curve.height_mm, regions))
    low, high, quality = curve.height_mm.min(), curve.height_mm.max(), curve.quality
    parts = [
        f"{len(curve.z_mm)} positions",
        f"body height {low:.0f} to {high:.0f} mm",
        f"r {quality.pearson_r:.4f}",
        f"slope {quality.slope:.2f}",
        *([f"covers {' and '.join(names)}"] if names else []),
        *quality.flags,
    ]
    return ", ".join(parts)


def offset_lines(stored: StoredOffset) -> str:
    """Return an offset that was not refused, for people."""
    offset = stored.offset
    sigma = "" if offset.sigma_mm is None else f"sigma {offset.sigma_mm:.1f} mm, "
    in_plane = ""
    if offset.dx_mm is not None and offset.dy_mm is not None:
        in_plane = f"in plane: x {offset.dx_mm:+.0f} mm, y {offset.dy_mm:+.0f} mm\n"
    return (
        f"{offset.method}: z_fixed = z_moving {offset.offset_mm:+.1f} mm, {sigma}"
        f"overlap {offset.overlap_mm:.0f} mm, {offset.status}\n{in_plane}"
        f"fixed  {stored.fixed_series}\nmoving {stored.moving_series}"
    )


def write_csv(path: Path, curves: Sequence[ScoreCurve]) -> None:
    """Write the slices of curves, a line each."""
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["series_uid", "sop_instance_uid", "frame", "z_mm", "score", "height_mm"])
        for curve in curves:
            writer.writerows([curve.series_uid, *s.values()] for s in slices_json(curve))
