"""A covariance is learned back from curves drawn from it, and its sigma is then right."""

from dataclasses import dataclass

import numpy as np
import pytest

from dicomnode.core import robust
from dicomnode.errors import ConfigError
from dicomnode.model import ScoreCurve
from tests.unit.test_robust import COVARIANCE, any_parts, drawn_pairs
from training import covariance


@dataclass(frozen=True)
class Known:
    patient: str
    fixed: ScoreCurve
    moving: ScoreCurve
    truth_mm: float


def known(count, seed):
    return [
        Known(f"p{i % 20}", *drawn) for i, drawn in enumerate(drawn_pairs(count, any_parts, seed))
    ]


@pytest.fixture(scope="module")
def learned():
    return covariance.fit(known(70, seed=1))


def test_what_drew_the_curves_is_learned_back(learned):
    # Within the half of it: 70 pairs tell no more. A scan's constant and its slow drift look
    # alike in a short scan: only their sum is told.
    for name in ("anatomy_sd_mm", "slope_sd"):
        assert getattr(learned, name) == pytest.approx(getattr(COVARIANCE, name), rel=0.5), name
    scan = [np.hypot(c.scan_sd_mm, c.scan_constant_sd_mm) for c in (learned, COVARIANCE)]
    assert scan[0] == pytest.approx(scan[1], rel=0.5)


def test_nine_errors_of_ten_lie_inside_on_other_patients(learned):
    inside = []
    for p in known(120, seed=2):
        found = robust.robust(p.fixed, p.moving, learned)
        if found.sigma_mm:
            inside.append(abs(found.offset_mm - p.truth_mm) <= covariance.Z_90 * found.sigma_mm)
    # Binomial 95 % of 120 draws, and what 70 pairs leave open of the factor.
    assert 0.82 <= np.mean(inside) <= 0.97


def test_a_misread_body_does_not_widen_the_rest(learned):
    pairs = known(70, seed=1)
    pairs[3] = Known("p3", pairs[3].fixed, pairs[3].moving, pairs[3].truth_mm + 400.0)
    spoilt = covariance.fit(pairs)
    scan = [np.hypot(c.scan_sd_mm, c.scan_constant_sd_mm) for c in (spoilt, learned)]
    assert scan[0] < 1.5 * scan[1]


def test_no_patient_teaches_itself(monkeypatch):
    taught = []

    def fit(pairs, *, seed=0):
        taught.append({p.patient for p in pairs})
        return COVARIANCE

    monkeypatch.setattr(covariance, "fit", fit)
    pairs = known(40, seed=3)
    by = covariance.by_split(pairs)
    names = {p.patient for p in pairs}
    assert by.keys() == names
    assert len(taught) == covariance.SPLITS
    for name in names:
        assert sum(name not in t for t in taught) == 1


def test_a_few_pairs_teach_nothing():
    with pytest.raises(ConfigError, match="3 pairs"):
        covariance.fit(known(3, seed=4))
