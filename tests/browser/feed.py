"""A node's database filled with phantoms through the node's own stages, for pages to show."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID

from dicomnode import backfill, dicomio, store
from dicomnode.config import Settings
from dicomnode.core import phantom
from dicomnode.model import DeliveryKind, PatientKey
from dicomnode.node import serve
from dicomnode.store import Ask

MATRIX = 160
ROOT = "1.2.826.0.1.3680043.10.1338"


@dataclass(frozen=True, slots=True)
class Scan:
    """A Series to be made; heights are names of a phantom's landmarks and mm beyond them."""

    patient: int  # seed of the phantom
    study: int
    when: datetime
    lowest: tuple[str, float]
    highest: tuple[str, float]
    spacing_mm: float
    table_mm: float
    tag: str = "ABDOMEN"
    manufacturer: str = "PHANTOM WORKS"

    @property
    def study_uid(self) -> str:
        """Its Study Instance UID, the same at every run."""
        return f"{ROOT}.{self.patient}.{self.study}"

    @property
    def series_uid(self) -> str:
        """Its Series Instance UID."""
        return f"{self.study_uid}.1"


SCANS = (
    Scan(9001, 1, datetime(2023, 3, 1, 9, 30), ("iliac_crest", -20), ("lung_apex", 30), 6, 120),
    Scan(9001, 2, datetime(2024, 5, 2, 14, 5), ("lung_base", -90), ("chin", 10), 5, -80, "CHEST"),
    Scan(9001, 3, datetime(2024, 11, 20, 8, 0), ("promontory", -60), ("lung_base", 120), 5, 300),
    Scan(9002, 1, datetime(2025, 6, 1, 10, 0), ("lung_base", 20), ("vertex", 20), 8, 0, "HEAD",
         "OTHER WORKS"),
    Scan(9002, 2, datetime(2026, 2, 3, 11, 20), ("iliac_crest", 0), ("lung_apex", 40), 6, -210,
         "ABDOMEN", "OTHER WORKS"),
)  # fmt: skip
ARRIVING = Scan(9003, 1, datetime(2026, 2, 3, 12, 0), ("lung_base", 0), ("lung_apex", 0), 5, 40)
PRIOR, FIXED = SCANS[0], SCANS[1]


def patient_id(seed: int) -> str:
    """Return the Patient ID of a phantom: a text that must appear in no address."""
    return f"PHANTOM-{seed}"


def settings(folder: Path) -> Settings:
    """Return the settings of a node in a folder."""
    return Settings(
        node={"default_issuer": "DEMO"},
        spool={"path": folder / "spool", "reserve_bytes": 0},
        database={"url": f"sqlite:///{folder / 'node.sqlite'}"},
        score={"device": "cpu"},
        series={"quiet_seconds": 0.5},
    )


def fill(folder: Path) -> None:
    """Put the scans through decode, score, assemble and align, and ask for deliveries."""
    images = folder / "images"
    for scan in SCANS:
        place = images / f"{scan.patient}-{scan.study}"
        place.mkdir(parents=True)
        for k, ds in enumerate(instances(scan)):
            ds.save_as(place / f"{k:04}.dcm", enforce_file_format=True)
    made = settings(folder)
    backfill.run([images], made)
    with store.opened(made.database.url) as engine, store.writing(engine) as session:
        when = datetime.now(UTC)  # not overdue
        asks = [Ask(DeliveryKind.REGISTRATION, "PACS", FIXED.study_uid, PRIOR.study_uid)]
        store.ask_deliveries(session, asks, when, when + timedelta(minutes=1))


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Let a node be at work, with a Series on its way."""
    with serve.opened_worker(settings(folder)) as (worker, spool, _):
        for ds in itertools.islice(instances(ARRIVING), 25):
            file = BytesIO()
            ds.save_as(file, enforce_file_format=True)
            spool.put(file.getvalue(), "a" * 16)
        while spool.pending(1):
            worker.step()
        yield


def instances(scan: Scan) -> Iterator[Dataset]:
    """Yield the Instances of a scan."""
    body = phantom.patient(scan.patient)
    marks = phantom.landmarks(body)
    low, high = (marks[name] + mm for name, mm in (scan.lowest, scan.highest))
    z_mm = np.arange(low, high, scan.spacing_mm)
    pixel_mm = 400 / MATRIX
    volume = phantom.volume(
        body, z_mm, pixel_mm=pixel_mm, matrix=MATRIX, noise_hu=15, seed=scan.study
    )
    half = pixel_mm * (MATRIX - 1) / 2
    for k, (z, image) in enumerate(zip(z_mm.tolist(), volume, strict=True)):
        ds = dicomio.ct_dataset(
            image,
            patient=PatientKey(patient_id(scan.patient), "DEMO"),
            study_uid=scan.study_uid,
            series_uid=scan.series_uid,
            sop_instance_uid=UID(f"{scan.series_uid}.{k + 1}"),
            instance_number=k + 1,
            image_position=(-half, -half, z + scan.table_mm),
            pixel_mm=pixel_mm,
            spacing_mm=scan.spacing_mm,
            study_datetime=scan.when,
            frame_of_reference_uid=f"{scan.series_uid}.0",
        )
        ds.BodyPartExamined = scan.tag
        ds.Manufacturer = scan.manufacturer
        yield ds
