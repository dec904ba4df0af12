"""Whatever bytes come, the door gives a header, HU or a reason, and raises nothing unforeseen."""

import logging
import warnings
from datetime import datetime
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from dicomnode import dicomio
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import CorruptObject, DicomError, UnsupportedObject
from dicomnode.model import PatientKey, Reason, SeriesState
from tests.dicom import PATIENT_ID, PATIENT_NAME, ct_dataset, part10

# As in the node: `log.setup` silences what pydicom warns of.
pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")

SPEC = PreprocessSpec()
PIXEL_BYTES = 64 * 64 * 2
FIXED_UIDS = dict.fromkeys(
    ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"), "1.2.3"
)


@pytest.fixture(autouse=True, scope="module")
def quiet_pydicom():
    """As in the node, where `log.setup` does it: pydicom logs what it warns of."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def sent(ds: Dataset) -> Dataset:
    """A data set as it comes out of a file."""
    return dicomio.read(BytesIO(part10(ds)))


def header(**overrides):
    return dicomio.header_of(sent(ct_dataset(**overrides)))


def decode(data: bytes, **options) -> dicomio.Decoded:
    (only,) = dicomio.decode(BytesIO(data), SPEC, **options)
    return only


def stored(value: int, dtype: str = "<i2") -> bytes:
    return np.full((64, 64), value, dtype).tobytes()


def encapsulated(transfer_syntax_uid: str) -> bytes:
    """A file whose compressed pixel data nobody here can read."""
    ds = ct_dataset(TransferSyntaxUID=transfer_syntax_uid, PixelData=encapsulate([b"\1" * 100]))
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    file = BytesIO()
    ds.save_as(file, implicit_vr=False, little_endian=True, enforce_file_format=True)
    return file.getvalue()


def test_a_header_is_what_the_data_set_says():
    ds = ct_dataset(
        IssuerOfPatientID="HOSPITAL", NumberOfSeriesRelatedInstances="120", PatientPosition="FFS"
    )
    h = dicomio.header_of(sent(ds))
    assert h.sop_class_uid == "1.2.840.10008.5.1.4.1.1.2"
    assert h.sop_instance_uid == ds.SOPInstanceUID
    assert h.series_uid == ds.SeriesInstanceUID
    assert h.study_uid == ds.StudyInstanceUID
    assert h.frame_of_reference_uid == ds.FrameOfReferenceUID
    assert h.patient == PatientKey(PATIENT_ID, "HOSPITAL")
    assert h.study_datetime == datetime(2026, 1, 5, 8, 15)
    assert (h.modality, h.manufacturer, h.body_part_examined) == ("CT", "made", "CHEST")
    assert h.image_type == ("ORIGINAL", "PRIMARY", "AXIAL")
    assert h.image_position == (-24, -24, 100)
    assert h.image_orientation == (1, 0, 0, 0, 1, 0)
    assert h.pixel_spacing == (0.75, 0.75)
    assert (h.rows, h.columns, h.number_of_frames) == (64, 64, 1)
    assert h.expected_instances == 120


def test_what_is_missing_is_none_or_empty():
    h = dicomio.header_of(Dataset())
    assert (h.sop_class_uid, h.sop_instance_uid, h.series_uid, h.study_uid) == ("",) * 4
    assert h.patient == PatientKey("")
    assert not h.patient.known
    assert h.image_type == ()
    assert (h.image_position, h.image_orientation, h.pixel_spacing) == (None,) * 3
    assert (h.study_datetime, h.expected_instances) == (None, None)
    assert (h.rows, h.columns, h.number_of_frames) == (0, 0, 1)
    assert (h.modality, h.frame_of_reference_uid, h.body_part_examined) == ("", "", "")


def test_what_is_empty_is_none_or_empty():
    empty = dict.fromkeys(
        ("ImagePositionPatient", "PixelSpacing", "ImageType", "PatientID", "StudyDate", "StudyTime",
         "NumberOfFrames", "Modality"), ""
    )  # fmt: skip
    h = header(**empty)
    assert (h.image_position, h.pixel_spacing, h.study_datetime) == (None, None, None)
    assert (any(h.image_type), h.modality, h.number_of_frames) == (False, "", 1)
    assert not h.patient.known


@pytest.mark.parametrize(
    ("keyword", "value", "field"),
    [
        ("ImagePositionPatient", ["1", "2"], "image_position"),
        ("ImagePositionPatient", ["1", "2", "3", "4"], "image_position"),
        ("ImageOrientationPatient", ["1", "0", "0"], "image_orientation"),
        ("PixelSpacing", "0.75", "pixel_spacing"),
        ("NumberOfSeriesRelatedInstances", ["1", "2"], "expected_instances"),
    ],
)
def test_a_value_of_another_multiplicity_is_none(keyword, value, field):
    assert getattr(header(**{keyword: value}), field) is None


def test_a_decimal_that_is_none_is_none():
    data = part10(ct_dataset()).replace(b"0.75\\0.75", b"0.75\\0,75")
    assert dicomio.header_of(dicomio.read(BytesIO(data))).pixel_spacing is None


def test_texts_are_stripped_and_image_types_upper_case():
    h = header(Modality=" CT ", ImageType=["original", " Primary", "localizer "], PatientID=" 7 ")
    assert h.modality == "CT"
    assert h.image_type == ("ORIGINAL", "PRIMARY", "LOCALIZER")
    assert h.patient == PatientKey("7")


@pytest.mark.parametrize(
    ("date", "time", "expected"),
    [
        ("20260105", "081500", datetime(2026, 1, 5, 8, 15)),
        ("20260105", "081500.250000", datetime(2026, 1, 5, 8, 15)),
        ("20260105", "0815", datetime(2026, 1, 5, 8, 15)),
        ("20260105", "08", datetime(2026, 1, 5, 8)),
        ("20260105", None, datetime(2026, 1, 5)),
        ("20260105", "8 o'clock", datetime(2026, 1, 5)),
        ("20261305", "081500", None),
        (None, "081500", None),
    ],
)
def test_a_time_may_be_short_or_missing_a_date_may_not(date, time, expected):
    assert header(StudyDate=date, StudyTime=time).study_datetime == expected


def test_the_issuer_of_the_data_set_wins_over_the_default_one():
    ds = sent(ct_dataset(IssuerOfPatientID="HOSPITAL"))
    assert dicomio.header_of(ds, default_issuer="OTHER").patient.issuer == "HOSPITAL"
    del ds.IssuerOfPatientID
    assert dicomio.header_of(ds, default_issuer="OTHER").patient.issuer == "OTHER"


def test_two_patient_ids_of_several_values_are_not_one_patient():
    # VM is 1, and a backslash separates values: two IDs with one in them share their first value.
    one, two = (header(PatientID=text).patient for text in ("4711\\A", "4711\\B"))
    assert one != two or not one.known


def test_a_phantom_slice_reads_as_it_was_written():
    image = np.random.default_rng(0).integers(-1024, 3071, (48, 48), np.int16)
    ds = dicomio.ct_dataset(
        image,
        patient=PatientKey("P1", "MADE"),
        study_uid="1.2",
        series_uid="1.2.3",
        sop_instance_uid="1.2.3.4",
        instance_number=7,
        image_position=(-100.5, -90.25, 1234.5),
        pixel_mm=4.0,
        spacing_mm=5.0,
        study_datetime=datetime(2026, 1, 5, 8, 15),
        frame_of_reference_uid="1.2.9",
    )
    ds = sent(ds)
    h = dicomio.header_of(ds)
    assert (h.patient, h.study_uid, h.series_uid) == (PatientKey("P1", "MADE"), "1.2", "1.2.3")
    assert (h.sop_instance_uid, h.frame_of_reference_uid) == ("1.2.3.4", "1.2.9")
    assert h.image_position == (-100.5, -90.25, 1234.5)
    assert h.pixel_spacing == (4.0, 4.0)
    assert h.study_datetime == datetime(2026, 1, 5, 8, 15)
    np.testing.assert_array_equal(dicomio.image_hu(ds), image)
    assert decode(part10(ds)).input is not None


@pytest.mark.parametrize(
    ("overrides", "hu"),
    [
        ({"PixelData": stored(1024)}, 0),
        ({"PixelData": stored(-5), "RescaleIntercept": "0"}, -5),
        ({"PixelData": stored(40000, "<u2"), "PixelRepresentation": 0}, 38976),
        ({"PixelData": stored(1000), "RescaleSlope": "0.5", "RescaleIntercept": "-100"}, 400),
        ({"PixelData": stored(70), "RescaleSlope": None, "RescaleIntercept": None}, 70),
        ({"PixelData": stored(70), "RescaleSlope": "0", "RescaleIntercept": "0"}, 70),
        # 12 bits stored: the sign is bit 11 (PS3.5 section 8.1.1), whatever lies above it.
        (
            {"PixelData": stored(0x0FFF), "BitsStored": 12, "HighBit": 11, "RescaleIntercept": "0"},
            -1,
        ),
        (
            {
                "PixelData": stored(100, "u1"), "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7,
                "PixelRepresentation": 0, "RescaleIntercept": "0",
            },
            100,
        ),
        ({"PixelData": stored(-2000), "RescaleIntercept": "0"}, -1024),
        (
            {"PixelData": stored(500), "PixelPaddingValue": 500},
            -1000,
        ),
        (
            {"PixelData": stored(450), "PixelPaddingValue": 400, "PixelPaddingRangeLimit": 500},
            -1000,
        ),
        ({"PixelData": stored(-2000), "PixelPaddingValue": -2000}, -1000),
    ],
)  # fmt: skip
def test_stored_values_become_hu(overrides, hu):
    image = dicomio.image_hu(sent(ct_dataset(**overrides)))
    assert image.shape == (64, 64)
    assert image.dtype == np.float32
    assert (image == hu).all()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_uncompressed_syntaxes_give_the_same_hu(syntax):
    image = dicomio.image_hu(sent(ct_dataset(TransferSyntaxUID=syntax)))
    np.testing.assert_array_equal(image, np.arange(4096).reshape(64, 64) - 1024)


def test_a_compressed_syntax_gives_the_same_hu():
    ds = ct_dataset()
    ds.compress(RLELossless)
    image = dicomio.image_hu(sent(ds))
    np.testing.assert_array_equal(image, np.arange(4096).reshape(64, 64) - 1024)


@pytest.mark.parametrize(
    "overrides",
    [
        {"PixelData": None},
        {"PixelData": b""},
        {"PixelData": bytes(PIXEL_BYTES - 2)},
        {"Rows": 0},
        {"Rows": None},
        {"Rows": 128},
        {"Rows": 65535, "Columns": 65535},
        {"BitsAllocated": 13},
        {"PhotometricInterpretation": None},
        {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
        {"NumberOfFrames": 2},
    ],
    ids=str,
)
def test_pixel_data_that_do_not_fit_their_header_are_told(overrides):
    with pytest.raises(CorruptObject) as caught:
        dicomio.image_hu(sent(ct_dataset(**overrides)))
    assert caught.value.reason is Reason.PIXEL_DATA


@pytest.mark.parametrize("missing", [1, 2, 1000, PIXEL_BYTES])
def test_a_file_that_breaks_off_in_its_pixels_is_told(missing):
    ds = dicomio.read(BytesIO(part10(ct_dataset())[:-missing]))
    with pytest.raises(CorruptObject) as caught:
        dicomio.image_hu(ds)
    assert caught.value.reason is Reason.PIXEL_DATA


def test_wherever_a_file_breaks_off_it_is_quarantined():
    data = part10(ct_dataset(**FIXED_UIDS))
    for kept in (*range(0, len(data) - PIXEL_BYTES, 7), len(data) - 2):
        try:
            reason = decode(data[:kept]).reason
        except CorruptObject as exc:
            reason = exc.reason
        assert reason is not None, kept
        assert reason.state is SeriesState.QUARANTINED, kept


def test_a_file_that_breaks_off_in_compressed_pixels_still_names_its_series():
    ds = ct_dataset()
    ds.compress(RLELossless)
    decoded = decode(part10(ds)[:-100])
    assert decoded.header.series_uid == ds.SeriesInstanceUID
    assert (decoded.reason, decoded.input) == (Reason.PIXEL_DATA, None)


@pytest.mark.parametrize("data", [b"", b"random bytes" * 50, bytes(132), bytes(128) + b"DICX" * 9])
def test_what_is_no_dicom_is_told(data):
    for pixels in (True, False):
        with pytest.raises(CorruptObject) as caught:
            dicomio.read(BytesIO(data), pixels=pixels)
        assert caught.value.reason is Reason.NOT_DICOM


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_not_dicom(data):
    with pytest.raises(CorruptObject) as caught:
        decode(data)
    assert caught.value.reason is Reason.NOT_DICOM


def test_pixel_data_of_unknown_depth_are_told():
    ds = sent(ct_dataset())
    del ds.BitsAllocated
    with pytest.raises(CorruptObject) as caught:
        dicomio.image_hu(ds)
    assert caught.value.reason is Reason.PIXEL_DATA


def test_a_disk_that_does_not_answer_is_not_a_corrupt_object():
    class Broken(BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        dicomio.read(Broken())


def test_a_header_alone_is_read_without_pixels():
    ds = dicomio.read(BytesIO(part10(ct_dataset())), pixels=False)
    assert "PixelData" not in ds
    assert dicomio.header_of(ds).rows == 64


@pytest.mark.parametrize(
    "syntax",
    [
        "1.2.840.10008.1.2.4.100",  # MPEG2
        "1.2.840.113619.5.2",  # private to GE
        "1.3.46.670589.33.1.4.1",  # private to Philips
    ],
)
def test_a_transfer_syntax_nobody_decodes_is_told(syntax):
    data = encapsulated(syntax)
    with pytest.raises(UnsupportedObject, match=syntax) as caught:
        dicomio.image_hu(dicomio.read(BytesIO(data)))
    assert caught.value.reason is Reason.UNSUPPORTED_TRANSFER_SYNTAX


def test_a_sound_slice_is_decoded():
    ds = ct_dataset()
    ds.file_meta.SourceApplicationEntityTitle = "SCANNER"
    d = decode(part10(ds), default_issuers={"SCANNER": "HOSPITAL", "OTHER": "X"})
    assert d.reason is None
    assert d.input.shape == (128, 128)
    assert d.input.dtype == np.uint8
    assert d.header.patient == PatientKey(PATIENT_ID, "HOSPITAL")
    assert d.header.sop_instance_uid == ds.SOPInstanceUID


def test_a_sender_without_a_default_issuer_gives_none():
    assert decode(part10(ct_dataset()), default_issuers={"X": "Y"}).header.patient.issuer == ""


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, Reason.LOCALIZER),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, Reason.REFORMAT),
        ({"ImagePositionPatient": None}, Reason.NO_GEOMETRY),
        ({"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]}, Reason.NO_GEOMETRY),
        ({"PixelSpacing": None}, Reason.NO_GEOMETRY),
        ({"PixelSpacing": ["0", "0.75"]}, Reason.NO_GEOMETRY),
        ({"ImageOrientationPatient": ["1", "0", "0", "0", "0", "-1"]}, Reason.NON_AXIAL),
        ({"ImageOrientationPatient": ["1", "0", "0", "0", "0.866", "0.5"]}, Reason.TILT),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "Modality": "MR"}, Reason.NOT_CT),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"}, Reason.CORRUPT),  # says not of Frames
        ({"NumberOfFrames": "3"}, Reason.MULTI_FRAME),
        ({"SeriesInstanceUID": None}, Reason.BAD_UID),
        ({"StudyInstanceUID": None}, Reason.BAD_UID),
        ({"PixelData": None}, Reason.PIXEL_DATA),
        ({"PixelData": bytes(100)}, Reason.PIXEL_DATA),
    ],
)
def test_a_slice_that_is_not_scored_says_why_and_whose_it_is(overrides, reason):
    ds = ct_dataset(**overrides)
    d = decode(part10(ds))
    assert d.reason is reason
    assert d.input is None
    assert d.header.sop_instance_uid == ds.SOPInstanceUID
    assert d.header.series_uid == ds.get("SeriesInstanceUID", "")


def test_an_unsupported_transfer_syntax_is_a_reason_with_its_uid():
    d = decode(encapsulated("1.2.840.10008.1.2.4.100"))
    assert d.reason is Reason.UNSUPPORTED_TRANSFER_SYNTAX
    assert "1.2.840.10008.1.2.4.100" in d.detail


@pytest.mark.parametrize(
    "overrides",
    [
        {"RescaleSlope": "nan"},
        {"RescaleIntercept": "nan"},
        {"RescaleSlope": "inf"},
        {"RescaleSlope": "1e39"},  # beyond float32
        {"RescaleIntercept": "-1e39"},
        {"PixelSpacing": ["1e300", "1e300"]},
    ],
    ids=str,
)
def test_numbers_that_make_no_image_are_a_reason_not_a_slice_of_air(overrides):
    d = decode(part10(ct_dataset(**overrides)))
    assert d.reason is not None
    assert d.input is None


def test_a_padding_value_that_is_no_number_does_not_stop_the_slice():
    ds = ct_dataset()
    ds.add_new("PixelPaddingValue", "DS", "1e400")
    assert isinstance(decode(part10(ds)), dicomio.Decoded)


def test_a_broken_rescale_element_is_a_reason():
    data = part10(ct_dataset())
    at = data.index(bytes.fromhex("28005310")) + 4  # (0028,1053) RescaleSlope, then its VR
    assert data[at : at + 2] == b"DS"
    d = decode(data[:at] + b"D?" + data[at + 2 :])
    assert d.input is None
    assert d.reason is not None


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.data())
def test_a_file_with_flipped_bytes_is_decoded_or_told(data):
    whole = bytearray(part10(ct_dataset(**FIXED_UIDS)))
    places = st.integers(128, len(whole) - PIXEL_BYTES - 1)
    for at in data.draw(st.lists(places, min_size=1, max_size=4)):
        whole[at] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # RuntimeWarning, of arithmetic, is not
        try:
            d = decode(bytes(whole))
        except DicomError:
            return
    assert (d.input is None) == (d.reason is not None)


@pytest.mark.parametrize(
    "data",
    [
        part10(ct_dataset())[:700],
        part10(ct_dataset())[:-10],
        part10(ct_dataset(Rows=0)),
        encapsulated("1.2.840.10008.1.2.4.100"),
    ],
    ids=["header", "pixels", "rows", "syntax"],
)
def test_no_message_tells_a_patient_attribute(data):
    try:
        told = decode(data).detail
    except DicomError as exc:
        told = str(exc)
    assert PATIENT_NAME not in told
    assert PATIENT_ID not in told
