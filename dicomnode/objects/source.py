"""A Series as an object refers to it: its Instances, its Study, its patient, as headers say."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from pydicom import config
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import validate_value

from dicomnode.core import admission
from dicomnode.model import ScoreCurve

# What an object copies from the Study it becomes part of: field -> DICOM keyword.
COPIED = {
    "patient_name": "PatientName",
    "patient_id": "PatientID",
    "issuer_of_patient_id": "IssuerOfPatientID",
    "patient_birth_date": "PatientBirthDate",
    "patient_sex": "PatientSex",
    "study_date": "StudyDate",
    "study_time": "StudyTime",
    "study_id": "StudyID",
    "study_description": "StudyDescription",
    "accession_number": "AccessionNumber",
    "referring_physician_name": "ReferringPhysicianName",
    "timezone_offset_from_utc": "TimezoneOffsetFromUTC",
    "body_part_examined": "BodyPartExamined",
    "laterality": "Laterality",
}
SEXES = ("M", "F", "O")  # PS3.3 C.7.1.1
LATERALITIES = ("R", "L")  # PS3.3 C.7.3.1
# What is kept of the header of a Series; the last two tell a person which Series it is.
KEPT = (*COPIED.values(), "SeriesNumber", "SeriesDescription")
MAX_TEXT = 1024  # characters; longer is no value of these attributes, but a damaged header
# Control characters, the delimiter of values, halves of characters, and what was not decoded.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff\ufffd]")
_HALF = re.compile(r"[\ud800-\udfff]")
_OFFSET = re.compile(r"[+-](\d\d)([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Instance:
    """One Instance of a curve; `frames` are those in the curve, empty where it has but one."""

    sop_class_uid: str
    sop_instance_uid: str
    frames: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Source:
    """A Series with what an object must know of it; a text is empty where it is unknown.

    Texts are as they stand in the headers, so that the object joins the same patient and Study
    in a PACS; what its VR forbids was left out by `of_header`.
    """

    study_uid: str
    series_uid: str
    instances: tuple[Instance, ...]  # of the curve, feet to head
    frames_of_reference: tuple[str, ...] = ()  # distinct; "" among them where one names none
    z_mm: tuple[float, ...] = ()  # of the slices of the curve, feet to head; empty: unknown
    patient_name: str = ""
    patient_id: str = ""
    issuer_of_patient_id: str = ""
    patient_birth_date: str = ""
    patient_sex: str = ""
    study_date: str = ""
    study_time: str = ""
    study_id: str = ""
    study_description: str = ""
    accession_number: str = ""
    referring_physician_name: str = ""
    timezone_offset_from_utc: str = ""
    body_part_examined: str = ""
    laterality: str = ""

    def __repr__(self) -> str:  # it may end up in a traceback, and so in a log
        return f"Source({self.series_uid}, {len(self.instances)} Instances)"

    @property
    def frame_of_reference_uid(self) -> str:
        """The Frame of Reference that all Instances share, empty where there is none such."""
        one = self.frames_of_reference
        return one[0] if len(one) == 1 and admission.is_uid(one[0]) else ""

    @property
    def unknown(self) -> tuple[str, ...]:
        """DICOM keywords that an object has to have, be it empty, and that are unknown here."""
        optional = {"issuer_of_patient_id", "study_description", "timezone_offset_from_utc"}
        optional |= {"laterality"}
        return tuple(k for f, k in COPIED.items() if f not in optional and not getattr(self, f))

    def local(self, time: datetime) -> datetime:
        """Return a time as the Study's other times are meant, if its offset from UTC is known."""
        found = _OFFSET.fullmatch(self.timezone_offset_from_utc)
        if not found:
            return time
        offset = timedelta(hours=int(found[1]), minutes=int(found[2]))
        sign = -1 if self.timezone_offset_from_utc[0] == "-" else 1
        return time.astimezone(timezone(sign * offset))


def texts_of(header: Dataset) -> dict[str, str]:
    """Return the texts of a data set that are kept of its Series, by DICOM keyword.

    They are as sent, decoded; what cannot be decoded, or stored, is left out.
    """
    found = {keyword: _text(header, keyword) for keyword in KEPT}
    return {keyword: text for keyword, text in found.items() if text}


def of_texts(
    texts: Mapping[str, str],
    *,
    study_uid: str,
    series_uid: str,
    instances: Sequence[Instance],
    frames_of_reference: Iterable[str],
    z_mm: Iterable[float] = (),
) -> Source:
    """Return the Series of which these are the texts, as `texts_of` gives them.

    A value that its VR forbids, or that could not be decoded, is taken as unknown: an object
    that a peer refuses, or files under a mutilated name, is worth less than an empty value.
    """
    found = {field: texts.get(keyword, "") for field, keyword in COPIED.items()}
    return Source(
        study_uid=study_uid,
        series_uid=series_uid,
        instances=tuple(instances),
        frames_of_reference=tuple(dict.fromkeys(frames_of_reference)),
        z_mm=tuple(z_mm),
        **{f: text for f, text in found.items() if text and sound(COPIED[f], text)},
    )


def of_header(
    header: Dataset,
    instances: Sequence[Instance],
    frames_of_reference: Iterable[str],
    z_mm: Iterable[float] = (),
) -> Source:
    """Return the Series of a data set, one of its Instances, as `of_texts` has it."""
    return of_texts(
        texts_of(header),
        study_uid=str(header.StudyInstanceUID).strip("\0 "),
        series_uid=str(header.SeriesInstanceUID).strip("\0 "),
        instances=instances,
        frames_of_reference=frames_of_reference,
        z_mm=z_mm,
    )


def instances_of(curve: ScoreCurve, sop_class_uids: dict[str, str]) -> tuple[Instance, ...]:
    """Return the Instances of a curve, feet to head; `sop_class_uids` says what each one is."""
    frames: dict[str, list[int]] = {}
    for uid, frame in zip(curve.sop_instance_uids, curve.frames, strict=True):
        frames.setdefault(uid, []).append(frame)
    return tuple(
        Instance(
            sop_class_uids[uid],
            uid,
            () if sop_class_uids[uid] == admission.CT_IMAGE else tuple(sorted(numbers)),
        )
        for uid, numbers in frames.items()
    )


def sound(keyword: str, text: str) -> bool:
    """Whether a text may stand as the one value of an attribute (PS3.5 section 6.2)."""
    vr = dictionary_VR(keyword)
    if _FORBIDDEN.search(text):
        return False
    try:
        validate_value(vr, text, config.RAISE)
        if vr == "DA":
            datetime.strptime(text, "%Y%m%d")
    except ValueError:
        return False
    if keyword == "TimezoneOffsetFromUTC":
        return bool(_OFFSET.fullmatch(text)) and -1200 <= int(text) <= 1400 and text != "-0000"
    allowed = {"PatientSex": SEXES, "Laterality": LATERALITIES}.get(keyword)
    return allowed is None or text in allowed


def _text(header: Dataset, keyword: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's value warnings quote the value
        try:
            value = header.get(keyword)
            values = value if isinstance(value, MultiValue) else [value]
            text = "\\".join("" if v is None else str(v) for v in values)
        except Exception:  # a broken element surfaces only when it is converted
            return ""
    text = text.replace("\0", "").strip(" ")
    # Half of a character: no database takes it.
    return "" if len(text) > MAX_TEXT or _HALF.search(text) else text
