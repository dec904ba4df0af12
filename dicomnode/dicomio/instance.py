"""From the bytes of one Instance to what the network sees of it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from pydicom.dataset import Dataset

from dicomnode.core import admission, geometry, outline, preprocess
from dicomnode.core.pixels import Rescale
from dicomnode.dicomio import codecs, dataset, frames, rejection, scan
from dicomnode.errors import CorruptObject, DicomError
from dicomnode.model import Reason, Rejection, SliceHeader


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one Frame holds for the regressor: its input, or the reason why it has none."""

    header: SliceHeader
    input: preprocess.Input | None = None
    reason: Reason | None = None
    detail: str = ""
    body_centre_mm: tuple[float, float] | None = None  # x, y in LPS
    rejection: Rejection | None = None  # of a rejection note


def decode(
    source: Path | BinaryIO | bytes | bytearray | memoryview,
    spec: preprocess.PreprocessSpec,
    default_issuers: Mapping[str, str] | None = None,
) -> tuple[Decoded, ...]:
    """Return header and network input of each Frame of an Instance, in their stored order.

    One, but for Enhanced CT; one, too, where all of its Frames are refused alike.

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
    data = _bytes_of(source)
    issuers = default_issuers or {}
    scanned = scan.scan(data, issuers)
    if scanned is not None:
        ds, header = None, scanned.header
    else:
        ds = dataset.read(BytesIO(data))
        calling = dataset.calling_ae_title(ds)
        default_issuer = issuers.get(calling) or issuers.get("", "")
        header = dataset.header_of(ds, calling_ae_title=calling, default_issuer=default_issuer)
    if reason := admission.refuse_instance(header):
        if reason is Reason.NOT_CT and header.sop_class_uid == admission.KEY_OBJECT_SELECTION:
            return (_key_objects(data, ds, header),)
        return (Decoded(header, reason=reason),)
    if header.sop_class_uid in admission.ENHANCED_CT:
        return _frames(data, scanned, ds, header, spec)
    if reason := admission.refuse_slice(header):
        return (Decoded(header, reason=reason),)
    try:
        if scanned is not None and (image := _stored(scanned)) is not None:
            return (_prepared(header, image, scanned.rescale, spec),)
        ds = ds or dataset.read(BytesIO(data))
        if dataset.layout(ds).samples_per_pixel == 3:  # a picture of CT: PS3.3 C.8.2.1 has none
            return (Decoded(header, reason=Reason.NOT_CT),)
        image, rescale = dataset.stored(ds)
        return (_prepared(header, image, rescale, spec),)
    except DicomError as exc:
        return (Decoded(header, reason=exc.reason, detail=str(exc)),)


def _key_objects(data: memoryview, ds: Dataset | None, header: SliceHeader) -> Decoded:
    try:
        if len(data) > rejection.MAX_BYTES:
            raise CorruptObject(f"a Key Object Selection of {len(data)} bytes")
        note = rejection.of_dataset(ds or dataset.read(BytesIO(data)), header)
    except DicomError as exc:
        return Decoded(header, reason=exc.reason, detail=str(exc))
    return Decoded(header, reason=Reason.NOT_CT, rejection=note)


def _frames(
    data: memoryview,
    scanned: scan.Scanned | None,
    ds: Dataset | None,
    header: SliceHeader,
    spec: preprocess.PreprocessSpec,
) -> tuple[Decoded, ...]:
    """Frame by Frame, so that one image at a time is in memory."""
    try:
        if ds is None:  # what is said of Frames lies before their pixels
            before = data[: scanned.pixels_at] if scanned else data
            ds = dataset.read(BytesIO(before), pixels=False)
        found = frames.headers(ds, header)
        raws: Iterable[frames.Raw | int] | None = frames.of_scanned(scanned) if scanned else None
        if raws is None:
            ds = dataset.read(BytesIO(data)) if scanned else ds
            raws = frames.of_dataset(ds, len(found))
        layout = dataset.layout(ds)
    except DicomError as exc:
        return (Decoded(header, reason=exc.reason, detail=str(exc)),)
    return tuple(_decoded(frame, raw, layout, ds, spec) for frame, raw in _paired(found, raws))


def _paired(
    found: list[frames.Frame], raws: Iterable[frames.Raw | int]
) -> Iterator[tuple[frames.Frame, frames.Raw | int | DicomError]]:
    """Each Frame with its bytes; with what is wrong with the bytes from some Frame on."""
    waiting = iter(found)
    wrong: DicomError = CorruptObject("fewer Frames than told", Reason.PIXEL_DATA)
    try:
        for raw in raws:
            if (frame := next(waiting, None)) is None:
                return
            yield frame, raw
    except DicomError as exc:
        wrong = exc
    except Exception as exc:  # pydicom parts fragments lazily, and raises whatever it meets
        wrong = CorruptObject(f"Frames cannot be parted: {type(exc).__name__}", Reason.PIXEL_DATA)
    for frame in waiting:
        yield frame, wrong


def _decoded(
    frame: frames.Frame,
    raw: frames.Raw | int | DicomError,
    layout: scan.Layout,
    ds: Dataset,
    spec: preprocess.PreprocessSpec,
) -> Decoded:
    if reason := admission.refuse_slice(frame.header):
        return Decoded(frame.header, reason=reason)
    try:
        if isinstance(raw, DicomError):
            raise raw
        if isinstance(frame.rescale, DicomError):
            raise frame.rescale
        image = frames.stored(layout, raw, ds)
    except DicomError as exc:
        return Decoded(frame.header, reason=exc.reason, detail=str(exc))
    return _prepared(frame.header, image, frame.rescale, spec)


def _stored(scanned: scan.Scanned) -> codecs.Stored | None:
    header = scanned.header
    if header.rows * header.columns > dataset.MAX_PIXELS or not dataset.is_sound(scanned.rescale):
        return None
    if scanned.pixel_data is not None:
        return codecs.native(scanned.layout, scanned.pixel_data)
    return codecs.encapsulated(scanned.layout, scanned.fragments or ())


def _prepared(
    header: SliceHeader, image: codecs.Stored, rescale: Rescale, spec: preprocess.PreprocessSpec
) -> Decoded:
    position, orientation = header.image_position, header.image_orientation
    spacing = header.pixel_spacing
    assert position is not None and orientation is not None and spacing is not None
    x, middle = preprocess.crop(image, spacing, orientation, spec, rescale)
    if preprocess.is_empty(x, spec):
        return Decoded(header, reason=Reason.EMPTY)
    plane = geometry.plane(position, orientation, spacing, (header.rows, header.columns))
    return Decoded(header, x, body_centre_mm=outline.body_centre_mm(x, middle, plane, spec))


def _bytes_of(source: Path | BinaryIO | bytes | bytearray | memoryview) -> memoryview:
    if isinstance(source, Path):
        return memoryview(source.read_bytes())
    if isinstance(source, bytes | bytearray | memoryview):
        return memoryview(source)
    return memoryview(source.read())


def find(paths: list[Path]) -> Iterator[Path]:
    """Yield every file under the paths, sorted, hidden files and DICOMDIR aside."""
    for path in paths:
        if path.is_dir():
            for child in sorted(path.iterdir()):
                if not child.name.startswith(".") and child.name != "DICOMDIR":
                    yield from find([child])
        else:
            yield path
