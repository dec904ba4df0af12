"""The modules that every object of ours has alike, and how an object becomes a file."""

import dataclasses
import hashlib
import importlib.metadata
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.objects.source import Instance, Source, sound

MANUFACTURER = "dicomnode"
VERSION = importlib.metadata.version("dicomnode-ssbr")
# Of all UIDs made here; drawn once, never to be changed: a repeat is to write the same UIDs.
NAMESPACE = uuid.UUID("6b3c1b0e-5b5c-4c53-9d0c-3f6a1d2f7a41")
DIGEST = 16  # characters of a bundle's digest that name it, as everywhere in the node


@dataclass(frozen=True, slots=True)
class Origin:
    """What an object was made by, and from which state of its Series.

    The same origin and the same Series make the same object, UIDs included.
    """

    model: str  # digest of the bundle
    model_name: str  # its name, for people
    made_at: datetime  # with its timezone
    revision: str = ""  # of the curves, such as "2" or "2.1"; no meaning beyond being another one

    def __post_init__(self) -> None:
        if self.made_at.tzinfo is None:
            raise ValueError("made_at needs a timezone")


def uid_of(*parts: str) -> str:
    """Return a UID that the parts determine: a UUID of version 5 (PS3.5 section B.2, RFC 9562)."""
    name = "\0".join(parts)  # what is in no part, so that ("a", "bc") is not ("ab", "c")
    return f"2.25.{uuid.uuid5(NAMESPACE, name).int}"


def digest_of(*told: object) -> str:
    """Return a digest of all that an object says, and of who says it: part of its UIDs.

    An archive keeps the first object of a UID, whatever comes later. So a patient that was
    corrected, or a number of another version of this software, is to give another one.
    """
    return hashlib.sha256(repr((VERSION, *map(_plain, told))).encode()).hexdigest()


def _plain(told: object) -> object:
    if dataclasses.is_dataclass(told) and not isinstance(told, type):
        told = dataclasses.asdict(told)  # their own words may leave something out
    if isinstance(told, dict):
        return {name: _plain(value) for name, value in told.items()}
    if isinstance(told, np.ndarray):
        return told.dtype.str, told.tobytes()
    if isinstance(told, list | tuple):
        return [_plain(one) for one in told]
    return told


def start(sop_class_uid: str, sop_instance_uid: str, source: Source) -> Dataset:
    """Return an object with its patient, its Study and its identity, to be filled.

    Patient (PS3.3 C.7.1.1), General Study (C.7.2.1) and SOP Common (C.12.1) modules. What is
    unknown is empty: each of them is type 2.
    """
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class_uid, sop_instance_uid
    ds.StudyInstanceUID = source.study_uid
    ds.StudyDate, ds.StudyTime, ds.StudyID = source.study_date, source.study_time, source.study_id
    ds.AccessionNumber = source.accession_number
    ds.ReferringPhysicianName = source.referring_physician_name
    ds.PatientName, ds.PatientID = source.patient_name, source.patient_id
    ds.PatientBirthDate, ds.PatientSex = source.patient_birth_date, source.patient_sex
    if source.issuer_of_patient_id:
        ds.IssuerOfPatientID = source.issuer_of_patient_id
    if source.study_description:
        ds.StudyDescription = source.study_description
    if source.timezone_offset_from_utc:
        ds.TimezoneOffsetFromUTC = source.timezone_offset_from_utc
    return ds


def add_series(ds: Dataset, *, modality: str, number: int, uid: str, title: str) -> None:
    """Add a Series of its own for this object (PS3.3 C.7.3.1): no two objects share one."""
    ds.Modality = modality
    ds.SeriesInstanceUID, ds.SeriesNumber = uid, number
    ds.SeriesDescription = text("SeriesDescription", title)


def add_equipment(ds: Dataset, origin: Origin) -> None:
    """Add the General Equipment module (PS3.3 C.7.5.1): this software, and its bundle."""
    ds.Manufacturer = ds.ManufacturerModelName = MANUFACTURER
    ds.SoftwareVersions = [
        text("SoftwareVersions", VERSION),
        text("SoftwareVersions", named(origin)),
    ]


def add_content_time(ds: Dataset, source: Source, origin: Origin) -> None:
    """Say when the content was made, in the timezone of the Study's other times."""
    time = source.local(origin.made_at)
    ds.ContentDate, ds.ContentTime = time.strftime("%Y%m%d"), time.strftime("%H%M%S.%f")
    ds.InstanceCreationDate, ds.InstanceCreationTime = ds.ContentDate, ds.ContentTime


def named(origin: Origin) -> str:
    """Return the bundle as people and the command line name it."""
    return f"{origin.model_name} {origin.model[:DIGEST]}".strip()


def references(instances: Iterable[Instance]) -> Sequence:
    """Return items of the SOP Instance Reference Macro (PS3.3 Table 10-11), whole Instances."""
    items = []
    for instance in instances:
        item = Dataset()
        item.ReferencedSOPClassUID = instance.sop_class_uid
        item.ReferencedSOPInstanceUID = instance.sop_instance_uid
        items.append(item)
    return Sequence(items)


def text(keyword: str, value: str, limit: int = 64) -> str:
    """Return our own text as an attribute takes it: cut to its length, without what it forbids."""
    kept = " ".join("".join(c if sound(keyword, c) else " " for c in value).split())
    return kept[:limit].strip()


def finish(ds: Dataset) -> Dataset:
    """Return the object with the file meta information (PS3.10 section 7.1) that it needs."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def save(ds: Dataset, path: Path) -> None:
    """Write an object as a DICOM Part 10 file."""
    ds.save_as(path, enforce_file_format=True)
