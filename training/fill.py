"""Fills a slice bank from an archive, in parallel; killed, it goes on where it was.

Reads archived Series, writes `slices.npy`, to which each finished Series is appended,
`journal.jsonl`, which then says where it lies, and at the end `bank.json`.
"""

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import threadpoolctl

from dicomnode import dicomio
from dicomnode.core import admission, anatomy, phantom, preprocess
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import CorruptObject
from training import bank, landmarks
from training.archive import NOT_READABLE, ArchivedSeries
from training.bank import PHANTOM_PREFIX, Bank, BankSeries
from training.durable import Journal, write_json
from training.workers import Spread

JOURNAL = "journal.jsonl"
HEADER_BYTES = 128  # of a .npy file of three axes

Inputs = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Filled:
    """A bank, and what became of the Series it was to be filled with."""

    bank: Bank
    decoded: int  # Series; the others were in the bank before
    refused_series: Counter[str] = field(default_factory=Counter)  # once decoded
    refused_slices: Counter[str] = field(default_factory=Counter)  # of Series that were taken


@dataclass(frozen=True, slots=True)
class Phantom:
    """A phantom patient, drawn instead of read; `fingerprint` tells the code that draws it."""

    seed: int
    fingerprint: str

    @property
    def series_uid(self) -> str:
        """A name that no Series has."""
        return f"{PHANTOM_PREFIX}{self.seed}"

    @property
    def patient(self) -> str:
        """One patient each."""
        return self.series_uid

    @property
    def study_uid(self) -> str:
        """One study each."""
        return self.series_uid


Source = ArchivedSeries | Phantom


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one Series holds for training."""

    inputs: Inputs  # (n, size, size)
    z_mm: tuple[float, ...]
    landmarks: dict[str, float]  # name -> z, mm
    aside: dict[str, int]  # reason -> slices
    reason: str | None  # why it is not taken


def build(
    folder: Path,
    archive: list[ArchivedSeries],
    *,
    phantoms: int = 0,
    spec: PreprocessSpec | None = None,
    spread: Spread = map,
    progress: Callable[[int], None] = lambda n: None,
) -> Filled:
    """Return the bank of an archive, plus that many phantom patients, written to `folder`.

    It then holds these Series and no others. What is there already is not decoded again.
    Phantoms make the bundle read the bodies that `dicomnode demo` draws.

    Parameters
    ----------
    spread
        Decodes the Series.
    progress
        Is told of slices that are dealt with.

    Raises
    ------
    BlockingIOError
        If another process fills the same bank.
    """
    spec = spec or PreprocessSpec()
    folder.mkdir(parents=True, exist_ok=True)
    sources: list[Source] = [*archive, *_phantoms(phantoms)]
    with _alone(folder):
        shelf = _Shelf(folder, spec)
        shelf.keep_only({(s.series_uid, s.fingerprint) for s in sources})
        new = [s for s in sources if s.series_uid not in shelf.entries]
        progress(sum(_slices(s) for s in sources if s.series_uid in shelf.entries))
        for source, decoded in zip(new, spread(partial(decode, spec=spec), new), strict=True):
            shelf.append(source, decoded)
            progress(_slices(source))
        shelf.close()
        filled = Filled(_finish(folder, shelf, sources), decoded=len(new))
    for source in sources:
        entry = shelf.entries[source.series_uid]
        if entry["reason"]:
            filled.refused_series[entry["reason"]] += 1
        else:
            filled.refused_slices.update(entry["aside"])
    return filled


def decode(source: Source, spec: PreprocessSpec) -> Decoded:
    """Return the inputs and positions of those slices that decode and show a body."""
    # A process a core is parallel enough: with BLAS threads besides, it took three times as long.
    with threadpoolctl.threadpool_limits(1, "blas"):
        if isinstance(source, Phantom):
            z_mm = phantom_positions(source.seed)
            x = _draw(source.seed, z_mm, spec)
            marks = landmarks.find(x, z_mm, spec)
            return Decoded(x, tuple(z_mm.tolist()), marks, {}, None)
        inputs, kept, aside = [], [], Counter[str]()
        for path, z in zip(source.paths, source.z_mm, strict=True):
            try:
                one, *_ = dicomio.decode(path, spec)  # the index takes none of several Frames
            except CorruptObject as exc:
                aside[exc.reason] += 1
                continue
            except OSError:
                aside[NOT_READABLE] += 1
                continue
            if one.input is None:
                aside[one.reason or ""] += 1
                continue
            inputs.append(one.input)
            kept.append(z)
    reason: str | None = admission.refuse_stack(np.array(kept))
    if reason and aside:  # too few are left because of what became of the others
        reason = aside.most_common(1)[0][0]
    if reason:
        inputs, kept = [], []
    x = np.array(inputs, np.uint8).reshape(len(inputs), spec.size, spec.size)
    marks = {} if reason else landmarks.find(x, np.array(kept), spec)
    return Decoded(x, tuple(kept), marks, dict(aside), reason)


def phantom_positions(seed: int) -> npt.NDArray[np.float64]:
    """Return where a phantom patient is cut, (n,) mm: all of it, each 4 mm."""
    marks = phantom.landmarks(phantom.patient(seed))
    return np.arange(min(marks.values()) - 60.0, max(marks.values()), 4.0)


class _Shelf:
    """The slices file and its journal, to which Series are appended.

    Slices come first, then the line that says where they lie: what no line names is room
    to be written again. The journal's first line names the slices file.
    """

    def __init__(self, folder: Path, spec: PreprocessSpec) -> None:
        self.folder, self.spec = folder, spec
        self.journal = Journal(folder / JOURNAL)
        self.shape = (spec.size, spec.size)
        lines = self.journal.read()
        self.entries: dict[str, dict[str, Any]] = {}
        if lines and lines[0]["spec"] == spec.to_dict():
            self.name = lines[0]["slices"]
            self.entries = {line["series_uid"]: line for line in lines[1:]}
        else:  # nothing there, or inputs of another kind
            self.name = _next_name(lines[0]["slices"] if lines else None)
            self._start(self.name, [])
            self.journal.replace([self._head(self.name)])

    @property
    def count(self) -> int:
        """Slices on the shelf."""
        return max((e["start"] + len(e["z_mm"]) for e in self.entries.values()), default=0)

    def keep_only(self, wanted: set[tuple[str, str]]) -> None:
        """Forget Series that are gone from the archive or have changed; pixels and all."""
        kept = [e for e in self.entries.values() if (e["series_uid"], e["fingerprint"]) in wanted]
        if len(kept) == len(self.entries):
            return
        old = np.memmap(self.folder / self.name, np.uint8, "r", HEADER_BYTES)
        name = _next_name(self.name)
        parts, moved, start = [], [], 0
        each = int(np.prod(self.shape))
        for e in sorted(kept, key=lambda e: e["start"]):
            n = len(e["z_mm"])
            parts.append(old[e["start"] * each : (e["start"] + n) * each])
            moved.append({**e, "start": start})
            start += n
        self._start(name, parts)
        # From here on the new file counts; `_finish` removes the old one, which a reader
        # of the bank as it was may still need.
        self.journal.replace([self._head(name), *moved])
        self.name, self.entries = name, {e["series_uid"]: e for e in moved}

    def append(self, source: Source, decoded: Decoded) -> None:
        """Put one Series on stable storage."""
        start = self.count
        entry = {
            "patient": source.patient,
            "study_uid": source.study_uid,
            "series_uid": source.series_uid,
            "fingerprint": source.fingerprint,
            "start": start,
            "z_mm": decoded.z_mm,
            "landmarks": sorted(decoded.landmarks.items()),
            "aside": decoded.aside,
            "reason": decoded.reason,
        }
        with open(self.folder / self.name, "r+b") as file:
            file.seek(HEADER_BYTES + start * int(np.prod(self.shape)))
            file.write(decoded.inputs.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.journal.append(entry, sync=True)
        self.entries[source.series_uid] = entry

    def close(self) -> None:
        """Make the slices file an array of as many slices as it holds."""
        with open(self.folder / self.name, "r+b") as file:
            file.write(_header(self.count, self.shape))
            file.truncate(HEADER_BYTES + self.count * int(np.prod(self.shape)))
            file.flush()
            os.fsync(file.fileno())

    def _start(self, name: str, parts: list[Inputs]) -> None:
        with open(self.folder / name, "wb") as file:
            file.write(_header(0, self.shape))
            for part in parts:
                file.write(part.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def _head(self, name: str) -> dict[str, Any]:
        return {"slices": name, "spec": self.spec.to_dict()}


def _finish(folder: Path, shelf: _Shelf, sources: list[Source]) -> Bank:
    series = []
    for source in sources:
        e = shelf.entries[source.series_uid]
        if not e["reason"]:
            marks = tuple((name, z) for name, z in e["landmarks"])
            names = (e["patient"], e["study_uid"], e["series_uid"])
            series.append(BankSeries(*names, e["start"], tuple(e["z_mm"]), marks))
    values = {
        "slices": shelf.name,
        "spec": shelf.spec.to_dict(),
        "series": [asdict(s) for s in series],
    }
    write_json(folder / bank.BANK, values)
    for path in folder.glob("slices*.npy"):
        if path.name != shelf.name:
            path.unlink()
    return bank.load(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _slices(source: Source) -> int:
    z_mm = source.z_mm if isinstance(source, ArchivedSeries) else phantom_positions(source.seed)
    return len(z_mm)


def _phantoms(count: int) -> list[Phantom]:
    code = b"".join(Path(m.__file__ or "").read_bytes() for m in (phantom, anatomy))
    code += Path(__file__).read_bytes()
    return [Phantom(seed, hashlib.sha256(code).hexdigest()) for seed in range(count)]


def _draw(seed: int, z_mm: npt.NDArray[np.float64], spec: PreprocessSpec) -> Inputs:
    rng = np.random.default_rng(seed)
    pixel_mm = float(rng.uniform(1.6, 2.2))
    volume = phantom.volume(
        phantom.patient(seed),
        z_mm,
        pixel_mm=pixel_mm,
        matrix=256,
        center_mm=tuple(rng.uniform(-15, 15, 2)),
        noise_hu=float(rng.uniform(8, 40)),
        seed=seed,
        table=bool(rng.random() < 0.7),
    )
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    return np.stack([preprocess.to_input(v, (pixel_mm, pixel_mm), identity, spec) for v in volume])


def _next_name(name: str | None) -> str:
    """`slices.npy`, then `slices-2.npy`, ..."""
    if name is None:
        return bank.SLICES
    _, _, number = Path(name).stem.partition("-")
    return f"slices-{int(number or 1) + 1}.npy"


def _header(count: int, shape: tuple[int, ...]) -> bytes:
    """The head of a .npy file; numpy leaves room in it for the count to grow."""
    file = BytesIO()
    values = {"shape": (count, *shape), "fortran_order": False, "descr": "|u1"}
    np.lib.format.write_array_header_1_0(file, values)
    if len(file.getvalue()) != HEADER_BYTES:
        raise RuntimeError(f"numpy writes a head of {len(file.getvalue())} bytes")
    return file.getvalue()
