"""Slices are ordered along their normal, and what is irregular about them is told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode.core import geometry
from dicomnode.errors import GeometryError
from dicomnode.model import Flag, Reason

AXIAL = (1, 0, 0, 0, 1, 0)
CORONAL = (1, 0, 0, 0, 0, -1)
SAGITTAL = (0, 1, 0, 0, 0, -1)

# Row and column directions of a pixel array whose rows and columns lie along the patient's axes.
LEFT, RIGHT, BACK, FRONT = (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0)


def tilted(degrees: float) -> tuple[float, ...]:
    """The orientation of an axial slice turned about the patient's left-right axis."""
    angle = np.radians(degrees)
    return (1, 0, 0, 0, np.cos(angle), np.sin(angle))


def positions(z_mm, x_mm=0.0, y_mm=0.0):
    return np.column_stack(np.broadcast_arrays(x_mm, y_mm, np.asarray(z_mm, float)))


def stack(z_mm, orientation=AXIAL):
    return geometry.stack(positions(z_mm), np.tile(orientation, (len(z_mm), 1)))


@pytest.mark.parametrize(
    "orientation",
    [
        (1, 0, 0, 0, 1, 0),  # HFS
        (-1, 0, 0, 0, -1, 0),  # HFP
        (-1, 0, 0, 0, 1, 0),  # FFS: row x column points to the feet
        (1, 0, 0, 0, -1, 0),  # FFP
        (0, 1, 0, -1, 0, 0),  # decubitus
    ],
)
def test_the_normal_of_an_axial_slice_points_to_the_head(orientation):
    np.testing.assert_allclose(geometry.slice_normal(np.array(orientation)), [0, 0, 1], atol=1e-12)


def test_the_normal_of_a_tilted_slice_is_row_cross_column():
    # (1, 0, 0) x (0, cos, sin) = (0, -sin, cos)
    expected = [0, -0.5, np.sqrt(3) / 2]
    np.testing.assert_allclose(geometry.slice_normal(np.array(tilted(30))), expected, atol=1e-12)


def test_the_normal_has_unit_length_where_cosines_are_rounded_to_three_decimals():
    # cos 15 and sin 15 degrees: 0.966^2 + 0.259^2 = 1.000237.
    normal = geometry.slice_normal(np.array([0.966, 0.259, 0, -0.259, 0.966, 0]))
    assert np.linalg.norm(normal) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "orientation",
    [
        (0, 0, 0, 0, 0, 0),
        (2, 0, 0, 0, 1, 0),
        (1, 0, 0, 0.1, 1, 0),
        (1, 0, 0, 1, 0, 0),
        (np.nan, 0, 0, 0, 1, 0),
    ],
)
def test_cosines_that_are_not_orthonormal_are_refused(orientation):
    with pytest.raises(GeometryError) as caught:
        geometry.slice_normal(np.array(orientation))
    assert caught.value.reason is Reason.NO_GEOMETRY


@pytest.mark.parametrize(
    ("orientation", "degrees"),
    [(AXIAL, 0), (tilted(10), 10), (tilted(-25), 25), (CORONAL, 90), (SAGITTAL, 90)],
)
def test_tilt_is_the_angle_to_the_long_axis(orientation, degrees):
    normal = geometry.slice_normal(np.array(orientation))
    assert geometry.tilt_degrees(normal) == pytest.approx(degrees, abs=1e-6)


def test_a_position_is_the_projection_on_the_normal():
    got = geometry.slice_positions(np.array([[3, 4, 10], [3, 9, 10]]), np.array([0, -0.6, 0.8]))
    np.testing.assert_allclose(got, [8 - 2.4, 8 - 5.4])


def test_a_tilted_stack_is_measured_along_the_long_axis():
    # The table moves 5 mm along z between slices, wherever the corner of the image lies. The
    # plane through (x, -200, z) that leans by 20 degrees cuts the axis 200 tan 20 higher.
    z_mm = np.arange(0, 50, 5.0)
    got = geometry.stack(positions(z_mm, -250, -200), np.tile(tilted(20), (10, 1)))
    np.testing.assert_allclose(got.z_mm, z_mm + 200 * np.tan(np.radians(20)))


def test_a_reconstruction_that_wanders_in_plane_keeps_its_positions():
    z = np.arange(0, 50, 5.0)
    wandering = positions(z, x_mm=np.linspace(-30, 30, 10), y_mm=np.linspace(10, -10, 10))
    got = geometry.stack(wandering, np.tile(AXIAL, (10, 1)))
    np.testing.assert_allclose(got.z_mm, z)
    assert got.flags == ()


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.permutations(range(12)), st.sampled_from([AXIAL, (-1, 0, 0, 0, 1, 0), tilted(12)]))
def test_order_is_from_feet_to_head_in_whatever_order_slices_come(order, orientation):
    z = np.linspace(-100, 10, 12)
    got = stack(z[list(order)], orientation)
    np.testing.assert_array_equal(np.array(order)[got.order], np.arange(12))
    assert (np.diff(got.z_mm) > 0).all()


def test_of_two_slices_at_one_position_the_first_is_kept_and_it_is_told():
    got = stack([0, 5, 10, 5, 15])
    assert got.order.tolist() == [0, 1, 2, 4]
    assert got.flags == (Flag.DUPLICATE_POSITION,)


def test_steps_below_the_tolerance_do_not_add_up():
    # Each step is 0.04 mm, below 0.05; but 0.08 is a position of its own.
    got = stack([0, 0.04, 0.08, 0.12])
    assert got.order.tolist() == [0, 2]
    assert got.flags == (Flag.DUPLICATE_POSITION,)


@pytest.mark.parametrize(
    ("z_mm", "flags"),
    [
        ([0, 5, 10, 15, 20], ()),
        ([0, 5.02, 9.99, 15.01, 20], ()),  # rounded positions
        ([0, 5, 10, 20, 25], (Flag.GAP, Flag.UNEVEN_SPACING)),  # one slice is missing
        ([0, 5, 10, 16, 21], (Flag.UNEVEN_SPACING,)),  # 6 mm is 1.2 of the median
        ([0, 5, 10, 12.5, 15, 17.5, 20], (Flag.GAP, Flag.UNEVEN_SPACING)),  # 5 mm, then 2.5 mm
        ([0, 5], ()),
    ],
)
def test_irregular_spacing_is_told(z_mm, flags):
    assert geometry.spacing_flags(np.array(z_mm, float)) == flags
    assert stack(z_mm).flags == flags


def test_slices_of_two_orientations_are_not_one_stack():
    with pytest.raises(GeometryError) as caught:
        geometry.stack(positions([0, 5, 10]), np.array([AXIAL, AXIAL, tilted(1)]))
    assert caught.value.reason is Reason.NOT_ONE_STACK


def test_orientations_that_differ_by_rounding_are_one_stack():
    # 0.05 degrees: sin = 0.0009
    got = geometry.stack(positions([0, 5, 10]), np.array([AXIAL, tilted(0.05), AXIAL]))
    np.testing.assert_allclose(got.z_mm, [0, 5, 10])


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        # The array is [[0, 1, 2], [3, 4, 5]]; expected has columns to the left, rows to the back.
        (LEFT, BACK, [[0, 1, 2], [3, 4, 5]]),
        (RIGHT, BACK, [[2, 1, 0], [5, 4, 3]]),
        (LEFT, FRONT, [[3, 4, 5], [0, 1, 2]]),
        (RIGHT, FRONT, [[5, 4, 3], [2, 1, 0]]),
        (BACK, LEFT, [[0, 3], [1, 4], [2, 5]]),
        (BACK, RIGHT, [[3, 0], [4, 1], [5, 2]]),
        (FRONT, LEFT, [[2, 5], [1, 4], [0, 3]]),
        (FRONT, RIGHT, [[5, 2], [4, 1], [3, 0]]),
    ],
)
def test_pixels_are_turned_into_patient_axes(row, column, expected):
    image = np.arange(6).reshape(2, 3)
    orientation = np.array([*row, *column], float)
    turned = geometry.to_patient_axes(image, orientation)
    np.testing.assert_array_equal(turned, expected)
    assert np.shares_memory(turned, image)
    assert geometry.is_transposed(orientation) == (row in (BACK, FRONT))


# What is down, in patient coordinates, by the words of PS3.3 C.7.3.1.1.2: "Decubitus Right is
# defined as the patient's right side being positioned in a downward direction".
DOWN = {"S": BACK, "P": FRONT, "DR": RIGHT, "DL": LEFT}


@pytest.mark.parametrize("lying", DOWN)
@pytest.mark.parametrize("first", ["HF", "FF"])
def test_an_image_as_seen_from_before_the_gantry_contradicts_no_patient_position_but_its_own(
    first, lying
):
    """One who faces the gantry looks at the patient's head where that is the far end."""
    away = np.array([0, 0, 1 if first == "HF" else -1])
    down = np.array(DOWN[lying])
    seen = (*np.cross(down, away), *down)  # to the right of who looks, and down
    agreeing = [
        a + b
        for a in ("HF", "FF")
        for b in DOWN
        if not geometry.contradicts(a + b, tuple(map(float, seen)))
    ]
    # A Patient Position that is told in another way, or not, contradicts nothing.
    assert not any(geometry.contradicts(p, tuple(map(float, seen))) for p in ("", "SITTING"))
    # That image of head first supine is also how scanners turn all the others.
    assert agreeing == (
        [a + b for a in ("HF", "FF") for b in DOWN] if seen == AXIAL else [first + lying]
    )
