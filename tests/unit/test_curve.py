"""Scored slices make one curve, the same in whatever order they came."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode.core import curve
from dicomnode.core.curve import HeightMap
from dicomnode.model import Flag, Quality, Reason, Refusal, ScoreCurve, ScoredSlice

HEIGHTS = HeightMap(mm_per_score=10.0, intercept_mm=-20.0, residual_sd_mm=5.0)
N = 20


def slices(
    z_mm=None, slope=1.0, orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), frame_of_reference_uid="1.9"
):
    """Slices whose body height grows by `slope` mm a mm, 5 mm apart unless told otherwise."""
    z_mm = np.arange(N) * 5.0 if z_mm is None else np.asarray(z_mm, float)
    return [
        ScoredSlice(
            sop_instance_uid=f"1.2.{i}",
            image_position=(-200.0, -180.0, float(z)),
            image_orientation=orientation,
            score=float(slope * z / 10),
            frame_of_reference_uid=frame_of_reference_uid,
        )
        for i, z in enumerate(z_mm)
    ]


def assemble(scored, refused=0):
    return curve.assemble(scored, series_uid="1.2", model="m", heights=HEIGHTS, refused=refused)


def same(a: ScoreCurve, b: ScoreCurve) -> bool:
    arrays = all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("z_mm", "score"))
    return arrays and (a.sop_instance_uids, a.quality) == (b.sop_instance_uids, b.quality)


def test_a_curve_holds_position_score_and_height_side_by_side():
    c = assemble(slices())
    np.testing.assert_allclose(c.z_mm, np.arange(N) * 5)
    np.testing.assert_allclose(c.score, np.arange(N) * 0.5)
    np.testing.assert_allclose(c.height_mm, np.arange(N) * 5 - 20)
    assert c.sop_instance_uids == tuple(f"1.2.{i}" for i in range(N))
    assert c.frames == (1,) * N
    assert (c.z_mm.dtype, c.score.dtype, c.height_mm.dtype) == (np.float64, np.float32, np.float64)
    assert (c.series_uid, c.model) == ("1.2", "m")


def test_a_straight_curve_has_no_flags():
    q = assemble(slices()).quality
    assert q.flags == ()
    assert q.slope == pytest.approx(1)
    assert q.pearson_r == pytest.approx(1)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.permutations(range(N)))
def test_slices_in_any_order_give_the_same_curve(order):
    scored = slices()
    assert same(assemble([scored[i] for i in order]), assemble(scored))


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.permutations(range(N)))
def test_in_any_order_the_same_one_of_two_slices_at_one_position_is_kept(order):
    scored = slices()
    scored[7] = replace(scored[3], sop_instance_uid="1.2.7", score=99.0)
    assert same(assemble([scored[i] for i in order]), assemble(scored))


def test_a_duplicate_position_is_dropped_and_flagged():
    scored = slices()
    c = assemble([*scored, replace(scored[4], sop_instance_uid="1.2.99", score=99.0)])
    assert same(replace(c, quality=assemble(scored).quality), assemble(scored))
    assert c.quality.flags == (Flag.DUPLICATE_POSITION,)


def test_a_missing_slice_is_flagged_as_a_gap():
    scored = slices()
    c = assemble(scored[:8] + scored[9:])
    assert c.quality.flags == (Flag.GAP, Flag.UNEVEN_SPACING)
    assert len(c.z_mm) == N - 1


def test_uneven_spacing_is_flagged():
    z = np.arange(N) * 5.0
    z[10:] += 1
    assert assemble(slices(z)).quality.flags == (Flag.UNEVEN_SPACING,)


def test_slices_of_two_frames_of_reference_are_flagged():
    scored = slices()
    scored[5] = replace(scored[5], frame_of_reference_uid="1.10")
    assert assemble(scored).quality.flags == (Flag.FRAME_OF_REFERENCE_VARIES,)


def test_slices_that_were_refused_are_flagged():
    assert assemble(slices(), refused=2).quality.flags == (Flag.SLICES_REFUSED,)


def test_a_tilted_stack_is_placed_where_it_cuts_the_long_axis():
    angle = np.radians(10)
    c = assemble(slices(orientation=(1.0, 0.0, 0.0, 0.0, np.cos(angle), np.sin(angle))))
    # The corner lies 180 mm in front of the axis.
    np.testing.assert_allclose(c.z_mm, 180 * np.tan(angle) + np.arange(N) * 5)


def test_frames_of_one_instance_are_told_apart():
    scored = [replace(s, sop_instance_uid="1.2.0", frame=i + 1) for i, s in enumerate(slices())]
    c = assemble(scored[::-1])
    assert c.frames == tuple(range(1, N + 1))


@pytest.mark.parametrize(
    ("scored", "reason"),
    [
        (slices(np.arange(7) * 10.0), Reason.TOO_FEW_POSITIONS),
        (slices(np.repeat(np.arange(7) * 10.0, 3)), Reason.TOO_FEW_POSITIONS),
        (slices(np.arange(40) * 1.25), Reason.TOO_SHORT),  # 48.75 mm
        (
            [*slices(), *slices([200], orientation=(1.0, 0.0, 0.0, 0.0, 0.0, -1.0))],
            Reason.NOT_ONE_STACK,
        ),
        (slices(orientation=(0.0,) * 6), Reason.NO_GEOMETRY),
    ],
)
def test_slices_that_make_no_curve_say_why(scored, reason):
    assert assemble(scored) == Refusal("1.2", reason)


@pytest.mark.parametrize(
    ("slope", "flags"),
    [
        (1.3, ()),  # a child
        (-1.0, (Flag.REVERSED,)),
        (0.5, (Flag.SLOPE,)),
        (2.0, (Flag.SLOPE,)),
        (0.0, (Flag.SLOPE, Flag.LOW_CORRELATION)),
    ],
)
def test_the_slope_of_a_curve_is_judged(slope, flags):
    q = assemble(slices(slope=slope)).quality
    assert q.slope == pytest.approx(slope)
    assert q.flags == flags


def test_scores_that_do_not_follow_position_are_flagged():
    scored = slices()
    jumping = [replace(s, score=s.score + 10 * (-1) ** i) for i, s in enumerate(scored)]
    assert Flag.LOW_CORRELATION in assemble(jumping).quality.flags


def test_the_slope_is_not_moved_by_a_few_bad_slices():
    z = np.arange(40) * 5.0
    height = 1.1 * z
    height[[3, 17, 30]] += [500, -300, 1000]
    assert curve.robust_slope(z, height) == pytest.approx(1.1)


def test_the_slope_of_two_positions_is_that_between_them():
    assert curve.robust_slope(np.array([0.0, 2.0]), np.array([1.0, 4.0])) == 1.5


def test_correlation_by_hand():
    # x - mean: -1, 0, 1; y - mean: -2, 1, 1; 3 / sqrt(2 * 6)
    got = curve.pearson_r(np.array([0.0, 1.0, 2.0]), np.array([0.0, 3.0, 3.0]))
    assert got == pytest.approx(3 / np.sqrt(12))
    assert curve.pearson_r(np.array([0.0, 1.0]), np.array([2.0, 2.0])) == 0


def test_a_flag_is_told_once():
    flat = curve.quality(np.arange(5.0), np.zeros(5), [Flag.SLOPE, Flag.GAP])
    assert flat.flags == (Flag.SLOPE, Flag.GAP, Flag.LOW_CORRELATION)


def test_heights_by_hand_and_back():
    np.testing.assert_allclose(HEIGHTS([0, 2, 50.5]), [-20, 0, 485])
    np.testing.assert_allclose(HEIGHTS.inverse(HEIGHTS([0, 2, 50.5])), [0, 2, 50.5])


@pytest.mark.parametrize(
    "changes",
    [
        {"z_mm": np.array([0.0, 0.0])},
        {"z_mm": np.array([1.0, 0.0])},
        {"z_mm": np.array([0.0, np.nan])},
        {"z_mm": np.array([0.0, 1.0, 2.0])},
        {"score": np.array([0.0, np.nan], np.float32)},
        {"score": np.array([0.0, np.inf], np.float32)},
        {"frames": (1,)},
        {"sop_instance_uids": ("1", "2", "3")},
        {"height_mm": np.zeros(1)},
    ],
)
def test_a_curve_is_made_whole_or_not_at_all(changes):
    whole = {
        "series_uid": "1.2",
        "model": "m",
        "z_mm": np.array([0.0, 1.0]),
        "score": np.array([0.0, 1.0], np.float32),
        "height_mm": np.array([0.0, 10.0]),
        "sop_instance_uids": ("1", "2"),
        "frames": (1, 1),
        "quality": Quality(1.0, 1.0),
    }
    ScoreCurve(**whole)
    with pytest.raises(ValueError):
        ScoreCurve(**whole | changes)


def test_a_curve_of_one_position_is_none():
    with pytest.raises(ValueError, match="two positions"):
        ScoreCurve("1", "m", np.zeros(1), np.zeros(1, np.float32), np.zeros(1), ("1",), (1,),
                   Quality(1.0, 1.0))  # fmt: skip


def scan_of(degrees: float, y_mm: float, known: bool) -> list[ScoredSlice]:
    """Slices whose middles lie at x = 0, y = y_mm and z = 0, 2.5 ... 157.5."""
    angle = np.radians(degrees)
    row, column = np.array([1.0, 0.0, 0.0]), np.array([0.0, np.cos(angle), np.sin(angle)])
    return [
        ScoredSlice(
            f"1.{i}",
            tuple((np.array([0.0, y_mm, z]) - 150 * (row + column)).tolist()),
            (*row.tolist(), *column.tolist()),
            float(z) / 10 + 0.3 * float(np.sin(z / 20)),
            # One slice does not show all of the body, one has a raised arm.
            body_centre_mm=(40.0 * (i == 5), y_mm) if known and i != 7 else None,
        )
        for i, z in enumerate(np.arange(64) * 2.5)
    ]


@pytest.mark.parametrize("y_mm", [0.0, -170.0, 60.0])
@pytest.mark.parametrize("degrees", [8, -12])
def test_a_tilted_scan_lies_where_the_upright_one_does_wherever_the_body_lies(degrees, y_mm):
    tilted, upright = (assemble(scan_of(angle, y_mm, known=True)) for angle in (degrees, 0))
    np.testing.assert_allclose(tilted.z_mm, upright.z_mm, atol=1e-9)
    assert tilted.quality.flags == ()


@pytest.mark.parametrize(("degrees", "flags"), [(0, ()), (1, ()), (8, (Flag.TILT,))])
def test_where_a_tilted_slice_lies_is_a_guess_where_the_body_is_not_seen(degrees, flags):
    found = assemble(scan_of(degrees, -170.0, known=False))
    assert found.quality.flags == flags
    # Where the plane cuts x = y = 0.
    expected = np.arange(64) * 2.5 + 170 * np.tan(np.radians(degrees))
    np.testing.assert_allclose(found.z_mm, expected, atol=1e-9)
