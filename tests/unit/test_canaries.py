"""The watch for canaries sees what it should; a watch that sees nothing would always be content."""

import logging

import pytest

from tests.conftest import Watch
from tests.dicom import CANARIES, ct_dataset, leaks


@pytest.mark.parametrize("keyword", CANARIES)
def test_each_canary_is_in_what_tests_send_and_is_found(keyword):
    value = str(getattr(ct_dataset(), keyword))
    assert value == CANARIES[keyword]
    assert leaks(f"a message with {value} in it")
    assert leaks(value.lower()) and leaks(value.upper())


def test_a_uid_is_no_canary():
    assert leaks("1.2.840.113619.2.55 CT 20260105 DICOMNODE") == set()


@pytest.mark.parametrize("where", ["message", "extra", "traceback"])
def test_the_watch_sees_messages_extra_and_tracebacks(where):
    watch = Watch()
    try:
        raise ValueError("CANARY^NAME" if where == "traceback" else "x")
    except ValueError as exc:
        record = logging.LogRecord(
            "dicomnode.x",
            logging.WARNING,
            __file__,
            1,
            "CANARY^NAME" if where == "message" else "x",
            None,
            (type(exc), exc, exc.__traceback__),
        )
        if where == "extra":
            record.patient = "CANARY^NAME"
        assert watch.handle(record)
    assert len(watch.leaks) >= 1


def test_the_watch_passes_over_what_a_node_does_not_log():
    watch = Watch()
    for name, level in (("pydicom", logging.WARNING), ("pynetdicom.acse", logging.INFO)):
        watch.handle(logging.LogRecord(name, level, __file__, 1, "CANARY^NAME", None, None))
    assert watch.leaks == set()
