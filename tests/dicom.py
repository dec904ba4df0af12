"""DICOM objects for tests, made and never stored."""

import re
from io import BytesIO
from typing import Any

import imagecodecs
import numpy as np
from pydicom import FileMetaDataset
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
    generate_uid,
)

# What must not show up in any log, metric or message: canaries, that tests put into what they send.
PATIENT_NAME = "CANARY^NAME"
PATIENT_ID = "CANARY-ID"
BIRTH_DATE = "18991130"
CANARIES = {
    "PatientName": PATIENT_NAME,
    "PatientID": PATIENT_ID,
    "PatientBirthDate": BIRTH_DATE,
    "PatientAddress": "1 Canary Street",
    "OtherPatientNames": "CANARY^OTHER",
    "AccessionNumber": "CANARY-ACC",
    "ReferringPhysicianName": "CANARY^REFERRER",
    "InstitutionName": "CANARY HOSPITAL",
    "StudyDescription": "canary study",
    "SeriesDescription": "canary series",
    "PatientComments": "canary comment",
}
_LEAK = re.compile(f"[^\\s\"']*(?:canary|{BIRTH_DATE}|1899-11-30)[^\\s\"']*", re.IGNORECASE)


def leaks(text: str) -> set[str]:
    """Return the words of a text that came from a patient."""
    return set(_LEAK.findall(text))


def ct_dataset(**overrides: Any) -> Dataset:
    """Return one axial CT slice of 64 x 64 pixels, 5 mm apart from its neighbours.

    Parameters
    ----------
    **overrides
        Attributes by keyword, in place of those here; None leaves one out. `TransferSyntaxUID`
        goes to the file meta information.
    """
    transfer_syntax_uid = overrides.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    stored = np.arange(64 * 64, dtype="<i2").reshape(64, 64)  # -1024 HU and more
    attributes: dict[str, Any] = {
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": generate_uid(None),
        "StudyInstanceUID": generate_uid(None),
        "SeriesInstanceUID": generate_uid(None),
        "FrameOfReferenceUID": generate_uid(None),
        "StudyDate": "20260105",
        "StudyTime": "081500",
        "SeriesNumber": "2",
        "InstanceNumber": "1",
        "Modality": "CT",
        "Manufacturer": "made",
        "BodyPartExamined": "CHEST",
        **CANARIES,
        "PatientPosition": "HFS",
        "SliceThickness": "5",
        "ImagePositionPatient": ["-24", "-24", "100"],
        "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
        "PixelSpacing": ["0.75", "0.75"],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": 64,
        "Columns": 64,
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleIntercept": "-1024",
        "RescaleSlope": "1",
        "PixelData": stored.tobytes(),
        **overrides,
    }
    ds = Dataset()
    for keyword, value in attributes.items():
        if value is not None:
            setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = transfer_syntax_uid
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return ds


def enhanced_ct(
    slices: list[Dataset], *, legacy: bool = False, frame_types: dict[int, list[str]] | None = None
) -> Dataset:
    """Return CT slices as the Frames of one Enhanced CT Image (PS3.3 A.38), in their order.

    Parameters
    ----------
    slices
        Native single-frame Instances of one orientation, spacing and rescale.
    legacy
        Whether it is to be a Legacy Converted Enhanced CT Image (PS3.3 A.70).
    frame_types
        Frame, counted from 1 -> its Frame Type, in place of the slice's Image Type.
    """
    first = slices[0]
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = LegacyConvertedEnhancedCTImageStorage if legacy else EnhancedCTImageStorage
    ds.SOPInstanceUID = generate_uid(None)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    for element in first:
        group = element.tag.group
        if group in (0x0010,) or (group == 0x0028 and element.keyword not in _PER_FRAME):
            ds.add(element)
    for keyword in (
        "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "StudyDate", "StudyTime",
        "Modality", "Manufacturer", "BodyPartExamined", "PatientPosition", "SeriesNumber",
    ):  # fmt: skip
        if keyword in first:
            ds.add(first[keyword])
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.InstanceNumber = "1"
    ds.ContentDate, ds.ContentTime = "20260105", "081500"
    ds.PixelPresentation, ds.VolumetricProperties = "MONOCHROME", "VOLUME"
    ds.VolumeBasedCalculationTechnique = "NONE"
    ds.NumberOfFrames = len(slices)
    shared = Dataset()
    shared.PixelMeasuresSequence = [_item(first, "PixelSpacing", "SliceThickness")]
    shared.PlaneOrientationSequence = [_item(first, "ImageOrientationPatient")]
    shared.PixelValueTransformationSequence = [
        _item(first, "RescaleIntercept", "RescaleSlope", RescaleType="HU")
    ]
    ds.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for k, one in enumerate(slices, start=1):
        group = Dataset()
        content = Dataset()
        content.StackID, content.InStackPositionNumber = "1", k
        content.FrameAcquisitionDateTime = f"20260105081500.{k:06d}"
        group.FrameContentSequence = [content]
        group.PlanePositionSequence = [_item(one, "ImagePositionPatient")]
        kind = Dataset()
        told = (frame_types or {}).get(k, [*one.ImageType, "NONE"])
        kind.FrameType, kind.PixelPresentation = told, "MONOCHROME"
        kind.VolumetricProperties, kind.VolumeBasedCalculationTechnique = "VOLUME", "NONE"
        group.CTImageFrameTypeSequence = [kind]
        if legacy:
            source = Dataset()
            source.ReferencedSOPClassUID = one.SOPClassUID
            source.ReferencedSOPInstanceUID = one.SOPInstanceUID
            group.ConversionSourceAttributesSequence = [source]
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = groups
    ds.PixelData = b"".join(one.PixelData for one in slices)
    ds["PixelData"].VR = "OW"
    return ds


_PER_FRAME = {"PixelSpacing", "RescaleIntercept", "RescaleSlope", "RescaleType"}


def _item(ds: Dataset, *keywords: str, **others: Any) -> Dataset:
    item = Dataset()
    for keyword in keywords:
        if keyword in ds:
            item.add(ds[keyword])
    for keyword, value in others.items():
        setattr(item, keyword, value)
    return item


def part10(ds: Dataset) -> bytes:
    """Return a data set as the bytes of a DICOM Part 10 file."""
    file = BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def without_meta(data: bytes) -> bytes:
    """Return what follows the file meta information of a DICOM Part 10 file."""
    # (0002,0000) FileMetaInformationGroupLength: 8 bytes after the prefix, then its value.
    length = int.from_bytes(data[140:144], "little")
    return data[144 + length :]


def compress(ds: Dataset, transfer_syntax_uid: str, fragments_per_frame: int = 1) -> Dataset:
    """Return a data set of native 16-bit frames, its pixels compressed without loss."""
    dtype = "<i2" if ds.PixelRepresentation else "<u2"
    shape = (int(ds.get("NumberOfFrames", 1)), ds.Rows, ds.Columns)
    frames = np.frombuffer(ds.PixelData, dtype).reshape(shape)
    encoded = [encode(frame, transfer_syntax_uid) for frame in frames]
    ds.PixelData = encapsulate(encoded, fragments_per_frame=fragments_per_frame)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = transfer_syntax_uid
    return ds


def encode(frame: Any, transfer_syntax_uid: str) -> bytes:
    """Return one frame, (R, C) 16-bit, as a codestream of even length."""
    signed = frame.dtype.kind == "i"
    if transfer_syntax_uid == RLELossless:
        planes = frame.astype("<u2").view(np.uint8).reshape(-1, 2)
        segments = [_even(b"".join(map(_packed, plane.reshape(frame.shape)))) for plane in planes.T]
        high, low = segments[1], segments[0]
        header = np.zeros(16, "<u4")
        header[:3] = 2, 64, 64 + len(high)
        return header.tobytes() + high + low
    if transfer_syntax_uid in (JPEGLSLossless, JPEGLSNearLossless):
        return _even(imagecodecs.jpegls_encode(frame.view(np.uint16)))  # knows no sign
    if transfer_syntax_uid in (JPEGLossless, JPEGLosslessSV1):
        return _even(imagecodecs.ljpeg_encode(frame.view(np.uint16), bitspersample=16))
    if transfer_syntax_uid in (JPEG2000, JPEG2000Lossless):
        return _even(imagecodecs.jpeg2k_encode(frame, level=0, reversible=True, codecformat="j2k"))
    assert transfer_syntax_uid in (HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL)
    assert not signed or frame.dtype == np.int16
    return _even(imagecodecs.htj2k_encode(frame, reversible=True))


def _packed(row: Any) -> bytes:
    return bytes(imagecodecs.packbits_encode(row.tobytes()))


def _even(data: bytes) -> bytes:
    return bytes(data) + b"\0" * (len(data) % 2)
