"""Stored values become HU by the Modality LUT."""

import numpy as np
import pytest

from dicomnode.core import pixels
from dicomnode.core.pixels import Rescale


def test_hu_is_slope_times_stored_plus_intercept():
    got = pixels.to_hu(np.array([[0, 100], [1024, 4000]], np.uint16), Rescale(0.5, -1000))
    np.testing.assert_array_equal(got, [[-1000, -950], [-488, 1000]])
    assert got.dtype == np.float32


def test_signed_values_keep_their_sign():
    got = pixels.to_hu(np.array([[-1000, -1, 0, 32767]], np.int16), Rescale())
    np.testing.assert_array_equal(got, [[-1000, -1, 0, 32767]])


def test_the_stored_values_are_left_alone():
    stored = np.array([[0, 1]], np.int16)
    pixels.to_hu(stored, Rescale(2, 5, (0, 0)))
    np.testing.assert_array_equal(stored, [[0, 1]])


@pytest.mark.parametrize("filling", [-2000, -3024, -32768])
def test_what_lies_outside_the_reconstruction_circle_is_not_below_minus_1024(filling):
    assert pixels.to_hu(np.array([[filling]], np.int16), Rescale())[0, 0] == -1024


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
    np.testing.assert_array_equal(pixels.to_hu(stored, Rescale(100, -10, padding)), [expected])


@pytest.mark.parametrize(
    ("rescale", "dtype", "keeps"),
    [
        (Rescale(1, -1024), np.int16, True),
        (Rescale(1, -1024), np.uint16, True),
        (Rescale(2, -1024), np.int16, True),
        (Rescale(1, -1024, (-2000, -2000)), np.int16, True),  # padding below air is air
        (Rescale(1, -1024, (63536, 63536)), np.int16, True),  # no value of this kind
        (Rescale(1, -1024, (30, 24)), np.int16, False),  # padding that only a mask finds
        (Rescale(0.5, -1024), np.int16, False),
        (Rescale(1, -1000.5), np.int16, False),
        (Rescale(-1, 0), np.int16, False),
        (Rescale(3, 0), np.int16, False),  # air lies between two values
        (Rescale(1, 0), np.uint16, False),  # nothing is as low as air
        (Rescale(300, 200), np.int16, False),  # beyond what float32 holds exactly
        (Rescale(1, -1024), np.float32, False),
        (Rescale(), np.float32, True),
        (Rescale(1, -1024), np.int32, False),
        (Rescale(float("nan"), 0), np.int16, False),
    ],
    ids=str,
)
def test_stored_values_stand_for_hu_where_nothing_would_be_rounded(rescale, dtype, keeps):
    assert rescale.keeps_order(np.dtype(dtype)) is keeps
