"""The reader of messages, driven by bytes alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode.scp.pdata import (
    Broken,
    Budget,
    HandedBack,
    Limits,
    Outcome,
    Reader,
    Received,
    Refused,
)
from tests.pdu import (
    A_ABORT,
    A_RELEASE_RQ,
    COMMAND,
    CT,
    CT2,
    DATA,
    ECHO,
    LAST,
    STORAGE,
    cut,
    echo_rq,
    message,
    p_data,
    pdu,
    pdv,
    store,
    store_rq,
)

SMALL = Limits(pdu_bytes=1 << 16, message_bytes=1 << 18, kept_bytes=1 << 14, dropped_bytes=1 << 20)
DATA_SET = bytes(range(256)) * 40


def make_reader(limits: Limits = SMALL, size: int = 1 << 22) -> Reader:
    return Reader(STORAGE, limits, Budget(size))


def read(reader: Reader, *chunks: bytes) -> tuple[Outcome | None, bytes]:
    """Return what comes of bytes that arrive in such chunks, and those not asked for."""
    reading = reader.read()
    view = next(reading)
    rest = bytearray()
    outcome: Outcome | None = None
    for chunk in chunks:
        left = memoryview(chunk)
        while left and outcome is None:
            count = min(len(left), len(view))
            view[:count] = left[:count]
            left = left[count:]
            try:
                view = reading.send(count)
            except StopIteration as end:
                outcome = end.value
        rest += left
    return outcome, bytes(rest)


def stored(outcome: Outcome | None) -> bytes:
    assert isinstance(outcome, Received)
    return bytes(outcome.data)


# Regular messages


@given(data=st.data(), size=st.integers(0, 3000), fragment=st.integers(1, 700))
@settings(max_examples=60)
def test_a_message_is_whole_however_it_is_cut(data, size, fragment):
    data_set = np.random.default_rng(size).bytes(size)
    sent = b"".join(message(store_rq(), data_set, size=fragment))
    places = data.draw(st.lists(st.integers(1, len(sent) - 1), max_size=20))
    outcome, rest = read(make_reader(), *cut(sent, places))
    assert stored(outcome) == data_set
    assert rest == b""


def test_a_message_is_whole_byte_by_byte():
    sent = b"".join(message(store_rq(), DATA_SET[:900], size=100))
    outcome, _ = read(make_reader(), *(sent[i : i + 1] for i in range(len(sent))))
    assert stored(outcome) == DATA_SET[:900]


@pytest.mark.parametrize(
    "items",
    [
        [[pdv(CT, 3, store_rq()), pdv(CT, 2, DATA_SET)]],
        [[pdv(CT, 1, store_rq()[:9]), pdv(CT, 3, store_rq()[9:]), pdv(CT, 2, DATA_SET)]],
        [[pdv(CT, 1, store_rq()[:50])], [pdv(CT, 3, store_rq()[50:])], [pdv(CT, 2, DATA_SET)]],
        [[pdv(CT, 3, store_rq()), pdv(CT, 0, DATA_SET[:99])], [pdv(CT, 2, DATA_SET[99:])]],
        [[pdv(CT, 3, store_rq())], [pdv(CT, 0, DATA_SET[i : i + 8]) for i in range(0, 10240, 8)],
         [pdv(CT, 2)]],
        [[pdv(CT, 0x83, store_rq())], [pdv(CT, 0xFE, DATA_SET)]],  # bits without a meaning
        [[pdv(CT, 3, store_rq())], [pdv(CT, 0)], [pdv(CT, 0)], [pdv(CT, 2, DATA_SET)]],
    ],
)  # fmt: skip
def test_pdvs_may_share_a_pdu(items):
    outcome, rest = read(make_reader(), b"".join(p_data(*each) for each in items))
    assert stored(outcome) == DATA_SET
    assert rest == b""


def test_a_data_set_may_be_empty():
    outcome, _ = read(make_reader(), b"".join(message(store_rq(), b"")))
    assert stored(outcome) == b""


def test_no_byte_of_the_next_message_is_taken():
    outcome, rest = read(make_reader(), store(1, DATA_SET) + store(2))
    assert stored(outcome) == DATA_SET
    assert rest == store(2)


# What is handed back


@pytest.mark.parametrize(
    "sent",
    [
        A_RELEASE_RQ,
        A_ABORT,
        b"\x01\0\0\0\1\0" + bytes(300),
        b"GET / HTTP/1.1\r\n\r\n",
        echo_rq(),
        p_data(pdv(ECHO, 3, store_rq())),
        p_data(pdv(99, 3, store_rq())),
        p_data(pdv(CT, 2, DATA_SET)),
        p_data(pdv(CT, 3, store_rq({0x0110: None}))),
        p_data(pdv(CT, 1, store_rq()[:40]), pdv(CT, 0, b"data")),
        p_data(pdv(CT, 1, store_rq()[:40])) + A_ABORT,
        p_data(pdv(CT, 1, store_rq(group_length=3)[:40]), pdv(CT, 3, store_rq()[40:])),
        p_data(pdv(CT, 3, bytes(5000))),
        b"".join(p_data(pdv(CT, 1, bytes(90))) for _ in range(100)),
        pdu(4, b""),
        pdu(4, b"\0\0\0\1\1"),
        pdu(4, bytes(300), 1 << 20),
        p_data(pdv(CT, 3, store_rq(), length=999)),
        p_data(pdv(CT, 3, b"", length=1) + bytes(9)),
        p_data(pdv(CT, 3, store_rq()) + bytes(5)),
    ],
)
@pytest.mark.parametrize("byte_by_byte", [False, True])
def test_what_is_not_regular_is_handed_back_whole(sent, byte_by_byte):
    chunks = [sent[i : i + 1] for i in range(len(sent))] if byte_by_byte else [sent]
    outcome, rest = read(make_reader(), *chunks)
    assert isinstance(outcome, HandedBack)
    assert outcome.data + rest == sent
    assert len(outcome.data) <= 4096


@pytest.mark.parametrize("end", [A_ABORT, A_RELEASE_RQ, b"\x00garbage"])
@pytest.mark.parametrize("data", [b"", DATA_SET])
def test_what_ends_a_message_early_is_handed_back_without_it(end, data):
    sent = p_data(pdv(CT, 3, store_rq())) + (p_data(pdv(CT, 0, data)) if data else b"")
    outcome, rest = read(make_reader(), sent, end)
    assert isinstance(outcome, HandedBack)
    assert outcome.data + rest == end


# What is broken

BEGUN = p_data(pdv(CT, 3, store_rq())) + p_data(pdv(CT, 0, DATA_SET))


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (p_data(pdv(CT2, 2, b"xx")), "another presentation context"),
        (p_data(pdv(CT, 3, store_rq())), "command within"),
        (p_data(pdv(CT, 2, b"xx"), pdv(CT, 3, store_rq())), "more in a PDU"),
        (p_data(pdv(CT, 0, b"xx") + b"\0\0\0"), "does not fit"),
        (p_data(pdv(CT, 2, b"xx", length=5)), "does not fit"),
        (p_data(pdv(CT, 2, b"xx", length=1)), "does not fit"),
        (p_data(pdv(CT, 2, b"xx", length=(1 << 32) - 1)), "does not fit"),
        (pdu(4, b""), "a PDU of 0 bytes"),
        (pdu(4, b"\0\0\0\1\1"), "a PDU of 5 bytes"),
        (pdu(4, bytes(99), (1 << 16) + 1), "a PDU of 65537 bytes"),
    ],
)
def test_what_cannot_go_on_is_broken(sent, reason):
    outcome, _ = read(make_reader(), BEGUN, sent)
    assert isinstance(outcome, Broken)
    assert reason in outcome.reason


# Limits


@pytest.mark.parametrize("fragment", [100, 65_000, 1 << 15])
def test_a_data_set_that_is_too_long_is_read_to_its_end_and_refused(fragment):
    reader = make_reader()
    sent = b"".join(message(store_rq(message_id=9), bytes((1 << 18) + 1), size=fragment))
    outcome, rest = read(reader, sent + store(2))
    assert isinstance(outcome, Refused)
    assert (outcome.request.message_id, outcome.reason) == (9, "data set too long")
    assert rest == store(2)
    assert stored(read(reader, store(2, DATA_SET))[0]) == DATA_SET


def test_a_data_set_of_the_longest_length_is_stored():
    outcome, _ = read(make_reader(), *message(store_rq(), bytes(1 << 18), size=9_999))
    assert len(stored(outcome)) == 1 << 18


def test_a_data_set_without_an_end_is_broken():
    pieces = (p_data(pdv(CT, DATA, bytes(1 << 15))) for _ in range(100))
    outcome, _ = read(make_reader(), p_data(pdv(CT, COMMAND | LAST, store_rq())), *pieces)
    assert outcome == Broken("data set without an end")


def test_what_all_buffer_together_is_limited():
    budget = Budget(1 << 17)
    first, second = (Reader(STORAGE, SMALL, budget) for _ in range(2))
    outcome, _ = read(first, *message(store_rq(), bytes(40_000)))
    assert len(stored(outcome)) == 40_000
    refused, _ = read(second, *message(store_rq(), bytes(40_000)))
    assert isinstance(refused, Refused)
    assert refused.reason == "out of memory"
    del outcome
    first.reuse()
    outcome, _ = read(second, *message(store_rq(), bytes(40_000)))
    assert len(stored(outcome)) == 40_000
    del outcome, first
    second.release()
    assert budget.free == 1 << 17


def test_without_memory_a_message_is_refused():
    budget = Budget(1 << 62)
    limits = Limits(kept_bytes=1 << 61)  # as much as no machine has
    outcome, rest = read(Reader(STORAGE, limits, budget), store(1) + store(2))
    assert isinstance(outcome, Refused)
    assert (rest, budget.free) == (store(2), 1 << 62)


def test_a_buffer_is_used_again_unless_it_is_big():
    budget = Budget(1 << 22)
    reader = Reader(STORAGE, SMALL, budget)
    for size, kept in ((100, True), (1 << 17, False), (100, True)):
        outcome, _ = read(reader, *message(store_rq(), bytes(size)))
        del outcome
        reader.reuse()
        assert (budget.free < 1 << 22) == kept
        assert budget.free >= (1 << 22) - SMALL.kept_bytes


def test_a_view_that_is_kept_stays_as_it_is():
    reader = make_reader()
    outcome, _ = read(reader, store(1, DATA_SET))
    assert isinstance(outcome, Received)
    kept = np.frombuffer(outcome.data, np.uint8)
    reader.reuse()
    read(reader, store(2, bytes(len(DATA_SET))))
    assert kept.tobytes() == DATA_SET


@given(st.data())
@settings(max_examples=300)
def test_a_bit_that_flips_never_raises(data):
    sent = bytearray(b"".join(message(store_rq(), bytes(300), size=100)))
    bit = data.draw(st.integers(0, 8 * len(sent) - 1))
    sent[bit // 8] ^= 1 << bit % 8
    outcome, _ = read(make_reader(), bytes(sent))
    if isinstance(outcome, Received):
        assert len(outcome.data) <= 300
