"""Stored pixel values to HU."""

import numpy as np
import numpy.typing as npt

AIR_HU = -1000


def to_hu(
    stored: npt.NDArray[np.integer],
    slope: float,
    intercept: float,
    padding: tuple[int, int] | None = None,
) -> npt.NDArray[np.float32]:
    """Return HU by the Modality LUT, padding as air.

    Parameters
    ----------
    stored : (R, C) integer
        Stored pixel values.
    slope, intercept : float
        Rescale Slope (0028,1053) and Rescale Intercept (0028,1052).
    padding : (int, int), optional
        Pixel Padding Value (0028,0120) and Range Limit (0028,0121), stored values,
        both ends included: pixels that were never measured.

    Returns
    -------
    (R, C) float32
        HU, not below -1024.

    References
    ----------
    DICOM PS3.3 C.11.1 (Modality LUT), C.7.5.1.1.2 (padding).
    """
    image_hu = stored.astype(np.float32)
    image_hu *= np.float32(slope)
    image_hu += np.float32(intercept)
    if padding is not None:
        low, high = sorted(padding)
        image_hu[(stored >= low) & (stored <= high)] = AIR_HU
    # Scanners fill the corners outside the reconstruction circle with -2000 or -3024.
    return np.maximum(image_hu, np.float32(-1024))
