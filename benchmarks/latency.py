"""How long after the quiet time an offset is stored: two Series of one patient, by a worker.

Both are scored and wait; their associations end together, and the quiet time begins. `beyond_ms`
is what lies between its end and the moment at which a reader of the database sees the offset
by every method.
"""

import contextlib
import json
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path

import click
import numpy as np

from dicomnode import dicomio, store
from dicomnode.config import Settings
from dicomnode.core import phantom
from dicomnode.model import Method, PatientKey
from dicomnode.node import serve
from dicomnode.spool import Spool

SLICES = 600
WARM_UP = 60
STUDIES = (1, 2)
QUIET_S = 2.0
MATRIX, PIXEL_MM = 64, 7.0  # what is scored before does not matter
DEADLINE_S = 300.0


@dataclass(frozen=True, slots=True)
class Latency:
    """One pair."""

    slices: int  # of each of the two Series
    beyond_ms: float  # from the end of the quiet time
    aligned_ms: float  # of which the methods of alignment took


def measure(
    folder: Path, slices: int = SLICES, *, quiet_s: float = QUIET_S, device: str = "cpu"
) -> Latency:
    """Return the latency of one pair of Series, by a worker of its own in this process.

    Parameters
    ----------
    folder : Path
        Where its spool and SQLite database are made.
    """
    file = folder / "latency.sqlite"
    settings = Settings(
        spool={"path": folder / "spool", "reserve_bytes": 0},
        database={"url": f"sqlite:///{file}"},
        series={"quiet_seconds": quiet_s},
        score={"device": device},
    )
    with contextlib.closing(Spool.of(settings.spool)) as spool, _working(settings):
        _pair(spool, file, 1, WARM_UP, quiet_s)  # a node in service has finished Series before
        beyond_ms = _pair(spool, file, 2, slices, quiet_s)
    with store.opened(settings.database.url) as engine, store.reading(engine) as session:
        found = store.offsets_of(session, fixed_study="1.2.2.2")
    return Latency(slices, beyond_ms, 1e3 * sum(offset.seconds for offset in found))


def _pair(spool: Spool, file: Path, patient: int, slices: int, quiet_s: float) -> float:
    """Spool two Series of a patient, and return the milliseconds beyond the quiet time."""
    scans = [list(_scan(patient, study, slices)) for study in STUDIES]
    associations = [f"{patient:08x}{study:08x}" for study in STUDIES]
    for parts in zip(*(scan[:-1] for scan in scans), strict=True):
        for data, association in zip(parts, associations, strict=True):
            spool.put(data, association)
    _await(lambda: _count(file, "slice") == len(STUDIES) * (slices - 1), 0.05)
    last = [
        spool.put(scan[-1], association)
        for scan, association in zip(scans, associations, strict=True)
    ]
    for association in associations:
        spool.put_event(association, "released")
    due = last[-1].arrived_at.timestamp() + quiet_s
    time.sleep(max(0.0, due - time.time()))
    stored = patient * len(Method)
    _await(lambda: _count(file, "offset WHERE status IS NOT NULL") == stored, 0.002)
    return 1e3 * (time.time() - due)


def _count(file: Path, of: str) -> int:
    """Count rows, by a connection that costs next to nothing."""
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        try:
            (count,) = connection.execute(f"SELECT count(*) FROM {of}").fetchone()
        except sqlite3.OperationalError:  # the worker has not made the table yet
            return 0
    return int(count)


def _scan(patient: int, study: int, slices: int) -> Iterator[bytes]:
    """Yield the slices of a drawn trunk, 1 mm apart, as files."""
    body = phantom.patient(patient)
    lowest_mm = phantom.landmarks(body)["symphysis"] + 40.0 * study
    z_mm = lowest_mm + np.arange(float(slices))
    images_hu = phantom.volume(body, z_mm, pixel_mm=PIXEL_MM, matrix=MATRIX, seed=study)
    half = PIXEL_MM * (MATRIX - 1) / 2
    for k, (z, image) in enumerate(zip(z_mm.tolist(), images_hu, strict=True)):
        ds = dicomio.ct_dataset(
            image,
            patient=PatientKey(f"MADE-{patient}", "HERE"),
            study_uid=f"1.2.{patient}.{study}",
            series_uid=f"1.2.{patient}.{study}.1",
            sop_instance_uid=f"1.2.{patient}.{study}.1.{k + 1}",
            instance_number=k + 1,
            image_position=(-half, -half, z),
            pixel_mm=PIXEL_MM,
            spacing_mm=1.0,
            study_datetime=datetime(2026, study, 5),
            frame_of_reference_uid=f"1.2.{patient}.{study}.2",
        )
        file = BytesIO()
        ds.save_as(file, enforce_file_format=True)
        yield file.getvalue()


@contextlib.contextmanager
def _working(settings: Settings) -> Iterator[None]:
    stop = threading.Event()
    worker = threading.Thread(target=serve.work, args=(settings, stop), name="worker")
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()


def _await(condition: Callable[[], bool], step_s: float) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the worker does not come to an end")
        time.sleep(step_s)


@click.command()
@click.option("--slices", default=SLICES, show_default=True, type=click.IntRange(20))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(slices: int, repeats: int, as_json: bool) -> None:
    """Measure how long after the quiet time the offset of two Series is stored.

    \b
    Example: python -m benchmarks.latency --slices 600
    """
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="dicomnode-latency-") as folder:
            found.append(measure(Path(folder), slices))
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=1))
        return
    for one in found:
        click.echo(
            f"2 x {one.slices} slices: {one.beyond_ms:.0f} ms beyond the quiet time, "
            f"{one.aligned_ms:.1f} ms of it alignment"
        )


if __name__ == "__main__":
    main()
