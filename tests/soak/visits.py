"""Visits that cost a sender next to nothing: slices encoded once, whose UIDs are exchanged."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from pydicom.uid import JPEGLSLossless, RLELossless

from tests.dicom import PATIENT_ID, part10, without_meta
from tests.e2e.conftest import scan

TABLE_MM = 40.0
SPACING_MM = 10.0
_TOKEN = 900_000_000_000  # as long as any
_ROOT = "1.2.826.0.1.3680043.8.498"
_PIXEL_DATA = b"\xe0\x7f\x10\x00"
# What one body in how many is sent as; the rest comes uncompressed.
COMPRESSED = (JPEGLSLossless, RLELossless)


@dataclass(frozen=True)
class Timepoint:
    """One Study of a patient who did not exist before."""

    token: int  # of the patient
    number: int  # 1 the prior, 2 the follow-up
    transfer_syntax: str
    slices: tuple[tuple[str, bytes], ...]  # SOP Instance UID, encoded data set

    @property
    def series_uid(self) -> str:
        return series_uid(self.token, self.number)


def series_uid(token: int, number: int) -> str:
    """Return the Series Instance UID of a timepoint."""
    return f"{_ROOT}.{token}.{number}.2"


def study_uid(token: int, number: int) -> str:
    """Return the Study Instance UID of a timepoint."""
    return f"{_ROOT}.{token}.{number}.1"


class Visits:
    """New patients without end, each with a prior and a follow-up.

    Parameters
    ----------
    matrix
        Rows and columns of each slice.
    first
        Token of the first patient.
    """

    def __init__(self, matrix: int, first: int) -> None:
        self._tokens = itertools.count(first)
        # Bodies differ in how many slices they have, and in how these are sent.
        syntaxes = (None, None, COMPRESSED[0], None, None, COMPRESSED[1])
        self._bodies = [
            [self._encode(9200 + i, number, matrix, syntax) for number in (1, 2)]
            for i, syntax in enumerate(syntaxes)
        ]

    def __iter__(self) -> Iterator[tuple[Timepoint, Timepoint]]:
        for token, body in zip(self._tokens, itertools.cycle(self._bodies), strict=False):
            prior, follow_up = (_renamed(made, token) for made in body)
            yield prior, follow_up

    @staticmethod
    def _encode(seed: int, number: int, matrix: int, syntax: str | None) -> Timepoint:
        made = scan(
            seed,
            matrix=matrix,
            spacing_mm=SPACING_MM,
            table_mm=TABLE_MM * (number - 1),
            when=datetime(2023 + number, 5, 2, 14, 5),
            patient_id=f"{PATIENT_ID}-{_TOKEN}",
        )
        slices = []
        for i, ds in enumerate(made.slices):
            ds.StudyInstanceUID = study_uid(_TOKEN, number)
            ds.SeriesInstanceUID = series_uid(_TOKEN, number)
            ds.FrameOfReferenceUID = f"{_ROOT}.{_TOKEN}.{number}.3"
            ds.SOPInstanceUID = f"{_ROOT}.{_TOKEN}.{number}.4.{i + 1}"
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            if syntax is not None:
                ds.compress(syntax, generate_instance_uid=False)
            slices.append((str(ds.SOPInstanceUID), without_meta(part10(ds))))
        return Timepoint(_TOKEN, number, str(ds.file_meta.TransferSyntaxUID), tuple(slices))


def _renamed(made: Timepoint, token: int) -> Timepoint:
    old, new = str(_TOKEN), str(token)
    assert len(old) == len(new)
    slices = []
    for uid, data in made.slices:
        head = data.index(_PIXEL_DATA)
        renamed = data[:head].replace(old.encode(), new.encode()) + data[head:]
        slices.append((uid.replace(old, new), renamed))
    return Timepoint(token, made.number, made.transfer_syntax, tuple(slices))
