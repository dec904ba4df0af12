"""Scores and aligns files without a node or a database, through the same core."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import threadpoolctl
from pydicom.dataset import Dataset

from dicomnode import dicomio
from dicomnode.core import align, curve
from dicomnode.core.region import Region
from dicomnode.core.robust import Covariance
from dicomnode.errors import DicomError
from dicomnode.model import (
    Method,
    Offset,
    OffsetStatus,
    Reason,
    Refusal,
    ScoreCurve,
    ScoredSlice,
    SliceHeader,
)
from dicomnode.objects import source
from dicomnode.objects.source import Source

if TYPE_CHECKING:
    from dicomnode.node.score import Scorer  # with torch, which reading an answer does not need


@dataclass(frozen=True, slots=True)
class ScoredSeries:
    """What became of one Series found in files."""

    header: SliceHeader  # of one of its Instances
    outcome: ScoreCurve | Refusal
    set_aside: dict[str, int]  # reason -> slices


@dataclass(frozen=True, slots=True)
class ScoredFiles:
    """Every Series found, in order of Study and Series, and files that are no Instance."""

    series: tuple[ScoredSeries, ...]
    unreadable: dict[str, int]  # reason -> files
    regions: tuple[Region, ...] = ()  # of the bundle that scored them


def score(
    paths: Sequence[Path], scorer: "Scorer", progress: Callable[[int], None] = lambda n: None
) -> ScoredFiles:
    """Return the curve of every Series under the paths, any depth, any order."""
    headers: dict[str, SliceHeader] = {}
    slices: dict[str, list[ScoredSlice]] = defaultdict(list)
    aside: dict[str, Counter[str]] = defaultdict(Counter)
    unreadable: Counter[str] = Counter()
    waiting: list[dicomio.Decoded] = []

    def flush() -> None:
        inputs = [d.input for d in waiting if d.input is not None]
        for d, value in zip(waiting, scorer.score(inputs), strict=True):
            h = d.header
            assert h.image_position is not None and h.image_orientation is not None
            slices[h.series_uid].append(
                ScoredSlice(
                    sop_instance_uid=h.sop_instance_uid,
                    image_position=h.image_position,
                    image_orientation=h.image_orientation,
                    score=float(value),
                    frame=h.frame,
                    frame_of_reference_uid=h.frame_of_reference_uid,
                    body_centre_mm=d.body_centre_mm,
                )
            )
        waiting.clear()

    with threadpoolctl.threadpool_limits(1, "blas"):  # its threads cost more than they bring
        for path in dicomio.find(list(paths)):
            progress(1)
            try:
                frames = dicomio.decode(path, scorer.bundle.spec)
            except DicomError as exc:
                unreadable[exc.reason] += 1
                continue
            if frames[0].reason is Reason.BAD_UID:  # it names no Series
                unreadable[frames[0].reason] += 1
                continue
            header = frames[0].header
            headers.setdefault(header.series_uid, header)
            for decoded in frames:
                if decoded.reason is not None:
                    aside[header.series_uid][decoded.reason] += 1
                    continue
                waiting.append(decoded)
                if len(waiting) == scorer.batch:
                    flush()
        flush()
    series = [
        ScoredSeries(h, _outcome(uid, slices[uid], aside[uid], scorer), dict(aside[uid]))
        for uid, h in headers.items()
    ]
    series.sort(key=lambda s: (s.header.study_uid, s.header.series_uid))
    return ScoredFiles(tuple(series), dict(unreadable), scorer.bundle.regions)


def best_offset(
    fixed: Sequence[ScoreCurve],
    moving: Sequence[ScoreCurve],
    method: Method,
    covariance: Covariance | None = None,
) -> tuple[ScoreCurve, ScoreCurve, Offset] | None:
    """Return the pair of curves with the most trustworthy offset, None where there is no pair.

    `ok` before `extrapolated` before `refused`, then the longer overlap.
    """
    order = list(OffsetStatus)
    found = [(f, m, align.align(f, m, method, covariance)) for f in fixed for m in moving]
    return min(
        found,
        key=lambda t: (order.index(t[2].status), -(t[2].overlap_mm or 0.0)),
        default=None,
    )


def sources(paths: Sequence[Path], curves: Sequence[ScoreCurve]) -> dict[str, Source]:
    """Return Series Instance UID -> the Series of each curve, as an object refers to it.

    Reads the headers of the files once more, which scoring does not keep. A curve whose files
    are not all there any more is left out.
    """
    wanted = {uid for c in curves for uid in c.sop_instance_uids}
    first = {c.sop_instance_uids[0] for c in curves}
    headers: dict[str, Dataset] = {}
    classes: dict[str, str] = {}
    frames_of_reference: dict[str, str] = {}
    for path in dicomio.find(list(paths)):
        try:
            ds = dicomio.read(path, pixels=False)
            header = dicomio.header_of(ds)
        except DicomError:
            continue
        uid = header.sop_instance_uid
        if uid in wanted:
            classes[uid] = header.sop_class_uid
            frames_of_reference[uid] = header.frame_of_reference_uid
        if uid in first:
            headers[uid] = ds
    return {
        c.series_uid: source.of_header(
            headers[c.sop_instance_uids[0]],
            source.instances_of(c, classes),
            (frames_of_reference[uid] for uid in c.sop_instance_uids),
            c.z_mm.tolist(),
        )
        for c in curves
        if classes.keys() >= set(c.sop_instance_uids)
    }


def _outcome(
    series_uid: str, slices: list[ScoredSlice], aside: Counter[str], scorer: "Scorer"
) -> ScoreCurve | Refusal:
    if not slices:
        return Refusal(series_uid, Reason(aside.most_common(1)[0][0]))
    unique = {(s.sop_instance_uid, s.frame): s for s in slices}
    return curve.assemble(
        list(unique.values()),
        series_uid=series_uid,
        model=scorer.bundle.digest,
        heights=scorer.bundle.heights,
        refused=sum(aside.values()),
    )
