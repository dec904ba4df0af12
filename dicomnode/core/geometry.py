"""Where slices lie: normal, position along it, order, spacing, gaps, duplicates, tilt."""

import math
from collections.abc import Sequence
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
    """The order of slices along the patient's long axis.

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


def axis_positions(
    image_position: Floats, normal: Floats, axis_mm: tuple[float, float] = (0.0, 0.0)
) -> Floats:
    """Return where each slice cuts a line along z: the patient's long axis.

    Of an axial slice that is its z. A tilted gantry stands still while the table moves along z:
    measured along the normal, its slices would lie closer than the body does, by the cosine of
    the tilt, which at 12 degrees and 900 mm from the origin is 20 mm.

    Parameters
    ----------
    image_position : (N, 3) float64
        Image Position (Patient) (0020,0032), mm, LPS.
    normal : (3,) float64
        Unit slice normal of a near-axial slice, towards the head.
    axis_mm : (float, float)
        x and y of the line, LPS: the middle of the body. Of a slice that leans by 12 degrees each
        mm by which it is wrong moves the slice by 0.2.

    Returns
    -------
    (N,) float64
        z, mm, LPS. Not sorted.
    """
    to_line = float(normal[0]) * axis_mm[0] + float(normal[1]) * axis_mm[1]
    return (slice_positions(image_position, normal) - to_line) / float(normal[2])


def tilt_degrees(normal: Floats) -> float:
    """Return the angle between slice normal and the patient's long axis, degrees 0..90."""
    return math.degrees(math.acos(min(abs(float(normal[2])), 1.0)))


def stack(
    image_position: Floats,
    image_orientation: Floats,
    axis_mm: tuple[float, float] = (0.0, 0.0),
) -> Stack:
    """Return the order of near-axial slices of one Series, from feet to head.

    Never SliceLocation, InstanceNumber or table position: only Image Position
    (Patient) says where a slice lies. Of slices at one position the first is kept.

    Parameters
    ----------
    image_position : (N, 3) float64
        mm, LPS.
    image_orientation : (N, 6) float64
        Direction cosines of each slice.
    axis_mm : (float, float)
        x and y of the patient's long axis, see `axis_positions`.

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
    z_mm = axis_positions(image_position, slice_normal(image_orientation[0]), axis_mm)
    order, place = places(z_mm)
    distinct = np.diff(place, prepend=-1) > 0
    flags = [] if distinct.all() else [Flag.DUPLICATE_POSITION]
    order = order[distinct]
    return Stack(order, z_mm[order], (*flags, *spacing_flags(z_mm[order])))


def are_parallel(image_orientation: Sequence[tuple[float, ...]] | Floats) -> bool:
    """Whether direction cosines, (N, 6), differ by no more than rounding: one stack."""
    values = np.asarray(image_orientation, float).reshape(-1, 6)
    return len(values) == 0 or bool(np.ptp(values, axis=0).max() <= ORTHONORMAL_TOLERANCE)


def places(z_mm: Floats) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the order of positions, (N,) mm, and the number of the place of each in that order.

    Slices nearer than `SAME_POSITION_MM` to the first one of a place are at that place. Of one
    place they keep the order in which they were given.
    """
    order = np.argsort(z_mm, kind="stable")
    place = np.zeros(len(order), np.intp)
    first, number = -np.inf, -1
    for i, z in enumerate(z_mm[order].tolist()):  # against the first, so that steps cannot creep
        if z - first > SAME_POSITION_MM:
            first, number = z, number + 1
        place[i] = number
    return order, place


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


# Patient Position -> row and column directions of an image as seen by one who faces the gantry: to
# the right, and down. Of decubitus right the right side is down; who goes in feet first is seen
# from the head.
_SEEN_FROM_GANTRY = {
    "HFS": (1, 0, 0, 0, 1, 0),
    "HFP": (-1, 0, 0, 0, -1, 0),
    "HFDR": (0, 1, 0, -1, 0, 0),
    "HFDL": (0, -1, 0, 1, 0, 0),
    "FFS": (-1, 0, 0, 0, 1, 0),
    "FFP": (1, 0, 0, 0, -1, 0),
    "FFDR": (0, -1, 0, -1, 0, 0),
    "FFDL": (0, 1, 0, 1, 0, 0),
}


def contradicts(patient_position: str, image_orientation: Floats | tuple[float, ...]) -> bool:
    """Whether an axial image lies otherwise than a scanner writes it for that Patient Position.

    It writes either what it sees, or turns the image so that the patient lies supine in it, seen
    from the feet. Anything else says that somebody was mistaken about how the patient lay: the
    body may be upside down in the image, or left and right exchanged. A Patient Position that is
    not told, or is none of the eight of a table, contradicts nothing.

    References
    ----------
    DICOM PS3.3 C.7.3.1.1.2 (Patient Position), C.7.6.2.1.1 (direction cosines).
    """
    seen = _SEEN_FROM_GANTRY.get(patient_position)
    if seen is None:
        return False
    turned = tuple(round(value) for value in image_orientation)
    return turned not in (seen, _SEEN_FROM_GANTRY["HFS"])
