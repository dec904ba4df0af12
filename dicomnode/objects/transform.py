"""An offset as an ITK transform, to start a registration from."""

from pathlib import Path

import SimpleITK

from dicomnode.model import Offset


def to_sitk_transform(offset: Offset) -> SimpleITK.TranslationTransform:
    """Return the offset as ITK wants it: from fixed to moving points, so its inverse.

    x and y stay 0 where they were not estimated: ITK has no way to say "unknown".

    Raises
    ------
    ValueError
        If the offset was refused.
    """
    if offset.offset_mm is None:
        raise ValueError(f"no transform of an offset that is {offset.status}")
    inverse = [-(offset.dx_mm or 0.0), -(offset.dy_mm or 0.0), -offset.offset_mm]
    return SimpleITK.TranslationTransform(3, inverse)


def write(offset: Offset, path: Path) -> None:
    """Write the transform to a file whose suffix says how, such as `.tfm`."""
    SimpleITK.WriteTransform(to_sitk_transform(offset), str(path))
