"""Every SQL query of the node: functions named for what it needs, a Session first.

Other modules see frozen values, never ORM rows. All writes of one call belong to the
caller's transaction.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import Engine, delete, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session, aliased

from db import engine as db_engine
from db import migrate, schema
from dicomnode.core.curve import HeightMap
from dicomnode.errors import ConfigError, StoreUnavailable
from dicomnode.model import (
    Evidence,
    Flag,
    Method,
    Offset,
    OffsetStatus,
    PatientKey,
    Quality,
    Reason,
    Refusal,
    ScoreCurve,
    ScoredSlice,
    SeriesState,
    SliceHeader,
)

# A slice sent again is the same slice when its score agrees this well: batches of another
# size differ in the last bits, another image by far more.
SAME_SCORE = 0.02


@dataclass(frozen=True, slots=True)
class SliceResult:
    """What decode and score made of one Instance: a score, or the reason why there is none."""

    header: SliceHeader
    association_id: str
    arrived_at: datetime
    score: float | None = None
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class SeriesRow:
    """One Series as a person asks for it."""

    series_uid: str
    study_uid: str
    patient: PatientKey
    study_datetime: datetime | None
    modality: str
    body_part_examined: str
    state: SeriesState
    reason: Reason | None
    evidence: Evidence | None
    revision: int
    received: int
    scored: int
    expected: int | None
    set_aside: dict[str, int]  # reason -> Instances
    first_arrival_at: datetime
    last_arrival_at: datetime
    quality: Quality | None
    height_mm: tuple[float, float] | None  # lowest, highest
    model: str | None


@dataclass(frozen=True, slots=True)
class StoredOffset:
    """An offset and the pair it belongs to."""

    offset: Offset
    fixed_study: str
    fixed_series: str
    moving_study: str
    moving_series: str
    model: str
    computed_at: datetime
    seconds: float


@dataclass(frozen=True, slots=True)
class OpenSeries:
    """What is known of a Series that is not finished."""

    id: int
    series_uid: str
    received: int
    expected: int | None
    last_arrival_at: datetime
    ends: tuple[str | None, ...]  # how each association that carried it ended, None: it did not


@dataclass(frozen=True, slots=True)
class Claimed:
    """The slices of an open Series: those scored by one bundle, and those set aside."""

    slices: tuple[ScoredSlice, ...]
    set_aside: dict[str, str]  # SOP Instance UID -> reason
    model: str | None  # digest of that bundle, None where nothing was scored


@dataclass(frozen=True, slots=True)
class PendingOffset:
    """One pair that waits for its offset."""

    id: int
    method: Method
    fixed_series: str
    moving_series: str
    fixed_revision: int
    moving_revision: int


@contextmanager
def opened(url: str, *, create: bool = False, checked: bool = True) -> Iterator[Engine]:
    """Give the engine of a database whose schema is the one of this version.

    Parameters
    ----------
    create : bool
        Whether an empty database gets its schema. One of another version never does by
        itself: that is for `dicomnode db upgrade`, when the operator has a backup.
    checked : bool
        Whether the schema is looked at.

    Raises
    ------
    ConfigError
        If the URL is wrong, or the schema is older or newer.
    StoreUnavailable
        If the database does not answer.
    """
    try:
        engine = db_engine.create(url)
    except ValueError as exc:
        raise ConfigError(f"database.url: {exc}") from exc
    try:
        with available():
            if create and migrate.current(engine) is None:
                migrate.upgrade(engine)
            elif checked:
                migrate.check(engine)
        yield engine
    except migrate.SchemaError as exc:
        raise ConfigError(f"database.url: {exc} (dicomnode db upgrade)") from exc
    finally:
        engine.dispose()


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """Give a session that only reads: on SQLite it neither takes nor awaits the write lock."""
    with available(), Session(db_engine.reader(engine)) as session:
        yield session


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """Give a session whose transaction is committed when the block ends."""
    with available(), Session(engine) as session, session.begin():
        yield session


@contextmanager
def available() -> Iterator[None]:
    """Translate "the database does not answer" into StoreUnavailable.

    Raises
    ------
    StoreUnavailable
        If the connection is refused or lost, or a lock is held too long.
    """
    try:
        yield
    except OperationalError as exc:
        raise StoreUnavailable(f"database: {type(exc.orig).__name__}") from exc
    except DBAPIError as exc:
        if not exc.connection_invalidated:
            raise
        raise StoreUnavailable(f"database: {type(exc.orig).__name__}") from exc


def record_model(session: Session, digest: str, manifest: dict[str, Any], now: datetime) -> None:
    """Remember the bundle that scores from now on."""
    values = {"digest": digest, "manifest": manifest, "first_used_at": now}
    session.execute(_insert(session, schema.Model).values(values).on_conflict_do_nothing())


def record_slices(session: Session, model: str, results: Sequence[SliceResult]) -> None:
    """Store a batch of slices of any Series; a repeat stores the same rows again.

    A slice that its finished Series does not know yet reopens it.
    """
    by_series: dict[str, list[SliceResult]] = {}
    for result in results:
        by_series.setdefault(result.header.series_uid, []).append(result)
    for series_uid in sorted(by_series):  # one order, so that two workers cannot deadlock
        _record_series(session, model, by_series[series_uid])


def end_association(session: Session, association_id: str, kind: str) -> None:
    """Note how an association ended, with every open Series that it carried."""
    session.execute(
        update(schema.Arrival)
        .where(schema.Arrival.association_id == association_id)
        .values(ended=kind)
    )


def end_lost_associations(session: Session, before: datetime) -> None:
    """Note as lost every association without an end that brought nothing since `before`."""
    session.execute(
        update(schema.Arrival)
        .where(schema.Arrival.ended.is_(None), schema.Arrival.last_at < before)
        .values(ended="lost")
    )


def record_quarantined(
    session: Session, name: str, reason: Reason, detail: str, arrived_at: datetime
) -> None:
    """Note a spooled file that was put aside for a person to look at."""
    values = {"name": name, "reason": reason, "detail": detail, "arrived_at": arrived_at}
    session.execute(_insert(session, schema.Quarantined).values(values).on_conflict_do_nothing())


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
            r.id, r.series_uid, r.received, r.expected, r.last_arrival_at, tuple(ends.get(r.id, ()))
        )
        for r in rows
    ]


def next_completion(series: OpenSeries, now: datetime, quiet: timedelta) -> Evidence | None:
    """Return the evidence that a Series is complete by `now`, or None where it is not."""
    # Beyond the count, the count was wrong: a Series must not be finished at each further slice.
    if series.received == series.expected:
        return Evidence.EXPECTED_COUNT
    if None in series.ends or now - series.last_arrival_at < quiet:
        return None
    lost = any(end != "released" for end in series.ends)
    return Evidence.ASSOCIATION_LOST if lost else Evidence.RELEASED_AND_QUIET


def claim_series(session: Session, series_id: int) -> Claimed | None:
    """Lock an open Series and return its slices; None where another worker has it."""
    query = select(schema.Series.id).where(
        schema.Series.id == series_id, schema.Series.state == SeriesState.OPEN
    )
    # SQLite has one writer at a time, which is lock enough; Postgres skips what is claimed.
    if session.get_bind().dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    return None if session.scalar(query) is None else _claimed(session, series_id)


def _claimed(session: Session, series_id: int) -> Claimed:
    rows = session.scalars(select(schema.Slice).where(schema.Slice.series_id == series_id)).all()
    models = [str(r.model) for r in rows if r.reason is None]
    # A bundle was exchanged while the Series was open: scores of two bundles do not compare.
    model = max(sorted(set(models)), key=models.count, default=None)
    scored = [r for r in rows if r.reason is None and r.model == model]
    aside = {r.sop_instance_uid: str(r.reason) for r in rows if r.reason is not None}
    others = [r for r in rows if r.reason is None and r.model != model]
    aside |= {r.sop_instance_uid: str(Reason.OTHER_MODEL) for r in others}
    return Claimed(tuple(map(_scored_slice, scored)), aside, model)


def heights_of(session: Session, model: str) -> HeightMap:
    """Return the map of a bundle that scored something here."""
    return HeightMap(**session.get_one(schema.Model, model).manifest["heights"])


def finish_series(
    session: Session,
    series_id: int,
    outcome: ScoreCurve | Refusal,
    claimed: Claimed,
    evidence: Evidence,
    now: datetime,
) -> int:
    """Store how a Series ended and, with a curve, the pairs that follow from it.

    Returns
    -------
    int
        Pairs of curves that now wait for their offsets.
    """
    series = session.get_one(schema.Series, series_id)
    series.revision += 1
    series.evidence = evidence
    series.finished_at = now
    session.execute(delete(schema.Slice).where(schema.Slice.series_id == series_id))
    session.execute(delete(schema.Arrival).where(schema.Arrival.series_id == series_id))
    _drop_curve(session, series_id)
    if isinstance(outcome, Refusal):
        series.state, series.reason = outcome.reason.state, outcome.reason
        refused = {s.sop_instance_uid: str(outcome.reason) for s in claimed.slices}
        series.set_aside = refused | claimed.set_aside
        return 0
    by_uid = {(s.sop_instance_uid, s.frame): s for s in claimed.slices}
    kept = list(zip(outcome.sop_instance_uids, outcome.frames, strict=True))
    dropped = dict.fromkeys((uid for uid, _ in by_uid.keys() - set(kept)), "duplicate_position")
    series.state, series.reason = SeriesState.CURVE, None
    series.set_aside = dropped | claimed.set_aside
    session.add(_curve_row(series, outcome, [by_uid[k] for k in kept], now))
    session.flush()
    return _ask_offsets(session, series, outcome.model)


def pending_offsets(session: Session, limit: int) -> list[PendingOffset]:
    """Return pairs that wait for an offset, oldest first."""
    fixed, moving = aliased(schema.Series), aliased(schema.Series)
    rows = session.execute(
        select(
            schema.Offset.id,
            schema.Offset.method,
            fixed.series_uid,
            moving.series_uid,
            fixed.revision,
            moving.revision,
        )
        .join(fixed, fixed.id == schema.Offset.fixed_series_id)
        .join(moving, moving.id == schema.Offset.moving_series_id)
        .where(schema.Offset.status.is_(None))
        .order_by(schema.Offset.id)
        .limit(limit)
    )
    return [PendingOffset(i, Method(m), f, v, fr, vr) for i, m, f, v, fr, vr in rows]


def store_offset(
    session: Session, pending: PendingOffset, offset: Offset, now: datetime, seconds: float
) -> None:
    """Store the offset of a pair, unless one of its curves was revised meanwhile."""
    row = session.get(schema.Offset, pending.id)
    if row is None:  # the pair went with a curve that was reopened: it will be asked for anew
        return
    row.status = offset.status
    row.offset_mm, row.overlap_mm, row.sigma_mm = (
        offset.offset_mm,
        offset.overlap_mm,
        offset.sigma_mm,
    )
    row.dx_mm, row.dy_mm, row.reason = offset.dx_mm, offset.dy_mm, offset.reason
    row.computed_at, row.seconds = now, seconds


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
    opened = [s.id for s, _ in rows if s.state == SeriesState.OPEN]
    live: dict[int, dict[str | None, int]] = {}
    for series_id, reason, count in session.execute(
        select(schema.Slice.series_id, schema.Slice.reason, func.count())
        .where(schema.Slice.series_id.in_(opened))
        .group_by(schema.Slice.series_id, schema.Slice.reason)
    ):
        live.setdefault(series_id, {})[reason] = count
    return [_series_row(s, c, live.get(s.id, {})) for s, c in rows]


def count_quarantined(session: Session) -> dict[str, int]:
    """Return reason -> files in quarantine."""
    rows = session.execute(
        select(schema.Quarantined.reason, func.count()).group_by(schema.Quarantined.reason)
    )
    return {reason: count for reason, count in rows}


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
    return {
        uid: _to_curve(uid, curve, HeightMap(**manifest["heights"]))
        for uid, curve, manifest in rows
    }


def open_slices(session: Session, series_uid: str) -> Claimed | None:
    """Return what was scored so far of a Series that is still arriving, None where it is not."""
    series_id = session.scalar(
        select(schema.Series.id).where(schema.Series.series_uid == series_uid)
    )
    return None if series_id is None else _claimed(session, series_id)


def offsets_of(
    session: Session,
    *,
    fixed_study: str | None = None,
    moving_study: str | None = None,
    method: Method | None = None,
) -> list[StoredOffset]:
    """Return stored offsets of a study pair, most trustworthy first.

    `ok` before `extrapolated` before `refused`, then l1 before fast, then the longer overlap.
    """
    fixed, moving = aliased(schema.Series), aliased(schema.Series)
    query = (
        select(
            schema.Offset, fixed.study_uid, fixed.series_uid, moving.study_uid, moving.series_uid
        )
        .join(fixed, fixed.id == schema.Offset.fixed_series_id)
        .join(moving, moving.id == schema.Offset.moving_series_id)
        .where(schema.Offset.status.is_not(None))
    )
    for column, value in (
        (fixed.study_uid, fixed_study),
        (moving.study_uid, moving_study),
        (schema.Offset.method, method),
    ):
        if value is not None:
            query = query.where(column == value)
    found = [_stored_offset(*row) for row in session.execute(query)]
    return sorted(found, key=trust)


def trust(stored: StoredOffset) -> tuple[int, int, float]:
    """Sort key of offsets: `ok` before `extrapolated` before `refused`, then l1, then overlap."""
    o = stored.offset
    return (
        list(OffsetStatus).index(o.status),
        [Method.L1, Method.FAST].index(o.method),
        -(o.overlap_mm or 0.0),
    )


def _record_series(session: Session, model: str, results: list[SliceResult]) -> None:
    newest = results[-1]
    header = newest.header
    series = _series_for_update(session, header, newest.arrived_at)
    moved = (series.patient_id, series.issuer, series.study_uid) != (
        header.patient.patient_id,
        header.patient.issuer,
        header.study_uid,
    )
    if series.state != SeriesState.OPEN:
        known = _known_slices(session, series)
        results = [r for r in results if not _is_known(r, known)]
        if not results and not moved:
            return
        _reopen(session, series)
    if moved:  # the archive corrected who the patient is: pairs follow when the curve is remade
        series.patient_id, series.issuer = header.patient.patient_id, header.patient.issuer
        series.study_uid, series.study_datetime = header.study_uid, header.study_datetime
    series.last_arrival_at = max(
        series.last_arrival_at, *(r.arrived_at for r in results or [newest])
    )
    series.expected = header.expected_instances or series.expected
    for r in results:
        # Something other than CT may share the Series: the first CT header names it.
        if series.modality != "CT" and r.header.modality == "CT":
            series.modality = "CT"
        _upsert(session, schema.Slice, _slice_values(series.id, model, r))
    for r in results or [newest]:
        _upsert(
            session,
            schema.Arrival,
            {
                "series_id": series.id,
                "association_id": r.association_id,
                "last_at": r.arrived_at,
                "ended": None,
            },
        )
    session.flush()
    series.received = (
        session.scalar(
            select(func.count())
            .select_from(schema.Slice)
            .where(schema.Slice.series_id == series.id)
        )
        or 0
    )


def _series_for_update(session: Session, header: SliceHeader, now: datetime) -> schema.Series:
    session.execute(
        _insert(session, schema.Series)
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
            set_aside={},
            first_arrival_at=now,
            last_arrival_at=now,
        )
        .on_conflict_do_nothing()
    )
    return session.scalars(
        select(schema.Series)
        .where(schema.Series.series_uid == header.series_uid)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()


def _scored_slice(row: schema.Slice) -> ScoredSlice:
    assert row.score is not None and row.image_position and row.image_orientation
    return ScoredSlice(
        sop_instance_uid=row.sop_instance_uid,
        frame=row.frame,
        image_position=tuple(row.image_position),
        image_orientation=tuple(row.image_orientation),
        score=row.score,
        frame_of_reference_uid=row.frame_of_reference_uid,
    )


def _known_slices(session: Session, series: schema.Series) -> dict[str, float | None]:
    """SOP Instance UID -> score (None where set aside) of a finished Series."""
    known: dict[str, float | None] = dict.fromkeys(series.set_aside)
    row = session.get(schema.Curve, series.id)
    if row is not None:
        for (uid, _, _), score in zip(_instances(row), _array(row.score, "<f4"), strict=True):
            known[uid] = float(score)
    return known


def _is_known(result: SliceResult, known: dict[str, float | None]) -> bool:
    uid = result.header.sop_instance_uid
    if uid not in known:
        return False
    stored = known[uid]
    # A slice that was set aside and is sent again tells nothing new either.
    return stored is None or (result.score is not None and abs(result.score - stored) <= SAME_SCORE)


def _reopen(session: Session, series: schema.Series) -> None:
    """Turn a finished Series back into slice rows; its pairs go, its curve stays for readers."""
    row = session.get(schema.Curve, series.id)
    if row is not None:
        positions = _array(row.image_position, "<f8").reshape(-1, 3)
        scores = _array(row.score, "<f4")
        for (uid, frame, f), position, score in zip(
            _instances(row), positions, scores, strict=True
        ):
            session.add(
                schema.Slice(
                    series_id=series.id,
                    sop_instance_uid=uid,
                    frame=frame,
                    model=row.model,
                    score=float(score),
                    image_position=position.tolist(),
                    image_orientation=row.image_orientation,
                    frame_of_reference_uid=row.frames_of_reference[f],
                )
            )
    for uid, reason in series.set_aside.items():
        session.add(
            schema.Slice(
                series_id=series.id,
                sop_instance_uid=uid,
                frame=1,
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
        "frame": 1,
        "model": model if r.score is not None else None,
        "score": r.score,
        "reason": r.reason,
        "image_position": list(h.image_position) if h.image_position else None,
        "image_orientation": list(h.image_orientation) if h.image_orientation else None,
        "frame_of_reference_uid": h.frame_of_reference_uid[:64],
    }


def _drop_curve(session: Session, series_id: int) -> None:
    session.execute(delete(schema.Curve).where(schema.Curve.series_id == series_id))
    session.execute(
        delete(schema.Offset).where(
            or_(
                schema.Offset.fixed_series_id == series_id,
                schema.Offset.moving_series_id == series_id,
            )
        )
    )


def _curve_row(
    series: schema.Series, curve: ScoreCurve, slices: list[ScoredSlice], now: datetime
) -> schema.Curve:
    frames = list(dict.fromkeys(s.frame_of_reference_uid for s in slices))
    place = {f: i for i, f in enumerate(frames)}
    instances = [[s.sop_instance_uid, s.frame, place[s.frame_of_reference_uid]] for s in slices]
    return schema.Curve(
        series_id=series.id,
        model=curve.model,
        revision=series.revision,
        count=len(slices),
        z_mm=curve.z_mm.astype("<f8").tobytes(),
        score=curve.score.astype("<f4").tobytes(),
        image_position=np.array([s.image_position for s in slices], "<f8").tobytes(),
        image_orientation=list(slices[0].image_orientation),
        instances=zlib.compress(json.dumps(instances, separators=(",", ":")).encode()),
        frames_of_reference=frames,
        height_min_mm=float(curve.height_mm.min()),
        height_max_mm=float(curve.height_mm.max()),
        pearson_r=curve.quality.pearson_r,
        slope=curve.quality.slope,
        flags=list(curve.quality.flags),
        computed_at=now,
    )


def _ask_offsets(session: Session, series: schema.Series, model: str) -> int:
    """Write the work that a new curve brings: every curve of the patient's other studies."""
    if not PatientKey(series.patient_id, series.issuer).known:
        return 0
    others = session.scalars(
        select(schema.Series)
        .join(schema.Curve)
        .where(
            schema.Series.patient_id == series.patient_id,
            schema.Series.issuer == series.issuer,
            schema.Series.study_uid != series.study_uid,
            schema.Series.state == SeriesState.CURVE,
            schema.Curve.model == model,
        )
    ).all()
    for other in others:
        # Both time directions: whichever study is newer is fixed, however late the prior came.
        fixed, moving = sorted((series, other), key=_age, reverse=True)
        for method in Method:
            session.add(
                schema.Offset(
                    fixed_series_id=fixed.id,
                    moving_series_id=moving.id,
                    method=method,
                    model=model,
                )
            )
    return len(others)


def _age(series: schema.Series) -> tuple[datetime, str]:
    return series.study_datetime or datetime.min, series.study_uid


def _series_row(
    s: schema.Series, curve: schema.Curve | None, live: dict[str | None, int]
) -> SeriesRow:
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
        scored=live.get(None, 0) if is_open else (curve.count if curve else 0),
        expected=s.expected,
        set_aside=aside,
        first_arrival_at=s.first_arrival_at,
        last_arrival_at=s.last_arrival_at,
        quality=_quality(curve) if curve else None,
        height_mm=(curve.height_min_mm, curve.height_max_mm) if curve else None,
        model=curve.model if curve else None,
    )


def _to_curve(series_uid: str, row: schema.Curve, heights: HeightMap) -> ScoreCurve:
    score = _array(row.score, "<f4").astype(np.float32)
    instances = _instances(row)
    return ScoreCurve(
        series_uid=series_uid,
        model=row.model,
        z_mm=_array(row.z_mm, "<f8").astype(np.float64),
        score=score,
        height_mm=heights(score),
        sop_instance_uids=tuple(uid for uid, _, _ in instances),
        frames=tuple(frame for _, frame, _ in instances),
        quality=_quality(row),
    )


def _quality(row: schema.Curve) -> Quality:
    return Quality(row.pearson_r, row.slope, tuple(Flag(f) for f in row.flags))


def _stored_offset(
    row: schema.Offset, fixed_study: str, fixed_series: str, moving_study: str, moving_series: str
) -> StoredOffset:
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


def _instances(row: schema.Curve) -> list[tuple[str, int, int]]:
    return [(uid, frame, f) for uid, frame, f in json.loads(zlib.decompress(row.instances))]


def _array(data: bytes, dtype: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, dtype)


def _insert(session: Session, table: type[schema.Base]) -> Any:
    """INSERT with ON CONFLICT: the same words in both dialects, but not the same class."""
    dialect = session.get_bind().dialect.name
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


def _upsert(session: Session, table: type[schema.Base], values: dict[str, Any]) -> None:
    keys = [c.name for c in table.__table__.primary_key]
    insert = _insert(session, table).values(values)
    session.execute(
        insert.on_conflict_do_update(
            index_elements=keys,
            set_={k: insert.excluded[k] for k in values if k not in keys},
        )
    )
