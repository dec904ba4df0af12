"""FASTA, the grid search over translations that the paper compares with, exact and fast.

Moving image of at most 128 voxels an axis, 3 x 3 x 71 translations, mean squared difference
over the overlap: what ITK's `MeanSquaresImageToImageMetricv4` is at every voxel of the fixed
image, with linear interpolation. The paper lets an optimizer visit the translations one by one;
here all translations along z come from one matrix product of slices,
`|f - m|^2 = |f|^2 + |m|^2 - 2 f m`, of which each is a diagonal.

The counts are the paper's, the widths are chosen here: centres of both volumes on each other are
the middle of the grid; along z it reaches as far as `MIN_OVERLAP_MM` of overlap, in plane
`IN_PLANE_MM` to either side.

References
----------
Meine and Hering 2019, "Efficient Prealignment of CT Scans for Registration through a
Bodypart Regressor".
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dicomnode.core.pixels import AIR_HU
from dicomnode.model import Floats

SIZE = 128  # voxels of the moving image, at most, an axis
Z_STEPS = 71
IN_PLANE_MM = 15.0
# That of `l1`; or half the shorter volume, where that is less.
MIN_OVERLAP_MM = 30.0

Voxels = npt.NDArray[np.float32]
Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Volume:
    """Axial slices from feet to head, rows to posterior, columns to patient left."""

    hu: Voxels  # (slices, rows, columns) float32
    spacing_mm: Triple  # between slices, rows, columns
    origin_mm: Triple  # z, y, x of the first voxel's centre, LPS

    @property
    def centre_mm(self) -> Floats:
        """z, y, x of the middle of the volume: (3,) float64."""
        last = np.array(self.hu.shape) - 1
        return np.asarray(self.origin_mm + last * np.array(self.spacing_mm) / 2)


@dataclass(frozen=True, slots=True)
class Grid:
    """The translations to try, in voxels: fixed index = moving index + translation.

    Those along z may lie between voxels.
    """

    z: Floats  # (Z,) float64, ascending
    y: tuple[int, ...]
    x: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """The best translation of a grid: `z_fixed = z_moving + offset_mm`, x and y likewise.

    `cost` is the mean squared difference, HU^2, over the voxels where both volumes lie;
    `overlap` is their share of the smaller volume. `costs` holds the whole grid.
    """

    offset_mm: float
    dy_mm: float
    dx_mm: float
    cost: float
    overlap: float
    costs: Floats  # (len(grid.z), len(grid.y), len(grid.x)) float64


def align(fixed: Volume, moving: Volume) -> Fit:
    """Return the best translation of two volumes as they come, on the paper's grid."""
    f, m = shrink(fixed, moving)
    return search(f, m, paper_grid(f, m))


def shrink(fixed: Volume, moving: Volume, size: int = SIZE) -> tuple[Volume, Volume]:
    """Return both volumes on voxels so wide that the moving one has at most `size` an axis.

    Every axis by itself: one that has no more voxels than that keeps its spacing. Voxels are
    means over their own extent, or linearly interpolated where they become finer. Each grid is
    centred on its volume, and the fixed one has an even number of voxels where the moving one has:
    with both centres on each other, the voxels of one lie on those of the other. Below air is air.
    """
    count, old = np.array(moving.hu.shape), np.array(moving.spacing_mm)
    spacing = old * np.maximum(1.0, count / size)
    m_count = np.minimum(count, size)
    f_count = np.array(fixed.hu.shape) * fixed.spacing_mm / spacing
    f_count = m_count + 2 * np.floor((f_count - m_count) / 2 + 1e-6).astype(int)
    f_count = np.maximum(f_count, 2 - m_count % 2)
    return _resample(fixed, spacing, f_count), _resample(moving, spacing, m_count)


def paper_grid(
    fixed: Volume,
    moving: Volume,
    *,
    z_steps: int = Z_STEPS,
    in_plane_mm: float = IN_PLANE_MM,
) -> Grid:
    """Return the paper's 3 x 3 x 71 translations of two volumes of one spacing.

    Evenly spaced along z from `MIN_OVERLAP_MM` at one end to as much at the other.
    """
    low, high, y, x = _reach(fixed, moving, in_plane_mm)
    return Grid(np.linspace(low, high, z_steps), y, x)


def full_grid(fixed: Volume, moving: Volume, *, in_plane_mm: float = IN_PLANE_MM) -> Grid:
    """Return every whole slice of translation along z, and three each along y and x."""
    low, high, y, x = _reach(fixed, moving, in_plane_mm)
    return Grid(np.arange(low, high + 1, dtype=float), y, x)


def search(fixed: Volume, moving: Volume, grid: Grid) -> Fit:
    """Return the translation of the grid with the lowest mean squared difference.

    Exactly what to visit all of them would give, float32 rounding aside.

    Raises
    ------
    ValueError
        If the two volumes differ in spacing, or a translation leaves no overlap.
    """
    if not np.allclose(fixed.spacing_mm, moving.spacing_mm, rtol=1e-6):
        raise ValueError(f"spacings differ: {fixed.spacing_mm} and {moving.spacing_mm} mm")
    products = _products(fixed.hu, moving.hu, grid)
    costs = np.stack([_cost(grid.z, p) for p in products], axis=1)
    costs = costs.reshape(len(grid.z), len(grid.y), len(grid.x))
    at = np.unravel_index(int(np.argmin(costs)), costs.shape)
    best = np.array([grid.z[at[0]], grid.y[at[1]], grid.x[at[2]]])
    offset = best * fixed.spacing_mm + fixed.origin_mm - np.array(moving.origin_mm)
    shapes = np.array([fixed.hu.shape, moving.hu.shape])
    common = np.minimum(shapes[0], shapes[1] + best) - np.maximum(0, best)  # voxels an axis
    return Fit(
        offset_mm=float(offset[0]),
        dy_mm=float(offset[1]),
        dx_mm=float(offset[2]),
        cost=float(costs[at]),
        overlap=float(common.prod() / shapes.prod(1).min()),
        costs=costs,
    )


def _reach(
    fixed: Volume, moving: Volume, in_plane_mm: float
) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Return the lowest and highest translation along z, then those along y and x, voxels."""
    f, m = np.array(fixed.hu.shape), np.array(moving.hu.shape)
    least = int(np.ceil(min(MIN_OVERLAP_MM / fixed.spacing_mm[0], f[0] / 2, m[0] / 2)))
    # A whole number: `shrink` made both counts odd, or both even.
    middle = (f - m) // 2
    steps = [max(1, round(in_plane_mm / fixed.spacing_mm[axis])) for axis in (1, 2)]
    y, x = ((c - s, c, c + s) for c, s in zip(middle[1:].tolist(), steps, strict=True))
    return int(least - m[0]), int(f[0] - least), y, x


@dataclass(frozen=True, slots=True)
class _Products:
    """Sums over the pixels where both volumes lie, of one translation in plane; float64."""

    pixels: int
    fixed: Floats  # (F,) of squares of each fixed slice
    moving: Floats  # (M,) likewise
    next: Floats  # (M - 1,) of each moving slice times the one above it
    both: Floats  # (F, M) of each fixed slice times each moving slice


def _products(fixed: Voxels, moving: Voxels, grid: Grid) -> Iterator[_Products]:
    """Yield the sums of each translation in plane, x fastest.

    Both volumes lie on canvases of one width, zero outside: to move one in plane is to begin to
    read it elsewhere, so that nothing is copied and what sticks out adds nothing.
    """
    # Differences are the same, and float32 keeps them when the numbers are small.
    mean = np.float32((fixed.mean(dtype=float) + moving.mean(dtype=float)) / 2)
    (f_rows, f_columns), (m_rows, m_columns) = fixed.shape[1:], moving.shape[1:]
    in_f = _shared(f_rows, m_rows, grid.y), _shared(f_columns, m_columns, grid.x)
    in_m = tuple(
        windows - np.array(steps)[:, None]
        for windows, steps in zip(in_f, (grid.y, grid.x), strict=True)
    )
    top, left = max(0, *grid.y), max(0, *grid.x)
    height = 1 + top + max(m_rows, f_rows - min(grid.y))
    width = left + max(m_columns, f_columns - min(grid.x))
    f = np.zeros((len(fixed), f_rows, width), np.float32)
    f[:, :, :f_columns] = fixed - mean
    m = np.zeros((len(moving), height, width), np.float32)
    inner = m[:, top : top + m_rows, left : left + m_columns]
    inner[:] = moving - mean
    squares_f = _window_sums(f[:, :, :f_columns] ** 2, *in_f)
    squares_m = _window_sums(inner**2, *in_m)
    nexts = np.zeros_like(squares_m[1:])
    if (grid.z % 1).any():
        nexts = _window_sums(inner[:-1] * inner[1:], *in_m)
    f, m = f.reshape(len(f), -1), m.reshape(len(m), -1)
    for i, ty in enumerate(grid.y):
        for j, tx in enumerate(grid.x):
            start = (top - ty) * width + left - tx
            yield _Products(
                pixels=int(np.diff(in_f[0][i])[0] * np.diff(in_f[1][j])[0]),
                fixed=squares_f[:, i, j],
                moving=squares_m[:, i, j],
                next=nexts[:, i, j],
                both=(f @ m[:, start : start + f.shape[1]].T).astype(float),
            )


def _shared(fixed: int, moving: int, steps: tuple[int, ...]) -> npt.NDArray[np.int_]:
    """Return the first fixed pixel of an axis where both lie and the one past the last: (T, 2)."""
    t = np.array(steps)
    windows = np.stack([t.clip(0), (moving + t).clip(None, fixed)], axis=1)
    if (windows[:, 0] >= windows[:, 1]).any():
        raise ValueError("a translation leaves no overlap in plane")
    return windows


def _window_sums(
    values: Voxels, rows: npt.NDArray[np.int_], columns: npt.NDArray[np.int_]
) -> Floats:
    """Return sums over windows: (N, R, C) -> (N, windows of rows, windows of columns)."""
    by_row, by_column = (
        (low[:, None] <= np.arange(n)) & (np.arange(n) < high[:, None])
        for n, (low, high) in zip(values.shape[1:], (rows.T, columns.T), strict=True)
    )
    sums = values @ by_column.T.astype(np.float32)  # (N, R, column windows)
    return np.asarray(by_row.astype(float) @ sums.astype(float))


def _cost(z: Floats, sums: _Products) -> Floats:
    """Return the mean squared difference at each translation along z: (Z,) float64."""
    f_count, m_count = sums.both.shape
    i = np.arange(f_count)
    at = i - z[:, None]  # (Z, F) where each fixed slice lies in the moving volume, in its slices
    # ITK's ImageFunction::IsInsideBuffer: voxels reach half a voxel beyond their centres.
    counts = (at >= -0.5) & (at < m_count - 0.5)
    slices = counts.sum(1)
    if not slices.all():
        raise ValueError("a translation leaves no overlap along z")
    below = np.floor(at).astype(int)
    share = at - below  # of the slice above; beyond the last centres there is only one slice
    share[(below < 0) | (below >= m_count - 1)] = 0
    one = below.clip(0, m_count - 1)
    two = (below + 1).clip(0, m_count - 1)
    pairs = one.clip(0, max(0, m_count - 2))
    rest = 1 - share
    squared = (
        sums.fixed
        + rest * rest * sums.moving[one]
        + share * share * sums.moving[two]
        - 2 * (rest * sums.both[i, one] + share * sums.both[i, two])
    )
    if share.any():
        squared += 2 * rest * share * sums.next[pairs]
    # Rounding takes the difference of equal slices below 0.
    total = np.where(counts, squared, 0).sum(1).clip(0)
    return np.asarray(total / (slices * sums.pixels))


def _resample(volume: Volume, spacing: Floats, count: npt.NDArray[np.int_]) -> Volume:
    """Return a volume on `count` voxels an axis of a spacing, about the same centre."""
    wz, wy, wx = (
        _weights(n, mm, new_n, new_mm)
        for n, mm, new_n, new_mm in zip(
            volume.hu.shape, volume.spacing_mm, count.tolist(), spacing.tolist(), strict=True
        )
    )
    hu = np.empty(tuple(count), np.float32)
    for image, weights in zip(hu, wz, strict=True):
        used = np.flatnonzero(weights)
        slices = slice(used[0], used[-1] + 1)
        near = np.maximum(volume.hu[slices], np.float32(AIR_HU))
        image[:] = wy @ np.tensordot(weights[slices], near, 1) @ wx.T
    origin = volume.centre_mm - (count - 1) / 2 * spacing
    return Volume(hu, tuple(spacing.tolist()), tuple(origin.tolist()))


def _weights(count: int, spacing_mm: float, new_count: int, new_mm: float) -> Voxels:
    """Return what each voxel adds to each new one of an axis, (new_count, count), rows sum to 1."""
    width = max(spacing_mm, new_mm)
    new = (np.arange(new_count) - (new_count - 1) / 2) * new_mm
    old = (np.arange(count) - (count - 1) / 2) * spacing_mm
    distance = np.abs(new[:, None] - old)
    weights = ((width + spacing_mm) / 2 - distance).clip(0, min(width, spacing_mm))
    weights[weights < 1e-6 * width] = 0  # where rounding makes edges that touch overlap
    return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)
