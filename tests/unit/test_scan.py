"""What the scanner claims of a file is what pydicom says of it."""

import logging
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicomnode.dicomio import codecs, dataset, scan
from tests.dicom import ct_dataset, part10
from tests.fuzz import data_sets

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")

CT = Path(__file__).parents[3] / "shared" / "ct"
NATIVE = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
UIDS = data_sets.UIDS


@pytest.fixture(autouse=True, scope="module")
def quiet_pydicom():
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def scanned(data: bytes, issuers: dict[str, str] | None = None) -> scan.Scanned | None:
    return scan.scan(memoryview(data), issuers or {})


def header_by_pydicom(data: bytes):
    return dataset.header_of(dataset.read(BytesIO(data)))


def agrees(data: bytes) -> bool:
    """Whether the scanner claims a file, of which it then says what pydicom says."""
    found = scanned(data)
    if found is None:
        return False
    ds = dataset.read(BytesIO(data))
    assert found.header == dataset.header_of(ds)
    assert found.layout == dataset.layout(ds)
    assert found.rescale == dataset.rescale(ds)
    return True


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda uid: uid.name)
def test_a_usual_file_is_claimed(syntax):
    assert agrees(part10(ct_dataset(TransferSyntaxUID=syntax, PixelPaddingValue=-2000)))


@pytest.mark.parametrize("number", range(len(data_sets.seeds())))
def test_what_the_fuzz_starts_from_is_decoded(number):
    assert data_sets.outcome(data_sets.seeds()[number]).startswith("decoded")


@pytest.mark.skipif(not CT.is_dir(), reason="../shared/ct is not here")
def test_real_files_of_every_series_are_claimed():
    series = sorted({path.parent for path in CT.rglob("*.dcm")})
    assert series
    for folder in series:
        path = sorted(folder.glob("*.dcm"))[len(list(folder.glob("*.dcm"))) // 2]
        data = path.read_bytes()
        assert agrees(data), path
        found = scanned(data)
        stored = (
            codecs.encapsulated(found.layout, found.fragments)
            if found.pixel_data is None
            else codecs.native(found.layout, found.pixel_data)
        )
        expected = pydicom.dcmread(path).pixel_array
        np.testing.assert_array_equal(stored, expected)
        assert stored.dtype == expected.dtype


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda uid: uid.name)
@pytest.mark.parametrize("undefined", [False, True], ids=["defined", "undefined"])
def test_sequences_before_the_pixels_are_stepped_over(syntax, undefined):
    inner = Dataset()
    inner.PatientID = "NOT THIS"  # the same tags, deeper down
    inner.Rows = 7
    outer = Dataset()
    outer.ReferencedSOPInstanceUID = "1.2.3.5"
    outer.PurposeOfReferenceCodeSequence = Sequence([inner, Dataset(), inner])
    ds = ct_dataset(TransferSyntaxUID=syntax)
    ds.ReferencedImageSequence = Sequence([outer, outer])
    ds.ProcedureCodeSequence = Sequence([])
    for element in (ds["ReferencedImageSequence"], ds["ProcedureCodeSequence"]):
        element.is_undefined_length = undefined
    for item in ds.ReferencedImageSequence:
        item.is_undefined_length_sequence_item = undefined
        item["PurposeOfReferenceCodeSequence"].is_undefined_length = undefined
    data = part10(ds)
    assert agrees(data)
    assert scanned(data).header.patient.patient_id != "NOT THIS"


text = st.text(st.characters(codec="latin-1"), max_size=12)
decimal = st.one_of(
    st.floats(-1e4, 1e4).map(lambda v: f"{v:.6g}"),
    st.sampled_from(["1", " 1", "1 ", "+1.5e2", "nan", "inf", "1e400", "", "1_0", "0x1", "1,5"]),
)
decimals = st.lists(decimal, max_size=7).map("\\".join)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "PatientID": text,
        "IssuerOfPatientID": text,
        "Manufacturer": text,
        "Modality": text,
        "BodyPartExamined": text,
        "ImageType": text,
        "SOPInstanceUID": st.one_of(st.just("1.2.3 "), text),
        "StudyDate": st.one_of(st.sampled_from(["20260105", "20261305", "2026.01.05", ""]), text),
        "StudyTime": st.one_of(st.sampled_from(["0815", "081560", "240000", "8.5", ""]), text),
        "ImagePositionPatient": decimals,
        "ImageOrientationPatient": decimals,
        "PixelSpacing": decimals,
        "RescaleSlope": decimals,
        "RescaleIntercept": decimals,
        "NumberOfFrames": st.sampled_from(["1", " 1 ", "01", "2", "", "1.0", "-1", "9" * 12, "x"]),
        "NumberOfSeriesRelatedInstances": st.sampled_from(["120", "", "1\\2", "abc", "+7"]),
    },
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    values=HEADERS,
    syntax=st.sampled_from(NATIVE),
    character_set=st.sampled_from(
        [None, "", "ISO_IR 100", "ISO_IR 192", "ISO_IR 144", "ISO_IR 13", "ISO 2022 IR 87", "GBK"]
    ),
)
def test_any_header_is_as_pydicom_has_it_or_not_claimed(values, syntax, character_set):
    data = part10(ct_dataset(TransferSyntaxUID=syntax, **UIDS))
    if character_set is not None:
        values = {"SpecificCharacterSet": character_set, **values}
    for keyword, value in values.items():
        data = with_value(data, keyword, value.encode("latin-1"), syntax == ImplicitVRLittleEndian)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = scanned(data)
        if found is None:
            return
        ds = dataset.read(BytesIO(data))
        assert found.header == dataset.header_of(ds)
        if dataset.is_sound(found.rescale):
            assert found.rescale == dataset.rescale(ds)


def with_value(data: bytes, keyword: str, value: bytes, implicit: bool) -> bytes:
    """The file with the raw value of an element in place of the one it has."""
    tag = pydicom.datadict.tag_for_keyword(keyword)
    name = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")
    value += b" " * (len(value) % 2)
    meta = 144 + int.from_bytes(data[140:144], "little")
    at = meta
    while at < len(data):  # elements are in order, and none has a long length before the pixels
        here = int.from_bytes(data[at : at + 2], "little") << 16
        here |= int.from_bytes(data[at + 2 : at + 4], "little")
        if implicit:
            length = int.from_bytes(data[at + 4 : at + 8], "little")
        else:
            length = int.from_bytes(data[at + 6 : at + 8], "little")
        if here >= tag:
            end = at + 8 + length if here == tag else at
            vr = pydicom.datadict.dictionary_VR(tag).encode()
            size = len(value).to_bytes(4 if implicit else 2, "little")
            return data[:at] + name + (b"" if implicit else vr) + size + value + data[end:]
        at += 8 + length
    raise AssertionError(keyword)


def test_a_sender_has_its_default_issuer():
    ds = ct_dataset()
    ds.file_meta.SourceApplicationEntityTitle = "SCANNER"
    issuers = {"SCANNER": "HOSPITAL", "": "OTHER"}
    assert scanned(part10(ds), issuers).header.patient.issuer == "HOSPITAL"
    assert scanned(part10(ct_dataset()), issuers).header.patient.issuer == "OTHER"


def changed(**overrides: Any) -> bytes:
    return part10(ct_dataset(**overrides))


@pytest.mark.parametrize(
    "data",
    [
        changed(PatientID="Müller", SpecificCharacterSet="ISO_IR 100"),
        changed(SpecificCharacterSet="ISO_IR 100").replace(b"ISO_IR 100", b"ISO_IR 149"),
        changed(PatientID="A\\B"),
        changed()[:-1],
        changed() + b"\xe0\x7f\x10\x00OW\0\0\2\0\0\0ab",  # pixels once more
        changed().replace(b"\x20\x00\x32\x00DS", b"\x20\x00\x32\x00LO"),
        changed().replace(b"\x10\x00\x20\x00LO", b"\x10\x00\x20\x00??"),
        b"",
        bytes(128) + b"DICM",
    ],
    ids=["umlaut", "characters", "values", "short", "twice", "vr", "no vr", "nothing", "prefix"],
)
def test_what_is_unusual_is_left_to_pydicom(data):
    assert scanned(data) is None


def test_padding_is_signed_as_pixels_are():
    for syntax in NATIVE:
        for signed, value, expected in ((1, -2000, -2000), (0, 63536, 63536)):
            data = changed(
                TransferSyntaxUID=syntax, PixelRepresentation=signed, PixelPaddingValue=value
            )
            assert scanned(data).rescale.padding == (expected, expected)
            assert agrees(data)
