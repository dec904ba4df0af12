import re
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from io import BytesIO

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import UID

from dicomnode.core import admission, slicemap
from dicomnode.errors import ObjectError
from dicomnode.model import Method, Offset, OffsetStatus
from dicomnode.objects import modules, transform
from dicomnode.objects import registration as module
from dicomnode.objects.modules import Origin
from dicomnode.objects.registration import registration
from dicomnode.objects.source import Instance, Source
from tests import iod

MADE_AT = datetime(2026, 3, 1, 23, 30, tzinfo=UTC)
ORIGIN = Origin(model="0123456789abcdef" * 4, model_name="compact-0.2", made_at=MADE_AT)


def source(root: str, count: int, **changes: object) -> Source:
    """Return a Series of CT Images; all UIDs begin with `root`."""
    values = {
        "study_uid": f"{root}.1",
        "series_uid": f"{root}.1.1",
        "instances": tuple(
            Instance(admission.CT_IMAGE, f"{root}.1.1.{k}") for k in range(1, count + 1)
        ),
        "frames_of_reference": (f"{root}.9",),
        "patient_name": "Test^Made",
        "patient_id": "4711",
        "issuer_of_patient_id": "HOSPITAL",
        "patient_birth_date": "19600101",
        "patient_sex": "F",
        "study_date": "20260301",
        "study_time": "101500",
        "study_id": "S1",
        "accession_number": "A1",
        "referring_physician_name": "Doctor^A",
        "body_part_examined": "CHEST",
    }
    return Source(**{**values, **changes})


FIXED = source("1.2.3", 12)
MOVING = source("1.2.4", 9, study_date="20240115", study_time="090000", accession_number="A0")
Z_ONLY = Offset(Method.L1, OffsetStatus.OK, offset_mm=-211.25, overlap_mm=120.0)
XYZ = Offset(Method.ROBUST, OffsetStatus.OK, 33.125, 250.0, 4.2, dx_mm=-7.5, dy_mm=12.25)


def written(ds: pydicom.Dataset) -> pydicom.Dataset:
    """Return the object as it is read from a file."""
    file = BytesIO()
    ds.save_as(file, enforce_file_format=True)
    file.seek(0)
    return pydicom.dcmread(file)


def test_the_matrix_takes_points_of_the_moving_series_to_the_fixed_one():
    ds = written(registration(FIXED, MOVING, XYZ, ORIGIN))
    point = (10.0, -20.0, 300.0)
    for instance in MOVING.instances:
        found = iod.registered(ds, instance.sop_instance_uid, point)
        np.testing.assert_allclose(found, [2.5, -7.75, 333.125], atol=1e-9)
    for instance in FIXED.instances:
        np.testing.assert_array_equal(iod.registered(ds, instance.sop_instance_uid, point), point)
    assert ds.FrameOfReferenceUID == "1.2.3.9"
    fixed, moving = ds.RegistrationSequence
    assert (fixed.FrameOfReferenceUID, moving.FrameOfReferenceUID) == ("1.2.3.9", "1.2.4.9")


@settings(deadline=None)  # other work on the machine is no failure
@given(st.tuples(*[st.floats(-2000, 2000)] * 3), st.tuples(*[st.floats(-2000, 2000)] * 3))
def test_the_matrix_is_the_inverse_of_what_itk_gets(shift, point):
    offset = replace(XYZ, dx_mm=shift[0], dy_mm=shift[1], offset_mm=shift[2])
    ds = registration(FIXED, MOVING, offset, ORIGIN)
    fixed_point = iod.registered(ds, "1.2.4.1.1.1", point)
    back = transform.to_sitk_transform(offset).TransformPoint(fixed_point.tolist())
    np.testing.assert_allclose(back, point, atol=1e-9)


def test_what_was_not_estimated_is_said_wherever_the_object_is_named():
    ds = registration(FIXED, MOVING, Z_ONLY, ORIGIN)
    assert ds.ContentLabel == "PREALIGN_Z"
    assert ds.SeriesDescription == "dicomnode prealignment of 2024-01-15, z only"
    (moved,) = ds.RegistrationSequence[1].MatrixRegistrationSequence
    comment = moved.FrameOfReferenceTransformationComment
    assert comment == "x and y not estimated, their 0 is a placeholder"
    assert "Frame of Reference Transformation Comment" not in str(ds.RegistrationSequence[0])


@pytest.mark.parametrize(
    ("dx", "dy", "status", "label", "title", "comment"),
    [
        (1.0, 2.0, "ok", "PREALIGN_XYZ", "x y z", "x y z estimated, sigma is of z"),
        (1.0, None, "ok", "PREALIGN_XZ", "x z", "y not estimated, its 0 is a placeholder"),
        (
            None,
            None,
            "extrapolated",
            "EXTRAPOLATED_Z",
            "z only, extrapolated",
            "extrapolated; x and y not estimated, their 0 is a placeholder",
        ),
        (
            1.0,
            2.0,
            "extrapolated",
            "EXTRAPOLATED_XYZ",
            "x y z, extrapolated",
            "extrapolated; x y z estimated, sigma is of z",
        ),
    ],
)
def test_label_title_and_comment_tell_axes_and_status(dx, dy, status, label, title, comment):
    offset = replace(Z_ONLY, dx_mm=dx, dy_mm=dy, status=OffsetStatus(status))
    ds = registration(FIXED, MOVING, offset, ORIGIN)
    assert ds.ContentLabel == label
    assert ds.SeriesDescription == f"dicomnode prealignment of 2024-01-15, {title}"
    (moved,) = ds.RegistrationSequence[1].MatrixRegistrationSequence
    assert moved.FrameOfReferenceTransformationComment == comment


def test_the_description_tells_offset_sigma_and_method():
    robust = registration(FIXED, MOVING, XYZ, ORIGIN)
    assert robust.ContentDescription == "z +33.1 mm, sigma 4.2 mm, robust"
    l1 = registration(FIXED, MOVING, Z_ONLY, ORIGIN)
    assert l1.ContentDescription == "z -211.2 mm, sigma unknown, l1"
    assert list(l1.SoftwareVersions)[1] == "compact-0.2 0123456789abcdef"


def placed(side: Source, z_mm: np.ndarray) -> Source:
    """Return the Series with slices at these positions."""
    instances = tuple(Instance(admission.CT_IMAGE, f"{side.series_uid}.{k + 1}")
                      for k in range(len(z_mm)))  # fmt: skip
    return replace(side, instances=instances, z_mm=tuple(z_mm.tolist()))


def test_the_description_has_the_slice_map_as_a_line():
    # z_fixed = z_moving + 33.125: fixed slice 1, at 40, is where the moving Series has 6.875.
    fixed = placed(FIXED, 40 + 2.5 * np.arange(100))
    moving = placed(MOVING, -3.125 + 5.0 * np.arange(60))
    ds = written(registration(fixed, moving, XYZ, ORIGIN))
    assert ds.ContentDescription == "z +33.1 mm, sigma 4.2 mm, robust, slice 2.5+0.5k"


@settings(deadline=None, max_examples=20)
@given(
    fixed_mm=st.floats(0.4, 10), moving_mm=st.floats(0.4, 10), start=st.floats(-1500, 1500),
    counts=st.tuples(st.integers(8, 900), st.integers(8, 900)), dz=st.floats(-2000, 2000),
)  # fmt: skip
def test_a_reader_finds_the_slice_by_the_description(fixed_mm, moving_mm, start, counts, dz):
    fixed = placed(FIXED, start + fixed_mm * np.arange(counts[0]))
    moving = placed(MOVING, moving_mm * np.arange(counts[1]))
    ds = registration(fixed, moving, replace(XYZ, offset_mm=dz), ORIGIN)
    assert len(ds.ContentDescription) <= 64
    found = re.search(r", slice (-?[\d.]+)([+-][\d.e+-]+)k$", ds.ContentDescription)
    if found is None:  # there was no room
        assert max(abs(dz), abs(start)) > 99
        return
    k = np.arange(1, counts[0] + 1)
    told = float(found[1]) + float(found[2]) * k
    nearest = slicemap.slice_map(np.array(fixed.z_mm), np.array(moving.z_mm), dz)
    at = nearest.index != slicemap.NONE
    # The digits of the line are good to half a slice, and so is the nearest slice.
    slope = fixed_mm / moving_mm
    away = 0.06 + 5e-5 * slope * counts[0]
    half = max(0.5, slope / 2) + 0.05 / moving_mm
    assert (np.abs(told[at] - (nearest.index[at] + 1)) <= half + away).all()
    listed = [
        i.ReferencedSOPInstanceUID for i in ds.RegistrationSequence[1].ReferencedImageSequence
    ]
    assert listed == [i.sop_instance_uid for i in moving.instances]  # what is counted


def test_of_uneven_slices_the_description_has_no_line():
    uneven = np.concatenate([np.arange(0, 100, 5.0), np.arange(100, 400, 1.0)])
    ds = registration(placed(FIXED, uneven), placed(MOVING, np.arange(0, 300, 5.0)), XYZ, ORIGIN)
    assert ds.ContentDescription == "z +33.1 mm, sigma 4.2 mm, robust"


def test_the_longest_description_is_not_cut():
    longest = module.FARTHEST_MM
    sides = (
        placed(FIXED, 1e4 + 5.003 * np.arange(9)),
        placed(MOVING, -1e4 + 0.00417 * np.arange(900)),
    )
    ds = registration(*sides, replace(XYZ, offset_mm=-longest, sigma_mm=longest), ORIGIN)
    assert ds.ContentDescription == "z -50000.0 mm, sigma 50000.0 mm, robust"


def test_types_of_registration_are_those_of_cid_7100():
    types = [
        item.MatrixRegistrationSequence[0].RegistrationTypeCodeSequence
        for item in registration(FIXED, MOVING, XYZ, ORIGIN).RegistrationSequence
    ]
    assert [(t[0].CodeValue, t[0].CodingSchemeDesignator) for t in types] == [
        ("125021", "DCM"),
        ("125024", "DCM"),
    ]


def test_the_object_belongs_to_the_fixed_study_and_its_patient():
    ds = written(registration(FIXED, replace(MOVING, patient_id="old"), XYZ, ORIGIN))
    assert (ds.StudyInstanceUID, ds.StudyDate, ds.StudyTime) == ("1.2.3.1", "20260301", "101500")
    assert (ds.PatientID, ds.IssuerOfPatientID, ds.PatientName) == ("4711", "HOSPITAL", "Test^Made")
    assert (ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName) == ("A1", "S1", "Doctor^A")
    assert ds.SeriesInstanceUID not in (FIXED.series_uid, MOVING.series_uid)


@pytest.mark.parametrize("same_study", [False, True])
def test_every_image_is_listed_once_under_its_study_and_series(same_study):
    # dciodvfy passes an object without this list.
    moving = replace(MOVING, study_uid=FIXED.study_uid) if same_study else MOVING
    ds = written(registration(FIXED, moving, XYZ, ORIGIN))
    assert iod.common_instance_reference(ds) == {
        (s.study_uid, s.series_uid): [i.sop_instance_uid for i in s.instances]
        for s in (FIXED, moving)
    }
    assert ("StudiesContainingOtherReferencedInstancesSequence" in ds) is not same_study
    listed = iod.common_instance_reference(ds).values()
    assert iod.referenced(ds) == {uid for uids in listed for uid in uids}


def test_the_checks_of_our_own_see_what_they_are_for():
    ds = written(registration(FIXED, MOVING, XYZ, ORIGIN))
    del ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence[3]
    listed = {uid for uids in iod.common_instance_reference(ds).values() for uid in uids}
    assert iod.referenced(ds) - listed == {FIXED.instances[3].sop_instance_uid}
    del ds.StudiesContainingOtherReferencedInstancesSequence
    assert list(iod.common_instance_reference(ds)) == [(FIXED.study_uid, FIXED.series_uid)]
    # The opposite direction, as a Deformable Spatial Registration has it.
    (matrix,) = ds.RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence
    inverse = np.linalg.inv(np.array(matrix.FrameOfReferenceTransformationMatrix).reshape(4, 4))
    matrix.FrameOfReferenceTransformationMatrix = inverse.ravel().tolist()
    found = iod.registered(ds, MOVING.instances[0].sop_instance_uid, (10.0, -20.0, 300.0))
    np.testing.assert_allclose(found, [17.5, -32.25, 266.875])


def test_a_frame_of_reference_that_a_scanner_reuses_is_named_for_one_side_only():
    ds = registration(FIXED, replace(MOVING, frames_of_reference=("1.2.3.9",)), XYZ, ORIGIN)
    fixed, moving = ds.RegistrationSequence
    assert fixed.FrameOfReferenceUID == ds.FrameOfReferenceUID == "1.2.3.9"
    assert "FrameOfReferenceUID" not in moving
    assert len(moving.ReferencedImageSequence) == 9


@pytest.mark.parametrize("frames", [(), ("",), ("1.2.3.9", "1.2.3.10"), ("1.2.3.9", ""), ("x",)])
def test_a_series_without_one_frame_of_reference_gets_one_for_the_object(frames):
    ds = registration(replace(FIXED, frames_of_reference=frames), MOVING, XYZ, ORIGIN)
    assert UID(ds.FrameOfReferenceUID).is_valid
    assert ds.FrameOfReferenceUID.startswith("2.25.")
    fixed, _ = ds.RegistrationSequence
    assert "FrameOfReferenceUID" not in fixed
    assert len(fixed.ReferencedImageSequence) == 12
    assert len(fixed.MatrixRegistrationSequence[0].RegistrationTypeCodeSequence) == 0


def test_a_repeat_is_the_same_object_to_the_byte():
    files = []
    for _ in range(2):
        file = BytesIO()
        registration(FIXED, MOVING, XYZ, ORIGIN).save_as(file, enforce_file_format=True)
        files.append(file.getvalue())
    assert files[0] == files[1]


CHANGES = {
    "the sides swapped": (MOVING, FIXED, XYZ, ORIGIN),
    "another method": (FIXED, MOVING, replace(XYZ, method=Method.FAST), ORIGIN),
    "another bundle": (FIXED, MOVING, XYZ, replace(ORIGIN, model="f" * 64)),
    "another revision": (FIXED, MOVING, XYZ, replace(ORIGIN, revision="2.1")),
    "one slice more": (source("1.2.3", 13), MOVING, XYZ, ORIGIN),
    "another patient": (replace(FIXED, patient_id="4712"), MOVING, XYZ, ORIGIN),
    "another issuer": (replace(FIXED, issuer_of_patient_id="OTHER"), MOVING, XYZ, ORIGIN),
    "another name": (replace(FIXED, patient_name="Test^Other"), MOVING, XYZ, ORIGIN),
    "another accession number": (replace(FIXED, accession_number="A2"), MOVING, XYZ, ORIGIN),
    "a prior of another day": (FIXED, replace(MOVING, study_date="20240116"), XYZ, ORIGIN),
    "another offset": (FIXED, MOVING, replace(XYZ, offset_mm=33.5), ORIGIN),
    "another spread": (FIXED, MOVING, replace(XYZ, sigma_mm=4.3), ORIGIN),
}


@pytest.mark.parametrize("arguments", CHANGES.values(), ids=CHANGES)
def test_another_result_is_another_object(arguments):
    first, second = registration(FIXED, MOVING, XYZ, ORIGIN), registration(*arguments)
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert first.SeriesInstanceUID != second.SeriesInstanceUID
    for ds in (first, second):
        assert UID(ds.SOPInstanceUID).is_valid and UID(ds.SeriesInstanceUID).is_valid


def test_uids_of_objects_are_uuids_of_what_they_are_about():
    # Never to change: a repeat by a later version is to write the same object.
    namespace = uuid.UUID("6b3c1b0e-5b5c-4c53-9d0c-3f6a1d2f7a41")
    assert modules.uid_of("a", "bc") == f"2.25.{uuid.uuid5(namespace, 'a' + chr(0) + 'bc').int}"
    assert modules.uid_of("a", "bc") != modules.uid_of("ab", "c")
    assert modules.uid_of("a") != modules.uid_of("a", "")


def test_what_was_made_at_another_time_says_so_and_is_another_object():
    later = replace(ORIGIN, made_at=MADE_AT + timedelta(days=1))
    first, second = (registration(FIXED, MOVING, XYZ, o) for o in (ORIGIN, later))
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert (first.ContentDate, second.ContentDate) == ("20260301", "20260302")


def test_the_time_is_in_the_timezone_of_the_study_where_it_is_known():
    there = replace(FIXED, timezone_offset_from_utc="+0100")
    ds = registration(there, MOVING, XYZ, ORIGIN)
    assert (ds.ContentDate, ds.ContentTime) == ("20260302", "003000.000000")
    assert ds.TimezoneOffsetFromUTC == "+0100"
    here = replace(ORIGIN, made_at=MADE_AT.astimezone(timezone(timedelta(hours=-5))))
    ds = registration(FIXED, MOVING, XYZ, here)
    assert (ds.ContentDate, ds.ContentTime) == ("20260301", "183000.000000")
    assert "TimezoneOffsetFromUTC" not in ds


def test_a_time_without_timezone_is_no_time():
    with pytest.raises(ValueError, match="timezone"):
        replace(ORIGIN, made_at=MADE_AT.replace(tzinfo=None))


@pytest.mark.parametrize(
    ("fixed", "moving", "offset", "words"),
    [
        (FIXED, MOVING, Offset(Method.L1, OffsetStatus.REFUSED, reason="why"), "refused"),
        (FIXED, MOVING, Offset(Method.L1, OffsetStatus.OK), "no registration"),
        (FIXED, MOVING, replace(XYZ, offset_mm=float("nan")), "of -7.5, 12.25, nan"),
        (FIXED, MOVING, replace(XYZ, dx_mm=float("inf")), "of inf"),
        (FIXED, MOVING, replace(XYZ, sigma_mm=1e6), "1000000.0 mm"),
        (FIXED, FIXED, XYZ, "onto itself"),
        (replace(FIXED, instances=()), MOVING, XYZ, "without Instances"),
        (FIXED, replace(MOVING, instances=()), XYZ, "without Instances"),
    ],
)
def test_what_no_object_can_say_is_refused(fixed, moving, offset, words):
    with pytest.raises(ObjectError, match=words):
        registration(fixed, moving, offset, ORIGIN)


def test_a_body_part_that_is_no_paired_structure_has_no_laterality():
    regions = iod.table("anatomic_regions")
    for term in module.UNPAIRED:
        assert regions[term][3] is False, term
        ds = registration(replace(FIXED, body_part_examined=term), MOVING, XYZ, ORIGIN)
        assert ds.BodyPartExamined == term and "Laterality" not in ds
    for term, side in (("BREAST", "L"), ("BREAST", ""), ("", ""), ("FREE TEXT", "")):
        paired = replace(FIXED, body_part_examined=term, laterality=side)
        assert registration(paired, MOVING, XYZ, ORIGIN).Laterality == side


numbers = st.floats(-module.FARTHEST_MM, module.FARTHEST_MM)
offsets = st.builds(
    Offset,
    method=st.sampled_from(list(Method)),
    status=st.sampled_from([OffsetStatus.OK, OffsetStatus.EXTRAPOLATED]),
    offset_mm=numbers,
    overlap_mm=st.none() | numbers,
    sigma_mm=st.none() | numbers,
    dx_mm=st.none() | numbers,
    dy_mm=st.none() | numbers,
)


@settings(deadline=None)  # other work on the machine is no failure
@given(offsets)
def test_any_offset_makes_an_object_that_keeps_to_the_standard(offset):
    ds = written(registration(source("1.2.3", 2), source("1.2.4", 1), offset, ORIGIN))
    assert iod.faults(ds) == []
    assert iod.bad_values(ds) == []
    matrix = ds.RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence[0]
    for i, value in enumerate((offset.dx_mm, offset.dy_mm, offset.offset_mm)):
        stored = matrix.FrameOfReferenceTransformationMatrix[4 * i + 3]
        assert float(stored) == pytest.approx(value or 0.0, rel=1e-8)


def test_the_oracle_sees_what_is_wrong():
    ds = registration(FIXED, MOVING, XYZ, ORIGIN)
    del ds.ContentLabel, ds.PatientName
    ds.ContentDate = ""
    with pytest.warns(UserWarning, match="maximum length"):
        ds.ContentDescription = "x" * 65
    assert iod.bad_values(ds) == ["ContentDescription"]
    ds.PatientWeight = "70"  # in an optional module: allowed
    ds.Rows = 5
    del ds.RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence
    assert sorted(fault.split(": ")[-1] for fault in iod.faults(ds)) == [
        "ContentDate is empty",
        "ContentLabel is missing",
        "PatientName is missing",
        "RegistrationSequence/MatrixRegistrationSequence/MatrixSequence is missing",
        "Rows is in no module",
    ]
