"""Stored pixel values of one frame by the fastest exact decoder at hand; pydicom's are the rest.

Where pydicom would do anything but decode and correct the sign, nothing is claimed here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEG2000TransferSyntaxes,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicomnode.dicomio import codestream
from dicomnode.dicomio.scan import Layout

Stored = npt.NDArray[np.integer[Any]]
_Codec = Callable[[bytes, int, int], Stored]


def stored(
    layout: Layout, native: memoryview | None, fragments: Sequence[bytes | memoryview] | None
) -> Stored | None:
    """Return the stored values of one frame, (R, C); None where it is for pydicom to say.

    Parameters
    ----------
    native
        Its bytes, of which the result may be a view; or
    fragments
        the parts of its codestream.

    Raises
    ------
    CorruptObject
        If a compressed frame is of another size than its header says.
    """
    rows, columns, bits = layout.rows, layout.columns, layout.bits_stored
    regular = (
        layout.samples_per_pixel == 1
        and layout.photometric_interpretation in ("MONOCHROME1", "MONOCHROME2")
        and layout.bits_allocated == 16
        and layout.pixel_representation in (0, 1)
    )
    if not regular or bits is None or not 1 <= bits <= 16 or not rows * columns:
        return None
    if native is not None:
        if layout.transfer_syntax_uid not in _NATIVE or len(native) != 2 * rows * columns:
            return None
        dtype = "<i2" if layout.pixel_representation else "<u2"
        return _without_unused_bits(np.frombuffer(native, dtype).reshape(rows, columns), bits)
    decoders = _CODECS.get(layout.transfer_syntax_uid)
    if decoders is None or not fragments:
        return None
    data = bytes(fragments[0]) if len(fragments) == 1 else b"".join(fragments)
    codestream.check(data, layout.transfer_syntax_uid, rows, columns, 1)
    for decode in decoders:
        try:
            image = decode(data, rows, columns)
        except (RuntimeError, ValueError, TypeError):  # the next one may know, or pydicom's
            continue
        if image.shape == (rows, columns) and image.dtype.kind in "iu" and image.itemsize == 2:
            return _signed(image, data, layout, bits)
    return None


def _signed(image: Stored, data: bytes, layout: Layout, bits: int) -> Stored:
    """As pydicom corrects it: see `pydicom.pixels.decoders.base`."""
    signed = bool(layout.pixel_representation)
    image = image.view(np.int16 if signed else np.uint16)
    if layout.transfer_syntax_uid in (JPEGLSLossless, JPEGLSNearLossless):
        precision = codestream.jpeg_precision(data)
        return _without_unused_bits(image, precision) if signed else image
    if layout.transfer_syntax_uid in JPEG2000TransferSyntaxes:
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


def _rle(data: bytes, rows: int, columns: int) -> Stored:
    """Two byte planes, the high one first, each of PackBits (PS3.5 Annex G)."""
    header = np.frombuffer(data[:64], "<u4")
    begin, middle = int(header[1]), int(header[2])
    if header[0] != 2 or not 64 <= begin < middle < len(data):
        raise ValueError("not two segments")
    count = rows * columns
    image = np.empty((count, 2), np.uint8)
    for plane, part in ((1, data[begin:middle]), (0, data[middle:])):
        decoded = np.frombuffer(imagecodecs.packbits_decode(part, out=count + 1), np.uint8)
        if len(decoded) < count:
            raise ValueError("a segment is short")
        image[:, plane] = decoded[:count]
    return image.view("<u2").reshape(rows, columns)


def _jpegls(data: bytes, rows: int, columns: int) -> Stored:
    return imagecodecs.jpegls_decode(data)


def _ljpeg(data: bytes, rows: int, columns: int) -> Stored:
    return imagecodecs.ljpeg_decode(data)


def _jpeg2k(data: bytes, rows: int, columns: int) -> Stored:
    return imagecodecs.jpeg2k_decode(data)


def _htj2k(data: bytes, rows: int, columns: int) -> Stored:
    return imagecodecs.htj2k_decode(data)


_NATIVE = {ImplicitVRLittleEndian, ExplicitVRLittleEndian}
_CODECS: dict[str, tuple[_Codec, ...]] = {
    RLELossless: (_rle,),
    JPEGLSLossless: (_jpegls,),
    JPEGLSNearLossless: (_jpegls,),
    JPEGLossless: (_ljpeg,),
    JPEGLosslessSV1: (_ljpeg,),
    JPEG2000: (_jpeg2k,),
    JPEG2000Lossless: (_jpeg2k,),
    HTJ2K: (_htj2k, _jpeg2k),
    HTJ2KLossless: (_htj2k, _jpeg2k),
    HTJ2KLosslessRPCL: (_htj2k, _jpeg2k),
}
KNOWN = frozenset(_CODECS)  # transfer syntaxes that need no decoder of pydicom
