"""Data sets gone wrong, at the door to DICOM bytes.

    python -m tests.fuzz.data_sets --count 10000 --seed 1

Part 10 files of every transfer syntax that is accepted have bytes, lengths, VRs, tags, delimiters
and codestreams changed, or are cut short. Each is decoded in a process of its own kind, which may
neither crash, hang nor grow, and gives a `Decoded` or a `DicomError`. What the scanner claims of
a header is compared to what pydicom has, and so are native pixels. Prints what came of them, and
fails with the case that broke: `--seed S --only CASE` does it again.
"""

import argparse
import json
import logging
import random
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import psutil
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicomnode import dicomio
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.dicomio import codecs, dataset, scan
from dicomnode.errors import DicomError
from tests.dicom import compress, ct_dataset, enhanced_ct, part10

SPEC = PreprocessSpec()
ISSUERS = {"": "HOSPITAL", "SCANNER": "SCANNERS"}
SIDE = 32
HANG_S = 60.0  # one case; the slowest took 0.2 s
GROWTH_MIB = 64.0  # from the first tenth of the cases to the last
UIDS = {
    "SOPInstanceUID": "1.2.3.4",
    "SeriesInstanceUID": "1.2.3",
    "StudyInstanceUID": "1.2",
    "FrameOfReferenceUID": "1.2.9",
}


def seeds() -> list[bytes]:
    """Return sound files of every accepted syntax, with all that headers hold."""
    files = [part10(_native(syntax)) for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian)]
    files += [part10(_native(ExplicitVRLittleEndian, plain=True))] * 2
    files.append(part10(_native(DeflatedExplicitVRLittleEndian)))
    big = _native(ExplicitVRBigEndian)
    big.PixelData = np.frombuffer(big.PixelData, "<i2").astype(">i2").tobytes()
    files.append(part10(big))
    for syntax in (
        RLELossless,
        JPEGLSLossless,
        JPEGLSNearLossless,
        JPEGLossless,
        JPEGLosslessSV1,
        JPEG2000Lossless,
        HTJ2KLossless,
    ):
        for fragments in (1, 2):
            files.append(part10(compress(_native(ExplicitVRLittleEndian), syntax, fragments)))
    files.append(part10(_baseline()))
    files += [part10(_enhanced(legacy)) for legacy in (False, True)]
    files += [
        part10(compress(_enhanced(), syntax, fragments))
        for syntax, fragments in ((JPEGLSLossless, 1), (RLELossless, 2), (JPEG2000Lossless, 1))
    ]
    return files


def _enhanced(legacy: bool = False) -> Dataset:
    slices = [_native(ExplicitVRLittleEndian, plain=True) for _ in range(3)]
    for k, one in enumerate(slices):
        one.ImagePositionPatient = ["-24", "-24", str(5 * k)]
    ds = enhanced_ct(slices, legacy=legacy)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.6"
    return ds


def _native(syntax: str, plain: bool = False) -> Dataset:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    body = np.where(x**2 + y**2 < 0.6, 1060, 24) + rng.normal(0, 9, (SIDE, SIDE))
    ds = ct_dataset(
        TransferSyntaxUID=syntax,
        PixelData=body.astype("<i2").tobytes(),
        Rows=SIDE,
        Columns=SIDE,
        PixelSpacing=["9", "9"],
        SpecificCharacterSet="ISO_IR 100",
        IssuerOfPatientID="ISSUER",
        PixelPaddingValue=-2000,
        NumberOfSeriesRelatedInstances="40",
        **UIDS,
    )
    ds.file_meta.SourceApplicationEntityTitle = "SCANNER"
    if plain:
        return ds
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "P5-0808E", "SRT", "CT"
    nested = Dataset()
    nested.PurposeOfReferenceCodeSequence = Sequence([code])
    nested.ReferencedSOPInstanceUID = "1.2.3.5"
    ds.ReferencedImageSequence = Sequence([nested, nested])
    ds.ProcedureCodeSequence = Sequence([code])
    ds["ReferencedImageSequence"].is_undefined_length = True
    for item in ds.ReferencedImageSequence:
        item.is_undefined_length_sequence_item = True
        item["PurposeOfReferenceCodeSequence"].is_undefined_length = True
    ds.private_block(0x0009, "MADE", create=True).add_new(1, "LO", "private")
    ds.private_block(0x0011, "MADE", create=True).add_new(2, "OB", bytes(range(64)))
    return ds


def _baseline() -> Dataset:
    ds = _native(ExplicitVRLittleEndian)
    ds.RescaleIntercept = "-100"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    del ds.PixelPaddingValue
    frame = bytes(
        imagecodecs.jpeg8_encode(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, -1))
    )
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return ds


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a file with one to four things wrong."""
    whole = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(MUTATIONS)(whole, rng)
    return bytes(whole)


def _flip_header(whole: bytearray, rng: random.Random) -> None:
    end = whole.rfind(b"\xe0\x7f\x10\x00")
    whole[rng.randrange(128, max(end, 140) + 12) % len(whole)] = rng.randrange(256)


def _flip_bit(whole: bytearray, rng: random.Random) -> None:
    whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)


def _flip_pixels(whole: bytearray, rng: random.Random) -> None:
    begin = max(whole.rfind(b"\xe0\x7f\x10\x00"), 0)
    for _ in range(rng.choice((1, 3, 20))):
        whole[rng.randrange(begin, len(whole))] = rng.randrange(256)


def _flip_frame_head(whole: bytearray, rng: random.Random) -> None:
    begin = max(whole.rfind(b"\xe0\x7f\x10\x00"), 0) + 20
    at = min(begin + rng.randrange(120), len(whole) - 1)
    whole[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _change_vr(whole: bytearray, rng: random.Random) -> None:
    vrs = [bytes(vr) for vr in (*scan._LONG, *scan._SHORT, b"??", b"\0\0", b"ZZ")]
    at = _any(whole, rng.choice(vrs), rng)
    whole[at : at + 2] = rng.choice(vrs)


def _change_length(whole: bytearray, rng: random.Random) -> None:
    at = _any(whole, rng.choice(TAGS), rng) + 4
    if rng.random() < 0.5:
        at += 2
    value = rng.choice((0, 1, 2, 3, 7, 8, 0x7FFF, 0xFFFF, rng.randrange(1 << 16)))
    whole[at : at + 2] = value.to_bytes(2, "little")
    if rng.random() < 0.2:
        whole[at : at + 4] = rng.choice((b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\1\0"))


def _change_value(whole: bytearray, rng: random.Random) -> None:
    at = _any(whole, rng.choice(TAGS), rng) + 8
    value = rng.choice(VALUES)
    whole[at : at + len(value)] = value


def _change_delimiter(whole: bytearray, rng: random.Random) -> None:
    delimiters = (b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0")
    at = _any(whole, rng.choice(delimiters), rng)
    whole[at : at + 4] = rng.choice((*delimiters, b"\xe0\x7f\x10\x00", bytes(4)))


def _swap_tag(whole: bytearray, rng: random.Random) -> None:
    at = _any(whole, rng.choice(TAGS), rng)
    whole[at : at + 4] = rng.choice(TAGS)


def _insert(whole: bytearray, rng: random.Random) -> None:
    at = _place(whole, rng)
    whole[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))


def _delete(whole: bytearray, rng: random.Random) -> None:
    at = _place(whole, rng)
    del whole[at : at + rng.choice((1, 2, 8, 100))]
    whole.extend(b"" if whole else b"\0")


def _repeat(whole: bytearray, rng: random.Random) -> None:
    at = _place(whole, rng)
    part = whole[at : at + rng.choice((8, 20, 300))]
    whole[at:at] = part


def _truncate(whole: bytearray, rng: random.Random) -> None:
    keep = rng.randrange(len(whole)) if rng.random() < 0.7 else len(whole) - rng.randrange(1, 40)
    del whole[max(keep, 0) :]
    whole.extend(b"" if whole else b"\0")


def _append(whole: bytearray, rng: random.Random) -> None:
    whole.extend(
        rng.choice((b"\0", bytes(8), rng.randbytes(30), b"\xe0\x7f\x10\x00OW\0\0\2\0\0\0ab"))
    )


def _place(whole: bytearray, rng: random.Random) -> int:
    return rng.randrange(min(132, len(whole) - 1), len(whole))


def _any(whole: bytearray, what: bytes, rng: random.Random) -> int:
    """Where one of the occurrences lies; anywhere where there is none."""
    places, at = [], whole.find(what, 132)
    while at >= 0:
        places.append(at)
        at = whole.find(what, at + 1)
    return rng.choice(places) if places else rng.randrange(max(len(whole), 1))


TAGS = [
    (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")
    for tag in (*scan._WANTED, 0x00020010, 0x00081140, 0x0040A170, 0x00081032, 0x00090010)
]
VALUES = [
    b"1e400", b"nan", b"inf\\1", b"-1", b"1_0", b"0x10", b"\xc4\xa4", b"a\\b", b"\x1b$B", b"~",
    b"\0", b"9" * 16, b"LOCALIZER", b"\xff\xff", b"\xff\xff\xff\xff", b"  ", b"1.2.840.10008.1.2 ",
    b"ISO_IR 13", b"ISO 2022 IR 87", b"1.2.840.10008.1.2.4.90", b"\1\0", b"\0\x80", b"+5", b"1 2",
]  # fmt: skip
MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    _flip_header, _flip_header, _flip_bit, _flip_pixels, _flip_frame_head, _flip_frame_head,
    _change_vr, _change_length, _change_length, _change_value, _change_value, _change_delimiter,
    _swap_tag, _insert, _delete, _repeat, _truncate, _append,
]  # fmt: skip


class Broke(AssertionError):
    """What was to hold did not."""


def outcome(data: bytes) -> str:
    """Return what became of a file, in a word or two.

    Raises
    ------
    Broke
        If the scanner says anything that pydicom does not.
    """
    try:
        decoded = dicomio.decode(data, SPEC, ISSUERS)
        if any((d.input is None) != (d.reason is not None) for d in decoded):
            raise Broke("neither an input nor a reason, or both")
        if [d.header.frame for d in decoded] != list(range(1, len(decoded) + 1)):
            raise Broke("Frames are not counted from 1")
        reason = next((d.reason for d in decoded if d.reason), None)
        told = f"reason {reason}" if reason else "decoded"
    except DicomError as exc:
        told = f"error {exc.reason}"
    scanned = scan.scan(memoryview(data), ISSUERS)
    if scanned is None:
        return told
    try:
        ds = dataset.read(BytesIO(data))
        calling = dataset.calling_ae_title(ds)
        issuer = ISSUERS.get(calling) or ISSUERS[""]
        header = dataset.header_of(ds, calling_ae_title=calling, default_issuer=issuer)
    except DicomError as exc:
        raise Broke(f"the scanner claims what cannot be read: {exc}") from exc
    if header != scanned.header:
        raise Broke(f"headers differ:\n{scanned.header}\n{header}")
    if scanned.pixel_data is not None and scanned.header.number_of_frames == 1:
        _same_pixels(scanned, ds)
    return told + ", scanned"


def _same_pixels(scanned: scan.Scanned, ds: Dataset) -> None:
    got = codecs.native(scanned.layout, scanned.pixel_data)
    if got is None:
        return
    try:
        expected = ds.pixel_array
    except Exception as exc:
        raise Broke(f"pixels that pydicom does not have: {exc}") from exc
    if expected.dtype != got.dtype or not np.array_equal(expected, got):
        raise Broke("pixels differ")
    try:
        rescale = dataset.rescale(ds)
    except DicomError:
        if dataset.is_sound(scanned.rescale):
            raise
        return
    if rescale != scanned.rescale:
        raise Broke(f"{scanned.rescale} in place of {rescale}")


def case(files: list[bytes], seed: int, number: int) -> bytes:
    """Return the file of one case."""
    rng = random.Random(f"{seed}/{number}")
    return mutated(files[number % len(files)], rng)


def child(seed: int, first: int, count: int) -> None:
    """Do some cases: a line with the number of each, then one with what came of it."""
    quiet()
    files = seeds()
    for number in range(first, first + count):
        print(number, flush=True)
        try:
            told = outcome(case(files, seed, number))
        except Exception:  # whatever it is, it is what is looked for
            told = "BROKE " + traceback.format_exc()
        print(json.dumps([told, psutil.Process().memory_info().rss]), flush=True)


def quiet() -> None:
    """Keep pydicom from telling of each thing that is wrong, as the node does."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")


def run(count: int, seed: int, hang_s: float = HANG_S) -> dict[str, Any]:
    """Return the counts by outcome, the rate, memory before and after, and what broke."""
    outcomes: Counter[str] = Counter()
    broke: list[str] = []
    rss: list[int] = []
    started, number = time.monotonic(), 0
    while number < count:
        arguments = ["-m", "tests.fuzz.data_sets", "--child", str(number), "--seed", str(seed)]
        arguments += ["--count", str(count - number)]
        for line in watched(arguments, count - number, hang_s):
            if isinstance(line, str):
                broke.append(f"case {number}: {line}")
                outcomes[line.split()[0]] += 1
            else:
                told, now = line
                rss.append(now)
                outcomes[told.split()[0] if told.startswith("BROKE") else told] += 1
                if told.startswith("BROKE"):
                    broke.append(f"case {number}: {told}")
            number += 1
    tenth = max(len(rss) // 10, 1)
    return {
        "cases": count,
        "seed": seed,
        "cases_per_s": count / (time.monotonic() - started),
        "outcomes": dict(outcomes.most_common()),
        "rss_mib": [
            round(float(np.median(part)) / 2**20, 1) for part in (rss[:tenth], rss[-tenth:])
        ],
        "peak_mib": round(max(rss, default=0) / 2**20, 1),
        "broke": broke,
    }


def watched(arguments: list[str], count: int, hang_s: float) -> Iterator[tuple[str, int] | str]:
    """What a Python process says of its cases; a text where it died or hung, and then no more."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    try:
        for _ in range(count):
            begun = time.monotonic()
            timer = threading.Timer(hang_s, process.kill)
            timer.start()
            _, told = process.stdout.readline(), process.stdout.readline()
            timer.cancel()
            if told:
                yield tuple(json.loads(told))
                continue
            hung = time.monotonic() - begun >= hang_s
            yield "HANG" if hung else f"CRASH {process.wait()}: {process.stderr.read()[-500:]}"
            return
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="do this case alone, in this process")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.seed, options.child, options.count)
        return 0
    if options.only is not None:
        quiet()
        print(outcome(case(seeds(), options.seed, options.only)))
        return 0
    result = run(options.count, options.seed)
    print(json.dumps(result, indent=1))
    return 1 if result["broke"] else 0


if __name__ == "__main__":
    sys.exit(main())
