"""Draws stacks of equidistant slices from a bank, and augments them on the training device."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from dicomnode.core import geometry
from training.bank import BankSeries

Draw = Callable[..., Tensor]  # uniform in -1..1, of a shape
Chance = Callable[[float], Tensor]  # True with a probability, one a stack


@dataclass(frozen=True, slots=True)
class Share:
    """How often patients whose name matches a pattern are drawn, by share of all stacks."""

    patients: str
    share: float
    below_mm: float | None = None  # all their slices lie below this height of `anchors`


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Ranges of what is varied; one draw a stack, as it is one scan, noise one a slice."""

    scale: float = 0.18  # +- of the body's size in plane
    aspect: float = 0.08  # +- of width against depth
    rotation_degrees: float = 12.0
    shift: float = 0.08  # +- of the field of view
    flip: float = 0.3  # probability of left against right
    mask: float = 0.35  # probability of a smaller field of view: circle or box
    noise: float = 10.0  # sd of values, 0..255, at most
    blur: float = 0.3  # probability of a 3 x 3 mean
    value_shift: float = 8.0  # +- of values
    value_scale: float = 0.10  # +-


class StackSampler:
    """Draws (positions in the bank, z) of stacks: volume by share, then step, then start."""

    def __init__(
        self,
        series: list[BankSeries],
        shares: list[Share],
        *,
        m: int,
        max_gap_mm: float,
        ends: float = 0.0,
    ) -> None:
        self.m, self.max_gap_mm, self.ends = m, max_gap_mm, ends
        # Equal steps in the bank are equal steps in mm only where no slice is missing.
        self.series = [
            s for s in series if len(s.z_mm) >= m and not geometry.spacing_flags(np.asarray(s.z_mm))
        ]
        if not self.series:
            raise ValueError(f"no evenly spaced series of at least {m} slices")
        self.probability = weights(self.series, shares)
        self.z = [np.asarray(s.z_mm) for s in self.series]

    def draw(
        self, rng: np.random.Generator, stacks: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return (stacks, m) indices into the bank and (stacks, m) positions, mm."""
        index = np.empty((stacks, self.m), np.int64)
        z_mm = np.empty((stacks, self.m), np.float32)
        for row, k in enumerate(rng.choice(len(self.series), stacks, p=self.probability)):
            z = self.z[k]
            spacing = (z[-1] - z[0]) / (len(z) - 1)
            longest = min((len(z) - 1) // (self.m - 1), max(1, int(self.max_gap_mm / spacing)))
            step = rng.integers(1, longest + 1)
            last = len(z) - 1 - int(step) * (self.m - 1)
            start = int(rng.integers(0, last + 1))
            # Drawn evenly, a stack seldom holds the first or the last slices: the vertex.
            if self.ends and rng.random() < self.ends:
                start = last if rng.random() < 0.5 else 0
            local = start + step * np.arange(self.m)
            index[row] = self.series[k].start + local
            z_mm[row] = z[local]
        return index, z_mm


def weights(series: list[BankSeries], shares: list[Share]) -> npt.NDArray[np.float64]:
    """Return the probability of each series: its share, split evenly over patients, then series.

    The first pattern that fits a patient counts; shares are relative.
    """
    groups: dict[int, dict[str, list[int]]] = {}
    for i, s in enumerate(series):
        groups.setdefault(fitting(s.patient, shares), {}).setdefault(s.patient, []).append(i)
    p = np.zeros(len(series))
    for g, members in groups.items():
        for own in members.values():
            p[own] = shares[g].share / len(members) / len(own)
    p /= p.sum()
    return p


def fitting(patient: str, shares: Sequence[Share]) -> int:
    """Return the number of the first share whose pattern fits a patient.

    Raises
    ------
    ValueError
        If none does.
    """
    for g, share in enumerate(shares):
        if fnmatch.fnmatch(patient, share.patients):
            return g
    raise ValueError(f"no share names patient {patient!r}; end the list with '*'")


def augment(x: Tensor, config: Augmentation, generator: torch.Generator) -> Tensor:
    """Return varied inputs, (B, m, H, W) float 0..255 in and out, on x's device."""
    b, _, h, w = x.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=x.device) * 2 - 1

    def chance(p: float) -> Tensor:
        return torch.rand(b, generator=generator, device=x.device) < p

    x = _affine(x, config, uniform, chance)
    values = x * (1 + config.value_scale * uniform(b, 1, 1, 1))
    # Air stays air: contrast and level change tissue.
    values = values + config.value_shift * uniform(b, 1, 1, 1) * (x > 16)
    blurred = F.avg_pool2d(values, 3, 1, 1, count_include_pad=False)
    values = torch.where(chance(config.blur)[:, None, None, None], blurred, values)
    sd = config.noise * uniform(b, 1, 1, 1).abs()
    values = values + sd * torch.randn(values.shape, generator=generator, device=x.device)
    values = values * _masks(b, h, w, config, uniform, chance)[:, None]
    return values.clamp_(0, 255)


def _affine(x: Tensor, config: Augmentation, uniform: Draw, chance: Chance) -> Tensor:
    b = x.shape[0]
    angle = uniform(b) * config.rotation_degrees * torch.pi / 180
    scale = 1 + config.scale * uniform(b)
    aspect = 1 + config.aspect * uniform(b)
    mirror = torch.where(chance(config.flip), -1.0, 1.0)
    shift = uniform(b, 2) * config.shift * 2
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [
        torch.stack([mirror * cos * scale * aspect, -sin * scale, shift[:, 0]], 1),
        torch.stack([mirror * sin * scale, cos * scale / aspect, shift[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [b, 1, *x.shape[2:]], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)  # outside is 0: air


def _masks(b: int, h: int, w: int, config: Augmentation, uniform: Draw, chance: Chance) -> Tensor:
    """(b, h, w) of 0 and 1: the whole field, or a circle or box inside it."""
    centre = uniform(b, 2, 1, 1) * 0.35
    y = torch.linspace(-1, 1, h, device=centre.device)[None, :, None]
    x = torch.linspace(-1, 1, w, device=centre.device)[None, None, :]
    size = 0.65 + 0.25 * uniform(b, 2, 1, 1)
    dy, dx = (y - centre[:, 0]) / size[:, 0], (x - centre[:, 1]) / size[:, 1]
    circle = dy**2 + dx**2 < 1
    box = (dy.abs() < 1) & (dx.abs() < 1)
    mask = torch.where(chance(0.5)[:, None, None], circle, box)
    return (mask | ~chance(config.mask)[:, None, None]).float()
