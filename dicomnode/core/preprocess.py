"""HU slice -> network input; PreprocessSpec is the only statement of what the network sees."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from dicomnode.core import geometry, pixels
from dicomnode.core.pixels import AIR_HU
from dicomnode.errors import WeightsError
from dicomnode.model import Floats

Image = npt.NDArray[Any]
Input = npt.NDArray[np.uint8]

# Output pixels that are averaged at a time: 512 x 512 pixels take 0.15 ms so, where matrices of
# weights as wide as the image took 1.6.
BLOCK = 16


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
    image: Image,
    pixel_spacing: tuple[float, ...] | Floats,
    image_orientation: tuple[float, ...] | Floats,
    spec: PreprocessSpec,
    rescale: pixels.Rescale = pixels.Rescale(),  # noqa: B008 (frozen)
) -> tuple[Input, tuple[float, float]]:
    """Return what `to_input` does, and what lies in the middle of it.

    Parameters
    ----------
    image : (R, C) integer or float32
        Stored values, of which `rescale` makes HU.

    Returns
    -------
    (size, size) uint8
        The input.
    (float, float)
        Row and column of its middle, in pixels of the image in patient axes.
    """
    if not rescale.keeps_order(image.dtype):
        image, rescale = pixels.to_hu(image, rescale), pixels.Rescale()
    orientation = np.asarray(image_orientation, float)
    turned = geometry.to_patient_axes(image, orientation)
    centre = body_centre(turned, rescale.stored(spec.body_hu))
    # Averaged as it is stored, row by row, and turned when it is small.
    stored_centre = geometry.in_stored_axes(centre, image.shape, orientation)
    above_air = _average(image, rescale.stored(AIR_HU), pixel_spacing, stored_centre, spec)
    above_air = geometry.to_patient_axes(above_air, orientation)
    resampled_hu = above_air * np.float32(rescale.slope) + np.float32(AIR_HU)
    return compand(resampled_hu, spec), centre


def is_empty(x: Input, spec: PreprocessSpec) -> bool:
    """Whether an input shows less body than `spec.body_mm2`: it then has no height.

    Air above the head, and the padding of resampled volumes: scored, such slices
    broke the curves of 60 of the 64 head and neck series that the default bundle saw.
    """
    body = x > body_value(spec)
    if np.count_nonzero(body) * spec.pixel_mm**2 < spec.body_mm2:
        return True
    # A head holder is a shell, one or two pixels thick: only what holds 3 x 3 pixels is body.
    inner = body[:-2] & body[1:-1] & body[2:]
    inner = inner[:, :-2] & inner[:, 1:-1] & inner[:, 2:]
    return not inner.any()


def body_value(spec: PreprocessSpec) -> np.uint8:
    """Return the largest value of an input that is no body."""
    return np.uint8(np.interp(spec.body_hu, spec.hu, spec.value))


def compand(image_hu: Image, spec: PreprocessSpec) -> Input:
    """Return HU as 8-bit values by the spec's piecewise linear map, any shape."""
    # A sum of what lies within each piece: a quarter of the time of `np.interp`.
    value: Image = np.zeros(image_hu.shape, np.float32)
    below = spec.value[0]
    knots = zip(spec.hu, spec.hu[1:], spec.value, spec.value[1:], strict=False)
    for low, high, low_value, high_value in knots:
        slope = (high_value - low_value) / (high - low)
        below -= low * slope
        value += image_hu.clip(np.float32(low), np.float32(high)) * np.float32(slope)
    value += np.float32(below)
    return np.rint(value, out=value).astype(np.uint8)


def body_centre(image: Image, body: float) -> tuple[float, float]:
    """Return the centroid (row, column) of pixels above `body`, in pixels.

    The centre of the image where there is no body.
    """
    # Every fourth pixel of a 512 matrix places the centroid as well as all of them.
    step = max(1, min(image.shape) // 128)
    # Between two whole numbers is none: comparing such with a float would convert them all.
    limit = math.floor(body) if image.dtype.kind in "iu" else body
    above = (image[::step, ::step] > limit).astype(np.float32)  # counts below 2**24 are exact
    by_row, by_column = above.sum(1), above.sum(0)
    total = int(by_row.sum())
    if total < 16:
        return (image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2
    return (
        float(by_row.astype(float) @ np.arange(len(by_row)) / total * step),
        float(by_column.astype(float) @ np.arange(len(by_column)) / total * step),
    )


def area_weights(
    count: int, spacing_mm: float, centre: float, spec: PreprocessSpec, block: int = BLOCK
) -> tuple[int, int, npt.NDArray[np.float32]]:
    """Return the weights that average `count` pixels of one axis to the input's pixels.

    Each output pixel is the mean over its own width, or over an input pixel's
    width where those are wider, which is linear interpolation. Of so many pixels it
    takes but a few that output pixels are dealt with by blocks of neighbours.

    Returns
    -------
    first, step : int
        Block k looks at pixels from `first + k * step` on; some may lie outside of the image.
    weights : (blocks, block, width) float32
        Of each of those, for each output pixel of a block. They sum to 1 inside the image, to
        less across its edge, to 0 outside. The last block may go beyond `spec.size`.
    """
    width, blocks = max(spec.pixel_mm, spacing_mm), -(-spec.size // block)
    # In pixels of the image: from one output pixel to the next, and as far as one of them sees.
    pitch, reach = spec.pixel_mm / spacing_mm, (width / spacing_mm + 1) / 2
    start = centre - (spec.size - 1) / 2 * pitch
    first, step = math.floor(start - reach), int(block * pitch)
    drift = block * pitch - step
    count_seen = math.floor(start + (block - 1) * pitch + (blocks - 1) * drift + reach) - first + 1
    target = (np.arange(blocks) * drift)[:, None] + (np.arange(block) * pitch + start - first)
    seen = np.arange(count_seen, dtype=np.float32)
    weights = np.subtract(target.astype(np.float32)[:, :, None], seen)
    np.abs(weights, out=weights)  # (blocks, block, width): the distance
    np.subtract(np.float32(reach), weights, out=weights)  # the overlap
    weights *= np.float32(spacing_mm / width)
    np.maximum(weights, np.float32(0), out=weights)
    np.minimum(weights, np.float32(min(width, spacing_mm) / width), out=weights)
    if first < 0 or first + (blocks - 1) * step + count_seen > count:
        source = (first + step * np.arange(blocks))[:, None] + np.arange(count_seen)
        weights *= ((source >= 0) & (source < count))[:, None, :]
    return first, step, weights


def _average(
    image: Image,
    air: float,
    pixel_spacing: tuple[float, ...] | Floats,
    centre: tuple[float, float],
    spec: PreprocessSpec,
) -> npt.NDArray[np.float32]:
    """Return by how much the means over the input's pixels lie above `air`, (size, size).

    Values are clipped at air, and outside of the image there is nothing else: 0.
    """
    (rows, columns), (row_mm, column_mm) = image.shape, pixel_spacing
    top, down, row_weights = area_weights(rows, row_mm, centre[0], spec)
    left, along, column_weights = area_weights(columns, column_mm, centre[1], spec)
    width = (len(column_weights) - 1) * along + column_weights.shape[2]
    # The columns that count, and where they lie among all that the windows look at.
    begin, end = min(max(left, 0), columns), max(min(left + width, columns), 0)
    inside = slice(begin - left, max(end, begin) - left)
    image = image[:, begin:end]
    # By parts that fit a cache; for arrays of megabytes the time goes in page faults.
    height = row_weights.shape[2]
    clipped = np.empty((height, image.shape[1]), image.dtype)
    floor = np.full_like(clipped, air)
    part = np.zeros((height, width), np.float32)
    by_row = np.zeros((len(row_weights) * BLOCK, width), np.float32)
    for k, weights in enumerate(row_weights):
        start = top + k * down
        a, b = max(start, 0), min(start + height, rows)
        if a >= b:
            continue
        n = b - a
        np.maximum(image[a:b], floor[:n], out=clipped[:n])
        part[:n, inside] = clipped[:n]
        out = by_row[k * BLOCK : (k + 1) * BLOCK]
        np.dot(weights[:, a - start : b - start], part[:n], out=out)
    windows = as_strided(  # (blocks, rows, window)
        by_row,
        (len(column_weights), len(by_row), column_weights.shape[2]),
        (along * by_row.itemsize, *by_row.strides),
        writeable=False,
    )
    by_window = np.ascontiguousarray(column_weights.swapaxes(1, 2))
    mean = windows @ by_window  # (blocks, rows, BLOCK)
    mean = mean.swapaxes(0, 1).reshape(len(by_row), -1)[: spec.size, : spec.size]
    by_rows = row_weights.sum(2).ravel()[: spec.size, None] * np.float32(air)
    by_columns = column_weights.sum(2).ravel()[: spec.size]
    mean -= by_rows * by_columns
    return mean
