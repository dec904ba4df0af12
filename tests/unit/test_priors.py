"""Curves kept as positions at body heights give the offset of one against many."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode.core import align, priors
from dicomnode.core.priors import LEVELS_MM
from dicomnode.model import Quality, ScoreCurve


def curve(z_mm, height_mm) -> ScoreCurve:
    z_mm, height_mm = np.asarray(z_mm, float), np.asarray(height_mm, float)
    n = len(z_mm)
    score = (height_mm / 45).astype(np.float32)
    return ScoreCurve("1.2", "m", z_mm, score, height_mm, ("",) * n, (1,) * n, Quality(1.0, 1.0))


def noisy(seed: int, low: float, high: float, step: float, offset_mm: float) -> ScoreCurve:
    rng = np.random.default_rng(seed)
    height = np.arange(low, high, step)
    return curve(height + offset_mm, height + rng.normal(0, 3, len(height)))


def test_a_straight_curve_is_inverted_exactly_where_it_reaches():
    c = curve(np.arange(-700, -399, 2.5), np.arange(-100, 201, 2.5))
    z = priors.inverse(c)
    reached = (LEVELS_MM >= -100) & (LEVELS_MM <= 200)
    assert z.dtype == np.float32 and z.shape == LEVELS_MM.shape
    assert (np.isfinite(z) == reached).all()
    assert z[reached] == pytest.approx(LEVELS_MM[reached] - 600)


def test_what_falls_is_pooled_about_its_middle():
    # Heights 104 and 88 at z 10 and 20 stand for 96, a level, at z 15.
    c = curve([0, 10, 20, 30], [80, 104, 88, 112])
    z = dict(zip(LEVELS_MM.tolist(), priors.inverse(c).tolist(), strict=True))
    assert [z[-4 + 8 * k] for k in range(9, 16)] == pytest.approx(
        [np.nan, np.nan, 3.75, 11.25, 18.75, 26.25, np.nan], nan_ok=True
    )


def test_a_curve_that_never_grows_reaches_nothing():
    c = curve(np.arange(0, 100, 5.0), -np.arange(0, 100, 5.0))
    assert np.isnan(priors.inverse(c)).all()
    assert np.isnan(priors.inverse(replace(c, height_mm=np.zeros(20)))).all()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 60))
def test_offset_and_spread_are_those_of_the_levels_both_reach(seed, count, levels):
    rng = np.random.default_rng(seed)
    fixed = rng.normal(0, 300, levels).astype(np.float32)
    moving = rng.normal(0, 300, (count, levels)).astype(np.float32)
    fixed[rng.random(levels) < rng.choice([0, 0.3, 1])] = np.nan
    moving[rng.random((count, levels)) < rng.random((count, 1))] = np.nan
    found = priors.offsets(fixed, moving)
    for row, offset, spread, shared in zip(
        moving, found.offset_mm, found.spread_mm, found.levels, strict=True
    ):
        both = np.sort((fixed - row)[np.isfinite(fixed - row)])
        assert shared == len(both)
        if shared < 4:
            assert np.isnan(offset) and np.isnan(spread)
            continue
        assert offset == pytest.approx(np.median(both), rel=1e-5, abs=1e-3)
        quartiles = [
            np.percentile(both, share, method=method)
            for share, method in ((75, "higher"), (25, "lower"))
        ]
        assert spread == quartiles[0] - quartiles[1]


def test_many_curves_at_once_are_as_each_alone():
    rng = np.random.default_rng(1)
    moving = rng.normal(0, 300, (2 * priors.ROWS + 5, 30)).astype(np.float32)
    fixed = rng.normal(0, 300, 30).astype(np.float32)
    whole = priors.offsets(fixed, moving)
    for i in (0, priors.ROWS - 1, priors.ROWS, len(moving) - 1):
        alone = priors.offsets(fixed, moving[i : i + 1])
        assert (alone.offset_mm[0], alone.spread_mm[0]) == (whole.offset_mm[i], whole.spread_mm[i])


@pytest.mark.parametrize("d_mm", [-512.3, 0, 250.0])
def test_priors_of_one_body_are_found_as_by_l1(d_mm):
    fixed = noisy(1, -50, 450, 1.5, d_mm)
    stored = [noisy(s, low, low + 250, 3, 40.0 * s) for s, low in enumerate((-150, 0, 180, 300), 2)]
    found = priors.offsets(priors.inverse(fixed), np.stack([priors.inverse(c) for c in stored]))
    for i, c in enumerate(stored):
        truth = d_mm - 40.0 * (i + 2)
        assert found.offset_mm[i] == pytest.approx(truth, abs=2)
        assert found.offset_mm[i] == pytest.approx(align.l1(fixed, c).offset_mm, abs=3)
    assert (found.spread_mm < 8).all()


def test_bad_slices_and_curves_without_a_shared_height():
    fixed = noisy(1, 0, 400, 2, 100.0)
    height = fixed.height_mm.copy()
    height[50:70] += 300  # a tenth of the slices
    far = noisy(2, 600, 800, 2, 0.0)
    moving = np.stack([priors.inverse(curve(fixed.z_mm, height)), priors.inverse(far)])
    found = priors.offsets(priors.inverse(fixed), moving)
    assert found.offset_mm[0] == pytest.approx(0, abs=4)
    assert found.levels[1] == 0 and np.isnan(found.offset_mm[1])
