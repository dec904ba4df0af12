"""Each slice and Series that is not scored says why."""

from dataclasses import replace

import numpy as np
import pytest

from dicomnode.core import admission
from dicomnode.errors import (
    ConfigError,
    CorruptObject,
    DicomError,
    GeometryError,
    NodeError,
    SpoolFull,
    TransientError,
    UnsupportedObject,
    WeightsError,
)
from dicomnode.model import PatientKey, Reason, Refusal, SeriesState, SliceHeader

SOUND = SliceHeader(
    sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
    sop_instance_uid="1.2.3.4",
    series_uid="1.2.3",
    study_uid="1.2",
    patient=PatientKey("P"),
    study_datetime=None,
    modality="CT",
    image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
    image_position=(-200.0, -200.0, 5.0),
    image_orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    pixel_spacing=(0.8, 0.8),
    rows=512,
    columns=512,
)


def tilted(degrees):
    angle = np.radians(degrees)
    return (1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), float(np.sin(angle)))


def test_an_axial_ct_slice_is_scored():
    assert admission.refuse_slice(SOUND) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sop_instance_uid": ""}, Reason.BAD_UID),
        ({"series_uid": "1.2.x"}, Reason.BAD_UID),
        ({"study_uid": "1." + "2" * 63}, Reason.BAD_UID),
        ({"number_of_frames": 2}, Reason.MULTI_FRAME),
        ({"sop_class_uid": "1.2.840.10008.5.1.4.1.1.4"}, Reason.NOT_CT),  # MR
        ({"sop_class_uid": "1.2.840.10008.5.1.4.1.1.7"}, Reason.NOT_CT),  # Secondary Capture
        ({"modality": "PT"}, Reason.NOT_CT),
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, Reason.LOCALIZER),
        ({"image_type": ("DERIVED", "SECONDARY", "AXIAL", "MPR")}, Reason.REFORMAT),
        ({"image_type": ("DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE")}, Reason.REFORMAT),
        ({"image_position": None}, Reason.NO_GEOMETRY),
        ({"image_orientation": None}, Reason.NO_GEOMETRY),
        ({"pixel_spacing": None}, Reason.NO_GEOMETRY),
        ({"image_position": (0.0, 0.0, float("nan"))}, Reason.NO_GEOMETRY),
        ({"image_orientation": (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)}, Reason.NO_GEOMETRY),
        ({"pixel_spacing": (0.8, 0.0)}, Reason.NO_GEOMETRY),
        ({"pixel_spacing": (-0.8, 0.8)}, Reason.NO_GEOMETRY),
        ({"pixel_spacing": (0.8, float("inf"))}, Reason.NO_GEOMETRY),
        ({"image_orientation": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)}, Reason.NON_AXIAL),  # coronal
        ({"image_orientation": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)}, Reason.NON_AXIAL),  # sagittal
        ({"image_orientation": tilted(46)}, Reason.NON_AXIAL),
        ({"image_orientation": tilted(44)}, Reason.TILT),
        ({"image_orientation": tilted(-16)}, Reason.TILT),
        ({"image_orientation": tilted(14)}, None),
    ],
)
def test_a_slice_that_is_not_scored_says_why(changes, reason):
    assert admission.refuse_slice(replace(SOUND, **changes)) is reason


@pytest.mark.parametrize(
    "image_type", [(), ("ORIGINAL",), ("DERIVED", "SECONDARY"), ("ORIGINAL", "PRIMARY", "HELIX")]
)
def test_an_image_type_that_says_nothing_against_it_is_scored(image_type):
    assert admission.refuse_slice(replace(SOUND, image_type=image_type)) is None


@pytest.mark.parametrize("uid", ["0", "1.2.840.10008.1.1", "2.25.0", "1.2.05.3", "1" * 64])
def test_what_is_a_uid(uid):
    assert admission.is_uid(uid)


@pytest.mark.parametrize(
    "uid",
    ["", ".", "1.", ".1", "1..2", "1.2 ", "1.2\n", "1.a", "1" * 65, "../1", "1.2\\1.3", "-1"],
)
def test_what_is_no_uid(uid):
    assert not admission.is_uid(uid)


@pytest.mark.parametrize("uid", ["1.1\N{ARABIC-INDIC DIGIT TWO}", "1.2\N{FULLWIDTH DIGIT ONE}.3"])
def test_digits_of_other_scripts_make_no_uid(uid):
    # PS3.5 section 9.1: the characters 0 to 9 of the default repertoire.
    assert not admission.is_uid(uid)


@pytest.mark.parametrize(
    ("positions", "extent_mm", "reason"),
    [
        (0, 0, Reason.TOO_FEW_POSITIONS),
        (7, 300, Reason.TOO_FEW_POSITIONS),
        (8, 50, None),
        (8, 49.9, Reason.TOO_SHORT),
        (500, 49.9, Reason.TOO_SHORT),
        (500, 1000, None),
    ],
)
def test_a_stack_that_makes_no_curve_says_why(positions, extent_mm, reason):
    assert admission.refuse_stack(np.linspace(-20, -20 + extent_mm, positions)) is reason


def test_every_reason_ends_a_series():
    ignored = {
        "not_ct_image", "multi_frame", "empty", "localizer", "reformat", "non_axial", "tilt",
        "too_few_positions", "too_short", "duplicate_position", "rejected",
    }  # fmt: skip
    for reason in Reason:
        expected = SeriesState.IGNORED if reason in ignored else SeriesState.QUARANTINED
        assert reason.state is expected


def test_a_refusal_reads_as_state_and_reason():
    assert str(Refusal("1.2.3", Reason.LOCALIZER)) == "ignored:localizer"
    assert str(Refusal("1.2.3", Reason.CORRUPT)) == "quarantined:corrupt"


def test_an_empty_patient_id_is_nobody():
    assert PatientKey("P").known
    assert not PatientKey("", "issuer").known


def test_the_same_id_of_two_issuers_is_two_patients():
    assert PatientKey("P", "A") != PatientKey("P", "B")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnsupportedObject, Reason.UNSUPPORTED_TRANSFER_SYNTAX),
        (CorruptObject, Reason.CORRUPT),
        (GeometryError, Reason.NO_GEOMETRY),
    ],
)
def test_an_error_of_an_object_carries_its_reason(error, reason):
    assert issubclass(error, DicomError)
    assert error("x").reason is reason
    assert error("x", Reason.PIXEL_DATA).reason is Reason.PIXEL_DATA
    assert error("x").reason is reason


def test_what_to_do_with_an_error_is_told_by_one_class():
    kinds = (DicomError, TransientError, SpoolFull, ConfigError, WeightsError)
    for kind in kinds:
        assert issubclass(kind, NodeError)
        assert not any(issubclass(kind, other) for other in kinds if other is not kind)


@pytest.mark.parametrize("sop_class_uid", sorted(admission.ENHANCED_CT))
def test_frames_of_enhanced_ct_are_judged_one_by_one(sop_class_uid):
    frame = replace(SOUND, sop_class_uid=sop_class_uid, number_of_frames=600, frame=7)
    assert admission.refuse_instance(frame) is None
    assert admission.refuse_slice(frame) is None
    localizer = replace(frame, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"))
    assert admission.refuse_slice(localizer) is Reason.LOCALIZER
    projection = replace(frame, image_type=("DERIVED", "PRIMARY", "AXIAL", "MAXIMUM"))
    assert admission.refuse_slice(projection) is Reason.REFORMAT
    assert admission.refuse_instance(replace(frame, modality="MR")) is Reason.NOT_CT
