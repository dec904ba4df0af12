"""Stored pixel values of one frame by the fastest exact decoder at hand; pydicom's are the rest.

Where pydicom would do anything but decode and correct the sign, nothing is claimed here.
"""

from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicomnode.dicomio import codestream
from dicomnode.dicomio.scan import Scanned

Stored = npt.NDArray[np.integer[Any]]
_Codec = Callable[[memoryview, int, int], Stored]


def stored(scanned: Scanned) -> Stored | None:
    """Return the stored values of a single frame, (R, C); None where it is for pydicom to say.

    They may be a view of the file.

    Raises
    ------
    CorruptObject
        If a compressed frame is of another size than its header says.
    """
    return frame(scanned, scanned.pixel_data, scanned.fragments)


def frame(
    scanned: Scanned, native: memoryview | None, fragments: tuple[memoryview, ...] | None
) -> Stored | None:
    """Return what `stored` does, of one frame among those of an Instance."""
    rows, columns, bits = scanned.header.rows, scanned.header.columns, scanned.bits_stored
    regular = (
        scanned.samples_per_pixel == 1
        and scanned.photometric_interpretation in ("MONOCHROME1", "MONOCHROME2")
        and scanned.bits_allocated == 16
        and scanned.pixel_representation in (0, 1)
    )
    if not regular or bits is None or not 1 <= bits <= 16 or not rows * columns:
        return None
    if native is not None:
        if scanned.transfer_syntax_uid not in _NATIVE or len(native) != 2 * rows * columns:
            return None
        dtype = "<i2" if scanned.pixel_representation else "<u2"
        return _without_unused_bits(np.frombuffer(native, dtype).reshape(rows, columns), bits)
    decode = _CODECS.get(scanned.transfer_syntax_uid)
    if decode is None or not fragments:
        return None
    data = fragments[0] if len(fragments) == 1 else memoryview(b"".join(fragments))
    codestream.check(data, scanned.transfer_syntax_uid, rows, columns, 1)
    try:
        image = decode(data, rows, columns)
    except (RuntimeError, ValueError, TypeError):  # whatever it was, pydicom's decoders may know
        return None
    if image.shape != (rows, columns) or image.dtype.kind not in "iu" or image.itemsize != 2:
        return None
    return _signed(image, data, scanned, bits)


def _signed(image: Stored, data: memoryview, scanned: Scanned, bits: int) -> Stored | None:
    """As pydicom corrects it: see `pydicom.pixels.decoders.base`."""
    signed = bool(scanned.pixel_representation)
    image = image.view(np.int16 if signed else np.uint16)
    if scanned.transfer_syntax_uid in (JPEGLSLossless, JPEGLSNearLossless):
        precision = codestream.jpeg_precision(data)
        return _without_unused_bits(image, precision) if signed else image
    if scanned.transfer_syntax_uid in _JPEG2000:
        precision, is_signed = codestream.jpeg2000_precision(data)
        return image if is_signed == signed else _without_unused_bits(image, precision)
    return _without_unused_bits(image, bits)


def _without_unused_bits(image: Stored, bits: int) -> Stored:
    """Return the values of the lowest bits alone, the sign from the highest of them."""
    unused = 16 - bits
    limit = 1 << (bits - (image.dtype.kind == "i"))
    # Three times as quick as to shift all of them to and fro, and no copy.
    if not unused or (image.max() < limit and (image.dtype.kind == "u" or image.min() >= -limit)):
        return image
    return (image << unused) >> unused


def _rle(data: memoryview, rows: int, columns: int) -> Stored:
    """Two byte planes, the high one first, each of PackBits (PS3.5 Annex G)."""
    header = np.frombuffer(data[:64], "<u4")
    begin, middle = int(header[1]), int(header[2])
    if header[0] != 2 or not 64 <= begin < middle < len(data):
        raise ValueError("not two segments")
    count = rows * columns
    image = np.empty((count, 2), np.uint8)
    for plane, part in ((1, data[begin:middle]), (0, data[middle:])):
        decoded = np.frombuffer(imagecodecs.packbits_decode(bytes(part), out=count + 1), np.uint8)
        if len(decoded) < count:
            raise ValueError("a segment is short")
        image[:, plane] = decoded[:count]
    return image.view("<u2").reshape(rows, columns)


_NATIVE = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1"}
_JPEG2000 = {JPEG2000, JPEG2000Lossless, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL}
_CODECS: dict[str, _Codec] = {
    JPEGLSLossless: lambda data, *_: imagecodecs.jpegls_decode(data),
    JPEGLSNearLossless: lambda data, *_: imagecodecs.jpegls_decode(data),
    JPEGLossless: lambda data, *_: imagecodecs.ljpeg_decode(data),
    JPEGLosslessSV1: lambda data, *_: imagecodecs.ljpeg_decode(data),
    JPEG2000: lambda data, *_: imagecodecs.jpeg2k_decode(data),
    JPEG2000Lossless: lambda data, *_: imagecodecs.jpeg2k_decode(data),
    HTJ2K: lambda data, *_: imagecodecs.htj2k_decode(data),
    HTJ2KLossless: lambda data, *_: imagecodecs.htj2k_decode(data),
    HTJ2KLosslessRPCL: lambda data, *_: imagecodecs.htj2k_decode(data),
    RLELossless: _rle,
}
