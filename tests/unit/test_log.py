import json
import subprocess
import sys

import pytest

from dicomnode.log import Seldom

# In a process of its own, since `setup` takes over the root logger, which belongs to pytest here.
PROGRAM = """
import logging, warnings
from dicomnode import log
log.setup({level!r}, json={json})
import pydicom, pynetdicom
logging.getLogger("dicomnode.x").debug("detail")
logging.getLogger("dicomnode.x").info("instance stored", extra={{"bytes": 7}})
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("dicomnode.x").exception("failed")
for level in ("debug", "info", "warning"):
    getattr(logging.getLogger("pydicom"), level)("CANARY")
for level in ("debug", "info"):
    getattr(logging.getLogger("pynetdicom.acse"), level)("CANARY")
logging.getLogger("pynetdicom.acse").warning("of pynetdicom")
ds = pydicom.Dataset()
ds.PatientBirthDate = "CANARY"
warnings.warn("a warning")
"""


def test_what_a_stranger_can_cause_is_told_seldom(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("dicomnode.log.time.monotonic", lambda: now[0])
    seldom = Seldom(600.0, keys=3)
    assert [seldom.due("a") for _ in range(5)] == [1, 0, 0, 0, 0]
    assert seldom.due("b") == 1
    now[0] += 600.0
    assert seldom.due("a") == 5  # four that were not told, and this one
    assert seldom.due("a") == 0
    for key in ("c", "d", "e"):  # no more keys than so many are kept
        assert seldom.due(key) == 1
    assert seldom.due("a") == 1


def stderr_of(level: str, json: bool) -> str:
    program = PROGRAM.format(level=level, json=json)
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True
    ).stderr


def test_json_is_one_object_a_line():
    lines = [json.loads(line) for line in stderr_of("INFO", json=True).splitlines()]
    stored, failed, library, warning = lines
    assert stored.pop("time").endswith("+00:00")
    assert stored == {
        "level": "INFO",
        "logger": "dicomnode.x",
        "event": "instance stored",
        "bytes": 7,
    }
    assert "ZeroDivisionError" in failed["traceback"]
    assert library["event"] == "of pynetdicom"
    assert "a warning" in warning["event"]


def test_text_carries_extra():
    assert "INFO dicomnode.x: instance stored bytes=7\n" in stderr_of("INFO", json=False)


@pytest.mark.parametrize("json", [True, False])
def test_libraries_stay_quiet_at_debug(json):
    text = stderr_of("DEBUG", json)
    assert "detail" in text
    assert "CANARY" not in text
