import warnings
from dataclasses import fields
from io import BytesIO

import numpy as np
import pydicom
import pytest

from dicomnode.core import admission
from dicomnode.model import Quality, ScoreCurve
from dicomnode.objects import source
from dicomnode.objects.source import COPIED, Instance, Source
from tests.dicom import ct_dataset, part10

CLASSES = {"1.1": admission.CT_IMAGE, "1.2": admission.CT_IMAGE}


def of(**overrides: object) -> Source:
    """Return what is made of one slice, after a way through a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong is wrong on purpose
        ds = pydicom.dcmread(BytesIO(part10(ct_dataset(**overrides))))
    return source.of_header(ds, [Instance(admission.CT_IMAGE, "1.1")], ["1.9"])


def test_every_copied_attribute_has_its_field():
    assert set(COPIED) <= {f.name for f in fields(Source)}


def test_texts_are_those_of_the_header():
    found = of(
        StudyInstanceUID="1.2.3",
        SeriesInstanceUID="1.2.3.4",
        IssuerOfPatientID="HOSPITAL",
        AccessionNumber=" A1 ",
        PatientSex="O",
        PatientBirthDate="19600229",
        StudyTime="081500.123456",
        StudyDescription="Thorax native",
        TimezoneOffsetFromUTC="-0330",
        Laterality="L",
    )
    assert (found.study_uid, found.series_uid) == ("1.2.3", "1.2.3.4")
    assert found.patient_name == "CANARY^NAME" and found.patient_id == "CANARY-ID"
    assert found.issuer_of_patient_id == "HOSPITAL" and found.accession_number == "A1"
    assert (found.patient_sex, found.patient_birth_date) == ("O", "19600229")
    assert (found.study_date, found.study_time) == ("20260105", "081500.123456")
    assert found.study_description == "Thorax native"
    assert found.timezone_offset_from_utc == "-0330" and found.laterality == "L"
    assert found.frame_of_reference_uid == "1.9"
    assert found.unknown == ("StudyID",)


NAMES = {
    "ISO_IR 100": "Müller^Jörg",
    "ISO_IR 138": "שרון^דבורה",
    "ISO_IR 192": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "\\ISO 2022 IR 87": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "GB18030": "Wang^XiaoDong=王^小东",
}


@pytest.mark.parametrize("character_set", NAMES)
def test_names_are_read_in_their_character_set(character_set):
    sets = character_set.split("\\") if "\\" in character_set else character_set
    found = of(SpecificCharacterSet=sets, PatientName=NAMES[character_set])
    assert found.patient_name == NAMES[character_set]


def test_a_name_that_cannot_be_decoded_is_unknown():
    data = part10(ct_dataset(SpecificCharacterSet="ISO_IR 192", PatientName="Mueller^Joerg"))
    ds = pydicom.dcmread(BytesIO(data.replace(b"Mueller^Joerg", b"M\xfcller^J\xf6rg  ")))
    assert source.of_header(ds, [], []).patient_name == ""


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientSex", "X"),
        ("PatientBirthDate", "19601340"),
        ("PatientBirthDate", "1960.01.01"),
        ("StudyDate", "unknown"),
        ("StudyTime", "8 Uhr 15"),
        ("AccessionNumber", "longer than 16 characters"),
        ("PatientID", "x" * 65),
        ("PatientID", ["A", "B"]),
        ("PatientName", "x" * 65),
        ("BodyPartExamined", "Thorax mit KM"),
        ("StudyDescription", "a\x1bb"),
        ("StudyDescription", "\N{REPLACEMENT CHARACTER}"),
        ("Laterality", "B"),
        ("TimezoneOffsetFromUTC", "0100"),
        ("TimezoneOffsetFromUTC", "+0160"),
        ("TimezoneOffsetFromUTC", "+1500"),
        ("TimezoneOffsetFromUTC", "-0000"),
    ],
)
def test_a_value_that_its_vr_forbids_is_unknown(keyword, value):
    field = next(f for f, k in COPIED.items() if k == keyword)
    ds = ct_dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setattr(ds, keyword, value)
    assert getattr(source.of_header(ds, [], []), field) == ""


def test_reading_a_header_warns_of_no_value():
    data = part10(ct_dataset(PatientSex="F", StudyTime="081500"))
    damaged = data.replace(b"081500", b"8 UHR!").replace(b"CANARY-ID", b"CANARY\x01ID")
    ds = pydicom.dcmread(BytesIO(damaged))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = source.of_header(ds, [], [])
    assert (found.study_time, found.patient_id) == ("", "")


def curve(uids: tuple[str, ...], frames: tuple[int, ...]) -> ScoreCurve:
    """Return a curve of so many slices."""
    z_mm = np.arange(float(len(uids)))
    score = z_mm.astype(np.float32)
    return ScoreCurve("1", "m", z_mm, score, z_mm, uids, frames, Quality(1.0, 1.0))


def test_single_frame_instances_have_no_frames():
    assert source.instances_of(curve(("1.2", "1.1"), (1, 1)), CLASSES) == (
        Instance(admission.CT_IMAGE, "1.2"),
        Instance(admission.CT_IMAGE, "1.1"),
    )


def test_frames_of_one_instance_are_one_reference():
    enhanced = "1.2.840.10008.5.1.4.1.1.2.1"
    found = source.instances_of(curve(("1.5",) * 3, (7, 6, 5)), {"1.5": enhanced})
    assert found == (Instance(enhanced, "1.5", (5, 6, 7)),)


@pytest.mark.parametrize("frames", [(), ("",), ("1.9", ""), ("1.9", "1.8"), ("none",)])
def test_frames_of_reference_that_differ_are_none(frames):
    assert source.of_header(ct_dataset(), [], frames).frame_of_reference_uid == ""


def test_frames_of_reference_are_named_once():
    found = source.of_header(ct_dataset(), [], ["1.9", "1.9"])
    assert found.frames_of_reference == ("1.9",)


def test_a_traceback_shows_no_patient():
    assert "CANARY" not in repr(of()) and "Source(" in repr(of())
