"""How large a compressed frame says it is, before any codec makes room for it."""

import re
from struct import Struct

from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    RLELossless,
)

from dicomnode.errors import CorruptObject
from dicomnode.model import Reason

JPEG_2000 = frozenset({JPEG2000, JPEG2000Lossless, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL})

_word = Struct(">H").unpack_from
_size = Struct(">LLLL").unpack_from
# ITU-T T.81 Table B.1, start of frame: all but DHT (C4), JPG (C8) and DAC (CC). T.87: F7, JPEG-LS.
_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RSTn, SOI
# ITU-T T.800 A.4.1, A.5.1: SOC and then, at once, SIZ. A JP2 file has them after its boxes.
_SOC_SIZ = re.compile(rb"\xff\x4f\xff\x51", re.DOTALL)


def check(
    frame: bytes | memoryview, transfer_syntax_uid: str, rows: int, columns: int, samples: int
) -> None:
    """See that a frame is as large as its header says: a codec allocates what the frame says.

    Of RLE, which has no size of its own, that a header is there.

    Raises
    ------
    CorruptObject
        If it is of another size, or does not tell one.
    """
    if transfer_syntax_uid == RLELossless:
        if len(frame) < 64:  # its header, PS3.5 G.5
            raise CorruptObject("pixel data break off", Reason.PIXEL_DATA)
        return
    told = _jpeg2000(frame) if transfer_syntax_uid in JPEG_2000 else _jpeg(frame)
    if told != {(rows, columns, samples)}:
        shown = ", ".join(f"{r} x {c} x {n}" for r, c, n in sorted(told)[:3]) or "no size"
        raise CorruptObject(
            f"compressed pixel data of {shown}, in place of {rows} x {columns} x {samples}",
            Reason.PIXEL_DATA,
        )


def jpeg_precision(frame: bytes | memoryview) -> int:
    """Return the bits of a sample of a JPEG or JPEG-LS frame that `check` has seen."""
    at = 2
    while frame[at + 1] not in _START_OF_FRAME:
        at += 1 if frame[at + 1] == 0xFF else 2 + _word(frame, at + 2)[0]
    return int(frame[at + 4])


def jpeg2000_precision(frame: bytes | memoryview) -> tuple[int, bool]:
    """Return the bits of a sample of a JPEG 2000 frame that `check` has seen; whether signed."""
    found = _SOC_SIZ.search(frame)
    told = frame[found.end() + 38] if found and found.end() + 38 < len(frame) else 15
    return (told & 0x7F) + 1, bool(told & 0x80)


def _jpeg(frame: bytes | memoryview) -> set[tuple[int, int, int]]:
    """Rows, columns and components of each start of frame before the first scan."""
    told: set[tuple[int, int, int]] = set()
    at, end = 0, len(frame)
    while at + 4 <= end:
        if frame[at] != 0xFF:
            return set()
        marker = frame[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker in _ALONE:
            at += 2
            continue
        if marker == _START_OF_SCAN:
            return told
        if marker in _START_OF_FRAME:
            if at + 10 > end:
                return set()
            told.add((*_word(frame, at + 5), *_word(frame, at + 7), frame[at + 9]))
        at += 2 + _word(frame, at + 2)[0]
    return set()


def _jpeg2000(frame: bytes | memoryview) -> set[tuple[int, int, int]]:
    """Rows, columns and components of each image size that a codec might come upon."""
    told: set[tuple[int, int, int]] = set()
    for found in _SOC_SIZ.finditer(frame):
        at = found.end()
        if at + 36 > len(frame):
            continue
        width, height, left, top = _size(frame, at + 4)
        tile_width, tile_height, _, _ = _size(frame, at + 20)
        (components,) = _word(frame, at + 36) if at + 38 <= len(frame) else (0,)
        # Tiles of a pixel each are a bomb of another kind: T.800 allows 65,535 of them.
        fits = tile_width and tile_height and _tiles(width, tile_width, height, tile_height) <= 4096
        told.add((height - top, width - left, components) if fits else (0, 0, 0))
    return told


def _tiles(width: int, tile_width: int, height: int, tile_height: int) -> int:
    return -(-width // tile_width) * -(-height // tile_height)
