"""Frames of Enhanced CT and Legacy Converted Enhanced CT Instances, each with what it says."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from dicomnode.core.pixels import Rescale
from dicomnode.dicomio import codecs, dataset
from dicomnode.dicomio.scan import Layout, Scanned
from dicomnode.errors import CorruptObject, DicomError, UnsupportedObject
from dicomnode.model import Acquisition, Reason, SliceHeader

# A native Frame, or the fragments of a compressed one.
Raw = memoryview | tuple[memoryview, ...]

MAX_FRAMES = 20_000  # of one Instance; more is a damaged header


@dataclass(frozen=True, slots=True)
class Frame:
    """One Frame: what it says, and what makes HU of it, or why nothing does."""

    header: SliceHeader
    rescale: Rescale | CorruptObject


def headers(ds: Dataset, header: SliceHeader) -> list[Frame]:
    """Return what each Frame of a multi-frame Instance says of itself, in their stored order.

    Parameters
    ----------
    ds
        Its data set; pixels are not looked at.
    header
        What it says as a whole.

    Raises
    ------
    CorruptObject
        If functional groups and the number of Frames do not fit each other.

    References
    ----------
    DICOM PS3.3 C.7.6.16 (functional groups), C.8.15.3 (CT frame type, pixel value transformation).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's value warnings quote the value
        try:
            shared = _first(ds, "SharedFunctionalGroupsSequence")
            groups = list(ds.get("PerFrameFunctionalGroupsSequence") or [])
            count = header.number_of_frames
            if not 0 < count <= MAX_FRAMES or len(groups) != count:
                raise CorruptObject(f"{len(groups)} functional groups of {count} Frames")
            return [
                _frame(own, shared, ds, replace(header, frame=k))
                for k, own in enumerate(groups, start=1)
            ]
        except CorruptObject:
            raise
        except Exception as exc:  # a broken element surfaces only when it is converted
            raise CorruptObject(f"Frames cannot be read: {type(exc).__name__}") from exc


def _frame(own: Dataset, shared: Dataset, ds: Dataset, header: SliceHeader) -> Frame:
    def group(keyword: str) -> Dataset:
        return _first(own, keyword) or _first(shared, keyword)

    kind = dataset.image_type(group("CTImageFrameTypeSequence"), "FrameType")
    try:
        rescale: Rescale | CorruptObject = dataset.rescale(
            group("PixelValueTransformationSequence"), ds
        )
    except CorruptObject as exc:
        rescale = exc
    return Frame(
        replace(
            header,
            image_type=kind or header.image_type,
            image_position=dataset.floats(
                group("PlanePositionSequence"), "ImagePositionPatient", 3
            ),
            image_orientation=dataset.floats(
                group("PlaneOrientationSequence"), "ImageOrientationPatient", 6
            ),
            pixel_spacing=dataset.floats(group("PixelMeasuresSequence"), "PixelSpacing", 2),
            acquisition=_acquisition(group, header.acquisition),
        ),
        rescale,
    )


def _acquisition(group: Callable[[str], Dataset], whole: Acquisition) -> Acquisition:
    """What tells Frames of one place apart (PS3.3 C.7.6.16.2.2, C.7.6.16.2.7)."""
    content, cardiac = group("FrameContentSequence"), group("CardiacSynchronizationSequence")
    optional = dataset.optional
    time = optional(lambda: dataset.text(content, "FrameReferenceDateTime")) or optional(
        lambda: dataset.text(content, "FrameAcquisitionDateTime")
    )
    return Acquisition(
        acquisition_number=optional(lambda: dataset.integer(content, "FrameAcquisitionNumber")),
        temporal_position=optional(lambda: dataset.integer(content, "TemporalPositionIndex")),
        trigger_time_ms=optional(lambda: dataset.finite(cardiac, "NominalCardiacTriggerDelayTime")),
        content_time=time or "",
        stack_id=optional(lambda: dataset.text(content, "StackID")) or "",
        patient_position=whole.patient_position,
    )


def _first(ds: Dataset, keyword: str) -> Dataset:
    items = ds.get(keyword)
    return items[0] if items else Dataset()


def of_scanned(scanned: Scanned) -> list[Raw] | None:
    """Return the Frames of a file as views of it; None where it is for pydicom to part them.

    Raises
    ------
    CorruptObject
        If they are short.
    """
    layout, count = scanned.layout, scanned.header.number_of_frames
    if scanned.pixel_data is not None:
        size = layout.rows * layout.columns * (layout.bits_allocated or 0) // 8
        if len(scanned.pixel_data) < count * size:
            raise CorruptObject(
                f"{len(scanned.pixel_data)} bytes for {count} Frames of {size}", Reason.PIXEL_DATA
            )
        if layout.bits_allocated != 16:
            return None
        return [scanned.pixel_data[k * size : (k + 1) * size] for k in range(count)]
    if scanned.fragments is None:
        raise CorruptObject("no pixel data", Reason.PIXEL_DATA)
    return _parted(scanned.fragments, scanned.offsets, count)


def _parted(
    fragments: tuple[memoryview, ...], offsets: tuple[int, ...], count: int
) -> list[Raw] | None:
    """The fragments of each Frame: one, or as the Basic Offset Table has it (PS3.5 A.4)."""
    if len(fragments) == count:
        return [(fragment,) for fragment in fragments]
    starts = accumulate((8 + len(f) for f in fragments), initial=0)
    places = {start: k for k, start in enumerate(starts)}
    if len(offsets) != count or offsets[0] or not all(place in places for place in offsets):
        return None
    ends = [*(places[place] for place in offsets), len(fragments)]
    if any(a >= b for a, b in pairwise(ends)):
        return None
    return [fragments[a:b] for a, b in pairwise(ends)]


def of_dataset(ds: Dataset, count: int) -> Iterator[Raw | int]:
    """Return the Frames of a data set one by one; the index of each where they are native.

    Raises
    ------
    UnsupportedObject
        If no decoder for its transfer syntax is at hand.
    """
    syntax = dataset.syntax(ds)
    if "PixelData" not in ds:
        raise CorruptObject("no pixel data", Reason.PIXEL_DATA)
    if dataset.is_native(syntax):
        yield from range(count)
    elif syntax in codecs.KNOWN:
        tables = None
        if "ExtendedOffsetTable" in ds:
            tables = ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths
        for frame in generate_frames(ds.PixelData, number_of_frames=count, extended_offsets=tables):
            yield (memoryview(frame),)
    else:
        raise UnsupportedObject(f"transfer syntax {syntax}")


def stored(layout: Layout, raw: Raw | int, ds: Dataset | None) -> codecs.Stored:
    """Return the stored values of one Frame, (R, C).

    Raises
    ------
    CorruptObject
        If it is short, or does not decode.
    """
    if not 0 < layout.rows * layout.columns <= dataset.MAX_PIXELS:
        raise CorruptObject(f"{layout.rows} x {layout.columns} pixels", Reason.PIXEL_DATA)
    try:
        if isinstance(raw, memoryview):
            image = codecs.native(layout, raw)
        elif isinstance(raw, tuple):
            image = codecs.encapsulated(layout, raw)
        else:
            assert ds is not None
            if (layout.samples_per_pixel, layout.bits_allocated) not in ((1, 8), (1, 16)):
                raise CorruptObject("pixels of another kind", Reason.PIXEL_DATA)
            image, _ = get_decoder(UID(layout.transfer_syntax_uid)).as_array(ds, index=raw)
    except DicomError:
        raise
    except Exception as exc:  # pydicom raises whatever its decoders meet
        raise CorruptObject(
            f"pixel data do not decode: {type(exc).__name__}", Reason.PIXEL_DATA
        ) from exc
    if image is None or image.shape != (layout.rows, layout.columns):
        raise CorruptObject("pixel data do not decode", Reason.PIXEL_DATA)
    return image
