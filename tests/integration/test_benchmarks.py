import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.ingest import report
from benchmarks.ingest.rates import Figures, Key
from benchmarks.ingest.receivers import (
    FORK,
    ORTHANC,
    OURS,
    OURS_FILES,
    PLAIN,
    PYNETDICOM,
    WHOLE,
    available,
)
from benchmarks.ingest.senders import dcmtk
from benchmarks.ingest.slices import shares
from dicomnode.model import Method

ROOT = Path(__file__).parents[2]
EVERY = [OURS, WHOLE, PYNETDICOM, PLAIN, FORK, ORTHANC]
if OURS_FILES in available(isolated=True)[0]:  # this version has a journal
    EVERY.insert(1, OURS_FILES)


@pytest.fixture
def _sender() -> None:
    if dcmtk("storescu") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI=true and DCMTK is not installed")
        pytest.skip("DCMTK is not installed")


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.ingest", "--folder", folder, *options],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_in(folder: Path) -> list[str]:
    """Return the command lines of processes that work in a folder."""
    commands = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    return [" ".join(command) for command in commands if str(folder) in " ".join(command)]


@pytest.mark.slow
@pytest.mark.usefixtures("_sender")
def test_every_receiver_takes_and_ours_scores_what_ingest_sends(tmp_path):
    with start(tmp_path, "--quick", "--json", "--slices", "8", "--associations", "1,2") as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert set(result) == {"rows", "ratios", "scored", "offset_ms"}
    expected = [r for r in EVERY if f"{r} is left out" not in err]
    assert expected == available(isolated=FORK in expected)[0]
    rows = {(r["receiver"], r["associations"], r["nagle"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"])
    assert set(rows) == {(r, n, nagle) for r in expected for n in (1, 2) for nagle in (False, True)}
    for row in rows.values():
        assert set(row) >= {
            "receiver",
            "associations",
            "nagle",
            "slices_per_s",
            "cpu_ms_per_slice",
            "ack_p50_ms",
            "ack_p99_ms",
        }
        assert row["slices_per_s"] > 0
        assert row["cpu_ms_per_slice"] >= 0  # the kernel counts in steps of 10 ms
        assert 0 < row["ack_p50_ms"] <= row["ack_p99_ms"]
    assert {(row["associations"], row["nagle"]) for row in result["scored"]} == {
        (n, nagle) for n in (1, 2) for nagle in (False, True)
    }
    assert all(row["slices_per_s"] > 0 for row in result["scored"])
    ratios = result["ratios"]
    assert {name for name, ratio in ratios.items() if ratio is None} >= {"orthanc_4", "storescp_4"}
    assert (ratios["orthanc_1"] is not None) == (ORTHANC in expected)
    assert (ratios["scored_vs_orthanc"] is not None) == (ORTHANC in expected)
    assert (ratios["storescp_1"] is not None) == (FORK in expected)
    assert (ratios["nagle_storescp"] is not None) == (PLAIN in expected)
    # Nothing is stored before the quiet time is over.
    assert 0 < result["offset_ms"]["median"] <= result["offset_ms"]["most"] < 60_000
    assert left_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("_sender")
def test_ingest_leaves_nothing_behind_when_it_is_stopped(tmp_path):
    with start(tmp_path, "--quick", "--slices", "4") as process:
        deadline = time.monotonic() + 120
        while not any("node.toml" in command for command in left_in(tmp_path)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert left_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_summary_divides_ours_by_theirs():
    rates = {
        Key(OURS, 1, False): 400,
        Key(OURS, 4, False): 600,
        Key(OURS, 1, True): 300,
        Key(WHOLE, 4, False): 500,
        Key(WHOLE, 4, True): 500,
        Key(ORTHANC, 1, False): 200,
        Key(ORTHANC, 4, False): 100,
        Key(PLAIN, 1, True): 20,
        Key(PLAIN, 4, False): 1,
        Key(FORK, 4, False): 800,
    }
    figures = {key: Figures([rate], [], [2.0], [1.0, 3.0]) for key, rate in rates.items()}
    figures[Key(WHOLE, 4, False)].scored_per_s.append(50)
    figures[Key(WHOLE, 4, True)].scored_per_s.append(7)
    result = report.summary(figures, [40.0, 90.0, 50.0])
    assert result["ratios"] == {
        "orthanc_1": 2.0,
        "orthanc_4": 6.0,
        "storescp_1": None,
        "storescp_4": 0.75,
        "nagle_storescp": 15.0,
        "scored_vs_orthanc": 0.5,
    }
    assert [(row["nagle"], row["slices_per_s"]) for row in result["scored"]] == [
        (False, 50.0),
        (True, 7.0),
    ]
    assert (result["offset_ms"]["median"], result["offset_ms"]["most"]) == (50.0, 90.0)
    assert report.summary(figures)["offset_ms"] is None


def test_series_are_as_long_as_the_fewest_associations_need():
    assert shares(400, [1, 4, 8]) == [400, 100, 100, 100, 50, 50, 50, 50]
    assert shares(10, [3]) == [4, 4, 4]


@pytest.mark.usefixtures("_sender")
def test_the_sender_of_ingest_is_that_of_dcmtk_and_not_of_pynetdicom():
    beside_us = shutil.which("storescu", path=str(Path(sys.executable).parent))
    assert dcmtk("storescu") != beside_us


def test_align_measures_every_method_and_finds_what_itk_finds():
    command = [sys.executable, "-m", "benchmarks.align", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"pair_ms", "priors_100k_s", "fasta_s", "fasta_simpleitk_s"} <= set(result)
    assert [row["method"] for row in result["rows"]] == [str(m) for m in Method]
    assert all(row["ms"] > 0 for row in result["rows"])
    assert result["pair_ms"] == result["rows"][-1]["ms"]
    assert result["priors_100k_s"] is None  # quick compares with fewer
    assert result["fasta"]["same_minimum"] is True
    assert result["fasta"]["grid"] == [71, 3, 3]
    ratio = result["fasta_s"] / result["fasta_simpleitk_s"]
    assert result["ratios"]["fasta_simpleitk"] == pytest.approx(ratio, rel=1e-2)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder that another user, as whom Postgres runs for root, may reach; a socket fits it."""
    with tempfile.TemporaryDirectory(prefix="dicomnode-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.slow
def test_mining_measures_both_databases_and_leaves_nothing_behind(short_folder):
    command = [sys.executable, "-m", "benchmarks.mining", "--quick", "--json"]
    command += ["--folder", str(short_folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"series", "rows", "insert_ratio", "ratios"} <= set(result)
    databases = {"sqlite"} if "postgres is left out" in done.stderr else {"postgres", "sqlite"}
    asked = {(row["database"], row["query"]) for row in result["rows"]}
    assert {database for database, _ in asked} == databases
    assert len(asked) == len(result["rows"]) == 11 * len(databases)
    for row in result["rows"]:
        assert set(row) == {"database", "query", "median_ms", "cpu_ms", "limit_ms"}
        assert row["median_ms"] > 0 and row["cpu_ms"] > 0
        ratio = result["ratios"][f"{row['database']} {row['query']}"]
        assert ratio == pytest.approx(row["median_ms"] / row["limit_ms"], rel=1e-2)
    assert result["insert_ratio"] == max(i["ratio"] for i in result["inserts"]) > 0
    assert list(short_folder.iterdir()) == []
