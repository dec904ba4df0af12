"""Offsets mean `z_fixed = z_moving + offset_mm`, by both methods and as an ITK transform."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

import dicomnode
from dicomnode import weights
from dicomnode.core import align
from dicomnode.model import Method, Offset, OffsetStatus, Quality, ScoreCurve
from dicomnode.objects import transform
from tests.unit.test_robust import COVARIANCE

SHIFTS = st.floats(-2000, 2000)
SEEDS = st.integers(0, 10**6)


def curve(z_mm, score) -> ScoreCurve:
    z_mm, score = np.asarray(z_mm, float), np.asarray(score, np.float32)
    uids = tuple(f"1.2.{i}" for i in range(len(z_mm)))
    ones = (1,) * len(z_mm)
    return ScoreCurve("1.2", "m", z_mm, score, score * 10.0, uids, ones, Quality(1.0, 1.0))


def bent(seed: int) -> ScoreCurve:
    """A rising curve that is not straight, of a number of slices and a spacing of its own."""
    rng = np.random.default_rng(seed)
    n, spacing = int(rng.integers(12, 60)), float(rng.choice([1.25, 2.0, 3.0, 5.0]))
    score = np.cumsum(rng.uniform(0.02, 0.2, n) * spacing) + rng.uniform(-30, 30)
    return curve(rng.uniform(-500, 500) + spacing * np.arange(n), score)


def straight(z_mm, anatomy_mm=0.0) -> ScoreCurve:
    """A curve of 0.1 score a mm, whose score is 0 where z is `anatomy_mm`."""
    z_mm = np.asarray(z_mm, float)
    return curve(z_mm, (z_mm - anatomy_mm) / 10)


def moved(c: ScoreCurve, d_mm: float) -> ScoreCurve:
    return replace(c, z_mm=c.z_mm + d_mm)


def crop(c: ScoreCurve, low: int, high: int) -> ScoreCurve:
    return curve(c.z_mm[low:high], c.score[low:high])


@settings(max_examples=40, derandomize=True, deadline=None)
@given(SEEDS, SHIFTS)
def test_a_curve_moved_by_d_has_offset_d_by_l1(seed, d):
    c = bent(seed)
    offset = align.l1(moved(c, d), c)
    assert offset.offset_mm == pytest.approx(d, abs=1e-6)
    assert offset.status is OffsetStatus.OK
    assert offset.overlap_mm == pytest.approx(c.z_mm[-1] - c.z_mm[0])


@settings(max_examples=40, derandomize=True, deadline=None)
@given(SHIFTS, st.integers(3, 80), st.sampled_from([1.0, 2.5, 5.0]))
def test_a_straight_curve_moved_by_d_has_offset_d_by_fast(d, n, spacing):
    c = straight(100 + spacing * np.arange(n))
    offset = align.fast(moved(c, d), c)
    assert offset.offset_mm == pytest.approx(d, abs=1e-3)
    assert offset.status is OffsetStatus.OK


@settings(max_examples=40, derandomize=True, deadline=None)
@given(SEEDS, SEEDS, SHIFTS, st.sampled_from(list(Method)))
def test_to_move_the_fixed_curve_by_d_adds_d_to_the_offset(a, b, d, method):
    fixed, moving = bent(a), bent(b)
    before, after = (align.align(f, moving, method, COVARIANCE) for f in (fixed, moved(fixed, d)))
    assert after.offset_mm - before.offset_mm == pytest.approx(d, abs=1e-6)
    assert after.status is before.status


@settings(max_examples=40, derandomize=True, deadline=None)
@given(SEEDS, SEEDS)
def test_fixed_and_moving_swapped_give_the_negative_offset_by_l1(a, b):
    one, two = align.l1(bent(a), bent(b)), align.l1(bent(b), bent(a))
    assert one.offset_mm == pytest.approx(-two.offset_mm, abs=1e-6)
    assert one.overlap_mm == pytest.approx(two.overlap_mm, abs=1e-6)
    assert one.status is two.status


@pytest.mark.parametrize(
    ("fixed", "moving"),
    [
        ((0, 60), (20, 40)),  # moving inside fixed
        ((20, 40), (0, 60)),  # fixed inside moving
        ((0, 40), (20, 60)),  # moving hangs over at the head
        ((20, 60), (0, 40)),  # and at the feet
        ((0, 36), (29, 60)),  # seven slices in common, 6 * 5 = 30 mm
    ],
)
def test_l1_finds_parts_of_one_body_wherever_they_overlap(fixed, moving):
    whole = curve(5.0 * np.arange(60), np.cumsum(np.random.default_rng(1).uniform(0.3, 0.7, 60)))
    f, m = crop(whole, *fixed), moved(crop(whole, *moving), -123.0)
    offset = align.l1(f, m)
    assert offset.offset_mm == pytest.approx(123)
    assert offset.status is OffsetStatus.OK
    common = min(fixed[1], moving[1]) - max(fixed[0], moving[0]) - 1
    assert offset.overlap_mm == pytest.approx(5 * common)


def test_another_spacing_gives_the_offset_within_a_millimetre():
    def height(z):
        return z / 10 + np.sin(z / 60)

    z_fixed, z_moving = np.arange(0, 400, 5.0), np.arange(50.3, 300, 1.25)
    offset = align.l1(curve(z_fixed, height(z_fixed)), curve(z_moving + 77, height(z_moving)))
    assert offset.offset_mm == pytest.approx(-77, abs=1)


def plain_best_shift(f, m, least):
    """Every shift in float64, as the paper writes it."""
    pad = len(m) - least
    padded = np.concatenate([np.full(pad, np.nan), f, np.full(pad, np.nan)])
    cost = np.nanmean(np.abs(sliding_window_view(padded, len(m)) - m), axis=1)
    best = int(np.argmin(cost))
    return best - pad, float(cost[best])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.integers(2, 400),
    st.integers(2, 400),
    SEEDS,
    st.sampled_from([0.0, 1e-7, 0.02, 1.0]),
    st.sampled_from([0.0, 1e-6, 0.1]),
    st.sampled_from([0.0, 50.0, 1e5]),
    st.booleans(),
)
def test_l1_is_the_same_to_the_last_bit_as_every_shift_in_float64(
    f_size, m_size, seed, slope, noise, level, whole
):
    rng = np.random.default_rng(seed)

    def scores(n):
        values = slope * np.arange(n) + noise * rng.normal(size=n).cumsum() + level
        # As float32 scores at 1 mm are; whole numbers match equally well at many shifts.
        return np.rint(values) if whole else values.astype(np.float32).astype(float)

    f, m = scores(f_size), scores(m_size)
    least = max(1, int(min(30, f_size / 2, m_size / 2)))
    assert align._best_shift(f, m, least) == plain_best_shift(f, m, least)


def test_l1_is_not_moved_by_a_few_bad_slices():
    z = 5.0 * np.arange(60)
    good = straight(z)
    score = good.score.copy()
    score[[10, 11, 40]] += [8, 8, -15]
    assert align.l1(good, moved(curve(z, score), 30)).offset_mm == pytest.approx(-30)


def test_scans_without_a_common_score_are_extrapolated_by_l1():
    chest, pelvis = straight(np.arange(300, 500, 5)), straight(np.arange(0, 200, 5))
    assert align.l1(chest, pelvis).status is OffsetStatus.EXTRAPOLATED


def test_fast_extrapolates_along_the_fixed_line():
    # Fixed scores 0..10 at z 0..100; the centre of moving, the fifth of nine slices, lies at
    # z 520 and scores 22, which fixed would have at z 220.
    offset = align.fast(straight(np.arange(0, 101, 5)), straight(np.arange(500, 541, 5), 300))
    assert offset.offset_mm == pytest.approx(-300, abs=1e-3)
    assert offset.status is OffsetStatus.EXTRAPOLATED
    assert offset.overlap_mm == 0


def test_fast_looks_at_three_slices_only():
    fixed, moving = straight(np.arange(0, 101, 5)), straight(np.arange(20, 81, 5))  # 21 and 13
    noisy_fixed, noisy_moving = fixed.score.copy(), moving.score.copy()
    noisy_fixed[1:-1] = 99
    noisy_moving[:6] = noisy_moving[7:] = -99
    offset = align.fast(curve(fixed.z_mm, noisy_fixed), curve(moving.z_mm, noisy_moving))
    assert offset.offset_mm == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("slope", [0, -0.1])
def test_fast_refuses_a_fixed_scan_whose_score_does_not_grow(slope):
    z = np.arange(0, 100, 5.0)
    offset = align.fast(curve(z, slope * z), straight(z))
    assert offset.status is OffsetStatus.REFUSED
    assert offset.reason
    assert (offset.offset_mm, offset.overlap_mm, offset.sigma_mm) == (None, None, None)


@pytest.mark.parametrize("method", Method)
def test_what_is_not_estimated_is_none(method):
    c = straight(np.arange(0, 100, 5))
    offset = align.align(c, c, method, COVARIANCE)
    assert offset.method is method
    assert (offset.dx_mm, offset.dy_mm, offset.reason) == (None, None, None)


@pytest.mark.parametrize("method", Method)
def test_curves_of_two_bundles_are_not_compared(method):
    c = straight(np.arange(0, 100, 5))
    with pytest.raises(ValueError, match="different bundles"):
        align.align(c, replace(c, model="other"), method)


@pytest.mark.parametrize(
    ("fixed", "moving", "expected"),
    [
        ((0, 100), (50, 150), 50),
        ((0, 100), (20, 30), 10),
        ((0, 100), (100, 200), 0),
        ((0, 100), (300, 400), 0),
    ],
)
def test_overlap_is_the_length_both_cover(fixed, moving, expected):
    assert align.overlap_mm(np.array(fixed, float), np.array(moving, float)) == expected
    assert align.overlap_mm(np.array(moving, float), np.array(fixed, float)) == expected


def test_the_best_pair_is_ok_before_extrapolated_then_the_longest():
    fixed = straight(np.arange(0, 400, 5))
    short, long = straight(np.arange(100, 200, 5)), straight(np.arange(50, 350, 5), 10)
    elsewhere = straight(np.arange(600, 900, 5))
    offset = dicomnode.align(fixed, [elsewhere, short, long], "l1")
    assert offset.status is OffsetStatus.OK
    assert offset.offset_mm == pytest.approx(-10)
    assert dicomnode.align([fixed], [elsewhere], "l1").status is OffsetStatus.EXTRAPOLATED
    assert dicomnode.align([], fixed, "l1") is None


def test_robust_takes_what_its_bundle_knows_and_no_other_bundle_s_curves():
    z = np.arange(0, 400, 5.0)
    model = weights.digest(weights.read_manifest())
    fixed, moving = (replace(straight(p), model=model) for p in (z, z[20:60] + 7.0))
    offset = dicomnode.align(fixed, moving)
    assert (offset.method, offset.status) == (Method.ROBUST, OffsetStatus.OK)
    assert offset.sigma_mm > 0
    with pytest.raises(ValueError, match="another bundle"):
        dicomnode.align(straight(z), moving)


def test_the_itk_transform_takes_fixed_points_to_moving_points():
    # z_fixed = z_moving - 130: a landmark at 70 in the fixed scan lies at 200 in the moving one.
    offset = Offset(Method.L1, OffsetStatus.OK, offset_mm=-130.0)
    assert transform.to_sitk_transform(offset).TransformPoint((3.0, 4.0, 70.0)) == (3.0, 4.0, 200.0)


def test_the_itk_transform_moves_x_and_y_where_they_were_estimated():
    offset = Offset(Method.L1, OffsetStatus.OK, offset_mm=10.0, dx_mm=2.0, dy_mm=-5.0)
    assert transform.to_sitk_transform(offset).TransformPoint((0.0, 0.0, 0.0)) == (-2.0, 5.0, -10.0)


def test_a_refused_offset_has_no_transform():
    with pytest.raises(ValueError, match="refused"):
        transform.to_sitk_transform(Offset(Method.FAST, OffsetStatus.REFUSED, reason="x"))
