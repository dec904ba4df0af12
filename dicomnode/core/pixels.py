"""Stored pixel values to HU."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

AIR_HU = -1000
FLOOR_HU = -1024
_EXACT = 2.0**24  # whole numbers below it are float32 values


@dataclass(frozen=True, slots=True)
class Rescale:
    """What makes HU of stored values; as it is by default, HU are stored.

    `slope` and `intercept` are Rescale Slope (0028,1053) and Rescale Intercept (0028,1052),
    `padding` is Pixel Padding Value (0028,0120) and Range Limit (0028,0121): stored values,
    both ends included, of pixels that were never measured.

    References
    ----------
    DICOM PS3.3 C.11.1 (Modality LUT), C.7.5.1.1.2 (padding).
    """

    slope: float = 1.0
    intercept: float = 0.0
    padding: tuple[int, int] | None = None

    def stored(self, hu: float) -> float:
        """Return the stored value of that many HU; it need not be whole."""
        return (hu - self.intercept) / self.slope

    def keeps_order(self, dtype: np.dtype[Any]) -> bool:
        """Whether stored values may be averaged in place of HU, once they are clipped at air.

        So it is where they are whole, rise with HU, hold air itself, and padding lies no
        higher than air: then nothing is rounded that `to_hu` would not round.
        """
        if dtype.kind not in "iu" or dtype.itemsize > 2 or not self.slope >= 1:
            return self == Rescale()
        whole = float(self.slope).is_integer() and float(self.intercept).is_integer()
        if not whole or 65536 * self.slope + abs(self.intercept) >= _EXACT:
            return False
        air, limits = self.stored(AIR_HU), np.iinfo(dtype)
        if not float(air).is_integer() or not limits.min <= air < limits.max:
            return False
        if self.padding is None:
            return True
        low, high = sorted(self.padding)
        return high <= air or low > limits.max


def to_hu(stored: npt.NDArray[np.integer], rescale: Rescale) -> npt.NDArray[np.float32]:
    """Return HU by the Modality LUT, padding as air.

    Parameters
    ----------
    stored : (R, C) integer
        Stored pixel values.

    Returns
    -------
    (R, C) float32
        HU, not below -1024.
    """
    image_hu = stored.astype(np.float32)
    image_hu *= np.float32(rescale.slope)
    image_hu += np.float32(rescale.intercept)
    if rescale.padding is not None:
        low, high = sorted(rescale.padding)
        image_hu[(stored >= low) & (stored <= high)] = AIR_HU
    # Scanners fill the corners outside the reconstruction circle with -2000 or -3024.
    return np.maximum(image_hu, np.float32(FLOOR_HU))
