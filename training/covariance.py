"""Learns how curves err, from pairs of scans whose offset is known: the robust method's covariance.

Reads scored pairs, gives a `Covariance`; its factor makes 90 % of errors lie inside 1.645 sigma.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from scipy import optimize

from dicomnode.core import robust
from dicomnode.core.robust import Covariance
from dicomnode.errors import ConfigError
from dicomnode.model import Floats, ScoreCurve

# Where the search starts; what it may not leave, by a factor of `RANGE` either way.
START = Covariance(
    slope_sd=0.05,
    anatomy_sd_mm=8.0,
    anatomy_length_mm=40.0,
    scan_constant_sd_mm=4.0,
    scan_sd_mm=5.0,
    scan_length_mm=30.0,
    noise_sd_mm=2.0,
)
LEARNED = (
    "slope_sd",
    "anatomy_sd_mm",
    "anatomy_length_mm",
    "scan_constant_sd_mm",
    "scan_sd_mm",
    "scan_length_mm",
    "noise_sd_mm",
)
RANGE = 12.0
PAIRS = 160  # that the likelihood is summed over; the factor takes all
# A pair that is this much less likely than the median one counts no more: a misread body would
# otherwise widen the covariance of all others.
CAP = 30.0
Z_90 = 1.645
SPLITS = 5
MIN_PAIRS = 20


class KnownPair(Protocol):
    """Two curves of one patient whose offset is known: `z_fixed = z_moving + truth_mm`."""

    @property
    def patient(self) -> str:
        """Whose they are."""

    @property
    def fixed(self) -> ScoreCurve:
        """The fixed curve."""

    @property
    def moving(self) -> ScoreCurve:
        """The moving curve."""

    @property
    def truth_mm(self) -> float:
        """The offset."""


def fit(pairs: Sequence[KnownPair], *, seed: int = 0) -> Covariance:
    """Return the covariance of highest likelihood, with its factor.

    Raises
    ------
    ConfigError
        If there are too few pairs.
    """
    usable = [p for p in pairs if min(p.fixed.quality.slope, p.moving.quality.slope) > 0]
    if len(usable) < MIN_PAIRS:
        raise ConfigError(f"{len(usable)} pairs do not tell how curves err, {MIN_PAIRS} may")
    chosen = np.random.default_rng(seed).permutation(len(usable))[:PAIRS]
    bins = [
        (*robust.binned(p.fixed, p.moving, START), p.truth_mm) for p in (usable[i] for i in chosen)
    ]
    start = np.log([getattr(START, name) for name in LEARNED])

    def loss(log_values: Floats) -> float:
        c = _of(log_values)
        each = np.array([-robust.log_joint(f, m, c, truth) for f, m, truth in bins])
        # A mean that is robust: far pairs at the cap above the median.
        return float(np.minimum(each, np.median(each) + CAP).mean())

    reach = np.log(RANGE)
    found = optimize.minimize(
        loss,
        start,
        method="L-BFGS-B",
        bounds=[(v - reach, v + reach) for v in start],
        options={"maxiter": 40, "eps": 1e-3},
    )
    return replace(_of(found.x), factor=factor(usable, _of(found.x)))


def factor(pairs: Iterable[KnownPair], c: Covariance) -> float:
    """Return by what to multiply sigma so that 90 % of errors lie inside 1.645 of it."""
    ratio = []
    for p in pairs:
        found = robust.robust(p.fixed, p.moving, replace(c, factor=1.0, refuse_sigma_mm=np.inf))
        if found.offset_mm is not None and found.sigma_mm:
            ratio.append(abs(found.offset_mm - p.truth_mm) / (Z_90 * found.sigma_mm))
    return float(np.quantile(ratio, 0.9, method="higher"))


def by_split(
    pairs: Sequence[KnownPair],
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Covariance]:
    """Return patient -> covariance, learned from patients of the other splits alone."""
    names = sorted({p.patient for p in pairs})
    order = np.random.default_rng(seed).permutation(len(names))
    split = {names[k]: i % SPLITS for i, k in enumerate(order.tolist())}
    learned: dict[int, Covariance] = {}
    for k in sorted(set(split.values())):
        learned[k] = fit([p for p in pairs if split[p.patient] != k], seed=seed)
        progress(1)
    return {name: learned[k] for name, k in split.items()}


def _of(log_values: Floats) -> Covariance:
    values = np.exp(log_values)
    return replace(START, **{n: float(v) for n, v in zip(LEARNED, values, strict=True)})
