"""Grey pictures -> PNG: no more of the format (ISO/IEC 15948) than that takes."""

import struct
import zlib

import numpy as np
import numpy.typing as npt

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4}  # channels -> greyscale, greyscale with alpha
UP = 2  # the filter of every row: the row above it is taken off


def encode(image: npt.NDArray[np.uint8]) -> bytes:
    """Return a picture as PNG.

    Parameters
    ----------
    image : (R, C) or (R, C, 2) uint8
        Grey values, or grey values and opacity.
    """
    rows, columns, *rest = image.shape
    channels = rest[0] if rest else 1
    flat = image.reshape(rows, columns * channels)
    lines = np.full((rows, 1 + flat.shape[1]), UP, np.uint8)
    lines[0, 1:] = flat[0]
    lines[1:, 1:] = flat[1:] - flat[:-1]  # modulo 256, as uint8 has it
    header = struct.pack(">IIBBBBB", columns, rows, 8, COLOUR_TYPES[channels], 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
    return SIGNATURE + body + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    checked = kind + data
    return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))
