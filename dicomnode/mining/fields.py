"""The words of the language: fields and what they compare to, functions and what they take."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from dicomnode.core.region import Region
from dicomnode.model import Flag, Reason, SeriesState


class Kind(StrEnum):
    """What a field compares to."""

    COUNT = "a whole number"
    LENGTH = "a length in mm"
    REAL = "a number"
    TEXT = "a text"
    CHOICE = "one of its values"
    FLAG = "a flag"
    BUNDLE = "a digest"
    DAY = "a date"

    @property
    def ordered(self) -> bool:
        """Whether < and > have a meaning."""
        return self in (Kind.COUNT, Kind.LENGTH, Kind.REAL, Kind.DAY)


@dataclass(frozen=True, slots=True)
class Field:
    """One thing that is known of a Series."""

    name: str
    kind: Kind
    meaning: str
    choices: tuple[str, ...] = ()
    every_series: bool = False  # a question about it looks at Series without a curve, too


@dataclass(frozen=True, slots=True)
class Function:
    """One thing that is asked of the curve or the patient."""

    name: str
    usage: str
    meaning: str


FIELDS = {
    field.name: field
    for field in (
        Field("slices", Kind.COUNT, "positions in the curve"),
        Field("spacing", Kind.LENGTH, "between neighbouring slices, the median, in mm"),
        Field("quality", Kind.REAL, "correlation of score with position, 1 at best"),
        Field("slope", Kind.REAL, "learned mm per true mm, 1 for the average adult"),
        Field("low", Kind.LENGTH, "lowest body height that slices fill, in mm"),
        Field("high", Kind.LENGTH, "highest body height that slices fill, in mm"),
        Field("flag", Kind.FLAG, "what to know of the curve", tuple(Flag)),
        Field("bundle", Kind.BUNDLE, "digest of the weight bundle, its first 8 digits or more"),
        Field("modality", Kind.TEXT, "Modality (0008,0060)"),
        Field("manufacturer", Kind.TEXT, "Manufacturer (0008,0070)"),
        Field("body_part_examined", Kind.TEXT, "Body Part Examined (0018,0015)"),
        Field("study_date", Kind.DAY, "Study Date (0008,0020)"),
        Field("arrived", Kind.DAY, "day of the first arrival, UTC"),
        Field("patient_id", Kind.TEXT, "Patient ID (0010,0020)"),
        Field("issuer", Kind.TEXT, "Issuer of Patient ID (0010,0021), or the node's default"),
        Field("study_uid", Kind.TEXT, "Study Instance UID (0020,000D)"),
        Field("series_uid", Kind.TEXT, "Series Instance UID (0020,000E)"),
        Field("state", Kind.CHOICE, "where the Series stands", tuple(SeriesState), True),
        Field("reason", Kind.CHOICE, "why a Series has no curve", tuple(Reason), True),
    )
}

FUNCTIONS = {
    function.name: function
    for function in (
        Function("covers", "covers(REGION, FRACTION)", "slices fill that share of a region"),
        Function("overlaps", "overlaps(REGION)", "slices fill some of a region"),
        Function("height", "height(FROM, TO)", "slices fill every body height between, in mm"),
        Function("prior", "prior(within=90d)", "an earlier Study of the patient has a curve"),
    )
}


def words(regions: Iterable[Region] = ()) -> dict[str, str]:
    """Return every word that completes an expression, with what it means."""
    found = {f.usage: f.meaning for f in FUNCTIONS.values()}
    found |= {f.name: f.meaning for f in FIELDS.values()}
    return found | {spelled(r.name): r.meaning for r in regions}


def spelled(name: str) -> str:
    """Return a region's name as one word."""
    return name.replace(" ", "_")
