"""Damaged data sets, in short; `python -m tests.fuzz.data_sets` is the long form."""

from tests.fuzz import data_sets

COUNT = 1500


def test_damaged_data_sets_neither_crash_nor_hang_nor_grow():
    result = data_sets.run(COUNT, seed=7)
    assert result["broke"] == []
    assert sum(result["outcomes"].values()) == COUNT
    before, after = result["rss_mib"]
    assert after - before < data_sets.GROWTH_MIB
    # Mutations that nothing survives, or that everything does, would show nothing.
    told = result["outcomes"]
    assert told["decoded, scanned"] > COUNT / 20
    assert told["error corrupt"] > COUNT / 50
    assert told["reason pixel_data"] > COUNT / 20


def test_a_case_that_kills_its_process_or_hangs_is_told():
    lines = data_sets.watched(
        ["-c", "print(0); print('[\"decoded\", 1]'); print(1, flush=True); import os; os.abort()"],
        count=3,
        hang_s=20,
    )
    assert next(lines) == ("decoded", 1)
    hanging = "print(0, flush=True); import time; time.sleep(60)"
    assert list(data_sets.watched(["-c", hanging], count=3, hang_s=0.5)) == ["HANG"]
    crashed = list(data_sets.watched(["-c", "import os; print(0, flush=True); os.abort()"], 3, 20))
    assert len(crashed) == 1 and crashed[0].startswith("CRASH -6")
