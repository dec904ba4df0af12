"""How long after the quiet time an offset is stored: two Series of one patient, by a worker.

Both are scored and wait; their associations end together, and the quiet time begins. `beyond_ms`
is what lies between its end and the moment at which a reader of the database sees the offset
by every method.
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    settings = Settings(
        spool={"path": folder / "spool", "reserve_bytes": 0},
        database={"url": f"sqlite:///{folder / 'latency.sqlite'}"},
        series={"quiet_seconds": quiet_s},
        score={"device": device},
    )
    spool = Spool(settings.spool.path)
    scans = [list(_scan(study, slices)) for study in (1, 2)]
    with _working(settings):
        for at in range(slices - 1):
            for study, scan in enumerate(scans):
                spool.put(scan[at], _association(study))
        _await(lambda: not spool.pending(1))  # scored, stored and let go
        last = [spool.put(scan[-1], _association(study)) for study, scan in enumerate(scans)]
        for study in range(len(scans)):
            spool.put_event(_association(study), "released")
        due = last[-1].arrived_at.timestamp() + quiet_s
        with store.opened(settings.database.url) as engine:
            time.sleep(max(0.0, due - time.time()))
            while True:
                with store.reading(engine) as session:
                    found = store.offsets_of(session)
                seen = time.time()
                if len(found) == len(Method):
                    break
                if seen > due + DEADLINE_S:
                    raise RuntimeError("no offset was stored")
                time.sleep(0.002)
    return Latency(slices, 1e3 * (seen - due), 1e3 * sum(offset.seconds for offset in found))


def _scan(study: int, slices: int) -> Iterator[bytes]:
    """Yield the slices of a drawn trunk, 1 mm apart, as files."""
    body = phantom.patient(1)
    lowest_mm = phantom.landmarks(body)["symphysis"] + 40.0 * study
    z_mm = lowest_mm + np.arange(float(slices))
    images_hu = phantom.volume(body, z_mm, pixel_mm=PIXEL_MM, matrix=MATRIX, seed=study)
    half = PIXEL_MM * (MATRIX - 1) / 2
    for k, (z, image) in enumerate(zip(z_mm.tolist(), images_hu, strict=True)):
        ds = dicomio.ct_dataset(
            image,
            patient=PatientKey("MADE", "HERE"),
            study_uid=f"1.2.{study}",
            series_uid=f"1.2.{study}.1",
            sop_instance_uid=f"1.2.{study}.1.{k + 1}",
            instance_number=k + 1,
            image_position=(-half, -half, z),
            pixel_mm=PIXEL_MM,
            spacing_mm=1.0,
            study_datetime=datetime(2026, study, 5),
            frame_of_reference_uid=f"1.2.{study}.2",
        )
        file = BytesIO()
        ds.save_as(file, enforce_file_format=True)
        yield file.getvalue()


def _association(study: int) -> str:
    return f"{study:016x}"


@contextmanager
def _working(settings: Settings) -> Iterator[None]:
    stop = threading.Event()
    worker = threading.Thread(target=serve.work, args=(settings, stop), name="worker")
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the worker does not come to an end")
        time.sleep(0.05)


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
