"""Synthetic follow-ups of a CT volume: what another scan of the same patient would show.

A follow-up differs in breathing and posture, position on the table, slice spacing, pixels, field
of view, contrast, kernel and noise. All of it is drawn from `FollowUpConfig`, by a seed.

Positions of the follow-up's scanner are mapped to the volume's in two steps: a rigid one (shift,
rotation in plane), then `q + u(q)` with a smooth displacement `u`, mm. `z_fixed = z_moving +
truth_mm` then holds on average over the bone that the follow-up shows: truth is the table shift
plus the mean of `u_z` over its bone, in other words the shift for which what is left of the
deformation has mean zero over bone. Breathing moves what lies inside the body and leaves
the spine; posture moves all by a little.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dicomnode.core.pixels import AIR_HU
from dicomnode.model import Floats

Range = tuple[float, float]
Image = npt.NDArray[np.float32]
OUTSIDE_HU = -1024.0  # what `pixels.to_hu` makes of pixels that were never measured

BODY_HU, LUNG_HU, BONE_HU = -300.0, -500.0, 250.0
CELL_MM = 8.0  # of the grid that displacements are made on
MIN_LUNG_MM2 = (
    8000.0  # less air in a slice is a trachea or bowel: 40 cm2 of it were met in a pelvis
)
MIN_BONE = 200  # pixels; a follow-up that shows less is placed by its whole body


@dataclass(frozen=True, slots=True)
class FollowUpConfig:
    """Ranges of everything a follow-up differs in; each value is drawn uniformly from its range."""

    seed: int = 0
    # Free breathing moves the dome by 10 mm and more (Seppenwoolde et al. 2002, Int. J. Radiat.
    # Oncol. Biol. Phys. 53, 822-834); towards the feet where positive.
    breath_mm: Range = (-15.0, 15.0)
    expand_mm: Range = (0.0, 6.0)  # of the chest wall to the front, in full breath
    posture_mm: Range = (0.0, 3.0)  # sd of a displacement by B-splines
    posture_knot_mm: float = 80.0
    spacing_mm: tuple[float, ...] = (1.0, 1.25, 2.0, 2.5, 3.0, 5.0)  # one of them
    pixel: Range = (0.8, 1.5)  # times the volume's own
    min_pixel_mm: float = 1.2  # a third of what the network sees
    field: Range = (0.85, 1.3)  # of view, times the larger side of the body
    box: float = 0.3  # share of fields that are square, not round
    table_mm: Range = (-40.0, 40.0)  # shift in x and in y
    table_z_mm: Range = (-500.0, 500.0)
    rotation_degrees: Range = (-5.0, 5.0)  # about the body's long axis
    centring_mm: Range = (-20.0, 20.0)  # of the field on the body
    level_hu: Range = (-10.0, 10.0)  # everywhere
    soft_hu: Range = (-15.0, 25.0)  # soft tissue
    enhanced_hu: Range = (-50.0, 80.0)  # vessels, and what else has 150 to 300 HU
    noise_hu: Range = (5.0, 40.0)  # sd, before the kernel
    noise_mm: Range = (0.5, 1.5)  # sd of the gaussian that correlates it
    blur_mm: Range = (0.0, 1.2)  # sd of a soft kernel
    sharpen: Range = (0.0, 0.8)  # share of a sharp kernel's unsharp mask
    sharp: float = 0.5  # share of kernels that are sharp


@dataclass(frozen=True, slots=True)
class Volume:
    """A CT stack in patient axes: rows to posterior, columns to patient left, LPS."""

    image_hu: npt.NDArray[Any]  # (N, R, C) float32 or int16
    z_mm: Floats  # (N,) float64, strictly increasing
    pixel_mm: tuple[float, float]  # between rows, between columns
    origin_mm: tuple[float, float]  # y, x of the first pixel's centre


@dataclass(frozen=True, slots=True)
class FollowUp:
    """What was drawn for one follow-up; millimetres and HU as in `FollowUpConfig`."""

    seed: int  # of posture and noise
    breath_mm: float
    expand_mm: float
    posture_mm: float
    spacing_mm: float
    phase_mm: float  # of its first slice above the volume's
    pixel_mm: float
    field_mm: float
    box: bool
    shift_mm: tuple[float, float, float]  # z, y, x: added to its positions, they are the volume's
    rotation_degrees: float
    centring_mm: tuple[float, float]  # y, x
    level_hu: float
    soft_hu: float
    enhanced_hu: float
    noise_hu: float
    noise_mm: float
    blur_mm: float
    sharpen: float

    @property
    def steps(self) -> int:
        """Into how many slices of about 1 mm each step between slices is interpolated."""
        return max(1, round(self.spacing_mm))


@dataclass(frozen=True, slots=True)
class Body:
    """What displacements hang on, found from HU on a coarse grid."""

    z_mm: Floats  # (Z,) of the grid
    y_mm: Floats  # (Y,)
    x_mm: Floats  # (X,)
    inside: Image  # (Z, Y, X) 0..1: how freely it moves along z; 0 at skin, ribs and spine
    lung: Floats  # (Z,) area of lung, share of the largest
    diaphragm_mm: float | None  # z where the lungs end towards the feet; None where not seen
    centre_mm: tuple[float, float]  # y, x
    spine_mm: tuple[float, float]  # y, x
    size_mm: tuple[float, float]  # depth, width


@dataclass(frozen=True, slots=True)
class Rendered:
    """The slices of a follow-up, and where they belong."""

    volume: Volume  # positions of the follow-up's own scanner
    truth_mm: float  # z_fixed = z_moving + truth_mm, see the module
    residual_mm: float  # sd of the z displacement over bone that is left then


def survey(volume: Volume) -> Body:
    """Return where body, spine, lungs and diaphragm of a volume are."""
    row_mm, column_mm = volume.pixel_mm
    by_row, by_column = max(1, round(CELL_MM / row_mm)), max(1, round(CELL_MM / column_mm))
    ends = volume.z_mm[0], volume.z_mm[-1]
    levels = np.linspace(*ends, max(2, int((ends[1] - ends[0]) / CELL_MM) + 1))
    nearest = np.abs(volume.z_mm[None] - levels[:, None]).argmin(1)
    rows = volume.image_hu.shape[1] // by_row * by_row
    columns = volume.image_hu.shape[2] // by_column * by_column
    blocks = volume.image_hu[nearest, :rows, :columns].astype(np.float32)
    blocks = blocks.reshape(len(levels), rows // by_row, by_row, columns // by_column, by_column)
    hu = blocks.mean((2, 4))  # (Z, Y, X)
    bone = (blocks > BONE_HU).mean((2, 4))
    y_mm = volume.origin_mm[0] + (np.arange(hu.shape[1]) * by_row + (by_row - 1) / 2) * row_mm
    x_mm = (
        volume.origin_mm[1] + (np.arange(hu.shape[2]) * by_column + (by_column - 1) / 2) * column_mm
    )

    cell_mm = by_row * row_mm, by_column * column_mm
    tissue = np.stack([_largest(image > BODY_HU) for image in hu])
    filled = np.stack([ndimage.binary_fill_holes(image) for image in tissue])
    lung = (filled & (hu < LUNG_HU)).sum((1, 2)) * cell_mm[0] * cell_mm[1]
    depth = np.stack([ndimage.distance_transform_edt(image, cell_mm) for image in filled])
    centre, size = _outline(filled, y_mm, x_mm)
    spine = _spine(bone, y_mm, x_mm, centre)
    away = np.hypot(y_mm[:, None] - spine[0], x_mm - spine[1])
    # The wall of the chest is some 25 mm thick; the spine with its muscles some 45 mm wide.
    inside = _smoothstep(depth, 20, 60) * _smoothstep(away, 30, 75)
    inside = ndimage.gaussian_filter(inside, [10 / CELL_MM, 10 / cell_mm[0], 10 / cell_mm[1]])
    return Body(
        z_mm=levels,
        y_mm=y_mm,
        x_mm=x_mm,
        inside=inside.astype(np.float32),
        lung=lung / max(lung.max(), MIN_LUNG_MM2),
        diaphragm_mm=_diaphragm(levels, lung, filled.sum((1, 2))),
        centre_mm=centre,
        spine_mm=spine,
        size_mm=size,
    )


def draw(volume: Volume, body: Body, config: FollowUpConfig, rng: np.random.Generator) -> FollowUp:
    """Return one follow-up of a volume, drawn from the config's ranges."""
    spacing = float(rng.choice(config.spacing_mm))
    inhale = rng.uniform(*config.breath_mm)
    deepest = max(map(abs, config.breath_mm)) or 1.0
    sharp = rng.random() < config.sharp
    table = rng.uniform(*config.table_mm, 2)
    return FollowUp(
        seed=int(rng.integers(2**31)),
        breath_mm=inhale,
        expand_mm=rng.uniform(*config.expand_mm) * inhale / deepest,
        posture_mm=rng.uniform(*config.posture_mm),
        spacing_mm=spacing,
        phase_mm=rng.uniform(0, spacing),
        pixel_mm=max(config.min_pixel_mm, rng.uniform(*config.pixel) * min(volume.pixel_mm)),
        field_mm=rng.uniform(*config.field) * max(body.size_mm),
        box=bool(rng.random() < config.box),
        shift_mm=(rng.uniform(*config.table_z_mm), float(table[0]), float(table[1])),
        rotation_degrees=rng.uniform(*config.rotation_degrees),
        centring_mm=(rng.uniform(*config.centring_mm), rng.uniform(*config.centring_mm)),
        level_hu=rng.uniform(*config.level_hu),
        soft_hu=rng.uniform(*config.soft_hu),
        enhanced_hu=rng.uniform(*config.enhanced_hu),
        noise_hu=rng.uniform(*config.noise_hu),
        noise_mm=rng.uniform(*config.noise_mm),
        blur_mm=0.0 if sharp else rng.uniform(*config.blur_mm),
        sharpen=rng.uniform(*config.sharpen) if sharp else 0.0,
    )


def levels(volume: Volume, follow: FollowUp) -> Floats:
    """Return where the follow-up's slices of about 1 mm lie, in the volume's z, mm: (n,).

    Those between two slices that were scanned are interpolated, as in the paper.
    """
    first = volume.z_mm[0] + follow.phase_mm
    scanned = int((volume.z_mm[-1] - first) / follow.spacing_mm) + 1
    count = (scanned - 1) * follow.steps + 1
    return np.asarray(first + np.arange(count) * follow.spacing_mm / follow.steps, float)


def render(
    volume: Volume,
    body: Body,
    follow: FollowUp,
    config: FollowUpConfig,
    *,
    first: int = 0,
    count: int | None = None,
) -> Rendered:
    """Return slices `first` to `first + count` of a follow-up, of those that `levels` counts."""
    z = levels(volume, follow)
    stop = len(z) if count is None else first + count
    # What was scanned about them; the slices between are interpolated from these.
    low, high = first // follow.steps, -(-(stop - 1) // follow.steps)
    scan = _Scan(volume, body, follow, config)
    scanned = [scan.slice(k) for k in range(low, high + 1)]
    image_hu = np.empty((stop - first, *scanned[0].shape), np.int16)
    for i, k in enumerate(range(first, stop)):
        below, share = divmod(k, follow.steps)
        image = scanned[below - low]
        if share:
            above = scanned[below - low + 1]
            image = image + np.float32(share / follow.steps) * (above - image)
        image_hu[i] = np.rint(image)
    shift_mm, residual_mm = scan.displacement()
    dz, dy, dx = follow.shift_mm
    return Rendered(
        volume=Volume(
            image_hu=image_hu,
            z_mm=z[first:stop] - dz,
            pixel_mm=(follow.pixel_mm, follow.pixel_mm),
            origin_mm=(float(scan.y_mm[0]) - dy, float(scan.x_mm[0]) - dx),
        ),
        truth_mm=dz + shift_mm,
        residual_mm=residual_mm,
    )


def shrink(volume: Volume, size: int) -> Volume:
    """Return a volume of at most so many rows and columns: means over blocks of pixels."""
    n = max(1, -(-max(volume.image_hu.shape[1:]) // size))
    if n == 1:
        return volume
    count, rows, columns = volume.image_hu.shape
    kept = volume.image_hu[:, : rows // n * n, : columns // n * n]
    blocks = kept.reshape(count, rows // n, n, columns // n, n)
    row_mm, column_mm = volume.pixel_mm
    y, x = volume.origin_mm
    return Volume(
        image_hu=np.rint(blocks.mean((2, 4), np.float32)).astype(np.int16),
        z_mm=volume.z_mm,
        pixel_mm=(n * row_mm, n * column_mm),
        origin_mm=(y + (n - 1) / 2 * row_mm, x + (n - 1) / 2 * column_mm),
    )


def thicken(volume: Volume, size: int) -> Volume:
    """Return a volume of at most so many slices: means over blocks of them."""
    n = -(-len(volume.z_mm) // size)
    if n == 1:
        return volume
    count = len(volume.z_mm) // n
    blocks = volume.image_hu[: count * n].reshape(count, n, *volume.image_hu.shape[1:])
    return Volume(
        image_hu=np.rint(blocks.mean(1, np.float32)).astype(np.int16),
        z_mm=volume.z_mm[: count * n].reshape(count, n).mean(1),
        pixel_mm=volume.pixel_mm,
        origin_mm=volume.origin_mm,
    )


def interpolated(volume: Volume) -> Volume:
    """Return a volume with slices of about 1 mm, interpolated where they are thicker."""
    spacing = float(np.median(np.diff(volume.z_mm)))
    return _at(volume, spacing / max(1, round(spacing)))


def even(volume: Volume) -> Volume:
    """Return a volume whose slices lie evenly, interpolated where they do not."""
    steps = np.diff(volume.z_mm)
    if not len(steps) or np.ptp(steps) < 0.01 * steps.mean():
        return volume
    return _at(volume, float(np.median(steps)))


def _at(volume: Volume, spacing_mm: float) -> Volume:
    span = volume.z_mm[-1] - volume.z_mm[0]
    z = np.linspace(volume.z_mm[0], volume.z_mm[-1], round(span / spacing_mm) + 1)
    at = np.interp(z, volume.z_mm, np.arange(len(volume.z_mm)))
    low = at.astype(int).clip(0, len(volume.z_mm) - 2)
    image_hu = np.empty((len(z), *volume.image_hu.shape[1:]), np.int16)
    for image, k, share in zip(image_hu, low, at - low, strict=True):
        below, above = volume.image_hu[k].astype(np.float32), volume.image_hu[k + 1]
        image[:] = np.rint(below + np.float32(share) * (above - below))
    return Volume(image_hu, z, volume.pixel_mm, volume.origin_mm)


def displacement(body: Body, follow: FollowUp, config: FollowUpConfig) -> Image:
    """Return the displacement `u` at the nodes of the body's grid, (3, Z, Y, X) float32, mm.

    z, y, x; the follow-up shows at `q` what the volume shows at `q + u(q)`.
    """
    z, y, x = body.z_mm[:, None, None], body.y_mm[:, None], body.x_mm
    u = np.zeros((3, *body.inside.shape), np.float32)
    # Ends of the volume hold no more than they show, so that nothing moves there.
    ends = 1 - np.exp(-np.minimum(z - body.z_mm[0], body.z_mm[-1] - z) / 40)
    if body.diaphragm_mm is not None:
        above = z - body.diaphragm_mm
        # Lung and heart above the dome move ever less; so do liver, spleen, kidneys below.
        motion = np.exp(-((above / np.where(above > 0, 70, 110)) ** 2))
        u[0] += follow.breath_mm * motion * body.inside
    chest = ndimage.gaussian_filter1d(body.lung, 30 / CELL_MM, mode="nearest")[:, None, None]
    chest = chest * (body.lung.max() > 0.99)
    depth, width = body.size_mm
    u[1] += follow.expand_mm * chest * (y - body.spine_mm[0]).clip(max=0) / -depth
    u[2] -= follow.expand_mm * chest * (x - body.spine_mm[1]) / width
    if follow.posture_mm:
        rng = np.random.default_rng([follow.seed, 0])
        extent = [float(axis[-1] - axis[0]) for axis in (body.z_mm, body.y_mm, body.x_mm)]
        knots = [max(4, int(mm / config.posture_knot_mm) + 2) for mm in extent]
        zoom = np.array(body.inside.shape) / knots
        for part in u:
            part += ndimage.zoom(
                rng.normal(0, follow.posture_mm, knots), zoom, order=3, mode="nearest"
            )
    u[0] *= ends
    return u


class _Scan:
    """A follow-up in the making, slice by slice, in the volume's coordinates."""

    def __init__(
        self, volume: Volume, body: Body, follow: FollowUp, config: FollowUpConfig
    ) -> None:
        self.volume, self.body, self.follow = volume, body, follow
        self.u = displacement(body, follow, config)
        matrix = max(16, int(follow.field_mm / follow.pixel_mm))
        axis = (np.arange(matrix) - (matrix - 1) / 2) * follow.pixel_mm
        self.y_mm = axis + body.centre_mm[0] + follow.centring_mm[0]
        self.x_mm = axis + body.centre_mm[1] + follow.centring_mm[1]
        self.outside = axis[:, None] ** 2 + axis**2 > (follow.field_mm / 2) ** 2
        self.outside &= not follow.box
        angle = np.radians(follow.rotation_degrees)
        y, x = self.y_mm[:, None] - body.centre_mm[0], self.x_mm - body.centre_mm[1]
        self.y = body.centre_mm[0] + np.cos(angle) * y + np.sin(angle) * x  # (M, M)
        self.x = body.centre_mm[1] - np.sin(angle) * y + np.cos(angle) * x
        self.nodes = np.stack([_index(self.y, body.y_mm), _index(self.x, body.x_mm)])
        own_mm = float(np.median(np.diff(volume.z_mm)))
        # A thick slice is the mean of what it spans.
        self.parts = max(1, round(follow.spacing_mm / max(own_mm, 1.0)))
        self.first_mm = volume.z_mm[0] + follow.phase_mm
        self.bone: list[npt.NDArray[Any]] = []
        self.tissue: list[npt.NDArray[Any]] = []

    def slice(self, k: int) -> Image:
        """Return the k-th slice that is scanned, HU."""
        follow = self.follow
        image = np.zeros(self.y.shape, np.float32)
        dz = np.zeros(self.y.shape)
        for part in (np.arange(self.parts) + 0.5) / self.parts - 0.5:
            hu, moved = self._sample(self.first_mm + (k + float(part)) * follow.spacing_mm)
            image += hu / np.float32(self.parts)
            dz += moved / self.parts
        image[self.outside] = OUTSIDE_HU
        self.bone.append(dz[image > BONE_HU])
        self.tissue.append(dz[image > BODY_HU])
        image = np.interp(image, *_contrast(follow)).astype(np.float32)
        rng = np.random.default_rng([follow.seed, 1, k])
        noise = ndimage.gaussian_filter(
            rng.standard_normal(image.shape, np.float32), follow.noise_mm / follow.pixel_mm
        )
        image += noise * np.float32(follow.noise_hu / noise.std())
        if follow.sharpen:
            soft = ndimage.gaussian_filter(image, 1.2 / follow.pixel_mm)
            image += np.float32(follow.sharpen) * (image - soft)
        elif follow.blur_mm:
            image = ndimage.gaussian_filter(image, follow.blur_mm / follow.pixel_mm)
        image[self.outside] = OUTSIDE_HU
        return image.clip(OUTSIDE_HU, 3071)

    def displacement(self) -> tuple[float, float]:
        """Return mean and sd of the z displacement over the bone of all slices made so far."""
        bone = np.concatenate(self.bone)
        moved = bone if len(bone) >= MIN_BONE else np.concatenate(self.tissue)
        return (float(moved.mean()), float(moved.std())) if len(moved) else (0.0, 0.0)

    def _sample(self, z_mm: float) -> tuple[Image, Floats]:
        """Return HU of a plane, and by how much each pixel of it is moved along z."""
        at = float(_index(np.array(z_mm), self.body.z_mm))
        low = min(int(at), len(self.body.z_mm) - 2)
        plane = self.u[:, low] + (at - low) * (self.u[:, low + 1] - self.u[:, low])
        dz, dy, dx = (
            ndimage.map_coordinates(p, self.nodes, order=1, mode="nearest") for p in plane
        )
        volume = self.volume
        z = np.interp(z_mm + dz, volume.z_mm, np.arange(len(volume.z_mm)))
        row = (self.y + dy - volume.origin_mm[0]) / volume.pixel_mm[0]
        column = (self.x + dx - volume.origin_mm[1]) / volume.pixel_mm[1]
        hu = ndimage.map_coordinates(
            volume.image_hu, [z, row, column], np.float32, order=1, cval=OUTSIDE_HU
        )
        return hu, dz


def _contrast(follow: FollowUp) -> tuple[list[float], list[float]]:
    """HU before and after another contrast: increasing, bone and lung as they were."""
    before = [OUTSIDE_HU, AIR_HU, -200.0, 0.0, 80.0, 160.0, 300.0, 700.0, 3071.0]
    added = [0.0, 0.0, 0.0, follow.soft_hu, follow.soft_hu]
    added += [follow.enhanced_hu, follow.enhanced_hu, 0.0, 0.0]
    level = [0.0, 0.0, *[follow.level_hu] * 7]
    return before, [b + a + c for b, a, c in zip(before, added, level, strict=True)]


def _index(position: Any, axis: Floats) -> Any:
    """Return positions in units of an evenly spaced axis, ends for what lies beyond them."""
    step = (axis[-1] - axis[0]) / (len(axis) - 1)
    return ((position - axis[0]) / step).clip(0, len(axis) - 1)


def _smoothstep(value: Any, low: float, high: float) -> Any:
    t = ((value - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def _largest(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the largest connected part of a slice: the body, without the table."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    return np.asarray(labels == 1 + np.bincount(labels.ravel())[1:].argmax())


def _outline(
    filled: npt.NDArray[np.bool_], y_mm: Floats, x_mm: Floats
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the body's centre, then its depth and width where it is widest; mm."""
    total = max(1, int(filled.sum()))
    middle, size = [], []
    for axis, mm in ((1, y_mm), (2, x_mm)):
        shown = filled.any(3 - axis)  # (Z, rows or columns)
        middle.append(float(filled.sum((0, 3 - axis)) @ mm) / total)
        step = float(mm[1] - mm[0])
        spans = [np.ptp(mm[s]) + step for s in np.asarray(shown) if s.any()]
        size.append(float(np.percentile(spans, 95)) if spans else float(np.ptp(mm)))
    return (middle[0], middle[1]), (size[0], size[1])


def _spine(
    bone: npt.NDArray[Any], y_mm: Floats, x_mm: Floats, centre: tuple[float, float]
) -> tuple[float, float]:
    """Return where most of the bone behind the body's centre and near its middle lies, mm."""
    near = (y_mm[:, None] > centre[0] - 10) & (np.abs(x_mm - centre[1]) < 45)
    share = bone.sum(0) * near
    if share.sum() == 0:
        return centre[0] + 40.0, centre[1]
    total = share.sum()
    return float(share.sum(1) @ y_mm / total), float(share.sum(0) @ x_mm / total)


def _diaphragm(z_mm: Floats, lung_mm2: Floats, body: npt.NDArray[Any]) -> float | None:
    """Return where the area of lung falls below half on the way to the feet, mm."""
    widest = int(lung_mm2.argmax())
    below = np.flatnonzero(lung_mm2[:widest] < lung_mm2[widest] / 2)
    if lung_mm2[widest] < MIN_LUNG_MM2 or not len(below):
        return None
    # Where the scan ends and only padding follows, the body ends with the lungs.
    return float(z_mm[below[-1]]) if body[below[-1]] > body[widest] / 2 else None
