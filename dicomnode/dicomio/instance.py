"""From the bytes of one Instance to what the network sees of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from dicomnode.core import admission, geometry, outline, preprocess
from dicomnode.core.pixels import Rescale
from dicomnode.dicomio import codecs, dataset, scan
from dicomnode.errors import DicomError
from dicomnode.model import Reason, SliceHeader


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
    data = _bytes_of(source)
    issuers = default_issuers or {}
    scanned = scan.scan(data, issuers)
    if scanned is not None:
        header = scanned.header
    else:
        ds = dataset.read(BytesIO(data))
        calling = dataset.calling_ae_title(ds)
        header = dataset.header_of(ds, default_issuer=issuers.get(calling) or issuers.get("", ""))
    if reason := admission.refuse_slice(header):
        return Decoded(header, reason=reason)
    try:
        if scanned is not None and (image := _stored(scanned)) is not None:
            return _prepared(header, image, scanned.rescale, spec)
        image, rescale = dataset.stored(ds if scanned is None else dataset.read(BytesIO(data)))
        return _prepared(header, image, rescale, spec)
    except DicomError as exc:
        return Decoded(header, reason=exc.reason, detail=str(exc))


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
