"""The phantom is the body it says it is: same seed, known levels, LPS, plausible HU."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from dicomnode.core import anatomy, phantom

AVERAGE = phantom.PhantomPatient(seed=0)
SEEDS = (0, 1, 2, 3)


def draw(
    patient: phantom.PhantomPatient, *heights: float, **options: object
) -> npt.NDArray[np.int16]:
    """Slices at heights of the average adult, without noise or table unless asked for."""
    settings = {"pixel_mm": 3.5, "matrix": 128, "noise_hu": 0.0, "table": False, **options}
    return phantom.volume(patient, np.array(heights) * patient.length, **settings)  # type: ignore[arg-type]


def patch(
    image: npt.NDArray[np.int16], x_mm: float, y_mm: float, half_mm: float = 5
) -> npt.NDArray[np.int16]:
    """The pixels of a 128 x 3.5 mm image within `half_mm` of a point of the average adult."""
    axis = (np.arange(128) - 63.5) * 3.5
    rows, columns = abs(axis - y_mm) <= half_mm, abs(axis - x_mm) <= half_mm
    return image[np.ix_(rows, columns)]


def test_same_seed_gives_the_same_volume():
    z = np.array([-90.0, 100.0, 300.0, 640.0])
    one, two = (
        phantom.volume(phantom.patient(5), z, pixel_mm=3.5, matrix=128, seed=9) for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)
    assert one.shape == (4, 128, 128)
    assert one.dtype == np.int16


def test_another_seed_is_another_patient():
    assert phantom.patient(1) != phantom.patient(2)
    a, b = (draw(replace(AVERAGE, seed=seed), 200)[0] for seed in (1, 2))
    assert (a != b).mean() > 0.05


def test_a_patient_is_within_the_stated_range():
    for seed in range(50):
        patient = phantom.patient(seed)
        assert 0.9 <= patient.length <= 1.1
        assert 0.8 <= patient.width <= 1.2
        assert 0.8 <= patient.depth <= 1.2
        assert 0 <= patient.contrast <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_each_height_looks_different(seed):
    patient = phantom.patient(seed)
    slices = draw(patient, *range(-340, 730, 20)).astype(np.float64)
    steps = np.abs(np.diff(slices, axis=0)).mean(axis=(1, 2))
    assert steps.min() > 1


def test_appearance_is_continuous_in_height():
    patient = phantom.patient(1)
    heights = np.arange(-340, 740, 4.0)
    steps = np.abs(draw(patient, *heights).astype(float) - draw(patient, *(heights + 0.1)))
    # A patch of 10 cm2 (82 pixels) that comes from nowhere with 600 HU would add 3 HU.
    assert steps.mean(axis=(1, 2)).max() < 3


def test_a_slice_depends_on_its_position_alone():
    z = np.arange(-300, 700, 100.0)
    whole = draw(AVERAGE, *z)
    np.testing.assert_array_equal(whole[3:], draw(AVERAGE, *z[3:]))
    np.testing.assert_array_equal(whole[::-1], draw(AVERAGE, *z[::-1]))


def test_length_moves_levels_but_keeps_them_alike():
    long = replace(AVERAGE, length=1.1)
    np.testing.assert_array_equal(draw(AVERAGE, 100, 350), draw(long, 100, 350))
    assert phantom.landmarks(long)["carina"] == pytest.approx(1.1 * 372)


@pytest.mark.parametrize("seed", SEEDS)
def test_landmarks_rise_from_feet_to_head(seed):
    z = list(phantom.landmarks(phantom.patient(seed)).values())
    assert z == sorted(z)
    assert z[0] < 0 < z[-1]


@pytest.mark.parametrize("seed", SEEDS)
def test_hu_is_plausible_at_every_level(seed):
    patient = phantom.patient(seed)
    for image in draw(patient, *range(-340, 730, 40), noise_hu=15.0, table=True):
        assert image.min() == -1024
        assert 300 < image.max() <= 3071
        assert (abs(image) < 300).sum() > 500  # 60 cm2 of soft tissue


@pytest.mark.parametrize("seed", SEEDS)
def test_lung_fills_the_chest_and_not_the_pelvis(seed):
    patient = phantom.patient(seed)
    pelvis, chest, head = (patch(image, 0, 0, 80) for image in draw(patient, -88, 320, 660))
    lung = [((part > -960) & (part < -700)).mean() for part in (pelvis, chest, head)]
    assert lung[1] > 0.25
    assert lung[0] < 0.02  # the rim of gas in the rectum
    if patient.arms == "down":
        assert lung[2] < 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_lungs_start_and_end_at_their_landmarks(seed):
    patient = phantom.patient(seed)
    levels = phantom.landmarks(patient)
    margin = 10 * patient.length
    edges = [levels["lung_base"] - margin, levels["lung_base"] + 2 * margin]
    edges += [levels["lung_apex"] - margin, levels["lung_apex"] + margin]
    below, base, apex, above = phantom.volume(
        patient, np.array(edges), pixel_mm=3.5, matrix=128, noise_hu=0, table=False
    )
    # Lung is -865 HU where nothing else shares the pixel.
    counts = [int((image == -865).sum()) for image in (below, base, apex, above)]
    assert counts[0] == counts[3] == 0
    assert min(counts[1], counts[2]) > 5


def test_vertex_is_the_end_of_the_body():
    below, above = draw(replace(AVERAGE, arms="down"), 732, 736)
    assert (below > -200).any()
    assert (above[above != -1024] == -1000).all()


def test_windpipe_splits_at_the_carina():
    above, below = draw(AVERAGE, 372 + 20, 372 - 20)
    assert patch(above, 0, 13, 6).min() < -900
    assert patch(below, -28, 17, 6).min() < -700
    assert patch(below, 28, 17, 6).min() < -700
    assert patch(below, 0, 17, 4).min() > -300


def test_femoral_heads_are_balls_of_bone_at_their_landmark():
    (image,) = draw(AVERAGE, -88)
    for side in (-1, 1):
        assert np.median(patch(image, side * 93, 0, 10)) == pytest.approx(280, abs=5)


@pytest.mark.parametrize("seed", SEEDS)
def test_liver_lies_on_the_right_of_the_patient(seed):
    (image,) = draw(replace(AVERAGE, seed=seed, contrast=1.0), 205)
    # Columns grow to patient left. Enhanced liver has 56 + 60 HU, stomach and fat far less.
    assert np.median(patch(image, -80, -10, 12)) == pytest.approx(116, abs=3)
    assert np.median(patch(image, 80, -10, 12)) < 60


def test_spine_lies_at_the_bottom_of_the_image():
    (image,) = draw(AVERAGE, 100)
    rows, columns = np.nonzero(image > 300)
    assert rows.mean() > 63.5 + 28 / 3.5  # the middle of a vertebral body of L3 lies at y = 28 mm
    assert columns.mean() == pytest.approx(63.5, abs=2)


def test_table_lies_under_the_back():
    for patient in map(phantom.patient, SEEDS):
        z = np.arange(-300, 700, 50.0)
        bare, with_table = (
            phantom.volume(patient, z, pixel_mm=3.5, matrix=128, noise_hu=0, table=table)
            for table in (False, True)
        )
        changed = bare != with_table
        assert changed.any(axis=(1, 2)).all()
        assert np.nonzero(changed)[1].min() > 64
        assert (bare[changed] < -300).mean() > 0.99  # the back touches it at most


def test_off_centre_reconstruction_moves_the_body():
    (centred,) = draw(AVERAGE, 100, table=True)
    (moved,) = draw(AVERAGE, 100, table=True, center_mm=(7.0, -14.0))
    # The centre lies 2 pixels to the left and 4 to the front: the body goes 2 to the right of the
    # patient (lower columns) and 4 to the back (higher rows).
    middle = slice(30, 98)
    wanted = centred[middle, middle].astype(int)
    got = moved[34:102, 28:96].astype(int)
    assert abs(got - wanted).max() <= 1
    assert abs(moved[middle, middle].astype(int) - wanted).max() > 500


def test_outside_the_reconstruction_circle_is_minus_1024():
    (image,) = draw(AVERAGE, 440, noise_hu=15.0)
    y, x = np.mgrid[:128, :128] - 63.5
    assert (image[np.hypot(x, y) > 64] == -1024).all()
    assert (image[np.hypot(x, y) < 50] != -1024).mean() > 0.9


def test_a_finer_matrix_shows_the_same_body():
    coarse = draw(AVERAGE, 320, pixel_mm=4.0, matrix=96)[0].astype(float)
    fine = draw(AVERAGE, 320, pixel_mm=2.0, matrix=192)[0].astype(float)
    binned = fine.reshape(96, 2, 96, 2).mean(axis=(1, 3))
    assert np.abs(binned - coarse)[10:-10, 10:-10].mean() < 25


def test_noise_has_the_stated_sd_and_is_correlated():
    still = draw(AVERAGE, 100, seed=3).astype(float)
    noise = draw(AVERAGE, 100, noise_hu=20.0, seed=3) - still
    noise = noise[0, 50:80, 40:88]
    assert noise.std() == pytest.approx(20, rel=0.1)
    # The kernel (1, 2, 1) against itself moved by one: (1 * 2 + 2 * 1) / (1 + 4 + 1).
    lag = (noise[:, 1:] * noise[:, :-1]).mean() / noise.var()
    assert lag == pytest.approx(4 / 6, abs=0.1)


def test_timepoints_differ_by_gas_alone():
    heights = (-250.0, 60.0, 100.0, 320.0, 640.0)
    one, two = (draw(AVERAGE, *heights, seed=seed) for seed in (1, 2))
    differs = one != two
    assert differs[1:3].any(axis=(1, 2)).all()
    assert differs.mean() < 0.05
    assert not differs[[0, 3, 4]].any()


def test_breathing_in_lowers_the_diaphragm_and_leaves_the_skeleton():
    calm, deep = (draw(AVERAGE, 255, 640, breath_mm=breath) for breath in (0.0, 20.0))
    assert (deep[0] == -865).sum() > 1.2 * (calm[0] == -865).sum()
    np.testing.assert_array_equal(calm[1], deep[1])
    bone = (calm[0] > 400) & (deep[0] > 400)
    assert bone.sum() > 0.95 * (calm[0] > 400).sum()


def test_knots_have_distinct_heights():
    for shape in (*anatomy.OUTLINES, *anatomy.ORGANS):
        if shape.kind != "tube":
            heights = [knot[0] for knot in shape.knots]
            assert len(set(heights)) == len(heights), shape.name
