"""A large database made by script: Series of a made-up archive, their curves, coverage, offsets.

What is not looked at by the questions of `benchmarks.mining` is kept short, so that ten million
Series fit a disk: a curve has two positions in its arrays, whatever its count says. (That of 300
slices takes some 12 kB. It lies outside the rows of Series, coverage and offsets.)
"""

import json
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine

from db import schema
from dicomnode import store, weights
from dicomnode.store import coverage

CHUNK = 50_000
OFFSETS_PER_SERIES = 2
# Of nine Series, three are of a patient with three Studies and six of three patients with two:
# six pairs, of three methods each.
STUDIES_OF_PATIENT = (3, 2, 2, 2)
ISSUER = "HOSPITAL"
METHODS = ("fast", "l1", "robust")
SCANNERS = 50  # each counts its own UIDs upwards
MANUFACTURERS = ("SIEMENS", "GE MEDICAL SYSTEMS", "Philips", "TOSHIBA", "Canon Medical Systems")
# What is scanned, how often, and from which body height to which, mm; ends vary by SPREAD_MM.
PROTOCOLS = (
    ("CHEST", 0.30, 160.0, 440.0),
    ("ABDOMEN", 0.25, -120.0, 280.0),
    ("CHEST", 0.15, -120.0, 440.0),
    ("HEAD", 0.15, 560.0, 740.0),
    ("NECK", 0.05, 400.0, 620.0),
    ("PELVIS", 0.05, -140.0, 70.0),
    ("", 0.05, -300.0, 740.0),
)
SPREAD_MM = 20.0
WITH_GAP = 0.01
FIRST_DAY = datetime(2010, 1, 1, 8, 0)
NOW = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)

Rows = dict[str, list[tuple[Any, ...]]]


def register(engine: Engine) -> str:
    """Make the node's own bundle known, and return its digest."""
    manifest = weights.read_manifest()
    digest = weights.digest(manifest)
    with store.writing(engine) as session:
        store.record_model(session, digest, manifest, NOW)
        session.add(schema.Bundle(digest=digest))
    return digest


def chunks(count: int, digest: str, seed: int = 1) -> Iterator[Rows]:
    """Yield table -> rows, columns in the order of COLUMNS, of so many Series in all.

    Series are numbered from 1; the bundle of `digest` has number 1.
    """
    made = _Archive(digest, np.random.default_rng(seed))
    while made.series < count:
        yield made.chunk(min(CHUNK, count - made.series))


def series_uid(number: int) -> str:
    """Return the Series Instance UID of a Series."""
    return f"1.2.840.113619.2.{number % SCANNERS}.{number:08d}.2"


def study_uid(number: int) -> str:
    """Return the Study Instance UID of a Series."""
    return f"1.2.840.113619.2.{number % SCANNERS}.{number:08d}"


COLUMNS = {
    "series": (
        "id",
        "series_uid",
        "study_uid",
        "patient_id",
        "issuer",
        "study_datetime",
        "modality",
        "body_part_examined",
        "manufacturer",
        "state",
        "evidence",
        "revision",
        "received",
        "set_aside",
        "first_arrival_at",
        "last_arrival_at",
        "finished_at",
    ),
    "curve": (
        "series_id",
        "model",
        "revision",
        "count",
        "z_mm",
        "score",
        "image_position",
        "image_orientation",
        "instances",
        "frames_of_reference",
        "height_min_mm",
        "height_max_mm",
        "pearson_r",
        "slope",
        "flags",
        "computed_at",
    ),
    "coverage": (
        "series_id",
        "bundle",
        "cell",
        "low_um",
        "high_um",
        "stretches",
        "slices",
        "spacing_um",
        "flags",
        "quality",
        "slope",
    ),
    "stretch": ("series_id", "low_um", "high_um"),
    "offset": (
        "fixed_series_id",
        "moving_series_id",
        "method",
        "status",
        "model",
        "offset_mm",
        "sigma_mm",
        "overlap_mm",
        "computed_at",
        "seconds",
    ),
}


class _Archive:
    """Draws Series, patient after patient."""

    def __init__(self, digest: str, rng: np.random.Generator) -> None:
        self.digest = digest
        self.rng = rng
        self.series = 0
        self.patients = 0
        manifest = weights.read_manifest()["heights"]
        self.scores_of = lambda mm: (mm - manifest["intercept_mm"]) / manifest["mm_per_score"]
        self.left: list[int] = []  # Series of the last patient, where he has further Studies
        self.studies = 0

    def chunk(self, count: int) -> Rows:
        """Return the rows of the next Series."""
        rng, first = self.rng, self.series + 1
        protocol = rng.choice(len(PROTOCOLS), count, p=[p[1] for p in PROTOCOLS])
        low = np.array([p[2] for p in PROTOCOLS])[protocol] + rng.normal(0, SPREAD_MM, count)
        high = np.array([p[3] for p in PROTOCOLS])[protocol] + rng.normal(0, SPREAD_MM, count)
        spacing = rng.choice([1.0, 1.25, 2.5, 5.0], count)
        quality = 1 - np.minimum(rng.exponential(0.01, count), 1.5)
        quality[rng.random(count) < 0.05] -= 0.3
        gap = rng.random(count) < WITH_GAP
        day = rng.integers(0, 365 * 15, count)
        slope = rng.normal(1.0, 0.08, count)
        maker = rng.integers(0, len(MANUFACTURERS), count)
        rows: Rows = {table: [] for table in COLUMNS}
        for i in range(count):
            number = first + i
            patient = self._patient(number, rows)
            low_um, high_um = round(low[i] * 1000), round(high[i] * 1000)
            slices = int((high[i] - low[i]) / spacing[i])
            uid, study = series_uid(number), study_uid(number)
            # A patient's later Series is of a later Study.
            studied = FIRST_DAY + timedelta(days=int(day[i]), seconds=number % 86_400)
            rows["series"].append(
                (
                    number,
                    uid,
                    study,
                    patient,
                    ISSUER,
                    studied,
                    "CT",
                    PROTOCOLS[protocol[i]][0],
                    MANUFACTURERS[maker[i]],
                    "curve",
                    "expected_count",
                    1,
                    slices,
                    "{}",
                    NOW,
                    NOW,
                    NOW,
                )
            )
            ends = np.array([low[i], high[i]])
            rows["curve"].append(
                (
                    number,
                    self.digest,
                    1,
                    slices,
                    ends.tobytes(),
                    self.scores_of(ends).astype("<f4").tobytes(),
                    bytes(48),
                    "[1,0,0,0,1,0]",
                    _instances(uid),
                    '["1.2"]',
                    float(low[i]),
                    float(high[i]),
                    float(quality[i]),
                    float(slope[i]),
                    "[]",
                    NOW,
                )
            )
            rows["coverage"].append(
                (
                    number,
                    1,
                    coverage.cell(low_um, high_um),
                    low_um,
                    high_um,
                    2 if gap[i] else 1,
                    slices,
                    round(spacing[i] * 1000),
                    0,
                    float(quality[i]),
                    float(slope[i]),
                )
            )
            if gap[i]:
                middle = (low_um + high_um) // 2
                rows["stretch"] += [
                    (number, low_um, middle),
                    (number, middle + 20_000, high_um),
                ]
        self.series += count
        return rows

    def _patient(self, number: int, rows: Rows) -> str:
        """Return the Patient ID of a Series, and write the pairs it makes with earlier ones."""
        if len(self.left) >= self.studies:
            self.left = []
            self.studies = STUDIES_OF_PATIENT[self.patients % len(STUDIES_OF_PATIENT)]
            self.patients += 1
        for other in self.left:
            for method in METHODS:
                shift = float(number % 97) - 48.0
                rows["offset"].append(
                    (number, other, method, "ok", self.digest, shift, 2.5, 180.0, NOW, 0.001)
                )
        self.left.append(number)
        return patient_id(self.patients)


def patient_id(number: int) -> str:
    """Return the Patient ID of a patient, counted from 1."""
    return f"P{number:08d}"


def _instances(uid: str) -> bytes:
    return zlib.compress(json.dumps([[f"{uid}.1", 1, 0], [f"{uid}.2", 1, 0]]).encode(), 1)


def fill(engine: Engine, count: int, progress: Callable[[int], None] = lambda n: None) -> None:
    """Fill an upgraded, empty database; without its indexes meanwhile, as a restore does it."""
    digest = register(engine)
    indexes = [i for table in schema.Base.metadata.sorted_tables for i in table.indexes]
    # In the order in which migrations make them: of two that look as good, SQLite takes the later.
    indexes.sort(key=lambda index: str(index.name))
    with engine.begin() as connection:
        for index in indexes:
            index.drop(connection)
    load = _load_sqlite if engine.dialect.name == "sqlite" else _load_postgres
    load(engine, chunks(count, digest), progress)
    for index in indexes:
        with engine.begin() as connection:
            index.create(connection)


def _load_sqlite(engine: Engine, made: Iterator[Rows], progress: Callable[[int], None]) -> None:
    raw = engine.raw_connection()
    connection = raw.driver_connection
    assert connection is not None
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("PRAGMA cache_size = -500000")
    for rows in made:
        connection.execute("BEGIN")
        for table, columns in COLUMNS.items():
            marks = ", ".join("?" * len(columns))
            statement = f"INSERT INTO {_named(table)} ({', '.join(columns)}) VALUES ({marks})"
            connection.executemany(statement, map(_for_sqlite, rows[table]))
        connection.execute("COMMIT")
        progress(len(rows["series"]))
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw.invalidate()  # not back to the pool with these settings


def _for_sqlite(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """As SQLAlchemy stores times there."""
    return tuple(f"{v:%Y-%m-%d %H:%M:%S.%f}" if isinstance(v, datetime) else v for v in row)


def _load_postgres(engine: Engine, made: Iterator[Rows], progress: Callable[[int], None]) -> None:
    raw = engine.raw_connection()
    connection = raw.driver_connection
    assert connection is not None
    connection.execute("SET session_replication_role = replica")  # no check of foreign keys
    connection.commit()
    for rows in made:
        for table, columns in COLUMNS.items():
            with connection.cursor() as cursor:
                statement = f"COPY {_named(table)} ({', '.join(columns)}) FROM STDIN"
                with cursor.copy(statement) as copy:
                    for row in rows[table]:
                        copy.write_row(row)
        connection.commit()
        progress(len(rows["series"]))
    for table in ("series", "offset"):
        column = f"pg_get_serial_sequence('{_named(table)}', 'id')"
        connection.execute(f"SELECT setval({column}, max(id)) FROM {_named(table)}")
    connection.commit()
    raw.invalidate()


def _named(table: str) -> str:
    return f'"{table}"'  # offset is a word of SQL


def size_of(engine: Engine) -> int:
    """Return how many bytes the database takes."""
    if engine.dialect.name == "sqlite":
        assert engine.url.database is not None
        return Path(engine.url.database).stat().st_size
    with engine.connect() as connection:
        query = "SELECT pg_database_size(current_database())"
        return int(connection.exec_driver_sql(query).scalar_one())
