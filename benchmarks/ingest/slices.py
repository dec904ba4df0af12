"""What is sent: CT Series as files, which become new Instances again and again."""

import secrets
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from dicomnode import dicomio
from dicomnode.core import phantom
from dicomnode.model import PatientKey

ROWS = 512


class Slices:
    """CT Series as files, one for each association, which become new Instances by `renew`.

    The pixels of all are the same. Each is of a Study of its own and, unless `one_patient`, of a
    patient of its own, so that the node has no pairs to align.

    Parameters
    ----------
    folder
        Where the files go, a folder for each Series.
    counts
        Slices of each Series.
    one_patient
        Whether all are of one patient, each a year later, on a table 40 mm lower.
    """

    def __init__(self, folder: Path, counts: Sequence[int], one_patient: bool = False) -> None:
        self._session, self._run = secrets.randbelow(9 * 10**8) + 10**8, 10**6
        self.paths: list[list[Path]] = []
        self._places: dict[Path, list[int]] = {}  # where its files hold the token
        most = max(counts)
        body = phantom.patient(1)
        marks = phantom.landmarks(body)
        z_mm, step_mm = np.linspace(marks["symphysis"], marks["chin"], most, retstep=True)
        # Drawn at 128 x 128, in a twentieth of the time, and enlarged slice by slice.
        small = phantom.volume(body, z_mm, pixel_mm=3.2, matrix=ROWS // 4)
        for s, count in enumerate(counts):
            place = folder / str(s)
            place.mkdir(parents=True)
            self.paths.append([place / f"{i:04d}.dcm" for i in range(count)])
            patient = f"INGEST{self._token}{1 if one_patient else s + 1}"
            for i, path in enumerate(self.paths[s]):
                ds = dicomio.ct_dataset(
                    small[i].repeat(4, axis=0).repeat(4, axis=1),
                    patient=PatientKey(patient, "BENCH"),
                    study_uid=self._uid(s, 1),
                    series_uid=self.series_uid(s),
                    frame_of_reference_uid=self._uid(s, 3),
                    sop_instance_uid=self.sop_instance_uid(s, i),
                    instance_number=i + 1,
                    image_position=(-204.4, -204.4, float(z_mm[i]) - 40.0 * s * one_patient),
                    pixel_mm=0.8,
                    spacing_mm=round(float(step_mm), 3),
                    study_datetime=datetime(2020 + s * one_patient, 1, 5, 8, 15),
                )
                ds.save_as(path, enforce_file_format=True)
                header = path.read_bytes()[: -len(ds.PixelData)]
                self._places[path] = _find_all(header, self._token.encode())

    @property
    def _token(self) -> str:
        return f".{self._session}.{self._run}."

    def _uid(self, series: int, *rest: int) -> str:
        return f"1.2.826.0.1.3680043.8.498{self._token}{'.'.join(map(str, (series + 1, *rest)))}"

    def sop_instance_uid(self, series: int, index: int) -> str:
        """Return the SOP Instance UID that this file holds now."""
        return self._uid(series, 4, index + 1)

    def series_uid(self, series: int) -> str:
        """Return the Series Instance UID that these files hold now."""
        return self._uid(series, 2)

    def renew(self) -> None:
        """Turn all into Instances that no receiver has seen, of other patients."""
        self._run += 1
        token = self._token.encode()  # always as long
        for path, places in self._places.items():
            with open(path, "r+b", buffering=0) as file:
                for place in places:
                    file.seek(place)
                    file.write(token)

    def data_set(self, series: int, index: int) -> bytes:
        """Return what follows the file meta information."""
        data = self.paths[series][index].read_bytes()
        # (0002,0000) FileMetaInformationGroupLength: 8 bytes after the prefix, then its value.
        return data[144 + int.from_bytes(data[140:144], "little") :]


def shares(total: int, associations: Iterable[int]) -> list[int]:
    """Return how many slices each Series needs so that n of them always come to the total."""
    counts: dict[int, int] = {}
    for n in associations:
        for s in range(n):
            counts[s] = max(counts.get(s, 0), -(-total // n))
    return [counts[s] for s in sorted(counts)]


def _find_all(data: bytes, token: bytes) -> list[int]:
    places, place = [], data.find(token)
    while place >= 0:
        places.append(place)
        place = data.find(token, place + 1)
    return places
