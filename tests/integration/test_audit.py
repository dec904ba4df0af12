import json
import multiprocessing
import os
import re
import resource
import stat
from pathlib import Path

import pytest

from dicomnode.audit import MINOR_FAILURE, Act, AuditLog


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "audit.jsonl"


def test_a_line_says_what_when_and_how_it_went(path):
    log = AuditLog(path)
    assert log.write(Act.ASSOCIATION_REJECTED, MINOR_FAILURE, address="10.0.0.5", nothing=None)
    (line,) = lines(path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", line.pop("time"))
    assert line == {
        "event": "association rejected",
        "code": "110113",
        "type": "110126",
        "action": "E",
        "outcome": 4,
        "pid": os.getpid(),
        "address": "10.0.0.5",
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def write_many(path: Path, number: int) -> None:
    log = AuditLog(path)
    for i in range(300):
        log.write(Act.QUERY, who=number, i=i, filler="x" * 3000)


def test_processes_share_the_file_line_by_line(path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(path, n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = [(line["who"], line["i"]) for line in lines(path)]
    assert sorted(found) == [(n, i) for n in range(4) for i in range(300)]


def test_a_file_that_was_moved_is_opened_anew(path):
    log = AuditLog(path)
    log.write(Act.STARTED)
    path.rename(path.with_suffix(".1"))
    log.write(Act.STOPPED)
    assert [line["event"] for line in lines(path.with_suffix(".1"))] == ["started"]
    assert [line["event"] for line in lines(path)] == ["stopped"]
    path.unlink()
    log.write(Act.STARTED)
    assert [line["event"] for line in lines(path)] == ["started"]


def test_a_full_disk_costs_lines_and_nothing_else(path, caplog):
    """The limit on the size of a file cuts a write short, and refuses the next, as a disk does."""
    caplog.set_level("INFO")
    log = AuditLog(path)
    log.write(Act.STARTED)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
    try:
        assert [log.write(Act.QUERY) for _ in range(3)] == [False] * 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.lost == 3
    assert log.write(Act.STOPPED)
    first, torn, lost, last = path.read_text().splitlines()
    assert json.loads(first)["event"] == "started"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated|Extra"):
        json.loads(torn)
    assert json.loads(lost)["event"] == "audit lines lost" and json.loads(lost)["count"] == 3
    assert json.loads(last)["event"] == "stopped"
    assert [r.message for r in caplog.records] == ["audit not written", "audit written again"]


def test_a_folder_that_is_gone_costs_lines_and_nothing_else(tmp_path, caplog):
    log = AuditLog(tmp_path / "none" / "audit.jsonl")
    assert not log.write(Act.STARTED) and not log.write(Act.STARTED)
    assert [r.message for r in caplog.records] == ["audit not written"]
    (tmp_path / "none").mkdir()
    assert log.write(Act.STOPPED)
    assert [line["event"] for line in lines(log.path)] == ["audit lines lost", "stopped"]


def test_without_a_file_nothing_is_written():
    log = AuditLog(None)
    assert not log.write(Act.STARTED)
    assert log.lost == 0
