"""The slice bank: every network input of an archive in one memory-mapped array.

Reads archived Series, writes `slices.npy` (N, 128, 128) uint8 and `bank.json`.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import threadpoolctl

from dicomnode import dicomio
from dicomnode.core import phantom, preprocess
from training.archive import ArchivedSeries

PHANTOM_PREFIX = "phantom-"


@dataclass(frozen=True, slots=True)
class BankSeries:
    """Where one Series lies in the bank: slices `start` to `start + len(z_mm)`, feet to head."""

    patient: str
    study_uid: str
    series_uid: str
    start: int
    z_mm: tuple[float, ...]

    @property
    def stop(self) -> int:
        """One past its last slice."""
        return self.start + len(self.z_mm)


@dataclass(frozen=True, slots=True)
class Bank:
    """All inputs (N, size, size) uint8 and the Series they belong to.

    The last inputs may belong to none: room for slices that were not decoded.
    """

    slices: npt.NDArray[np.uint8]
    series: tuple[BankSeries, ...]
    spec: preprocess.PreprocessSpec

    def inputs(self, series: BankSeries) -> npt.NDArray[np.uint8]:
        """Return the inputs of one Series, (n, size, size)."""
        return self.slices[series.start : series.stop]

    def digest(self) -> str:
        """Return the SHA-256 of all inputs and of what they belong to."""
        sha = hashlib.sha256(json.dumps([asdict(s) for s in self.series]).encode())
        for s in self.series:
            sha.update(self.inputs(s).tobytes())
        return sha.hexdigest()


def build(
    folder: Path,
    archive: list[ArchivedSeries],
    *,
    phantoms: int = 0,
    workers: int = 2,
    spec: preprocess.PreprocessSpec | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Bank:
    """Return the bank of an archive, plus that many phantom patients, written to `folder`.

    Phantoms make the bundle read the bodies that `dicomnode demo` draws.
    """
    spec = spec or preprocess.PreprocessSpec()
    folder.mkdir(parents=True, exist_ok=True)
    made = [_phantom_positions(seed) for seed in range(phantoms)]
    total = sum(len(s.z_mm) for s in archive) + sum(map(len, made))
    slices = np.lib.format.open_memmap(
        folder / "slices.npy", mode="w+", dtype=np.uint8, shape=(total, spec.size, spec.size)
    )
    series: list[BankSeries] = []
    start = 0

    def take(
        patient: str, study: str, uid: str, z: tuple[float, ...], x: npt.NDArray[np.uint8]
    ) -> None:
        nonlocal start
        slices[start : start + len(x)] = x
        series.append(BankSeries(patient, study, uid, start, z))
        start += len(x)
        progress(len(x))

    with ProcessPoolExecutor(workers, initializer=_one_thread) as pool:
        done = pool.map(_inputs, archive, [spec] * len(archive))
        for item, (x, z_mm) in zip(archive, done, strict=True):
            take(item.patient, item.study_uid, item.series_uid, z_mm, x)
        seeds = range(phantoms)
        for seed, z, x in zip(
            seeds, made, pool.map(_phantom_inputs, seeds, [spec] * phantoms), strict=True
        ):
            name = f"{PHANTOM_PREFIX}{seed}"
            take(name, name, name, tuple(z.tolist()), x)
    slices.flush()
    values = {"spec": spec.to_dict(), "series": [asdict(s) for s in series]}
    (folder / "bank.json").write_text(json.dumps(values))
    return Bank(slices, tuple(series), spec)


def load(folder: Path) -> Bank:
    """Return the bank of a folder, its slices memory-mapped."""
    values = json.loads((folder / "bank.json").read_text())
    return Bank(
        np.load(folder / "slices.npy", mmap_mode="r"),
        tuple(BankSeries(**{**s, "z_mm": tuple(s["z_mm"])}) for s in values["series"]),
        preprocess.PreprocessSpec.from_dict(values["spec"]),
    )


def _one_thread() -> None:
    # A process a core is parallel enough: with BLAS threads besides, it took three times as long.
    threadpoolctl.threadpool_limits(1)


def _inputs(
    series: ArchivedSeries, spec: preprocess.PreprocessSpec
) -> tuple[npt.NDArray[np.uint8], tuple[float, ...]]:
    """Inputs and positions of those slices that decode and show a body."""
    inputs, z_mm = [], []
    for path, z in zip(series.paths, series.z_mm, strict=True):
        decoded = dicomio.decode(path, spec)
        if decoded.input is not None:
            inputs.append(decoded.input)
            z_mm.append(z)
    shape = (len(inputs), spec.size, spec.size)
    return np.array(inputs, np.uint8).reshape(shape), tuple(z_mm)


def _phantom_positions(seed: int) -> npt.NDArray[np.float64]:
    marks = phantom.landmarks(phantom.patient(seed))
    return np.arange(min(marks.values()) - 60.0, max(marks.values()), 4.0)


def _phantom_inputs(seed: int, spec: preprocess.PreprocessSpec) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    pixel_mm = float(rng.uniform(1.6, 2.2))
    volume = phantom.volume(
        phantom.patient(seed),
        _phantom_positions(seed),
        pixel_mm=pixel_mm,
        matrix=256,
        center_mm=tuple(rng.uniform(-15, 15, 2)),
        noise_hu=float(rng.uniform(8, 40)),
        seed=seed,
        table=bool(rng.random() < 0.7),
    )
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    return np.stack([preprocess.to_input(v, (pixel_mm, pixel_mm), identity, spec) for v in volume])
