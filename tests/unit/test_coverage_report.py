from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
import pytest
from highdicom import sr
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import UID

from dicomnode.core import curve, region
from dicomnode.core.curve import HeightMap
from dicomnode.core.region import Limit, Region, Support
from dicomnode.errors import ObjectError
from dicomnode.model import ScoreCurve, ScoredSlice
from dicomnode.objects.coverage_report import coverage_report
from dicomnode.objects.source import Instance, Source
from tests import iod
from tests.unit.test_spatial_registration import ORIGIN, source, written

HEIGHTS = HeightMap(10.0, 0.0, 5.0)
CONTENT = frozenset({"sr-document-content"})  # a macro of many kinds of items: for dciodvfy


def limit(height_mm: float | None, sd_mm: float = 12.5) -> Limit:
    """Return a limit, unsupported where there is no height."""
    if height_mm is None:
        return Limit(Support.UNSUPPORTED)
    return Limit(Support.LANDMARK, height_mm, sd_mm)


CHEST = Region("chest", "816094009", "Chest", limit(100.0), limit(300.0, 17.0))
LIVER = Region("liver", "10200004", "Liver", limit(0.0), limit(200.0), part="abdomen")
NECK = Region("neck", "45048000", "Neck", limit(300.0), limit(400.0))
HEAD = Region("head", "69536005", "Head", limit(400.0), limit(None))
REGIONS = (LIVER, CHEST, NECK, HEAD)
SERIES = source("1.2.3", 30)


def straight(low_mm: float, high_mm: float, series: Source = SERIES):
    """Return a curve whose body height is its position plus 1000 mm."""
    heights = np.linspace(low_mm, high_mm, len(series.instances))
    slices = [
        ScoredSlice(i.sop_instance_uid, (0, 0, h - 1000), (1, 0, 0, 0, 1, 0), score=h / 10)
        for i, h in zip(series.instances, heights, strict=True)
    ]
    made = curve.assemble(slices, series_uid=series.series_uid, model="m", heights=HEIGHTS)
    assert isinstance(made, ScoreCurve)
    return made


def report(low_mm: float, high_mm: float) -> pydicom.Dataset:
    return written(coverage_report(SERIES, straight(low_mm, high_mm), REGIONS, ORIGIN))


def groups(ds: pydicom.Dataset) -> dict[str, dict[str, object]]:
    """Return what a program reads from the report: region's name -> its values."""
    found = {}
    content = sr.MeasurementReport.from_sequence([ds])
    for group in content.get_image_measurement_groups():
        name = group.tracking_identifier.split(",")[0]
        found[name] = {
            "text": group.tracking_identifier,
            "sites": [s.value.value for s in group.finding_sites],
            "values": {m.name.value: (m.value, m.unit.value) for m in group.get_measurements()},
            "codes": {c.name.value: c.value.meaning for c in group.get_qualitative_evaluations()},
            "images": [i.referenced_sop_instance_uid for i in group.source_images],
        }
    return found


def test_each_region_shown_has_share_extent_and_outermost_slices():
    # 30 slices 10 mm apart, heights 60 to 350 mm: each stands for 5 mm to either side.
    found = groups(report(60.0, 350.0))
    assert list(found) == ["body height", "liver", "chest", "neck"]
    assert found["chest"]["sites"] == ["816094009"]
    assert found["chest"]["values"] == {"COVERAGE": (100.0, "%"), "LIMIT_SD": (17.0, "mm")}
    assert found["chest"]["codes"] == {"EXTENT": "Complete"}
    assert found["chest"]["images"] == ["1.2.3.1.1.5", "1.2.3.1.1.25"]
    assert found["chest"]["text"] == "chest, complete, z -900.0 to -700.0 mm"
    assert found["liver"]["values"]["COVERAGE"] == (72.5, "%")
    assert found["liver"]["codes"] == {"EXTENT": "Partial"}
    assert found["liver"]["text"] == "liver, partial, z -940.0 to -800.0 mm"
    assert found["neck"]["values"]["COVERAGE"] == (55.0, "%")


def test_the_range_of_body_heights_is_told_with_its_slices():
    found = groups(report(60.0, 350.0))["body height"]
    assert found["values"] == {"HEIGHT_MIN": (60.0, "mm"), "HEIGHT_MAX": (350.0, "mm")}
    assert found["images"] == ["1.2.3.1.1.1", "1.2.3.1.1.30"]
    assert found["sites"] == [] and found["codes"] == {}


def test_a_region_that_is_not_shown_is_not_named():
    ds = report(310.0, 390.0)
    assert list(groups(ds)) == ["body height", "neck"]
    assert "Chest" not in str(ds) and "Head" not in str(ds)


def test_a_region_that_varies_by_more_than_is_missing_is_indeterminate():
    found = groups(report(310.0, 390.0))["neck"]
    assert found["codes"] == {"EXTENT": "Indeterminate"}
    assert found["values"]["COVERAGE"][0] == pytest.approx(82.8)


def test_a_region_with_one_known_limit_has_no_share():
    found = groups(report(310.0, 600.0))["head"]
    assert found["sites"] == ["69536005"]
    assert found["values"] == {"LIMIT_SD": (12.5, "mm")}
    assert found["codes"] == {"EXTENT": "Indeterminate"}
    assert found["text"] == "head, indeterminate, z -600.0 to -400.0 mm"


def test_a_bundle_without_regions_tells_the_heights_alone():
    ds = coverage_report(SERIES, straight(60.0, 350.0), (), ORIGIN)
    assert list(groups(written(ds))) == ["body height"]


def test_the_bundle_is_named_in_full():
    ds = report(60.0, 350.0)
    for group in sr.MeasurementReport.from_sequence([ds]).get_image_measurement_groups():
        texts = [i.TextValue for i in group[0].ContentSequence if "TextValue" in i]
        assert ORIGIN.model in texts and "compact-0.2 0123456789abcdef" in texts
    assert list(ds.SoftwareVersions)[1] == "compact-0.2 0123456789abcdef"


def test_nobody_has_verified_it():
    ds = report(60.0, 350.0)
    assert (ds.CompletionFlag, ds.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert "PreliminaryFlag" not in ds and "BodyPartExamined" not in ds


def test_private_codes_have_a_scheme():
    ds = report(60.0, 350.0)
    schemes = {e.value for e in ds.iterall() if e.keyword == "CodingSchemeDesignator"}
    private = {designator for designator in schemes if designator.startswith("99")}
    assert private == {"99DICOMNODE"}
    (scheme,) = ds.CodingSchemeIdentificationSequence
    assert scheme.CodingSchemeDesignator == "99DICOMNODE"
    assert scheme.CodingSchemeResponsibleOrganization == "dicomnode"


def test_every_image_is_evidence():
    ds = report(60.0, 350.0)
    (study,) = ds.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert (study.StudyInstanceUID, series.SeriesInstanceUID) == ("1.2.3.1", "1.2.3.1.1")
    listed = [i.ReferencedSOPInstanceUID for i in series.ReferencedSOPSequence]
    assert listed == [i.sop_instance_uid for i in SERIES.instances]
    assert iod.referenced(ds) <= set(listed)


def test_frames_of_a_multi_frame_instance_are_named():
    enhanced = "1.2.840.10008.5.1.4.1.1.2.1"
    one = replace(SERIES, instances=(Instance(enhanced, "1.5", tuple(range(1, 31))),))
    heights = np.linspace(60.0, 350.0, 30)
    slices = [
        ScoredSlice("1.5", (0, 0, h), (1, 0, 0, 0, 1, 0), score=h / 10, frame=k)
        for k, h in enumerate(heights, start=1)
    ]
    made = curve.assemble(slices, series_uid="1.2.3.1.1", model="m", heights=HEIGHTS)
    assert isinstance(made, ScoreCurve)
    ds = written(coverage_report(one, made, [CHEST], ORIGIN))
    (_, chest) = sr.MeasurementReport.from_sequence([ds]).get_image_measurement_groups()
    frames = [i.referenced_frame_numbers for i in chest.source_images]
    assert frames == [[5], [25]]
    assert iod.referenced(ds) == {"1.5"}


def test_a_repeat_is_the_same_object_to_the_byte():
    files = []
    for _ in range(2):
        file = BytesIO()
        ds = coverage_report(SERIES, straight(60.0, 350.0), REGIONS, ORIGIN)
        ds.save_as(file, enforce_file_format=True)
        files.append(file.getvalue())
    assert files[0] == files[1]


@pytest.mark.parametrize("origin", [replace(ORIGIN, revision="2"), replace(ORIGIN, model="f" * 64)])
def test_another_revision_or_bundle_is_another_object(origin):
    first, second = (
        coverage_report(SERIES, straight(60.0, 350.0), REGIONS, o) for o in (ORIGIN, origin)
    )
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert first.SeriesInstanceUID != second.SeriesInstanceUID
    assert UID(second.SOPInstanceUID).is_valid


@pytest.mark.parametrize(
    ("series", "made", "regions"),
    [
        (replace(SERIES, patient_id="4712"), straight(60.0, 350.0), REGIONS),
        (replace(SERIES, issuer_of_patient_id="OTHER"), straight(60.0, 350.0), REGIONS),
        (replace(SERIES, accession_number="A2"), straight(60.0, 350.0), REGIONS),
        (SERIES, straight(60.0, 350.5), REGIONS),
        (SERIES, straight(60.0, 350.0), REGIONS[:1]),
    ],
)
def test_whatever_it_says_else_it_is_another_object(series, made, regions):
    first = coverage_report(SERIES, straight(60.0, 350.0), REGIONS, ORIGIN)
    second = coverage_report(series, made, regions, ORIGIN)
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert first.SeriesInstanceUID != second.SeriesInstanceUID


@pytest.mark.parametrize("wrong", [source("1.2.4", 30), source("1.2.3", 29)])
def test_a_curve_of_something_else_is_refused(wrong):
    with pytest.raises(ObjectError, match="Series 1"):
        coverage_report(wrong, straight(60.0, 350.0), REGIONS, ORIGIN)


@settings(deadline=None)  # other work on the machine is no failure
@given(st.floats(-500, 900), st.floats(60, 1500), st.integers(8, 40))
def test_any_curve_makes_an_object_that_keeps_to_the_standard(low_mm, extent_mm, count):
    series = source("1.2.3", count)
    made = straight(low_mm, low_mm + extent_mm, series)
    ds = written(coverage_report(series, made, REGIONS, ORIGIN))
    assert iod.faults(ds, skipped=CONTENT) == []
    assert iod.bad_values(ds) == []
    shown = region.showing(made.z_mm, made.height_mm, REGIONS)
    found = groups(ds)
    assert list(found)[1:] == [s.region.name for s in shown]
    for s in shown:
        told = found[s.region.name]["values"].get("COVERAGE")
        assert (told is None) is (s.share is None)
        assert told is None or told[0] == pytest.approx(100 * s.share, abs=0.051)
