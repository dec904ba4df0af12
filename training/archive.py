"""Walks folders of DICOM and tells which Series can be trained on, by the node's own rules."""

import hashlib
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dicomnode import dicomio
from dicomnode.core import admission, geometry, volumes
from dicomnode.dicomio import rejection
from dicomnode.errors import DicomError, GeometryError
from dicomnode.model import Acquisition, Reason, ScoredSlice
from training.durable import Journal
from training.workers import Spread

# Beside the node's reasons, for what an archive's disk does.
NOT_READABLE = "not_readable"
FILES_AT_A_TIME = 64

Stamp = tuple[int, int]  # bytes, time of change in ns: another stamp is another file


@dataclass(frozen=True, slots=True)
class ArchivedSeries:
    """One Series fit for training: its files from feet to head.

    `fingerprint` changes when a file does, and when one comes or goes.
    """

    patient: str
    study_uid: str
    series_uid: str
    paths: tuple[Path, ...]
    z_mm: tuple[float, ...]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What is kept of one file: where its slice lies, or the reason why it is none."""

    path: str
    stamp: Stamp
    reason: str | None
    series_uid: str = ""  # "" of a file that is no Instance
    study_uid: str = ""
    sop_instance_uid: str = ""
    patient: str = ""
    position: tuple[float, ...] = ()  # (3,) mm, LPS
    orientation: tuple[float, ...] = ()  # (6,)
    told: tuple[Any, ...] = ()  # of `Acquisition`
    rejects: tuple[str, ...] = ()  # SOP Instance UIDs, of a rejection note


@dataclass(slots=True)
class Refused:
    """How much was refused, by reason; each thing is counted once."""

    files: Counter[str] = field(default_factory=Counter)  # that are no Instance
    series: Counter[str] = field(default_factory=Counter)  # by the commonest reason of its slices
    slices: Counter[str] = field(default_factory=Counter)  # of Series that were taken


@dataclass(slots=True)
class Index:
    """What a walk found."""

    files: int = 0
    series: list[ArchivedSeries] = field(default_factory=list)  # by Series Instance UID
    refused: Refused = field(default_factory=Refused)


def index(
    paths: Iterable[Path],
    *,
    spread: Spread = map,
    cache: Path | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Index:
    """Return the Series under the paths, any depth, any order, mixed modalities.

    Parameters
    ----------
    spread
        Reads the headers, some files at a time.
    cache
        File that holds the headers read before; those of unchanged files are not read again.
    progress
        Is told of files as they are read.
    """
    by_series: dict[str, list[FileHeader]] = defaultdict(list)
    found = Index()
    rejected: set[str] = set()
    for header in _headers(paths, spread, cache):
        progress(1)
        found.files += 1
        rejected.update(header.rejects)
        if header.series_uid:
            by_series[header.series_uid].append(header)
        else:
            found.refused.files[header.reason or ""] += 1
    for series_uid in sorted(by_series):
        _admit(by_series[series_uid], rejected, found)
    return found


def _admit(headers: list[FileHeader], rejected: set[str], found: Index) -> None:
    """Add one Series to what was found, or to what was refused."""
    sound = [h for h in headers if h.reason is None]
    aside = Counter(h.reason for h in headers if h.reason is not None)
    # A file may be there twice; of two that differ the first of the walk counts.
    valid = {h.sop_instance_uid: h for h in reversed(sound) if h.sop_instance_uid not in rejected}
    if hidden := sum(h.sop_instance_uid in rejected for h in sound):
        aside[Reason.REJECTED] = hidden
    if not valid:
        found.refused.series[aside.most_common(1)[0][0]] += 1
        return
    try:
        members = _one_volume(valid)
        stack = geometry.stack(
            np.array([h.position for h in members], float),
            np.array([h.orientation for h in members], float),
        )
    except GeometryError as exc:
        found.refused.series[exc.reason] += 1
        return
    if reason := admission.refuse_stack(stack.z_mm):
        found.refused.series[reason] += 1
        return
    first = members[0]
    kept = [members[i] for i in stack.order]
    if others := len(sound) - hidden - len(kept):
        aside[Reason.DUPLICATE_POSITION] = others
    found.refused.slices.update(aside)
    identity = repr([(h.sop_instance_uid, h.stamp) for h in kept])
    found.series.append(
        ArchivedSeries(
            patient=first.patient,
            study_uid=first.study_uid,
            series_uid=first.series_uid,
            paths=tuple(Path(h.path) for h in kept),
            z_mm=tuple(float(z) for z in stack.z_mm),
            fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        )
    )


def _one_volume(headers: Mapping[str, FileHeader]) -> list[FileHeader]:
    """Return those of the slices, by SOP Instance UID, that would make the node's curve."""
    slices = [
        ScoredSlice(uid, h.position, h.orientation, 0.0, acquisition=Acquisition(*h.told))
        for uid, h in sorted(headers.items())
    ]
    return [headers[s.sop_instance_uid] for s in volumes.most_complete(slices)]


def _headers(paths: Iterable[Path], spread: Spread, cache: Path | None) -> Iterator[FileHeader]:
    """The header of every file, in the order of the walk; read only where it is new."""
    journal = Journal(cache) if cache else None
    read = [v for v in journal.read() if len(v) == len(fields(FileHeader))] if journal else []
    known = {h.path: h for h in map(_from_json, read)}
    walked = (str(path.absolute()) for path in dicomio.find(list(paths)))
    chunks = (
        [(path, known[path].stamp if path in known else None) for path in some]
        for some in iter(lambda: list(islice(walked, FILES_AT_A_TIME)), [])
    )
    seen = set()
    for results in spread(read_headers, chunks):
        if journal:
            journal.append(*(_to_json(h) for h in results if isinstance(h, FileHeader)))
        for result in results:
            header = result if isinstance(result, FileHeader) else known[result]
            known[header.path] = header
            seen.add(header.path)
            yield header
    if journal and known.keys() != seen:  # forget files that are gone
        journal.replace([_to_json(h) for path, h in known.items() if path in seen])


def read_headers(files: list[tuple[str, Stamp | None]]) -> list[FileHeader | str]:
    """Return the header of each file, or its path where its stamp is the one given."""
    results: list[FileHeader | str] = []
    for path, known in files:
        stamp = (0, 0)
        try:
            status = Path(path).stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if stamp == known:
                results.append(path)
            elif not stat.S_ISREG(status.st_mode):  # a pipe would never end
                results.append(FileHeader(path, stamp, NOT_READABLE))
            else:
                results.append(_read_header(path, stamp))
        except OSError:  # a dangling link, a file that is not ours to read, a bad block
            results.append(FileHeader(path, stamp, NOT_READABLE))
        except DicomError as exc:
            results.append(FileHeader(path, stamp, exc.reason))
    return results


def _read_header(path: str, stamp: Stamp) -> FileHeader:
    ds = dicomio.read(Path(path), pixels=False)
    header = dicomio.header_of(ds)
    note = None
    if header.sop_class_uid == admission.KEY_OBJECT_SELECTION:
        note = rejection.of_dataset(ds, header)
    # A path stands for a slice here.
    several = header.sop_class_uid in admission.ENHANCED_CT
    reason = Reason.MULTI_FRAME if several else admission.refuse_slice(header)
    if reason is Reason.BAD_UID:  # it names no Series
        return FileHeader(path, stamp, reason)
    return FileHeader(
        path,
        stamp,
        reason,
        header.series_uid,
        header.study_uid,
        header.sop_instance_uid,
        header.patient.patient_id,
        header.image_position or (),
        header.image_orientation or (),
        astuple(header.acquisition),
        () if note is None else tuple(sorted(note.instances)),
    )


def _to_json(header: FileHeader) -> list[object]:
    return list(astuple(header))


def _from_json(values: list[object]) -> FileHeader:
    parts: list[Any] = [tuple(v) if isinstance(v, list) else v for v in values]
    return FileHeader(*parts)
