"""What the network sees depends on the body, not on how it was reconstructed or laid."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode.core import geometry, preprocess
from dicomnode.core.pixels import Rescale
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import WeightsError

SPEC = PreprocessSpec()
HFS = ((1, 0, 0), (0, 1, 0))
ORIENTATIONS = [
    ((1, 0, 0), (0, 1, 0)),  # HFS
    ((-1, 0, 0), (0, -1, 0)),  # HFP
    ((-1, 0, 0), (0, 1, 0)),  # FFS
    ((1, 0, 0), (0, -1, 0)),  # FFP
    ((0, 1, 0), (-1, 0, 0)),  # on the left side, and transposed
    ((0, -1, 0), (1, 0, 0)),
    ((0, 1, 0), (1, 0, 0)),
    ((0, -1, 0), (-1, 0, 0)),
]


def body(x, y):
    """HU of a made body: 300 x 200 mm, spine behind, liver on the right, gas on the left."""
    hu = np.full(np.broadcast(x, y).shape, -1000.0)

    def ellipse(cx, cy, rx, ry, value):
        hu[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1] = value

    ellipse(0, 0, 150, 100, 40)
    ellipse(-70, -10, 55, 45, 110)
    ellipse(0, 65, 25, 25, 700)
    ellipse(75, -40, 30, 20, -900)
    return hu.astype(np.float32)


def reconstruct(shape, spacing, orientation=HFS, centre=(0.0, 0.0)):
    """An image of the body, sampled at pixel centres, of a field centred at `centre` (x, y)."""
    row, column = (np.array(v, float) for v in orientation)
    i, j = np.ogrid[: shape[0], : shape[1]]
    down, along = (i - (shape[0] - 1) / 2) * spacing[0], (j - (shape[1] - 1) / 2) * spacing[1]
    x, y = (centre[k] + along * row[k] + down * column[k] for k in (0, 1))
    return body(x, y)


def to_input(shape, spacing, orientation=HFS, centre=(0.0, 0.0)):
    image = reconstruct(shape, spacing, orientation, centre)
    return preprocess.to_input(image, spacing, (*orientation[0], *orientation[1]), SPEC).astype(int)


def difference(a, b):
    return np.abs(a - b).mean()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_however_the_patient_lies_the_input_is_that_of_hfs(orientation):
    shape, spacing = (150, 180), (2.5, 2.0)
    transposed = orientation[0][0] == 0
    turned = (shape[::-1], spacing[::-1]) if transposed else (shape, spacing)
    got = to_input(*turned, orientation)
    assert np.abs(got - to_input(shape, spacing)).max() <= 1  # rounding of a value at one half


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_however_the_patient_lies_a_fine_matrix_gives_nearly_the_input_of_hfs(orientation):
    # Every fourth pixel places the body, other ones when the image is turned.
    reference = to_input((512, 512), (0.8, 0.8))
    got = to_input((512, 512), (0.8, 0.8), orientation)
    assert difference(got, reference) < difference(np.roll(reference, 1, 1), reference) / 10


@pytest.mark.parametrize(
    ("shape", "spacing", "centre"),
    [
        ((256, 256), (1.7, 1.7), (0, 0)),  # another matrix
        ((512, 512), (0.65, 0.65), (0, 0)),  # another field of view
        ((512, 512), (0.977, 0.977), (0, 0)),
        ((256, 320), (1.8, 1.4), (0, 0)),  # pixels that are not square
        ((512, 512), (0.9, 0.9), (40, -60)),  # off-centre
        ((400, 400), (1.0, 1.0), (-35.3, 70.7)),
    ],
)
def test_another_reconstruction_gives_nearly_the_same_input(shape, spacing, centre):
    reference = to_input((512, 512), (0.8, 0.8))
    got = to_input(shape, spacing, HFS, centre)
    # Only pixels at an edge may differ: far less than a body one pixel (3.5 mm) away.
    for axis in (0, 1):
        assert difference(got, reference) < difference(np.roll(reference, 1, axis), reference) / 3
    assert (np.abs(got - reference) <= 1).mean() > 0.95


def test_lengths_are_kept_in_mm():
    inside = to_input((512, 512), (0.8, 0.8)) > 0
    # 300 x 200 mm at 3.5 mm, and an edge pixel that is covered in part on either side.
    assert inside.any(0).sum() == pytest.approx(300 / 3.5, abs=2)
    assert inside.any(1).sum() == pytest.approx(200 / 3.5, abs=2)


def test_columns_grow_to_the_left_and_rows_to_the_back():
    x = to_input((256, 256), (1.7, 1.7))
    bone_rows, bone_columns = np.nonzero(x > 230)
    gas_rows, gas_columns = np.nonzero(
        (x > 0) & (x < 40) & (np.hypot(*np.mgrid[-64:64, -64:64]) < 25)
    )
    assert bone_rows.mean() > 70
    assert abs(bone_columns.mean() - 63.5) < 3
    assert gas_columns.mean() > 70
    assert gas_rows.mean() < 60


def test_each_input_pixel_is_the_mean_of_what_it_covers():
    # 1.75 mm pixels, and no body to be centred on: 2 x 2 of them make one input pixel.
    image = np.random.default_rng(0).uniform(-1000, -400, (256, 256)).astype(np.float32)
    blocks = image.reshape(128, 2, 128, 2).mean((1, 3))
    got = preprocess.to_input(image, (1.75, 1.75), (1, 0, 0, 0, 1, 0), SPEC)
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - preprocess.compand(blocks, SPEC)).max() <= 1


def test_outside_of_the_image_is_air():
    # 64 pixels of 3.5 mm are the middle half of the input.
    image = np.full((64, 64), 50, np.float32)
    got = preprocess.to_input(image, (3.5, 3.5), (1, 0, 0, 0, 1, 0), SPEC)
    expected = np.zeros((128, 128))
    expected[32:96, 32:96] = 144  # 50 HU: 64 + (250 / 500) * 160
    np.testing.assert_array_equal(got, expected)


def test_below_air_is_air():
    image = np.full((128, 128), -1024, np.int16)
    got = preprocess.to_input(image, (3.5, 3.5), (1, 0, 0, 0, 1, 0), SPEC)
    assert not got.any()


def test_a_smaller_input_is_made_by_its_spec():
    spec = replace(SPEC, size=32, pixel_mm=14.0)
    got = preprocess.to_input(body(*np.ogrid[-200:200, -200:200]), (1, 1), (1, 0, 0, 0, 1, 0), spec)
    assert got.shape == (32, 32)


@pytest.mark.parametrize(
    ("hu", "value"),
    [
        (-3024, 0),
        (-1000, 0),
        (-600, 32),
        (-200, 64),
        (50, 144),
        (300, 224),
        (1500, 255),
        (3071, 255),
    ],
)
def test_hu_is_companded_piecewise(hu, value):
    assert preprocess.compand(np.array([float(hu)]), SPEC)[0] == value


def test_companding_never_falls():
    assert (np.diff(preprocess.compand(np.arange(-1100.0, 1600), SPEC).astype(int)) >= 0).all()


def test_the_body_is_centred_by_its_centroid():
    image = np.full((100, 120), -1000, np.float32)
    image[10:20, 30:50] = 0
    assert preprocess.body_centre(image, -300) == (14.5, 39.5)


def test_without_a_body_the_centre_is_that_of_the_image():
    image = np.full((100, 120), -1000, np.float32)
    image[50, :15] = 0  # 15 pixels are no body
    assert preprocess.body_centre(image, -300) == (49.5, 59.5)


def test_every_fourth_pixel_places_a_body_as_well_as_all_of_them():
    image = reconstruct((512, 512), (0.8, 0.8), HFS, (31.3, -17.9))
    rows, columns = np.nonzero(image > SPEC.body_hu)
    row, column = preprocess.body_centre(image, SPEC.body_hu)
    # A tenth of an input pixel.
    assert row == pytest.approx(rows.mean(), abs=0.35 / 0.8)
    assert column == pytest.approx(columns.mean(), abs=0.35 / 0.8)


def dense_weights(count, spacing_mm, centre, spec):
    """The weights of one axis as a matrix, (size, count): one page that says what is meant."""
    width = max(spec.pixel_mm, spacing_mm)
    target = (np.arange(spec.size) - (spec.size - 1) / 2) * spec.pixel_mm  # mm from the centre
    source = (np.arange(count) - centre) * spacing_mm
    distance = np.abs(target[:, None] - source[None, :]).astype(np.float32)
    overlap = (width + spacing_mm) / 2 - distance
    return np.clip(overlap, 0, min(width, spacing_mm)) / np.float32(width)


def dense_input(image_hu, spacing, orientation, spec):
    """What `to_input` is to give, by matrices of weights as wide as the image."""
    orientation = np.asarray(orientation, float)
    image = geometry.to_patient_axes(image_hu, orientation)
    row_mm, column_mm = spacing[::-1] if geometry.is_transposed(orientation) else spacing
    row, column = preprocess.body_centre(image, spec.body_hu)
    above_air = np.maximum(image, -1000).astype(np.float32) + 1000
    rows = dense_weights(image.shape[0], row_mm, row, spec)
    columns = dense_weights(image.shape[1], column_mm, column, spec)
    resampled = rows @ above_air @ columns.T - 1000
    return np.rint(np.interp(resampled, spec.hu, spec.value)).astype(np.uint8)


def banded(count, spacing_mm, centre, spec):
    """`area_weights` as a matrix, (size, count)."""
    first, step, weights = preprocess.area_weights(count, spacing_mm, centre, spec)
    blocks, block, width = weights.shape
    matrix = np.zeros((blocks * block, count), np.float32)
    for k in range(blocks):
        start = first + k * step
        a, b = min(max(start, 0), count), min(max(start + width, 0), count)
        matrix[k * block : (k + 1) * block, a:b] = weights[k][:, a - start : b - start]
        outside = weights[k].copy()
        outside[:, a - start : b - start] = 0
        assert not outside.any()
    return matrix[: spec.size]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    count=st.integers(1, 600),
    spacing=st.floats(0.1, 20),
    shift=st.floats(-1, 1),
    size=st.sampled_from([128, 32, 100]),
)
def test_area_weights_are_those_of_the_dense_matrix(count, spacing, shift, size):
    spec = replace(SPEC, size=size)
    centre = (count - 1) / 2 + shift * count
    expected = dense_weights(count, spacing, centre, spec)
    np.testing.assert_allclose(banded(count, spacing, centre, spec), expected, atol=2e-4)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    count=st.integers(1, 600),
    spacing=st.floats(0.1, 12),
    shift=st.floats(-1, 1),
)
def test_area_weights_sum_to_the_share_of_a_pixel_that_the_image_covers(count, spacing, shift):
    centre = (count - 1) / 2 + shift * count
    weights = banded(count, spacing, centre, SPEC)
    width = max(SPEC.pixel_mm, spacing)
    target = (np.arange(128) - 63.5) * 3.5
    first, last = (-0.5 - centre) * spacing, (count - 0.5 - centre) * spacing  # edges, mm
    covered = np.minimum(target + width / 2, last) - np.maximum(target - width / 2, first)
    assert weights.shape == (128, count)
    assert weights.dtype == np.float32
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), covered.clip(0) / width, atol=1e-3)


def test_area_weights_between_wide_pixels_interpolate():
    # 7 mm pixels, the middle one on the middle of the input: targets lie at +-1.75 mm, ...
    weights = banded(3, 7.0, 1.0, SPEC)
    np.testing.assert_allclose(weights[64], [0, 0.75, 0.25])
    np.testing.assert_allclose(weights[63], [0.25, 0.75, 0])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 520), st.integers(1, 520)),
    spacing=st.tuples(st.floats(0.3, 6), st.floats(0.3, 6)),
    orientation=st.sampled_from(ORIENTATIONS),
    seed=st.integers(0, 9),
)
def test_an_input_is_that_of_the_dense_matrices(shape, spacing, orientation, seed):
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    hu = np.where((x + 0.1 * seed) ** 2 + y**2 < 0.5, 40, -1010) + rng.normal(0, 30, shape)
    hu = hu.clip(-1024, 3071).astype(np.int16)
    cosines = (*orientation[0], *orientation[1])
    expected = dense_input(hu, spacing, cosines, SPEC).astype(int)
    stored = (hu + 1024).astype(np.uint16)
    for image, rescale in (
        (hu, Rescale()),
        (hu.astype(np.float32), Rescale()),
        (stored, Rescale(1, -1024)),
        (stored.astype(np.int16), Rescale(1, -1024, (-2000, -2000))),
        (2 * stored, Rescale(0.5, -1024)),
    ):
        got, _ = preprocess.crop(image, spacing, cosines, SPEC, rescale)
        off = np.abs(got.astype(int) - expected)
        assert off.max() <= 1  # a value at one half, rounded up or down
        assert (off > 0).mean() < 2e-3


def test_padding_is_air_whatever_it_is_stored_as():
    stored = np.full((64, 64), 1064, np.int16)
    stored[:, :20] = 1500
    padded = preprocess.crop(
        stored, (3.5, 3.5), (1, 0, 0, 0, 1, 0), SPEC, Rescale(1, -1024, (1500, 1500))
    )[0]
    hu = np.where(stored == 1500, -1000, 40)
    np.testing.assert_array_equal(
        padded, preprocess.to_input(hu, (3.5, 3.5), (1, 0, 0, 0, 1, 0), SPEC)
    )


def test_a_spec_survives_its_manifest():
    spec = replace(SPEC, pixel_mm=4.0)
    assert PreprocessSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"version": None}, {"windows": [1, 2]}], ids=lambda c: next(iter(c))
)
def test_a_spec_this_code_does_not_implement_is_refused(change):
    with pytest.raises(WeightsError):
        PreprocessSpec.from_dict(SPEC.to_dict() | change)


def test_a_spec_without_a_field_is_refused():
    values = SPEC.to_dict()
    del values["body_hu"]
    with pytest.raises(WeightsError):
        PreprocessSpec.from_dict(values)


def test_a_head_holder_alone_is_no_body():
    """A shell 2 pixels thick holds more area than a body must, and no body."""
    spec = PreprocessSpec()
    x = np.zeros((spec.size, spec.size), np.uint8)
    x[40:90, 30:32] = x[40:90, 96:98] = x[88:90, 30:98] = 200
    assert (x > 0).sum() * spec.pixel_mm**2 > 2 * spec.body_mm2
    assert preprocess.is_empty(x, spec)
    x[60:67, 60:67] = 150  # the last of the head, 25 mm wide
    assert not preprocess.is_empty(x, spec)
