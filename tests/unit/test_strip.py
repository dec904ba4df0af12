"""Coronal strips and PNG: without a database or a browser."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib import image as reader

from dicomnode.core import png, strip

Z = np.arange(0.0, 50.0, 5.0)  # ten slices, 5 mm apart


def lines(values):
    """Return lines of four columns, each of one grey value."""
    return np.repeat(np.array(values, np.uint8)[:, None], 4, axis=1)


def test_the_head_is_up_and_half_a_slice_beyond_the_ends_is_shown():
    low, high = strip.span(Z)
    assert (low, high) == (-2.5, 47.5)
    picture = strip.strip(lines(10 * np.arange(10)), Z, low, high, 5.0)
    assert picture.shape == (10, 4, 2)
    assert picture[:, 0, 0].tolist() == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    assert (picture[..., 1] == 255).all()


def test_between_slices_it_is_interpolated():
    picture = strip.strip(lines(10 * np.arange(10)), Z, 0.0, 45.0, 2.5)
    # Middles of 18 rows: 43.75, 41.25, ... mm; the grey value is twice the position.
    assert picture[:, 0, 0].tolist() == np.rint(2 * (43.75 - 2.5 * np.arange(18))).tolist()


def test_where_nothing_was_scanned_nothing_is_shown():
    z = np.delete(Z, [4, 5])  # 20 and 25 mm are missing
    picture = strip.strip(lines([100] * 8), z, -10.0, 60.0, 1.0)
    shown = picture[::-1, 0, 1] == 255  # feet first, a row a mm from -9.5 on
    at = np.arange(-9.5, 60)
    expected = ((at >= -2.5) & (at <= 17.5)) | ((at >= 27.5) & (at <= 47.5))
    assert shown.tolist() == expected.tolist()


def test_two_strips_over_one_window_lie_side_by_side():
    fixed = strip.strip(lines(10 * np.arange(10)), Z, -20.0, 80.0, 1.0)
    moving = strip.strip(lines(10 * np.arange(10)), Z - 300.0, -320.0, -220.0, 1.0)
    assert np.array_equal(fixed, moving)


def test_rows_are_bounded_and_a_window_has_two_ends():
    picture = strip.strip(lines([1] * 10), Z, -1e6, 1e6, 3.5)
    assert len(picture) == strip.MAX_ROWS
    with pytest.raises(ValueError, match="nothing to show"):
        strip.strip(lines([1] * 10), Z, 5.0, 5.0, 1.0)


def test_the_middle_is_between_the_two_middle_rows():
    stack = np.zeros((2, 6, 3), np.uint8)
    stack[:, 2], stack[:, 3] = 200, 250
    assert strip.middle(stack).tolist() == [[225] * 3] * 2


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20))))
def test_a_picture_comes_back_from_its_png(image):
    read = reader.imread(io.BytesIO(png.encode(image)), format="png")
    assert np.array_equal(np.rint(read * 255).astype(np.uint8), image)


def test_opacity_comes_back_as_well():
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 2), np.uint8)
    read = reader.imread(io.BytesIO(png.encode(image)), format="png")
    back = np.rint(read * 255).astype(np.uint8)
    assert np.array_equal(back[..., 0], image[..., 0])
    assert np.array_equal(back[..., -1], image[..., 1])
