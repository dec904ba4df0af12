"""Stored values become HU by the Modality LUT."""

import numpy as np
import pytest

from dicomnode.core import pixels


def test_hu_is_slope_times_stored_plus_intercept():
    got = pixels.to_hu(np.array([[0, 100], [1024, 4000]], np.uint16), 0.5, -1000)
    np.testing.assert_array_equal(got, [[-1000, -950], [-488, 1000]])
    assert got.dtype == np.float32


def test_signed_values_keep_their_sign():
    got = pixels.to_hu(np.array([[-1000, -1, 0, 32767]], np.int16), 1, 0)
    np.testing.assert_array_equal(got, [[-1000, -1, 0, 32767]])


def test_the_stored_values_are_left_alone():
    stored = np.array([[0, 1]], np.int16)
    pixels.to_hu(stored, 2, 5, (0, 0))
    np.testing.assert_array_equal(stored, [[0, 1]])


@pytest.mark.parametrize("filling", [-2000, -3024, -32768])
def test_what_lies_outside_the_reconstruction_circle_is_not_below_minus_1024(filling):
    assert pixels.to_hu(np.array([[filling]], np.int16), 1, 0)[0, 0] == -1024


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ((3, 3), [-10, 90, 190, -1000, 390]),
        ((1, 3), [-10, -1000, -1000, -1000, 390]),  # both ends included
        ((3, 1), [-10, -1000, -1000, -1000, 390]),  # PS3.3 C.7.5.1.1.2: the limit may be lower
        ((9, 9), [-10, 90, 190, 290, 390]),
        (None, [-10, 90, 190, 290, 390]),
    ],
)
def test_padding_is_air_by_its_stored_value(padding, expected):
    stored = np.arange(5, dtype=np.uint16)[None]
    np.testing.assert_array_equal(pixels.to_hu(stored, 100, -10, padding), [expected])
