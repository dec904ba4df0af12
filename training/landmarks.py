"""Landmarks of the body found from HU alone: femoral heads, ends of the lung, neck, vertex.

Reads the network's inputs of one Series, gives positions in mm. Nothing here is learned or
annotated: each landmark is a threshold on an area that physics gives (air, body).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.model import Floats

LUNG_HU = -500.0  # below it, inside the body: lung or gas
# Gas of the bowel, trachea and mouth is pure air; lung, even emphysema, is not, once averaged
# over the input's pixels.
GAS_HU = -950.0
LUNG_COMPONENT_CM2 = 4.0  # a smaller spot is trachea, bronchus, or noise
LUNG_EDGE_CM2 = 15.0  # the apex and the base are where the lung's area falls to this
LUNG_CM2 = 90.0  # a scan shows the chest where the lung's area exceeds this
NECK_PROMINENCE = 0.75  # the neck's area is below this share of the head's and the shoulders'
VERTEX_CM2 = 30.0
# A femoral head, some 48 mm wide, outlasts an opening that iliac wings and shafts do not; it lies
# this far from the midline, nearer than a humeral head. Both sides show this much of it: a
# contrasted kidney showed up to 14 cm2.
BONE_HU = 150.0
FEMORAL_RADIUS_MM = 17.5
FEMORAL_LATERAL_MM = (55.0, 130.0)
FEMORAL_CM2 = 16.0


@dataclass(frozen=True, slots=True)
class Areas:
    """Areas, cm2, of each slice of a Series, (N,)."""

    body: Floats
    lung: Floats


def areas(inputs: npt.NDArray[np.uint8], spec: PreprocessSpec) -> Areas:
    """Return the areas of body and lung in each input, (N, size, size)."""
    cm2 = spec.pixel_mm**2 / 100
    body_area, lung_area = np.zeros(len(inputs)), np.zeros(len(inputs))
    value = np.interp((spec.body_hu, LUNG_HU), spec.hu, spec.value)
    to_hu = np.interp(np.arange(256), spec.value, spec.hu)
    for i, x in enumerate(inputs):
        body = _largest(ndimage.binary_opening(x > value[0], iterations=1))
        body = ndimage.binary_fill_holes(body)
        body_area[i] = body.sum() * cm2
        air = body & (x < value[1])
        labels, count = ndimage.label(air)
        if not count:
            continue
        index = np.arange(1, count + 1)
        size = ndimage.sum_labels(air, labels, index) * cm2
        # The median: edges of a gas bubble are averaged with its wall.
        hu = np.array(ndimage.median(to_hu[x], labels, index))
        lung_area[i] = size[(size >= LUNG_COMPONENT_CM2) & (hu > GAS_HU)].sum()
    return Areas(body_area, lung_area)


def find(
    inputs: npt.NDArray[np.uint8], z_mm: Floats, spec: PreprocessSpec | None = None
) -> dict[str, float]:
    """Return the position, mm, of each landmark that the Series shows.

    Parameters
    ----------
    inputs : (N, size, size) uint8
        Network inputs, feet to head.
    z_mm : (N,)
        Their positions, increasing.

    Returns
    -------
    dict
        Of `femoral_heads`, `lung_base`, `lung_apex`, `neck`, `vertex`, those that are shown.
    """
    spec = spec or PreprocessSpec()
    a = areas(inputs, spec)
    z = np.asarray(z_mm, float)
    found = lung_limits(a.lung, z)
    found |= head_limits(a.body, z, found.get("lung_apex"))
    found |= hips(np.array([_massive_bone(x, spec) for x in inputs]), z)
    return found


def lung_limits(lung_cm2: Floats, z_mm: Floats) -> dict[str, float]:
    """Return where the lung's area falls to `LUNG_EDGE_CM2` above and below its widest."""
    lung = _smooth(lung_cm2, z_mm)
    widest = int(np.argmax(lung))
    if lung[widest] < LUNG_CM2:
        return {}
    found = {}
    above = np.flatnonzero(lung[widest:] < LUNG_EDGE_CM2)
    if len(above):
        found["lung_apex"] = _crossing(lung, z_mm, widest + int(above[0]) - 1)
    below = np.flatnonzero(lung[: widest + 1] < LUNG_EDGE_CM2)
    if len(below):
        found["lung_base"] = _crossing(lung, z_mm, int(below[-1]))
    return found


def head_limits(body_cm2: Floats, z_mm: Floats, apex: float | None) -> dict[str, float]:
    """Return the neck, the least area between head and shoulders, and the vertex."""
    found: dict[str, float] = {}
    if apex is None:
        return found
    body = _smooth(body_cm2, z_mm)
    part = (z_mm > apex) & (z_mm < apex + 250)
    if part.sum() < 10 or z_mm[part][-1] - apex < 110:
        return found
    z, b = z_mm[part], body[part]
    head = np.flatnonzero(z > apex + 100)
    least = int(np.argmin(b[: head[-1] + 1][z[: head[-1] + 1] < apex + 140]))
    if b[least] < NECK_PROMINENCE * b[least:].max() and b[least] < NECK_PROMINENCE * b[0]:
        found["neck"] = float(z[least])
    top = body[z_mm > apex]
    if len(top) and top[-1] < VERTEX_CM2 < top.max():
        i = len(body) - 1
        while body[i - 1] < VERTEX_CM2:
            i -= 1
        found["vertex"] = _crossing(body, z_mm, i - 1)
    return found


def hips(bone_cm2: Floats, z_mm: Floats) -> dict[str, float]:
    """Return the centre of the run of slices in which both femoral heads are at their widest.

    `bone_cm2` (N,) is the massive bone of the side that shows less of it. A run that the scan
    cuts off tells nothing.
    """
    peak = int(np.argmax(bone_cm2))
    if bone_cm2[peak] < FEMORAL_CM2:
        return {}
    low = high = peak
    while low > 0 and bone_cm2[low - 1] > bone_cm2[peak] / 2:
        low -= 1
    while high < len(z_mm) - 1 and bone_cm2[high + 1] > bone_cm2[peak] / 2:
        high += 1
    if low == 0 or high == len(z_mm) - 1:
        return {}
    run = slice(low, high + 1)
    return {"femoral_heads": float((bone_cm2[run] * z_mm[run]).sum() / bone_cm2[run].sum())}


def _massive_bone(x: npt.NDArray[np.uint8], spec: PreprocessSpec) -> float:
    """Area, cm2, of what is bone and as wide as a femoral head, of the side that shows less."""
    radius = round(FEMORAL_RADIUS_MM / spec.pixel_mm)
    rows, columns = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disc = rows**2 + columns**2 <= radius**2 + 0.5
    bone = ndimage.binary_closing(x > np.interp(BONE_HU, spec.hu, spec.value), np.ones((3, 3)))
    if bone.sum() < 2 * disc.sum():
        return 0.0
    massive = ndimage.binary_opening(ndimage.binary_fill_holes(bone), disc)
    labels, count = ndimage.label(massive)
    if count < 2:
        return 0.0
    index = np.arange(1, count + 1)
    lateral = np.array(ndimage.center_of_mass(massive, labels, index))[:, 1]
    lateral = (lateral - (spec.size - 1) / 2) * spec.pixel_mm
    area = ndimage.sum_labels(massive, labels, index) * spec.pixel_mm**2 / 100
    near, far = FEMORAL_LATERAL_MM
    inside = (np.abs(lateral) > near) & (np.abs(lateral) < far)
    return float(min(area[inside & (lateral < 0)].sum(), area[inside & (lateral > 0)].sum()))


def _crossing(area: Floats, z_mm: Floats, i: int) -> float:
    edge = LUNG_EDGE_CM2 if min(area[i], area[i + 1]) < LUNG_EDGE_CM2 else VERTEX_CM2
    share = (edge - area[i]) / (area[i + 1] - area[i])
    return float(z_mm[i] + np.clip(share, 0, 1) * (z_mm[i + 1] - z_mm[i]))


def _smooth(area: Floats, z_mm: Floats) -> Floats:
    spacing = float(np.median(np.diff(z_mm)))
    size = 2 * int(4.0 / spacing) + 1
    return np.asarray(ndimage.median_filter(area, size=size, mode="nearest"), float)


def _largest(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = ndimage.sum_labels(mask, labels, np.arange(1, count + 1))
    return np.asarray(labels == 1 + int(np.argmax(sizes)))
