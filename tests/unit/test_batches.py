"""Inputs made in torch are those of `preprocess`."""

import numpy as np
import pytest
import torch

from dicomnode.core import batches, phantom, preprocess
from dicomnode.core.preprocess import PreprocessSpec

SPEC = PreprocessSpec()
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

on_every_device = pytest.mark.parametrize(
    "on",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)


def drawn(matrix: int, pixel_mm: float, centre_mm: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """A patient from the thighs to above the head, where there is nothing."""
    body = phantom.patient(3)
    marks = phantom.landmarks(body)
    z_mm = np.linspace(marks["ischial_tuberosities"], marks["vertex"] + 20, 9)
    return phantom.volume(body, z_mm, pixel_mm=pixel_mm, matrix=matrix, center_mm=centre_mm)


@on_every_device
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize(
    ("matrix", "pixel_mm", "centre_mm"),
    [
        (512, 0.78, (0.0, 0.0)),
        (512, 0.98, (25.0, -40.0)),
        (256, 1.56, (0.0, 30.0)),
        (100, 5.0, (0.0, 0.0)),  # coarser than the input: it interpolates
        (64, 3.5, (80.0, 0.0)),  # the body reaches over the edge
    ],
)
def test_inputs_are_those_of_the_cpu(on, dtype, matrix, pixel_mm, centre_mm):
    images = drawn(matrix, pixel_mm, centre_mm).astype(dtype)
    expected = [preprocess.to_input(image, (pixel_mm, pixel_mm), AXIAL, SPEC) for image in images]
    found = batches.to_inputs(torch.from_numpy(images).to(on), (pixel_mm, pixel_mm), SPEC)
    assert found.dtype == torch.uint8 and found.shape == (len(images), SPEC.size, SPEC.size)
    apart = np.abs(found.cpu().numpy().astype(int) - np.stack(expected))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-4
    assert np.stack(expected).std() > 10, "there is something to see"


@on_every_device
def test_pixels_need_not_be_square(on):
    image = drawn(256, 1.5)[4:5, ::2]
    expected = preprocess.to_input(image[0], (3.0, 1.5), AXIAL, SPEC)
    found = batches.to_inputs(torch.from_numpy(image.copy()).to(on), (3.0, 1.5), SPEC)[0]
    assert np.abs(found.cpu().numpy().astype(int) - expected).max() <= 1


@on_every_device
def test_the_middle_is_that_of_the_body_or_of_the_image(on):
    images = torch.full((3, 200, 300), -1000, dtype=torch.int16)
    images[0, 40:61, 100:141] = 0
    images[1, 0, :15] = 0  # a crumb
    images[2] = 0
    rows, columns = batches.body_centres(images.to(on), SPEC.body_hu)
    assert rows.tolist() == [50.0, 99.5, 99.5]
    assert columns.tolist() == [120.0, 149.5, 149.5]
    for k, image in enumerate(images.numpy()):
        assert preprocess.body_centre(image, SPEC.body_hu) == (rows[k], columns[k])


def test_every_value_is_companded_as_on_the_cpu():
    image_hu = np.arange(-1100, 1700, dtype=np.float32)
    expected = preprocess.compand(image_hu, SPEC)
    found = batches.compand(torch.from_numpy(image_hu), SPEC).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != expected).mean() < 0.01
    assert found[[0, 100, 900, 1400, 2600, 2799]].tolist() == [0, 0, 64, 224, 255, 255]
