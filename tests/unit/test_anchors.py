"""Landmarks tie the zeros of Series together; what shows none stays free."""

import numpy as np
import pytest

from dicomnode.core.preprocess import PreprocessSpec
from training import anchors
from training.bank import Bank, BankSeries
from training.sampler import Share


def series(uid, start, first_mm, n=100, **landmarks):
    z_mm = tuple(first_mm + 5.0 * np.arange(n))
    return BankSeries(uid, uid, uid, start, z_mm, tuple(sorted(landmarks.items())))


@pytest.fixture
def members() -> list[BankSeries]:
    """Three bodies whose lungs are 230, 250 and 260 mm long; one with an apex alone; one free."""
    return [
        series("a", 0, 0.0, lung_apex=400.0, lung_base=170.0),
        series("b", 100, -900.0, lung_apex=-500.0, lung_base=-750.0),
        series("c", 200, 10.0, lung_apex=410.0, lung_base=150.0),
        series("d", 300, 77.0, lung_apex=77.0),
        series("e", 400, 0.0),
    ]


def bank_of(members):
    return Bank(np.zeros((500, 8, 8), np.uint8), tuple(members), PreprocessSpec())


def test_the_population_is_the_median_series(members):
    heights = anchors.population(members)
    assert heights["lung_apex"] == anchors.ORIGIN_MM
    assert heights["lung_base"] == pytest.approx(anchors.ORIGIN_MM - 250.0, abs=1.0)
    assert "neck" not in heights


def test_the_surer_landmark_weighs_more():
    heights = {"lung_apex": 0.0, "lung_base": -250.0}
    at = anchors.constant({"lung_apex": 0.0, "lung_base": -230.0}, heights)
    apex, base = (anchors.SPREAD_MM[name] ** -2 for name in ("lung_apex", "lung_base"))
    assert at == pytest.approx(-20.0 * base / (apex + base))
    assert anchors.constant({"vertex": 3.0}, heights) is None


def test_every_slice_gets_the_height_of_its_series(members):
    height_mm = anchors.targets(bank_of(members), members[:3] + members[4:])
    np.testing.assert_allclose(np.diff(height_mm[:100]), 5.0, rtol=1e-4)
    # The median body's lung: both landmarks fit.
    assert height_mm[100 + 80] == pytest.approx(anchors.ORIGIN_MM, abs=1.0)  # z -500: its apex
    assert np.isnan(height_mm[300:]).all()  # not given, and without a landmark


def test_a_limb_lies_below_its_ceiling(members):
    shares = [Share("e", 0.1, below_mm=-460.0), Share("*", 0.9)]
    highest = anchors.ceilings(bank_of(members), members, shares)
    assert (highest[400:] == -460.0).all() and np.isinf(highest[:400]).all()
