"""An offset as a Spatial Registration object (PS3.3 A.39.1), one object a pair.

The object lives in the fixed Study and in the Frame of Reference of the fixed Series: its matrix
takes points of the moving Series to points of the fixed one, `x_fixed = M x_moving` (PS3.3
C.20.2.1.1; not what a Deformable Spatial Registration or an ITK transform means).
"""

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import SpatialRegistrationStorage
from pydicom.valuerep import format_number_as_ds

from dicomnode.core import slicemap
from dicomnode.errors import ObjectError
from dicomnode.model import Offset, OffsetStatus
from dicomnode.objects import modules
from dicomnode.objects.modules import Origin
from dicomnode.objects.source import Source

LO = 64  # characters of such a value (PS3.5 section 6.2)
SERIES_NUMBER = 9001  # far from those of scanners
FARTHEST_MM = 5e4  # twice what `admission` lets two slices be apart, and more: a curve was flat
# Defined terms of Body Part Examined that are no paired structure (PS3.16 Annex L), as CT has them.
UNPAIRED = frozenset(
    "ABDOMEN ABDOMENPELVIS BLADDER BRAIN CHEST CHESTABDOMEN CHESTABDPELVIS COLON CSPINE CTSPINE "
    "HEAD HEADNECK HEART LARYNX LIVER LSPINE LSSPINE MEDIASTINUM NECK NECKCHEST NECKCHESTABDOMEN "
    "NECKCHESTABDPELV PANCREAS PELVIS SKULL SPINE SPLEEN SSPINE STERNUM THORAX TLSPINE TSPINE "
    "WHOLEBODY".split()
)
# PS3.16 CID 7100
FRAME_OF_REFERENCE_IDENTITY = ("125021", "Frame of Reference Identity")
IMAGE_CONTENT_BASED = ("125024", "Image Content-based Alignment")


def registration(fixed: Source, moving: Source, offset: Offset, origin: Origin) -> Dataset:
    """Return the Spatial Registration of a moving Series onto a fixed one.

    The same arguments give the same object, UIDs included; any other one gives other UIDs.

    Raises
    ------
    ObjectError
        If the offset was refused or is not finite, if a side has no Instances, or both sides
        are one Series.

    References
    ----------
    DICOM PS3.3 A.39.1, C.20.2 and C.12.2.
    """
    if offset.status is OffsetStatus.REFUSED or offset.offset_mm is None:
        raise ObjectError(f"no registration of an offset that is {offset.status}")
    shift = {"x": offset.dx_mm, "y": offset.dy_mm, "z": offset.offset_mm}
    numbers = [v for v in (*shift.values(), offset.sigma_mm) if v is not None]
    if not all(abs(v) <= FARTHEST_MM for v in numbers):  # nor NaN
        raise ObjectError(f"no registration of an offset of {', '.join(map(str, numbers))} mm")
    if fixed.series_uid == moving.series_uid:
        raise ObjectError(f"no registration of Series {fixed.series_uid} onto itself")
    # A matrix holds a number for every axis, estimated or not: wherever a reader meets the object,
    # in its label, its Series and beside its matrix, it says which.
    axes = "".join(axis for axis, v in shift.items() if v is not None)
    for side in (fixed, moving):
        if not side.instances:
            raise ObjectError(f"no registration of Series {side.series_uid} without Instances")
    key = (
        fixed.series_uid,
        moving.series_uid,
        offset.method,
        origin.model,
        origin.revision,
        modules.digest_of(fixed, moving, offset, origin),
    )
    ds = modules.start(SpatialRegistrationStorage, modules.uid_of("registration", *key), fixed)
    modules.add_series(
        ds,
        modality="REG",
        number=SERIES_NUMBER,
        uid=modules.uid_of("registration series", *key),
        title=_title(moving, offset, axes),
    )
    _add_body_part(ds, fixed)
    modules.add_equipment(ds, origin)
    modules.add_content_time(ds, fixed, origin)
    # The registered coordinate system: that of the fixed Series. Where its Instances share none,
    # it is one of our own, which the identity below ties to those Instances.
    known = fixed.frame_of_reference_uid
    ds.FrameOfReferenceUID = known or modules.uid_of("frame of reference", fixed.series_uid)
    ds.PositionReferenceIndicator = ""
    ds.InstanceNumber = 1
    ds.ContentLabel = _label(offset, axes)
    ds.ContentDescription = modules.text("ContentDescription", _description(fixed, moving, offset))
    ds.RegistrationSequence = Sequence(
        [
            _item(fixed, known, [0.0] * 3, _type(FRAME_OF_REFERENCE_IDENTITY if known else None)),
            _item(
                moving,
                # One Frame of Reference cannot lie in itself in two ways: where scanners reuse
                # it, only the images tell the sides apart.
                moving.frame_of_reference_uid if moving.frame_of_reference_uid != known else "",
                [v or 0.0 for v in shift.values()],
                _type(IMAGE_CONTENT_BASED),
                _comment(offset, axes),
            ),
        ]
    )
    _add_references(ds, fixed, moving)
    return modules.finish(ds)


def _add_body_part(ds: Dataset, fixed: Source) -> None:
    """Say which body part the fixed Series shows, and that no side of it is known.

    Laterality (PS3.3 C.7.3.1) is type 2C, required of paired structures: only of those known not
    to be one it is left out.
    """
    if fixed.body_part_examined:
        ds.BodyPartExamined = fixed.body_part_examined
    if fixed.body_part_examined not in UNPAIRED:
        ds.Laterality = fixed.laterality


def _item(
    source: Source,
    frame_of_reference_uid: str,
    shift_mm: list[float],
    kind: Sequence,
    comment: str = "",
) -> Dataset:
    matrix = Dataset()
    matrix.FrameOfReferenceTransformationMatrixType = "RIGID"
    matrix.FrameOfReferenceTransformationMatrix = [
        format_number_as_ds(v + 0.0)  # no -0.0
        for i, mm in enumerate(shift_mm)
        for v in (*(float(i == j) for j in range(3)), mm)
    ] + [format_number_as_ds(v) for v in (0.0, 0.0, 0.0, 1.0)]
    registered = Dataset()
    if comment:
        registered.FrameOfReferenceTransformationComment = comment
    registered.RegistrationTypeCodeSequence = kind
    registered.MatrixSequence = Sequence([matrix])
    item = Dataset()
    if frame_of_reference_uid:
        item.FrameOfReferenceUID = frame_of_reference_uid
    # Beside the Frame of Reference, not instead of it: it is missing, or reused, in the field.
    item.ReferencedImageSequence = modules.references(source.instances)
    item.MatrixRegistrationSequence = Sequence([registered])
    return item


def _type(code: tuple[str, str] | None) -> Sequence:
    if code is None:
        return Sequence()
    item = Dataset()
    item.CodeValue, item.CodeMeaning = code
    item.CodingSchemeDesignator = "DCM"
    return Sequence([item])


def _label(offset: Offset, axes: str) -> str:
    what = "EXTRAPOLATED" if offset.status is OffsetStatus.EXTRAPOLATED else "PREALIGN"
    return f"{what}_{axes.upper()}"  # CS: 16 characters


def _title(moving: Source, offset: Offset, axes: str) -> str:
    prior = f" of {_date(moving.study_date)}" if moving.study_date else ""
    guess = ", extrapolated" if offset.status is OffsetStatus.EXTRAPOLATED else ""
    return f"dicomnode prealignment{prior}, {' '.join(axes)}{'' if axes[1:] else ' only'}{guess}"


def _description(fixed: Source, moving: Source, offset: Offset) -> str:
    assert offset.offset_mm is not None
    sigma = "unknown" if offset.sigma_mm is None else f"{offset.sigma_mm:.1f} mm"
    told = f"z {offset.offset_mm:+.1f} mm, sigma {sigma}, {offset.method}"
    if min(len(fixed.z_mm), len(moving.z_mm)) < 2:
        return told
    line = slicemap.line(np.array(fixed.z_mm), np.array(moving.z_mm), offset.offset_mm)
    if line is None:
        return told
    # Slice k of the fixed Series lies there in the moving one: each counted from 1, feet to head.
    with_line = f"{told}, slice {line.intercept:.1f}{line.slope:+.5g}k"
    return with_line if len(with_line) <= LO else told


def _comment(offset: Offset, axes: str) -> str:
    missing = [axis for axis in "xyz" if axis not in axes]
    whose = "their" if missing[1:] else "its"
    comment = "x y z estimated, sigma is of z"
    if missing:
        comment = f"{' and '.join(missing)} not estimated, {whose} 0 is a placeholder"
    if offset.status is OffsetStatus.EXTRAPOLATED:
        comment = f"extrapolated; {comment}"
    return comment


def _date(date: str) -> str:
    return f"{date[:4]}-{date[4:6]}-{date[6:]}"


def _add_references(ds: Dataset, fixed: Source, moving: Source) -> None:
    """Add the Common Instance Reference module: each Instance above, by Study and Series."""
    same = [s for s in (fixed, moving) if s.study_uid == fixed.study_uid]
    ds.ReferencedSeriesSequence = Sequence([_series(s) for s in same])
    if moving.study_uid != fixed.study_uid:
        study = Dataset()
        study.StudyInstanceUID = moving.study_uid
        study.ReferencedSeriesSequence = Sequence([_series(moving)])
        ds.StudiesContainingOtherReferencedInstancesSequence = Sequence([study])


def _series(source: Source) -> Dataset:
    item = Dataset()
    item.SeriesInstanceUID = source.series_uid
    item.ReferencedInstanceSequence = modules.references(source.instances)
    return item
