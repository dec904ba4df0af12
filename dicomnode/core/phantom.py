"""Phantom CT patients, drawn by code, whose height in the body is known at every slice.

A patient stretches the average adult of `anatomy`, adds fat, and moves the organs about. Slices
are painted in the coordinates of that adult.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from dicomnode.core import anatomy
from dicomnode.core.anatomy import AIR, FAT, MUSCLE, ORGANS, OUTLINES, Knot, Shape
from dicomnode.model import Floats

Pixels = npt.NDArray[np.float32]
Images = npt.NDArray[np.int16]
Box = tuple[slice, slice]

_WAVE_MM = 2.5
# Painted shapes that bound others; the lungs bound the vessels that are made below.
_BOUNDS = {shape.within for shape in ORGANS} - {"", "diaphragm"} | {"lungs"}
# Rows of height and share: of a patient's width and depth, then of the fat.
_STRETCH = np.array([(-300, 0.8), (-150, 1), (440, 1), (490, 0.5), (540, 0.35)])
_FAT = np.array([(-300, 0.7), (-100, 1.2), (0, 1.15), (100, 1), (250, 0.7), (400, 0.55),
                 (480, 0.3), (560, 0.12)])  # fmt: skip


@dataclass(frozen=True, slots=True)
class PhantomPatient:
    """One body: how it differs from the average adult.

    `length`, `width` and `depth` stretch it in z, x and y (head and neck follow the last two only
    in part), `fat_mm` lies under the skin of the belly, `bone` multiplies the HU of bone,
    `contrast` is the share of a full portal-venous enhancement, and `seed` places the organs,
    bowel loops and lung vessels.
    """

    seed: int
    length: float = 1.0
    width: float = 1.0
    depth: float = 1.0
    fat_mm: float = 16.0
    bone: float = 1.0
    contrast: float = 0.0
    arms: Literal["up", "down"] = "up"


def patient(seed: int) -> PhantomPatient:
    """Return the body that belongs to a seed.

    Parameters
    ----------
    seed : int
        Not negative. The same seed is the same person.
    """
    rng = np.random.default_rng([seed, 0])
    return PhantomPatient(
        seed=seed,
        length=rng.uniform(0.9, 1.1),
        width=rng.uniform(0.82, 1.18),
        depth=rng.uniform(0.82, 1.18),
        fat_mm=rng.uniform(5, 35),
        bone=rng.uniform(0.75, 1.2),
        contrast=rng.uniform(0.4, 1) if rng.random() < 0.4 else 0.0,
        arms="up" if rng.random() < 0.65 else "down",
    )


def landmarks(patient: PhantomPatient) -> dict[str, float]:
    """Return where named levels of a patient lie, from the feet to the head.

    Parameters
    ----------
    patient : PhantomPatient
        The body.

    Returns
    -------
    dict[str, float]
        Name to z, mm, in the patient's own phantom coordinates, at `breath_mm` 0.
    """
    return {name: height * patient.length for name, height in anatomy.LANDMARKS.items()}


def volume(
    patient: PhantomPatient,
    z_mm: Floats,
    *,
    pixel_mm: float,
    matrix: int,
    center_mm: tuple[float, float] = (0.0, 0.0),
    noise_hu: float = 15.0,
    seed: int = 0,
    table: bool = True,
    breath_mm: float = 0.0,
) -> Images:
    """Return axial slices of a patient.

    Rows go to posterior, columns to patient left (LPS, identity orientation).

    Parameters
    ----------
    patient : PhantomPatient
        The body.
    z_mm : (N,) float64
        Position of each slice, mm, in the patient's own phantom coordinates; any order.
    pixel_mm : float
        Distance of pixel centres, mm.
    matrix : int
        Rows and columns.
    center_mm : tuple[float, float]
        Where the reconstruction centre lies, x and y in mm from the middle of the trunk.
    noise_hu : float
        Standard deviation of the noise, HU.
    seed : int
        Not negative; draws the noise and the gas in the bowel, which differ between timepoints.
    table : bool
        Whether the patient lies on a table.
    breath_mm : float
        How much deeper than usual the patient has breathed in: the diaphragm, and the organs below
        it in part, lie lower by this many mm.

    Returns
    -------
    (N, matrix, matrix) int16
        HU. -1024 outside the reconstruction circle.
    """
    axis = (np.arange(matrix, dtype=np.float64) - (matrix - 1) / 2) * pixel_mm
    outside = axis[:, None] ** 2 + axis**2 > (matrix * pixel_mm / 2) ** 2
    x_mm, y_mm = axis + center_mm[0], axis + center_mm[1]
    background = np.full((matrix, matrix), AIR, np.float32)
    if table:
        _paint_table(background, patient, x_mm, y_mm)
    outlines, organs = _body(patient, seed, breath_mm)
    rng = np.random.default_rng([seed, 1])
    images = np.empty((len(z_mm), matrix, matrix), np.int16)
    for image, z in zip(images, np.asarray(z_mm, np.float64), strict=True):
        canvas = _Canvas(patient, float(z), x_mm, y_mm, background, breath_mm)
        canvas.paint_outlines(outlines)
        for shape in organs:
            canvas.paint(shape)
        hu = canvas.hu
        if noise_hu > 0:
            hu = hu + noise_hu * _noise(rng, matrix)
        np.rint(hu.clip(-1024, 3071), out=hu)
        hu[outside] = -1024
        image[:] = hu
    return images


def _paint_table(hu: Pixels, patient: PhantomPatient, x_mm: Floats, y_mm: Floats) -> None:
    """Paint a curved table top of carbon and foam under the back."""
    pixel = x_mm[1] - x_mm[0]
    under = y_mm[:, None] - (115 * patient.depth + 1.2 * patient.fat_mm + 5) + x_mm**2 / 2500
    distance = np.maximum(np.maximum(-under, under - 30), abs(x_mm) - 220)
    for wall, value in ((0.0, -250.0), (3.0, -940.0)):
        hu += (0.5 - (distance + wall) / pixel).clip(0, 1) * (value - hu)


def _noise(rng: np.random.Generator, matrix: int) -> Pixels:
    """Return gaussian noise of unit sd, correlated over about two pixels."""
    white = rng.standard_normal((matrix + 2, matrix + 2), dtype=np.float32)
    white = white[:-2] + 2 * white[1:-1] + white[2:]
    # The kernel (1, 2, 1) x (1, 2, 1) has the norm 6.
    return (white[:, :-2] + 2 * white[:, 1:-1] + white[:, 2:]) / np.float32(6)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A shape where one patient has it; the half axes of a stack are squared."""

    shape: Shape
    knots: Floats
    hu: float
    low: float
    high: float
    sides: tuple[int, ...]


def _body(
    patient: PhantomPatient, seed: int, breath_mm: float
) -> tuple[list[_Placed], list[_Placed]]:
    rng = np.random.default_rng([patient.seed, 1])
    gas = np.random.default_rng([seed, 2])
    arm, *arm_bones = anatomy.ARMS[patient.arms]
    organs = list(arm_bones)
    drawn = {"spleen": _bowel(rng, gas), "mediastinum": _lung_vessels(rng)}
    for shape in ORGANS:
        organs += [*drawn.get(shape.name, ()), shape]  # those drawn lie beneath it
    organs += [*anatomy.spine(), *anatomy.ribs()]

    def place(shape: Shape) -> _Placed:
        rows = shape.knots if shape.kind == "tube" else sorted(shape.knots)
        knots = np.array(rows, np.float64)
        d_height = dx = dy = size = 0.0
        # Nothing is drawn for gas, so that another timepoint has the same organs.
        if shape.free:
            d_height, dx, dy, size = shape.free * rng.normal(size=4).clip(-2, 2)
        knots[:, 0] += d_height - shape.breath * breath_mm / patient.length
        if shape.kind == "stack":
            knots[:, 3:] = (knots[:, 3:] * (1 + size / 60)) ** 2
        if shape.kind != "blade":
            knots[:, 1:3] += dx, dy
        hu = shape.hu + shape.enhance * patient.contrast
        if hu > 250:
            hu *= patient.bone
        reach = knots[:, 3] + patient.fat_mm if shape.kind == "tube" else 0.0
        low, high = (knots[:, 0] - reach).min(), (knots[:, 0] + reach).max()
        return _Placed(shape, knots, hu, float(low), float(high), (1, -1) if shape.pair else (1,))

    return [place(shape) for shape in (*OUTLINES, arm)], [place(shape) for shape in organs]


def _bowel(rng: np.random.Generator, gas: np.random.Generator) -> Iterator[Shape]:
    """Yield loops of small bowel, then gas where a timepoint has it, in small bowel and colon."""
    loops = []
    for _ in range(46):
        angle, far = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random())
        height = rng.uniform(-65, 130)
        x, y = 72 * far * np.sin(angle), -38 + 34 * far * np.cos(angle)
        if height < -30:
            x *= 0.6
        turn = rng.normal(0, 16, (2, 3))
        middle = np.array([height, x, y])
        path = (middle + turn[0], middle, middle + turn[1])
        radius = rng.uniform(9, 15)
        loops.append(tuple((*map(float, p), radius) for p in path))
    for loop in loops:
        yield Shape("small bowel", "tube", 50, loop, shell=(2.5, 15), enhance=50, within="cavity")
    places = [loop[1] for loop in loops if gas.random() < 0.35]
    for shape in ORGANS:
        if "colon" in shape.name or shape.name in ("rectum", "stomach"):
            # Gas collects in front, where the patient lies on the back.
            places += [knot for knot in shape.knots if gas.random() < 0.7]
    for height, x, y, radius in places:
        bubble = radius * gas.uniform(0.4, 0.75)
        long = gas.uniform(1, 2) * bubble
        front = y - 0.8 * (radius - bubble)
        yield Shape("gas", "stack", -950, (
            (height - long, x, front, 0, 0), (height, x, front, bubble, 0.8 * bubble),
            (height + long, x, front, 0, 0),
        ), within="cavity")  # fmt: skip


def _lung_vessels(rng: np.random.Generator) -> Iterator[Shape]:
    """Yield vessels that run from both hila to the surface of the lungs, and branch."""
    for side in (-1, 1):
        hilum = np.array([350.0, side * 38.0, 8.0])
        for _ in range(26):
            tip = rng.uniform((205, 35, -70), (465, 118, 80)) * (1, side, 1)
            fork = hilum + rng.uniform(0.35, 0.6) * (tip - hilum) + rng.normal(0, 5, 3)
            width = rng.uniform(2, 4.5)
            yield _vessel((hilum, width + 1), (fork, width), (tip, 1))
            for _ in range(2):
                aside = fork + 0.9 * (tip - fork) + rng.normal(0, 22, 3)
                yield _vessel((fork, width * 0.8), (aside, 0.8))


def _vessel(*points: tuple[Floats, float]) -> Shape:
    knots = tuple((*map(float, point), radius) for point, radius in points)
    return Shape("lung vessel", "tube", 40, knots, enhance=80, within="lungs")


class _Canvas:
    """One slice in the making, in the coordinates of the average adult."""

    def __init__(
        self,
        patient: PhantomPatient,
        z: float,
        x_mm: Floats,
        y_mm: Floats,
        background: Pixels,
        breath_mm: float,
    ) -> None:
        self.height = height = z / patient.length
        share = float(anatomy.at(_STRETCH, height)[0])
        sx, sy = 1 + (patient.width - 1) * share, 1 + (patient.depth - 1) * share
        scale = (sx * sy) ** 0.5
        self.fat = patient.fat_mm * float(anatomy.at(_FAT, height)[0]) / scale
        self.pixel = float(x_mm[1] - x_mm[0]) / scale
        self.hu = background.copy()
        # A slow wave, another one in each patient, bends the ellipses of the table.
        phase = np.random.default_rng([patient.seed, 3]).uniform(0, 2 * np.pi, 2)
        self.axes = x, y = x_mm / sx, y_mm / sy
        across = _WAVE_MM * np.sin(y / 28 + height / 90 + phase[0])
        along = _WAVE_MM * np.sin(x / 32 - height / 70 + phase[1])
        self.x = (x + across[:, None]).astype(np.float32)
        self.y = (y[:, None] + along).astype(np.float32)
        self.bounds: dict[str, Pixels] = {"diaphragm": self._diaphragm(breath_mm / patient.length)}

    def paint_outlines(self, outlines: list[_Placed]) -> None:
        """Paint skin, then the fat in it, then muscle, so that outlines melt into each other."""
        for grow, hu in ((self.fat + 1.5, 10.0), (self.fat, FAT), (0.0, MUSCLE)):
            for outline in outlines:
                self.paint(replace(outline, hu=hu), grow)

    def paint(self, placed: _Placed, grow: float = 0.0) -> None:
        """Paint what this slice cuts of a shape; edges are shared between pixels."""
        if not placed.low <= self.height <= placed.high:
            return
        shape = placed.shape
        bound = self.bounds.get(shape.within)
        if shape.within and bound is None:
            return
        for side in placed.sides:
            cut = _CUTS[shape.kind](self, placed, side, grow)
            if cut is None:
                continue
            box, distance = cut
            if bound is not None:
                distance = np.maximum(distance, bound[box])
            if shape.name in _BOUNDS:
                whole = self.bounds[shape.name] = np.full_like(self.hu, np.inf)
                whole[box] = distance
            self._blend(box, distance, placed.hu)
            if shape.shell:
                self._blend(box, distance + np.float32(shape.shell[0]), shape.shell[1])

    def _blend(self, box: Box, distance: Pixels, hu: float) -> None:
        cover = (np.float32(0.5) - distance * np.float32(1 / self.pixel)).clip(0, 1)
        self.hu[box] += cover * (np.float32(hu) - self.hu[box])

    def box(self, left: float, right: float, front: float, back: float, side: int) -> Box | None:
        """Return the pixels that a rectangle touches, or None."""
        if side < 0:
            left, right = -right, -left
        edge = _WAVE_MM + self.pixel
        x, y = self.axes
        j0, j1 = np.searchsorted(x, (left - edge, right + edge)).tolist()
        i0, i1 = np.searchsorted(y, (front - edge, back + edge)).tolist()
        return (slice(i0, i1), slice(j0, j1)) if i0 < i1 and j0 < j1 else None

    def _diaphragm(self, breath: float) -> Pixels:
        """Return the distance to the lung side of the diaphragm, negative above it."""
        if not 120 < self.height < 320:
            return np.full_like(self.hu, 1e3 if self.height < 200 else -1e3)
        side = np.abs(self.x) - 62
        top = anatomy.LANDMARKS["diaphragm_dome"] - 6 - 6 * np.tanh(self.x / 20) - breath
        fall_x = np.where(side > 0, 80 * (side / 65) ** 2, 14 * (side / 62) ** 2)
        ahead = self.y + 8
        fall_y = np.where(ahead > 0, 88 * (ahead / 85) ** 2, 45 * (ahead / 85) ** 2)
        surface: Pixels = (0.6 * (top - fall_x - fall_y - self.height)).astype(np.float32)
        return surface


def _cut_stack(
    canvas: _Canvas, placed: _Placed, side: int, grow: float
) -> tuple[Box, Pixels] | None:
    x, y, rx, ry = anatomy.at(placed.knots, canvas.height).tolist()
    rx, ry = max(rx, 0.01) ** 0.5, max(ry, 0.01) ** 0.5
    grow *= min(1.0, rx / 15)
    rx, ry = rx + grow, ry + grow
    box = canvas.box(x - rx, x + rx, y - ry, y + ry, side)
    if box is None:
        return None
    u = (canvas.x[box] * np.float32(side / rx) - np.float32(x / rx)) ** 2
    v = (canvas.y[box] * np.float32(1 / ry) - np.float32(y / ry)) ** 2
    q = u + v
    slope = np.sqrt(u * np.float32(rx**-2) + v * np.float32(ry**-2) + np.float32(1e-9))
    if placed.shape.square:
        # Squircle: M. Fernandez Guasti, Int. J. Educ. Sci. Technol. 23, 895-901, 1992.
        q = (q + np.sqrt(q * q - np.float32(4 * placed.shape.square**2) * u * v)) / 2
    return box, np.float32(0.5) * (q - 1) / slope  # to first order, exact at the edge


def _cut_blade(
    canvas: _Canvas, placed: _Placed, side: int, grow: float
) -> tuple[Box, Pixels] | None:
    radius, *points = anatomy.at(placed.knots, canvas.height).tolist()
    radius += grow
    xs, ys = points[0::2], points[1::2]
    box = canvas.box(min(xs) - radius, max(xs) + radius, min(ys) - radius, max(ys) + radius, side)
    if box is None or radius <= 0:
        return None
    ends = [(0.0, x, y, radius) for x, y in zip(xs, ys, strict=True)]
    return box, _to_segments(canvas, box, side, 0.0, list(pairwise(ends)))


def _cut_tube(
    canvas: _Canvas, placed: _Placed, side: int, grow: float
) -> tuple[Box, Pixels] | None:
    height = canvas.height
    knots = placed.knots.tolist()
    segments = []
    sides_x, sides_y = [], []
    for a, b in pairwise(knots if len(knots) > 1 else knots * 2):
        a, b = (*a[:3], a[3] + grow / 2), (*b[:3], b[3] + grow / 2)
        reach = max(a[3], b[3])
        rise = b[0] - a[0]
        if min(a[0], b[0]) - reach > height or max(a[0], b[0]) + reach < height:
            continue
        segments.append((a, b))
        near = (0.0, 1.0)
        if abs(rise) > 1:
            t = sorted(((height - reach - a[0]) / rise, (height + reach - a[0]) / rise))
            near = (max(t[0], 0.0), min(t[1], 1.0))
        for t_near in near:
            x, y = (a[k] + t_near * (b[k] - a[k]) for k in (1, 2))
            sides_x += [x - reach, x + reach]
            sides_y += [y - reach, y + reach]
    if not segments:
        return None
    box = canvas.box(min(sides_x), max(sides_x), min(sides_y), max(sides_y), side)
    return None if box is None else (box, _to_segments(canvas, box, side, height, segments))


def _to_segments(
    canvas: _Canvas, box: Box, side: int, height: float, segments: list[tuple[Knot, Knot]]
) -> Pixels:
    """Return the 3-D distance to the nearest of some conical segments (height, x, y, radius)."""
    x, y = canvas.x[box] * np.float32(side), canvas.y[box]
    nearest: Pixels = np.full_like(x, np.inf)
    for (h0, x0, y0, r0), (h1, x1, y1, r1) in segments:
        dh, dx, dy = h1 - h0, x1 - x0, y1 - y0
        length2 = dh * dh + dx * dx + dy * dy or 1.0
        px, py, ph = x - np.float32(x0), y - np.float32(y0), height - h0
        t = px * np.float32(dx / length2) + py * np.float32(dy / length2)
        t = (t + np.float32(ph * dh / length2)).clip(0, 1)
        px -= t * np.float32(dx)
        py -= t * np.float32(dy)
        distance = np.sqrt(px * px + py * py + (np.float32(ph) - t * np.float32(dh)) ** 2)
        distance -= np.float32(r0) + t * np.float32(r1 - r0)
        np.minimum(nearest, distance, out=nearest)
    return nearest


_CUTS = {"stack": _cut_stack, "blade": _cut_blade, "tube": _cut_tube}
