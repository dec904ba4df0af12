"""HU -> network inputs for whole batches on a device: what `preprocess.to_input` does, in torch.

The node makes inputs on the CPU, where slices are decoded one by one; this is for batches that
are on a device already, or are worth being brought there.
"""

import torch
from torch import Tensor

from dicomnode.core.pixels import AIR_HU
from dicomnode.core.preprocess import PreprocessSpec


def to_inputs(images_hu: Tensor, pixel_mm: tuple[float, float], spec: PreprocessSpec) -> Tensor:
    """Return slices as the network sees them, on the device they are on.

    Centred on the body, area-averaged to `spec.pixel_mm`, air outside the image, companded to
    8 bits. Of 10,000 pixels fewer than one differs from `preprocess.to_input`, by 1: its sums
    run in another order.

    Parameters
    ----------
    images_hu : (B, R, C) int16 or float32
        HU in patient axes: columns to the left, rows to posterior.
    pixel_mm : (2,)
        Between rows, and between columns; the same for all.

    Returns
    -------
    (B, size, size) uint8
    """
    centre_row, centre_column = body_centres(images_hu, spec.body_hu)
    rows = area_weights(images_hu.shape[1], pixel_mm[0], centre_row, spec)
    columns = area_weights(images_hu.shape[2], pixel_mm[1], centre_column, spec)
    # Above air, so that what lies outside the image (weight 0) comes out as air.
    above_air = (images_hu.float() - AIR_HU).clamp_(min=0)
    resampled_hu = rows @ above_air @ columns.transpose(1, 2) + AIR_HU  # (B, size, size)
    return compand(resampled_hu, spec)


def body_centres(images_hu: Tensor, body_hu: float) -> tuple[Tensor, Tensor]:
    """Return rows and columns, (B,) float32 each, of the centroids of what is above `body_hu`.

    The centre of the image where there is no body.
    """
    height, width = images_hu.shape[1:]
    step = max(1, min(height, width) // 128)  # as `preprocess.body_centre` has it
    body = images_hu[:, ::step, ::step] > body_hu
    # Whole numbers below 2**24: float32 adds them without rounding.
    by_row, by_column = body.sum(2, dtype=torch.float32), body.sum(1, dtype=torch.float32)
    total = by_row.sum(1)
    centres = []
    for counts, middle in ((by_row, (height - 1) / 2), (by_column, (width - 1) / 2)):
        place = torch.arange(counts.shape[1], device=counts.device, dtype=torch.float32)
        centroid = (counts * place).sum(1) / total.clamp(min=1) * step
        centres.append(torch.where(total < 16, middle, centroid))
    return centres[0], centres[1]


def area_weights(count: int, spacing_mm: float, centre: Tensor, spec: PreprocessSpec) -> Tensor:
    """Return the weights that average `count` pixels of one axis to the inputs' pixels.

    Parameters
    ----------
    centre : (B,) float32
        Which of them is to be the middle.

    Returns
    -------
    (B, size, count) float32
        As `preprocess.area_weights` gives them for each.
    """
    width = max(spec.pixel_mm, spacing_mm)
    place = torch.arange(spec.size, device=centre.device, dtype=torch.float32)
    target = (place - (spec.size - 1) / 2) * spec.pixel_mm  # (size,) mm from the centre
    pixel = torch.arange(count, device=centre.device, dtype=torch.float32)
    source = (pixel[None] - centre[:, None]) * spacing_mm  # (B, count)
    distance = (target[None, :, None] - source[:, None, :]).abs_()  # (B, size, count)
    overlap = distance.neg_().add_((width + spacing_mm) / 2)
    return overlap.clamp_(0, min(width, spacing_mm)).div_(width)


def compand(image_hu: Tensor, spec: PreprocessSpec) -> Tensor:
    """Return HU as 8-bit values by the spec's piecewise linear map, any shape."""
    value = torch.full_like(image_hu, spec.value[0])
    ends = zip(spec.hu, spec.hu[1:], spec.value, spec.value[1:], strict=False)
    for hu, next_hu, low, high in ends:
        slope = (high - low) / (next_hu - hu)
        value.add_((image_hu - hu).clamp_(0, next_hu - hu), alpha=slope)
    return value.round_().to(torch.uint8)
