"""Which slices of one Series make its curve, where it shows places more than once."""

import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dicomnode.core import geometry
from dicomnode.model import Floats, ScoredSlice

Labels = npt.NDArray[np.intp]

# A volume is preferred by what tells it apart, as long as it shows this share of all places; of
# less (an Acquisition Number for each turn of the gantry), the one that shows the most.
MOST = 0.5
# All in spacings of the slices that are there. What lies nearer to one of them is shown by it;
NEAR = 0.75
# of a volume most of which is shown, only what fills more than this many is of use: of less, two
# phases would make the curve for the sake of a slice or two.
HOLE = 4.0
FEW = 8  # fewer slices tell no spacing of a volume: that of all places is taken


def one_stack(slices: Sequence[ScoredSlice]) -> list[ScoredSlice]:
    """Return the slices of the largest stack, where stacks of several orientations are told.

    Stack ID tells them, of Enhanced CT. All of the slices where it does not, or is wrong.

    References
    ----------
    DICOM PS3.3 C.7.6.16.2.2.4 (Frame Content: a stack has parallel, equally spaced Frames).
    """
    if _are_parallel(slices) or not all(s.acquisition.stack_id for s in slices):
        return list(slices)
    stacks: dict[tuple[str, str], list[ScoredSlice]] = {}
    for s in slices:
        # Stack IDs of two Instances need not mean the same.
        stacks.setdefault((s.sop_instance_uid, s.acquisition.stack_id), []).append(s)
    largest = max(stacks.values(), key=len)
    if not _are_parallel(largest):
        return list(slices)
    return [
        s
        for stack in stacks.values()
        if _are_parallel([*stack, largest[0]])  # a volume may lie in several Instances
        for s in stack
    ]


def most_complete(slices: Sequence[ScoredSlice]) -> list[ScoredSlice]:
    """Return the slices of the largest volume, where a Series has several, and what it lacks.

    Phases of contrast or breathing, cardiac phases, repeats, stations of the table: volumes are
    told apart by Acquisition Number, Temporal Position Identifier, Trigger Time, or these
    together; else by when slices were made. Each place comes once, and stretches that the largest
    does not show come from the next one that does. All of the slices where nothing tells them
    apart, or no two are at one place.

    Parameters
    ----------
    slices : sequence of ScoredSlice
        Parallel, in an order that does not depend on how they arrived.

    Raises
    ------
    GeometryError
        If the direction cosines are not orthonormal.
    """
    if not slices:
        return []
    normal = geometry.slice_normal(slices[0].image_orientation)
    z_mm = geometry.axis_positions(np.array([s.image_position for s in slices], float), normal)
    order, place = geometry.places(z_mm)
    count = int(place[-1]) + 1
    if count == len(slices):
        return list(slices)
    in_order = [slices[i] for i in order]
    best: Labels | None = None
    most = 0
    for labels in _ways(in_order, place):
        pairs = labels * count + place
        if len(np.unique(pairs)) < len(pairs):
            continue  # it does not tell all of them apart
        size = int(np.bincount(labels).max())
        if size > most:
            best, most = labels, size
        if most >= MOST * count:
            break
    if best is None:
        return list(slices)
    chosen = set(order[_joined(z_mm[order], best)].tolist())
    return [s for i, s in enumerate(slices) if i in chosen]


def _joined(z_mm: Floats, labels: Labels) -> list[int]:
    """Return the largest volume, and of each smaller one what those before it do not show.

    `z_mm` grows, and no volume shows a place twice. Phases on grids that are shifted against each
    other are not mixed: what lies between two slices of a volume is shown by it.
    """
    sizes = np.bincount(labels)
    volumes = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    steps = np.diff(z_mm)
    far = steps[steps > geometry.SAME_POSITION_MM]
    usual = float(np.median(far)) if len(far) else geometry.SAME_POSITION_MM
    shown = _Shown([], [])
    joined: list[int] = []
    for k in np.argsort(-sizes, kind="stable"):
        at = z_mm[volumes[k]]
        rooms = [shown.room(z, at[0], at[-1]) for z in at.tolist()]
        # A station is mostly of another part of the body, a phase of the same.
        is_station = 2 * sum(room > 0 for room in rooms) >= len(rooms)
        new = [i for i, room in enumerate(rooms) if room > (0 if is_station else HOLE)]
        spacing = (
            np.full(len(at), usual)
            if len(at) < FEW
            else geometry.slice_spacing(geometry.usual_steps(at))
        )
        for i in new:
            shown.add(float(at[i]), float(spacing[i]))
        joined += volumes[k][new].tolist()
    return joined


@dataclass(frozen=True, slots=True)
class _Shown:
    """Where slices are, mm, growing, and how far each stands for."""

    z_mm: list[float]
    spacing_mm: list[float]

    def add(self, z: float, spacing: float) -> None:
        """Put a slice in its place."""
        i = bisect(self.z_mm, z)
        self.z_mm.insert(i, z)
        self.spacing_mm.insert(i, spacing)

    def room(self, z: float, low: float, high: float) -> float:
        """Return how wide the hole around a position is, in spacings; 0 where there is none.

        Below the lowest slice and above the highest one it reaches to `low` and `high`.
        """
        if not self.z_mm:
            return math.inf
        i = bisect(self.z_mm, z)
        beside = [k for k in (i - 1, i) if 0 <= k < len(self.z_mm)]
        if any(abs(self.z_mm[k] - z) < NEAR * self.spacing_mm[k] for k in beside):
            return 0.0
        spacing = max(self.spacing_mm[k] for k in beside)
        if len(beside) == 2:
            return (self.z_mm[i] - self.z_mm[i - 1]) / spacing
        return (self.z_mm[0] - low if i == 0 else high - self.z_mm[-1]) / spacing


def _are_parallel(slices: Sequence[ScoredSlice]) -> bool:
    return geometry.are_parallel([s.image_orientation for s in slices])


def _ways(slices: Sequence[ScoredSlice], place: Labels) -> Iterator[Labels]:
    """Volumes in which the slices may lie, a number each, what tells them best first.

    The slices are in order of their place.
    """
    told = [s.acquisition for s in slices]
    numbers = [a.acquisition_number for a in told]
    phases = [a.temporal_position for a in told]
    triggers = [a.trigger_time_ms for a in told]
    yield _labels(numbers)
    yield _labels(phases)
    yield _labels(triggers)
    yield _labels(list(zip(numbers, phases, strict=True)))
    yield _labels(list(zip(numbers, phases, triggers, strict=True)))
    if all(t is not None for t in triggers):  # gated by each beat: no two times are the same
        yield _ranks(triggers, place)
    times = [a.content_time for a in told]
    if all(times):
        yield _runs(times, place)
        yield _ranks(times, place)


def _labels(values: Sequence[object]) -> Labels:
    """A number for each value, in order of the first slice that has it."""
    numbers = {value: k for k, value in enumerate(dict.fromkeys(values))}
    return np.array([numbers[value] for value in values], np.intp)


def _runs(times: Sequence[str], place: Labels) -> Labels:
    """One volume after the other: a new one begins where a place comes again."""
    labels = np.zeros(len(times), np.intp)
    seen: set[int] = set()
    run = 0
    for i in sorted(range(len(times)), key=lambda i: (times[i], place[i])):
        if int(place[i]) in seen:
            run += 1
            seen.clear()
        seen.add(int(place[i]))
        labels[i] = run
    return labels


def _ranks(times: Sequence[float | str | None], place: Labels) -> Labels:
    """Place by place: the first of each, the second of each.

    Two of one time at one place get one number: nothing tells them apart.
    """
    labels = np.zeros(len(times), np.intp)
    starts = [0, *(np.flatnonzero(np.diff(place)) + 1).tolist(), len(times)]
    for start, end in pairwise(starts):
        labels[start:end] = np.unique(np.array(times[start:end]), return_inverse=True)[1]
    return labels
