"""Some seconds of `python -m tests.fuzz.pdu`."""

import random

import pytest

from dicomnode.scp.pdata import Reader
from tests.fuzz import pdu


def test_the_reader_bears_pdus_gone_wrong():
    counts = pdu.fuzz_reader(5000, seed=2)
    assert min(counts.values()) > 20  # each end is reached


def test_associations_bear_pdus_gone_wrong():
    answered, _, _ = pdu.fuzz_associations(150, seed=2)
    assert answered > 100


def test_the_fuzz_notices_a_data_set_that_is_not_whole(monkeypatch):
    problem = Reader._problem

    def lenient(self, request, item, context_id, flags, left):
        flags |= 2 if flags & 0x40 else 0
        return "" if context_id != request.context_id else problem(
            self, request, item, context_id, flags, left
        )  # fmt: skip

    monkeypatch.setattr(Reader, "_problem", lenient)
    with pytest.raises(pdu.Fault, match="no such message"):
        pdu.fuzz_reader(20_000, seed=3)


def test_a_seed_tells_what_is_sent():
    def once() -> list[bytes]:
        rng = random.Random("1/1")
        return [pdu.mutate(rng, seed) for seed in pdu.SEEDS]

    assert once() == once()
