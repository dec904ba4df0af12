"""Phase 1 of Table 1: reads the planned pairs' scans from an archive, renders, crops, scores.

Reads archived Series, writes into one folder: `scans/` (network inputs and a small volume of each
Series), `cases/` (the pairs of each patient, with what was rendered for them) and `scores/`
(by one bundle or run a patient). Each file is written whole; what is there already is kept,
so that a run goes on where it stopped, and new weights need only new scores.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import threadpoolctl
import torch

from dicomnode import dicomio
from dicomnode.core import admission, curve, fasta, geometry, preprocess
from dicomnode.core.curve import HeightMap
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import DicomError, WeightsError
from dicomnode.model import Floats, Reason, ScoreCurve, Scores
from training import followup, protocol
from training.archive import ArchivedSeries
from training.followup import Volume
from training.protocol import Kind, Planned, ProtocolConfig, Source, Span
from training.readers import Inputs, Readers

VERSION = 1  # of what is stored; counted up when rendering changes
MATRIX = 256  # larger ones are averaged: the network sees pixels of 3.5 mm
NICE = 12
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
EVERYTHING: Span = (-np.inf, np.inf)

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two scored scans whose offset is known: `z_fixed = z_moving + truth_mm`."""

    kind: Kind
    patient: str
    region: str
    number: int
    fixed: ScoreCurve
    moving: ScoreCurve
    truth_mm: float
    tolerance_mm: float
    overlap: float  # true share of the shorter scan, 0..1
    unseen: bool | None
    drawn: dict[str, Any]  # of the follow-up, for those who look into an error
    volumes: Callable[[], tuple[fasta.Volume, fasta.Volume]]


@dataclass(frozen=True, slots=True)
class _Scan:
    """Slices of one scan that show a body, as the network and as FASTA see them."""

    inputs: Inputs  # (n, size, size)
    z_mm: Floats  # (n,)
    small: npt.NDArray[np.float16]  # (s, r, c) HU
    spacing_mm: Floats  # (3,) z, y, x
    origin_mm: Floats  # (3,) z, y, x


def make(
    archive: Sequence[ArchivedSeries],
    folder: Path,
    config: ProtocolConfig,
    readers: Readers,
    *,
    spec: PreprocessSpec,
    workers: int = 2,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Counter[str]:
    """Make all pairs of an archive and score them; return what was left out, by reason.

    `progress` is told of each phase how many of its files are done, and of how many.

    Raises
    ------
    WeightsError
        If a patient has no weights that may score it, before anything is rendered.
    """
    for name in ("scans", "cases", "scores"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    left_out: Counter[str] = Counter()
    sources: list[Source] = []
    jobs: list[tuple[Any, ...]] = [(s, folder / "scans", spec) for s in archive]
    for source in _each(_scan_series, jobs, workers, lambda n: progress("reading", n, len(jobs))):
        if isinstance(source, Source):
            sources.append(source)
        else:
            left_out[source] += 1

    by_patient: dict[str, list[Planned]] = defaultdict(list)
    for planned in protocol.plan(sources, config):
        by_patient[planned.patient].append(planned)
    for patient in by_patient:
        if readers(patient).spec != spec:
            raise WeightsError(f"the weights for {patient} read another input than is rendered")
    members: dict[str, list[ArchivedSeries]] = defaultdict(list)
    for s in archive:
        members[s.patient].append(s)
    jobs = [(p, members[p], todo, folder, config, spec) for p, todo in by_patient.items()]
    for reasons in _each(_render, jobs, workers, lambda n: progress("rendering", n, len(jobs))):
        left_out.update(reasons)
    jobs = [(p, folder, readers) for p in by_patient]
    for _ in _each(_score, jobs, workers, lambda n: progress("scoring", n, len(jobs))):
        pass
    stored = {"config": asdict(config), "spec": spec.to_dict(), "patients": sorted(by_patient)}
    _write(folder / "protocol.json", json.dumps(stored, indent=1).encode())
    return left_out


def load(folder: Path) -> list[Pair]:
    """Return the pairs that `make` left in a folder."""
    pairs: list[Pair] = []
    for patient in json.loads((folder / "protocol.json").read_text())["patients"]:
        with np.load(folder / "scores" / _file(patient)) as stored:
            meta = json.loads(str(stored["meta"]))
            scored = {k: (stored[f"{k}.z"], stored[k]) for k in meta["scans"]}
        heights = HeightMap(**meta["heights"])
        for case in _cases(folder, patient):
            planned = Planned(**case["planned"])
            curves = [
                _curve(*scored[name], span, meta["model"], heights)
                for name, span in (case["fixed"], case["moving"])
            ]
            if any(c is None for c in curves):
                continue
            fixed, moving = curves
            assert fixed is not None and moving is not None
            pairs.append(
                Pair(
                    kind=Kind(planned.kind),
                    patient=patient,
                    region=planned.region,
                    number=planned.number,
                    fixed=fixed,
                    moving=moving,
                    truth_mm=case["truth_mm"],
                    tolerance_mm=planned.tolerance_mm,
                    overlap=protocol.overlap(
                        _span(fixed.z_mm), _span(moving.z_mm + case["truth_mm"])
                    ),
                    unseen=meta["unseen"],
                    drawn=case["drawn"],
                    volumes=_Volumes(folder, patient, case["fixed"], case["moving"]),
                )
            )
    return pairs


def read_volume(series: ArchivedSeries) -> Volume:
    """Return the slices of a Series that decode, in patient axes, of at most `MATRIX` pixels.

    Raises
    ------
    DicomError
        If none decodes, or their sizes differ.
    """
    images, z_mm = [], []
    header = None
    for path, z in zip(series.paths, series.z_mm, strict=True):
        try:
            ds = dicomio.read(path)
            image = dicomio.image_hu(ds)
        except DicomError:
            continue
        header = header or dicomio.header_of(ds)
        images.append(np.rint(image).astype(np.int16))
        z_mm.append(z)
    if header is None or len({i.shape for i in images}) != 1:
        raise DicomError(f"the slices of Series {series.series_uid} are not of one size")
    orientation = np.asarray(header.image_orientation, float)
    assert header.image_position is not None and header.pixel_spacing is not None
    stack = np.stack([geometry.to_patient_axes(i, orientation) for i in images])
    row_mm, column_mm = header.pixel_spacing
    if geometry.is_transposed(orientation):
        row_mm, column_mm = column_mm, row_mm
    # The first pixel of the file is the last of patient axes where a direction was flipped.
    rows, columns = stack.shape[1:]
    along = orientation[3:], orientation[:3]
    if geometry.is_transposed(orientation):
        along = along[1], along[0]
    y, x = header.image_position[1], header.image_position[0]
    y = y - (rows - 1) * row_mm if along[0][1] < 0 else y
    x = x - (columns - 1) * column_mm if along[1][0] < 0 else x
    volume = Volume(stack, np.asarray(z_mm), (row_mm, column_mm), (y, x))
    return followup.shrink(volume, MATRIX)


def _scan_series(series: ArchivedSeries, folder: Path, spec: PreprocessSpec) -> Source | str:
    """Store one Series as a scan; return what planning needs, or why there is none."""
    path = folder / _file(series.series_uid)
    key = _digest(VERSION, series.z_mm, [p.stat().st_size for p in series.paths], spec.to_dict())
    if (meta := _meta(path, key)) is not None:
        return str(meta["refused"]) if "refused" in meta else Source(**_tuples(meta["source"]))
    try:
        volume = read_volume(series)
    except DicomError as exc:
        _save(path, {"key": key, "refused": str(exc.reason)}, {})
        return str(exc.reason)
    if (shown := _shown(volume, spec)) is None:
        _save(path, {"key": key, "refused": str(Reason.EMPTY)}, {})
        return str(Reason.EMPTY)
    scan = _scan(shown, spec)
    z_mm = tuple(float(z) for z in scan.z_mm)
    if reason := admission.refuse_stack(scan.z_mm):
        _save(path, {"key": key, "refused": str(reason)}, {})
        return str(reason)
    source = Source(series.patient, series.study_uid, series.series_uid, _frame(series), z_mm)
    _save(path, {"key": key, "source": asdict(source)}, {"scan": scan})
    return source


def _render(
    patient: str,
    members: list[ArchivedSeries],
    todo: list[Planned],
    folder: Path,
    config: ProtocolConfig,
    spec: PreprocessSpec,
) -> Counter[str]:
    """Store the pairs of a patient, with the scans rendered for them."""
    path = folder / "cases" / _file(patient)
    read = [[s.series_uid, *s.z_mm] for s in members]
    key = _digest(VERSION, read, [asdict(p) for p in todo], asdict(config), spec.to_dict())
    if (meta := _meta(path, key)) is not None:
        return Counter(meta["left_out"])
    by_uid = {s.series_uid: s for s in members}
    left_out: Counter[str] = Counter()
    cases, scans = [], {}

    @lru_cache(maxsize=2)
    def volume_of(series_uid: str) -> tuple[Volume, followup.Body]:
        volume = _shown(read_volume(by_uid[series_uid]), spec)
        assert volume is not None  # or it would not have been planned
        return volume, followup.survey(volume)

    for planned in todo:
        rng = protocol.random(planned, config)
        fixed: tuple[str, Span] = (planned.fixed, EVERYTHING)
        moving: tuple[str, Span] = (planned.moving, EVERYTHING)
        truth_mm, drawn = planned.truth_mm, {}
        if planned.kind in (Kind.FOLLOW_UP, Kind.STRESS):
            volume, body = volume_of(planned.fixed)
            follow = followup.draw(volume, body, config.follow_up, rng)
            z = followup.levels(volume, follow)
            if planned.kind is Kind.FOLLOW_UP:
                first, count = protocol.paper_crop(len(z), config, rng)
            else:
                assert planned.group is not None
                try:
                    span, part = protocol.stress_crops(_span(z), planned.group, config, rng)
                except ValueError:
                    left_out["stress: the volume is too short"] += 1
                    continue
                fixed = (planned.fixed, span)
                first, stop = np.searchsorted(z, part).tolist()
                count = stop - first
            rendered = followup.render(
                volume, body, follow, config.follow_up, first=first, count=count
            )
            name = f"{planned.kind}-{planned.number}"
            scans[name] = _scan(rendered.volume, spec, fasta.SIZE)
            moving, truth_mm = (name, EVERYTHING), rendered.truth_mm
            drawn = {**asdict(follow), "residual_mm": rendered.residual_mm}
            drawn |= {"first": first, "count": count}
            if len(scans[name].z_mm) < 2:
                left_out[f"{planned.kind}: the crop shows no body"] += 1
                del scans[name]
                continue
        elif planned.kind is Kind.SAME_FRAME_CROPPED:
            name = f"fine-{planned.moving}"
            if name not in scans:
                scans[name] = _scan(followup.interpolated(volume_of(planned.moving)[0]), spec)
            z = scans[name].z_mm
            first, count = protocol.paper_crop(len(z), config, rng)
            moving = (name, (float(z[first]), float(z[first + count - 1])))
        cases.append(
            {
                "planned": asdict(planned),
                "fixed": fixed,
                "moving": moving,
                "truth_mm": truth_mm,
                "drawn": drawn,
            }
        )
    _save(path, {"key": key, "cases": cases, "left_out": left_out}, scans)
    return left_out


def _score(patient: str, folder: Path, readers: Readers) -> None:
    """Store the scores of every scan that the pairs of a patient use."""
    reader = readers(patient)
    path = folder / "scores" / _file(patient)
    case_file = folder / "cases" / _file(patient)
    cases = _cases(folder, patient)
    names = sorted({name for case in cases for name, _ in (case["fixed"], case["moving"])})
    with np.load(case_file) as stored:
        rendered = json.loads(str(stored["meta"]))["key"]
    key = _digest(VERSION, rendered, reader.model, asdict(reader.heights), reader.unseen)
    if _meta(path, key) is not None:
        return
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in names:
        inputs, arrays[f"{name}.z"] = _stored(folder, patient, name, "inputs", "z_mm")
        arrays[name] = reader.score(inputs)
    meta = {
        "key": key,
        "model": reader.model,
        "heights": asdict(reader.heights),
        "unseen": reader.unseen,
        "scans": names,
    }
    _save(path, meta, {}, arrays)


@dataclass(frozen=True, slots=True)
class _Volumes:
    """Reads the small volumes of a pair when they are asked for."""

    folder: Path
    patient: str
    fixed: tuple[str, Span]
    moving: tuple[str, Span]

    def __call__(self) -> tuple[fasta.Volume, fasta.Volume]:
        """Return (fixed, moving)."""
        one, other = (self._one(*part) for part in (self.fixed, self.moving))
        return one, other

    def _one(self, name: str, span: Span) -> fasta.Volume:
        parts = _stored(self.folder, self.patient, name, "small", "spacing_mm", "origin_mm")
        small, (dz, dy, dx), (first, y, x) = parts[0], parts[1].tolist(), parts[2].tolist()
        z = first + np.arange(len(small)) * dz
        kept = (z >= span[0] - dz / 2) & (z <= span[1] + dz / 2)
        return fasta.Volume(
            hu=small[kept].astype(np.float32),
            spacing_mm=(dz, dy, dx),
            origin_mm=(float(z[kept][0]), y, x),
        )


def _scan(volume: Volume, spec: PreprocessSpec, most: int | None = None) -> _Scan:
    """Return a volume as network and FASTA see it, slices without a body left out.

    FASTA's has at most `most` slices, where given.
    """
    inputs = [preprocess.to_input(i, volume.pixel_mm, IDENTITY, spec) for i in volume.image_hu]
    shown = np.array([not preprocess.is_empty(x, spec) for x in inputs], bool)
    shape = (int(shown.sum()), spec.size, spec.size)
    kept = np.array([x for x, s in zip(inputs, shown, strict=True) if s], np.uint8).reshape(shape)
    small = followup.even(followup.shrink(volume, fasta.SIZE))
    small = followup.thicken(small, most or len(small.z_mm))
    steps = np.diff(small.z_mm)
    return _Scan(
        inputs=kept,
        z_mm=volume.z_mm[shown],
        small=small.image_hu.astype(np.float16),
        spacing_mm=np.array([steps.mean() if len(steps) else 1.0, *small.pixel_mm]),
        origin_mm=np.array([small.z_mm[0], *small.origin_mm]),
    )


def _shown(volume: Volume, spec: PreprocessSpec) -> Volume | None:
    """Return a volume from its first to its last slice that shows a body; None without any."""
    inputs = (preprocess.to_input(i, volume.pixel_mm, IDENTITY, spec) for i in volume.image_hu)
    shown = np.flatnonzero([not preprocess.is_empty(x, spec) for x in inputs])
    if not len(shown):
        return None
    part = slice(int(shown[0]), int(shown[-1]) + 1)
    return replace(volume, image_hu=volume.image_hu[part], z_mm=volume.z_mm[part])


def _curve(
    z_mm: Floats, score: Scores, span: Span, model: str, heights: HeightMap
) -> ScoreCurve | None:
    """Return the curve of what a scan shows within a span, None where that is no curve."""
    inside = (z_mm >= span[0] - 1e-6) & (z_mm <= span[1] + 1e-6)
    n = int(inside.sum())
    if n < 2:
        return None
    z_mm, score = z_mm[inside], score[inside].astype(np.float32)
    height_mm = heights(score)
    return ScoreCurve(
        series_uid="",
        model=model,
        z_mm=z_mm,
        score=score,
        height_mm=height_mm,
        sop_instance_uids=tuple(str(i) for i in range(n)),
        frames=(1,) * n,
        quality=curve.quality(z_mm, height_mm),
    )


def _frame(series: ArchivedSeries) -> str:
    """Return the Frame of Reference of a Series, "" where its slices name several."""
    some = [series.paths[i] for i in (0, len(series.paths) // 2, -1)]
    uids = {dicomio.header_of(dicomio.read(p, pixels=False)).frame_of_reference_uid for p in some}
    return uids.pop() if len(uids) == 1 else ""


def _each(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int, done: Progress
) -> Iterator[Any]:
    """Yield what a function gives for each job, in order of the jobs; 0 workers: right here."""
    if workers == 0:
        for n, job in enumerate(jobs, 1):
            yield function(*job)
            done(n)
        return
    # Forked children of a process that has used torch hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for n, future in enumerate(as_completed(futures), 1):
                future.result()  # an error ends the run at once, what was stored stays
                done(n)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for future in futures:
            yield future.result()


def _start_worker() -> None:
    os.nice(max(0, NICE - os.nice(0)))
    threadpoolctl.threadpool_limits(1)
    torch.set_num_threads(1)


def _cases(folder: Path, patient: str) -> list[dict[str, Any]]:
    with np.load(folder / "cases" / _file(patient)) as stored:
        meta = json.loads(str(stored["meta"]))
    return list(meta["cases"])


def _stored(folder: Path, patient: str, name: str, *parts: str) -> list[npt.NDArray[Any]]:
    """Return parts of a scan, of those rendered for the patient or of a Series."""
    for path, key in (
        (folder / "cases" / _file(patient), name),
        (folder / "scans" / _file(name), "scan"),
    ):
        if path.exists():
            with np.load(path) as stored:
                if f"{key}.{parts[0]}" in stored:
                    return [stored[f"{key}.{part}"] for part in parts]
    raise FileNotFoundError(f"no scan {name} in {folder}")


def _save(
    path: Path,
    meta: dict[str, Any],
    scans: Mapping[str, _Scan],
    arrays: Mapping[str, npt.NDArray[Any]] | None = None,
) -> None:
    parts: dict[str, Any] = {"meta": np.array(json.dumps(meta)), **(arrays or {})}
    parts |= {f"{n}.{k}": getattr(s, k) for n, s in scans.items() for k in _Scan.__slots__}
    partial = path.with_suffix(".part")
    with open(partial, "wb") as f:
        np.savez_compressed(f, **parts)
    os.replace(partial, path)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".part")
    partial.write_bytes(data)
    os.replace(partial, path)


def _meta(path: Path, key: str) -> dict[str, Any] | None:
    """Return what was stored under this key; None where nothing was, or something else."""
    if not path.exists():
        return None
    with np.load(path) as stored:
        meta: dict[str, Any] = json.loads(str(stored["meta"]))
    return meta if meta["key"] == key else None


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _file(name: str) -> str:
    return f"{quote(name, safe='')}.npz"


def _span(z_mm: Floats) -> Span:
    return float(z_mm[0]), float(z_mm[-1])


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
