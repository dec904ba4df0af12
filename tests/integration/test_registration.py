"""SimpleITK and elastix start where an offset says, and end at the truth."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from dicomnode.core import phantom
from dicomnode.model import Method, Offset, OffsetStatus

# SWIG's types warn while ITK's modules are loaded; as an error that ends the interpreter.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from benchmarks import registration

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parents[2]
TRUTH_MM = -700.0


def scan(low: float, high: float, seed: int, z_mm: float) -> SimpleITK.Image:
    hu = phantom.volume(
        phantom.patient(3), np.arange(low, high, 5.0), pixel_mm=6, matrix=70, seed=seed
    )
    image = SimpleITK.GetImageFromArray(hu.astype(np.float32))
    image.SetSpacing((6, 6, 5))
    image.SetOrigin((-207, -207, low + z_mm))
    return image


@pytest.mark.parametrize("tool", registration.TOOLS)
def test_a_registration_started_from_an_offset_ends_at_the_truth(tool):
    # Two thirds of the moving scan lie in the fixed one; the offset is 9 mm wrong.
    fixed, moving = scan(0, 300, 1, 0.0), scan(200, 350, 2, -TRUTH_MM)
    offset = Offset(Method.L1, OffsetStatus.OK, offset_mm=TRUTH_MM + 9)
    start = registration.starts(fixed, moving, offset)["dicomnode"]
    result = registration.TOOLS[tool](fixed, moving, start)
    assert result["offset_mm"] == pytest.approx(TRUTH_MM, abs=3)
    assert result["metric"] < 0
    assert result["iterations"] > 0


def test_the_other_starts_are_the_headers_and_both_middles():
    fixed, moving = scan(0, 300, 1, 0.0), scan(200, 350, 2, 800.0)
    offset = Offset(Method.L1, OffsetStatus.OK, offset_mm=-800.0)
    found = registration.starts(fixed, moving, offset)
    assert found["headers"].GetOffset() == (0, 0, 0)
    middle = registration.middle
    assert found["middles"].TransformPoint(middle(fixed)) == pytest.approx(middle(moving))
    assert found["dicomnode"].TransformPoint((1.0, 2.0, 250.0)) == (1, 2, 1050)


@pytest.mark.slow
def test_the_worked_example_needs_our_offset():
    if not registration.PAIR.exists():
        pytest.skip("no real CT in ../shared/ct")
    command = [sys.executable, "-m", "benchmarks.registration", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    runs = {(r["tool"], r["start"]): r for r in json.loads(done.stdout)["runs"]}
    assert len(runs) == 6
    for tool in registration.TOOLS:
        best = runs[tool, "dicomnode"]
        assert best["offset_mm"] == pytest.approx(-215, abs=15)
        for other in ("headers", "middles"):
            run = runs[tool, other]
            assert run["failed"] or abs(run["offset_mm"] + 215) > 50
            assert run["failed"] or best["metric"] < run["metric"]
