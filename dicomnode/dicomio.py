"""The door to DICOM bytes: headers, pixels in HU, and CT series written by our own hand."""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicomnode.core import admission, geometry, outline, pixels, preprocess
from dicomnode.errors import CorruptObject, DicomError, UnsupportedObject
from dicomnode.model import PatientKey, Reason, SliceHeader

# A 16-bit slice of 4096 x 4096: what a header may make us allocate, and no more.
MAX_PIXELS = 4096 * 4096
MAX_RESCALE = 1e6


def read(source: Path | BinaryIO, *, pixels: bool = True) -> Dataset:
    """Return the data set of a DICOM Part 10 file.

    Raises
    ------
    CorruptObject
        If it is no DICOM file, or breaks off.
    """
    try:
        ds = pydicom.dcmread(source, stop_before_pixels=not pixels)
        if pixels and not len(ds):
            # Encapsulated pixel data that breaks off takes everything with it: read up to there.
            if not isinstance(source, Path):
                source.seek(0)
            ds = pydicom.dcmread(source, stop_before_pixels=True)
        return ds
    except InvalidDicomError as exc:
        raise CorruptObject("no DICOM Part 10 file", Reason.NOT_DICOM) from exc
    except OSError as exc:
        if exc.errno is not None:  # the disk's; pydicom's own, of a broken sequence, has none
            raise
        raise CorruptObject("breaks off within a sequence") from exc
    except Exception as exc:  # pydicom raises whatever its parsers meet: 8 types in 355 bad files
        raise CorruptObject(f"cannot be parsed: {type(exc).__name__}") from exc


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one Instance holds for the regressor: its input, or the reason why it has none."""

    header: SliceHeader
    input: preprocess.Input | None = None
    reason: Reason | None = None
    detail: str = ""
    body_centre_mm: tuple[float, float] | None = None  # x, y in LPS


def decode(
    source: Path | BinaryIO | bytes | bytearray | memoryview,
    spec: preprocess.PreprocessSpec,
    default_issuers: Mapping[str, str] | None = None,
) -> Decoded:
    """Return header and network input of one Instance.

    Parameters
    ----------
    source
        A DICOM Part 10 file, or its bytes.
    default_issuers
        Calling AE title -> issuer of Patient ID taken where the data set names none;
        "" -> the one for every other sender, and for files.

    Raises
    ------
    CorruptObject
        If it cannot be told which Instance it is. Whatever else is wrong comes back as
        a `reason`, so that the Series it belongs to can show it.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        source = BytesIO(source)
    ds = read(source)
    calling = str(ds.file_meta.get("SourceApplicationEntityTitle", "")).strip()
    issuers = default_issuers or {}
    header = header_of(ds, default_issuer=issuers.get(calling) or issuers.get("", ""))
    if reason := admission.refuse_slice(header):
        return Decoded(header, reason=reason)
    position, orientation = header.image_position, header.image_orientation
    spacing = header.pixel_spacing
    assert position is not None and orientation is not None and spacing is not None
    try:
        image = image_hu(ds)
    except DicomError as exc:
        return Decoded(header, reason=exc.reason, detail=str(exc))
    x, middle = preprocess.crop(image, spacing, orientation, spec)
    if preprocess.is_empty(x, spec):
        return Decoded(header, reason=Reason.EMPTY)
    plane = geometry.plane(position, orientation, spacing, image.shape)
    return Decoded(header, x, body_centre_mm=outline.body_centre_mm(x, middle, plane, spec))


def header_of(ds: Dataset, *, default_issuer: str = "") -> SliceHeader:
    """Return what the node reads of an Instance, pixels aside.

    What is missing or unreadable is None or empty: whether that matters is for
    `core.admission`.

    Raises
    ------
    CorruptObject
        If it does not even tell which Instance of which Series and Study it is.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's value warnings quote the value
        try:
            return SliceHeader(
                sop_class_uid=_text(ds, "SOPClassUID"),
                sop_instance_uid=_text(ds, "SOPInstanceUID"),
                series_uid=_text(ds, "SeriesInstanceUID"),
                study_uid=_text(ds, "StudyInstanceUID"),
                patient=_patient(ds, default_issuer),
                study_datetime=_datetime(_text(ds, "StudyDate"), _text(ds, "StudyTime")),
                modality=_text(ds, "Modality"),
                image_type=tuple(str(v).strip().upper() for v in _values(ds, "ImageType")),
                image_position=_floats(ds, "ImagePositionPatient", 3),
                image_orientation=_floats(ds, "ImageOrientationPatient", 6),
                pixel_spacing=_floats(ds, "PixelSpacing", 2),
                rows=_integer(ds, "Rows") or 0,
                columns=_integer(ds, "Columns") or 0,
                number_of_frames=_integer(ds, "NumberOfFrames") or 1,
                frame_of_reference_uid=_text(ds, "FrameOfReferenceUID"),
                body_part_examined=_text(ds, "BodyPartExamined"),
                manufacturer=_text(ds, "Manufacturer"),
                expected_instances=_integer(ds, "NumberOfSeriesRelatedInstances"),
            )
        except CorruptObject:
            raise
        except Exception as exc:  # a broken element surfaces only when it is converted
            raise CorruptObject(f"header cannot be read: {type(exc).__name__}") from exc


def image_hu(ds: Dataset) -> npt.NDArray[np.float32]:
    """Return the pixels of a single-frame CT Instance as (R, C) float32 HU.

    Raises
    ------
    UnsupportedObject
        If no decoder for its transfer syntax is at hand.
    CorruptObject
        If the pixel data are short, or do not decode.
    """
    rows, columns = _integer(ds, "Rows") or 0, _integer(ds, "Columns") or 0
    if not 0 < rows * columns <= MAX_PIXELS:
        raise CorruptObject(f"{rows} x {columns} pixels", Reason.PIXEL_DATA)
    if "PixelData" not in ds:
        raise CorruptObject("no pixel data", Reason.PIXEL_DATA)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # trailing padding, odd lengths: harmless, and many
            stored = ds.pixel_array
    except (NotImplementedError, RuntimeError) as exc:
        if not _decodable(ds):
            raise UnsupportedObject(f"transfer syntax {_syntax(ds)}") from exc
        raise CorruptObject("pixel data do not decode", Reason.PIXEL_DATA) from exc
    except Exception as exc:  # codecs raise whatever they meet
        raise CorruptObject(
            f"pixel data do not decode: {type(exc).__name__}", Reason.PIXEL_DATA
        ) from exc
    if stored.shape != (rows, columns):
        raise CorruptObject(f"pixel data of shape {stored.shape}", Reason.PIXEL_DATA)
    try:
        slope, intercept = _floats(ds, "RescaleSlope", 1), _floats(ds, "RescaleIntercept", 1)
        padding = _padding(ds)
    except Exception as exc:
        raise CorruptObject("rescale values cannot be read", Reason.PIXEL_DATA) from exc
    rescale = (slope or (1.0,))[0] or 1.0, (intercept or (0.0,))[0]
    # No scanner writes more than a few thousand; NaN and 1e38 come from damaged headers.
    if not all(abs(value) <= MAX_RESCALE for value in rescale):
        raise CorruptObject(f"rescale slope and intercept {rescale}", Reason.PIXEL_DATA)
    return pixels.to_hu(stored, *rescale, padding)


def find(paths: list[Path]) -> Iterator[Path]:
    """Yield every file under the paths, sorted, hidden files and DICOMDIR aside."""
    for path in paths:
        if path.is_dir():
            for child in sorted(path.iterdir()):
                if not child.name.startswith(".") and child.name != "DICOMDIR":
                    yield from find([child])
        else:
            yield path


def ct_dataset(
    image_hu: npt.NDArray[np.integer],
    *,
    patient: PatientKey,
    study_uid: str,
    series_uid: str,
    sop_instance_uid: str,
    instance_number: int,
    image_position: tuple[float, float, float],
    pixel_mm: float,
    spacing_mm: float,
    study_datetime: datetime,
    frame_of_reference_uid: str,
) -> Dataset:
    """Return a complete CT Image (PS3.3 A.3) of one axial slice, identity orientation.

    For phantoms: what is written here was never measured.
    """
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = sop_instance_uid
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = sop_instance_uid
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = study_datetime.strftime("%Y%m%d")
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = study_datetime.strftime("%H%M%S")
    ds.AccessionNumber = ""
    ds.Modality = "CT"
    ds.Manufacturer = "dicomnode phantom"
    ds.ReferringPhysicianName = ""
    ds.PatientName = "Phantom^Made"
    ds.PatientID = patient.patient_id
    if patient.issuer:
        ds.IssuerOfPatientID = patient.issuer
    ds.PatientBirthDate = ""
    ds.PatientSex = ""
    ds.SliceThickness = spacing_mm
    ds.KVP = "120"
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = study_uid
    ds.SeriesInstanceUID = series_uid
    ds.StudyID = "1"
    ds.SeriesNumber = 1
    ds.AcquisitionNumber = 1
    ds.InstanceNumber = instance_number
    ds.ImagePositionPatient = [f"{v:.4f}" for v in image_position]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.FrameOfReferenceUID = frame_of_reference_uid
    ds.PositionReferenceIndicator = ""
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = image_hu.shape
    ds.PixelSpacing = [pixel_mm, pixel_mm]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "HU"
    ds.PixelData = image_hu.astype("<i2").tobytes()
    return ds


def _values(ds: Dataset, keyword: str) -> list[Any]:
    value = ds.get(keyword)
    if value is None:
        return []
    return list(value) if isinstance(value, pydicom.multival.MultiValue) else [value]


def _text(ds: Dataset, keyword: str) -> str:
    # Of several values none is the value: two patients whose IDs begin alike must not become one.
    # Postgres stores no NUL; in DICOM it is padding.
    text = "\\".join(str(value) for value in _values(ds, keyword))
    return text.replace("\0", "").strip(" ")


def _floats(ds: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    try:
        values = tuple(float(v) for v in _values(ds, keyword))
    except (TypeError, ValueError):
        return None
    return values if len(values) == count else None


def _integer(ds: Dataset, keyword: str) -> int | None:
    values = _floats(ds, keyword, 1)
    return int(values[0]) if values and math.isfinite(values[0]) else None


def _patient(ds: Dataset, default_issuer: str) -> PatientKey:
    patient_id, issuer = _text(ds, "PatientID"), _text(ds, "IssuerOfPatientID")
    too_long = max(len(patient_id), len(issuer)) > 64  # PS3.5 Table 6.2-1, LO
    # Cut to length, or with what could not be decoded replaced, two patients might become one.
    if too_long or "\ufffd" in patient_id + issuer:
        return PatientKey("")
    return PatientKey(patient_id, issuer or default_issuer)


def _datetime(date: str, time: str) -> datetime | None:
    digits = time.split(".")[0].ljust(6, "0")
    for text in (date + digits, date + "000000"):
        try:
            return datetime.strptime(text, "%Y%m%d%H%M%S")
        except ValueError:
            continue
    return None


def _padding(ds: Dataset) -> tuple[int, int] | None:
    value = _integer(ds, "PixelPaddingValue")
    if value is None:
        return None
    limit = _integer(ds, "PixelPaddingRangeLimit")
    return value, value if limit is None else limit


def _syntax(ds: Dataset) -> str:
    return str(ds.file_meta.get("TransferSyntaxUID", "unknown"))


def _decodable(ds: Dataset) -> bool:
    try:
        return not ds.file_meta.TransferSyntaxUID.is_encapsulated or bool(
            pydicom.pixels.get_decoder(ds.file_meta.TransferSyntaxUID).is_available
        )
    except (AttributeError, NotImplementedError, ValueError):  # ValueError: a private syntax
        return False
