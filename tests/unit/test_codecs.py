"""Compressed frames come out as pydicom has them, and a frame that lies of its size is refused."""

import logging
from io import BytesIO
from struct import pack

import numpy as np
import pydicom
import pytest
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicomnode import dicomio
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.dicomio import codecs, dataset, scan
from dicomnode.errors import CorruptObject
from dicomnode.model import Reason
from tests.dicom import compress, ct_dataset, part10

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")

SPEC = PreprocessSpec()
COMPRESSED = [
    RLELossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEG2000Lossless,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    HTJ2K,
]


@pytest.fixture(autouse=True, scope="module")
def quiet_pydicom():
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def stored(scanned: scan.Scanned) -> np.ndarray | None:
    if scanned.pixel_data is not None:
        return codecs.native(scanned.layout, scanned.pixel_data)
    return codecs.encapsulated(scanned.layout, scanned.fragments)


def pydicom_has(data: bytes) -> np.ndarray:
    return pydicom.dcmread(BytesIO(data)).pixel_array


def stored_values(bits: int, signed: bool) -> np.ndarray:
    """Smooth and noisy pixels of so many bits, their extremes among them."""
    rng = np.random.default_rng(bits)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    ramp = np.linspace(low, high, 64)[None] + np.linspace(0, high / 8, 64)[:, None]
    image = (ramp + rng.normal(0, 3, (64, 64))).clip(low, high)
    image[0, :2] = low, high
    return image.round().astype("<i2" if signed else "<u2")


def file_of(image: np.ndarray, bits: int, syntax: str, fragments: int = 1) -> bytes:
    ds = ct_dataset(
        PixelData=image.tobytes(),
        BitsStored=bits,
        HighBit=bits - 1,
        PixelRepresentation=int(image.dtype.kind == "i"),
        RescaleIntercept="0",
    )
    return part10(compress(ds, syntax, fragments))


@pytest.mark.parametrize("syntax", COMPRESSED, ids=lambda uid: uid.name)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [12, 16])
def test_a_compressed_frame_comes_out_as_it_went_in_and_as_pydicom_has_it(syntax, signed, bits):
    image = stored_values(bits, signed)
    data = file_of(image, bits, syntax)
    scanned = scan.scan(memoryview(data), {})
    assert scanned is not None
    got = stored(scanned)
    np.testing.assert_array_equal(got, image)
    assert got.dtype == image.dtype
    if get_decoder(syntax).is_available:  # without pylibjpeg, pydicom has none for HTJ2K
        expected = pydicom_has(data)
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype


@pytest.mark.parametrize("syntax", COMPRESSED, ids=lambda uid: uid.name)
def test_frames_in_several_fragments_are_put_together(syntax):
    image = stored_values(12, False)
    data = file_of(image, 12, syntax, fragments=3)
    scanned = scan.scan(memoryview(data), {})
    assert scanned is not None and len(scanned.fragments) == 3
    np.testing.assert_array_equal(stored(scanned), image)


def _larger(frame: bytes, syntax: str) -> bytes:
    """The same codestream, saying that it is 60,000 x 60,000."""
    if syntax in (JPEG2000Lossless, HTJ2KLossless):
        at = frame.index(b"\xff\x4f\xff\x51") + 8
        size = pack(">LLLLLL", 60000, 60000, 0, 0, 60000, 60000)
        return frame[:at] + size + frame[at + len(size) :]
    marker = b"\xff\xf7" if syntax == JPEGLSLossless else b"\xff\xc3"
    at = frame.index(marker) + 5
    return frame[:at] + pack(">HH", 60000, 60000) + frame[at + 4 :]


@pytest.mark.parametrize(
    "syntax", [JPEGLSLossless, JPEGLosslessSV1, JPEG2000Lossless, HTJ2KLossless],
    ids=lambda uid: uid.name,
)  # fmt: skip
@pytest.mark.parametrize("usual", [True, False], ids=["scanned", "pydicom"])
def test_a_frame_larger_than_its_header_says_is_refused_before_it_is_decoded(syntax, usual):
    data = file_of(stored_values(12, False), 12, syntax)
    data = _larger(data, syntax)
    if not usual:  # the scanner takes no such name
        data = data.replace(b"made", b"m\xe4de")
    assert (scan.scan(memoryview(data), {}) is not None) is usual
    (decoded,) = dicomio.decode(data, SPEC)
    assert decoded.reason is Reason.PIXEL_DATA
    assert "60000 x 60000" in decoded.detail


def test_many_tiny_tiles_are_refused():
    data = file_of(stored_values(12, False), 12, JPEG2000Lossless)
    at = data.index(b"\xff\x4f\xff\x51") + 8 + 16
    data = data[:at] + pack(">LL", 1, 1) + data[at + 8 :]  # T.800 A.5.1: XTsiz, YTsiz
    (decoded,) = dicomio.decode(data, SPEC)
    assert decoded.reason in (Reason.PIXEL_DATA, None)
    scanned = scan.scan(memoryview(data), {})
    assert scanned is not None


def test_a_deflated_data_set_is_read():
    data = part10(ct_dataset(TransferSyntaxUID=DeflatedExplicitVRLittleEndian))
    assert dicomio.decode(data, SPEC)[0].input is not None


def test_a_deflated_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(dataset, "MAX_INFLATED", 1 << 16)
    ds = ct_dataset(TransferSyntaxUID=DeflatedExplicitVRLittleEndian)
    ds.add_new(0x00091001, "OB", bytes(1 << 20))
    data = part10(ds)
    assert len(data) < 1 << 14
    with pytest.raises(CorruptObject, match="inflates"):
        dicomio.decode(data, SPEC)
    with pytest.raises(CorruptObject, match="inflates"):
        dicomio.read(BytesIO(data), pixels=False)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("garbage", [0, 0x1000, 0xF000])
def test_bits_that_are_not_stored_do_not_count(syntax, signed, garbage):
    image = stored_values(12, signed).astype("<i4") & 0x0FFF | garbage
    ds = ct_dataset(
        TransferSyntaxUID=syntax,
        PixelData=image.astype("<u2").tobytes(),
        BitsStored=12,
        HighBit=11,
        PixelRepresentation=int(signed),
    )
    data = part10(ds)
    scanned = scan.scan(memoryview(data), {})
    assert scanned is not None
    got = stored(scanned)
    expected = pydicom_has(data)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got, stored_values(12, signed))


def test_native_pixels_are_a_view_of_the_file():
    data = part10(ct_dataset())
    scanned = scan.scan(memoryview(data), {})
    assert scanned is not None
    assert np.shares_memory(stored(scanned), np.frombuffer(data, np.uint8))
