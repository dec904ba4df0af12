"""Frames of Enhanced CT come out as the single-frame slices that they were made of."""

import random
import tracemalloc

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dicomnode import dicomio
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.dicomio import scan
from dicomnode.model import Reason
from tests.dicom import compress, ct_dataset, encode, enhanced_ct, part10

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")

SPEC = PreprocessSpec()
COUNT = 6
SERIES = {"SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2", "FrameOfReferenceUID": "1.2.9"}


def slices(**overrides) -> list[Dataset]:
    """Six slices that differ, in no order of height."""
    rng = np.random.default_rng(0)
    found = []
    for k in random.Random(1).sample(range(COUNT), COUNT):
        body = np.where(np.hypot(*np.mgrid[-32:32, -32:32]) < 12 + 2 * k, 1060, 24)
        pixels = (body + rng.normal(0, 9, body.shape)).clip(0, 4095).astype("<i2")
        one = ct_dataset(
            PixelData=pixels.tobytes(),
            PixelSpacing=["4", "4"],
            ImagePositionPatient=["-120", "-130.5", str(5.0 * k)],
            **SERIES,
            **overrides,
        )
        found.append(one)
    return found


def alone(one: Dataset) -> dicomio.Decoded:
    (only,) = dicomio.decode(part10(one), SPEC)
    return only


def same(frames: tuple[dicomio.Decoded, ...], singles: list[Dataset]) -> None:
    assert len(frames) == len(singles)
    for k, (frame, single) in enumerate(zip(frames, map(alone, singles), strict=True), start=1):
        assert (frame.reason, frame.header.frame) == (None, k)
        np.testing.assert_array_equal(frame.input, single.input)
        assert frame.body_centre_mm == single.body_centre_mm
        for name in ("image_position", "image_orientation", "pixel_spacing", "patient",
                     "frame_of_reference_uid", "series_uid", "study_datetime"):  # fmt: skip
            assert getattr(frame.header, name) == getattr(single.header, name)


@pytest.mark.parametrize("legacy", [False, True], ids=["enhanced", "legacy converted"])
def test_frames_are_what_single_slices_are(legacy):
    ds = enhanced_ct(slices(), legacy=legacy)
    frames = dicomio.decode(part10(ds), SPEC)
    same(frames, slices())
    assert {f.header.sop_instance_uid for f in frames} == {ds.SOPInstanceUID}


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian],
    ids=lambda uid: uid.name,
)  # fmt: skip
def test_frames_of_other_uncompressed_syntaxes_are_the_same(syntax):
    ds = enhanced_ct(slices())
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<i2").astype(">i2").tobytes()
    same(dicomio.decode(part10(ds), SPEC), slices())


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.name
)
def test_compressed_frames_are_the_same(syntax, fragments):
    data = part10(compress(enhanced_ct(slices()), syntax, fragments))
    assert scan.scan(memoryview(data), {}) is not None
    same(dicomio.decode(data, SPEC), slices())


@pytest.mark.parametrize("table", ["none", "extended"])
def test_frames_are_found_without_a_basic_offset_table(table):
    ds = compress(enhanced_ct(slices()), JPEGLSLossless)
    pixels = [
        np.frombuffer(one.PixelData, "<i2").reshape(one.Rows, one.Columns) for one in slices()
    ]
    encoded = [encode(frame, JPEGLSLossless) for frame in pixels]
    if table == "none":
        ds.PixelData = encapsulate(encoded, fragments_per_frame=2, has_bot=False)
    else:
        ds.PixelData, offsets, lengths = encapsulate_extended(encoded)
        ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = offsets, lengths
    ds["PixelData"].is_undefined_length = True
    same(dicomio.decode(part10(ds), SPEC), slices())


def test_each_frame_has_its_own_kind_place_and_rescale():
    singles = slices()
    ds = enhanced_ct(singles, frame_types={2: ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]})
    groups = ds.PerFrameFunctionalGroupsSequence
    turned = Dataset()
    turned.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]  # a second stack, coronal
    groups[2].PlaneOrientationSequence = [turned]
    del groups[3].PlanePositionSequence
    other = Dataset()
    other.RescaleIntercept, other.RescaleSlope, other.RescaleType = "-1124", "1", "HU"
    groups[4].PixelValueTransformationSequence = [other]
    frames = dicomio.decode(part10(ds), SPEC)
    assert [f.reason for f in frames] == [
        None, Reason.LOCALIZER, Reason.NON_AXIAL, Reason.NO_GEOMETRY, None, None,
    ]  # fmt: skip
    singles[4].RescaleIntercept = "-1124"
    np.testing.assert_array_equal(frames[4].input, alone(singles[4]).input)
    assert frames[0].header.image_type == ("ORIGINAL", "PRIMARY", "AXIAL", "NONE")


def test_a_frame_that_does_not_decode_does_not_take_the_others_along():
    ds = enhanced_ct(slices())
    pixels = [np.frombuffer(one.PixelData, "<i2").reshape(64, 64) for one in slices()]
    encoded = [encode(frame, JPEGLSLossless) for frame in pixels]
    encoded[3] = encoded[3][:40]
    ds.PixelData = encapsulate(encoded)
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless
    frames = dicomio.decode(part10(ds), SPEC)
    reasons = [f.reason for f in frames]
    assert reasons == [None, None, None, Reason.PIXEL_DATA, None, None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"NumberOfFrames": COUNT + 1}, Reason.CORRUPT),
        ({"NumberOfFrames": 10**9}, Reason.CORRUPT),
        ({"PerFrameFunctionalGroupsSequence": None}, Reason.CORRUPT),
        ({"PixelData": bytes(64 * 64 * 2 * (COUNT - 1))}, Reason.PIXEL_DATA),
        ({"PixelData": None}, Reason.PIXEL_DATA),
        ({"Modality": "MR"}, Reason.NOT_CT),
        ({"SeriesInstanceUID": "x"}, Reason.BAD_UID),
        ({"Rows": 0}, Reason.PIXEL_DATA),
    ],
    ids=str,
)
def test_an_instance_that_does_not_add_up_is_refused_whole_or_frame_by_frame(change, reason):
    ds = enhanced_ct(slices())
    for keyword, value in change.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    frames = dicomio.decode(part10(ds), SPEC)
    assert {f.reason for f in frames} == {reason}
    assert len(frames) in (1, COUNT)


def test_frames_of_a_plain_ct_image_stay_refused():
    ds = enhanced_ct(slices())
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    (only,) = dicomio.decode(part10(ds), SPEC)
    assert only.reason is Reason.MULTI_FRAME


def test_many_frames_need_room_for_one_at_a_time():
    side, count = 256, 120
    one = ct_dataset(
        Rows=side, Columns=side, PixelData=bytes(2 * side * side), PixelSpacing=["1", "1"]
    )
    data = part10(enhanced_ct([one] * count))
    small = memoryview(data)
    dicomio.decode(small, SPEC)  # what is imported and remembered once
    tracemalloc.start()
    frames = dicomio.decode(small, SPEC)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {f.reason for f in frames} == {Reason.EMPTY}
    assert peak < len(data) / 2  # 15.7 MB of pixels


def test_a_broken_pixel_element_is_a_reason():
    data = part10(enhanced_ct(slices()))
    at = data.index(b"\x28\x00\x00\x01US")
    (only,) = dicomio.decode(data[: at + 4] + b"U\x17" + data[at + 6 :], SPEC)
    assert only.reason is Reason.PIXEL_DATA
