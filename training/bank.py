"""The slice bank: every network input of an archive in one memory-mapped array.

Reads `slices.npy` (N, 128, 128) uint8 and `bank.json`, which `fill` writes. Needs numpy alone:
training runs where nothing else is installed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import ConfigError

PHANTOM_PREFIX = "phantom-"
BANK, SLICES = "bank.json", "slices.npy"


@dataclass(frozen=True, slots=True)
class BankSeries:
    """Where one Series lies in the bank: slices `start` to `start + len(z_mm)`, feet to head."""

    patient: str
    study_uid: str
    series_uid: str
    start: int
    z_mm: tuple[float, ...]
    landmarks: tuple[tuple[str, float], ...] = ()  # name, z in mm: as `landmarks.find` gives them

    @property
    def stop(self) -> int:
        """One past its last slice."""
        return self.start + len(self.z_mm)


@dataclass(frozen=True, slots=True)
class Bank:
    """All inputs (N, size, size) uint8 and the Series they belong to."""

    slices: npt.NDArray[np.uint8]
    series: tuple[BankSeries, ...]
    spec: PreprocessSpec

    def inputs(self, series: BankSeries) -> npt.NDArray[np.uint8]:
        """Return the inputs of one Series, (n, size, size)."""
        return self.slices[series.start : series.stop]

    def digest(self) -> str:
        """Return the SHA-256 of all inputs and of what they belong to."""
        sha = hashlib.sha256(_listing(self.series))
        for s in self.series:
            sha.update(self.inputs(s).tobytes())
        return sha.hexdigest()

    def listing_digest(self) -> str:
        """Return the SHA-256 of what the inputs belong to: at once, without reading them."""
        return hashlib.sha256(_listing(self.series)).hexdigest()


def load(folder: Path) -> Bank:
    """Return the bank of a folder, its slices memory-mapped.

    Raises
    ------
    ConfigError
        If there is none, or it was not finished.
    """
    try:
        values = json.loads((folder / BANK).read_text())
        slices = np.load(folder / values.get("slices", SLICES), mmap_mode="r")
    except FileNotFoundError as exc:
        raise ConfigError(f"{folder} holds no finished bank: python -m training index") from exc
    series = tuple(
        BankSeries(
            **{
                **s,
                "z_mm": tuple(s["z_mm"]),
                "landmarks": tuple((name, z) for name, z in s.get("landmarks", ())),
            }
        )
        for s in values["series"]
    )
    if max((s.stop for s in series), default=0) > len(slices):
        raise ConfigError(f"{folder}: fewer slices than {BANK} says")
    return Bank(slices, series, PreprocessSpec.from_dict(values["spec"]))


def _listing(series: Sequence[BankSeries]) -> bytes:
    """All but where they lie in the file, which differs with the order in which they came."""
    values = [{**asdict(s), "start": None} for s in series]
    return json.dumps(values).encode()
