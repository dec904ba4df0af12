"""Where the body's middle lies in the patient, and how far two scans are apart in plane."""

from dataclasses import replace

import numpy as np
import pytest

from dicomnode.core import geometry, outline, phantom, preprocess
from dicomnode.core.phantom import PhantomPatient
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.model import Quality, ScoreCurve

SPEC = PreprocessSpec()
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ORIENTATIONS = [
    (1, 0, 0, 0, 1, 0),  # HFS
    (-1, 0, 0, 0, -1, 0),  # HFP
    (-1, 0, 0, 0, 1, 0),  # FFS
    (1, 0, 0, 0, -1, 0),  # FFP
    (0, 1, 0, -1, 0, 0),  # on the left side, and transposed
    (0, -1, 0, 1, 0, 0),
    (0, 1, 0, 1, 0, 0),
    (0, -1, 0, -1, 0, 0),
]
OBLIQUE = (0.995, 0.0998, 0.0, -0.0998, 0.995, 0.0)  # turned by 5.7 degrees within the plane


def draw(shape, spacing, position, orientation, *shapes):
    """HU of ellipses (x, y, half width, half depth, HU), in mm, on a plane anywhere."""
    along_row, along_column = np.reshape(orientation, (2, 3)).astype(float)
    i, j = np.ogrid[: shape[0], : shape[1]]
    x, y = (
        position[k] + i * spacing[0] * along_column[k] + j * spacing[1] * along_row[k]
        for k in (0, 1)
    )
    hu = np.full(shape, -1000.0, np.float32)
    for cx, cy, rx, ry, value in shapes:
        hu[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1] = value
    return hu


def centre(image, spacing, position, orientation=AXIAL):
    x, middle = preprocess.crop(image, spacing, orientation, SPEC)
    plane = geometry.plane(position, orientation, spacing, image.shape)
    return outline.body_centre_mm(x, middle, plane, SPEC)


def corner(shape, spacing, orientation, middle):
    """The position of the first pixel of an image whose middle lies at `middle`."""
    along_row, along_column = np.reshape(orientation, (2, 3)).astype(float)
    half = (
        (shape[0] - 1) / 2 * spacing[0] * along_column,
        (shape[1] - 1) / 2 * spacing[1] * along_row,
    )
    return np.array([*middle, 0.0]) - half[0] - half[1]


@pytest.mark.parametrize("orientation", [*ORIENTATIONS, OBLIQUE])
def test_a_plane_tells_where_a_turned_pixel_lies(orientation):
    """A pixel is found again in patient axes, and lies where PS3.3 C.7.6.2.1.1 puts it."""
    image, spacing, position = np.arange(30.0).reshape(5, 6), (2.0, 3.0), (7.0, -11.0, 13.0)
    turned = geometry.to_patient_axes(image, np.asarray(orientation, float))
    plane = geometry.plane(position, orientation, spacing, image.shape)
    assert (plane.rows, plane.columns) == turned.shape
    along_row, along_column = np.reshape(orientation, (2, 3)).astype(float)
    for i, j in ((0, 0), (4, 0), (1, 5), (3, 2)):
        ((row, column),) = np.argwhere(turned == image[i, j])
        expected = np.array(position) + 2.0 * i * along_column + 3.0 * j * along_row
        np.testing.assert_allclose(plane.at(row, column), expected)
    assert plane.row_step_mm[1] > 0 and plane.column_step_mm[0] > 0
    np.testing.assert_allclose(np.linalg.norm(plane.row_step_mm), plane.spacing_mm[0], rtol=1e-3)


@pytest.mark.parametrize("orientation", [*ORIENTATIONS, OBLIQUE])
@pytest.mark.parametrize(
    ("shape", "spacing", "middle"),
    [
        ((256, 256), (1.8, 1.8), (0, 0)),
        ((512, 512), (0.8, 0.8), (5, -20)),  # another field of view, off-centre
        ((300, 240), (1.5, 2.0), (-12, 8)),  # neither a square nor square pixels
    ],
)
def test_the_centre_is_that_of_the_body_however_it_was_imaged(orientation, shape, spacing, middle):
    body = (12.5, -31.0, 150, 100, 40)
    position = corner(shape, spacing, orientation, middle)
    image = draw(shape, spacing, position, orientation, body)
    assert centre(image, spacing, position, orientation) == pytest.approx(body[:2], abs=1.0)


@pytest.mark.parametrize(
    "inside",
    [
        [(80, -20, 50, 60, -900)],  # one lung
        [(80, -20, 50, 60, -900), (-80, -20, 50, 60, -900), (0, 60, 20, 20, 700)],
    ],
)
def test_what_is_inside_the_body_does_not_move_its_centre(inside):
    position = corner((256, 256), (1.8, 1.8), AXIAL, (0, 0))
    image = draw((256, 256), (1.8, 1.8), position, AXIAL, (0, 0, 160, 110, 40), *inside)
    assert centre(image, (1.8, 1.8), position) == pytest.approx((0, 0), abs=2.0)


def test_a_table_cables_and_an_arm_are_not_of_the_body():
    position = corner((256, 256), (1.8, 1.8), AXIAL, (0, 40))
    image = draw((256, 256), (1.8, 1.8), position, AXIAL, (-30, 0, 140, 100, 40))
    image[210:212, 20:230] = 300  # a table top of 3.6 mm, beneath
    image[154:157, 60:160] = -100  # a blanket that touches
    image += draw((256, 256), (1.8, 1.8), position, AXIAL, (180, 20, 35, 35, 40)) + 1000
    assert centre(image, (1.8, 1.8), position) == pytest.approx((-30, 0), abs=1.5)


def test_both_thighs_are_the_body():
    position = corner((256, 256), (1.8, 1.8), AXIAL, (0, 0))
    thighs = (-90, 5, 70, 80, 40), (100, 5, 68, 80, 40)
    image = draw((256, 256), (1.8, 1.8), position, AXIAL, *thighs)
    assert centre(image, (1.8, 1.8), position) == pytest.approx((4, 5), abs=2.0)


def test_without_a_body_there_is_no_centre():
    assert centre(np.full((128, 128), -1000, np.float32), (3.5, 3.5), (0, 0, 0)) is None


@pytest.mark.parametrize("circle", [True, False])
def test_a_body_that_the_field_of_view_cuts_has_no_centre(circle):
    """Its outline is then in good part that of the image: 200 mm of a body of 320 mm."""
    position = corner((200, 200), (1.0, 1.0), AXIAL, (40, 0))
    image = draw((200, 200), (1.0, 1.0), position, AXIAL, (0, 0, 160, 110, 40))
    if circle:
        i, j = np.ogrid[-99.5:100, -99.5:100]
        image[i**2 + j**2 > 100**2] = -1024
    assert centre(image, (1.0, 1.0), position) is None


def test_a_body_larger_than_the_input_has_a_centre():
    """500 mm wide, of which the input shows 448: what is cut is cut on both sides."""
    position = corner((400, 400), (1.4, 1.4), AXIAL, (0, 0))
    image = draw((400, 400), (1.4, 1.4), position, AXIAL, (10, 15, 250, 180, 40))
    assert centre(image, (1.4, 1.4), position) == pytest.approx((10, 15), abs=2.0)


# The shift of two scans


def curve(z_mm, centres) -> ScoreCurve:
    z_mm = np.asarray(z_mm, float)
    n = len(z_mm)
    return ScoreCurve(
        "1.2",
        "m",
        z_mm,
        z_mm.astype(np.float32),
        z_mm,
        tuple(f"1.2.{k}" for k in range(n)),
        (1,) * n,
        Quality(1.0, 1.0),
        None if centres is None else np.asarray(centres, float),
    )


def path(z_mm):
    """A body whose middle wanders along its length."""
    z_mm = np.asarray(z_mm, float)
    return np.stack([5 * np.sin(z_mm / 60), 0.1 * z_mm], axis=1)


def test_the_shift_is_what_takes_moving_to_fixed():
    """x_fixed = x_moving + dx_mm: at other slice positions, with 40 mm along z."""
    fixed = curve(np.arange(0, 300, 3.0), path(np.arange(0, 300, 3.0)) + np.array([7, -4]))
    z = np.arange(50, 350, 5.0)
    moving = curve(z - 40.0, path(z))
    dx_mm, dy_mm = outline.in_plane(fixed, moving, 40.0)
    assert dx_mm == pytest.approx(7, abs=0.1)
    assert dy_mm == pytest.approx(-4, abs=0.01)
    dx_mm, dy_mm = outline.in_plane(moving, fixed, -40.0)
    assert (dx_mm, dy_mm) == pytest.approx((-7, 4), abs=0.1)


def test_a_third_of_slices_that_are_wrong_does_not_move_it():
    z = np.arange(0, 300, 3.0)
    centres = path(z)
    centres[::3] += (60, 30)  # an arm comes in
    assert outline.in_plane(curve(z, path(z)), curve(z, centres), 0.0) == pytest.approx(
        (0, 0), abs=1.0
    )


def test_slices_of_unknown_centre_are_left_out():
    z = np.arange(0, 300, 3.0)
    centres = path(z) + np.array([3, 2])
    centres[10:60] = np.nan
    found = outline.in_plane(curve(z, centres), curve(z, path(z)), 0.0)
    assert found == pytest.approx((3, 2))


def test_where_too_little_tells_nothing_is_said():
    z = np.arange(0, 300, 3.0)
    known = curve(z, path(z))
    few = path(z)
    few[outline.MIN_MATCHED - 1 :] = np.nan
    unknown = None, None
    assert outline.in_plane(known, curve(z, None), 0.0) == unknown
    assert outline.in_plane(curve(z, None), known, 0.0) == unknown
    assert outline.in_plane(known, curve(z, few), 0.0) == unknown
    assert outline.in_plane(known, curve(z, np.full((100, 2), np.nan)), 0.0) == unknown
    assert outline.in_plane(known, known, 290.0) == unknown  # 7 mm in common: 3 positions
    assert outline.in_plane(known, known, 1000.0) == unknown
    few[outline.MIN_MATCHED - 1] = path(z)[outline.MIN_MATCHED - 1]
    assert outline.in_plane(known, curve(z, few), 0.0) == (0.0, 0.0)


def phantom_curve(
    patient: PhantomPatient, z_mm, shift=(0.0, 0.0), recon=(0.0, 0.0), matrix=128, **options
) -> ScoreCurve:
    """A phantom that lies `shift` further in patient coordinates, reconstructed about `recon`."""
    pixel_mm = 460.0 / matrix
    images = phantom.volume(
        patient,
        z_mm,
        pixel_mm=pixel_mm,
        matrix=matrix,
        center_mm=(recon[0] - shift[0], recon[1] - shift[1]),
        **options,
    )
    first = np.array(recon) - (matrix - 1) / 2 * pixel_mm
    return curve(
        z_mm,
        [
            centre(image, (pixel_mm, pixel_mm), (*first, float(z))) or (np.nan, np.nan)
            for image, z in zip(images, z_mm, strict=True)
        ],
    )


@pytest.mark.parametrize("tables", [(True, True), (False, False), (True, False)])
def test_a_phantom_that_lies_elsewhere_is_shifted_by_as_much(tables):
    """On another place of the table, in another field of view, in another matrix."""
    patient = replace(phantom.patient(3), arms="up")
    z_mm = np.arange(60.0, 360, 12)
    moving = phantom_curve(patient, z_mm, table=tables[0], seed=1)
    fixed = phantom_curve(
        patient, z_mm, (18.0, -23.0), recon=(10.0, -15.0), matrix=150, table=tables[1], seed=2
    )
    found = outline.in_plane(fixed, moving, 0.0)
    assert found == pytest.approx((18.0, -23.0), abs=2.0)


def test_moving_the_field_of_view_alone_is_no_shift():
    patient = phantom.patient(4)
    z_mm = np.arange(100.0, 300, 12)
    one = phantom_curve(patient, z_mm, seed=1)
    other = phantom_curve(patient, z_mm, recon=(14.0, -9.0), seed=2)
    assert outline.in_plane(one, other, 0.0) == pytest.approx((0.0, 0.0), abs=1.0)
