"""File Meta Information of what is received, written by hand."""

import struct

from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID, PYNETDICOM_IMPLEMENTATION_VERSION


def file_meta(
    sop_class_uid: str,
    sop_instance_uid: str,
    transfer_syntax_uid: str,
    *,
    calling_ae_title: str,
    called_ae_title: str,
) -> bytes:
    """Return preamble, prefix and File Meta Information (PS3.10 Table 7.1-1) of an Instance."""
    # Written by hand: pydicom takes 0.23 ms a slice, and objects to a UID that is none, which
    # is for the worker to judge.
    elements = b"".join(
        (
            struct.pack("<HH2sHI2s", 0x0002, 0x0001, b"OB", 0, 2, b"\x00\x01"),
            _element(0x0002, "UI", sop_class_uid),
            _element(0x0003, "UI", sop_instance_uid),
            _element(0x0010, "UI", transfer_syntax_uid),
            _element(0x0012, "UI", PYNETDICOM_IMPLEMENTATION_UID),
            _element(0x0013, "SH", PYNETDICOM_IMPLEMENTATION_VERSION),
            _element(0x0016, "AE", calling_ae_title),  # Source
            _element(0x0017, "AE", calling_ae_title),  # Sending
            _element(0x0018, "AE", called_ae_title),  # Receiving
        )
    )
    length = struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(elements))
    return bytes(128) + b"DICM" + length + elements


def _element(element: int, vr: str, text: str) -> bytes:
    value = text.encode("ascii", errors="replace")
    if len(value) % 2:
        value += b"\0" if vr == "UI" else b" "
    return struct.pack("<HH2sH", 0x0002, element, vr.encode(), len(value)) + value
