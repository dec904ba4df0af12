"""The robust method on curves drawn from its own model: right, honest about it, and equivariant."""

from dataclasses import replace

import numpy as np
import pytest

from dicomnode.core import align, robust
from dicomnode.core.curve import quality
from dicomnode.core.robust import Covariance
from dicomnode.errors import WeightsError
from dicomnode.model import Method, OffsetStatus, ScoreCurve

COVARIANCE = Covariance(
    slope_sd=0.05,
    anatomy_sd_mm=10.0,
    anatomy_length_mm=40.0,
    scan_constant_sd_mm=4.0,
    scan_sd_mm=5.0,
    scan_length_mm=30.0,
    noise_sd_mm=2.0,
)


def process(rng, x, length_mm, sd_mm):
    k = sd_mm**2 * robust._matern((x[:, None] - x[None]) / length_mm) + 1e-6 * np.eye(len(x))
    return np.linalg.cholesky(k) @ rng.standard_normal(len(x))


def curve_of(z_mm, height_mm):
    n = len(z_mm)
    return ScoreCurve(
        series_uid="1.2",
        model="m",
        z_mm=z_mm,
        score=(height_mm / 10).astype(np.float32),
        height_mm=height_mm,
        sop_instance_uids=tuple(str(i) for i in range(n)),
        frames=(1,) * n,
        quality=quality(z_mm, height_mm),
    )


def patient(rng, spacing_mm=3.0, extent_mm=900.0):
    """Positions of a body, and its true height curve, with its own proportions."""
    z = np.arange(0.0, extent_mm, spacing_mm)
    stretch = (z - 300.0) * rng.normal(0, COVARIANCE.slope_sd)
    return z, z + stretch + process(rng, z, 40.0, 10.0)


def scan(rng, z_mm, height_mm, part, moved_mm=0.0):
    """One scan of part of a body: errors of its own, and another zero of z."""
    z = z_mm[part]
    seen = height_mm[part] + rng.normal(0, 4.0) + process(rng, z, 30.0, 5.0)
    return curve_of(z - moved_mm, seen + rng.normal(0, 2.0, len(z)))


def drawn_pairs(count, parts, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        body = patient(rng)
        truth = float(rng.uniform(-500, 500))
        fixed, moving = parts(rng, len(body[0]))
        yield scan(rng, *body, fixed), scan(rng, *body, moving, truth), truth


def any_parts(rng, n):
    def part():
        start = int(rng.integers(0, n - 60))
        return slice(start, start + int(rng.integers(20, n - start)))

    return part(), part()


def apart(rng, n):
    return slice(0, 100), slice(130 + int(rng.integers(40)), n)


def test_offsets_of_its_own_model_are_found_and_the_sigma_is_right():
    errors, sigmas = [], []
    for fixed, moving, truth in drawn_pairs(120, any_parts, seed=1):
        found = robust.robust(fixed, moving, COVARIANCE)
        if found.status is not OffsetStatus.REFUSED:
            errors.append(found.offset_mm - truth)
            sigmas.append(found.sigma_mm)
    assert len(errors) > 110
    inside = np.mean(np.abs(errors) <= 1.645 * np.array(sigmas))
    # Binomial 95 % of 120 draws at 0.90.
    assert 0.84 <= inside <= 0.96
    assert np.median(np.abs(errors)) < 6.0


def test_scans_that_do_not_meet_are_placed_better_than_by_l1():
    ours, theirs = [], []
    for fixed, moving, truth in drawn_pairs(40, apart, seed=2):
        found = robust.robust(fixed, moving, COVARIANCE)
        assert found.status is OffsetStatus.EXTRAPOLATED
        ours.append(abs(found.offset_mm - truth))
        theirs.append(abs(align.l1(fixed, moving).offset_mm - truth))
    assert np.median(ours) < 25.0 < np.median(theirs)


def test_sigma_grows_with_the_gap_between_the_scans():
    rng = np.random.default_rng(3)
    body = patient(rng)
    fixed = scan(rng, *body, slice(0, 100))
    sigmas = [
        robust.robust(fixed, scan(rng, *body, slice(k, k + 60)), COVARIANCE).sigma_mm
        for k in (30, 110, 220)
    ]
    assert sigmas == sorted(sigmas)
    assert sigmas[2] > 1.3 * sigmas[0]


@pytest.mark.parametrize("d", [-1234.5, 3.25, 700.0])
def test_a_moved_curve_moves_the_offset(d):
    fixed, moving, _ = next(drawn_pairs(1, any_parts, seed=4))
    elsewhere = replace(moving, z_mm=moving.z_mm + d)
    here = robust.robust(fixed, moving, COVARIANCE)
    there = robust.robust(fixed, elsewhere, COVARIANCE)
    assert there.offset_mm == pytest.approx(here.offset_mm - d, abs=1e-6)
    assert there.sigma_mm == pytest.approx(here.sigma_mm, abs=1e-6)


def test_a_curve_lies_on_itself():
    fixed, _, _ = next(drawn_pairs(1, any_parts, seed=5))
    assert abs(robust.robust(fixed, fixed, COVARIANCE).offset_mm) < 0.25


def test_a_run_of_wild_slices_hardly_matters():
    fixed, moving, truth = next(drawn_pairs(1, lambda r, n: (slice(0, n), slice(60, 200)), seed=6))
    height = moving.height_mm.copy()
    height[20:32] += 150.0  # metal, an arm
    wild = curve_of(moving.z_mm, height)
    assert robust.robust(fixed, wild, COVARIANCE).offset_mm == pytest.approx(truth, abs=10.0)


def test_a_curve_that_falls_is_refused():
    fixed, moving, _ = next(drawn_pairs(1, any_parts, seed=7))
    falling = curve_of(moving.z_mm, moving.height_mm[::-1].copy())
    for pair, name in (((fixed, falling), "moving"), ((falling, fixed), "fixed")):
        found = robust.robust(*pair, COVARIANCE)
        assert found.status is OffsetStatus.REFUSED and name in found.reason
        assert found.offset_mm is None and found.sigma_mm is None


def test_a_guess_is_refused():
    fixed, moving, _ = next(drawn_pairs(1, apart, seed=8))
    found = robust.robust(fixed, moving, replace(COVARIANCE, refuse_sigma_mm=3.0))
    assert found.status is OffsetStatus.REFUSED and "uncertain" in found.reason


def test_without_a_covariance_robust_refuses():
    fixed, moving, _ = next(drawn_pairs(1, any_parts, seed=9))
    found = align.align(fixed, moving, Method.ROBUST)
    assert (found.status, found.reason) == (OffsetStatus.REFUSED, robust.NO_COVARIANCE)


def test_the_factor_scales_sigma_alone():
    fixed, moving, _ = next(drawn_pairs(1, any_parts, seed=10))
    once = align.align(fixed, moving, Method.ROBUST, COVARIANCE)
    twice = align.align(fixed, moving, Method.ROBUST, replace(COVARIANCE, factor=2.0))
    assert twice.sigma_mm == pytest.approx(2 * once.sigma_mm)
    assert twice.offset_mm == once.offset_mm


def test_a_covariance_survives_its_manifest():
    assert Covariance.from_dict(COVARIANCE.to_dict()) == COVARIANCE


@pytest.mark.parametrize(
    "change", [{"slope_sd": 0.0}, {"noise_sd_mm": float("nan")}, {"factor": -1.0}, {"new": 1.0}]
)
def test_a_damaged_covariance_is_refused(change):
    with pytest.raises(WeightsError, match="covariance"):
        Covariance.from_dict(COVARIANCE.to_dict() | change)


def test_few_and_unevenly_spaced_slices_will_do():
    z = np.array([0.0, 8.0, 16.0, 40.0, 48.0])
    fixed = curve_of(np.arange(-100.0, 200.0, 5.0), np.arange(-100.0, 200.0, 5.0))
    found = robust.robust(fixed, curve_of(z, z + 30.0), COVARIANCE)
    assert found.offset_mm == pytest.approx(30.0, abs=1.0)


def test_the_shift_in_plane_comes_from_body_centres():
    fixed, moving, _ = next(drawn_pairs(1, lambda r, n: (slice(0, n), slice(60, 200)), seed=11))
    assert robust.robust(fixed, moving, COVARIANCE).dx_mm is None  # nothing is known of it

    def centred(curve, x_mm, y_mm):
        return replace(curve, body_centre_mm=np.tile([x_mm, y_mm], (len(curve.z_mm), 1)))

    found = robust.robust(centred(fixed, 4.0, -20.0), centred(moving, -8.0, 5.0), COVARIANCE)
    assert (found.dx_mm, found.dy_mm) == pytest.approx((12.0, -25.0))
