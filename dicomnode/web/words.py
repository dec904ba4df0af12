"""States, reasons and flags in words for people; programs, and questions, have their codes."""

from dicomnode.model import Flag, Reason, SeriesState

STATES = {
    SeriesState.OPEN: "arriving",
    SeriesState.CURVE: "curve",
    SeriesState.IGNORED: "ignored",
    SeriesState.QUARANTINED: "quarantined",
}
REASONS = {
    Reason.NOT_CT: "not a CT image",
    Reason.MULTI_FRAME: "several frames in a CT Image",
    Reason.EMPTY: "shows no body",
    Reason.LOCALIZER: "localizer",
    Reason.REFORMAT: "reformatted: MPR, MIP",
    Reason.NON_AXIAL: "not axial",
    Reason.TILT: "tilted",
    Reason.TOO_FEW_POSITIONS: "too few slice positions",
    Reason.TOO_SHORT: "too short",
    Reason.DUPLICATE_POSITION: "another slice lies there",
    Reason.REJECTED: "taken back by a rejection note",
    Reason.NOT_DICOM: "no DICOM",
    Reason.BAD_UID: "a UID that is none",
    Reason.CORRUPT: "cannot be read",
    Reason.PIXEL_DATA: "pixels cannot be decoded",
    Reason.UNSUPPORTED_TRANSFER_SYNTAX: "no decoder for its transfer syntax",
    Reason.NO_GEOMETRY: "no usable position or orientation",
    Reason.NOT_ONE_STACK: "slices of several stacks",
    Reason.NO_SCORE: "the network gives no number",
}
FLAGS = {
    Flag.DUPLICATE_POSITION: "positions more than once",
    Flag.GAP: "slices missing between",
    Flag.UNEVEN_SPACING: "uneven spacing",
    Flag.FRAME_OF_REFERENCE_VARIES: "several frames of reference",
    Flag.LOW_CORRELATION: "body height strays from position",
    Flag.REVERSED: "head and feet reversed",
    Flag.SLOPE: "unusual slope",
    Flag.SLICES_REFUSED: "slices were set aside",
    Flag.OTHER_MODEL: "slices of another bundle left out",
    Flag.PATIENT_POSITION: "Patient Position says otherwise",
    Flag.TILT: "tilted, and where the body lies is not known",
}


def state(code: str) -> str:
    """Return a state in words."""
    return STATES[SeriesState(code)]


def reason(code: str) -> str:
    """Return why something was set aside; a database may name reasons of before."""
    return REASONS[Reason(code)] if code in REASONS else code.replace("_", " ")


def flag(code: str) -> str:
    """Return what a reader of a curve should know."""
    return FLAGS[Flag(code)]


def ago(seconds: float) -> str:
    """Return for how long something lasts already."""
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"
