import socket
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, event, func, select
from sqlalchemy.orm import Session

from db import schema
from dicomnode import query, store
from dicomnode.core import curve, robust
from dicomnode.core.admission import CT_IMAGE
from dicomnode.core.curve import HeightMap
from dicomnode.errors import StoreUnavailable
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
from dicomnode.store import Claimed, OpenSeries, SliceResult

MODEL, OTHER_MODEL = "5" * 64, "6" * 64
HEIGHTS = HeightMap(mm_per_score=10.0, intercept_mm=0.0, residual_sd_mm=5.0)
A, B = "0123456789abcdef", "fedcba9876543210"  # associations
SERIES, PRIOR, FOLLOW_UP = "1.2.1", "1.2.2", "1.2.3"
PATIENT = PatientKey("P1", "HOSPITAL")
T0 = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
QUIET = timedelta(seconds=5)

on_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


@pytest.fixture
def node(engine) -> Engine:
    """A database that knows the bundle."""
    with store.writing(engine) as session:
        store.record_model(session, MODEL, manifest(), T0)
    return engine


def manifest(**heights: float) -> dict[str, Any]:
    values = {"mm_per_score": 10.0, "intercept_mm": 0.0, "residual_sd_mm": 5.0}
    return {"name": "made", "heights": {**values, **heights}}


def sop_uid(series_uid: str, k: int) -> str:
    return f"{series_uid}.{k + 1}"


def header(series_uid: str, k: int, **attributes: Any) -> SliceHeader:
    """Return the header of slice k of a stack with 5 mm between slices."""
    values: dict[str, Any] = {
        "sop_class_uid": CT_IMAGE,
        "sop_instance_uid": sop_uid(series_uid, k),
        "series_uid": series_uid,
        "study_uid": f"{series_uid}.0",
        "patient": PATIENT,
        "study_datetime": datetime(2026, 1, 5, 9, 30),
        "modality": "CT",
        "image_type": ("ORIGINAL", "PRIMARY", "AXIAL"),
        "image_position": (-100.0, -100.0, 5.0 * k),
        "image_orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        "pixel_spacing": (0.8, 0.8),
        "rows": 512,
        "columns": 512,
        "frame_of_reference_uid": f"{series_uid}.99",
    }
    return SliceHeader(**{**values, **attributes})


def scored(
    series_uid: str,
    k: int,
    *,
    score: float | None = None,
    association: str = A,
    at: datetime = T0,
    body_centre_mm: tuple[float, float] | None = None,
    preview: bytes | None = None,
    **attributes: Any,
) -> SliceResult:
    """Return slice k with a score that makes 1 mm of body height a mm."""
    h = header(series_uid, k, **attributes)
    score = 0.5 * k if score is None else score
    return SliceResult(h, association, at, score, None, body_centre_mm, preview)


def refused(
    series_uid: str, k: int, reason: Reason = Reason.LOCALIZER, **attributes: Any
) -> SliceResult:
    return SliceResult(header(series_uid, k, **attributes), A, T0, reason=reason)


def scan(series_uid: str, count: int = 12, **attributes: Any) -> list[SliceResult]:
    return [scored(series_uid, k, **attributes) for k in range(count)]


def record(engine: Engine, results: list[SliceResult], model: str = MODEL) -> None:
    with store.writing(engine) as session:
        store.record_slices(session, model, results)


def finish_in(session: Session, series_uid: str) -> int:
    """Finish an open Series as AssembleStage does, and return the pairs that follow."""
    series_id = next(s.id for s in store.open_series(session) if s.series_uid == series_uid)
    claimed = store.claim_series(session, series_id)
    assert claimed is not None
    outcome: ScoreCurve | Refusal = Refusal(series_uid, Reason.LOCALIZER)
    if claimed.model is not None:
        outcome = curve.assemble(
            claimed.slices,
            series_uid=series_uid,
            model=claimed.model,
            heights=store.heights_of(session, claimed.model),
            refused=len(claimed.set_aside),
            other_model=claimed.other_model,
        )
    return store.finish_series(
        session, series_id, outcome, claimed, Evidence.RELEASED_AND_QUIET, T0
    )


def finish(engine: Engine, series_uid: str) -> int:
    with store.writing(engine) as session:
        return finish_in(session, series_uid)


def add_curve(engine: Engine, series_uid: str, **attributes: Any) -> int:
    record(engine, scan(series_uid, **attributes))
    return finish(engine, series_uid)


def series_of(engine: Engine, series_uid: str) -> store.SeriesRow:
    with store.reading(engine) as session:
        (row,) = store.list_series(session, series_uid=series_uid)
        return row


def curve_of(engine: Engine, series_uid: str) -> ScoreCurve | None:
    with store.reading(engine) as session:
        return store.curve_of(session, series_uid)


def open_one(engine: Engine) -> OpenSeries:
    with store.reading(engine) as session:
        (found,) = store.open_series(session)
        return found


def claimed_slices(engine: Engine, series_uid: str) -> list[ScoredSlice]:
    """Return the scored slices of an open Series from feet to head."""
    with store.reading(engine) as session:
        claimed = store.open_slices(session, series_uid)
    assert claimed is not None
    return sorted(claimed.slices, key=lambda s: s.image_position[2])


def pairs(engine: Engine) -> set[tuple[str, str]]:
    """Return (fixed, moving) Series of all pairs that wait; each waits for both methods."""
    with store.reading(engine) as session:
        pending = store.pending_offsets(session, 1000)
    found = {(p.fixed_series, p.moving_series) for p in pending}
    assert len(pending) == len(Method) * len(found)
    return found


def contents(engine: Engine) -> dict[str, list[str]]:
    """Return every row of every table."""
    with store.reading(engine) as session:
        return {
            table.name: sorted(str(row) for row in session.execute(select(table)))
            for table in schema.Base.metadata.sorted_tables
        }


def assert_same_curve(a: ScoreCurve | None, b: ScoreCurve | None) -> None:
    assert a is not None and b is not None
    for name in ("z_mm", "score", "height_mm"):
        mine, other = getattr(a, name), getattr(b, name)
        assert mine.dtype == other.dtype
        assert mine.tobytes() == other.tobytes(), name
    mine, other = a.body_centre_mm, b.body_centre_mm
    assert (mine is None) == (other is None)
    assert mine is None or other is None or mine.tobytes() == other.tobytes()
    for name in ("series_uid", "model", "sop_instance_uids", "frames", "quality"):
        assert getattr(a, name) == getattr(b, name), name


# Slices as they arrive


def test_a_batch_recorded_twice_stores_the_same_rows(node):
    batch = [*scan(SERIES), refused(SERIES, 20)]
    record(node, batch)
    once = contents(node)
    record(node, batch)
    assert contents(node) == once


def test_one_batch_holds_slices_of_several_series(node):
    mixed = [
        r for trio in zip(scan("1.2.9"), scan("1.2.1"), scan("1.2.5"), strict=True) for r in trio
    ]
    record(node, mixed)
    with store.reading(node) as session:
        assert {s.series_uid: s.received for s in store.open_series(session)} == {
            "1.2.1": 12,
            "1.2.5": 12,
            "1.2.9": 12,
        }
    slices = claimed_slices(node, "1.2.5")
    assert [s.sop_instance_uid for s in slices] == [sop_uid("1.2.5", k) for k in range(12)]
    assert [s.score for s in slices] == [0.5 * k for k in range(12)]


def test_an_open_series_tells_how_far_it_got(node):
    record(node, scan(SERIES, expected_instances=40))
    record(node, [refused(SERIES, 20), refused(SERIES, 21)])
    record(node, [refused(SERIES, 22, Reason.PIXEL_DATA)])
    record(node, [scored(SERIES, 12)])
    row = series_of(node, SERIES)
    assert (row.state, row.reason, row.evidence) == (SeriesState.OPEN, None, None)
    assert (row.received, row.scored, row.expected, row.revision) == (16, 13, 40, 0)
    assert row.set_aside == {"localizer": 2, "pixel_data": 1}
    assert row.quality is row.height_mm is row.model is None


def test_a_series_tells_when_its_first_and_last_slice_arrived(node):
    record(node, [scored(SERIES, k, at=T0 + timedelta(seconds=k)) for k in range(10)])
    record(node, [scored(SERIES, k, at=T0 + timedelta(seconds=k)) for k in range(10, 20)])
    row = series_of(node, SERIES)
    assert row.first_arrival_at == T0
    assert row.last_arrival_at == T0 + timedelta(seconds=19)


def test_the_slices_of_an_open_series_can_be_read(node):
    record(node, scan(SERIES))
    found = query.series_curve(node, SERIES)
    assert found is not None and found.curve is None
    assert found.live_z_mm.tolist() == found.live_height_mm.tolist() == [5.0 * k for k in range(12)]


def test_the_first_ct_slice_names_the_modality(node):
    record(node, [refused(SERIES, 20, Reason.NOT_CT, modality="PR")])
    assert series_of(node, SERIES).modality == "PR"
    record(node, [scored(SERIES, 0)])
    assert series_of(node, SERIES).modality == "CT"
    record(node, [refused(SERIES, 21, Reason.NOT_CT, modality="PR")])
    assert series_of(node, SERIES).modality == "CT"


def test_series_are_listed_by_what_is_asked(node):
    add_curve(node, PRIOR)
    record(node, scan(SERIES, patient=PatientKey("P2"), at=T0 + QUIET))

    def listed(**asked: Any) -> list[str]:
        with store.reading(node) as session:
            return [row.series_uid for row in store.list_series(session, **asked)]

    assert listed() == [SERIES, PRIOR]  # newest arrival first
    assert listed(limit=1) == [SERIES]
    assert listed(patient_id="P1") == listed(study_uid=f"{PRIOR}.0") == [PRIOR]
    assert listed(state=SeriesState.CURVE) == [PRIOR]
    assert listed(state=SeriesState.OPEN) == [SERIES]
    assert listed(patient_id="P2", state=SeriesState.CURVE) == []
    with store.reading(node) as session:
        assert store.count_series(session) == {SeriesState.CURVE: 1, SeriesState.OPEN: 1}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_finishing_a_series_does_not_look_through_all_curves(node):
    add_curve(node, PRIOR)
    record(node, scan(FOLLOW_UP))
    with node.connect() as connection:
        asked: list[tuple[str, Any]] = []

        def note(_: Any, __: Any, statement: str, parameters: Any, *rest: Any) -> None:
            asked.append((statement, parameters))

        event.listen(node, "before_cursor_execute", note)
        assert finish(node, FOLLOW_UP) == 1
        event.remove(node, "before_cursor_execute", note)
        of_patient = [
            str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values).all())
            for sql, values in asked
            if sql.startswith("SELECT") and "series.patient_id = " in sql
        ]
    assert len(of_patient) == 1 and "ix_series_patient" in of_patient[0]


# Completion


def test_a_series_with_as_many_slices_as_expected_is_complete_at_once(node):
    record(node, scan(SERIES, 11, expected_instances=12))
    assert store.next_completion(open_one(node), T0, QUIET) is None
    record(node, [scored(SERIES, 11, expected_instances=12)])
    assert store.next_completion(open_one(node), T0, QUIET) is Evidence.EXPECTED_COUNT


def test_a_series_that_is_sent_again_changed_is_not_complete_by_its_count(node):
    """All of its slices are there from the first one on; it would be finished at each batch."""
    record(node, scan(SERIES, expected_instances=12))
    finish(node, SERIES)
    record(node, [scored(SERIES, 0, score=77.0, expected_instances=12)])
    assert open_one(node).received == 12
    assert store.next_completion(open_one(node), T0, QUIET) is None
    with store.writing(node) as session:
        store.end_association(session, A, "released")
    assert store.next_completion(open_one(node), T0 + QUIET, QUIET) is Evidence.RELEASED_AND_QUIET


def test_slices_set_aside_count_towards_the_expected(node):
    record(node, [*scan(SERIES, 11), refused(SERIES, 11, expected_instances=12)])
    assert store.next_completion(open_one(node), T0, QUIET) is Evidence.EXPECTED_COUNT


def test_a_released_series_is_complete_once_it_was_quiet(node):
    record(node, scan(SERIES))
    with store.writing(node) as session:
        store.end_association(session, A, "released")
    almost = T0 + QUIET - timedelta(milliseconds=1)
    assert store.next_completion(open_one(node), almost, QUIET) is None
    assert store.next_completion(open_one(node), T0 + QUIET, QUIET) is Evidence.RELEASED_AND_QUIET


def test_a_series_is_not_complete_while_its_association_is_open(node):
    record(node, scan(SERIES))
    assert store.next_completion(open_one(node), T0 + timedelta(days=1), QUIET) is None


def test_a_series_waits_for_every_association_that_carried_it(node):
    record(node, [scored(SERIES, 0), scored(SERIES, 1, association=B)])
    with store.writing(node) as session:
        store.end_association(session, A, "released")
    assert store.next_completion(open_one(node), T0 + QUIET, QUIET) is None
    with store.writing(node) as session:
        store.end_association(session, B, "released")
    assert store.next_completion(open_one(node), T0 + QUIET, QUIET) is Evidence.RELEASED_AND_QUIET


def test_an_end_holds_for_every_open_series_of_the_association(node):
    record(node, [*scan(SERIES), *scan(PRIOR)])
    with store.writing(node) as session:
        store.end_association(session, A, "released")
        assert [s.ends for s in store.open_series(session)] == [("released",), ("released",)]


def test_an_aborted_association_completes_as_lost(node):
    record(node, [scored(SERIES, 0), scored(SERIES, 1, association=B)])
    with store.writing(node) as session:
        store.end_association(session, A, "aborted")
        store.end_association(session, B, "released")
    assert store.next_completion(open_one(node), T0 + QUIET, QUIET) is Evidence.ASSOCIATION_LOST


def test_an_association_is_lost_when_it_brought_nothing_since(node):
    record(node, [scored(SERIES, 0), scored(PRIOR, 0, association=B, at=T0 + QUIET)])
    with store.writing(node) as session:
        store.end_lost_associations(session, T0 + QUIET, timedelta(0))  # B brought one just then
        ends = {s.series_uid: s for s in store.open_series(session)}
    assert ends[SERIES].ends == ("lost",) and ends[PRIOR].ends == (None,)
    later = T0 + 2 * QUIET
    assert store.next_completion(ends[SERIES], later, QUIET) is Evidence.ASSOCIATION_LOST
    assert store.next_completion(ends[PRIOR], later, QUIET) is None


def test_an_association_that_ended_is_not_lost_later(node):
    record(node, scan(SERIES))
    with store.writing(node) as session:
        store.end_association(session, A, "released")
        store.end_lost_associations(session, T0 + QUIET, timedelta(0))
    assert open_one(node).ends == ("released",)


def test_an_association_taken_for_lost_is_open_again_with_its_next_slice(node):
    record(node, scan(SERIES))
    with store.writing(node) as session:
        store.end_lost_associations(session, T0 + QUIET, timedelta(0))
    record(node, [scored(SERIES, 12, at=T0 + 2 * QUIET)])
    assert open_one(node).ends == (None,)


def test_series_wait_in_the_order_of_their_silence(node):
    record(node, [scored(SERIES, 0, at=T0 + QUIET), scored(PRIOR, 0), scored(FOLLOW_UP, 0)])
    record(node, [scored(PRIOR, 1, at=T0 + 2 * QUIET)])
    with store.reading(node) as session:
        assert [s.series_uid for s in store.open_series(session)] == [FOLLOW_UP, SERIES, PRIOR]


# How a Series ends


def test_a_finished_series_is_one_curve_and_no_slice_rows(node):
    record(node, [*scan(SERIES), refused(SERIES, 20)])
    assert finish(node, SERIES) == 0
    row = series_of(node, SERIES)
    assert (row.state, row.reason, row.evidence) == (
        SeriesState.CURVE,
        None,
        Evidence.RELEASED_AND_QUIET,
    )
    assert (row.received, row.scored, row.revision, row.model) == (13, 12, 1, MODEL)
    assert row.set_aside == {"localizer": 1}
    assert row.height_mm == (0.0, 55.0)
    left = contents(node)
    assert left["slice"] == left["arrival"] == []
    assert len(left["curve"]) == 1


@pytest.mark.parametrize(
    ("count", "z_step_mm", "reason"),
    [(7, 10.0, Reason.TOO_FEW_POSITIONS), (12, 1.0, Reason.TOO_SHORT)],
)
def test_a_refused_series_keeps_its_reason_and_its_slices(node, count, z_step_mm, reason):
    positions = [(0.0, 0.0, k * z_step_mm) for k in range(count)]
    record(node, [scored(SERIES, k, image_position=p) for k, p in enumerate(positions)])
    assert finish(node, SERIES) == 0
    row = series_of(node, SERIES)
    assert (row.state, row.reason, row.revision) == (SeriesState.IGNORED, reason, 1)
    assert curve_of(node, SERIES) is None
    left = contents(node)
    assert left["arrival"] == left["curve"] == []
    assert len(left["slice"]) == count  # for a curve, when the rest arrives


def test_a_series_of_unsound_slices_is_quarantined(node):
    record(node, scan(SERIES))
    with store.writing(node) as session:
        (waiting,) = store.open_series(session)
        claimed = store.claim_series(session, waiting.id)
        assert claimed is not None
        outcome = Refusal(SERIES, Reason.NOT_ONE_STACK)
        store.finish_series(
            session, waiting.id, outcome, claimed, Evidence.EXPECTED_COUNT, T0 + QUIET
        )
    row = series_of(node, SERIES)
    assert (row.state, row.evidence) == (SeriesState.QUARANTINED, Evidence.EXPECTED_COUNT)


def test_a_curve_comes_back_bit_for_bit(node):
    rng = np.random.default_rng(0)
    z_mm = np.cumsum(rng.uniform(0.3, 3, 200)) - 1000 / 3
    score = rng.normal(0, 30, 200).astype(np.float32)
    flags = (Flag.GAP, Flag.FRAME_OF_REFERENCE_VARIES)
    uids = [sop_uid(SERIES, k // 4) for k in range(200)]  # four frames to an Instance
    stored = ScoreCurve(
        series_uid=SERIES,
        model=MODEL,
        z_mm=z_mm,
        score=score,
        height_mm=HEIGHTS(score),
        sop_instance_uids=tuple(uids),
        frames=tuple(k % 4 + 1 for k in range(200)),
        quality=Quality(1 / 3, float(np.pi), flags),
        body_centre_mm=np.where(rng.random((200, 1)) < 0.1, np.nan, rng.normal(0, 50, (200, 2))),
    )
    slices = [
        ScoredSlice(
            sop_instance_uid=uid,
            frame=k % 4 + 1,
            image_position=(-1 / 3, 1 / 7, float(z_mm[k])),
            image_orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
            score=float(score[k]),
        )
        for k, uid in enumerate(uids)
    ]
    record(node, [scored(SERIES, 0)])
    with store.writing(node) as session:
        (waiting,) = store.open_series(session)
        claimed = Claimed(tuple(slices), {}, MODEL, 0)
        store.finish_series(session, waiting.id, stored, claimed, Evidence.RELEASED_AND_QUIET, T0)
    assert_same_curve(curve_of(node, SERIES), stored)
    row = series_of(node, SERIES)
    assert row.quality == stored.quality
    assert row.height_mm == (stored.height_mm.min(), stored.height_mm.max())


def test_curves_are_asked_for_by_series(node):
    add_curve(node, PRIOR)
    add_curve(node, FOLLOW_UP)
    with store.reading(node) as session:
        found = store.curves_of(session, [FOLLOW_UP, PRIOR, "9.9"])
        assert store.curve_of(session, "9.9") is None
    assert {uid: c.series_uid for uid, c in found.items()} == {
        PRIOR: PRIOR,
        FOLLOW_UP: FOLLOW_UP,
    }


def test_slices_of_a_reopened_series_are_what_they_were(node):
    """Each with its own position, to the bit, and its own frame of reference."""
    places = [(1 / 3, -1 / 7, 5.0 * k + 1 / 11) for k in range(12)]
    batch = [
        scored(
            SERIES,
            k,
            score=float(np.float32(k / 7)),
            image_position=places[k],
            image_orientation=(1.0, 1e-9, 0.0, -1e-9, 1.0, 0.0),
            frame_of_reference_uid=f"1.9.{k % 3}",
            body_centre_mm=(k / 3, -k / 7) if k % 4 else None,
            preview=bytes([k]) * (k + 1),
        )
        for k in range(12)
    ]
    record(node, batch)
    before = claimed_slices(node, SERIES)
    finish(node, SERIES)
    record(node, [scored(SERIES, 12)])
    after = claimed_slices(node, SERIES)
    assert len(after) == 13
    assert after[:12] == before
    assert previews(node, SERIES) == {sop_uid(SERIES, k): bytes([k]) * (k + 1) for k in range(12)}


def previews(engine: Engine, series_uid: str) -> dict[str, bytes]:
    """Return SOP Instance UID -> input, of slices that have a row of their own."""
    with store.reading(engine) as session:
        rows = session.execute(
            select(schema.Slice.sop_instance_uid, schema.Slice.preview)
            .join(schema.Series)
            .where(schema.Series.series_uid == series_uid)
        )
        return {uid: preview for uid, preview in rows if preview is not None}


# What comes after the end


def test_a_late_slice_reopens_its_series(node):
    record(node, scan(SERIES))
    finish(node, SERIES)
    old = curve_of(node, SERIES)
    record(node, [scored(SERIES, 12, at=T0 + QUIET)])
    row = series_of(node, SERIES)
    assert (row.state, row.evidence, row.revision) == (SeriesState.OPEN, None, 1)
    assert (row.received, row.scored, row.last_arrival_at) == (13, 13, T0 + QUIET)
    assert_same_curve(curve_of(node, SERIES), old)  # for whoever reads meanwhile

    finish(node, SERIES)
    row = series_of(node, SERIES)
    assert (row.state, row.received, row.revision) == (SeriesState.CURVE, 13, 2)
    new = curve_of(node, SERIES)
    assert new is not None and len(new.z_mm) == 13


def test_the_same_slices_give_the_same_curve_in_one_go_and_with_a_late_one(node):
    record(node, scan(SERIES, 13))
    finish(node, SERIES)
    at_once = curve_of(node, SERIES)
    assert at_once is not None

    slices = scan(PRIOR, 13)
    record(node, [r for r in slices if r is not slices[6]])
    finish(node, PRIOR)
    record(node, [slices[6]])
    finish(node, PRIOR)
    late = curve_of(node, PRIOR)
    assert late is not None
    assert late.score.tobytes() == at_once.score.tobytes()
    assert late.z_mm.tobytes() == at_once.z_mm.tobytes()
    assert late.quality == at_once.quality


def test_flags_stay_when_a_series_with_a_duplicate_position_is_reopened(node):
    twice = scored(SERIES, 50, image_position=(-100.0, -100.0, 10.0))  # where slice 2 lies
    record(node, [*scan(SERIES), twice])
    finish(node, SERIES)
    first = curve_of(node, SERIES)
    assert first is not None and first.quality.flags == (Flag.DUPLICATE_POSITION,)

    record(node, [scored(SERIES, 12)])
    finish(node, SERIES)
    second = curve_of(node, SERIES)
    assert second is not None and second.quality.flags == (Flag.DUPLICATE_POSITION,)


def test_a_series_refused_too_early_becomes_a_curve_when_the_rest_arrives(node):
    """Senders that open an association for every few slices are common."""
    record(node, scan(SERIES, 5))
    finish(node, SERIES)
    assert series_of(node, SERIES).reason is Reason.TOO_FEW_POSITIONS
    record(node, [scored(SERIES, k) for k in range(5, 20)])
    finish(node, SERIES)
    found = curve_of(node, SERIES)
    assert found is not None
    assert len(found.z_mm) == 20
    assert found.quality.flags == ()


def test_a_duplicate_of_a_finished_series_changes_nothing(node):
    batch = scan(SERIES)
    record(node, batch)
    finish(node, SERIES)
    before = contents(node)
    again = [SliceResult(r.header, B, T0 + QUIET, r.score) for r in batch]
    record(node, again)
    assert contents(node) == before


def test_a_score_of_another_dtype_is_the_same_score(node):
    record(node, scan(SERIES))
    finish(node, SERIES)
    record(node, [scored(SERIES, 4, score=2.0 + 0.12)])
    assert series_of(node, SERIES).state is SeriesState.CURVE


def test_an_instance_with_another_score_reopens_its_series(node):
    record(node, scan(SERIES))
    finish(node, SERIES)
    record(node, [scored(SERIES, 4, score=2.3)])
    row = series_of(node, SERIES)
    assert (row.state, row.received) == (SeriesState.OPEN, 12)
    finish(node, SERIES)
    found = curve_of(node, SERIES)
    assert found is not None
    assert found.score[4] == np.float32(2.3)
    assert series_of(node, SERIES).revision == 2


def test_an_instance_set_aside_and_sent_again_changes_nothing(node):
    record(node, [*scan(SERIES), refused(SERIES, 20)])
    record(node, [refused(PRIOR, k) for k in range(3)])  # ends without a curve
    finish(node, SERIES)
    finish(node, PRIOR)
    before = contents(node)
    record(node, [refused(SERIES, 20), refused(PRIOR, 1)])
    assert contents(node) == before


def test_an_instance_that_came_broken_and_is_sent_again_sound_is_taken(node):
    record(node, [*scan(SERIES), refused(SERIES, 12, Reason.PIXEL_DATA)])
    finish(node, SERIES)
    record(node, [scored(SERIES, 12)])
    assert series_of(node, SERIES).state is SeriesState.OPEN
    finish(node, SERIES)
    found = curve_of(node, SERIES)
    assert found is not None and len(found.z_mm) == 13
    assert series_of(node, SERIES).set_aside == {}


@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_copy_does_not_take_the_place_of_a_sound_one(node, finished):
    record(node, scan(SERIES))
    if finished:
        finish(node, SERIES)
    before = contents(node)
    record(node, [refused(SERIES, 4, Reason.PIXEL_DATA)])
    assert contents(node) == before


def test_a_curve_holds_scores_of_one_bundle(node):
    """A late slice after the bundle was exchanged: its score is on another scale."""
    exchange_bundle(node)
    record(node, scan(SERIES))
    finish(node, SERIES)
    record(node, [scored(SERIES, 12, score=60.0)], model=OTHER_MODEL)
    finish(node, SERIES)
    found = curve_of(node, SERIES)
    assert found is not None and found.model == MODEL
    assert len(found.z_mm) == 12
    assert found.quality.flags == (Flag.OTHER_MODEL,)


def test_a_series_sent_again_whole_is_scored_by_the_new_bundle(node):
    exchange_bundle(node)
    record(node, scan(SERIES))
    finish(node, SERIES)
    record(node, [scored(SERIES, 12, score=60.0)], model=OTHER_MODEL)
    finish(node, SERIES)
    record(node, [scored(SERIES, k, score=5.0 * k) for k in range(13)], model=OTHER_MODEL)
    finish(node, SERIES)
    found = curve_of(node, SERIES)
    assert found is not None and found.model == OTHER_MODEL
    assert found.height_mm.tolist() == [5.0 * k for k in range(13)]
    assert series_of(node, SERIES).set_aside == {}


def exchange_bundle(engine: Engine) -> None:
    """Let the database know a second bundle, whose scores are ten times as large."""
    with store.writing(engine) as session:
        store.record_model(session, OTHER_MODEL, manifest(mm_per_score=1.0), T0 + QUIET)


def test_a_bundle_keeps_its_map(node):
    exchange_bundle(node)
    with store.writing(node) as session:
        store.record_model(session, MODEL, manifest(), T0 + 2 * QUIET)  # the site goes back
    with store.reading(node) as session:
        assert store.heights_of(session, MODEL) == HEIGHTS
        assert store.heights_of(session, OTHER_MODEL) == HeightMap(1.0, 0.0, 5.0)


# Kept inputs


def kept_scan(series_uid: str, count: int = 12, **attributes: Any) -> list[SliceResult]:
    """Return a scan whose inputs are kept, each of another length."""
    return [scored(series_uid, k, preview=b"%d" % k * (k + 1), **attributes) for k in range(count)]


def kept_inputs(engine: Engine, series_uid: str, model: str) -> store.KeptInputs | None:
    with store.reading(engine) as session:
        series_id = session.scalar(
            select(schema.Series.id).where(schema.Series.series_uid == series_uid)
        )
        assert series_id is not None
        return store.kept_inputs(session, series_id, model)


def stale(engine: Engine, model: str, series_uid: str | None = None) -> dict[str, bool]:
    """Return Series that another bundle scored -> whether their inputs are kept."""
    with store.reading(engine) as session:
        return {s.series_uid: s.kept for s in store.stale_series(session, model, series_uid)}


def rescore(engine: Engine, kept: store.KeptInputs, score_of: float = 10.0) -> int | None:
    """Give each slice `score_of` times its score, by the other bundle, and finish the Series."""
    with store.writing(engine) as session:
        scores = {key: score_of * 0.5 * k for k, key in enumerate(kept.slices)}
        claimed = store.exchange_scores(session, kept, OTHER_MODEL, scores)
        if claimed is None:
            return None
        assert claimed.model is not None
        made = curve.assemble(
            claimed.slices,
            series_uid=SERIES,
            model=claimed.model,
            heights=store.heights_of(session, claimed.model),
            refused=len(claimed.set_aside),
            other_model=claimed.other_model,
        )
        return store.finish_series(session, kept.series_id, made, claimed, kept.evidence, T0)


def test_the_inputs_of_a_curve_are_one_row(node):
    exchange_bundle(node)
    record(node, [*kept_scan(SERIES), refused(SERIES, 20)])
    finish(node, SERIES)
    left = contents(node)
    assert left["slice"] == [] and len(left["preview"]) == 1
    kept = kept_inputs(node, SERIES, OTHER_MODEL)
    assert kept is not None
    assert kept.slices == tuple((sop_uid(SERIES, k), 1) for k in range(12))
    assert kept.inputs == tuple(b"%d" % k * (k + 1) for k in range(12))
    assert (kept.revision, kept.evidence) == (1, Evidence.RELEASED_AND_QUIET)
    assert kept_inputs(node, SERIES, MODEL) is None  # that bundle scored all of them


def test_a_late_slice_keeps_the_inputs_that_came_before(node):
    exchange_bundle(node)
    record(node, kept_scan(SERIES, 13)[:12])
    finish(node, SERIES)
    record(node, kept_scan(SERIES, 13)[12:])
    assert previews(node, SERIES) == {sop_uid(SERIES, k): b"%d" % k * (k + 1) for k in range(13)}
    assert contents(node)["preview"] == []
    finish(node, SERIES)
    kept = kept_inputs(node, SERIES, OTHER_MODEL)
    assert kept is not None and len(kept.inputs) == 13


def test_a_curve_short_of_an_input_keeps_none(node):
    """As when they were not kept for a while: it cannot be scored anew as a whole."""
    exchange_bundle(node)
    record(node, [*kept_scan(SERIES, 11), scored(SERIES, 11)])
    finish(node, SERIES)
    assert contents(node)["preview"] == []
    assert stale(node, OTHER_MODEL) == {SERIES: False}
    assert kept_inputs(node, SERIES, OTHER_MODEL) is None


def test_inputs_are_dropped_by_the_age_of_the_last_slice(node):
    exchange_bundle(node)
    twice = [
        scored(PRIOR, 50, image_position=(-100.0, -100.0, 10.0), preview=b"twice"),
        *kept_scan(PRIOR),
    ]
    for k, batch in enumerate((kept_scan(SERIES), twice, kept_scan("1.2.7", 3))):
        late = [SliceResult(r.header, A, T0 + k * QUIET, *r_values(r)) for r in batch]
        record(node, late)
        finish(node, batch[0].header.series_uid)
    record(node, kept_scan("1.2.8"))  # open: it is left alone
    with store.writing(node) as session:
        assert store.prune_previews(session, T0, 10) == 0
        assert store.prune_previews(session, T0 + QUIET, 10) == 1  # the first one
    assert stale(node, OTHER_MODEL) == {SERIES: False, PRIOR: True, "1.2.7": True}
    with store.writing(node) as session:
        assert store.prune_previews(session, T0 + 9 * QUIET, 10) == 2
        assert store.prune_previews(session, T0 + 9 * QUIET, 10) == 0
    assert stale(node, OTHER_MODEL) == {SERIES: False, PRIOR: False}
    assert previews(node, PRIOR) == previews(node, "1.2.7") == {}
    assert len(previews(node, "1.2.8")) == 12
    assert curve_of(node, PRIOR) is not None


def r_values(r: SliceResult) -> tuple[Any, ...]:
    return r.score, r.reason, r.body_centre_mm, r.preview


def test_no_more_series_than_asked_are_pruned_at_a_time(node):
    for k in range(5):
        record(node, kept_scan(f"1.4.{k}"))
        finish(node, f"1.4.{k}")
    pruned = []
    for _ in range(4):
        with store.writing(node) as session:
            pruned.append(store.prune_previews(session, T0 + QUIET, 2))
    assert pruned == [2, 2, 1, 0]


def test_a_series_scored_anew_is_revised_and_keeps_its_inputs(node):
    exchange_bundle(node)
    record(node, [*kept_scan(SERIES, body_centre_mm=(1 / 3, 2.0)), refused(SERIES, 20)])
    finish(node, SERIES)
    before, kept = series_of(node, SERIES), kept_inputs(node, SERIES, OTHER_MODEL)
    assert kept is not None and stale(node, OTHER_MODEL) == {SERIES: True}
    with store.reading(node) as session:
        assert (store.count_stale(session, OTHER_MODEL), store.count_stale(session, MODEL)) == (
            1,
            0,
        )
    assert rescore(node, kept) == 0
    found, row = curve_of(node, SERIES), series_of(node, SERIES)
    assert found is not None and found.model == OTHER_MODEL
    assert found.score.tolist() == [5.0 * k for k in range(12)]
    assert found.height_mm.tolist() == [5.0 * k for k in range(12)]
    assert found.body_centre_mm is not None
    assert found.body_centre_mm.tolist() == [[1 / 3, 2.0]] * 12
    assert (row.revision, row.state, row.evidence) == (2, before.state, before.evidence)
    assert (row.received, row.set_aside) == (before.received, before.set_aside)
    assert stale(node, OTHER_MODEL) == {}
    again = kept_inputs(node, SERIES, MODEL)
    assert again is not None
    assert (again.slices, again.inputs) == (kept.slices, kept.inputs)


def test_a_series_that_changed_meanwhile_is_left_alone(node):
    exchange_bundle(node)
    record(node, kept_scan(SERIES))
    finish(node, SERIES)
    kept = kept_inputs(node, SERIES, OTHER_MODEL)
    assert kept is not None
    record(node, kept_scan(SERIES, 13)[12:])
    before = contents(node)
    assert rescore(node, kept) is None  # open
    assert kept_inputs(node, SERIES, OTHER_MODEL) is None
    assert contents(node) == before
    finish(node, SERIES)
    before = contents(node)
    assert rescore(node, kept) is None  # finished, but another revision
    assert contents(node) == before
    kept = kept_inputs(node, SERIES, OTHER_MODEL)
    assert kept is not None and rescore(node, kept) == 0
    assert rescore(node, kept) is None  # by another that did the same
    found = curve_of(node, SERIES)
    assert found is not None and len(found.z_mm) == 13


def test_pairs_come_back_once_one_bundle_scored_both(node):
    exchange_bundle(node)
    for series_uid, when in ((PRIOR, EARLIER), (FOLLOW_UP, LATER)):
        record(node, kept_scan(series_uid, study_datetime=when))
        finish(node, series_uid)
    settle(node)
    for series_uid, waiting in ((PRIOR, 0), (FOLLOW_UP, 1)):
        kept = kept_inputs(node, series_uid, OTHER_MODEL)
        assert kept is not None
        assert rescore(node, kept) == waiting
        with store.reading(node) as session:
            found = {s.offset.status for s in store.offsets_of(session)}
        assert found == (set() if waiting else {OffsetStatus.REFUSED})
    assert pairs(node) == {(FOLLOW_UP, PRIOR)}


def test_slices_of_two_bundles_come_together(node):
    """A Series that arrived while the bundle was exchanged."""
    exchange_bundle(node)
    batch = kept_scan(SERIES, 16)
    record(node, batch[:12])
    record(node, batch[12:], model=OTHER_MODEL)
    finish(node, SERIES)
    found = curve_of(node, SERIES)
    assert found is not None and (found.model, len(found.z_mm)) == (MODEL, 12)
    kept = kept_inputs(node, SERIES, OTHER_MODEL)
    assert kept is not None and len(kept.inputs) == 12
    with store.writing(node) as session:
        scores = {key: 0.5 * k for k, key in enumerate(kept.slices)}
        claimed = store.exchange_scores(session, kept, OTHER_MODEL, scores)
    assert claimed is not None and claimed.other_model == 0
    assert [len(claimed.slices), claimed.model] == [16, OTHER_MODEL]


def test_slices_of_another_bundle_beside_a_curve_of_this_one_are_found(node):
    exchange_bundle(node)
    record(node, kept_scan(SERIES), model=OTHER_MODEL)
    record(node, [scored(SERIES, 12, preview=b"late")])
    record(node, [scored(PRIOR, k) for k in range(3)])  # no curve, and no input either
    finish(node, SERIES)
    finish(node, PRIOR)
    assert stale(node, OTHER_MODEL) == {SERIES: True}
    assert stale(node, OTHER_MODEL, SERIES) == {SERIES: True}
    assert stale(node, OTHER_MODEL, PRIOR) == {}
    kept = kept_inputs(node, SERIES, OTHER_MODEL)
    assert kept is not None
    assert (kept.slices, kept.inputs) == (((sop_uid(SERIES, 12), 1),), (b"late",))


# Pairs

EARLIER, LATER = datetime(2024, 3, 1, 9, 0), datetime(2025, 3, 1, 9, 0)


@pytest.mark.parametrize("prior_first", [True, False])
def test_the_newer_study_is_fixed_whichever_came_first(node, prior_first):
    studies = [(PRIOR, EARLIER), (FOLLOW_UP, LATER)]
    waiting = [
        add_curve(node, series_uid, study_datetime=when)
        for series_uid, when in (studies if prior_first else reversed(studies))
    ]
    assert waiting == [0, 1]
    assert pairs(node) == {(FOLLOW_UP, PRIOR)}


def test_a_curve_is_paired_with_every_curve_of_the_other_studies(node):
    for k in range(3):
        add_curve(node, f"1.3.{k}", study_uid="1.3", study_datetime=EARLIER)
    assert add_curve(node, FOLLOW_UP, study_datetime=LATER) == 3
    assert pairs(node) == {(FOLLOW_UP, f"1.3.{k}") for k in range(3)}


def test_series_of_one_study_are_not_paired(node):
    add_curve(node, PRIOR, study_uid="1.3")
    assert add_curve(node, FOLLOW_UP, study_uid="1.3") == 0


def test_studies_without_patient_id_are_not_paired(node):
    add_curve(node, PRIOR, patient=PatientKey("", "HOSPITAL"))
    assert add_curve(node, FOLLOW_UP, patient=PatientKey("", "HOSPITAL")) == 0


def test_one_patient_id_of_two_issuers_is_two_patients(node):
    add_curve(node, "1.3.1", patient=PatientKey("P1", "NORTH"))
    assert add_curve(node, "1.3.2", patient=PatientKey("P1", "SOUTH")) == 0
    assert add_curve(node, "1.3.3", patient=PatientKey("P1", "")) == 0
    assert add_curve(node, "1.3.4", patient=PatientKey("P1", "NORTH"), study_datetime=LATER) == 1
    assert {frozenset(p) for p in pairs(node)} == {frozenset(("1.3.1", "1.3.4"))}


def test_curves_of_two_bundles_are_not_paired(node):
    exchange_bundle(node)
    add_curve(node, PRIOR)
    record(node, scan(FOLLOW_UP), model=OTHER_MODEL)
    assert finish(node, FOLLOW_UP) == 0


def test_a_study_without_a_date_is_the_older_one(node):
    add_curve(node, "1.3.9", study_datetime=None)
    add_curve(node, "1.3.1", study_datetime=EARLIER)
    assert pairs(node) == {("1.3.1", "1.3.9")}


def test_a_revised_curve_is_paired_anew(node):
    add_curve(node, PRIOR, study_datetime=EARLIER)
    add_curve(node, FOLLOW_UP, study_datetime=LATER)
    settle(node)
    record(node, [scored(PRIOR, 12, study_datetime=EARLIER)])
    assert finish(node, PRIOR) == 1
    assert pairs(node) == {(FOLLOW_UP, PRIOR)}
    with store.reading(node) as session:
        assert {p.moving_revision for p in store.pending_offsets(session, 10)} == {2}
        assert store.offsets_of(session) == []


def test_pairs_go_with_a_curve_that_is_revised_to_a_refusal(node):
    add_curve(node, PRIOR, study_datetime=EARLIER)
    add_curve(node, FOLLOW_UP, study_datetime=LATER)
    settle(node)
    oblique = (1.0, 0.0, 0.0, 0.0, 0.99, 0.14)
    record(node, [scored(PRIOR, 12, study_datetime=EARLIER, image_orientation=oblique)])
    finish(node, PRIOR)
    assert series_of(node, PRIOR).reason is Reason.NOT_ONE_STACK
    with store.reading(node) as session:
        assert store.offsets_of(session) == []
    assert pairs(node) == set()


@pytest.mark.parametrize("again", ["P2", "P1"])
def test_a_corrected_patient_takes_the_series_and_its_pairs_along(node, again):
    """`again` names the patient under whom the same Instances come once more."""
    mine, other = PatientKey("P1", "HOSPITAL"), PatientKey("P2", "HOSPITAL")
    add_curve(node, "1.3.1", patient=mine, study_datetime=EARLIER)
    add_curve(node, "1.3.2", patient=other, study_datetime=EARLIER)
    add_curve(node, FOLLOW_UP, patient=mine, study_datetime=LATER)
    corrected = PatientKey(again, "HOSPITAL")
    record(node, scan(FOLLOW_UP, patient=corrected, study_datetime=LATER))
    row = series_of(node, FOLLOW_UP)
    assert row.patient == corrected
    if again == "P1":
        assert row.state is SeriesState.CURVE
        assert pairs(node) == {(FOLLOW_UP, "1.3.1")}
    else:
        assert (row.state, row.received) == (SeriesState.OPEN, 12)
        assert finish(node, FOLLOW_UP) == 1
        assert pairs(node) == {(FOLLOW_UP, "1.3.2")}
        found = curve_of(node, FOLLOW_UP)
        assert found is not None and len(found.z_mm) == 12


def test_a_sender_that_names_no_issuer_does_not_take_it_away(node):
    add_curve(node, SERIES)
    before = contents(node)
    record(node, scan(SERIES, patient=PatientKey("P1")))
    assert contents(node) == before
    record(node, scan(SERIES, patient=PatientKey("P1"), study_uid="1.3.0"))  # a new study, too
    assert series_of(node, SERIES).patient == PATIENT


def test_a_default_issuer_does_not_take_away_the_one_that_was_named(node):
    """Another sender leaves the issuer out, and has a default that stands in for it."""
    add_curve(node, SERIES)
    before = contents(node)
    other = PatientKey("P1", "DEFAULT")
    record(node, scan(SERIES, patient=other, issuer_is_default=True))
    assert contents(node) == before
    record(node, scan(SERIES, patient=other))  # but one that names it corrects it
    assert series_of(node, SERIES).patient == other


def test_no_offset_between_two_patients_is_answered(node):
    """From the moment that the correction is known, not only once the curve is made anew."""
    add_curve(node, PRIOR, study_datetime=EARLIER)
    add_curve(node, FOLLOW_UP, study_datetime=LATER)
    settle(node)
    record(node, scan(FOLLOW_UP, 7, patient=PatientKey("P2"), study_datetime=LATER))
    assert series_of(node, FOLLOW_UP).patient == PatientKey("P2")
    with store.reading(node) as session:
        assert store.offsets_of(session) == []


def test_a_corrected_study_unpairs_series_of_one_study(node):
    add_curve(node, PRIOR, study_uid="1.3.0", study_datetime=EARLIER)
    add_curve(node, FOLLOW_UP, study_datetime=LATER)
    assert pairs(node) == {(FOLLOW_UP, PRIOR)}
    record(node, scan(FOLLOW_UP, study_uid="1.3.0", study_datetime=EARLIER))
    assert finish(node, FOLLOW_UP) == 0
    assert pairs(node) == set()


@on_postgres
def test_two_workers_that_finish_two_studies_at_once_forget_no_pair(node):
    record(node, [*scan(PRIOR, study_datetime=EARLIER), *scan(FOLLOW_UP, study_datetime=LATER)])
    other = threading.Thread(target=finish, args=(node, FOLLOW_UP))
    with store.writing(node) as session:
        finish_in(session, PRIOR)
        other.start()
        other.join(1.0)  # it may go through, or wait for the first one's commit
    other.join()
    assert pairs(node) == {(FOLLOW_UP, PRIOR)}


# Offsets


def settle(engine: Engine, offset: Offset | None = None) -> None:
    """Store an offset for all that waits."""
    with store.writing(engine) as session:
        for pending in store.pending_offsets(session, 100):
            made = offset or Offset(pending.method, OffsetStatus.OK, 12.5, 55.0)
            store.store_offsets(session, [(pending, made, 0.25)], T0)


def test_an_offset_comes_back_whole(node):
    add_curve(node, PRIOR, study_datetime=EARLIER)
    add_curve(node, FOLLOW_UP, study_datetime=LATER)
    whole = Offset(Method.L1, OffsetStatus.OK, 1 / 3, 55.0, 2 / 3, "why", -1 / 7, 0.0)
    bare = Offset(Method.FAST, OffsetStatus.REFUSED, reason="flat")
    blind = Offset(Method.ROBUST, OffsetStatus.REFUSED, reason=robust.NO_COVARIANCE)
    by_method = {o.method: o for o in (whole, bare, blind)}
    with store.writing(node) as session:
        for pending in store.pending_offsets(session, 10):
            store.store_offsets(session, [(pending, by_method[pending.method], 0.25)], T0)
    assert pairs(node) == set()
    with store.reading(node) as session:
        found = store.offsets_of(session)
        assert store.count_offsets(session) == 3
        assert store.offsets_of(session, method=Method.FAST) == found[1:2]
        assert store.offsets_of(session, fixed_study=f"{FOLLOW_UP}.0") == found
        assert store.offsets_of(session, moving_study=f"{FOLLOW_UP}.0") == []
    assert [s.offset for s in found] == [whole, bare, blind]
    first = found[0]
    assert (first.fixed_series, first.moving_series) == (FOLLOW_UP, PRIOR)
    assert (first.fixed_study, first.moving_study) == (f"{FOLLOW_UP}.0", f"{PRIOR}.0")
    assert (first.model, first.computed_at, first.seconds) == (MODEL, T0, 0.25)


def test_the_most_trustworthy_offset_comes_first(node):
    for k in range(3):
        add_curve(node, f"1.3.{k}", study_uid="1.3", study_datetime=EARLIER)
    add_curve(node, FOLLOW_UP, study_datetime=LATER)
    ok, extrapolated, refused_ = OffsetStatus
    made = {
        ("1.3.0", Method.L1): (ok, 50.0),
        ("1.3.1", Method.L1): (ok, 80.0),
        ("1.3.2", Method.L1): (extrapolated, 300.0),
        ("1.3.0", Method.FAST): (ok, 200.0),
        ("1.3.1", Method.FAST): (extrapolated, 400.0),
        ("1.3.2", Method.FAST): (refused_, None),
        # One knows that it does not know, one was never told how curves err.
        ("1.3.0", Method.ROBUST): (extrapolated, 10.0),
        ("1.3.1", Method.ROBUST): (refused_, "uncertain"),
        ("1.3.2", Method.ROBUST): (refused_, robust.NO_COVARIANCE),
    }
    with store.writing(node) as session:
        for p in store.pending_offsets(session, 10):
            status, detail = made[p.moving_series, p.method]
            offset = Offset(p.method, status, 0.0, detail)
            if status is refused_:
                offset = Offset(p.method, status, reason=detail)
            store.store_offsets(session, [(p, offset, 0.0)], T0)
    with store.reading(node) as session:
        found = store.offsets_of(session, fixed_study=f"{FOLLOW_UP}.0", moving_study="1.3")
    assert [(s.moving_series, s.offset.method) for s in found] == [
        ("1.3.0", Method.ROBUST),
        ("1.3.1", Method.ROBUST),
        ("1.3.1", Method.L1),
        ("1.3.0", Method.L1),
        ("1.3.0", Method.FAST),
        ("1.3.2", Method.L1),
        ("1.3.1", Method.FAST),
        ("1.3.2", Method.FAST),
        ("1.3.2", Method.ROBUST),
    ]


def test_pairs_are_worked_off_oldest_first(node):
    for k in range(4):
        add_curve(node, f"1.3.{k}", study_datetime=datetime(2020 + k, 1, 1))
    with store.reading(node) as session:
        everything = store.pending_offsets(session, 100)
        assert store.pending_offsets(session, 5) == everything[:5]
    assert {(p.fixed_series, p.moving_series) for p in everything[:2]} == {("1.3.1", "1.3.0")}


def test_an_offset_of_a_curve_revised_meanwhile_is_not_stored(node):
    add_curve(node, PRIOR, study_datetime=EARLIER)
    add_curve(node, FOLLOW_UP, study_datetime=LATER)
    with store.reading(node) as session:
        stale = store.pending_offsets(session, 10)
    record(node, [scored(PRIOR, 12, study_datetime=EARLIER)])
    finish(node, PRIOR)
    with store.writing(node) as session:
        for p in stale:
            offset = Offset(p.method, OffsetStatus.OK, 1.0, 1.0)
            store.store_offsets(session, [(p, offset, 0.0)], T0)
        assert store.offsets_of(session) == []
    assert pairs(node) == {(FOLLOW_UP, PRIOR)}


# Two workers, no server, quarantine


@on_postgres
def test_a_series_claimed_by_one_worker_is_passed_over_by_the_other(node):
    record(node, [*scan(SERIES), *scan(PRIOR)])
    with store.reading(node) as session:
        ids = {s.series_uid: s.id for s in store.open_series(session)}
    with store.writing(node) as one, store.writing(node) as two:
        mine = store.claim_series(one, ids[SERIES])
        assert mine is not None and len(mine.slices) == 12
        assert store.claim_series(two, ids[SERIES]) is None
        theirs = store.claim_series(two, ids[PRIOR])
        assert theirs is not None and len(theirs.slices) == 12
    with store.writing(node) as session:
        assert store.claim_series(session, ids[SERIES]) is not None


def test_a_finished_series_cannot_be_claimed(node):
    record(node, scan(SERIES))
    series_id = open_one(node).id
    finish(node, SERIES)
    with store.writing(node) as session:
        assert store.claim_series(session, series_id) is None


def test_a_transaction_that_fails_leaves_nothing(node):
    before = contents(node)
    with pytest.raises(RuntimeError), store.writing(node) as session:
        store.record_slices(session, MODEL, scan(SERIES))
        raise RuntimeError
    assert contents(node) == before


def test_quarantined_files_are_counted_by_reason(node):
    files = [("a.dcm", Reason.NOT_DICOM), ("b.dcm", Reason.NOT_DICOM), ("c.dcm", Reason.CORRUPT)]
    for name, reason in [*files, files[0]]:
        with store.writing(node) as session:
            store.record_quarantined(session, name, reason, "why", T0)
    with store.reading(node) as session:
        assert store.count_quarantined(session) == {"not_dicom": 2, "corrupt": 1}


def test_a_server_that_is_gone_is_a_store_that_is_unavailable():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"postgresql://secret@127.0.0.1:{free.getsockname()[1]}/none"  # nobody listens
        with pytest.raises(StoreUnavailable) as info, store.opened(url):
            pass
    assert "secret" not in str(info.value)


@on_postgres
def test_a_connection_that_the_server_cuts_is_a_store_that_is_unavailable(node):
    with pytest.raises(StoreUnavailable), store.writing(node) as session:
        pid = session.scalar(select(func.pg_backend_pid()))
        with node.connect() as other:
            other.execute(select(func.pg_terminate_backend(pid)))
        store.record_slices(session, MODEL, scan(SERIES))
    record(node, scan(SERIES))  # the next one finds a connection that works
    assert series_of(node, SERIES).received == 12
