"""Expressions asked of SQLite, of Postgres and of plain Python: one answer.

`DICOMNODE_TEST_MORE=20 pytest tests/integration/test_mining.py` asks twenty times as many.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from db import engine as engines
from db import migrate, schema
from dicomnode import store
from dicomnode.core import region
from dicomnode.core.region import Limit, Region, Support
from dicomnode.errors import ExpressionError
from dicomnode.mining import FIELDS, Record, evaluate, parse
from dicomnode.mining.fields import Kind
from dicomnode.model import Flag, Quality, Reason, ScoreCurve, SeriesState
from dicomnode.store import coverage, search
from tests.conftest import postgres_database

MORE = int(os.environ.get("DICOMNODE_TEST_MORE", "1"))
MODEL, OTHER_MODEL = "5" * 64, "6" * 64
T0 = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
DAY0 = datetime(2024, 1, 1, 12, 0)


def at(height_mm: float) -> Limit:
    return Limit(Support.LANDMARK, height_mm, 9.0)


NOWHERE = Limit(Support.UNSUPPORTED)
REGIONS = (
    Region("pelvis", "816092008", "Pelvis", at(-100.0), at(50.0)),
    Region("liver", "10200004", "Liver", at(90.0), at(260.0)),
    Region("chest", "816094009", "Chest", at(190.0), at(428.1)),
    Region("head", "69536005", "Head", at(573.4), NOWHERE),
    Region("hip joints", "24136001", "Hip joints", NOWHERE, at(-42.5)),
    Region("brain", "12738006", "Brain", NOWHERE, NOWHERE),
)
# Of another calibration, without a chest; its liver lies higher.
OTHER_REGIONS = (
    Region("pelvis", "816092008", "Pelvis", at(-120.0), at(40.0)),
    Region("liver", "10200004", "Liver", at(110.0), at(300.0)),
)
TABLES = {MODEL: REGIONS, OTHER_MODEL: OTHER_REGIONS}


@dataclass(frozen=True)
class Row:
    """A Series as a test wants it; without `z_mm` it has no curve."""

    patient_id: str = "P1"
    issuer: str = ""
    study: int = 0
    study_datetime: datetime | None = DAY0
    modality: str = "CT"
    manufacturer: str = ""
    body_part_examined: str = ""
    state: SeriesState = SeriesState.CURVE
    reason: Reason | None = None
    arrived: datetime = T0
    z_mm: tuple[float, ...] = ()
    height_mm: tuple[float, ...] = ()
    model: str = MODEL
    quality: float = 0.99
    slope: float = 1.0
    flags: tuple[Flag, ...] = ()


def scan(low_mm: float, high_mm: float, spacing_mm: float = 10.0, **values: Any) -> Row:
    """A Series that fills body heights from low to high."""
    z = np.arange(low_mm + spacing_mm / 2, high_mm, spacing_mm)
    return Row(z_mm=tuple(z), height_mm=tuple(z), **values)


def scan_with_gap(ends: list[tuple[float, float]], **values: Any) -> Row:
    """A Series that fills several stretches, of slices 10 mm apart."""
    z = np.concatenate([np.arange(low + 5.0, high, 10.0) for low, high in ends])
    return Row(z_mm=tuple(z), height_mm=tuple(z), **values)


def curve_of(row: Row, uid: str) -> ScoreCurve:
    n = len(row.z_mm)
    return ScoreCurve(
        series_uid=uid,
        model=row.model,
        z_mm=np.array(row.z_mm),
        score=np.array(row.height_mm, np.float32),
        height_mm=np.array(row.height_mm),
        sop_instance_uids=tuple(f"{uid}.{k}" for k in range(n)),
        frames=(1,) * n,
        quality=Quality(row.quality, row.slope, row.flags),
    )


def study_uid(row: Row) -> str:
    return f"1.2.{row.study}"


def fill(engine: Engine, rows: list[Row]) -> list[int]:
    """Put Series into an emptied database, and return their ids."""
    with store.writing(engine) as session:
        for table in (schema.Stretch, schema.Coverage, schema.Curve, schema.Series):
            session.execute(delete(table))
        for digest, table in TABLES.items():
            manifest = {"regions": [r.to_dict() for r in table]}
            store.record_model(session, digest, manifest, T0)
        ids = []
        for i, row in enumerate(rows):
            uid = f"1.2.{row.study}.{i}"
            series = schema.Series(
                series_uid=uid,
                study_uid=study_uid(row),
                patient_id=row.patient_id,
                issuer=row.issuer,
                study_datetime=row.study_datetime,
                modality=row.modality,
                body_part_examined=row.body_part_examined,
                manufacturer=row.manufacturer,
                state=row.state,
                reason=row.reason,
                revision=1,
                received=0,
                set_aside={},
                first_arrival_at=row.arrived,
                last_arrival_at=row.arrived,
            )
            session.add(series)
            session.flush()
            ids.append(series.id)
            if row.z_mm:
                session.add(stored_curve(series.id, row))
                session.flush()
                coverage.store_coverage(session, series.id, curve_of(row, uid))
    return ids


def stored_curve(series_id: int, row: Row) -> schema.Curve:
    """A row of `curve` with nothing in its arrays: mining does not look there."""
    return schema.Curve(
        series_id=series_id,
        model=row.model,
        revision=1,
        count=len(row.z_mm),
        z_mm=b"",
        score=b"",
        image_position=b"",
        image_orientation=[],
        instances=b"",
        frames_of_reference=[],
        height_min_mm=min(row.height_mm),
        height_max_mm=max(row.height_mm),
        pearson_r=row.quality,
        slope=row.slope,
        flags=list(row.flags),
        computed_at=T0,
    )


def record_of(row: Row, i: int, rows: list[Row]) -> Record:
    """What the evaluator is to know of a Series, worked out without a database."""
    texts = {
        "modality": row.modality,
        "manufacturer": row.manufacturer,
        "body_part_examined": row.body_part_examined,
        "patient_id": row.patient_id,
        "issuer": row.issuer,
        "study_uid": study_uid(row),
        "series_uid": f"1.2.{row.study}.{i}",
        "state": row.state,
        "reason": row.reason,
    }
    times = {"study_date": row.study_datetime, "arrived": row.arrived}
    others = tuple(
        r.study_datetime
        for r in rows
        if r.z_mm
        and row.patient_id
        and (r.patient_id, r.issuer) == (row.patient_id, row.issuer)
        and r.study != row.study
    )
    if not row.z_mm:
        return Record(texts=texts, times=times, others=others)
    filled = region.stretches(np.array(row.z_mm), np.array(row.height_mm))
    return Record(
        texts=texts,
        times=times,
        bundle=row.model,
        stretches=filled,
        numbers={
            "slices": len(row.z_mm),
            "spacing": round(float(np.median(np.diff(row.z_mm))) * 1000),
            "quality": row.quality,
            "slope": row.slope,
            "low": filled[0][0],
            "high": filled[-1][1],
        },
        flags=frozenset(row.flags),
        others=others,
    )


def asked(text: str) -> Any:
    return parse(text, REGIONS, TABLES)


def found(engine: Engine, text: str, limit: int = 100) -> list[int]:
    """Ids that an expression finds, page by page."""
    with store.reading(engine) as session:
        page = store.find_page(session, asked(text), limit=limit)
        ids = [m.id for m in page.matches]
        while page.next is not None:
            page = store.find_page(session, asked(text), before=page.next, limit=limit)
            ids += [m.id for m in page.matches]
    return ids


# What an expression may look like.

# Ends of curves and of regions lie on one grid, so that "at least" and "more than" differ.
ENDS = (-300, -200, -100, -50, 0, 50, 90, 100, 120, 150, 175, 190, 220, 260, 300, 430, 600, 700)
NUMBERS = st.sampled_from(["0", "1", "-42.5", "0.99", "2.5", "10", "0.9", *map(str, ENDS)])
FRACTIONS = st.sampled_from(["1", "0.5", "0.9", ".25", "0.123456789", "0.001", "1.0"])
NAMES = st.sampled_from(["liver", "pelvis", "chest", '"hip joints"', "head", "10200004"])
WORDS = st.sampled_from(
    ["CT", "MR", '"Ét "', "'a\"b'", '""', "'; --'", "%", "si", "CHEST", "P1", "1.2.0", "1.2.0.1"]
).map(lambda w: w if w[0] in "\"'" or w.replace(".", "").isalnum() else f'"{w}"')
ORDERS = st.sampled_from(["<", "<=", "=", "!=", ">=", ">"])
DAYS = st.integers(-3, 3).map(lambda d: str((DAY0 + timedelta(days=d)).date()))


def of(*parts: Any) -> st.SearchStrategy[str]:
    return st.tuples(*(st.just(p) if isinstance(p, str) else p for p in parts)).map("".join)


def one_of(field: str) -> st.SearchStrategy[str]:
    values = st.sampled_from(FIELDS[field].choices)
    several = st.lists(values, min_size=1, max_size=3).map(", ".join)
    return of(field, st.sampled_from([" = ", " != "]), values) | of(
        field, " not in (", several, ")"
    )


COVERABLE = NAMES.filter(lambda n: n not in ("head", '"hip joints"'))
TAGS = st.sampled_from([name for name, field in FIELDS.items() if field.kind is Kind.TEXT])
ATOMS = st.one_of(
    of("covers(", COVERABLE, ", ", FRACTIONS, ")"),
    of("covers(", COVERABLE, ")"),
    of("overlaps(", NAMES, ")"),
    of(
        "height(", st.sampled_from(["-100", "0", "90"]), ",", st.sampled_from(["100", "250.5"]), ")"
    ),
    of(st.sampled_from(["low", "high", "spacing", "quality", "slope"]), " ", ORDERS, " ", NUMBERS),
    of("slices ", ORDERS, " ", st.sampled_from(["2", "12", "30", "999999999999999999999"])),
    of(TAGS, st.sampled_from([" = ", " != ", "=="]), WORDS),
    of(TAGS, " in (", WORDS, ", ", WORDS, ")"),
    of(TAGS, " ~ ", WORDS.filter(lambda w: w != '""')),
    of(st.sampled_from(["study_date", "arrived"]), " ", ORDERS, " ", DAYS),
    of("prior(", st.sampled_from(["", "within=0d", "within=2d", "within = 1w"]), ")"),
    of("bundle = '", st.sampled_from(["55555555", "6666666666", "77777777", "5" * 64]), "'"),
    one_of("state"),
    one_of("reason"),
    one_of("flag"),
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        of("not ", inner.map(lambda t: f"({t})")),
        of("(", inner, ") and (", inner, ")"),
        of("(", inner, ") or ", inner),
        of(inner, " and ", inner, " or ", inner),
    ),
    max_leaves=6,
)


@st.composite
def series(draw: st.DrawFn) -> Row:
    values: dict[str, Any] = {
        "patient_id": draw(st.sampled_from(["", "P1", "P2"])),
        "issuer": draw(st.sampled_from(["", "SI"])),
        "study": draw(st.integers(0, 3)),
        "study_datetime": draw(
            st.none()
            | st.integers(-60, 60).map(lambda h: DAY0 + timedelta(hours=h, microseconds=h))
        ),
        "arrived": T0 + draw(st.integers(-60, 60)) * timedelta(hours=1),
        "modality": draw(st.sampled_from(["CT", "MR"])),
        "manufacturer": draw(st.sampled_from(["", "Siemens", "sí; --", 'A"b', "É", "50%"])),
        "body_part_examined": draw(st.sampled_from(["", "CHEST", "Chest"])),
        "model": draw(st.sampled_from([MODEL, OTHER_MODEL])),
        "quality": draw(st.sampled_from([0.99, 0.9, -1.0, 1.0])),
        "slope": draw(st.sampled_from([1.0, 2.5, -1.0])),
        "flags": tuple(draw(st.sets(st.sampled_from(sorted(Flag)), max_size=2))),
        "state": draw(st.sampled_from(sorted(SeriesState))),
        "reason": draw(st.none() | st.sampled_from([Reason.TILT, Reason.LOCALIZER])),
    }
    ends = sorted(draw(st.sets(st.sampled_from(ENDS), max_size=6)))
    stretches = [(lo, hi) for lo, hi in zip(ends[::2], ends[1::2], strict=False) if hi - lo >= 20]
    return scan_with_gap(stretches, **values) if stretches else Row(**values)


@pytest.fixture(scope="module")
def databases(tmp_path_factory, postgres_url: str) -> Iterator[list[Engine]]:
    """An upgraded SQLite and an upgraded Postgres, for many small contents one after another."""
    folder: Path = tmp_path_factory.mktemp("mining")
    with postgres_database(postgres_url) as url:
        made = [engines.create(f"sqlite:///{folder}/node.sqlite"), engines.create(url)]
        for engine in made:
            migrate.upgrade(engine)
        yield made
        for engine in made:
            engine.dispose()


def ask_all_three(databases: list[Engine], rows: list[Row], texts: list[str]) -> None:
    table = [record_of(row, i, rows) for i, row in enumerate(rows)]
    for engine in databases:
        ids = fill(engine, rows)
        with store.reading(engine) as session:
            read = store.records(session, ids)
        # The other Studies of a patient in no order.
        assert [_unordered(read[i]) for i in ids] == [_unordered(r) for r in table]
        for text in texts:
            expression = asked(text)
            expected = [
                i for i, record in zip(ids, table, strict=True) if evaluate(expression, record)
            ]
            assert found(engine, text, limit=9) == expected[::-1], text
            windows = [i for _, ids in store.windows(engine, expression) for i in ids]
            assert windows == expected, text
            with store.reading(engine) as session:
                assert store.count_matches(session, expression) == len(expected), text
                histogram = store.find_histogram(session, expression)
            assert histogram.total == sum(read[i].bundle is not None for i in expected)
            for k, count in enumerate(histogram.series):
                low, high = histogram.edges_mm[k : k + 2] * region.UM_PER_MM
                reach = [read[i].stretches for i in expected if read[i].stretches]
                steps = [(f[0][0] // coverage.STEP_UM, f[-1][1] // coverage.STEP_UM) for f in reach]
                here = low // coverage.STEP_UM
                assert high - low == coverage.STEP_UM
                assert count == sum(first <= here <= last for first, last in steps)


def _unordered(record: Record) -> tuple[Any, ...]:
    others = sorted(map(str, record.others))
    return (dict(record.texts), dict(record.times), record.bundle, record.stretches,
            dict(record.numbers), record.flags, others)  # fmt: skip


GAPS = scan_with_gap([(-100.0, 100.0), (250.0, 430.0)])


# Many rows and many questions each time: to fill two databases takes longer than to ask them.
@given(
    rows=st.lists(series(), min_size=8, max_size=30),
    texts=st.lists(EXPRESSIONS, min_size=15, max_size=25),
)
@settings(
    max_examples=6 * MORE,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@example(rows=[GAPS], texts=["covers(liver, 0.1)", "not overlaps(chest)", "height(-90, 90)"])
@example(rows=[GAPS, scan(100, 200)], texts=["not height(0, 430)", "overlaps(head) or low < 100"])
def test_both_databases_and_plain_python_give_one_answer(databases, monkeypatch, rows, texts):
    # A page, and what lies before it, is found in other ways: make both of few Series.
    monkeypatch.setattr(search, "NEAR", 3)
    monkeypatch.setattr(search, "FAR", 9)
    monkeypatch.setattr(search, "WINDOW", 12)
    ask_all_three(databases, rows, texts)


def test_every_span_is_asked_of_curves_with_every_ends(databases):
    """At, just inside and just outside of each bound: with and without missing slices."""
    models = (MODEL, OTHER_MODEL)
    ends = [(low, high) for k, low in enumerate(ENDS) for high in ENDS[k + 1 :] if high - low >= 20]
    rows = [scan(low, high, model=models[k % 2]) for k, (low, high) in enumerate(ends)]
    rows += [scan(low, high) for low, high in ends[::3]]
    rows.append(scan(-80, 30))  # over the middle of the pelvis, and shorter than 0.75 of it
    gaps = [[(low, low + 50), (high, high + 50)] for low, high in ends if high - low >= 120]
    rows += [scan_with_gap(gap, model=models[k % 2]) for k, gap in enumerate(gaps)]
    questions = [f"height({low}, {high})" for low, high in ((-100, 100), (90, 260), (175, 190))]
    for name in ("pelvis", "liver", "chest"):
        questions += [f"covers({name}, {share})" for share in ("1", "0.75", "0.25", "0.001")]
    questions += [f"overlaps({name})" for name in ("pelvis", "liver", "chest", "head")]
    questions += ['overlaps("hip joints")', "low = 90", "high > 260", "high <= 430"]
    questions += ["(low < 0 and high > 400)", "(low < 0 or overlaps(chest))"]
    questions += [f"not {q}" for q in questions]
    table = [record_of(row, i, rows) for i, row in enumerate(rows)]
    assert {len(r.stretches) for r in table} == {1, 2}
    for engine in databases:
        ids = fill(engine, rows)
        for text in questions:
            expression = asked(text)
            expected = [i for i, r in zip(ids, table, strict=True) if evaluate(expression, r)]
            assert 0 < len(expected) < len(ids)
            assert [i for _, some in store.windows(engine, expression) for i in some] == expected, (
                text
            )
            with store.reading(engine) as session:
                assert store.count_matches(session, expression) == len(expected), text


SHARES = st.sampled_from(["1", "0.9", "0.5", "0.25", "0.1"])
OF_HEIGHT = st.recursive(
    st.one_of(
        of("covers(", COVERABLE, ", ", SHARES, ")"),
        of("overlaps(", NAMES, ")"),
        of("height(", st.sampled_from(["-100", "0", "90"]), ",", st.sampled_from(["100"]), ")"),
        of(st.sampled_from(["low", "high"]), " ", ORDERS, " ", st.sampled_from([*map(str, ENDS)])),
    ),
    lambda inner: st.one_of(
        of("not (", inner, ")"), of("(", inner, ") and ", inner), of("(", inner, " or ", inner, ")")
    ),
    max_leaves=8,
)


@given(text=OF_HEIGHT)
@settings(max_examples=250 * MORE, derandomize=True, deadline=None)
def test_no_match_lies_outside_the_part_of_the_index_that_is_read(text):
    """Every curve of one stretch that an expression finds lies in one of its boxes."""
    expression = asked(text)
    boxes = search._boxes(expression.node, True, frozenset(TABLES))
    um = region.UM_PER_MM
    for digest in TABLES:
        for k, low in enumerate(ENDS):
            for high in ENDS[k + 1 :]:
                ends = {"low": low * um, "high": high * um}
                record = Record({}, {}, digest, ((low * um, high * um),), ends)
                if evaluate(expression, record):
                    assert any(
                        b.low_min <= low * um <= b.low_max and b.high_min <= high * um <= b.high_max
                        for b in boxes
                    ), (low, high, boxes)


def test_the_part_of_the_index_is_no_larger_than_it_has_to_be():
    above_chest = search._boxes(asked("covers(liver, 0.9) and not overlaps(chest)").node, True,
                                frozenset([MODEL]))  # fmt: skip
    # Filled to 243 mm at least, but not from 190 mm on: there is no such curve.
    assert above_chest == []
    (box,) = search._boxes(asked("covers(liver, 0.9)").node, True, frozenset([MODEL]))
    assert (box.low_max, box.high_min) == (107_000, 243_000)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_asked_of_all_three(databases, field):
    near = {"slices": "12", "flag": "gap", "bundle": "'55555555'", "state": "curve"}
    near |= {"reason": "tilt", "study_date": "2024-01-01", "arrived": "2026-01-05"}
    value = near.get(field, "CT" if FIELDS[field].kind is Kind.TEXT else "100")
    rows = [
        scan(0, 120, flags=(Flag.GAP,)),
        scan(100, 250, model=OTHER_MODEL, arrived=T0 + timedelta(days=3), study_datetime=None),
        Row(state=SeriesState.IGNORED, reason=Reason.TILT, modality="MR"),
    ]
    texts = [f"{field} = {value}", f"{field} != {value}", f"not {field} in ({value})"]
    if FIELDS[field].kind.ordered:
        texts += [f"{field} {order} {value}" for order in ("<", "<=", ">", ">=")]
    ask_all_three(databases, rows, texts)


def test_the_share_is_that_of_the_core(databases):
    """`covers` holds exactly where the share that `dicomnode series` shows reaches that far."""
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(40):
        n = int(rng.integers(20, 90))
        z = np.cumsum(rng.uniform(3, 5, n)) + 40 * np.cumsum(rng.random(n) < 0.03)
        height = rng.uniform(-200, 300) + z + rng.normal(0, 4, n)
        rows.append(Row(z_mm=tuple(z), height_mm=tuple(height)))
    shares = [region.coverage(np.array(r.z_mm), np.array(r.height_mm), REGIONS) for r in rows]
    some_partly = False
    for engine in databases:
        ids = fill(engine, rows)
        with store.reading(engine) as session:
            stored = {m.id: m.coverage for m in store.matches(session, ids)}
        assert [list(stored[i]) for i in ids] == shares
        for fraction in ("0.001", "0.25", "0.5", "0.9", "0.99", "1"):
            for k, name in enumerate(("pelvis", "liver", "chest")):
                expected = {
                    i for i, s in zip(ids, shares, strict=True) if s[k][1] >= float(fraction)
                }
                assert set(found(engine, f"covers({name}, {fraction})")) == expected
                some_partly |= 0 < len(expected) < len(ids)
    assert some_partly


def test_a_region_is_looked_up_in_the_bundle_that_made_the_curve(databases):
    rows = [scan(80, 270), scan(80, 270, model=OTHER_MODEL), scan(100, 310, model=OTHER_MODEL)]
    for engine in databases:
        first, _, third = fill(engine, rows)
        assert found(engine, "covers(liver, 1)") == [third, first]
        assert found(engine, "overlaps(chest)") == [first]  # the other bundle knows no chest
        assert found(engine, "bundle = '66666666' and covers(liver, 1)") == [third]


def test_a_region_with_one_known_end_goes_on_without_end(databases):
    rows = [scan(500, 570), scan(500, 580), scan(700, 800), scan(-400, -300)]
    for engine in databases:
        _, second, third, fourth = fill(engine, rows)
        assert found(engine, "overlaps(head)") == [third, second]
        assert found(engine, 'overlaps("hip joints")') == [fourth]


def test_series_without_a_curve_are_asked_only_about_their_state(databases):
    rows = [Row(state=SeriesState.IGNORED, reason=Reason.TILT), scan(0, 100)]
    for engine in databases:
        tilted, scanned = fill(engine, rows)
        assert found(engine, "not overlaps(head)") == [scanned]
        assert found(engine, "modality = CT") == [scanned]
        assert found(engine, "reason = tilt") == [tilted]
        assert found(engine, "not overlaps(head) and state in (ignored, curve)") == [
            scanned,
            tilted,
        ]


def test_a_prior_is_an_earlier_study_of_the_same_patient(databases):
    later = DAY0 + timedelta(days=90, hours=11)
    rows = [
        scan(0, 100, study=0, study_datetime=DAY0),
        scan(0, 100, study=0, study_datetime=DAY0 + timedelta(hours=1)),  # of one study
        scan(0, 100, study=1, study_datetime=later),
        scan(0, 100, study=5, study_datetime=later),  # at the same time
        scan(0, 100, study=2, study_datetime=later, issuer="OTHER"),
        scan(0, 100, study=3, study_datetime=DAY0, patient_id=""),
        scan(0, 100, study=4, study_datetime=later, patient_id=""),
        Row(study=6, study_datetime=DAY0 - timedelta(days=1)),  # without a curve
        scan(0, 100, study=7, study_datetime=DAY0, patient_id="P2"),
        scan(0, 100, study=8, study_datetime=DAY0, patient_id="P2"),
    ]
    for engine in databases:
        ids = fill(engine, rows)
        followed = [ids[3], ids[2]]
        assert found(engine, "prior()") == found(engine, "prior(within=90d)") == followed
        assert found(engine, "prior(within=89d)") == []
    ask_all_three(databases, rows, ["prior()", "prior(within=90d)", "not prior(within=13w)"])


# Never SQL from text


@given(text=st.text(max_size=30), part=st.text(min_size=1, max_size=12))
@settings(max_examples=60 * MORE, derandomize=True, deadline=None)
@example(text="x", part="'; drop table series; --")
@example(text="x", part="%s %(x)s ? :y {}")
def test_no_text_becomes_sql(text, part):
    """The statement depends on the shape of an expression, its values are parameters."""
    shapes = []
    for value in ("Plain", part.replace('"', "").strip() or "x"):
        try:
            expression = asked(f'manufacturer = "{value}" and body_part_examined ~ "{value}"')
        except ExpressionError:
            return
        found = search.Search(expression, {MODEL: 1, OTHER_MODEL: 2})
        for dialect in (sqlite.dialect(), postgresql.psycopg.dialect()):
            compiled = found.ids().compile(dialect=dialect)
            values = list(compiled.params.values())
            assert [value] in values
            shapes.append(str(compiled))
    assert shapes[:2] == shapes[2:]


NASTY = st.sampled_from(
    "covers ( ) , liver 0.9 and or not in slices >= = ~ ' \" ; -- é 1e9 prior within 90d "
    "2024-02-30 state open height - . 1.2.3 flag gap \x00 \ud800 İn \uff19 \u0131n".split(" ")
)


@given(text=st.text(max_size=40) | st.lists(NASTY, max_size=14).map(" ".join))
@settings(max_examples=200 * MORE, derandomize=True, deadline=None)
@example(text="not " * 900 + "slices = 1")
@example(text="(" * 3000)
@example(text="slices = 1 or " * 280 + "slices = 1")
@example(text="slices = " + "9" * 3900)
@example(text="x" * 5000)
def test_any_text_is_answered_or_refused_as_an_expression(databases, text):
    try:
        expression = asked(text)
    except ExpressionError as exc:
        assert 0 <= exc.position <= len(text)
        caret = str(exc).splitlines()[-1]
        assert caret.strip() == "^"
        return
    for engine in databases:
        with store.reading(engine) as session:
            store.find_page(session, expression)
            store.count_matches(session, expression)


def test_the_deepest_expression_is_answered(databases):
    text = "slices > 1"
    for _ in range(20):
        text = f"not (slices < 5 and ({text}) or quality > 0)" if text.count("(") < 19 else text
    for engine in databases:
        found(engine, text)


# What is written with a curve


def test_every_flag_has_a_bit_of_its_own():
    assert set(coverage.BITS) == set(Flag)
    assert all(bit == 1 << i for i, bit in enumerate(coverage.BITS.values()))
    assert coverage.flags_of(sum(coverage.BITS.values())) == tuple(coverage.BITS)


def test_cells_are_in_the_order_of_heights():
    assert coverage.step(-1) == coverage.step(0) - 1 == coverage.STEPS // 2 - 1
    assert coverage.step(-region.LIMIT_UM) == 0
    assert coverage.step(region.LIMIT_UM) == coverage.STEPS - 1
    assert coverage.cell(-region.LIMIT_UM, 5) < coverage.cell(0, 5) < coverage.cell(0, 20_000)


def test_coverage_goes_with_its_curve(databases):
    for engine in databases:
        fill(engine, [GAPS])
        with store.writing(engine) as session:
            assert session.scalar(select(func.count()).select_from(schema.Stretch)) == 2
            session.execute(delete(schema.Curve))
            for table in (schema.Coverage, schema.Stretch):
                assert session.scalar(select(func.count()).select_from(table)) == 0


def test_the_histogram_tells_how_many_reach_over_each_step(databases):
    rows = [scan(0, 100), scan(50, 130, spacing_mm=5), Row(state=SeriesState.OPEN)]
    for engine in databases:
        fill(engine, rows)
        with store.reading(engine) as session:
            histogram = store.find_histogram(session, asked("state in (open, curve)"))
            empty = store.find_histogram(session, asked("slices > 1000"))
        assert histogram.total == 2
        assert histogram.edges_mm.tolist() == [0, 20, 40, 60, 80, 100, 120, 140]
        assert histogram.series == (1, 1, 2, 2, 2, 2, 1)
        assert (empty.total, empty.series, len(empty.edges_mm)) == (0, (), 1)


def test_a_date_is_the_day_of_a_time(databases):
    late = datetime(2024, 1, 1, 23, 59, 59, 999999)
    rows = [scan(0, 100, study_datetime=late), scan(0, 100, study_datetime=None)]
    for engine in databases:
        first, second = fill(engine, rows)
        assert found(engine, f"study_date = {date(2024, 1, 1)}") == [first]
        assert found(engine, "study_date > 2024-01-01") == []
        assert found(engine, "not study_date = 2024-01-01") == [second]


def test_curves_of_before_are_covered_when_the_database_is_upgraded(engine, monkeypatch):
    monkeypatch.setattr(coverage, "BACKFILL", 2)
    from tests.integration.test_store import MODEL as DIGEST
    from tests.integration.test_store import add_curve, manifest

    with store.writing(engine) as session:
        values = {**manifest(), "regions": [r.to_dict() for r in REGIONS]}
        store.record_model(session, DIGEST, values, T0)
    for k in range(5):
        add_curve(engine, f"1.2.{k}", count=12 + k)

    def rows() -> list[Any]:
        with store.reading(engine) as session:
            return session.execute(select(schema.Coverage.__table__)).all()

    written = rows()
    assert len(written) == 5 and {r.slices for r in written} == {12, 13, 14, 15, 16}
    with store.writing(engine) as session:
        session.execute(delete(schema.Coverage).where(schema.Coverage.slices > 12))
    steps: list[int] = []
    assert store.count_uncovered(engine) == 4
    assert store.cover_curves(engine, steps.append) == 4
    assert steps == [2, 2]
    assert rows() == written
    assert store.count_uncovered(engine) == store.cover_curves(engine) == 0
