"""HU slice -> network input; PreprocessSpec is the only statement of what the network sees."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.core import geometry
from dicomnode.core.pixels import AIR_HU
from dicomnode.errors import WeightsError
from dicomnode.model import Floats

Image = npt.NDArray[Any]
Input = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """What is done to a slice before the network sees it; part of every weight bundle.

    The field of view is fixed in mm: the reconstruction field differs between
    timepoints, and scaling it to the input would move the score.
    """

    version: int = 1
    size: int = 128  # rows and columns of the input
    pixel_mm: float = 3.5  # 448 mm field of view
    # The one channel is companded: 3.1 HU a step in soft tissue, 12.5 in lung, 39 in bone,
    # so that 8 bits hold what a wide and a soft tissue window would.
    hu: tuple[float, ...] = (-1000.0, -200.0, 300.0, 1500.0)
    value: tuple[float, ...] = (0.0, 64.0, 224.0, 255.0)
    # The input is centred on the body: patients lie off-centre on the table.
    body_hu: float = -300.0
    body_mm2: float = 500.0  # less of it than that is no body: the vertex has more

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as the manifest of a bundle holds it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PreprocessSpec":
        """Return the spec of a manifest.

        Raises
        ------
        WeightsError
            If it was written for a version that this code does not implement.
        """
        if not isinstance(values, dict):
            raise WeightsError("the bundle does not say how its input is made")
        known = {f.name for f in fields(cls)}
        if values.get("version") != cls().version or set(values) != known:
            raise WeightsError(
                f"the bundle's preprocessing, version {values.get('version')} of {sorted(values)}, "
                f"is not the one of this node, version {cls().version} of {sorted(known)}"
            )
        parts: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**parts)


def to_input(
    image_hu: Image,
    pixel_spacing: tuple[float, ...] | Floats,
    image_orientation: tuple[float, ...] | Floats,
    spec: PreprocessSpec,
) -> Input:
    """Return one slice as the network sees it.

    In patient axes (columns to the left, rows to posterior), centred on the
    body, area-averaged to `spec.pixel_mm`, air outside the image, companded to 8 bits.

    Parameters
    ----------
    image_hu : (R, C) float32 or int16
        HU.
    pixel_spacing : (2,)
        Pixel Spacing (0028,0030): mm between rows, mm between columns.
    image_orientation : (6,)
        Row, then column direction cosines; near-axial.

    Returns
    -------
    (size, size) uint8
    """
    return crop(image_hu, pixel_spacing, image_orientation, spec)[0]


def crop(
    image_hu: Image,
    pixel_spacing: tuple[float, ...] | Floats,
    image_orientation: tuple[float, ...] | Floats,
    spec: PreprocessSpec,
) -> tuple[Input, tuple[float, float]]:
    """Return what `to_input` does, and what lies in the middle of it.

    Returns
    -------
    (size, size) uint8
        The input.
    (float, float)
        Row and column of its middle, in pixels of the image in patient axes.
    """
    orientation = np.asarray(image_orientation, float)
    image = geometry.to_patient_axes(image_hu, orientation)
    row_mm, column_mm = pixel_spacing
    if geometry.is_transposed(orientation):
        row_mm, column_mm = column_mm, row_mm
    centre_row, centre_column = body_centre(image, spec.body_hu)
    rows = area_weights(image.shape[0], row_mm, centre_row, spec)
    columns = area_weights(image.shape[1], column_mm, centre_column, spec)
    # Above air, so that what lies outside the image (weight 0) comes out as air.
    above_air = np.maximum(image, AIR_HU).astype(np.float32) - np.float32(AIR_HU)
    resampled_hu = rows @ above_air @ columns.T + np.float32(AIR_HU)  # (size, size)
    return compand(resampled_hu, spec), (centre_row, centre_column)


def is_empty(x: Input, spec: PreprocessSpec) -> bool:
    """Whether an input shows less body than `spec.body_mm2`: it then has no height.

    Air above the head, and the padding of resampled volumes: scored, such slices
    broke the curves of 60 of the 64 head and neck series that the default bundle saw.
    """
    body = x > np.interp(spec.body_hu, spec.hu, spec.value)
    if body.sum() * spec.pixel_mm**2 < spec.body_mm2:
        return True
    # A head holder is a shell, one or two pixels thick: only what holds 3 x 3 pixels is body.
    inner = body[:-2] & body[1:-1] & body[2:]
    inner = inner[:, :-2] & inner[:, 1:-1] & inner[:, 2:]
    return not inner.any()


def compand(image_hu: Image, spec: PreprocessSpec) -> Input:
    """Return HU as 8-bit values by the spec's piecewise linear map, any shape."""
    return np.rint(np.interp(image_hu, spec.hu, spec.value)).astype(np.uint8)


def body_centre(image_hu: Image, body_hu: float) -> tuple[float, float]:
    """Return the centroid (row, column) of pixels above `body_hu`, in pixels.

    The centre of the image where there is no body.
    """
    # Every fourth pixel of a 512 matrix places the centroid as well as all of them.
    step = max(1, min(image_hu.shape) // 128)
    body = image_hu[::step, ::step] > body_hu
    total = int(body.sum())
    if total < 16:
        return (image_hu.shape[0] - 1) / 2, (image_hu.shape[1] - 1) / 2
    by_row, by_column = body.sum(1), body.sum(0)
    return (
        float(by_row @ np.arange(len(by_row)) / total * step),
        float(by_column @ np.arange(len(by_column)) / total * step),
    )


def area_weights(
    count: int, spacing_mm: float, centre: float, spec: PreprocessSpec
) -> npt.NDArray[np.float32]:
    """Return the weights that average `count` pixels of one axis to the input's pixels.

    Each output pixel is the mean over its own width, or over an input pixel's
    width where those are wider, which is linear interpolation.

    Returns
    -------
    (size, count) float32
        Rows sum to 1 inside the image, to less across its edge, to 0 outside.
    """
    width = max(spec.pixel_mm, spacing_mm)
    target = (np.arange(spec.size) - (spec.size - 1) / 2) * spec.pixel_mm  # mm from the centre
    source = (np.arange(count) - centre) * spacing_mm
    distance = np.abs(target[:, None] - source[None, :]).astype(np.float32)  # (size, count)
    overlap = (width + spacing_mm) / 2 - distance
    weights: npt.NDArray[np.float32] = np.clip(overlap, 0, min(width, spacing_mm)) / np.float32(
        width
    )
    return weights
