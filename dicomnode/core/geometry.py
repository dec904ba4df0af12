"""Where slices lie: normal, position along it, order, spacing, gaps, duplicates, tilt."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.errors import GeometryError
from dicomnode.model import Flag, Floats, Reason

ORTHONORMAL_TOLERANCE = 1e-3
# Positions nearer than this are the same position: half the finest spacing in clinical CT.
SAME_POSITION_MM = 0.05
# A gap is a step of more than 1.5 median spacings: at least one slice may be missing there.
GAP_RATIO = 1.5
UNEVEN_RATIO = 0.1
# Steps beside a step, itself included, that tell what spacing is usual there.
NEIGHBOURS = 7


@dataclass(frozen=True, slots=True)
class Stack:
    """The order of slices along their common normal.

    `order` indexes the slices that were given, duplicates left out, so that
    `z_mm` is strictly increasing.
    """

    order: npt.NDArray[np.intp]  # (M,) M <= N
    z_mm: Floats  # (M,)
    flags: tuple[Flag, ...]


def slice_normal(image_orientation: Floats | tuple[float, ...]) -> Floats:
    """Return the unit slice normal, oriented towards the head.

    Parameters
    ----------
    image_orientation : (6,) float64
        Image Orientation (Patient) (0020,0037): row, then column direction cosines.

    Returns
    -------
    (3,) float64
        Unit normal with z >= 0 (LPS: +z is the head).

    Raises
    ------
    GeometryError
        If the direction cosines are not orthonormal within 1e-3.

    References
    ----------
    DICOM PS3.3 C.7.6.2.1.1.
    """
    # Of six numbers: numpy took 50 microseconds here, a fifth of a slice's share of a core.
    x, y, z, u, v, w = map(float, image_orientation)
    gram = (x * x + y * y + z * z, u * u + v * v + w * w, x * u + y * v + z * w)
    # Three decimals are common in the field: squares of such cosines miss 1 by up to 2e-3.
    off = max(abs(gram[0] - 1), abs(gram[1] - 1), abs(gram[2]))
    if not off <= 2 * ORTHONORMAL_TOLERANCE:
        told = [round(value, 4) for value in gram]
        raise GeometryError(f"direction cosines are not orthonormal: {told}")
    normal = (y * w - z * v, z * u - x * w, x * v - y * u)
    length = math.copysign(math.hypot(*normal), normal[2])
    return np.array([part / length for part in normal])


def slice_positions(image_position: Floats, normal: Floats) -> Floats:
    """Return the position of each slice along the slice normal.

    Parameters
    ----------
    image_position : (N, 3) float64
        Image Position (Patient) (0020,0032), mm, LPS.
    normal : (3,) float64
        Unit slice normal.

    Returns
    -------
    (N,) float64
        Position along the normal, mm. Not sorted.
    """
    return np.asarray(np.asarray(image_position, float) @ normal, float)


def tilt_degrees(normal: Floats) -> float:
    """Return the angle between slice normal and the patient's long axis, degrees 0..90."""
    return math.degrees(math.acos(min(abs(float(normal[2])), 1.0)))


def stack(image_position: Floats, image_orientation: Floats) -> Stack:
    """Return the order of slices of one Series, from feet to head.

    Never SliceLocation, InstanceNumber or table position: only Image Position
    (Patient) says where a slice lies. Of slices at one position the first is kept.

    Parameters
    ----------
    image_position : (N, 3) float64
        mm, LPS.
    image_orientation : (N, 6) float64
        Direction cosines of each slice.

    Raises
    ------
    GeometryError
        If the orientations differ by more than 1e-3: the slices are not one stack.
    """
    image_position = np.asarray(image_position, float).reshape(-1, 3)
    image_orientation = np.asarray(image_orientation, float).reshape(-1, 6)
    spread = np.ptp(image_orientation, axis=0).max()
    if spread > ORTHONORMAL_TOLERANCE:
        raise GeometryError(
            f"direction cosines differ by {spread:.4f} within one Series", Reason.NOT_ONE_STACK
        )
    z_mm = slice_positions(image_position, slice_normal(image_orientation[0]))
    order = np.argsort(z_mm, kind="stable")
    distinct = np.ones(len(order), bool)
    last = -np.inf
    for i, z in enumerate(z_mm[order]):  # against the last one kept, so that steps cannot creep
        distinct[i] = z - last > SAME_POSITION_MM
        last = z if distinct[i] else last
    flags = [] if distinct.all() else [Flag.DUPLICATE_POSITION]
    order = order[distinct]
    return Stack(order, z_mm[order], (*flags, *spacing_flags(z_mm[order])))


def spacing_flags(z_mm: Floats) -> tuple[Flag, ...]:
    """Return what is irregular about increasing positions, mm."""
    if len(z_mm) < 3:
        return ()
    steps = np.diff(z_mm)
    median = float(np.median(steps))
    flags = []
    if (steps > GAP_RATIO * median).any():
        flags.append(Flag.GAP)
    if (np.abs(steps - median) > UNEVEN_RATIO * median).any():
        flags.append(Flag.UNEVEN_SPACING)
    return tuple(flags)


def usual_steps(z_mm: Floats) -> Floats:
    """Return the median step around each step, (N - 1,) mm: what is usual may change on the way.

    Parameters
    ----------
    z_mm : (N,) float64
        Positions, strictly increasing, N >= 2.
    """
    around = np.pad(np.diff(z_mm), NEIGHBOURS // 2, mode="constant", constant_values=np.nan)
    usual: Floats = np.nanmedian(np.lib.stride_tricks.sliding_window_view(around, NEIGHBOURS), 1)
    return usual


def slice_spacing(steps_mm: Floats) -> Floats:
    """Return what each slice stands for, (N,) mm, of the usual steps (N - 1,) between them.

    The lesser of the two beside it; a slice at an end has but one.
    """
    spacing: Floats = np.minimum(np.append(steps_mm, np.inf), np.append(np.inf, steps_mm))
    return spacing


def to_patient_axes(image: npt.NDArray[Any], image_orientation: Floats) -> npt.NDArray[Any]:
    """Return the slice with columns growing to the patient's left and rows to posterior.

    Prone, decubitus and feet-first images are flipped or transposed into the one
    orientation that the network knows. A view, no copy.

    Parameters
    ----------
    image : (R, C)
        Pixels of one slice.
    image_orientation : (6,) float64
        Row, then column direction cosines; near-axial.
    """
    row, column = np.asarray(image_orientation, float).reshape(2, 3)
    if abs(row[1]) > abs(row[0]):  # the row direction runs front to back: a transposed image
        image, row, column = image.T, column, row
    if row[0] < 0:
        image = image[:, ::-1]
    if column[1] < 0:
        image = image[::-1]
    return image


def in_stored_axes(
    place: tuple[float, float], shape: tuple[int, ...], image_orientation: Floats
) -> tuple[float, float]:
    """Return where a place of the image that `to_patient_axes` gave lies in the one it was given.

    Parameters
    ----------
    place : (float, float)
        Row and column.
    shape : (int, int)
        Rows and columns as stored.
    """
    row, column = np.asarray(image_orientation, float).reshape(2, 3)
    (down, along), (rows, columns) = place, shape
    transposed = is_transposed(image_orientation)
    if transposed:
        row, column, rows, columns = column, row, columns, rows
    if row[0] < 0:
        along = columns - 1 - along
    if column[1] < 0:
        down = rows - 1 - down
    return (along, down) if transposed else (down, along)


@dataclass(frozen=True, slots=True)
class Plane:
    """Where the pixels lie of an image that `to_patient_axes` gave; all mm, LPS."""

    origin_mm: Floats  # (3,) centre of pixel (0, 0)
    row_step_mm: Floats  # (3,) from one row to the next, towards posterior
    column_step_mm: Floats  # (3,) from one column to the next, towards the left
    spacing_mm: tuple[float, float]  # between rows, between columns
    rows: int
    columns: int

    def at(self, row: float, column: float) -> Floats:
        """Return the point (3,) at a row and column, which need not be whole."""
        return self.origin_mm + row * self.row_step_mm + column * self.column_step_mm


def plane(
    image_position: tuple[float, ...] | Floats,
    image_orientation: tuple[float, ...] | Floats,
    pixel_spacing: tuple[float, ...] | Floats,
    shape: tuple[int, int],
) -> Plane:
    """Return where the pixels of a slice lie once `to_patient_axes` has turned it.

    Parameters
    ----------
    image_position : (3,)
        Image Position (Patient) (0020,0032), mm, LPS.
    image_orientation : (6,)
        Row, then column direction cosines; near-axial.
    pixel_spacing : (2,)
        mm between rows, mm between columns.
    shape : (int, int)
        Rows and columns as stored.

    References
    ----------
    DICOM PS3.3 C.7.6.2.1.1, Equation C.7.6.2.1-1.
    """
    origin = np.asarray(image_position, float)
    along_row, along_column = np.asarray(image_orientation, float).reshape(2, 3)
    row_step, column_step = along_column * pixel_spacing[0], along_row * pixel_spacing[1]
    (row_mm, column_mm), (rows, columns) = pixel_spacing, shape
    if is_transposed(np.asarray(image_orientation, float)):
        row_step, column_step = column_step, row_step
        row_mm, column_mm, rows, columns = column_mm, row_mm, columns, rows
    if column_step[0] < 0:
        origin, column_step = origin + (columns - 1) * column_step, -column_step
    if row_step[1] < 0:
        origin, row_step = origin + (rows - 1) * row_step, -row_step
    return Plane(origin, row_step, column_step, (row_mm, column_mm), rows, columns)


def is_transposed(image_orientation: Floats) -> bool:
    """Whether `to_patient_axes` swaps rows and columns (and so the two pixel spacings)."""
    return bool(abs(image_orientation[1]) > abs(image_orientation[0]))
