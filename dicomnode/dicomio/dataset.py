"""Any Part 10 file by pydicom: its data set, its header, its pixels. Slow, and exact."""

import math
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_partial, read_preamble
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from dicomnode.core import pixels
from dicomnode.dicomio import codecs
from dicomnode.dicomio.scan import Layout, patient_key, study_datetime
from dicomnode.errors import CorruptObject, DicomError, UnsupportedObject
from dicomnode.model import Acquisition, PatientKey, Reason, SliceHeader

# A 16-bit slice of 4096 x 4096: what a header may make us allocate, and no more.
MAX_PIXELS = 4096 * 4096
MAX_RESCALE = 1e6
# What a deflated data set may inflate to: 600 slices of 512 x 512 in one Instance, and room.
MAX_INFLATED = 512 << 20
_DEFLATED = DeflatedExplicitVRLittleEndian.encode()
_META_BYTES = 1 << 16  # no file meta information is longer

T = TypeVar("T")

Stored = npt.NDArray[np.integer[Any]]


def read(source: Path | BinaryIO, *, pixels: bool = True) -> Dataset:
    """Return the data set of a DICOM Part 10 file.

    Raises
    ------
    CorruptObject
        If it is no DICOM file, or breaks off.
    """
    if isinstance(source, Path):
        with open(source, "rb") as file:
            return read(file, pixels=pixels)
    try:
        source = _inflated(source)
        ds = pydicom.dcmread(source, stop_before_pixels=not pixels)
        if pixels and not len(ds):
            # Encapsulated pixel data that breaks off takes everything with it: read up to there.
            source.seek(0)
            ds = pydicom.dcmread(source, stop_before_pixels=True)
        return ds
    except CorruptObject:
        raise
    except InvalidDicomError as exc:
        raise CorruptObject("no DICOM Part 10 file", Reason.NOT_DICOM) from exc
    except OSError as exc:
        if exc.errno is not None:  # the disk's; pydicom's own, of a broken sequence, has none
            raise
        raise CorruptObject("breaks off within a sequence") from exc
    except Exception as exc:  # pydicom raises whatever its parsers meet: 8 types in 355 bad files
        raise CorruptObject(f"cannot be parsed: {type(exc).__name__}") from exc


@dataclass(frozen=True, slots=True)
class Identity:
    """Which object a file holds, how it is encoded, whose it is, and where it came from."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    study_uid: str
    series_uid: str
    patient: PatientKey  # the issuer is empty where the data set names none
    sender: str  # AE title, as the receiver wrote it to the file; empty: unknown
    # SOP Instance UIDs, as far as it tells; None: it is none that was made of others afterwards.
    derived_from: frozenset[str] | None


def identity(source: Path | BinaryIO) -> Identity:
    """Return which object a DICOM Part 10 file holds, of which little is read.

    Raises
    ------
    CorruptObject
        If it is no DICOM file, or does not tell.
    OSError
        If the disk does not give it.
    """
    if isinstance(source, Path):
        with open(source, "rb") as file:
            return identity(file)
    try:
        ds = read_partial(source, stop_when=_beyond_identity)
        syntax = str(ds.file_meta.TransferSyntaxUID)
        if syntax == DeflatedExplicitVRLittleEndian:
            source.seek(0)
            ds = read(source, pixels=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's value warnings quote the value
            return Identity(
                str(ds.SOPClassUID),
                str(ds.SOPInstanceUID),
                syntax,
                text(ds, "StudyInstanceUID"),
                text(ds, "SeriesInstanceUID"),
                patient_key(text(ds, "PatientID"), text(ds, "IssuerOfPatientID"), ""),
                calling_ae_title(ds),
                _derived_from(ds),
            )
    except CorruptObject:
        raise
    except InvalidDicomError as exc:
        raise CorruptObject("no DICOM Part 10 file", Reason.NOT_DICOM) from exc
    except Exception as exc:  # as above
        if isinstance(exc, OSError) and exc.errno is not None:
            raise
        raise CorruptObject(f"cannot be parsed: {type(exc).__name__}") from exc


def _derived_from(ds: Dataset) -> frozenset[str] | None:
    """Return the images of which one was made after the examination (PS3.3 C.7.6.1.1.2, .4)."""
    if image_type(ds)[:2] != ("DERIVED", "SECONDARY"):
        return None

    def sources() -> frozenset[str]:
        items = ds.get("SourceImageSequence") or []
        return frozenset(text(item, "ReferencedSOPInstanceUID") for item in items)

    return optional(sources) or frozenset()


def with_group_length(data: bytes) -> bytes:
    """Return a DICOM Part 10 file whose meta information says how long it is (PS3.10 7.1).

    Some that were written to media leave that out. The data set stays as it is.

    Raises
    ------
    CorruptObject
        If it is no DICOM file.
    """
    if data[132:140] == b"\x02\x00\x00\x00UL\x04\x00":
        return data
    source, file = BytesIO(data), BytesIO()
    try:
        read_preamble(source, False)
        meta = FileMetaDataset(
            read_dataset(
                source, is_implicit_VR=False, is_little_endian=True, stop_when=_beyond_meta
            )
        )
        meta.FileMetaInformationGroupLength = 0  # is worked out
        file.write(data[:128] + b"DICM")
        pydicom.filewriter.write_file_meta_info(file, meta, enforce_standard=False)
    except Exception as exc:  # as above
        raise CorruptObject(f"cannot be parsed: {type(exc).__name__}") from exc
    return file.getvalue() + source.read()


def _beyond_identity(tag: BaseTag, vr: str | None, length: int) -> bool:
    return int(tag) > 0x0020000E  # Series Instance UID


def inflate(data: bytes | memoryview) -> bytes:
    """Return what a deflated data set holds (PS3.5 A.5).

    Raises
    ------
    CorruptObject
        If that is more than `MAX_INFLATED` bytes, or the stream breaks off.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, MAX_INFLATED)
    except zlib.error as exc:
        raise CorruptObject("cannot be inflated") from exc
    if inflater.eof:
        return inflated
    if len(inflated) == MAX_INFLATED:
        raise CorruptObject(f"inflates to more than {MAX_INFLATED} bytes")
    raise CorruptObject("breaks off within deflated data")


def _inflated(source: BinaryIO) -> BinaryIO:
    """The same file; where its data set is deflated, with that inflated, within bounds."""
    start = source.tell()
    head = source.read(_META_BYTES)
    source.seek(start)
    if _DEFLATED not in head:
        return source
    read_preamble(source, False)
    meta = read_dataset(source, is_implicit_VR=False, is_little_endian=True, stop_when=_beyond_meta)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        source.seek(start)
        return source
    body = inflate(source.read())
    file = BytesIO()
    file.write(bytes(128) + b"DICM")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    pydicom.filewriter.write_dataset(_little_endian(file), meta)
    file.write(body)
    file.seek(0)
    return file


def _little_endian(file: BytesIO) -> pydicom.filebase.DicomFileLike:
    like = pydicom.filebase.DicomFileLike(file)
    like.is_little_endian, like.is_implicit_VR = True, False
    return like


def _beyond_meta(tag: BaseTag, vr: str | None, length: int) -> bool:
    return bool(tag >> 16 != 2)


def header_of(ds: Dataset, *, calling_ae_title: str = "", default_issuer: str = "") -> SliceHeader:
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
                sop_class_uid=text(ds, "SOPClassUID"),
                sop_instance_uid=text(ds, "SOPInstanceUID"),
                series_uid=text(ds, "SeriesInstanceUID"),
                study_uid=text(ds, "StudyInstanceUID"),
                patient=patient_key(
                    text(ds, "PatientID"), text(ds, "IssuerOfPatientID"), default_issuer
                ),
                study_datetime=study_datetime(text(ds, "StudyDate"), text(ds, "StudyTime")),
                modality=text(ds, "Modality"),
                image_type=image_type(ds),
                image_position=floats(ds, "ImagePositionPatient", 3),
                image_orientation=floats(ds, "ImageOrientationPatient", 6),
                pixel_spacing=floats(ds, "PixelSpacing", 2),
                rows=integer(ds, "Rows") or 0,
                columns=integer(ds, "Columns") or 0,
                number_of_frames=integer(ds, "NumberOfFrames") or 1,
                frame_of_reference_uid=text(ds, "FrameOfReferenceUID"),
                body_part_examined=text(ds, "BodyPartExamined"),
                manufacturer=text(ds, "Manufacturer"),
                expected_instances=integer(ds, "NumberOfSeriesRelatedInstances"),
                issuer_is_default=not text(ds, "IssuerOfPatientID"),
                calling_ae_title=calling_ae_title,
                acquisition=_acquisition(ds),
            )
        except CorruptObject:
            raise
        except Exception as exc:  # a broken element surfaces only when it is converted
            raise CorruptObject(f"header cannot be read: {type(exc).__name__}") from exc


def _acquisition(ds: Dataset) -> Acquisition:
    return Acquisition(
        acquisition_number=optional(lambda: integer(ds, "AcquisitionNumber")),
        temporal_position=optional(lambda: integer(ds, "TemporalPositionIdentifier")),
        trigger_time_ms=optional(lambda: finite(ds, "TriggerTime")),
        content_time=optional(lambda: text(ds, "ContentTime")) or "",
        patient_position=optional(lambda: text(ds, "PatientPosition")) or "",
    )


def optional(read: Callable[[], T]) -> T | None:
    """Return what is read, None where it cannot be: nothing that a slice needs."""
    try:
        return read()
    except Exception:  # a broken element surfaces only when it is converted
        return None


def finite(ds: Dataset, keyword: str) -> float | None:
    """Return the number of an element, None where it has none."""
    values = floats(ds, keyword, 1)
    return values[0] if values and math.isfinite(values[0]) else None


def calling_ae_title(ds: Dataset) -> str:
    """Return who sent an Instance, as the receiver wrote it to the file; "" where it is unknown.

    Raises
    ------
    CorruptObject
        If it cannot be read.
    """
    try:
        return str(ds.file_meta.get("SourceApplicationEntityTitle", "")).strip()
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
    return pixels.to_hu(*stored(ds))


def stored(ds: Dataset) -> tuple[Stored, pixels.Rescale]:
    """Return the stored values of a single-frame CT Instance, (R, C), and what makes HU of them.

    Raises as `image_hu` does.
    """
    rows, columns = integer(ds, "Rows") or 0, integer(ds, "Columns") or 0
    if not 0 < rows * columns <= MAX_PIXELS or min(rows, columns) < 0:
        raise CorruptObject(f"{rows} x {columns} pixels", Reason.PIXEL_DATA)
    if "PixelData" not in ds:
        raise CorruptObject("no pixel data", Reason.PIXEL_DATA)
    told = syntax(ds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # trailing padding, odd lengths: harmless, and many
            _check_frames(ds)
            if told in codecs.KNOWN:
                frame = next(generate_frames(ds.PixelData, number_of_frames=1))
                image = codecs.encapsulated(layout(ds), [frame])
            elif not is_native(told):
                raise UnsupportedObject(f"transfer syntax {told}")
            else:
                image = ds.pixel_array
    except DicomError:
        raise
    except Exception as exc:  # parsers raise whatever they meet
        raise CorruptObject(
            f"pixel data do not decode: {type(exc).__name__}", Reason.PIXEL_DATA
        ) from exc
    if image is None:
        raise CorruptObject("pixel data do not decode", Reason.PIXEL_DATA)
    if image.shape != (rows, columns):
        raise CorruptObject(f"pixel data of shape {image.shape}", Reason.PIXEL_DATA)
    return image, rescale(ds)


def layout(ds: Dataset) -> Layout:
    """Return how the pixels of a data set are stored.

    Raises
    ------
    CorruptObject
        If that cannot be read.
    """
    try:
        return Layout(
            syntax(ds),
            integer(ds, "Rows") or 0,
            integer(ds, "Columns") or 0,
            integer(ds, "SamplesPerPixel"),
            text(ds, "PhotometricInterpretation"),
            integer(ds, "BitsAllocated"),
            integer(ds, "BitsStored"),
            integer(ds, "PixelRepresentation"),
        )
    except Exception as exc:  # a broken element surfaces only when it is converted
        raise CorruptObject(
            f"pixels cannot be understood: {type(exc).__name__}", Reason.PIXEL_DATA
        ) from exc


def rescale(ds: Dataset, padded: Dataset | None = None) -> pixels.Rescale:
    """Return what makes HU of the stored values of a data set.

    Parameters
    ----------
    padded
        Which says what padding is, where `ds` is but a part of it.

    Raises
    ------
    CorruptObject
        If it is nothing that makes HU.
    """
    try:
        slope, intercept = floats(ds, "RescaleSlope", 1), floats(ds, "RescaleIntercept", 1)
        padding = _padding(ds if padded is None else padded)
    except Exception as exc:
        raise CorruptObject("rescale values cannot be read", Reason.PIXEL_DATA) from exc
    found = pixels.Rescale((slope or (1.0,))[0] or 1.0, (intercept or (0.0,))[0], padding)
    if not is_sound(found):
        told = found.slope, found.intercept
        raise CorruptObject(f"rescale slope and intercept {told}", Reason.PIXEL_DATA)
    return found


def is_sound(rescale: pixels.Rescale) -> bool:
    """Whether HU can come of it: no scanner writes more than a few thousand.

    NaN and 1e38 come from damaged headers.
    """
    return all(abs(value) <= MAX_RESCALE for value in (rescale.slope, rescale.intercept))


def image_type(ds: Dataset, keyword: str = "ImageType") -> tuple[str, ...]:
    """Return the values of Image Type or Frame Type, upper case."""
    return tuple(str(value).strip().upper() for value in _values(ds, keyword))


def floats(ds: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return so many numbers of an element, None where they are not as many, or no numbers."""
    try:
        values = tuple(float(v) for v in _values(ds, keyword))
    except (TypeError, ValueError):
        return None
    return values if len(values) == count else None


def syntax(ds: Dataset) -> str:
    """Return the transfer syntax of a data set."""
    return str(ds.file_meta.get("TransferSyntaxUID", "unknown"))


def is_native(transfer_syntax_uid: str) -> bool:
    """Whether pixels of a transfer syntax are uncompressed; of a private one nobody knows."""
    try:
        return not UID(transfer_syntax_uid).is_encapsulated
    except ValueError:  # a private one
        return False


def _check_frames(ds: Dataset) -> None:
    """See that there is one frame, and what a pixel takes: more would be made room for."""
    frames, samples = integer(ds, "NumberOfFrames") or 1, integer(ds, "SamplesPerPixel") or 1
    if frames != 1 or samples * (integer(ds, "BitsAllocated") or 1) > 64:
        raise CorruptObject(f"{frames} frames of {samples} samples", Reason.PIXEL_DATA)


def _values(ds: Dataset, keyword: str) -> list[Any]:
    value = ds.get(keyword)
    if value is None:
        return []
    return list(value) if isinstance(value, pydicom.multival.MultiValue) else [value]


def text(ds: Dataset, keyword: str) -> str:
    """Return the text of an element, "" where it has none."""
    # Of several values none is the value: two patients whose IDs begin alike must not become one.
    # Postgres stores no NUL; in DICOM it is padding.
    told = "\\".join(str(value) for value in _values(ds, keyword))
    return told.replace("\0", "").strip(" ")


def integer(ds: Dataset, keyword: str) -> int | None:
    """Return the whole number of an element, None where it has none."""
    values = floats(ds, keyword, 1)
    return int(values[0]) if values and math.isfinite(values[0]) else None


def _padding(ds: Dataset) -> tuple[int, int] | None:
    value = integer(ds, "PixelPaddingValue")
    if value is None:
        return None
    limit = integer(ds, "PixelPaddingRangeLimit")
    return value, value if limit is None else limit
