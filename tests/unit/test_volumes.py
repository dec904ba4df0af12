"""Where a Series shows places more than once, one volume of it makes the curve."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode.core import curve, volumes
from dicomnode.core.curve import HeightMap
from dicomnode.core.volumes import most_complete
from dicomnode.model import Acquisition, Flag, Reason, Refusal, ScoreCurve, ScoredSlice

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
HEIGHTS = HeightMap(mm_per_score=10.0, intercept_mm=0.0, residual_sd_mm=5.0)


def leaning(degrees: float) -> tuple[float, ...]:
    angle = np.radians(degrees)
    return (1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), float(np.sin(angle)))


def volume(number: int, places, orientation=AXIAL, **told) -> list[ScoredSlice]:
    return [
        ScoredSlice(
            sop_instance_uid=f"1.{number}.{place + 1}",
            image_position=(0.0, 0.0, 5.0 * place),
            image_orientation=orientation,
            score=0.5 * place,
            acquisition=Acquisition(**told),
        )
        for place in places
    ]


def numbers(slices: list[ScoredSlice]) -> list[str]:
    return sorted({s.sop_instance_uid.split(".")[1] for s in slices})


def places(slices: list[ScoredSlice]) -> list[float]:
    return sorted(s.image_position[2] / 5 for s in slices)


def test_one_volume_stays_as_it_is_whatever_it_tells():
    slices = volume(1, range(6), acquisition_number=1) + volume(2, range(6, 9))
    assert volumes.most_complete(slices) == slices


def test_nothing_is_chosen_where_nothing_tells_slices_apart():
    slices = volume(1, range(6)) + volume(2, range(6))
    assert volumes.most_complete(slices) == slices


def test_one_slice_too_many_in_a_phase_is_no_reason_to_mix_them():
    """The numbers do not tell all apart, the times do, one after the other."""
    early = volume(1, range(10), acquisition_number=1)
    late = volume(2, range(10), acquisition_number=2)
    again = volume(3, [4], acquisition_number=2)
    timed = [
        replace(s, acquisition=replace(s.acquisition, content_time=f"{k:06d}"))
        for k, s in enumerate([*early, *late, *again])
    ]
    assert numbers(volumes.most_complete(timed)) == ["1"]


@pytest.mark.parametrize("key", ["acquisition_number", "temporal_position", "trigger_time_ms"])
def test_two_attributes_together_tell_what_neither_tells_alone(key):
    other = "temporal_position" if key != "temporal_position" else "acquisition_number"
    slices = [
        s
        for k, (a, b) in enumerate([(1, 1), (1, 2), (2, 1), (2, 2)])
        for s in volume(k, range(12 if k == 2 else 9), **{key: a, other: b})
    ]
    assert numbers(volumes.most_complete(slices)) == ["2"]


def test_a_phase_of_a_part_gives_way_to_more_of_the_body():
    """Each number is of one place; by time, phases show all of them."""
    slices = volume(1, range(10)) + volume(2, range(10))
    told = [
        replace(s, acquisition=Acquisition(acquisition_number=k, content_time=f"{k:06d}"))
        for k, s in enumerate(slices)
    ]
    assert (numbers(volumes.most_complete(told)), len(volumes.most_complete(told))) == (["1"], 10)


def station(number: int, z_mm, **told) -> list[ScoredSlice]:
    return [
        ScoredSlice(
            sop_instance_uid=f"1.{number}.{k + 1}",
            image_position=(0.0, 0.0, float(z)),
            image_orientation=AXIAL,
            score=float(z) / 10,
            acquisition=Acquisition(acquisition_number=number, **told),
        )
        for k, z in enumerate(z_mm)
    ]


def z_of(slices: list[ScoredSlice]) -> list[float]:
    return [s.image_position[2] for s in slices]


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(
    "stations",
    [
        [range(0, 301, 5), range(-280, 21, 5)],  # five places in both
        [range(0, 301, 5), range(-280, 1, 5)],  # one
        [range(0, 201, 5), range(-200, 1, 5), range(-400, -199, 5)],  # each less than half
        [range(0, 201, 5), range(-400, -199, 5), range(-200, 1, 5)],  # the middle one is last
        [range(k, k + 16, 5) for k in range(0, 300, 15)],  # turns of a gantry, step and shoot
        [range(0, 101, 1), range(100, 401, 5), range(400, 421, 5)],  # head, body, toes
        [[0], *([k] for k in range(0, 200, 5))],  # one slice each, the first one twice
    ],
)
def test_stations_that_meet_are_one_curve(stations, timed):
    slices = [
        s
        for number, z_mm in enumerate(stations, 1)
        for s in station(number, z_mm, content_time=f"{number:06d}" if timed else "")
    ]
    found = curve.assemble(slices, series_uid="1.2", model="m", heights=HEIGHTS)
    assert isinstance(found, ScoreCurve)
    assert found.z_mm.tolist() == sorted({float(z) for z_mm in stations for z in z_mm})
    assert Flag.DUPLICATE_POSITION in found.quality.flags
    left_out = curve.left_out(found, slices)
    assert len(left_out) == len(slices) - len(found.z_mm)
    assert set(left_out.values()) == {Reason.DUPLICATE_POSITION}


def test_phases_on_grids_that_are_shifted_are_not_mixed_but_for_what_one_lacks():
    """Every fifth slice of one lies where every fourth of the other does."""
    one = station(1, np.arange(0, 300.1, 1.0))
    other = station(2, np.arange(-3.75, 302, 1.25))
    assert most_complete([*one, *other]) == one
    longer = station(2, np.arange(-100, 302, 1.25))  # it shows more, but no more slices
    chosen = most_complete([*one, *longer[:300]])
    assert [s for s in chosen if s in one] == one
    assert [z for z in sorted(z_of(chosen)) if z < 0] == [z for z in z_of(longer) if z < 0]


@pytest.mark.parametrize(("missing", "filled"), [(1, False), (3, False), (4, True), (40, True)])
def test_a_hole_of_a_slice_or_two_is_not_filled_from_another_phase(missing, filled):
    one = station(1, [5 * k for k in range(200) if not 30 <= k < 30 + missing])
    other = station(2, [5 * k for k in range(90)])
    chosen = most_complete([*one, *other])
    wanted = range(30, 30 + missing) if filled else ()
    assert z_of([s for s in chosen if s not in one]) == [5.0 * k for k in wanted]
    assert len(chosen) == len(one) + len(wanted)


@st.composite
def some_stations(draw) -> list[list[ScoredSlice]]:
    """Volumes of some length and spacing each, anywhere; no two of as many slices."""
    counts = draw(st.lists(st.integers(8, 40), min_size=2, max_size=4, unique=True))
    return [
        station(
            number,
            draw(st.integers(-40, 40)) * draw(st.sampled_from([2.5, 5.0]))
            + np.arange(count) * draw(st.sampled_from([1.0, 1.25, 2.5, 5.0])),
        )
        for number, count in enumerate(counts)
    ]


@given(some_stations())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_volumes_are_joined_end_to_end_and_no_stretch_is_lost(stations):
    slices = [s for one in stations for s in one]
    chosen = most_complete(slices)
    if len(set(z_of(slices))) == len(slices):  # none competes with another
        assert chosen == slices
        return
    places = z_of(chosen)
    assert len(set(places)) == len(places)
    largest = max(stations, key=len)
    low, high = largest[0].image_position[2], largest[-1].image_position[2]
    beside = 0.75 * (largest[1].image_position[2] - low)
    for s, z in zip(chosen, places, strict=True):
        assert s in largest or z <= low - beside or z >= high + beside
    assert [s for s in chosen if s in largest] == largest
    # Five of the widest spacing, and so nothing that matters.
    for z in z_of(slices):
        assert min(abs(z - other) for other in places) <= 25.0
    of_volume = [s.acquisition.acquisition_number for s in sorted(chosen, key=lambda s: z_of([s]))]
    changes = sum(a != b for a, b in pairwise(of_volume))
    assert changes <= 2 * (len(stations) - 1)


@st.composite
def some_volumes(draw) -> list[ScoredSlice]:
    """One to three runs of places, each told in some way, and a few slices told in another."""
    told = st.builds(
        Acquisition,
        acquisition_number=st.sampled_from([None, 1, 2]),
        temporal_position=st.sampled_from([None, 1, 2]),
        trigger_time_ms=st.sampled_from([None, 0.0, 400.0]),
        content_time=st.sampled_from(["", "081500", "081501", "081502"]),
    )
    found: list[ScoredSlice] = []
    for number in range(draw(st.integers(1, 3))):
        start, end = draw(st.integers(0, 4)), draw(st.integers(12, 18))
        one = draw(told)
        found += [replace(s, acquisition=one) for s in volume(number, range(start, end))]
    for k in draw(st.lists(st.integers(0, len(found) - 1), max_size=4)):
        found[k] = replace(found[k], acquisition=draw(told))
    return found


@given(some_volumes(), st.randoms(use_true_random=False))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_volume_shows_each_place_once_and_a_curve_is_the_same_in_whatever_order(slices, random):
    chosen = volumes.most_complete(slices)
    if chosen != slices:
        assert len(places(chosen)) == len(set(places(chosen)))
        assert 0 < len(chosen) < len(slices)
    shuffled = list(slices)
    random.shuffle(shuffled)
    one, other = (
        curve.assemble(s, series_uid="1.2", model="m", heights=HEIGHTS) for s in (slices, shuffled)
    )
    if isinstance(one, Refusal):  # a part of the places is too short
        assert one == other
        return
    assert isinstance(other, ScoreCurve)
    assert one.sop_instance_uids == other.sop_instance_uids
    assert one.quality == other.quality
    left_out = curve.left_out(one, slices)
    assert len(left_out) + len(one.z_mm) == len(slices)


def test_of_stacks_that_lean_otherwise_the_largest_is_taken_wherever_it_lies():
    """One stack in two Instances, and a smaller one that leans."""
    many = [
        replace(s, sop_instance_uid=f"1.{1 + k // 7}", frame=k + 1)
        for k, s in enumerate(volume(1, range(14), stack_id="1"))
    ]
    head = [
        replace(s, sop_instance_uid="1.1", frame=20 + k)
        for k, s in enumerate(volume(2, range(5), leaning(8), stack_id="2"))
    ]
    assert volumes.one_stack([*many, *head]) == many
    found = curve.assemble([*head, *many], series_uid="1.2", model="m", heights=HEIGHTS)
    assert isinstance(found, ScoreCurve)
    assert found.quality.flags == (Flag.SLICES_REFUSED,)
    assert set(curve.left_out(found, [*head, *many]).values()) == {Reason.NOT_ONE_STACK}


@pytest.mark.parametrize("stack_id", ["", "1"])
def test_stacks_that_are_not_told_or_told_wrong_are_not_one_stack(stack_id):
    slices = volume(1, range(12), stack_id=stack_id) + volume(
        1, range(12, 15), leaning(8), stack_id=stack_id
    )
    slices = [replace(s, sop_instance_uid="1.1", frame=k + 1) for k, s in enumerate(slices)]
    assert volumes.one_stack(slices) == slices
    found = curve.assemble(slices, series_uid="1.2", model="m", heights=HEIGHTS)
    assert isinstance(found, Refusal) and found.reason is Reason.NOT_ONE_STACK
