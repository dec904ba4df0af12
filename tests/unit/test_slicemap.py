import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.core import slicemap
from dicomnode.core.slicemap import NONE


def test_each_fixed_slice_gets_the_nearest_moving_one():
    found = slicemap.slice_map(np.array([10.0, 15, 20, 25]), np.array([0.0, 4, 8, 12]), 12.0)
    # Moving slices lie at 12, 16, 20, 24.
    assert found.index.tolist() == [0, 1, 2, 3]
    assert found.distance_mm.tolist() == [2, 1, 0, -1]


def test_of_two_as_near_the_lower_is_taken():
    found = slicemap.slice_map(np.array([2.0, 6.0]), np.array([0.0, 4, 8]), 0.0)
    assert found.index.tolist() == [0, 1]


def test_beyond_the_ends_there_is_none():
    found = slicemap.slice_map(np.arange(-20, 60, 5.0), np.arange(0, 30, 5.0), 2.0)
    at = np.flatnonzero(found.index != NONE)
    assert found.index[at].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.arange(-20, 60, 5.0)[at].tolist() == [0, 5, 10, 15, 20, 25]
    assert np.isnan(found.distance_mm[found.index == NONE]).all()
    assert (found.index[:4] == NONE).all()


def test_where_slices_are_missing_there_is_none():
    moving = np.concatenate([np.arange(0, 50, 5.0), np.arange(100, 150, 5.0)])
    found = slicemap.slice_map(np.arange(0, 150, 5.0), moving, 0.0)
    assert (found.index == NONE).sum() == 10
    assert (found.index[10:20] == NONE).all()


def test_scans_that_do_not_meet_share_no_slice():
    found = slicemap.slice_map(np.arange(0, 100, 5.0), np.arange(0, 100, 5.0), 500.0)
    assert (found.index == NONE).all()


@pytest.mark.parametrize("steps", [(1.0, 5.0), (5.0, 1.0)])
def test_thick_and_thin_slices_meet(steps):
    fixed, moving = (np.arange(0, 100 + step / 2, step) for step in steps)
    assert (slicemap.slice_map(fixed, moving, 0.0).index != NONE).all()


positions = st.lists(st.floats(0.3, 12), min_size=1, max_size=40).map(
    lambda steps: np.concatenate([[0.0], np.cumsum(steps)])
)


@given(positions, positions, st.floats(-300, 300))
def test_no_moving_slice_is_nearer_than_the_one_told(fixed, moving, offset_mm):
    found = slicemap.slice_map(fixed, moving, offset_mm)
    away = np.abs(moving[None, :] + offset_mm - fixed[:, None])
    told = found.index != NONE
    np.testing.assert_allclose(np.abs(found.distance_mm[told]), away[told].min(axis=1), atol=1e-9)
    widest = max(np.diff(fixed).max(), np.diff(moving).max())
    assert (away[told].min(axis=1) <= widest / 2 + 0.051).all()
    shortest = min(np.diff(fixed).min(), np.diff(moving).min())
    assert (away[~told].min(axis=1) > shortest / 2).all()


@given(st.floats(0.3, 10), st.floats(0.3, 10), st.floats(-900, 900), st.integers(2, 300))
def test_the_line_is_where_a_fixed_slice_lies_in_the_moving_series(a, b, offset_mm, count):
    fixed, moving = a * np.arange(count), 50 + b * np.arange(200)
    line = slicemap.line(fixed, moving, offset_mm)
    assert line is not None
    k = np.arange(1, count + 1)
    exact = 1 + (fixed - offset_mm - 50) / b
    np.testing.assert_allclose(line.intercept + line.slope * k, exact, atol=1e-6 * count)


def test_uneven_slices_have_no_line():
    even = np.arange(0, 300, 3.0)
    uneven = np.delete(even, slice(40, 60))
    assert slicemap.line(even, even, 0.0) is not None
    assert slicemap.line(even, uneven, 0.0) is None
    assert slicemap.line(uneven, even, 0.0) is None
