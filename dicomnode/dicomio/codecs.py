"""Stored pixel values of one frame, by the fastest exact codec that damaged frames do not crash.

With GDCM and OpenJPH in use, ten thousand damaged files (`tests/fuzz/data_sets.py`) killed the
process seven times, by what was on stderr mostly in GDCM; OpenJPH's errors are lost in
imagecodecs, and what it then gives back was never written. Without the two nothing crashed.
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
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicomnode.dicomio import codestream
from dicomnode.dicomio.scan import Layout

Stored = npt.NDArray[np.integer[Any]]
_Codec = Callable[[bytes, Layout], Stored]


def native(layout: Layout, data: memoryview) -> Stored | None:
    """Return the stored values of one uncompressed frame, (R, C); None where pydicom is to.

    They are a view of `data` where no bits have to be corrected.
    """
    rows, columns, bits = layout.rows, layout.columns, layout.bits_stored
    if not _is_regular(layout) or layout.bits_allocated != 16 or bits is None:
        return None
    if layout.transfer_syntax_uid not in _NATIVE or len(data) != 2 * rows * columns:
        return None
    dtype = "<i2" if layout.pixel_representation else "<u2"
    return _without_unused_bits(np.frombuffer(data, dtype).reshape(rows, columns), bits)


def encapsulated(layout: Layout, fragments: Sequence[bytes | memoryview]) -> Stored | None:
    """Return the stored values of one compressed frame, (R, C); None where it cannot be decoded.

    Parameters
    ----------
    fragments
        The parts of its codestream.

    Raises
    ------
    CorruptObject
        If it is of another size than its header says.
    """
    decode = _CODECS.get(layout.transfer_syntax_uid)
    if decode is None or not _is_regular(layout) or not fragments:
        return None
    data = bytes(fragments[0]) if len(fragments) == 1 else b"".join(fragments)
    codestream.check(data, layout.transfer_syntax_uid, layout.rows, layout.columns, 1)
    try:
        image = decode(data, layout)
    except (RuntimeError, ValueError, TypeError, MemoryError):
        return None
    allocated = (layout.bits_allocated or 0) // 8
    whole = image.dtype.kind in "iu" and image.itemsize <= allocated
    if image.shape != (layout.rows, layout.columns) or not whole:
        return None
    if image.itemsize < allocated:  # 8 bits of a frame in 16
        image = image.astype(np.uint16)
    return _signed(image, data, layout)


def _is_regular(layout: Layout) -> bool:
    bits, allocated = layout.bits_stored, layout.bits_allocated
    return (
        layout.samples_per_pixel == 1
        and layout.photometric_interpretation in ("MONOCHROME1", "MONOCHROME2")
        and layout.pixel_representation in (0, 1)
        and allocated in (8, 16)
        and bits is not None
        and 1 <= bits <= allocated
        and layout.rows * layout.columns > 0
    )


def _signed(image: Stored, data: bytes, layout: Layout) -> Stored:
    """As pydicom corrects it: see `pydicom.pixels.decoders.base`."""
    signed = bool(layout.pixel_representation)
    image = image.view(f"{'i' if signed else 'u'}{image.itemsize}")
    if layout.transfer_syntax_uid in (JPEGLSLossless, JPEGLSNearLossless):
        precision = codestream.jpeg_precision(data)
        return _without_unused_bits(image, precision) if signed else image
    if layout.transfer_syntax_uid in codestream.JPEG_2000:
        precision, is_signed = codestream.jpeg2000_precision(data)
        return image if is_signed == signed else _without_unused_bits(image, precision)
    return _without_unused_bits(image, layout.bits_stored or 8 * image.itemsize)


def _without_unused_bits(image: Stored, bits: int) -> Stored:
    """Return the values of the lowest bits alone, the sign from the highest of them."""
    unused = 8 * image.itemsize - bits
    limit = 1 << (bits - (image.dtype.kind == "i"))
    # Three times as quick as to shift all of them to and fro, and no copy.
    if unused <= 0 or (image.max() < limit and (image.dtype.kind == "u" or image.min() >= -limit)):
        return image
    return (image << unused) >> unused


def _rle(data: bytes, layout: Layout) -> Stored:
    """A plane for each byte, the highest first, each of PackBits (PS3.5 Annex G)."""
    planes, count = (layout.bits_allocated or 8) // 8, layout.rows * layout.columns
    header = np.frombuffer(data[:64], "<u4")
    places = [*map(int, header[1 : planes + 1]), len(data)]
    if header[0] != planes or places[0] < 64 or places != sorted(set(places)):
        raise ValueError(f"{header[0]} segments at {places}")
    image = np.empty((count, planes), np.uint8)
    for k in range(planes):
        decoded = imagecodecs.packbits_decode(data[places[k] : places[k + 1]], out=count + 1)
        if len(decoded) < count:
            raise ValueError("a segment is short")
        image[:, planes - 1 - k] = np.frombuffer(decoded, np.uint8)[:count]
    return image.view(f"<u{planes}").reshape(layout.rows, layout.columns)


def _jpegls(data: bytes, layout: Layout) -> Stored:
    return imagecodecs.jpegls_decode(data)


def _jpeg(data: bytes, layout: Layout) -> Stored:
    return imagecodecs.jpeg8_decode(data)  # libjpeg-turbo: lossy and lossless, 8 to 16 bits


def _jpeg2k(data: bytes, layout: Layout) -> Stored:
    return imagecodecs.jpeg2k_decode(data)  # OpenJPEG: high throughput, too


_NATIVE = {ImplicitVRLittleEndian, ExplicitVRLittleEndian}
_CODECS: dict[str, _Codec] = {
    RLELossless: _rle,
    JPEGLSLossless: _jpegls,
    JPEGLSNearLossless: _jpegls,
    JPEGLossless: _jpeg,
    JPEGLosslessSV1: _jpeg,
    JPEGBaseline8Bit: _jpeg,
    JPEGExtended12Bit: _jpeg,
    JPEG2000: _jpeg2k,
    JPEG2000Lossless: _jpeg2k,
    HTJ2K: _jpeg2k,
    HTJ2KLossless: _jpeg2k,
    HTJ2KLosslessRPCL: _jpeg2k,
}
KNOWN = frozenset(_CODECS)
