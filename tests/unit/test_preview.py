"""Inputs come back from what is kept of them."""

import numpy as np
import pytest

from dicomnode.core import phantom, preprocess, preview
from dicomnode.core.preprocess import PreprocessSpec


@pytest.mark.parametrize("size", [32, 128])
def test_an_input_comes_back_bit_for_bit(size):
    rng = np.random.default_rng(0)
    for x in (
        rng.integers(0, 256, (size, size), np.uint8),
        np.zeros((size, size), np.uint8),
        np.full((size, size), 255, np.uint8),
    ):
        back = preview.unpack(preview.pack(x))
        assert back.dtype == np.uint8
        np.testing.assert_array_equal(back, x)


def test_a_packed_input_is_less_than_half_of_it():
    (image,) = phantom.volume(phantom.patient(0), np.array([150.0]), pixel_mm=0.9, matrix=512)
    x = preprocess.to_input(image, (0.9, 0.9), (1, 0, 0, 0, 1, 0), PreprocessSpec())
    assert len(preview.pack(x)) < x.nbytes / 2
