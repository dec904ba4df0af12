import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import CTImageStorage
from pynetdicom.dimse_messages import C_STORE_RSP
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu import P_DATA_TF

from dicomnode.scp.dimse import StoreRequest, decode_store_request, encode_store_response
from tests.pdu import CT, ECHO, STORAGE, SYNTAXES, store_rq, uid, us


def by_pynetdicom(request: StoreRequest, status: int, comment: str) -> bytes:
    response, message = C_STORE(), C_STORE_RSP()
    response.MessageIDBeingRespondedTo = request.message_id
    response.AffectedSOPClassUID = request.affected_sop_class_uid
    response.AffectedSOPInstanceUID = request.affected_sop_instance_uid
    response.Status = status
    response.ErrorComment = comment or None
    message.primitive_to_message(response)
    (primitive,) = message.encode_msg(request.context_id, 16_384)
    pdu = P_DATA_TF()
    pdu.from_primitive(primitive)
    return pdu.encode()


components = st.one_of(st.just("0"), st.from_regex(r"[1-9][0-9]{0,9}", fullmatch=True))
uids = st.lists(components, min_size=1, max_size=12).map(".".join).filter(lambda u: len(u) <= 64)


@given(
    context_id=st.integers(0, 127).map(lambda i: 2 * i + 1),
    message_id=st.integers(0, 65_535),
    sop_class_uid=uids,
    sop_instance_uid=uids,
    status=st.sampled_from([0x0000, 0xA700, 0xC211, 0xB000]),
    comment=st.sampled_from(["", "data set too long", "full"]),
)
def test_a_response_is_that_of_pynetdicom(
    context_id, message_id, sop_class_uid, sop_instance_uid, status, comment
):
    request = StoreRequest(context_id, "1.2", message_id, sop_class_uid, sop_instance_uid, 0)
    assert encode_store_response(request, status, comment) == by_pynetdicom(
        request, status, comment
    )


def test_a_comment_has_64_characters():
    request = StoreRequest(1, "1.2", 1, "1.2", "1.3", 0)
    assert encode_store_response(request, 0xA700, "x" * 99) == by_pynetdicom(
        request, 0xA700, "x" * 64
    )


@pytest.mark.parametrize("originator", [{}, {0x1030: b"MOVER "}, {0x1031: us(7)}])
def test_a_regular_request_is_understood(originator):
    command = store_rq(dict(originator), message_id=65_535, instance="1.2.34")
    assert decode_store_request(command, CT, STORAGE) == StoreRequest(
        context_id=CT,
        transfer_syntax_uid=SYNTAXES[CT, CTImageStorage],
        message_id=65_535,
        affected_sop_class_uid=CTImageStorage,
        affected_sop_instance_uid="1.2.34",
        priority=0,
        move_originator_ae_title="MOVER" if 0x1030 in originator else None,
        move_originator_message_id=7 if 0x1031 in originator else None,
    )


IRREGULAR = {
    "no class": {0x0002: None},
    "no field": {0x0100: None},
    "no message id": {0x0110: None},
    "no priority": {0x0700: None},
    "no data set type": {0x0800: None},
    "no instance": {0x1000: None},
    "another command": {0x0100: us(0x30)},
    "a response": {0x0100: us(0x8001)},
    "no data set": {0x0800: us(0x0101)},
    "a priority of 3": {0x0700: us(3)},
    "a long message id": {0x0110: struct.pack("<I", 1)},
    "an empty message id": {0x0110: b""},
    "an element more": {0x0900: us(0)},
    "another class": {0x0002: uid("1.2.840.10008.5.1.4.1.1.7")},
    "a path": {0x1000: uid("../../etc/x")},
    "a leading zero": {0x1000: uid("1.02.3")},
    "an empty component": {0x1000: uid("1..3")},
    "no uid": {0x1000: b""},
    "65 characters": {0x1000: uid("1." + "2" * 63)},
    "a blank": {0x1000: b"1.2 "},
    "two zero bytes": {0x1000: b"1.\0\0"},
    "an odd length": {0x1000: b"1.2"},
    "a long title": {0x1030: b"A" * 18},
    "a title that is not ASCII": {0x1030: b"\xc4E"},
}


@pytest.mark.parametrize("overrides", IRREGULAR.values(), ids=IRREGULAR)
def test_an_irregular_request_is_not(overrides):
    assert decode_store_request(store_rq(overrides), CT, STORAGE) is None


@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_neither_is_one_whose_lengths_do_not_add_up(change):
    command = store_rq()
    longer = command + bytes(max(0, change))
    assert decode_store_request(longer[: len(command) + change], CT, STORAGE) is None
    length = len(command) - 12 + change
    assert decode_store_request(store_rq(group_length=length), CT, STORAGE) is None


def test_neither_is_one_with_an_element_twice_or_out_of_order():
    command = store_rq()
    again = store_rq({0x1000: None})
    for body in (command[12:] + command[-16:], command[-16:] + again[12:]):
        whole = struct.pack("<HHII", 0, 0, 4, len(body)) + body
        assert decode_store_request(whole, CT, STORAGE) is None


def test_neither_is_one_on_a_context_that_is_none_for_storage():
    assert decode_store_request(store_rq(), ECHO, STORAGE) is None


@given(st.binary(max_size=300))
def test_bytes_are_no_request(data):
    assert decode_store_request(data, CT, STORAGE) is None


@given(st.data())
def test_a_bit_that_flips_never_raises(data):
    command = bytearray(store_rq({0x1030: b"MOVER ", 0x1031: us(7)}))
    bit = data.draw(st.integers(0, 8 * len(command) - 1))
    command[bit // 8] ^= 1 << bit % 8
    request = decode_store_request(bytes(command), CT, STORAGE)
    assert request is None or request.affected_sop_class_uid == CTImageStorage
