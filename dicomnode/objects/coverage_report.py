"""What a Series covers of the body as a Comprehensive 3D SR (PS3.3 A.35.13), TID 1500.

One Measurement Group for the range of body heights, and one for each region of which the Series
shows something: the share imaged, whether that is all of it, and the outermost slices.
"""

from collections.abc import Sequence
from typing import Any

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.coding import Code
from pydicom.uid import Comprehensive3DSRStorage

from dicomnode.core import region
from dicomnode.core.region import Extent, Region
from dicomnode.errors import ObjectError
from dicomnode.model import ScoreCurve
from dicomnode.objects import modules
from dicomnode.objects.modules import Origin
from dicomnode.objects.source import Instance, Source

SERIES_NUMBER = 9002  # far from those of scanners
SCHEME = "99DICOMNODE"
# No code of DICOM or SNOMED CT says these.
COVERAGE = Code("COVERAGE", SCHEME, "Estimated share of region imaged")
EXTENT = Code("EXTENT", SCHEME, "Estimated extent of region imaged")
SPREAD = Code("LIMIT_SD", SCHEME, "Spread of region limits between patients")
LOWEST = Code("HEIGHT_MIN", SCHEME, "Lowest body height")
HIGHEST = Code("HEIGHT_MAX", SCHEME, "Highest body height")
EXTENTS = {
    Extent.COMPLETE: Code("255594003", "SCT", "Complete"),
    Extent.PARTIAL: Code("255609007", "SCT", "Partial"),
    Extent.INDETERMINATE: Code("82334004", "SCT", "Indeterminate"),
}
MILLIMETER = Code("mm", "UCUM", "millimeter")
PERCENT = Code("%", "UCUM", "percent")
DEVICE = Code("121007", "DCM", "Device")
STRUCTURE = Code("123037004", "SCT", "Anatomical structure")
PROCEDURE = Code("25045-6", "LN", "CT unspecified body region")  # PS3.16 CID 100


def coverage_report(
    source: Source, curve: ScoreCurve, regions: Sequence[Region], origin: Origin
) -> Dataset:
    """Return the SR of what a Series covers of the regions of its bundle.

    A region has a group where something of it is shown beyond what its ends vary by between
    patients: no reader may take the name of another for a region shown. Where an end is not
    known there is no share. The same arguments give the same object, UIDs included; any other one
    gives other UIDs.

    Raises
    ------
    ObjectError
        If the curve is not that of the Series, or has no slices in it.

    References
    ----------
    DICOM PS3.3 A.35.13; PS3.16 TID 1500, 1501 and 300.
    """
    places = {(i.sop_instance_uid, f): i for i in source.instances for f in i.frames or (1,)}
    slices = list(zip(curve.sop_instance_uids, curve.frames, strict=True))
    if curve.series_uid != source.series_uid or not set(slices) <= set(places):
        raise ObjectError(f"the curve is not of the Instances of Series {source.series_uid}")
    digest = modules.digest_of(source, curve, regions, origin)
    key = (curve.series_uid, origin.model, origin.revision, digest)

    def group(
        name: str, ends: tuple[int, int], site: Region | None, **what: Any
    ) -> sr.MeasurementsAndQualitativeEvaluations:
        low, high = sorted(ends)
        # UIDs of slices tell a person nothing: the position does, which every viewer shows.
        to = f" to {curve.z_mm[high]:.1f}" if high > low else ""
        return sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(
                uid=modules.uid_of("coverage group", name, *key),
                identifier=f"{name}, z {curve.z_mm[low]:.1f}{to} mm",
            ),
            finding_type=STRUCTURE,
            finding_sites=[sr.FindingSite(_code(site))] if site else None,
            algorithm_id=sr.AlgorithmIdentification(modules.named(origin), origin.model),
            source_images=[
                _image(places[slices[i]], slices[i][1]) for i in dict.fromkeys((low, high))
            ],
            **what,
        )

    lowest, highest = int(curve.height_mm.argmin()), int(curve.height_mm.argmax())
    groups = [
        group(
            "body height",
            (lowest, highest),
            None,
            measurements=[
                sr.Measurement(LOWEST, round(float(curve.height_mm[lowest]), 1), MILLIMETER),
                sr.Measurement(HIGHEST, round(float(curve.height_mm[highest]), 1), MILLIMETER),
            ],
        )
    ]
    for shown in region.showing(curve.z_mm, curve.height_mm, regions):
        measured = [sr.Measurement(SPREAD, round(shown.region.spread_mm, 1), MILLIMETER)]
        if shown.share is not None:
            measured.insert(0, sr.Measurement(COVERAGE, round(100 * shown.share, 1), PERCENT))
        groups.append(
            group(
                f"{shown.region.name}, {shown.extent}",
                (shown.first, shown.last),
                shown.region,
                measurements=measured,
                qualitative_evaluations=[sr.QualitativeEvaluation(EXTENT, EXTENTS[shown.extent])],
            )
        )
    report = sr.MeasurementReport(
        observation_context=_observer(origin),
        procedure_reported=PROCEDURE,
        imaging_measurements=groups,
    )
    return _document(report, source, origin, key)


def _code(found: Region) -> Code:
    return Code(found.code, region.SCHEME, modules.text("CodeMeaning", found.meaning))


def _image(instance: Instance, frame: int) -> sr.SourceImageForMeasurementGroup:
    return sr.SourceImageForMeasurementGroup(
        instance.sop_class_uid, instance.sop_instance_uid, [frame] if instance.frames else None
    )


def _observer(origin: Origin) -> sr.ObservationContext:
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=modules.uid_of("device", modules.VERSION, origin.model),
        name=modules.named(origin),
        manufacturer_name=modules.MANUFACTURER,
        model_name=f"{modules.MANUFACTURER} {modules.VERSION}",
    )
    return sr.ObservationContext(
        observer_device_context=sr.ObserverContext(
            observer_type=DEVICE, observer_identifying_attributes=device
        )
    )


def _document(
    report: sr.MeasurementReport, source: Source, origin: Origin, key: tuple[str, ...]
) -> Dataset:
    """Return the document around the content: PS3.3 C.17.1 (Series), C.17.2 and C.17.3."""
    ds = modules.start(Comprehensive3DSRStorage, modules.uid_of("coverage report", *key), source)
    modules.add_series(
        ds,
        modality="SR",
        number=SERIES_NUMBER,
        uid=modules.uid_of("coverage report series", *key),
        title="dicomnode body coverage",
    )
    ds.ReferencedPerformedProcedureStepSequence = Items()
    modules.add_equipment(ds, origin)
    modules.add_content_time(ds, source, origin)
    ds.InstanceNumber = 1
    # Complete, for all that could be estimated was; but no person has verified it.
    ds.CompletionFlag, ds.VerificationFlag = "COMPLETE", "UNVERIFIED"
    ds.PerformedProcedureCodeSequence = Items()
    ds.CurrentRequestedProcedureEvidenceSequence = Items([_evidence(source)])
    scheme = Dataset()
    scheme.CodingSchemeDesignator = SCHEME
    scheme.CodingSchemeName = "Private codes of dicomnode"
    scheme.CodingSchemeResponsibleOrganization = modules.MANUFACTURER
    ds.CodingSchemeIdentificationSequence = Items([scheme])
    ds.update(report[0])
    return modules.finish(ds)


def _evidence(source: Source) -> Dataset:
    """Return every Instance of the curve, as the Hierarchical SOP Instance Reference Macro."""
    series, study = Dataset(), Dataset()
    series.SeriesInstanceUID = source.series_uid
    series.ReferencedSOPSequence = modules.references(source.instances)
    study.StudyInstanceUID = source.study_uid
    study.ReferencedSeriesSequence = Items([series])
    return study
