"""The command sets of C-STORE, as bytes: request in, response out (PS3.7 9.3.1, 6.3.1)."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

C_STORE_RQ = 0x0001
C_STORE_RSP = 0x8001
NO_DATA_SET = 0x0101

# PS3.5 9.1: components without leading zeros, 64 characters at most.
_UID = re.compile(rb"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*")
_COMMENT_LENGTH = 64  # (0000,0902) is an LO

_ELEMENT = struct.Struct("<HHI")
_US = struct.Struct("<H")
_UL = struct.Struct("<I")
_PDU = struct.Struct(">BxIIBB")

_GROUP_LENGTH = 0x0000
_CLASS = 0x0002
_FIELD = 0x0100
_MESSAGE_ID = 0x0110
_RESPONDED_TO = 0x0120
_PRIORITY = 0x0700
_DATA_SET_TYPE = 0x0800
_STATUS = 0x0900
_COMMENT = 0x0902
_INSTANCE = 0x1000
_ORIGINATOR = 0x1030
_ORIGINATOR_ID = 0x1031

_NUMBERS = {_FIELD, _MESSAGE_ID, _PRIORITY, _DATA_SET_TYPE, _ORIGINATOR_ID}
_ALWAYS = (
    _GROUP_LENGTH,
    _CLASS,
    _FIELD,
    _MESSAGE_ID,
    _PRIORITY,
    _DATA_SET_TYPE,
    _INSTANCE,
)
# PS3.7 Table 9.3-1; in the order of their tags, as a data set has to be.
_REGULAR = {
    _ALWAYS,
    (*_ALWAYS, _ORIGINATOR),
    (*_ALWAYS, _ORIGINATOR_ID),
    (*_ALWAYS, _ORIGINATOR, _ORIGINATOR_ID),
}


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """A C-STORE request as it was received, without its data set."""

    context_id: int
    transfer_syntax_uid: str
    message_id: int
    affected_sop_class_uid: str
    affected_sop_instance_uid: str
    priority: int
    move_originator_ae_title: str | None = None
    move_originator_message_id: int | None = None


def decode_store_request(
    command: bytes, context_id: int, contexts: Mapping[tuple[int, str], str]
) -> StoreRequest | None:
    """Return the request of a perfectly regular C-STORE, None for whatever else.

    Regular is what every sender of ours writes: the elements of PS3.7 Table 9.3-1 and no other,
    ascending, of the right lengths, with the right group length, UIDs that are UIDs, the SOP
    Class of the context, and a data set to follow. None does not say that a command is wrong.

    Parameters
    ----------
    command
        A command set: Implicit VR Little Endian (PS3.7 6.3.1).
    context_id
        The presentation context it came on.
    contexts
        Transfer syntax UID by presentation context ID and abstract syntax: those accepted.
    """
    values: dict[int, bytes] = {}
    at = 0
    while at + 8 <= len(command):
        group, element, length = _ELEMENT.unpack_from(command, at)
        at += 8 + length
        if group or length % 2 or at > len(command) or element in values:
            return None
        values[element] = command[at - length : at]
    if at != len(command) or tuple(values) not in _REGULAR:
        return None

    numbers = {e: _US.unpack(v)[0] for e, v in values.items() if len(v) == 2 and e in _NUMBERS}
    sop_class_uid, sop_instance_uid = _uid(values[_CLASS]), _uid(values[_INSTANCE])
    if (
        values[_GROUP_LENGTH] != _UL.pack(len(command) - 12)
        or len(numbers) != sum(element in _NUMBERS for element in values)
        or numbers[_FIELD] != C_STORE_RQ
        or numbers[_PRIORITY] > 2
        or numbers[_DATA_SET_TYPE] == NO_DATA_SET
        or sop_class_uid is None
        or sop_instance_uid is None
        or (context_id, sop_class_uid) not in contexts
    ):
        return None
    originator = values.get(_ORIGINATOR)
    if originator is not None and not (len(originator) <= 16 and originator.isascii()):
        return None
    return StoreRequest(
        context_id=context_id,
        transfer_syntax_uid=contexts[context_id, sop_class_uid],
        message_id=numbers[_MESSAGE_ID],
        affected_sop_class_uid=sop_class_uid,
        affected_sop_instance_uid=sop_instance_uid,
        priority=numbers[_PRIORITY],
        move_originator_ae_title=None if originator is None else originator.decode().strip(" \0"),
        move_originator_message_id=numbers.get(_ORIGINATOR_ID),
    )


def encode_store_response(request: StoreRequest, status: int, comment: str = "") -> bytes:
    """Return the P-DATA-TF PDU of a C-STORE response, byte for byte as pynetdicom sends it.

    Parameters
    ----------
    request
        What it answers.
    status
        PS3.4 Table B.2-1.
    comment
        ASCII; Error Comment (0000,0902), cut to the 64 characters it may have.
    """
    elements = [
        _element(_CLASS, _text(request.affected_sop_class_uid, b"\0")),
        _element(_FIELD, _US.pack(C_STORE_RSP)),
        _element(_RESPONDED_TO, _US.pack(request.message_id)),
        _element(_DATA_SET_TYPE, _US.pack(NO_DATA_SET)),
        _element(_STATUS, _US.pack(status)),
    ]
    if comment:
        elements.append(_element(_COMMENT, _text(comment[:_COMMENT_LENGTH], b" ")))
    elements.append(_element(_INSTANCE, _text(request.affected_sop_instance_uid, b"\0")))
    body = b"".join(elements)
    command = _element(_GROUP_LENGTH, _UL.pack(len(body))) + body
    # PS3.8 9.3.5: one PDV, the last of a command.
    return _PDU.pack(4, len(command) + 6, len(command) + 2, request.context_id, 3) + command


def _uid(value: bytes) -> str | None:
    value = value.removesuffix(b"\0")  # one, which makes the length even
    return value.decode() if len(value) <= 64 and _UID.fullmatch(value) else None


def _element(element: int, value: bytes) -> bytes:
    return _ELEMENT.pack(0, element, len(value)) + value


def _text(text: str, padding: bytes) -> bytes:
    value = text.encode("ascii")
    return value + padding if len(value) % 2 else value
