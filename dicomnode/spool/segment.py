"""The bytes of a journal: a segment's header, its records, and the marks of what was dealt with.

A segment is a file of fixed size: one page of header, then records, each from the start of a
page on, so that no write ever touches a page that holds acknowledged bytes. All numbers are
little-endian.
"""

import hashlib
import os
import struct
from dataclasses import dataclass

from crc32c import crc32c

from dicomnode.spool.disk import Bytes

PAGE = 4096
# END tells that no record follows.
END = "end"
KINDS = ("dcm", "released", "aborted", "started", END)
RECORD_BYTES = 64  # of a record's own header, before its payload
TOKEN_BYTES = 8

_MAGIC = b"dicomseg"
_VERSION = 1
_RECYCLABLE = 1
_COPIES = (0, 2048)  # the header twice, so that one bad sector does not hide a segment
# magic, version, flags, number, nonce, size, created, CRC of what is before it
_HEADER = struct.Struct("<8sIIQ8sQQI")
_RECORD_MAGIC = b"drec"
# magic, kind, nonce, association, time, length, synced, index, CRC of the payload, CRC of the rest
_RECORD = struct.Struct("<4sI8s8sQQQII")
_CRC = struct.Struct("<II")  # reserved, CRC of what is before it
_LOOK = 1 << 20


@dataclass(frozen=True, slots=True)
class Header:
    """Whose records a segment holds: those that carry its nonce."""

    number: int  # grows within a slot
    nonce: bytes  # 8 random bytes, others each time the file is used again
    size: int
    created_ns: int
    recyclable: bool  # else the file goes when all in it was dealt with

    def pack(self) -> bytes:
        """Return the first page of the segment."""
        fields = (_MAGIC, _VERSION, _RECYCLABLE * self.recyclable, self.number, self.nonce)
        head = _HEADER.pack(*fields, self.size, self.created_ns, 0)[:-4]
        page = bytearray(PAGE)
        for start in _COPIES:
            page[start : start + len(head)] = head
            struct.pack_into("<I", page, start + len(head), crc32c(head))
        return bytes(page)


@dataclass(frozen=True, slots=True)
class Record:
    """One Instance or event in a segment."""

    kind: str  # of KINDS
    association_id: str
    time_ns: int
    length: int
    synced: int  # all before this offset was on stable storage when the record was written
    index: int  # counts the records of a segment
    payload_crc: int
    offset: int

    @property
    def end(self) -> int:
        """The offset of the next record."""
        return self.offset + span(self.length)

    def pack(self, nonce: bytes) -> bytes:
        """Return the record's own header."""
        head = _RECORD.pack(
            _RECORD_MAGIC,
            KINDS.index(self.kind),
            nonce,
            bytes.fromhex(self.association_id),
            self.time_ns,
            self.length,
            self.synced,
            self.index,
            self.payload_crc,
        )
        return head + _CRC.pack(0, crc32c(head))


def span(length: int) -> int:
    """Return the bytes that a record of so many bytes of payload takes, whole pages."""
    return -(-(RECORD_BYTES + length) // PAGE) * PAGE


def tokens_size(size: int) -> int:
    """Return the bytes that the marks of a segment of that size take at most."""
    return -(-(size // PAGE) * TOKEN_BYTES // PAGE) * PAGE


def token(nonce: bytes, index: int) -> bytes:
    """Return what says of one record that it was dealt with.

    It is like nothing that a power cut could leave in its place: neither zeros, nor the token of
    another record, nor that of an earlier use of the same file.
    """
    return hashlib.blake2b(index.to_bytes(8, "little"), key=nonce, digest_size=8).digest()


def read_header(fd: int) -> Header | None:
    """Return the header of a segment, None where neither copy of it is sound."""
    page = _page(fd, PAGE, 0)
    for start in _COPIES:
        raw = page[start : start + _HEADER.size]
        if len(raw) < _HEADER.size:
            continue
        magic, version, flags, number, nonce, size, created, crc = _HEADER.unpack(raw)
        if (magic, version) == (_MAGIC, _VERSION) and crc == crc32c(raw[:-4]):
            return Header(number, nonce, size, created, bool(flags & _RECYCLABLE))
    return None


def recover_header(fd: int, number: int) -> Header | None:
    """Return what the first sound record says of a segment whose header is damaged."""
    size = os.fstat(fd).st_size
    found = _first(fd, PAGE, size, None)
    if found is None:
        return None
    nonce, record = found
    return Header(number, nonce, size, record.time_ns - 1, recyclable=False)


def read_record(fd: int, offset: int, header: Header) -> Record | None:
    """Return the record that begins there, None where none does."""
    if offset + PAGE > header.size:
        return None
    found = _parse(_page(fd, RECORD_BYTES, offset), offset, header.size)
    return found[1] if found is not None and found[0] == header.nonce else None


def find_record(fd: int, offset: int, header: Header) -> Record | None:
    """Return the first record that begins there or later, None where none does."""
    found = _first(fd, offset, header.size, header.nonce)
    return None if found is None else found[1]


def payload_is_sound(fd: int, record: Record) -> bool:
    """Whether the payload is what was written."""
    at, crc = record.offset + RECORD_BYTES, 0
    end = at + record.length
    try:
        while at < end and (part := os.pread(fd, min(_LOOK, end - at), at)):
            at, crc = at + len(part), crc32c(part, crc)
    except OSError:  # the disk does not give it
        return False
    return at == end and crc == record.payload_crc


def checksum(parts: list[Bytes]) -> int:
    """Return the CRC-32C of the parts, one behind the other."""
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    return crc


def _first(fd: int, offset: int, size: int, nonce: bytes | None) -> tuple[bytes, Record] | None:
    for start in range(offset, size, _LOOK):
        data = _all_that_is_given(fd, min(_LOOK, size - start), start)
        for at in range(0, len(data), PAGE):
            if data[at : at + 4] == _RECORD_MAGIC:
                found = _parse(data[at : at + RECORD_BYTES], start + at, size)
                if found is not None and nonce in (None, found[0]):
                    return found
    return None


def _page(fd: int, size: int, offset: int) -> bytes:
    """Return what lies there, nothing where the disk does not give it: then none begins there."""
    try:
        return os.pread(fd, size, offset)
    except OSError:
        return b""


def _all_that_is_given(fd: int, size: int, offset: int) -> bytes:
    """Return what lies there, zeros for the pages that the disk does not give."""
    try:
        return os.pread(fd, size, offset)
    except OSError:
        places = range(offset, offset + size, PAGE)
        return b"".join(
            _page(fd, min(PAGE, offset + size - at), at).ljust(PAGE, b"\0") for at in places
        )


def _parse(raw: bytes, offset: int, size: int) -> tuple[bytes, Record] | None:
    if len(raw) < RECORD_BYTES:
        return None
    _, crc = _CRC.unpack_from(raw, _RECORD.size)
    if crc != crc32c(raw[: _RECORD.size]):
        return None
    magic, kind, nonce, association, time_ns, length, synced, index, payload_crc = (
        _RECORD.unpack_from(raw)
    )
    if magic != _RECORD_MAGIC or kind >= len(KINDS) or offset + span(length) > size:
        return None
    record = Record(
        KINDS[kind], association.hex(), time_ns, length, synced, index, payload_crc, offset
    )
    return nonce, record
