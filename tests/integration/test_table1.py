"""Table 1 from files to figures, on bodies drawn by code."""

import json
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dicomnode import dicomio, weights
from dicomnode.core import phantom
from dicomnode.core.network import NetworkConfig
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import WeightsError
from dicomnode.model import Method, PatientKey
from tests.dicom import part10
from training import archive, compare, fill, pairs, protocol, readers, table
from training.__main__ import main
from training.protocol import QUICK, Kind
from training.readers import Folds
from training.train import TrainConfig, train

LEVELS_MM = np.arange(100.0, 460.0, 6.0)
PIXEL_MM, MATRIX = 6.0, 72
SPEC = PreprocessSpec()
# Two reconstructions of one scan, and another patient.
SERIES = {"1.2.1": ("P1", 1, 5.0, "1.2.1.9"), "1.2.2": ("P1", 1, 25.0, "1.2.1.9"),
          "1.2.3": ("P2", 2, 10.0, "1.2.3.9")}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("archive")
    for uid, (patient, seed, noise_hu, frame_uid) in SERIES.items():
        volume = phantom.volume(
            phantom.patient(seed),
            LEVELS_MM,
            pixel_mm=PIXEL_MM,
            matrix=MATRIX,
            noise_hu=noise_hu,
            table=False,
        )
        volume[-3:] = -1024  # padding, which no curve has
        for k, (z, image) in enumerate(zip(LEVELS_MM, volume, strict=True)):
            ds = dicomio.ct_dataset(
                image,
                patient=PatientKey(patient),
                study_uid=f"{patient[1]}.2.0",
                series_uid=uid,
                sop_instance_uid=f"{uid}.{k + 1}",
                instance_number=k + 1,
                image_position=(-213.0, -200.0, float(z)),
                pixel_mm=PIXEL_MM,
                spacing_mm=6.0,
                study_datetime=datetime(2026, 1, 5),
                frame_of_reference_uid=frame_uid,
            )
            path = root / uid / f"{k:03d}.dcm"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(part10(ds))
    return root


@pytest.fixture(scope="module")
def found(folder) -> archive.Index:
    return archive.index([folder])


@pytest.fixture(scope="module")
def made(found, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("table1")
    assert not pairs.make(found.series, out, QUICK, Folds(), spec=SPEC, workers=0)
    return out


def stamps(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("*.npz")}


def test_the_table_is_made_from_files_by_one_command(folder, made):
    arguments = ["evaluate", "--table1", str(folder), "--quick", "--out", str(made)]
    arguments += ["--workers", "0"]
    before = stamps(made)
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert stamps(made) == before, "what was there was made again"
    assert "| l1 |" in result.output and "| FASTA |" in result.output
    assert (made / "table1.md").read_text() in result.output
    assert (made / "table1.png").stat().st_size > 10_000
    values = json.loads((made / "table1.json").read_text())
    counts = Counter(r["kind"] for r in values["results"] if r["method"] == "l1")
    assert counts == {"follow-up": 6, "stress": 8, "same frame": 2, "same frame, cropped": 2}
    assert values["figures"]["weights_never_saw_the_patients"] is None


def test_pairs_are_aligned_to_their_truth(made):
    """By weights that know such bodies: whole pairs in mm, the others mostly."""
    results = table.measure(pairs.load(made), table.methods(["l1"]))
    same = [abs(r.error_mm) for r in results if r.kind is Kind.SAME_FRAME]
    assert len(same) == 2 and max(same) <= 3.0
    close = [abs(r.error_mm) <= 25 for r in results if r.overlap > 0.25]
    assert np.mean(close) > 0.7


def test_pairs_are_what_the_protocol_says(made):
    for pair in pairs.load(made):
        assert pair.region == "trunk"
        if pair.kind is Kind.FOLLOW_UP:
            assert pair.overlap > 0.95
            assert np.diff(pair.moving.z_mm).max() <= 1.5
            assert pair.drawn["count"] >= len(pair.moving.z_mm) >= 20
        if pair.kind in (Kind.FOLLOW_UP, Kind.SAME_FRAME):
            assert (pair.fixed.z_mm[0], pair.fixed.z_mm[-1]) == (100.0, 436.0)  # padding aside
        if pair.kind is Kind.STRESS:
            assert pair.fixed.z_mm[-1] - pair.fixed.z_mm[0] <= 250
    stress = [p for p in pairs.load(made) if p.kind is Kind.STRESS]
    bins = Counter(protocol.group_of(p.overlap) for p in stress)
    assert set(bins) == set(protocol.OVERLAPS)


def test_the_volumes_of_a_pair_lie_where_its_curves_do(made):
    for pair in pairs.load(made):
        for volume, curve in zip(pair.volumes(), (pair.fixed, pair.moving), strict=True):
            step = volume.spacing_mm[0]
            last = volume.origin_mm[0] + (len(volume.hu) - 1) * step
            assert volume.origin_mm[0] == pytest.approx(curve.z_mm[0], abs=step + 6.0)
            assert last == pytest.approx(curve.z_mm[-1], abs=2 * step + 6.0)
            assert max(volume.hu.shape[1:]) <= 128


def test_a_run_that_was_stopped_goes_on_patient_by_patient(found, made, tmp_path):
    for part in ("scans", "cases", "scores"):
        (tmp_path / part).mkdir()
    for path in (*(made / "scans").iterdir(), made / "cases" / "P1.npz"):
        (tmp_path / path.relative_to(made)).write_bytes(path.read_bytes())
    kept = stamps(tmp_path)
    pairs.make(found.series, tmp_path, QUICK, Folds(), spec=SPEC, workers=0)
    after = stamps(tmp_path)
    assert {k: after[k] for k in kept} == kept
    for a, b in zip(pairs.load(made), pairs.load(tmp_path), strict=True):
        np.testing.assert_array_equal(a.moving.score, b.moving.score)
        assert (a.kind, a.truth_mm, a.overlap) == (b.kind, b.truth_mm, b.overlap)


def test_other_weights_need_only_other_scores(found, made, tmp_path):
    for path in made.rglob("*.npz"):
        copy = tmp_path / path.relative_to(made)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    before = stamps(tmp_path)
    bundle = readers.Folds()("P1")

    def negative(patient: str) -> readers.Reader:
        def score(inputs: np.ndarray) -> np.ndarray:
            return -bundle.score(inputs)

        return readers.Reader("other", SPEC, bundle.heights, score, unseen=patient == "P1")

    pairs.make(found.series, tmp_path, QUICK, negative, spec=SPEC, workers=0)
    after = stamps(tmp_path)
    assert {k for k in after if after[k] != before[k]} == {"scores/P1.npz", "scores/P2.npz"}
    for a, b in zip(pairs.load(made), pairs.load(tmp_path), strict=True):
        np.testing.assert_array_equal(a.fixed.score, -b.fixed.score)
        assert b.unseen is (b.patient == "P1")


def test_a_fold_scores_only_patients_it_never_saw(found, tmp_path):
    bank = fill.build(tmp_path / "bank", found.series).bank
    tiny = TrainConfig(network=NetworkConfig(width=0.25), steps=1, stacks=2, m=4, bf16=False)
    train(bank, replace(tiny, held_out=("P1",)), tmp_path / "fold-1")
    (tmp_path / "folds.json").write_text(json.dumps({"P1": "fold-1", "P2": "fold-1"}))
    folds = Folds.from_json(tmp_path / "folds.json", SPEC)
    assert folds("P1").unseen is True
    assert folds("P1").heights.mm_per_score == tiny.mm_per_score
    (tmp_path / "fold-1" / "heights.json").write_text(
        json.dumps({"mm_per_score": 7.0, "intercept_mm": 1.0, "residual_sd_mm": 2.0})
    )
    readers._run.cache_clear()
    assert folds("P1").heights.mm_per_score == 7.0
    with pytest.raises(WeightsError, match="was trained on patient P2"):
        folds("P2")
    with pytest.raises(WeightsError, match="no fold for patient P3"):
        folds("P3")
    assert Folds(default=tmp_path / "fold-1", spec=SPEC)("P2").unseen is False
    with pytest.raises(WeightsError, match="was trained on patient P2"):
        pairs.make(found.series, tmp_path / "out", QUICK, folds, spec=SPEC, workers=0)
    assert not list((tmp_path / "out" / "cases").iterdir()), "found out after the work was done"


def test_a_bundle_does_not_tell_whom_it_saw():
    reader = Folds()("P1")
    assert reader.unseen is None
    assert reader.model == weights.load().digest
    assert reader.score(np.zeros((3, 128, 128), np.uint8)).shape == (3,)


def test_a_table_needs_a_folder_and_known_methods(folder, tmp_path):
    run = CliRunner().invoke
    assert "needs --out" in run(main, ["evaluate", "--table1", str(folder)]).output
    unknown = ["--table1", str(folder), "--out", str(tmp_path), "--method", "magic"]
    assert "no method 'magic'" in run(main, ["evaluate", *unknown]).output
    assert "--table1" in run(main, ["evaluate"]).output


def test_two_bundles_are_compared_on_the_same_pairs(found, made, tmp_path):
    for path in made.rglob("*.npz"):
        copy = tmp_path / path.relative_to(made)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    places = (weights.DEFAULT, weights.DEFAULT)
    rows = compare.table1(places, found.series, tmp_path, quick=True)
    assert [r["method"] for r in rows] == [*map(str, Method)] * 2
    assert rows[:3] == rows[3:]  # one bundle against itself
    for row in rows:
        assert row["pairs"] == 6
        assert sum(row["categories"]) * 6 + row["refused"] == pytest.approx(6)
    empty = {"series": 0, "patients": 0, "slices": 0, "figures": [], "table1": rows}
    empty["bundles"] = [{"name": n, "digest": n, "ms_per_slice": 1.0} for n in "ab"]
    assert f"| {weights.load().name} | robust | 6 |" in compare.to_markdown(empty)
