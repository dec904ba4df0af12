"""Objects as files: what validators that nobody of us wrote say of them, and the commands."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import zlib
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import EnhancedCTImageStorage

from dicomnode import backfill, dicomio, weights
from dicomnode.cli import main
from dicomnode.config import Settings
from dicomnode.core import curve
from dicomnode.core.region import Limit, Region, Support
from dicomnode.model import Method, Offset, OffsetStatus, PatientKey, ScoreCurve, ScoredSlice
from dicomnode.objects import modules, source, transform
from dicomnode.objects.coverage_report import coverage_report
from dicomnode.objects.registration import registration
from dicomnode.objects.source import Instance, Source
from tests import iod
from tests.dicom import enhanced_ct
from tests.integration.test_files import FOLLOW_UP, PRIOR, SHIFT_MM, follow_up, prior, write
from tests.integration.test_stages import COVARIANCE, brightness_bundle, ct_slice
from tests.unit.test_coverage_report import HEIGHTS, REGIONS, straight
from tests.unit.test_spatial_registration import FIXED, MOVING, ORIGIN, XYZ, Z_ONLY
from tests.unit.test_spatial_registration import source as made_source

REAL = Path(__file__).parents[2] / ".." / "shared" / "ct" / "ACRIN-FLT-Breast_001"
# What the SR validator needs of a Java that counts how often a stylesheet asks.
JAVA = " ".join(f"-Djdk.xml.xpath{name}Limit=0" for name in ("TotalOp", "ExprGrp", "ExprOp"))
# Rows that came to TID 1501 after the rules of the validator were written (2022).
NEWER = (
    'CODE (EXTENT,99DICOMNODE,"Estimated extent of region imaged"): Content Item not in template'
)


def run(program: str, *files: Path, **environment: str) -> str:
    """Return all that a validator prints; skip, saying so, where it is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed: .ci/run installs it")
    done = subprocess.run(
        [program, *map(str, files)],
        capture_output=True, text=True, errors="replace", timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout + done.stderr


def dciodvfy(file: Path) -> list[str]:
    """Return the errors of one object, once it was recognised as what it is."""
    told = run("dciodvfy", file)
    assert "SpatialRegistration" in told or "Comprehensive3DSR" in told or "CTImage" in told, told
    errors = [line for line in told.splitlines() if line.startswith("Error")]
    # It counts bytes of UTF-8; lengths are of characters (PS3.5 section 6.2), as pydicom counts.
    wrong = [e for e in errors if "Length invalid for this VR" in e and not e.isascii()]
    sums_up = "Error - Dicom dataset contains invalid data values for Value Representations"
    return [e for e in errors if not wrong or e not in (*wrong, sums_up)]


def dcentvfy(files: Iterable[Path]) -> list[str]:
    """Return where objects of one patient, Study or Frame of Reference contradict each other."""
    return [line for line in run("dcentvfy", *files).splitlines() if line.startswith("Error")]


def sr_validator(file: Path) -> list[str]:
    """Return what the SR validator finds, what is only newer than its rules left out."""
    told = run("DicomSRValidator", file, JAVA_TOOL_OPTIONS=JAVA)
    assert "Found Root Template TID_1500 (MeasurementReport)" in told, told
    assert "IOD validation complete" in told
    found = [line for line in told.splitlines() if line.startswith(("Error", "Warning"))]
    return [line for line in found if not line.endswith(NEWER)]


def saved(ds: pydicom.Dataset, folder: Path, name: str = "object.dcm") -> Path:
    modules.save(ds, folder / name)
    return folder / name


# Spatial Registration

BARE = Source("1.2.3.1", "1.2.3.1.1", FIXED.instances)
LONG = {
    "patient_name": "N" * 64,
    "patient_id": "I" * 64,
    "accession_number": "A" * 16,
    "study_description": "D" * 64,
    "study_id": "S" * 16,
}
SIDES: dict[str, tuple[Source, Source]] = {
    "all known": (FIXED, MOVING),
    "nothing known": (BARE, replace(BARE, study_uid="1.2.4.1", series_uid="1.2.4.1.1",
                                    instances=MOVING.instances)),
    "one frame of reference": (FIXED, replace(MOVING, frames_of_reference=("1.2.3.9",))),
    "a frame of reference a slice": (
        replace(FIXED, frames_of_reference=tuple(f"1.2.3.9.{k}" for k in range(1, 13))),
        replace(MOVING, frames_of_reference=()),
    ),
    "one study": (FIXED, replace(MOVING, study_uid=FIXED.study_uid)),
    "long texts": (replace(FIXED, **LONG), MOVING),
    "a German name": (replace(FIXED, patient_name="Müller-Lüdenscheid^Jörg^^Dr."), MOVING),
    "a Japanese name": (
        replace(FIXED, patient_name="Yamada^Tarou=山田^太郎=やまだ^たろう"), MOVING,
    ),
    "a paired body part": (replace(FIXED, body_part_examined="BREAST"), MOVING),
    "its side": (replace(FIXED, body_part_examined="BREAST", laterality="L"), MOVING),
    "a body part in words of its own": (replace(FIXED, body_part_examined="OBERBAUCH"), MOVING),
    "no body part": (replace(FIXED, body_part_examined=""), MOVING),
    "a timezone": (replace(FIXED, timezone_offset_from_utc="+0100"), MOVING),
    "an Enhanced CT": (
        replace(FIXED, instances=(Instance("1.2.840.10008.5.1.4.1.1.2.1", "1.2.5", (1, 2, 3)),)),
        MOVING,
    ),
}  # fmt: skip
OFFSETS = {
    "z": Z_ONLY,
    "xyz": XYZ,
    "extrapolated": replace(XYZ, status=OffsetStatus.EXTRAPOLATED, overlap_mm=0.0),
    "extrapolated z": replace(Z_ONLY, status=OffsetStatus.EXTRAPOLATED),
}


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_a_registration_is_valid(sides, offset, tmp_path):
    ds = registration(*sides, offset, ORIGIN)
    assert iod.faults(ds) == []
    assert iod.bad_values(ds) == []
    assert dciodvfy(saved(ds, tmp_path)) == []


BREAKS = {
    "Modality": lambda ds: setattr(ds, "Modality", "CT"),
    "ContentLabel": lambda ds: delattr(ds, "ContentLabel"),
    "Laterality": lambda ds: delattr(ds, "BodyPartExamined"),
    "FrameOfReferenceTransformationMatrix": lambda ds: setattr(
        ds.RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence[0],
        "FrameOfReferenceTransformationMatrix", [1, 0, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("attribute", BREAKS)
def test_dciodvfy_sees_a_registration_that_is_not(attribute, tmp_path):
    ds = registration(FIXED, MOVING, XYZ, ORIGIN)
    BREAKS[attribute](ds)
    assert [e for e in dciodvfy(saved(ds, tmp_path)) if attribute in e.replace(" ", "")]


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=70)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=names, patient_id=names, text=names, z_mm=st.floats(-3000, 3000))
def test_whatever_a_header_says_the_objects_are_valid(tmp_path, name, patient_id, text, z_mm):
    header = pydicom.Dataset()
    header.StudyInstanceUID, header.SeriesInstanceUID = "1.2.3.1", "1.2.3.1.1"
    for keyword, value in (("PatientName", name), ("PatientID", patient_id)):
        header.add(_element(keyword, value))
    for keyword in ("AccessionNumber", "StudyDate", "StudyTime", "StudyID", "PatientSex",
                    "BodyPartExamined", "StudyDescription", "IssuerOfPatientID"):  # fmt: skip
        header.add(_element(keyword, text))
    found = source.of_header(header, FIXED.instances[:2], ["1.2.3.9"])
    offset = Offset(Method.ROBUST, OffsetStatus.OK, z_mm, 100.0, 3.0)
    ds = registration(found, MOVING, offset, ORIGIN)
    assert dciodvfy(saved(ds, tmp_path)) == []
    assert iod.bad_values(ds) == []


def _element(keyword: str, value: str) -> pydicom.DataElement:
    tag = pydicom.datadict.tag_for_keyword(keyword)
    vr = pydicom.datadict.dictionary_VR(tag)
    return pydicom.DataElement(tag, vr, value, validation_mode=pydicom.config.IGNORE)


def test_itk_reads_from_its_own_file_what_the_matrix_says(tmp_path):
    transform.write(XYZ, tmp_path / "start.tfm")
    itk = SimpleITK.ReadTransform(str(tmp_path / "start.tfm"))
    ds = pydicom.dcmread(saved(registration(FIXED, MOVING, XYZ, ORIGIN), tmp_path))
    for point in np.random.default_rng(0).uniform(-500, 500, (20, 3)):
        fixed_point = iod.registered(ds, "1.2.4.1.1.3", point)
        np.testing.assert_allclose(itk.TransformPoint(fixed_point.tolist()), point, atol=1e-6)


# Coverage report

CURVES: dict[str, tuple[Source, float, float]] = {
    "all known": (made_source("1.2.3", 30), 60.0, 350.0),
    "nothing known": (
        Source("1.2.3.1", "1.2.3.1.1", made_source("1.2.3", 30).instances), 60.0, 350.0,
    ),
    "no region": (made_source("1.2.3", 30), -900.0, -600.0),
    "long texts": (made_source("1.2.3", 30, **LONG), 60.0, 350.0),
    "a Japanese name": (
        made_source("1.2.3", 30, patient_name="Yamada^Tarou=山田^太郎=やまだ^たろう"), 60.0, 350.0,
    ),
}  # fmt: skip


def report(name: str) -> pydicom.Dataset:
    series, low_mm, high_mm = CURVES[name]
    return coverage_report(series, straight(low_mm, high_mm, series), REGIONS, ORIGIN)


@pytest.mark.parametrize("name", CURVES)
def test_a_report_is_valid(name, tmp_path):
    assert dciodvfy(saved(report(name), tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all known", "nothing known"])
def test_a_report_keeps_to_its_template(name, tmp_path):
    assert sr_validator(saved(report(name), tmp_path)) == []


@pytest.mark.slow
def test_the_sr_validator_sees_a_report_that_does_not(tmp_path):
    ds = report("all known")
    (procedure,) = (
        i for i in ds.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == "121058"
    )
    code = procedure.ConceptCodeSequence[0]
    code.CodeValue, code.CodingSchemeDesignator = "77477000", "SCT"
    code.CodeMeaning = "Computed tomography"
    found = sr_validator(saved(ds, tmp_path))
    assert any("context group" in line and "100" in line for line in found)


def test_dsrdump_reads_what_a_person_is_to_read(tmp_path):
    told = run("dsrdump", saved(report("all known"), tmp_path))
    for words in (
        'CODE:(,,"Finding Site")=(816094009,SCT,"Chest")',
        'NUM:(,,"Estimated share of region imaged")="72.5" (%,UCUM,"percent")',
        'CODE:(,,"Estimated extent of region imaged")=(255609007,SCT,"Partial")',
        "Verification Flag   : UNVERIFIED",
    ):
        assert words in told


# Beside the images they are about


def phantom_series(folder: Path, number: int, study_date: str) -> tuple[Path, Source, ScoreCurve]:
    """Write a small, complete CT Series and return what objects need of it."""
    folder.mkdir()
    datasets = [
        dicomio.ct_dataset(
            np.full((16, 16), -1000, np.int16),
            patient=PatientKey("P1", "HOSPITAL"),
            study_uid=f"1.2.{number}.1",
            series_uid=f"1.2.{number}.1.1",
            sop_instance_uid=f"1.2.{number}.1.1.{k + 1}",
            instance_number=k + 1,
            image_position=(0.0, 0.0, 10.0 * k),
            pixel_mm=4.0,
            spacing_mm=10.0,
            study_datetime=datetime.strptime(study_date, "%Y%m%d"),
            frame_of_reference_uid=f"1.2.{number}.9",
        )
        for k in range(10)
    ]
    for k, ds in enumerate(datasets):
        ds.BodyPartExamined = "CHEST"
        ds.save_as(folder / f"{k}.dcm", enforce_file_format=True)
    slices = [
        ScoredSlice(ds.SOPInstanceUID, (0, 0, 10.0 * k), (1, 0, 0, 0, 1, 0), score=10.0 + k)
        for k, ds in enumerate(datasets)
    ]
    uid = datasets[0].SeriesInstanceUID
    made = curve.assemble(slices, series_uid=uid, model="m", heights=HEIGHTS)
    assert isinstance(made, ScoreCurve)
    instances = source.instances_of(made, {s.sop_instance_uid: ds.SOPClassUID for s in slices})
    frames = [ds.FrameOfReferenceUID for ds in datasets]
    return folder, source.of_header(datasets[0], instances, frames), made


def test_objects_agree_with_the_images_of_both_studies(tmp_path):
    fixed_folder, fixed, made = phantom_series(tmp_path / "fixed", 3, "20260301")
    moving_folder, moving, _ = phantom_series(tmp_path / "moving", 4, "20250301")
    files = [*fixed_folder.iterdir(), *moving_folder.iterdir()]
    objects = [
        saved(registration(fixed, moving, XYZ, ORIGIN), tmp_path, "reg.dcm"),
        saved(coverage_report(fixed, made, REGIONS, ORIGIN), tmp_path, "sr.dcm"),
    ]
    for file in (files[0], *objects):
        assert dciodvfy(file) == []
    assert dcentvfy([*files, *objects]) == []
    other = registration(replace(fixed, patient_name="Other^Name"), moving, XYZ, ORIGIN)
    told = dcentvfy([*files, saved(other, tmp_path, "other.dcm")])
    assert told and "PatientName" in told[0]


# The commands


def at(height_mm: float) -> Limit:
    return Limit(Support.LANDMARK, height_mm, 9.0)


TABLE = (
    Region("pelvis", "816092008", "Pelvis", at(-2.5), at(47.5)),
    Region("chest", "816094009", "Chest", at(37.5), at(87.5)),
)


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory) -> Path:
    plain = brightness_bundle(tmp_path_factory.mktemp("plain"))
    folder = tmp_path_factory.mktemp("bundle")
    weights.save(
        folder, plain.network, name="tabled", spec=plain.spec, heights=plain.heights,
        training={}, covariance=COVARIANCE, regions=TABLE,
    )  # fmt: skip
    return folder


@pytest.fixture
def archive(tmp_path) -> Path:
    write(tmp_path / "archive" / "prior", *prior())
    write(tmp_path / "archive" / "follow-up", *follow_up())
    return tmp_path / "archive"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def assert_registers(file: Path, follow_up_mm: float = SHIFT_MM) -> pydicom.Dataset:
    """Check an object of the archive's pair, and return it."""
    assert dciodvfy(file) == []
    ds = pydicom.dcmread(file)
    assert iod.faults(ds) == []
    assert iod.common_instance_reference(ds) == {
        (f"{FOLLOW_UP}.0", FOLLOW_UP): [f"{FOLLOW_UP}.{k + 1}" for k in range(4, 20)],
        (f"{PRIOR}.0", PRIOR): [f"{PRIOR}.{k + 1}" for k in range(12)],
    }
    moved = iod.registered(ds, f"{PRIOR}.1", (0, 0, 0))
    assert moved[2] == pytest.approx(follow_up_mm, abs=1.5)
    assert ds.FrameOfReferenceUID == f"{FOLLOW_UP}.99"
    return ds


def test_align_writes_a_registration_of_two_folders(archive, bundle_folder, tmp_path):
    command = ["align", archive / "follow-up", archive / "prior", "--model", bundle_folder]
    result = call(*command, "--registration", tmp_path / "reg.dcm", "--json")
    assert result.exit_code == 0, result.output
    ds = assert_registers(tmp_path / "reg.dcm")
    answer = json.loads(result.stdout)
    found = iod.registered(ds, f"{PRIOR}.1", (0, 0, 0))
    np.testing.assert_allclose(
        found, [answer["dx_mm"] or 0, answer["dy_mm"] or 0, answer["offset_mm"]], atol=1e-6
    )
    assert (ds.PatientName, ds.PatientID) == ("CANARY^NAME", "CANARY-ID")
    assert "StudyID" in result.stderr and "PatientName" not in result.stderr
    assert "CANARY" not in result.output
    again = call(*command, "--registration", tmp_path / "again.dcm")
    assert again.exit_code == 0
    later = pydicom.dcmread(tmp_path / "again.dcm")  # it says when it was made
    assert later.ContentTime != ds.ContentTime and later.SOPInstanceUID != ds.SOPInstanceUID


def test_align_writes_no_registration_of_what_it_refuses(archive, bundle_folder, tmp_path):
    for k, ds in enumerate(follow_up()):  # upside down: its body height falls towards the head
        ds.ImagePositionPatient[2] = -float(ds.ImagePositionPatient[2])
        (tmp_path / "falling").mkdir(exist_ok=True)
        ds.save_as(tmp_path / "falling" / str(k), enforce_file_format=True)
    command = ["align", tmp_path / "falling", archive / "prior", "--model", bundle_folder]
    result = call(*command, "--method", "fast", "--registration", tmp_path / "reg.dcm")
    assert result.exit_code == 1 and "refused" in result.stderr
    assert not (tmp_path / "reg.dcm").exists()


def test_align_of_a_folder_with_itself_says_why_there_is_no_registration(
    archive, bundle_folder, tmp_path
):
    command = ["align", archive / "prior", archive / "prior", "--model", bundle_folder]
    result = call(*command, "--method", "l1", "--registration", tmp_path / "reg.dcm")
    assert result.exit_code == 1 and "onto itself" in result.stderr
    assert not (tmp_path / "reg.dcm").exists()


def test_score_writes_a_report_a_series(archive, bundle_folder, tmp_path):
    result = call("score", archive, "--model", bundle_folder, "--report", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{PRIOR}.dcm", f"{FOLLOW_UP}.dcm"}
    for uid in (PRIOR, FOLLOW_UP):
        assert dciodvfy(tmp_path / "out" / f"{uid}.dcm") == []
        ds = pydicom.dcmread(tmp_path / "out" / f"{uid}.dcm")
        assert (ds.PatientName, ds.StudyInstanceUID) == ("CANARY^NAME", f"{uid}.0")
    assert "CANARY" not in result.output


@pytest.fixture
def node(archive, bundle_folder, tmp_path) -> Path:
    """The settings file of a node that has the archive in its database."""
    return fed(tmp_path, bundle_folder)


def fed(folder: Path, bundle_folder: Path) -> Path:
    """Import the archive of a folder, and return the settings file of that node."""
    values: dict[str, Any] = {
        "spool": {"path": folder / "spool", "reserve_bytes": 0},
        "database": {"url": f"sqlite:///{folder / 'node.sqlite'}"},
        "score": {"model": bundle_folder, "device": "cpu", "batch": 8},
        "series": {"quiet_seconds": 0},
    }
    assert backfill.run([folder / "archive"], Settings(**values)).curves == 2
    config = folder / "node.toml"
    config.write_text(f'[database]\nurl = "{values["database"]["url"]}"\n')
    return config


def assert_is_of(ds: pydicom.Dataset, image: pydicom.Dataset) -> None:
    """Check that an object says of patient and Study what an image of it says."""
    for keyword in (
        "PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "StudyDate",
        "StudyTime", "ReferringPhysicianName", "StudyDescription", "StudyInstanceUID",
    ):  # fmt: skip
        assert ds[keyword].value == image[keyword].value != "", keyword


def test_offset_writes_a_registration_of_what_the_node_knows(node, tmp_path):
    command = ["offset", f"{FOLLOW_UP}.0", f"{PRIOR}.0", "--config", node]
    result = call(*command, "--registration", tmp_path / "reg.dcm")
    assert result.exit_code == 0, result.output
    ds = assert_registers(tmp_path / "reg.dcm")
    assert_is_of(ds, ct_slice(FOLLOW_UP, 0, StudyDate="20260301"))
    assert ds.BodyPartExamined == "CHEST"
    # Slices of both are 5 mm apart: the first of the follow-up is the fifth of the prior.
    assert re.search(r", robust, slice [345]\.\d\+1k$", ds.ContentDescription)
    # The images have no Study ID, and the command says so; of the patient it says nothing.
    assert "StudyID" in result.stderr and "PatientName" not in result.stderr
    assert "CANARY" not in result.output
    images = (tmp_path / "archive").rglob("*")
    assert dcentvfy([*(f for f in images if f.is_file()), tmp_path / "reg.dcm"]) == []
    again = call(*command, "--registration", tmp_path / "again.dcm")
    assert again.exit_code == 0
    assert (tmp_path / "again.dcm").read_bytes() == (tmp_path / "reg.dcm").read_bytes()
    # The other way round is another object, with the inverse matrix, in the other Study.
    swapped = call(*command[:1], *command[2:0:-1], *command[3:], "--registration", tmp_path / "x")
    assert swapped.exit_code == 0, swapped.output
    other = pydicom.dcmread(tmp_path / "x")
    assert other.SOPInstanceUID != ds.SOPInstanceUID
    assert other.StudyInstanceUID == f"{PRIOR}.0"
    back = iod.registered(other, f"{FOLLOW_UP}.9", (0, 0, SHIFT_MM))
    assert back[2] == pytest.approx(0.0, abs=1.5)


def test_curve_writes_a_report_of_what_the_node_knows(node, tmp_path):
    result = call("curve", PRIOR, "--config", node, "--report", tmp_path / "sr.dcm")
    assert result.exit_code == 0, result.output
    assert dciodvfy(tmp_path / "sr.dcm") == []
    ds = pydicom.dcmread(tmp_path / "sr.dcm")
    assert_is_of(ds, ct_slice(PRIOR, 0, StudyDate="20250301"))
    assert "CANARY" not in result.output
    assert iod.referenced(ds) <= {f"{PRIOR}.{k + 1}" for k in range(12)}
    assert "Pelvis" in str(ds) and "Chest" in str(ds)


def test_a_curve_of_frames_whose_sop_class_was_not_kept_makes_no_object(node, tmp_path):
    with closing(sqlite3.connect(tmp_path / "node.sqlite")) as connection, connection:
        query = """SELECT series.id, instances FROM curve JOIN series ON series.id = series_id
                   WHERE series_uid = ?"""
        series_id, packed = connection.execute(query, [PRIOR]).fetchone()
        frames = [[uid, 2, i] for uid, _, i, _ in json.loads(zlib.decompress(packed))]
        packed = zlib.compress(json.dumps(frames).encode())
        update = "UPDATE curve SET instances = ?, sop_classes = NULL WHERE series_id = ?"
        connection.execute(update, [packed, series_id])
    result = call("curve", PRIOR, "--config", node, "--report", tmp_path / "sr.dcm")
    assert result.exit_code == 1 and "SOP Class" in result.stderr
    assert not (tmp_path / "sr.dcm").exists()


def test_objects_of_frames_are_made_from_the_database(bundle_folder, tmp_path):
    one = enhanced_ct(follow_up())
    write(tmp_path / "archive" / "prior", *prior())
    write(tmp_path / "archive" / "follow-up", one)
    config = fed(tmp_path, bundle_folder)
    study = one.StudyInstanceUID
    command = ["offset", study, f"{PRIOR}.0", "--config", config]
    result = call(*command, "--registration", tmp_path / "reg.dcm", "--json")
    assert result.exit_code == 0, result.output
    assert dciodvfy(tmp_path / "reg.dcm") == []
    ds = pydicom.dcmread(tmp_path / "reg.dcm")
    assert iod.faults(ds) == []
    assert iod.common_instance_reference(ds) == {
        (study, FOLLOW_UP): [one.SOPInstanceUID],
        (f"{PRIOR}.0", PRIOR): [f"{PRIOR}.{k + 1}" for k in range(12)],
    }
    (referenced,) = ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert referenced.ReferencedSOPClassUID == EnhancedCTImageStorage
    moved = iod.registered(ds, f"{PRIOR}.1", (0, 0, 0))
    assert moved[2] == pytest.approx(json.loads(result.stdout)["offset_mm"])
    assert moved[2] == pytest.approx(SHIFT_MM, abs=1.5)
    result = call("curve", FOLLOW_UP, "--config", config, "--report", tmp_path / "sr.dcm")
    assert result.exit_code == 0, result.output
    assert dciodvfy(tmp_path / "sr.dcm") == []
    assert iod.referenced(pydicom.dcmread(tmp_path / "sr.dcm")) == {one.SOPInstanceUID}
    found = json.loads(call("view", FOLLOW_UP, "chest", "--config", config, "--json").stdout)
    # The chest of this bundle is between 37.5 and 87.5 mm; frame k is at 5 (k + 3).
    assert found["slice"]["sop_instance_uid"] == one.SOPInstanceUID
    assert found["slice"]["frame"] in (9, 10) and found["extent"] == "complete"


# What a viewer asks


def test_view_tells_the_slice_to_open_first(node):
    result = call("view", PRIOR, "Pelvis", "--config", node, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["region"] == "pelvis" and found["nearest"] is None
    assert found["slice"] == {
        "sop_instance_uid": f"{PRIOR}.{found['slice']['index'] + 1}",
        "frame": 1,
        "index": found["slice"]["index"],
        "z_mm": 5.0 * found["slice"]["index"],
        "height_mm": pytest.approx(5 * found["slice"]["index"], abs=1),
    }
    assert found["slice"]["index"] in (4, 5)  # of -2.5 to 47.5 mm, of which 0 to 45 are shown
    by_code = call("view", PRIOR, "816092008", "--config", node)
    assert by_code.exit_code == 0 and found["slice"]["sop_instance_uid"] in by_code.stdout


def test_view_of_a_region_not_shown_tells_the_nearest_slice(node, tmp_path):
    with closing(sqlite3.connect(tmp_path / "node.sqlite")) as connection, connection:
        ((digest, text),) = connection.execute("SELECT digest, manifest FROM model").fetchall()
        manifest = json.loads(text)
        far = Region("head", "69536005", "Head", at(500.0), at(700.0))
        manifest["regions"].append(far.to_dict())
        query = "UPDATE model SET manifest = ? WHERE digest = ?"
        connection.execute(query, [json.dumps(manifest), digest])
    result = call("view", PRIOR, "head", "--config", node, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["slice"] is None and found["extent"] is None and found["fraction"] == 0
    assert found["nearest"]["sop_instance_uid"] == f"{PRIOR}.12"
    assert found["distance_mm"] == pytest.approx(445, abs=2)
    told = call("view", PRIOR, "head", "--config", node)
    assert told.exit_code == 1 and told.stdout == ""
    assert "not shown" in told.stderr and "towards the head" in told.stderr


def test_view_says_what_it_does_not_know(node):
    result = call("view", PRIOR, "knee", "--config", node)
    assert result.exit_code == 1 and "pelvis, chest" in result.stderr
    assert call("view", "9.9", "chest", "--config", node).exit_code == 1


def test_slices_pairs_each_fixed_slice_with_the_moving_one(node):
    studies = f"{FOLLOW_UP}.0", f"{PRIOR}.0"
    result = call("slices", *studies, "--config", node, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    offset_mm = found["offset"]["offset_mm"]
    assert offset_mm == pytest.approx(SHIFT_MM, abs=1.5)
    # Levels 4 to 19 of the follow-up; the prior has 0 to 11.
    pairs = {m["fixed"]["sop_instance_uid"]: m["moving"] for m in found["slices"]}
    assert list(pairs) == [f"{FOLLOW_UP}.{level + 1}" for level in range(4, 20)]
    for level in range(4, 12):
        assert pairs[f"{FOLLOW_UP}.{level + 1}"]["sop_instance_uid"] == f"{PRIOR}.{level + 1}"
    assert all(pairs[f"{FOLLOW_UP}.{level + 1}"] is None for level in range(12, 20))
    first = found["slices"][0]
    expected = first["moving"]["z_mm"] + offset_mm - first["fixed"]["z_mm"]
    assert first["distance_mm"] == pytest.approx(expected, abs=1e-3)
    line = found["line"]
    assert line["slope"] == pytest.approx(1) and line["intercept"] == pytest.approx(4, abs=0.3)
    table = call("slices", *studies, "--config", node)
    assert table.exit_code == 0 and len(table.stdout.splitlines()) == 17
    # The other way round, computed for the question.
    swapped = json.loads(call("slices", *studies[::-1], "--config", node, "--json").stdout)
    assert swapped["slices"][4]["moving"]["sop_instance_uid"] == f"{FOLLOW_UP}.5"


def test_slices_of_no_pair_or_of_a_refused_one_is_nothing(node, tmp_path):
    studies = f"{FOLLOW_UP}.0", f"{PRIOR}.0"
    assert call("slices", studies[0], "9.9", "--config", node).exit_code == 1
    with closing(sqlite3.connect(tmp_path / "node.sqlite")) as connection, connection:
        connection.execute("UPDATE offset SET status = 'refused', reason = 'for the test'")
    result = call("slices", *studies, "--config", node, "--json")
    assert result.exit_code == 1 and "refused: for the test" in result.stderr
    assert json.loads(result.stdout)["slices"] == []


# A real pair


@pytest.mark.slow
def test_objects_of_a_real_pair_are_valid_and_true(tmp_path):
    if not REAL.exists():
        pytest.skip("no real CT in ../shared/ct")
    fixed, moving = REAL / "C_vertex-to-thorax", REAL / "A_thorax"
    result = call("align", fixed, moving, "--registration", tmp_path / "reg.dcm", "--json")
    assert result.exit_code == 0, result.output
    reg = pydicom.dcmread(tmp_path / "reg.dcm")
    assert dciodvfy(tmp_path / "reg.dcm") == []
    assert iod.faults(reg) == []
    first = min(moving.iterdir())
    carina = iod.registered(reg, pydicom.dcmread(first).SOPInstanceUID, (0, 0, 0))
    assert carina[2] == pytest.approx(-215, abs=15)  # by eye, +-10: see the data's README
    result = call("score", fixed, moving, "--report", tmp_path / "reports")
    assert result.exit_code == 0, result.output
    reports = sorted((tmp_path / "reports").iterdir())
    assert len(reports) == 2
    for file in reports:
        assert dciodvfy(file) == []
        assert sr_validator(file) == []
    assert dcentvfy([*fixed.iterdir(), *moving.iterdir(), tmp_path / "reg.dcm", *reports]) == []
    (upper,) = (f for f in reports if pydicom.dcmread(f).StudyInstanceUID == reg.StudyInstanceUID)
    told = str(pydicom.dcmread(upper))
    assert "'Neck'" in told and "'Chest'" in told
    assert "'Head'" in told
    assert "'Pelvis'" not in told and "'Liver'" not in told
