"""From what arrives to a finished Series: slices, ends of associations, completion."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, and_, delete, func, or_, select, tuple_, update
from sqlalchemy.orm import Session, undefer

from db import schema
from dicomnode.core import admission, curve, geometry
from dicomnode.model import (
    Evidence,
    Flag,
    PatientKey,
    Reason,
    Refusal,
    ScoreCurve,
    SeriesState,
    SliceHeader,
)
from dicomnode.store import moves
from dicomnode.store.coverage import store_coverage
from dicomnode.store.fetches import AskPriors, ask_priors, expected_of
from dicomnode.store.hidden import without_rejected
from dicomnode.store.identity import hold_identity
from dicomnode.store.pairs import ask_offsets, drop_offsets
from dicomnode.store.previews import keep_previews, take_previews
from dicomnode.store.retelling import retell_pairs
from dicomnode.store.rows import (
    SLICES,
    acquisition_values,
    acquisitions,
    array,
    body_centres,
    curve_row,
    instances,
    scored_slices,
    sop_classes,
)
from dicomnode.store.session import insert, insert_new, upsert
from dicomnode.store.values import Claimed, OpenSeries, SliceResult

# A slice sent again is the same slice when its score agrees this well: a node that was moved to
# another device may score in another dtype, which changes scores of real CT by up to 0.12
# (1.2 mm), another image by far more.
SAME_SCORE = 0.15
MAX_EXPECTED = 1_000_000  # Instances of one Series; a larger count is a damaged header

# A slice with a score -> the texts of its header, DICOM keyword -> text.
Describe = Callable[[SliceResult], Mapping[str, str]]


# Of a Study with new CT: patient, Study Date and Time, arrival, whether the patient was corrected.
_New = tuple[PatientKey, datetime | None, datetime, bool]


@dataclass(frozen=True, slots=True)
class _Known:
    """What is stored of one slice; empty where it was set aside."""

    model: str | None = None
    score: float | None = None
    image_position: tuple[float, ...] = ()
    sop_class_uid: str | None = None


def record_model(session: Session, digest: str, manifest: dict[str, Any], now: datetime) -> None:
    """Remember the bundle that scores from now on."""
    values = {"digest": digest, "manifest": manifest, "first_used_at": now}
    session.execute(insert(session, schema.Model).values(values).on_conflict_do_nothing())


def record_slices(
    session: Session,
    model: str,
    results: Sequence[SliceResult],
    describe: Describe | None = None,
    priors: AskPriors | None = None,
) -> None:
    """Store a batch of slices of any Series; a repeat stores the same rows again.

    A slice that its finished Series does not know yet reopens it. The first CT of a Study asks for
    earlier ones, where `priors` says whom.

    Parameters
    ----------
    describe
        Asked, within this transaction, for the texts of a header where a Series has none yet,
        where it moves to another patient or Study, and where it is sent again: 0.4 ms each, where
        a slice takes 2.6 in all.
    """
    results = without_rejected(session, results)
    new: dict[str, _New] = {}
    by_series: dict[str, list[SliceResult]] = {}
    for result in results:
        by_series.setdefault(result.header.series_uid, []).append(result)
    alone = moves.hold(session, by_series)
    for series_uid in sorted(by_series):  # one order, so that two workers cannot deadlock
        _record_series(session, model, by_series[series_uid], describe, new, alone)
    if priors is None:
        return
    # Last, and in one order: two workers that store Series of the same Studies would else wait
    # for each other.
    for study_uid, (patient, study_datetime, at, moved) in sorted(new.items()):
        ask_priors(session, priors, study_uid, patient, study_datetime, at, anew=moved)


def end_association(session: Session, association_id: str, kind: str) -> None:
    """Note how an association ended, with every open Series that it carried."""
    session.execute(
        update(schema.Arrival)
        .where(schema.Arrival.association_id == association_id)
        .values(ended=kind)
    )


def end_lost_associations(
    session: Session, now: datetime, after: timedelta, receiver: str = ""
) -> None:
    """Note as lost every association without an end that brought nothing for so long.

    Of one receiver alone, where it is named by what the ids of its associations begin with.

    One whose last slice lies further in the future than that stems from before the clock was
    set back.
    """
    session.execute(
        update(schema.Arrival).where(_is_lost(now, after, receiver)).values(ended="lost")
    )


def has_lost_associations(session: Session, now: datetime, after: timedelta) -> bool:
    """Whether `end_lost_associations` would find one."""
    query = select(schema.Arrival.series_id).where(_is_lost(now, after)).limit(1)
    return session.scalar(query) is not None


def _is_lost(now: datetime, after: timedelta, receiver: str = "") -> ColumnElement[bool]:
    last_at = schema.Arrival.last_at
    silent = or_(last_at < now - after, last_at > now + after)
    own = schema.Arrival.association_id.startswith(receiver, autoescape=True)
    return and_(schema.Arrival.ended.is_(None), silent, own)


def record_quarantined(
    session: Session, name: str, reason: Reason, detail: str, arrived_at: datetime
) -> None:
    """Note a spooled file that was put aside for a person to look at."""
    values = {"name": name, "reason": reason, "detail": detail, "arrived_at": arrived_at}
    session.execute(insert(session, schema.Quarantined).values(values).on_conflict_do_nothing())


def open_series(session: Session) -> list[OpenSeries]:
    """Return every Series that is not finished, longest quiet first."""
    rows = session.scalars(
        select(schema.Series)
        .where(schema.Series.state == SeriesState.OPEN)
        .order_by(schema.Series.last_arrival_at)
    ).all()
    ends: dict[int, list[str | None]] = {}
    for series_id, ended in session.execute(
        select(schema.Arrival.series_id, schema.Arrival.ended).where(
            schema.Arrival.series_id.in_([r.id for r in rows])
        )
    ):
        ends.setdefault(series_id, []).append(ended)
    return [
        OpenSeries(
            r.id,
            r.series_uid,
            r.received,
            r.expected,
            r.last_arrival_at,
            tuple(ends.get(r.id, ())),
            r.revision,
        )
        for r in rows
    ]


def origin_of(session: Session, series_id: int) -> tuple[str, list[str]]:
    """Return the Study of an open Series, and the ids of the associations that carried it."""
    study_uid = session.get_one(schema.Series, series_id).study_uid
    query = select(schema.Arrival.association_id).where(schema.Arrival.series_id == series_id)
    return study_uid, sorted(session.scalars(query))


def next_completion(series: OpenSeries, now: datetime, quiet: timedelta) -> Evidence | None:
    """Return the evidence that a Series is complete by `now`, or None where it is not."""
    # Beyond the count, the count was wrong: a Series must not be finished at each further slice.
    # Of one that is sent again, changed, all are there from the first slice on: the count tells
    # nothing, and it would be finished after each batch, of old and new slices.
    if series.received == series.expected and series.revision == 0:
        return Evidence.EXPECTED_COUNT
    # Either way: where the clock was set back, the last arrival lies in the future.
    if None in series.ends or abs(now - series.last_arrival_at) < quiet:
        return None
    lost = any(end != "released" for end in series.ends)
    return Evidence.ASSOCIATION_LOST if lost else Evidence.RELEASED_AND_QUIET


def quiet_at(series: OpenSeries, quiet: timedelta) -> datetime | None:
    """Return when a Series will have been quiet for long enough, should nothing more arrive.

    None while an association that carried it goes on.
    """
    return None if None in series.ends else series.last_arrival_at + quiet


def claim_series(session: Session, series_id: int) -> Claimed | None:
    """Lock an open Series and return its slices; None where another worker has it."""
    hold_identity(session)  # before the row is locked: who finishes it asks for its pairs
    query = select(schema.Series.id).where(
        schema.Series.id == series_id, schema.Series.state == SeriesState.OPEN
    )
    # SQLite has one writer at a time, which is lock enough; Postgres skips what is claimed.
    if session.get_bind().dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    return None if session.scalar(query) is None else claimed_slices(session, series_id)


def claimed_slices(session: Session, series_id: int) -> Claimed:
    """Return the slices of an open Series, those of one bundle apart from the rest."""
    rows = session.execute(SLICES.where(schema.Slice.series_id == series_id)).all()
    models = [str(r.model) for r in rows if r.reason is None]
    # A bundle was exchanged while the Series was open: scores of two bundles do not compare.
    model = max(sorted(set(models)), key=models.count, default=None)
    scored = [r for r in rows if r.reason is None and r.model == model]
    aside = {(r.sop_instance_uid, r.frame): str(r.reason) for r in rows if r.reason is not None}
    return Claimed(scored_slices(scored), aside, model, len(models) - len(scored))


def finish_series(
    session: Session,
    series_id: int,
    outcome: ScoreCurve | Refusal,
    claimed: Claimed,
    evidence: Evidence,
    now: datetime,
) -> int:
    """Store how a Series ended and, with a curve, the pairs that follow from it.

    What is in the curve needs no row of its own any more: its inputs are gathered into one.
    Scored slices that are in no curve keep theirs: a late slice may make a curve of them.

    Returns
    -------
    int
        Pairs of curves that now wait for their offsets.
    """
    series = session.get_one(schema.Series, series_id)
    series.revision += 1
    series.evidence = evidence
    series.finished_at = now
    set_aside = dict(claimed.set_aside)
    if isinstance(outcome, ScoreCurve):
        set_aside |= curve.left_out(outcome, claimed.slices)
    series.set_aside = {frame_key(*at): reason for at, reason in set_aside.items()}
    session.execute(delete(schema.Arrival).where(schema.Arrival.series_id == series_id))
    had_curve = drop_curve(session, series_id)
    if isinstance(outcome, Refusal):
        if had_curve:
            retell_pairs(session, [series.study_uid], now)
        _delete_slices(session, series_id, claimed.set_aside)
        series.state, series.reason = outcome.reason.state, outcome.reason
        return 0
    series.state, series.reason = SeriesState.CURVE, None
    keep_previews(session, series, zip(outcome.sop_instance_uids, outcome.frames, strict=True))
    if len(outcome.frames) == len(claimed.slices) and not claimed.other_model:
        _delete_slices(session, series_id)
    else:
        in_curve = zip(outcome.sop_instance_uids, outcome.frames, strict=True)
        _delete_slices(session, series_id, [*claimed.set_aside, *in_curve])
    placed = {(s.sop_instance_uid, s.frame): s for s in claimed.slices}
    kept = [placed[key] for key in zip(outcome.sop_instance_uids, outcome.frames, strict=True)]
    session.add(curve_row(series, outcome, kept, now))
    session.flush()
    store_coverage(session, series_id, outcome)
    return ask_offsets(session, series, outcome.model)


def _speaker(results: Sequence[SliceResult]) -> SliceResult:
    """Return the slice that says whose a new Series is: a sound one that names somebody."""
    sound = [r for r in results if r.score is not None]
    return ([r for r in sound if r.header.patient.known] or sound or results)[-1]


def _record_series(
    session: Session,
    model: str,
    results: list[SliceResult],
    describe: Describe | None,
    new: dict[str, _New],
    alone: bool,
) -> None:
    last = results[-1]
    header = _speaker(results).header
    series, is_new = _series_for_update(session, header, results[0].arrived_at)
    heard = moves.hear(session, series, results, is_new=is_new, alone=alone)
    speaker, moved = heard.speaker, heard.told is not None
    # Its own images say at last what it was moved to: rules are to be asked anew, once all came.
    confirmed = speaker is not None and series.moved_along and not moved
    if confirmed:
        series.moved_along = False
    if speaker and (moved or series.header is None or series.state != SeriesState.OPEN):
        _describe(series, speaker, moved, describe)
    if series.state != SeriesState.OPEN:
        known = _known_slices(session, series)
        if not confirmed:
            results = [r for r in results if not _is_known(r, model, known)]
        if not results and not moved:
            return
        reopen(session, series)
    if moved:  # the archive corrected who the patient is: pairs follow when the curve is remade
        moves.move(session, series, heard)
    series.last_arrival_at = max(series.last_arrival_at, *(r.arrived_at for r in results or [last]))
    for r in results:
        if 0 < (r.header.expected_instances or 0) < MAX_EXPECTED:
            series.expected = r.header.expected_instances
    if series.modality != "CT" and any(r.header.modality == "CT" for r in results):
        series.modality = "CT"  # something else shares the Series: the CT names it
        is_new = True
    if (is_new or moved) and series.modality == "CT":
        key = PatientKey(series.patient_id, series.issuer)
        again = moved or (series.study_uid in new and new[series.study_uid][3])
        new[series.study_uid] = (key, series.study_datetime, last.arrived_at, again)
    scored = [_slice_values(series.id, model, r) for r in results if r.score is not None]
    refused = [_slice_values(series.id, model, r) for r in results if r.score is None]
    upsert(session, schema.Slice, scored)
    insert_new(session, schema.Slice, refused)  # a damaged copy takes no sound one's place
    last_at = {r.association_id: r.arrived_at for r in results or [last]}
    arrivals = [
        {"series_id": series.id, "association_id": a, "last_at": at, "ended": None}
        for a, at in last_at.items()
    ]
    upsert(session, schema.Arrival, arrivals)
    series.received = (
        session.scalar(
            select(func.count(schema.Slice.sop_instance_uid.distinct())).where(
                schema.Slice.series_id == series.id
            )
        )
        or 0
    )


def _describe(
    series: schema.Series, speaker: SliceResult, moved: bool, describe: Describe | None
) -> None:
    if describe is not None:
        series.header = dict(describe(speaker))
    elif moved:  # rather none than that of another patient
        series.header = None


def _series_for_update(
    session: Session, header: SliceHeader, now: datetime
) -> tuple[schema.Series, bool]:
    """Return the row of a Series, locked, and whether it was made just now."""
    query = (
        select(schema.Series)
        .where(schema.Series.series_uid == header.series_uid)
        .options(undefer(schema.Series.header))
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if (known := session.scalars(query).one_or_none()) is not None:
        return known, False
    made = session.execute(
        insert(session, schema.Series)
        .values(
            series_uid=header.series_uid,
            study_uid=header.study_uid,
            patient_id=header.patient.patient_id,
            issuer=header.patient.issuer,
            study_datetime=header.study_datetime,
            modality=header.modality[:16],
            body_part_examined=header.body_part_examined[:16],
            manufacturer=header.manufacturer[:64],
            state=SeriesState.OPEN,
            revision=0,
            received=0,
            expected=expected_of(session, header.series_uid),
            set_aside={},
            first_arrival_at=now,
            last_arrival_at=now,
        )
        .on_conflict_do_nothing()
        .returning(schema.Series.id)
    )
    is_new = made.scalar() is not None
    return session.scalars(query).one(), is_new


def _known_slices(session: Session, series: schema.Series) -> dict[tuple[str, int], _Known]:
    """SOP Instance UID and Frame -> what is stored of it, of a finished Series."""
    known = dict.fromkeys(map(frame_of_key, series.set_aside), _Known())
    for slice_ in session.scalars(select(schema.Slice).where(schema.Slice.series_id == series.id)):
        known[slice_.sop_instance_uid, slice_.frame] = _Known(
            slice_.model,
            slice_.score,
            tuple(slice_.image_position or ()),
            slice_.sop_class_uid,
        )
    row = session.get(schema.Curve, series.id)
    if row is not None and not _is_of_earlier_rules(row):
        positions = array(row.image_position, "<f8").reshape(-1, 3)
        scores = array(row.score, "<f4")
        members = zip(instances(row), sop_classes(row), scores, positions, strict=True)
        for (uid, frame, _), kind, score, position in members:
            known[uid, frame] = _Known(row.model, float(score), tuple(position.tolist()), kind)
    return known


def _is_of_earlier_rules(row: schema.Curve) -> bool:
    """Whether the slices of a curve that are sent again may make another one: see CHANGELOG.

    It was stored before volumes were told apart, and leans or had several.
    """
    normal = geometry.slice_normal(tuple(row.image_orientation))
    leans = geometry.tilt_degrees(normal) > curve.TOLD_TILT_DEGREES
    return row.acquisitions is None and (leans or Flag.DUPLICATE_POSITION in row.flags)


def _is_known(result: SliceResult, model: str, known: dict[tuple[str, int], _Known]) -> bool:
    """Whether a slice of a finished Series tells nothing new."""
    stored = known.get((result.header.sop_instance_uid, result.header.frame))
    if stored is None:
        return False
    if result.score is None:  # a reason adds nothing to a score, nor to another reason
        return True
    if stored.sop_class_uid is None and result.header.sop_class_uid in admission.ENHANCED_CT:
        return False  # that of a CT Image need not be told: `store.source_of` takes it for one
    return (
        stored.score is not None
        and stored.model == model
        and abs(result.score - stored.score) <= SAME_SCORE
        and stored.image_position == result.header.image_position
    )


def reopen(session: Session, series: schema.Series) -> None:
    """Turn a finished Series back into slice rows; its curve stays for readers meanwhile."""
    row = session.get(schema.Curve, series.id)
    if row is not None:
        previews = take_previews(session, series)
        positions = array(row.image_position, "<f8").reshape(-1, 3)
        centres = body_centres(row)
        scores = array(row.score, "<f4")
        classes = sop_classes(row)
        told = acquisitions(row)
        for i, (uid, frame, f) in enumerate(instances(row)):
            session.add(
                schema.Slice(
                    series_id=series.id,
                    sop_instance_uid=uid,
                    frame=frame,
                    sop_class_uid=classes[i],
                    model=row.model,
                    score=float(scores[i]),
                    image_position=positions[i].tolist(),
                    image_orientation=row.image_orientation,
                    frame_of_reference_uid=row.frames_of_reference[f],
                    body_centre=None if centres is None else _finite(tuple(centres[i].tolist())),
                    preview=previews[i] if previews else None,
                    acquisition=told[i] if told else None,
                )
            )
    # Scored slices that are in no curve have kept their rows.
    rows = select(schema.Slice.sop_instance_uid, schema.Slice.frame)
    kept = {(u, k) for u, k in session.execute(rows.where(schema.Slice.series_id == series.id))}
    for key, reason in series.set_aside.items():
        uid, frame = frame_of_key(key)
        if (uid, frame) in kept:
            continue
        session.add(
            schema.Slice(
                series_id=series.id,
                sop_instance_uid=uid,
                frame=frame,
                reason=reason,
                frame_of_reference_uid="",
            )
        )
    series.state, series.reason, series.evidence = SeriesState.OPEN, None, None
    session.flush()


def _slice_values(series_id: int, model: str, r: SliceResult) -> dict[str, Any]:
    h = r.header
    return {
        "series_id": series_id,
        "sop_instance_uid": h.sop_instance_uid,
        "frame": h.frame,
        "sop_class_uid": h.sop_class_uid[:64],
        "model": model if r.score is not None else None,
        "score": r.score,
        "reason": r.reason,
        "image_position": _finite(h.image_position),
        "image_orientation": _finite(h.image_orientation),
        "frame_of_reference_uid": h.frame_of_reference_uid[:64],
        "body_centre": _finite(r.body_centre_mm),
        "preview": r.preview,
        "acquisition": acquisition_values(h.acquisition),
    }


def _finite(values: tuple[float, ...] | None) -> list[float] | None:
    # JSON, as Postgres takes it, has no NaN; why such a slice is set aside is in its reason.
    return list(values) if values and np.isfinite(values).all() else None


def frame_key(sop_instance_uid: str, frame: int) -> str:
    """Return the name of a Frame in JSON: the UID, and which Frame where it is not the first."""
    return sop_instance_uid if frame == 1 else f"{sop_instance_uid}#{frame}"


def frame_of_key(key: str) -> tuple[str, int]:
    """Return the Frame that `frame_key` named."""
    uid, _, frame = key.partition("#")
    return uid, int(frame or 1)


def _delete_slices(
    session: Session, series_id: int, frames: Iterable[tuple[str, int]] | None = None
) -> None:
    """Delete the slice rows of some Frames of a Series, or of all."""
    rows = delete(schema.Slice).where(schema.Slice.series_id == series_id)
    if frames is None:
        session.execute(rows)
        return
    key = tuple_(schema.Slice.sop_instance_uid, schema.Slice.frame)
    # In parts: SQLite takes 32,766 parameters in a statement.
    for part in _parts(sorted(frames), 10_000):
        session.execute(rows.where(key.in_(part)))


def _parts(items: list[tuple[str, int]], size: int) -> list[list[tuple[str, int]]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def drop_curve(session: Session, series_id: int) -> bool:
    """Drop the curve of a Series, and the offsets of its pairs; False where it had none."""
    curves = delete(schema.Curve).where(schema.Curve.series_id == series_id)
    dropped = session.scalars(curves.returning(schema.Curve.series_id)).all()
    drop_offsets(session, series_id)
    return bool(dropped)
