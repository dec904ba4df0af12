import numpy as np
import pytest

from dicomnode.core.opening import opening
from dicomnode.core.region import Extent, Limit, Region, Support

UNKNOWN = Limit(Support.UNSUPPORTED)


def at(height_mm: float) -> Limit:
    return Limit(Support.LANDMARK, height_mm, 10.0)


LIVER = Region("liver", "10200004", "Liver", at(100.0), at(250.0))
LEGS = Region("legs", "61685007", "Lower limb", UNKNOWN, at(-50.0))
NOWHERE = Region("foot", "56459004", "Foot", UNKNOWN, UNKNOWN)


def scan(low: float, high: float, step: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Positions and body heights, which are the same but for 1,000 mm."""
    height = np.arange(low, high + step / 2, step)
    return height - 1000, height


def test_a_region_shown_is_opened_in_its_middle():
    z_mm, height_mm = scan(0, 400)
    found = opening(z_mm, height_mm, LIVER)
    assert height_mm[found.index] == 175
    assert found.shown.extent is Extent.COMPLETE and found.distance_mm == 0


@pytest.mark.parametrize(("low", "high", "middle"), [(0, 180, 140), (200, 500, 225)])
def test_of_a_part_shown_its_middle_is_opened_and_not_its_edge(low, high, middle):
    z_mm, height_mm = scan(low, high)
    found = opening(z_mm, height_mm, LIVER)
    assert height_mm[found.index] == middle
    assert found.shown.extent is Extent.PARTIAL


@pytest.mark.parametrize(
    ("low", "high", "nearest", "distance"), [(-300, 20, 20, 80), (300, 600, 300, -50)]
)
def test_of_a_region_not_shown_the_nearest_end_is_told(low, high, nearest, distance):
    z_mm, height_mm = scan(low, high)
    found = opening(z_mm, height_mm, LIVER)
    assert found.shown is None
    assert (height_mm[found.index], found.distance_mm) == (nearest, distance)


def test_a_region_among_missing_slices_is_not_shown():
    z_mm, height_mm = scan(0, 400)
    kept = (height_mm < 90) | (height_mm > 270)
    found = opening(z_mm[kept], height_mm[kept], LIVER)
    assert found.shown is None
    assert height_mm[kept][found.index] == 85 and found.distance_mm == 15


def test_a_slice_read_wrongly_is_not_opened():
    z_mm, height_mm = scan(0, 400)
    height_mm[35] = 900.0  # that of the middle
    found = opening(z_mm, height_mm, LIVER)
    assert found.index in (34, 36)
    z_mm, height_mm = scan(0, 80)
    height_mm[3] = 180.0  # in the liver, if it were true
    found = opening(z_mm, height_mm, LIVER)
    assert found.shown is None and found.index == len(z_mm) - 1


def test_a_curve_that_falls_is_read_all_the_same():
    z_mm, height_mm = scan(0, 400)
    found = opening(z_mm, height_mm[::-1].copy(), LIVER)
    assert height_mm[::-1][found.index] == 175


def test_a_region_with_one_known_limit_is_opened_within_what_is_shown():
    z_mm, height_mm = scan(-450, 100)
    found = opening(z_mm, height_mm, LEGS)
    assert height_mm[found.index] == -250
    assert found.shown.extent is Extent.INDETERMINATE
    found = opening(*scan(0, 400), LEGS)
    assert found.shown is None and (found.index, found.distance_mm) == (0, -50)


def test_a_region_without_a_known_limit_is_nowhere():
    assert opening(*scan(0, 400), NOWHERE) is None
