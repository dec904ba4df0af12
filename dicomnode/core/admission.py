"""Which slices and which Series are scored, and the reason where they are not."""

import math
import re

from dicomnode.core import geometry
from dicomnode.errors import GeometryError
from dicomnode.model import Floats, Reason, SliceHeader

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = frozenset({"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"})

KEY_OBJECT_SELECTION = "1.2.840.10008.5.1.4.1.1.88.59"
# Document titles (DCM) that make of a Key Object Selection a rejection note: PS3.16 CID 7011.
EXPIRED = "113039"  # Data Retention Policy Expired
REJECTIONS = {
    "113001": "Rejected for Quality Reasons",
    "113037": "Rejected for Patient Safety Reasons",
    "113038": "Incorrect Modality Worklist Entry",
    EXPIRED: "Data Retention Policy Expired",
}

# PS3.3 C.8.2.1.1.1 names LOCALIZER; the others are what vendors write for reconstructed views.
REFORMATS = frozenset(
    {"MPR", "PROJECTION IMAGE", "MIP", "MINIP", "CSA", "3D", "REFORMATTED", "CSAMPR", "VOLREN"}
    | {"MINIMUM IP", "RESAMPLED", "SSD", "VRT"}
    | {"MAXIMUM", "MINIMUM"}  # PS3.3 C.8.16.1.4, of Enhanced CT: projections
)
# Pictures of a screen and of a protocol, which some consoles write as CT Images.
PICTURES = frozenset(
    {"SCREEN SAVE", "SCREENSAVE", "SCREEN CAPTURE", "DOSE_INFO", "DOSE REPORT"}
) | {f"CT_SOM{version} PROT" for version in (5, 7)}
# Beyond 45 degrees a slice is nearer coronal or sagittal than axial. Between the two limits
# the gantry was tilted: a slice then shows several heights and its score means none of them.
NON_AXIAL_DEGREES = 45.0
TILT_DEGREES = 15.0
# From micro-CT to the coarsest dose grid; beyond lie damaged headers.
PIXEL_SPACING_MM = (0.01, 20.0)
MIN_POSITIONS = 8
MIN_EXTENT_MM = 50.0
# No table is longer: a curve over more costs memory by the square, and is wrong.
MAX_EXTENT_MM = 3000.0
MAX_POSITION_MM = 10_000.0

_UID = re.compile(r"\d+(\.\d+)*", re.ASCII)


def is_uid(text: str) -> bool:
    """Whether the text is a UID (PS3.5 section 9.1), leading zeros in components aside.

    Old scanners write components such as `.05`; they identify as well as any other.
    """
    return 0 < len(text) <= 64 and _UID.fullmatch(text) is not None


def refuse_instance(header: SliceHeader) -> Reason | None:
    """Return why no Frame of this Instance is scored, or None where one may be."""
    uids = (header.sop_instance_uid, header.series_uid, header.study_uid)
    if not all(map(is_uid, uids)):
        return Reason.BAD_UID
    enhanced = header.sop_class_uid in ENHANCED_CT
    if not (enhanced or header.sop_class_uid == CT_IMAGE) or header.modality != "CT":
        return Reason.NOT_CT
    if header.number_of_frames > 1 and not enhanced:  # PS3.3 A.3: a CT Image has one
        return Reason.MULTI_FRAME
    return None


def refuse_slice(header: SliceHeader) -> Reason | None:
    """Return why this Frame is not scored, or None where it is.

    Only what the Instance itself says is looked at; what needs its neighbours is
    for `refuse_stack`.
    """
    if reason := refuse_instance(header):
        return reason
    if PICTURES & set(header.image_type[2:]):
        return Reason.NOT_CT
    if "LOCALIZER" in header.image_type[2:3]:
        return Reason.LOCALIZER
    if REFORMATS & set(header.image_type[2:]):
        return Reason.REFORMAT
    geometric = (header.image_position, header.image_orientation, header.pixel_spacing)
    if any(part is None or not all(map(math.isfinite, part)) for part in geometric):
        return Reason.NO_GEOMETRY
    assert header.image_position and header.image_orientation and header.pixel_spacing
    if max(map(abs, header.image_position)) > MAX_POSITION_MM:
        return Reason.NO_GEOMETRY
    low, high = PIXEL_SPACING_MM
    if not all(low <= spacing <= high for spacing in header.pixel_spacing):
        return Reason.NO_GEOMETRY
    try:
        normal = geometry.slice_normal(header.image_orientation)
    except GeometryError as exc:
        return exc.reason
    tilt = geometry.tilt_degrees(normal)
    if tilt > NON_AXIAL_DEGREES:
        return Reason.NON_AXIAL
    if tilt > TILT_DEGREES:
        return Reason.TILT
    return None


def refuse_stack(z_mm: Floats) -> Reason | None:
    """Return why distinct, increasing positions (mm) make no curve, or None where they do."""
    if len(z_mm) < MIN_POSITIONS:
        return Reason.TOO_FEW_POSITIONS
    if z_mm[-1] - z_mm[0] < MIN_EXTENT_MM:
        return Reason.TOO_SHORT
    if z_mm[-1] - z_mm[0] > MAX_EXTENT_MM:
        return Reason.NOT_ONE_STACK
    return None
