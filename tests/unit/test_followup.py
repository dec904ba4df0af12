"""Follow-ups lie where they say, and differ in what they say, on bodies drawn by code."""

from dataclasses import replace

import numpy as np
import pytest

from dicomnode.core import phantom
from training import followup
from training.followup import Body, FollowUp, FollowUpConfig, Volume

LEVELS_MM = np.arange(60.0, 500.0, 2.5)
PIXEL_MM = 3.6
CONFIG = FollowUpConfig()
STILL = FollowUp(
    seed=0,
    breath_mm=0.0,
    expand_mm=0.0,
    posture_mm=0.0,
    spacing_mm=2.5,
    phase_mm=0.0,
    pixel_mm=PIXEL_MM,
    field_mm=500.0,
    box=True,
    shift_mm=(0.0, 0.0, 0.0),
    rotation_degrees=0.0,
    centring_mm=(0.0, 0.0),
    level_hu=0.0,
    soft_hu=0.0,
    enhanced_hu=0.0,
    noise_hu=0.0,
    noise_mm=1.0,
    blur_mm=0.0,
    sharpen=0.0,
)


@pytest.fixture(scope="module")
def volume() -> Volume:
    image = phantom.volume(
        phantom.patient(3), LEVELS_MM, pixel_mm=PIXEL_MM, matrix=128, noise_hu=5.0, seed=1
    )
    return Volume(image, LEVELS_MM, (PIXEL_MM, PIXEL_MM), (-230.0, -240.0))


@pytest.fixture(scope="module")
def body(volume) -> Body:
    return followup.survey(volume)


def bone(volume: Volume) -> np.ndarray:
    """How much bone each slice shows, near the spine."""
    return (volume.image_hu > 300).sum((1, 2)).astype(float)


def lung(volume: Volume) -> np.ndarray:
    middle = volume.image_hu[:, 30:-30, 20:-20]
    return ((middle < -600) & (middle > -950)).sum((1, 2)).astype(float)


def found_mm(fixed: Volume, moving: Volume, profile, guess_mm: float) -> float:
    """The shift, within 30 mm of a guess, at which the profiles of two volumes correlate best."""
    shifts = guess_mm + np.arange(-30, 30, 0.25)
    f, m = profile(fixed), profile(moving)
    r = [
        np.corrcoef(m, np.interp(moving.z_mm + s, fixed.z_mm, f, left=0, right=0))[0, 1]
        for s in shifts
    ]
    return float(shifts[np.argmax(r)])


@pytest.mark.parametrize("seed", range(4))
def test_bone_lies_where_the_truth_says(volume, body, seed):
    follow = followup.draw(volume, body, CONFIG, np.random.default_rng(seed))
    follow = replace(follow, field_mm=max(follow.field_mm, 420.0))  # ribs and all
    rendered = followup.render(volume, body, follow, CONFIG)
    found = found_mm(volume, rendered.volume, bone, rendered.truth_mm)
    assert found == pytest.approx(rendered.truth_mm, abs=1.0)
    assert rendered.residual_mm < 5


@pytest.mark.parametrize("shift_mm", [(0.0, 0.0, 0.0), (-312.5, 31.0, -17.0)])
def test_a_still_patient_is_only_moved(volume, body, shift_mm):
    rendered = followup.render(volume, body, replace(STILL, shift_mm=shift_mm), CONFIG)
    moved = rendered.volume
    assert rendered.truth_mm == pytest.approx(shift_mm[0])
    np.testing.assert_allclose(moved.z_mm[::2] + rendered.truth_mm, volume.z_mm)
    # The pixel that lies where a pixel of the volume lies shows what that one shows.
    y = moved.origin_mm[0] + np.arange(moved.image_hu.shape[1]) * PIXEL_MM + shift_mm[1]
    row = (y - volume.origin_mm[0]) / PIXEL_MM
    x = moved.origin_mm[1] + np.arange(moved.image_hu.shape[2]) * PIXEL_MM + shift_mm[2]
    column = (x - volume.origin_mm[1]) / PIXEL_MM
    smooth = volume.image_hu.astype(float)
    i, j = 70, 68
    r, c = int(row[i]), int(column[j])
    fr, fc = row[i] - r, column[j] - c
    expected = (
        (1 - fr) * (1 - fc) * smooth[:, r, c]
        + (1 - fr) * fc * smooth[:, r, c + 1]
        + fr * (1 - fc) * smooth[:, r + 1, c]
        + fr * fc * smooth[:, r + 1, c + 1]
    )
    np.testing.assert_allclose(moved.image_hu[::2, i, j], expected, atol=1.0)


def test_a_part_of_a_follow_up_is_that_part_of_the_whole(volume, body):
    follow = replace(STILL, spacing_mm=5.0, noise_hu=20.0, shift_mm=(100.0, 0.0, 0.0))
    whole = followup.render(volume, body, follow, CONFIG).volume
    part = followup.render(volume, body, follow, CONFIG, first=33, count=41).volume
    np.testing.assert_array_equal(part.image_hu, whole.image_hu[33:74])
    np.testing.assert_array_equal(part.z_mm, whole.z_mm[33:74])


def test_thick_slices_are_interpolated_to_about_a_millimetre(volume, body):
    for spacing_mm, step_mm in ((5.0, 1.0), (2.5, 1.25), (1.25, 1.25), (1.0, 1.0)):
        follow = replace(STILL, spacing_mm=spacing_mm)
        assert np.diff(followup.levels(volume, follow)) == pytest.approx(step_mm)
    image = followup.render(volume, body, replace(STILL, spacing_mm=5.0), CONFIG, count=11).volume
    between = (4 * image.image_hu[0].astype(float) + image.image_hu[5]) / 5
    np.testing.assert_allclose(image.image_hu[1], between, atol=1.0)


def test_breathing_moves_the_lungs_and_leaves_the_spine(volume, body):
    assert body.diaphragm_mm is not None
    rendered = followup.render(volume, body, replace(STILL, breath_mm=15.0), CONFIG)
    assert rendered.truth_mm == pytest.approx(0.0, abs=1.5)
    # What is low in the chest lies lower: the level seen at z is one from further up.
    near = np.abs(volume.z_mm - body.diaphragm_mm) < 40
    low = Volume(volume.image_hu[near], volume.z_mm[near], volume.pixel_mm, volume.origin_mm)
    assert found_mm(rendered.volume, low, lung, 0.0) < -5.0
    assert found_mm(rendered.volume, low, bone, 0.0) == pytest.approx(0.0, abs=2.0)


@pytest.mark.parametrize("seed", range(4))
def test_a_displacement_never_folds_the_body(volume, body, seed):
    extreme = replace(STILL, seed=seed, breath_mm=-15.0, expand_mm=-6.0, posture_mm=3.0)
    u = followup.displacement(body, extreme, CONFIG)
    steps = [float(np.diff(a)[0]) for a in (body.z_mm, body.y_mm, body.x_mm)]
    gradient = np.stack([np.stack(np.gradient(part, *steps)) for part in u])  # (3, 3, Z, Y, X)
    jacobian = np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3)
    assert np.linalg.det(jacobian).min() > 0.2


def test_contrast_keeps_the_order_of_tissues():
    for soft in CONFIG.soft_hu:
        for enhanced in CONFIG.enhanced_hu:
            for level in CONFIG.level_hu:
                follow = replace(STILL, soft_hu=soft, enhanced_hu=enhanced, level_hu=level)
                before, after = followup._contrast(follow)
                assert (np.diff(before) > 0).all() and (np.diff(after) > 0).all()


def test_a_round_field_of_view_shows_nothing_outside(volume, body):
    follow = replace(STILL, box=False, field_mm=250.0, noise_hu=30.0)
    image = followup.render(volume, body, follow, CONFIG, first=80, count=3).volume.image_hu
    axis = (np.arange(image.shape[1]) - (image.shape[1] - 1) / 2) * PIXEL_MM
    outside = np.hypot(axis[:, None], axis) > 125
    assert (image[:, outside] == -1024).all()
    assert (image[:, ~outside] > -950).mean() > 0.5


def test_noise_and_kernel_are_those_that_were_drawn(volume, body):
    def image(**values: float) -> np.ndarray:
        follow = replace(STILL, pixel_mm=1.5, **values)  # a sharp kernel is finer than 3.6 mm
        part = followup.render(volume, body, follow, CONFIG, first=20, count=1)
        return part.volume.image_hu.astype(float)

    def noise(**kernel: float) -> float:
        without = image(**kernel)
        return float((image(noise_hu=30.0, **kernel) - without)[without > -300].std())

    assert noise() == pytest.approx(30.0, rel=0.1)
    assert noise(blur_mm=3.0) < 20.0
    assert noise(sharpen=0.8) > 33.0


def test_a_seed_is_one_follow_up(volume, body):
    one, same, other = (
        followup.draw(volume, body, CONFIG, np.random.default_rng(s)) for s in (1, 1, 2)
    )
    assert one == same != other


def test_lungs_are_found_only_where_they_end(volume, body):
    marks = phantom.landmarks(phantom.patient(3))
    assert marks["lung_base"] < body.diaphragm_mm < marks["diaphragm_dome"] + 10
    upper = volume.z_mm > marks["diaphragm_dome"] + 30  # lungs, but not their base
    cut = Volume(volume.image_hu[upper], volume.z_mm[upper], volume.pixel_mm, volume.origin_mm)
    assert followup.survey(cut).diaphragm_mm is None


def test_smaller_volumes_cover_the_same_place(volume):
    half = followup.shrink(volume, 64)
    assert half.image_hu.shape == (len(LEVELS_MM), 64, 64)
    assert half.origin_mm == (-230.0 + PIXEL_MM / 2, -240.0 + PIXEL_MM / 2)
    assert half.image_hu[7, 20, 30] == pytest.approx(
        volume.image_hu[7, 40:42, 60:62].mean(), abs=0.5
    )
    third = followup.thicken(volume, 60)
    assert len(third.z_mm) == 58
    assert third.z_mm[0] == LEVELS_MM[:3].mean()
    fine = followup.interpolated(volume)
    assert np.diff(fine.z_mm) == pytest.approx(1.25)
    np.testing.assert_array_equal(fine.image_hu[::2], volume.image_hu)
