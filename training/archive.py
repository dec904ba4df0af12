"""Walks folders of DICOM and tells which Series can be trained on, by the node's own rules."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dicomnode import dicomio
from dicomnode.core import admission, geometry
from dicomnode.errors import DicomError, GeometryError
from dicomnode.model import SliceHeader


@dataclass(frozen=True, slots=True)
class ArchivedSeries:
    """One Series fit for training: its files from feet to head."""

    patient: str
    study_uid: str
    series_uid: str
    paths: tuple[Path, ...]
    z_mm: tuple[float, ...]


@dataclass(slots=True)
class Index:
    """What a walk found: the Series taken, and how many were refused for which reason."""

    series: list[ArchivedSeries] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


def index(paths: Iterable[Path], progress: Callable[[int], None] = lambda n: None) -> Index:
    """Return the Series under the paths, any depth, any order, mixed modalities.

    A Series is counted as refused once, for the commonest reason of its slices; files
    that are no DICOM are counted one by one. `progress` is told of each file.
    """
    slices: dict[str, list[tuple[SliceHeader, Path]]] = defaultdict(list)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    found = Index()
    for path in dicomio.find(list(paths)):
        progress(1)
        try:
            header = dicomio.header_of(dicomio.read(path, pixels=False))
        except DicomError as exc:
            found.refused[exc.reason] += 1
            continue
        if reason := admission.refuse_slice(header):
            reasons[header.series_uid][reason] += 1
        else:
            slices[header.series_uid].append((header, path))
    for series_uid in sorted(slices.keys() | reasons.keys()):
        members = slices[series_uid]
        if not members:
            found.refused[reasons[series_uid].most_common(1)[0][0]] += 1
            continue
        try:
            stack = geometry.stack(
                np.array([h.image_position for h, _ in members], float),
                np.array([h.image_orientation for h, _ in members], float),
            )
        except GeometryError as exc:
            found.refused[exc.reason] += 1
            continue
        if reason := admission.refuse_stack(stack.z_mm):
            found.refused[reason] += 1
            continue
        first = members[0][0]
        found.series.append(
            ArchivedSeries(
                patient=first.patient.patient_id,
                study_uid=first.study_uid,
                series_uid=series_uid,
                paths=tuple(members[i][1] for i in stack.order),
                z_mm=tuple(float(z) for z in stack.z_mm),
            )
        )
    return found
