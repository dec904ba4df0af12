"""The exact form of FASTA is what visiting every translation gives, by hand and by ITK."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from benchmarks import fasta_itk
from dicomnode.core import fasta, phantom
from dicomnode.core.fasta import Grid, Volume

REAL = Path(__file__).parents[2].parent / "shared" / "ct"


def noise(*shape: int, seed: int = 0, spacing=(3.0, 2.0, 2.0), origin=(0.0, 0.0, 0.0)) -> Volume:
    hu = np.random.default_rng(seed).uniform(-500, 500, shape).astype(np.float32)
    return Volume(hu, spacing, origin)


def trunk(low: float, high: float, *, step: float, pixel: float, seed: int, shift=(0.0, 0.0, 0.0)):
    """A phantom from low to high, in patient coordinates moved by z, y, x."""
    z_mm = np.arange(low, high, step)
    matrix = int(400 / pixel)
    hu = phantom.volume(phantom.patient(3), z_mm, pixel_mm=pixel, matrix=matrix, seed=seed)
    first = -(matrix - 1) / 2 * pixel
    origin = tuple((np.array([low, first, first]) + shift).tolist())
    return Volume(hu.astype(np.float32), (step, pixel, pixel), origin)


def cut(fixed: int, moving: int, shift: int) -> tuple[slice, slice]:
    low, high = max(0, shift), min(fixed, moving + shift)
    return slice(low, high), slice(low - shift, high - shift)


@pytest.mark.parametrize(("f_shape", "m_shape"), [
    ((9, 8, 10), (9, 8, 10)), ((12, 14, 9), (7, 6, 11)), ((5, 6, 7), (14, 15, 16)),
])  # fmt: skip
def test_every_cost_is_the_mean_square_over_the_voxels_where_both_lie(f_shape, m_shape):
    fixed, moving = noise(*f_shape, seed=1), noise(*m_shape, seed=2)
    grid = Grid(np.arange(2.0 - m_shape[0], f_shape[0] - 1), (-3, 0, 1, 4), (-2, 0, 5))
    costs = fasta.search(fixed, moving, grid).costs
    assert costs.shape == (len(grid.z), 4, 3)
    for k, i, j in product(*(range(n) for n in costs.shape)):
        shift = int(grid.z[k]), grid.y[i], grid.x[j]
        f, m = zip(*(cut(*n) for n in zip(f_shape, m_shape, shift, strict=True)), strict=True)
        difference = fixed.hu[f].astype(float) - moving.hu[m]
        assert costs[k, i, j] == pytest.approx((difference**2).mean(), rel=1e-5)


@pytest.mark.parametrize("size", [24, 30])
def test_the_minimum_is_that_of_itk_on_the_papers_grid(size):
    fixed = trunk(0, 300, step=9, pixel=9, seed=1)
    moving = trunk(110, 380, step=7, pixel=8, seed=2, shift=(-750.0, 6.0, -9.0))
    f, m = fasta.shrink(fixed, moving, size)
    grid = fasta.paper_grid(f, m)
    assert (len(grid.z), len(grid.y), len(grid.x)) == (71, 3, 3)
    assert (grid.z % 1).any()  # translations between slices as well
    _assert_as_itk(f, m, grid)


def test_the_minimum_is_that_of_itk_on_a_real_pair():
    folders = [REAL / "ACRIN-FLT-Breast_001" / name for name in ("C_vertex-to-thorax", "A_thorax")]
    if not REAL.exists():
        pytest.skip("no real CT in ../shared/ct")
    f, m = fasta.shrink(*(_read(folder) for folder in folders), 32)
    _assert_as_itk(f, m, fasta.paper_grid(f, m))


def _assert_as_itk(f: Volume, m: Volume, grid: Grid) -> None:
    ours, theirs = fasta.search(f, m, grid), fasta_itk.search(f, m, grid)
    assert ours.costs == pytest.approx(theirs.costs, rel=1e-4)
    assert ours.costs.argmin() == theirs.costs.argmin()
    assert ours.offset_mm == pytest.approx(theirs.offset_mm, abs=1e-6)
    assert (ours.dy_mm, ours.dx_mm) == pytest.approx((theirs.dy_mm, theirs.dx_mm), abs=1e-6)
    assert ours.cost == pytest.approx(theirs.cost, rel=1e-4)
    assert ours.overlap == pytest.approx(theirs.overlap)


def test_a_phantom_scanned_again_is_found_within_a_step():
    fixed = trunk(0, 300, step=5, pixel=5, seed=1)
    moving = trunk(120, 420, step=3, pixel=4, seed=2, shift=(500.0, 10.0, -10.0))
    fit = fasta.align(fixed, moving)
    step = 510 / 70  # of the 71: 600 mm less 30 at both ends, apart
    assert fit.offset_mm == pytest.approx(-500, abs=step)
    # The centre is right, of the three translations of each axis.
    assert (fit.dy_mm, fit.dx_mm) == pytest.approx((-10, 10))
    assert fit.overlap == pytest.approx(180 / 300, abs=step / 300)


def test_the_full_grid_finds_a_translation_between_those_of_the_paper():
    whole = noise(60, 10, 10, seed=3)
    fixed = Volume(whole.hu[:40], whole.spacing_mm, (0.0, 0.0, 0.0))
    moving = Volume(whole.hu[17:57], whole.spacing_mm, (-100.0, 0.0, 0.0))
    fit = fasta.search(fixed, moving, fasta.full_grid(fixed, moving))
    assert fit.offset_mm == pytest.approx(100 + 17 * 3)
    assert (fit.dy_mm, fit.dx_mm) == (0, 0)
    assert fit.cost == pytest.approx(0, abs=0.1)  # of 170000 elsewhere
    assert fit.overlap == pytest.approx(23 / 40)
    paper = fasta.paper_grid(fixed, moving)
    assert not np.isclose(paper.z, 17).any()
    assert (paper.z[0], paper.z[-1]) == (-30, 30)  # ten slices are 30 mm


def test_fixed_and_moving_swapped_give_the_negative():
    a, b = noise(12, 9, 9, seed=4), noise(10, 11, 7, seed=5, origin=(50.0, 3.0, 4.0))
    z = np.arange(-7.0, 10)
    one = fasta.search(a, b, Grid(z, (-1, 0, 2), (0, 1, 3)))
    two = fasta.search(b, a, Grid(-z[::-1], (-2, 0, 1), (-3, -1, 0)))
    assert one.costs == pytest.approx(two.costs[::-1, ::-1, ::-1], rel=1e-5)
    assert one.offset_mm == pytest.approx(-two.offset_mm)
    assert (one.dy_mm, one.dx_mm) == pytest.approx((-two.dy_mm, -two.dx_mm))


def test_shrunk_voxels_are_means_over_their_own_extent():
    ramp = np.arange(12 * 8 * 8, dtype=np.float32).reshape(12, 8, 8)
    volume = Volume(ramp, (1.0, 2.0, 2.0), (10.0, 20.0, 30.0))
    _, small = fasta.shrink(volume, volume, 4)
    assert small.spacing_mm == (3, 4, 4)
    assert small.origin_mm == (11, 21, 31)
    blocks = ramp.reshape(4, 3, 4, 2, 4, 2).mean((1, 3, 5))
    assert small.hu == pytest.approx(blocks, rel=1e-6)


def test_what_is_small_enough_is_left_as_it_is():
    moving = noise(35, 20, 21)
    fixed = noise(40, 41, 20, seed=1, spacing=(1.5, 2.0, 1.0))
    f, m = fasta.shrink(fixed, moving)
    assert (m.hu == moving.hu).all() and m.origin_mm == moving.origin_mm
    assert f.spacing_mm == m.spacing_mm
    assert (np.array(f.hu.shape) % 2 == np.array(m.hu.shape) % 2).all()
    assert f.centre_mm == pytest.approx(fixed.centre_mm)
    assert f.hu.shape == (19, 40, 9)  # 60, 82 and 20 mm, each less a rest


def test_outside_the_reconstruction_circle_is_air():
    hu = np.full((4, 4, 4), -3024, np.float32)
    volume = Volume(hu, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert (fasta.shrink(volume, volume, 2)[1].hu == -1000).all()


@pytest.mark.parametrize("grid", [
    Grid(np.array([9.0]), (0,), (0,)), Grid(np.array([0.0]), (5,), (0,)),
])  # fmt: skip
def test_a_translation_without_overlap_is_an_error(grid):
    with pytest.raises(ValueError, match="no overlap"):
        fasta.search(noise(5, 5, 5), noise(4, 4, 4), grid)


def test_volumes_of_two_spacings_are_not_compared():
    with pytest.raises(ValueError, match="spacings differ"):
        fasta.search(noise(5, 5, 5), noise(5, 5, 5, spacing=(3.0, 2.0, 1.0)), Grid(
            np.zeros(1), (0,), (0,)))  # fmt: skip


def _read(folder: Path) -> Volume:
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = SimpleITK.DICOMOrient(reader.Execute(), "LPS")
    hu = SimpleITK.GetArrayFromImage(image).astype(np.float32)
    return Volume(hu, image.GetSpacing()[::-1], image.GetOrigin()[::-1])
