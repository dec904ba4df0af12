"""Patient IDs that stand for nobody: what people and devices write where they know none."""

from functools import lru_cache

from dicomnode.model import PatientKey

# A link to one of these would make all who were ever registered so one patient.
COMMON = (
    "0",
    "anon",
    "anonymous",
    "anonymized",
    "dummy",
    "emergency",
    "na",
    "nil",
    "no id",
    "no pid",
    "none",
    "not available",
    "not known",
    "notfall",
    "null",
    "patient id",
    "pid",
    "tba",
    "tbd",
    "temp",
    "test",
    "tmp",
    "unbekannt",
    "undefined",
    "unidentified",
    "unk",
    "unknown",
    "xxx",
)


def spelled(patient_id: str) -> str:
    """Return a Patient ID without what such words differ in: case, marks, spaces, leading zeros.

    So "N/A" and "na" are one, as "0000" and "0", and "---" is nothing.
    """
    plain = "".join(c for c in patient_id.casefold() if c.isalnum())
    return plain.lstrip("0") or plain[:1]


@lru_cache(1024)  # it is asked of each slice
def is_placeholder(patient_id: str, names: tuple[str, ...]) -> bool:
    """Whether a Patient ID stands for nobody: one of these names, or without letter and digit."""
    plain = spelled(patient_id)
    return not plain or plain in {spelled(name) for name in names}


def named(patient: PatientKey, names: tuple[str, ...]) -> PatientKey:
    """Return who an image with this key is of: nobody, where the Patient ID is a placeholder."""
    return PatientKey("") if is_placeholder(patient.patient_id, names) else patient
