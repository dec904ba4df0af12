"""Which slices of one Series make its curve, where it shows places more than once."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dicomnode.core import geometry
from dicomnode.model import ScoredSlice

Labels = npt.NDArray[np.intp]

# A volume is preferred by what tells it apart, as long as it shows this share of all places; of
# less (an Acquisition Number for each turn of the gantry), the one that shows the most.
MOST = 0.5


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
    """Return the slices of one volume, where a Series has several; each place once.

    Phases of contrast or breathing, cardiac phases, repeats: volumes are told apart by Acquisition
    Number, Temporal Position Identifier, Trigger Time, or these together; else by when slices
    were made. All of the slices where nothing tells them apart.

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
    position = np.array([s.image_position for s in slices], float)
    order, place = geometry.places(geometry.axis_positions(position, normal))
    count = int(place[-1]) + 1
    if count == len(slices):
        return list(slices)
    in_order = [slices[i] for i in order]
    best = np.empty(0, np.intp)
    for labels in _ways(in_order, place):
        pairs = labels * count + place
        if len(np.unique(pairs)) < len(pairs):
            continue  # it does not tell all of them apart
        volume = np.flatnonzero(labels == np.bincount(labels).argmax())
        if len(volume) > len(best):
            best = volume
        if len(best) >= MOST * count:
            break
    if not len(best):
        return list(slices)
    chosen = set(order[best].tolist())
    return [s for i, s in enumerate(slices) if i in chosen]


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
