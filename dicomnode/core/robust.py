"""The offset of two curves as a posterior: where both scans are one patient's, seen twice.

Body height strays from position for reasons that the scans of a patient share (proportions,
appearance) and for reasons of one scan alone (breathing, contrast, arms, noise). With both as
Gaussian processes, learned from data, one likelihood over the offset matches curves where they
overlap, extrapolates by the population's slope where they do not, and tells its own error.

References
----------
Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", equations 2.30 (the
likelihood), 4.17 (Matern 3/2) and 5.12 (leaving one out).
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from dicomnode.core import outline
from dicomnode.errors import WeightsError
from dicomnode.model import Floats, Method, Offset, OffsetStatus, ScoreCurve

SAMPLE_MM = 1.0  # a curve is resampled to it, then averaged over bins
# The search starts with this step, and doubles it until it holds the whole posterior.
STEP_MM, MAX_STEP_MM = 8.0, 64.0
NEAR_STEP_MM = 2.5  # where a first search says about where
GRID = np.arange(-4.0, 5.0)  # steps about the centre, then about the best of them
FINE = np.array([-0.75, -0.5, -0.25, 0.25, 0.5, 0.75])
MIN_SD_MM = 0.5
# Bins further from what their neighbours say count for less.
OUTLIER_SD = 3.0
MAX_BINS = 96  # of one curve: longer scans have wider bins
RIDER = 1e12  # above any squared whitened residual, so that the last row stays positive
NO_COVARIANCE = "the weight bundle does not say how its curves err"
# A constant of the patient is not known beforehand: as good as a flat prior.
LEVEL_SD_MM = 100.0


@dataclass(frozen=True, slots=True)
class Covariance:
    """How body height minus position varies, mm; learned for a bundle, part of its manifest.

    `factor` scales the posterior's sd so that 90 % of errors lie inside 1.645 `sigma_mm`, on
    patients that did not fit the rest.
    """

    slope_sd: float  # of learned mm a true mm, shared by all scans of a patient
    anatomy_sd_mm: float  # along the body, likewise
    anatomy_length_mm: float
    scan_constant_sd_mm: float  # of one scan
    scan_sd_mm: float  # along one scan
    scan_length_mm: float
    noise_sd_mm: float  # of a bin
    bin_mm: float = 16.0
    factor: float = 1.0
    refuse_sigma_mm: float = 60.0  # beyond it the answer would be a guess

    def to_dict(self) -> dict[str, float]:
        """Return the parameters as the manifest of a bundle holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Covariance":
        """Return the parameters of a manifest.

        Raises
        ------
        WeightsError
            If one is missing, unknown, or no positive number.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise WeightsError(f"the bundle's covariance must give {', '.join(sorted(names))}")
        found = cls(**{k: float(v) for k, v in values.items()})
        if not all(np.isfinite(v) and v > 0 for v in asdict(found).values()):
            raise WeightsError("the bundle's covariance has a value that is no positive number")
        return found


@dataclass(frozen=True, slots=True)
class Binned:
    """A curve in bins of equal width: centre, height minus position, and height, (n,) mm."""

    z_mm: Floats
    excess_mm: Floats
    height_mm: Floats


def robust(fixed: ScoreCurve, moving: ScoreCurve, covariance: Covariance | None) -> Offset:
    """Return the most likely offset, with its sigma.

    `extrapolated` where the scans share no body height; refused where a curve is no curve of
    a body, or the sigma says that the answer would be a guess.
    """
    if covariance is None:
        return _refuse(NO_COVARIANCE)
    for curve, name in ((fixed, "fixed"), (moving, "moving")):
        if curve.quality.slope <= 0:
            return _refuse(f"the {name} scan's body height does not grow towards the head")
    f, m = binned(fixed, moving, covariance)
    offset_mm, sd = posterior(f, m, covariance)
    sigma_mm = sd * covariance.factor
    if sigma_mm > covariance.refuse_sigma_mm:
        return _refuse(f"the offset is uncertain by {sigma_mm:.0f} mm, sigma")
    shared = min(fixed.height_mm.max(), moving.height_mm.max()) >= max(
        fixed.height_mm.min(), moving.height_mm.min()
    )
    top = min(fixed.z_mm[-1], moving.z_mm[-1] + offset_mm)
    overlap = max(0.0, float(top - max(fixed.z_mm[0], moving.z_mm[0] + offset_mm)))
    dx_mm, dy_mm = outline.in_plane(fixed, moving, offset_mm)
    return Offset(
        method=Method.ROBUST,
        status=OffsetStatus.OK if shared and overlap > 0 else OffsetStatus.EXTRAPOLATED,
        offset_mm=offset_mm,
        overlap_mm=overlap,
        sigma_mm=sigma_mm,
        dx_mm=dx_mm,
        dy_mm=dy_mm,
    )


def posterior(f: Binned, m: Binned, c: Covariance) -> tuple[float, float]:
    """Return (mode, sd) of the offset, mm, both before `factor`."""
    noise_f = np.full(len(f.z_mm), c.noise_sd_mm**2)
    noise_m = np.full(len(m.z_mm), c.noise_sd_mm**2)
    mode, sd, farthest = _search(_Conditional(f, m, c, noise_f, noise_m))
    if farthest > OUTLIER_SD:
        # One step of reweighting, as of a Student's t: far bins keep little of their say.
        z = np.abs(_leave_one_out(f, m, c, noise_f, noise_m, mode)) / OUTLIER_SD
        if (z > 1).any():
            inflated: Floats = c.noise_sd_mm**2 * np.maximum(1.0, z**4)
            n = len(noise_f)
            mode, sd, _ = _search(_Conditional(f, m, c, inflated[:n], inflated[n:]), mode)
    return mode, sd


class _Conditional:
    """The moving curve's likelihood given the fixed one (Rasmussen and Williams, equation 2.19).

    Only matrices of the moving curve's size depend on the offset; the others are made once.
    """

    def __init__(
        self, f: Binned, m: Binned, c: Covariance, noise_f: Floats, noise_m: Floats
    ) -> None:
        self.f, self.m, self.c = f, m, c
        self.inverse = np.linalg.inv(np.linalg.cholesky(_own(f, c) + np.diag(noise_f)))
        self.level = float(np.median(f.excess_mm))  # positions have an arbitrary zero
        self.u = self.inverse @ (f.excess_mm - self.level)  # (n_f,)
        self.own = _own(m, c) + np.diag(noise_m)
        self.lag = f.z_mm[:, None] - m.z_mm[None, :]  # (n_f, n_m)
        self.flat = _flat(f.height_mm[:, None], m.height_mm[None, :], c)

    @property
    def centre_mm(self) -> float:
        """Where the body heights agree on average."""
        return float(np.median(self.m.excess_mm)) - self.level

    def log(self, offsets_mm: Floats) -> tuple[Floats, Floats]:
        """Return the log likelihood of each offset (T,), up to a constant, and what is left.

        The second is the farthest bin from what the bins before it say, sd, (T,).
        """
        lag = self.lag[None] - offsets_mm[:, None, None]
        shared = self.flat + self.c.anatomy_sd_mm**2 * _matern(lag / self.c.anatomy_length_mm)
        v = self.inverse @ shared  # (T, n_f, n_m)
        n = len(self.own)
        # The residual rides along as a last row, which the factorisation then whitens.
        s = np.empty((len(offsets_mm), n + 1, n + 1))
        s[:, :n, :n] = self.own - v.transpose(0, 2, 1) @ v
        s[:, n, :n] = (self.m.excess_mm - self.level)[None] - offsets_mm[:, None] - self.u @ v
        s[:, n, n] = RIDER  # what lies above the diagonal is not read
        root = np.linalg.cholesky(s)
        white = root[:, n, :n]
        log_det = np.log(np.diagonal(root[:, :n, :n], axis1=1, axis2=2)).sum(1)
        farthest = np.maximum(np.abs(white).max(1), np.abs(self.u).max())
        return -log_det - 0.5 * (white**2).sum(1), farthest


def log_joint(f: Binned, m: Binned, c: Covariance, offset_mm: float) -> float:
    """Return the log likelihood of both curves where the offset is known, up to a constant.

    What a covariance is learned by.
    """
    noise_f, noise_m = (np.full(len(b.z_mm), c.noise_sd_mm**2) for b in (f, m))
    k, y = _joint(f, m, c, noise_f, noise_m, offset_mm)
    root = np.linalg.cholesky(k)
    white = np.linalg.solve(root, y)
    return -float(np.log(np.diag(root)).sum() + 0.5 * white @ white)


def _search(given: _Conditional, near_mm: float | None = None) -> tuple[float, float, float]:
    """Mode and sd of the posterior of a flat prior, and the farthest bin there."""
    centre, step = (given.centre_mm, STEP_MM) if near_mm is None else (near_mm, NEAR_STEP_MM)
    while True:
        t: Floats = centre + step * GRID
        value, farthest = given.log(t)
        best = int(np.argmax(value))
        # Until the grid holds the whole posterior: three sd to either side.
        if max(value[0], value[-1]) < value[best] - 4.5 or step >= MAX_STEP_MM:
            break
        centre, step = float(t[best]), step * 2
    if near_mm is None:
        fine: Floats = t[best] + step * FINE
        finer, farthest = given.log(fine)
        t, value = np.concatenate([t, fine]), np.concatenate([value, finer])
        order = np.argsort(t)
        t, value = t[order], value[order]
    peak = int(np.argmax(value))
    mode = float(t[peak])
    if 0 < peak < len(t) - 1:
        mode = _vertex(t[peak - 1 : peak + 2], value[peak - 1 : peak + 2])
    weight = np.exp(value - value[peak]) * np.gradient(t)
    sd = float(np.sqrt((weight * (t - mode) ** 2).sum() / weight.sum()))
    return mode, max(sd, MIN_SD_MM), float(farthest.max())


def _vertex(t: Floats, value: Floats) -> float:
    """Where the parabola through three points, the middle one highest, is highest."""
    left, right = t[1] - t[0], t[2] - t[1]
    rise, fall = (value[1] - value[0]) / left, (value[1] - value[2]) / right
    if rise + fall <= 0:
        return float(t[1])
    return float(t[1] + (rise * right - fall * left) / (rise + fall) / 2)


def _leave_one_out(
    f: Binned, m: Binned, c: Covariance, noise_f: Floats, noise_m: Floats, offset_mm: float
) -> Floats:
    """Standardised error of each bin, fixed then moving, against all others (equation 5.12)."""
    k, y = _joint(f, m, c, noise_f, noise_m, offset_mm)
    inverse = np.linalg.inv(k)
    z: Floats = (inverse @ y) / np.sqrt(np.diag(inverse))
    return z


def _joint(
    f: Binned, m: Binned, c: Covariance, noise_f: Floats, noise_m: Floats, offset_mm: float
) -> tuple[Floats, Floats]:
    """Covariance (n, n) and values (n,) of all bins, fixed then moving, moved by the offset."""
    lag = f.z_mm[:, None] - m.z_mm[None, :] - offset_mm
    cross = _shared(lag, f.height_mm[:, None], m.height_mm[None, :], c)
    k = np.block([[_own(f, c) + np.diag(noise_f), cross], [cross.T, _own(m, c) + np.diag(noise_m)]])
    y = np.concatenate([f.excess_mm, m.excess_mm - offset_mm]) - np.median(f.excess_mm)
    return k, y


def _own(b: Binned, c: Covariance) -> Floats:
    lag = b.z_mm[:, None] - b.z_mm[None, :]
    own: Floats = (
        _shared(lag, b.height_mm[:, None], b.height_mm[None, :], c)
        + c.scan_constant_sd_mm**2
        + c.scan_sd_mm**2 * _matern(lag / c.scan_length_mm)
    )
    return own


def _shared(lag: Floats, height_a: Floats, height_b: Floats, c: Covariance) -> Floats:
    shared: Floats = _flat(height_a, height_b, c)
    return shared + c.anatomy_sd_mm**2 * _matern(lag / c.anatomy_length_mm)


def _flat(height_a: Floats, height_b: Floats, c: Covariance) -> Floats:
    flat: Floats = LEVEL_SD_MM**2 + height_a * height_b * c.slope_sd**2
    return flat


def _matern(x: Floats) -> Floats:
    s = np.sqrt(3.0) * np.abs(x)
    k: Floats = (1 + s) * np.exp(-s)
    return k


def binned(fixed: ScoreCurve, moving: ScoreCurve, c: Covariance) -> tuple[Binned, Binned]:
    """Return both curves in bins of `c.bin_mm`, wider ones where there would be too many.

    Heights are counted from the fixed curve's median: about it a patient is taller or shorter
    than the population, and a constant says nothing, as positions have an arbitrary zero.
    """
    f, m = _binned(fixed, c), _binned(moving, c)
    middle = float(np.median(f.height_mm))
    return replace(f, height_mm=f.height_mm - middle), replace(m, height_mm=m.height_mm - middle)


def _binned(curve: ScoreCurve, c: Covariance) -> Binned:
    extent = float(curve.z_mm[-1] - curve.z_mm[0])
    width = max(c.bin_mm, extent / MAX_BINS)
    count = max(2, int(extent / width))
    samples = max(1, round(extent / count / SAMPLE_MM))  # of a bin
    z = curve.z_mm[0] + (np.arange(count * samples) + 0.5) * extent / (count * samples)
    height = np.interp(z, curve.z_mm, curve.height_mm).reshape(count, samples).mean(1)
    z = z.reshape(count, samples).mean(1)
    return Binned(z, height - z, height)


def _refuse(reason: str) -> Offset:
    return Offset(method=Method.ROBUST, status=OffsetStatus.REFUSED, reason=reason)
