"""Steady load for half a minute; `python -m tests.soak.steady` is the same for an hour."""

import json

import pytest

from tests.soak import steady
from tests.soak.visits import Visits

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.slow,
]


def test_steady_load(tmp_path):
    # Half a minute tells nothing of an hour: the worker's memory is still finding its size.
    outcome = steady.run(
        tmp_path, minutes=0.5, rate=40.0, every_s=1.0, grow_mib=96.0, matrix=128, seed=1
    )
    steady.show(outcome)
    assert outcome.faults == {}
    assert outcome.sound
    assert outcome.slices > 600
    assert outcome.curves >= 20 and outcome.offsets >= 30
    assert outcome.aborted > 0
    assert set(outcome.others) == {"echo", "probe", "stranger"}
    measured = {(row["process"], row["measure"]) for row in outcome.rows}
    assert {
        ("receiver", "anonymous_mib"),
        ("worker", "anonymous_mib"),
        ("receiver", "threads"),
    } <= measured
    assert json.loads((tmp_path / "steady.json").read_text())["missing"] == 0


def test_a_leak_is_seen():
    def at(second: int, anonymous_mib: float) -> steady.Sample:
        flat = dict.fromkeys(steady.MEASURES, 5.0)
        process = {**flat, "anonymous_mib": anonymous_mib}
        return {
            "leg": 1,
            "elapsed_s": float(second),
            "processes": {"receiver": process},
            "spool_mib": 0.0,
            "database_mib": 0.0,
        }

    # 60 MiB at once within the warm-up do not count; 30 MiB an hour afterwards do.
    samples = [at(s, 60.0 * (s > 100) + 30.0 * s / 3600.0) for s in range(0, 3600, 5)]
    rows = {row["measure"]: row for row in steady.summary(samples)}
    assert rows["anonymous_mib"]["slope_per_hour"] == pytest.approx(30.0, abs=0.1)
    assert rows["anonymous_mib"]["growth"] == pytest.approx(30.0 * 5 / 6 * 55 / 60, abs=0.5)
    assert rows["threads"]["growth"] == rows["rss_mib"]["slope_per_hour"] == 0.0


def test_no_two_visits_are_of_one_patient():
    visits = iter(Visits(64, 100_000_000_000))
    seen = [timepoint for _ in range(7) for timepoint in next(visits)]
    uids = [uid for timepoint in seen for uid, _ in timepoint.slices]
    assert len(set(uids)) == len(uids)
    assert len({timepoint.series_uid for timepoint in seen}) == len(seen) == 14
    assert len({timepoint.transfer_syntax for timepoint in seen}) == 3
