import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pydicom import Dataset

from dicomnode import dicomio, weights
from dicomnode.core import curve, network, phantom
from dicomnode.core.curve import HeightMap
from dicomnode.core.network import NetworkConfig
from dicomnode.errors import ConfigError
from dicomnode.model import PatientKey
from dicomnode.node.score import Scorer
from tests.dicom import ct_dataset, part10
from training import (
    ablate,
    archive,
    calibrate,
    evaluate,
    export,
    fill,
    folds,
    losses,
    regions,
    train,
)
from training import bank as banks
from training.__main__ import main
from training.bank import Bank
from training.sampler import Augmentation, Share
from training.train import TrainConfig

LEVELS_MM = np.arange(0.0, 400.0, 10.0)
SHIFT_MM = 50.0
# Of patient "P1" there are two Series of the same body, the second one moved on the table.
BODIES = {
    "1.2.11": ("P1", "1.2.11.0", 0.0),
    "1.2.12": ("P1", "1.2.12.0", SHIFT_MM),
    "1.2.21": ("P2", "1.2.21.0", 0.0),
    "1.2.31": ("P3", "1.2.31.0", -700.0),
}
TINY = NetworkConfig(kind="compact", width=0.25)
CONFIG = TrainConfig(network=TINY, steps=6, stacks=2, m=4, warmup=2, bf16=False)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def body(series_uid: str) -> list[Dataset]:
    patient, study_uid, table_mm = BODIES[series_uid]
    volume = phantom.volume(
        phantom.patient(int(patient[1:])), LEVELS_MM, pixel_mm=7.0, matrix=64, table=False
    )
    return [
        dicomio.ct_dataset(
            image,
            patient=PatientKey(patient),
            study_uid=study_uid,
            series_uid=series_uid,
            sop_instance_uid=f"{series_uid}.{k + 1}",
            instance_number=k + 1,
            image_position=(-220.5, -220.5, float(z) + table_mm),
            pixel_mm=7.0,
            spacing_mm=10.0,
            study_datetime=datetime(2026, 1, 5),
            frame_of_reference_uid=f"{series_uid}.99",
        )
        for k, (z, image) in enumerate(zip(LEVELS_MM, volume, strict=True))
    ]


def made(series_uid: str, count: int, step_mm: float, **attributes: Any) -> list[Dataset]:
    return [
        ct_dataset(
            SeriesInstanceUID=series_uid,
            StudyInstanceUID=f"{series_uid}.0",
            SOPInstanceUID=f"{series_uid}.{k + 1}",
            ImagePositionPatient=["0", "0", str(k * step_mm)],
            **attributes,
        )
        for k in range(count)
    ]


def write(folder: Path, datasets: list[Dataset]) -> None:
    """Write files whose names are in no order of position, some folders down."""
    for k, ds in enumerate(datasets):
        path = folder / f"{k % 3}" / f"{(k * 7919) % 1000:03d}-{k}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part10(ds))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An archive as they are: bodies, and much else."""
    root = tmp_path_factory.mktemp("archive")
    localizer = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    for series_uid in BODIES:
        write(root / "bodies" / series_uid, body(series_uid))
    scout = made("1.2.21", 1, 1.0, **localizer)[0]  # in a Series that is otherwise sound
    scout.SOPInstanceUID = scout.file_meta.MediaStorageSOPInstanceUID = "1.2.21.1000"
    write(root / "more" / "scout", [scout])
    write(root / "more" / "localizers", made("1.2.40", 3, 10.0, **localizer))
    write(root / "more" / "pet", made("1.2.41", 3, 10.0, Modality="PT"))
    write(root / "more" / "few", made("1.2.42", 5, 10.0))
    write(root / "more" / "short", made("1.2.43", 12, 1.0))
    write(root / "more" / "nowhere", made("1.2.44", 3, 10.0, PixelSpacing=None))
    (root / "notes.txt").write_text("no DICOM")
    (root / "more" / "list.csv").write_text("none either")
    (root / "DICOMDIR").write_text("passed over")
    (root / ".hidden").write_text("passed over")
    return root


@pytest.fixture(scope="module")
def index(folder) -> archive.Index:
    return archive.index([folder])


@pytest.fixture(scope="module")
def bank_folder(tmp_path_factory, index) -> Path:
    built = tmp_path_factory.mktemp("bank")
    fill.build(built, index.series, phantoms=1)
    return built


@pytest.fixture(scope="module")
def bank(bank_folder) -> Bank:
    return banks.load(bank_folder)


# Archive and bank


def test_an_index_holds_what_can_be_trained_on(index):
    found = {s.series_uid: s for s in index.series}
    assert list(found) == sorted(BODIES)
    for series_uid, (patient, study_uid, table_mm) in BODIES.items():
        s = found[series_uid]
        assert (s.patient, s.study_uid) == (patient, study_uid)
        assert s.z_mm == tuple(LEVELS_MM + table_mm)


def test_an_index_orders_files_from_feet_to_head(index):
    for s in index.series:
        headers = [dicomio.header_of(dicomio.read(path, pixels=False)) for path in s.paths]
        assert [h.image_position[2] for h in headers if h.image_position] == list(s.z_mm)


def test_an_index_counts_what_it_refused(index):
    assert index.refused.files == {"not_dicom": 2}
    assert index.refused.series == {
        "localizer": 1,
        "not_ct_image": 1,
        "too_few_positions": 1,
        "too_short": 1,
        "no_geometry": 1,
    }
    assert index.refused.slices == {"localizer": 1}
    assert index.files == 4 * 40 + 1 + 3 + 3 + 5 + 12 + 3 + 2


def test_an_index_tells_of_each_file(folder):
    seen: list[int] = []
    archive.index([folder / "more"], progress=seen.append)
    assert seen == [1] * (1 + 3 + 3 + 5 + 12 + 3 + 1)


def test_a_bank_holds_the_inputs_that_the_node_sees(index, bank):
    for archived, s in zip(index.series, bank.series, strict=False):
        assert (s.series_uid, s.patient, s.z_mm) == (
            archived.series_uid,
            archived.patient,
            archived.z_mm,
        )
        for k in (0, 17, 39):
            (decoded,) = dicomio.decode(archived.paths[k], bank.spec)
            np.testing.assert_array_equal(bank.inputs(s)[k], decoded.input)


def test_a_bank_ends_with_its_phantoms(bank):
    *_, last = bank.series
    assert len(bank.series) == len(BODIES) + 1
    assert last.patient == last.series_uid == "phantom-0"
    assert last.stop == len(bank.slices)
    assert np.diff(last.z_mm).min() > 0
    assert len(np.unique(bank.inputs(last).reshape(len(last.z_mm), -1), axis=0)) > 200


def test_a_bank_is_loaded_as_it_was_built(tmp_path, index):
    built = fill.build(tmp_path, index.series[:2]).bank
    loaded = banks.load(tmp_path)
    np.testing.assert_array_equal(loaded.slices, built.slices)
    assert (loaded.series, loaded.spec) == (built.series, built.spec)
    assert loaded.digest() == built.digest()
    assert {s.patient for s in loaded.series} == {"P1"}


def test_the_digest_of_a_bank_tells_any_change(bank):
    other = np.array(bank.slices)
    other[5, 64, 64] ^= 1
    assert replace(bank, slices=other).digest() != bank.digest()
    renamed = (replace(bank.series[0], patient="P9"), *bank.series[1:])
    assert replace(bank, series=renamed).digest() != bank.digest()


def test_a_slice_whose_pixels_do_not_decode_does_not_stop_a_build(tmp_path, index):
    """In an archive of a million slices there is one."""
    sound, damaged = index.series[2], index.series[3]
    short = tmp_path / "short.dcm"
    short.write_bytes(damaged.paths[7].read_bytes()[:-500])
    damaged = replace(damaged, paths=(*damaged.paths[:7], short, *damaged.paths[8:]))
    filled = fill.build(tmp_path / "bank", [damaged, sound])
    without = (*damaged.z_mm[:7], *damaged.z_mm[8:])
    assert [s.z_mm for s in filled.bank.series] == [without, sound.z_mm]
    assert filled.refused_slices == {"pixel_data": 1}


# Training


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(a: Any, b: Any) -> None:
    """Compare nested values, tensors bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def loss(net: network.Regressor, bank: Bank) -> float:
    """Return order and millimetres of the whole bank, each Series read as one stack of 8."""
    scores = evaluate.score_bank(net, bank)
    total = 0.0
    for s in bank.series:
        place = np.linspace(0, len(s.z_mm) - 1, 8).astype(int)
        score = torch.from_numpy(scores[s.series_uid][place])[None]
        z_mm = torch.tensor(s.z_mm)[None, place]
        total += float(losses.order(score) + losses.millimetres(score, z_mm, 10.0))
    return total / len(bank.series)


def test_the_loss_falls(tmp_path, bank):
    config = replace(CONFIG, network=replace(TINY, normalised=True), millimetres=1.0)
    config = replace(config, steps=25, stacks=4, m=8, lr=1e-2, warmup=1)
    torch.manual_seed(config.seed)
    untrained = network.build(config.network).eval()
    reported: list[train.Progress] = []
    net = train.train(bank, config, tmp_path, report=reported.append)
    assert loss(net, bank) < 0.95 * loss(untrained, bank)
    assert [p.step for p in reported] == [25]
    assert reported[0].loss.keys() == {"order", "distance", "millimetres"}


FULL = replace(
    CONFIG,
    network=replace(TINY, normalised=True),
    augmentation=Augmentation(),
    millimetres=1.0,
    ema=0.9,
    bf16=True,
    shares=(Share("phantom-*", 0.5), Share("*", 0.5)),
)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, bank, monkeypatch):
    unbroken = train.train(bank, FULL, tmp_path / "unbroken", save_every=3)

    save = train._save

    def save_and_stop(path: Path, values: dict[str, Any]) -> None:
        save(path, values)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(train, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(bank, FULL, tmp_path / "stopped", save_every=3)
    assert state(tmp_path / "stopped")["step"] == 3
    torch.rand(7)  # whatever else drew from the global generator meanwhile
    resumed = train.train(bank, FULL, tmp_path / "stopped", save_every=3)

    assert_same(state(tmp_path / "stopped"), state(tmp_path / "unbroken"))
    assert_same(dict(resumed.state_dict()), dict(unbroken.state_dict()))


def test_a_finished_run_is_not_trained_any_further(tmp_path, bank):
    train.train(bank, CONFIG, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    net = train.train(bank, CONFIG, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    loaded, config, steps = train.load(tmp_path)
    assert (config, steps) == (CONFIG, 6)
    assert_same(dict(net.state_dict()), dict(loaded.state_dict()))
    assert not net.training and not loaded.training


def test_a_run_of_another_config_is_not_gone_on_with(tmp_path, bank):
    train.train(bank, replace(CONFIG, steps=1), tmp_path)
    with pytest.raises(ConfigError, match="another config"):
        train.train(bank, replace(CONFIG, steps=1, lr=1e-4), tmp_path)


def test_held_out_patients_are_never_drawn(tmp_path, bank):
    """Their slices may be anything: the weights come out the same, to the bit."""
    config = replace(CONFIG, held_out=("P1", "phantom-0"), stacks=8)
    noise = np.array(bank.slices)
    rng = np.random.default_rng(0)
    for s in bank.series:
        if s.patient in config.held_out:
            noise[s.start : s.stop] = rng.integers(0, 256, noise[s.start : s.stop].shape)
    train.train(bank, config, tmp_path / "a")
    train.train(replace(bank, slices=noise), config, tmp_path / "b")
    assert_same(state(tmp_path / "a")["network"], state(tmp_path / "b")["network"])
    train.train(replace(bank, slices=noise), replace(config, held_out=()), tmp_path / "c")
    a, c = (state(tmp_path / name)["network"] for name in "ac")
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_series_of_too_few_slices_are_not_drawn(tmp_path, bank):
    with pytest.raises(ValueError, match="at least 4 slices"):
        train.train(bank, replace(CONFIG, min_slices=1000), tmp_path)


@pytest.mark.parametrize("name", ["compact", "paper"])
def test_the_configs_that_come_with_it_are_understood(name):
    config = TrainConfig.from_toml(Path(train.__file__).parent / "configs" / f"{name}.toml")
    assert TrainConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_a_config_with_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "typo.toml").write_text("stpes = 10\n")
    with pytest.raises(ConfigError, match=r"typo\.toml: unknown key stpes"):
        TrainConfig.from_toml(tmp_path / "typo.toml")
    (tmp_path / "typo.toml").write_text("[augmentation]\nscael = 0.1\n")
    with pytest.raises(ConfigError, match=r"augmentation\.scael"):
        TrainConfig.from_toml(tmp_path / "typo.toml")


# Evaluation, calibration, export


@pytest.fixture(scope="module")
def run(tmp_path_factory, bank) -> Path:
    """A run whose network tells height, barely."""
    folder = tmp_path_factory.mktemp("run")
    config = replace(FULL, steps=20, stacks=4, m=8, augmentation=None, ema=0.5, lr=3e-3)
    train.train(bank, replace(config, held_out=("P3",)), folder)
    return folder


@pytest.fixture(scope="module")
def reading(run, bank) -> evaluate.Reading:
    return evaluate.read_run(run, bank)


@pytest.fixture(scope="module")
def scores(run, bank) -> dict[str, Any]:
    return evaluate.score_bank(train.load(run)[0], bank)


def test_scores_of_a_bank_do_not_depend_on_the_batch(run, bank, scores):
    net, _, _ = train.load(run)
    told: list[int] = []
    others = evaluate.score_bank(net, bank, batch=7, progress=told.append)
    assert told == [len(s.z_mm) for s in bank.series]
    for uid, score in scores.items():
        np.testing.assert_allclose(others[uid], score, atol=1e-4)


def test_the_median_series_has_slope_1_after_calibration(bank, scores):
    heights = calibrate.fit(bank, scores, zero=("1.2.21", 105.0), patients=("P2", "P3", "phan*"))
    slopes = {
        s.series_uid: curve.robust_slope(np.asarray(s.z_mm), heights(scores[s.series_uid]))
        for s in bank.series
        if s.patient != "P1"
    }
    assert len(slopes) == 3
    assert sorted(slopes.values())[1] == pytest.approx(1.0)


def test_zero_lands_where_it_was_asked_for(bank, scores):
    for z_mm in (100.0, 104.0):
        heights = calibrate.fit(bank, scores, zero=("1.2.21", z_mm))
        height_mm = heights(scores["1.2.21"])
        assert np.interp(z_mm, LEVELS_MM, height_mm) == pytest.approx(0.0, abs=1e-6)


def test_the_residual_is_the_spread_about_the_fitted_lines(bank):
    """Scores on a line, but for +- 2 mm on every other slice."""
    straight = {
        s.series_uid: (np.asarray(s.z_mm) + 2.0 * (-1.0) ** np.arange(len(s.z_mm))) / 10
        for s in bank.series
    }
    heights = calibrate.fit(bank, straight, zero=("1.2.21", 0.0))
    assert heights.mm_per_score == pytest.approx(10.0, rel=0.05)
    assert heights.residual_sd_mm == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(
    ("zero", "patients", "message"),
    [(("1.9", 0.0), ("*",), "no series 1.9"), (("1.2.21", 0.0), ("Q*",), "covers 150 mm")],
)
def test_a_calibration_without_its_series_is_refused(bank, scores, zero, patients, message):
    with pytest.raises(ValueError, match=message):
        calibrate.fit(bank, scores, zero=zero, patients=patients)


STRAIGHT_MM = {"lung_base": 60.0, "lung_apex": 300.0}  # above the lowest slice of a made body


def made_finder(inputs, z_mm, spec) -> dict[str, float]:
    """Landmarks at fixed distances; in the drawn adult, which is drawn finer, where they are."""
    if z_mm[1] - z_mm[0] < 5:
        return {"lung_base": 200.0, "lung_apex": 460.0, "carina": 900.0}
    return {name: float(z_mm[0]) + mm for name, mm in STRAIGHT_MM.items()}


@pytest.fixture(scope="module")
def straight(bank) -> dict[str, Any]:
    """Scores of a perfect network: every body alike, a unit a cm, each table at its own height."""
    return {s.series_uid: (np.asarray(s.z_mm) - s.z_mm[0]) / 10 for s in bank.series}


def test_the_drawn_adult_goes_through_the_finder(bank):
    reference = calibrate.drawn_landmarks(made_finder, bank.spec)
    assert (reference["lung_base"], reference["lung_apex"]) == (200.0, 460.0)
    assert reference["carina"] == regions.REFERENCE["carina"]  # a landmark missed is none
    assert reference["femoral_heads"] == regions.REFERENCE["femoral_heads"]


def test_landmarks_of_phantoms_and_of_other_patients_do_not_count(bank):
    assert set(calibrate.find_landmarks(bank, made_finder)) == {
        "1.2.11",
        "1.2.12",
        "1.2.21",
        "1.2.31",
    }
    assert set(calibrate.find_landmarks(bank, made_finder, ("P2", "phan*"))) == {"1.2.21"}


def test_height_0_and_regions_come_from_landmarks(bank, straight):
    result = calibrate.calibrate(bank, straight, find=made_finder)
    found = result.landmarks
    assert {name: f.patients for name, f in found.items()} == {"lung_base": 3, "lung_apex": 3}
    base, apex = found["lung_base"], found["lung_apex"]
    assert apex.height_mm - base.height_mm == pytest.approx(240.0)
    # The middle of S1 lies below the lung base as it does in the average adult, to scale.
    places = regions.reference_heights({"lung_base": 200.0, "lung_apex": 460.0})
    share = (places["lung_base"] - regions.ZERO_MM) / (places["lung_apex"] - places["lung_base"])
    assert base.height_mm == pytest.approx(240.0 * share)
    chest = next(r for r in result.regions if r.name == "chest")
    assert (chest.low_mm, chest.high_mm) == pytest.approx(
        (base.height_mm, apex.height_mm), abs=0.06
    )
    assert "S1" in result.zero
    text = result.to_markdown()
    assert "| lung_base |" in text and "**chest**" in text and "unsupported" in text


def test_height_0_can_be_named_and_regions_follow_it(bank, straight):
    free = calibrate.calibrate(bank, straight, find=made_finder)
    lowest = bank.series[2].z_mm[0]
    assert bank.series[2].series_uid == "1.2.21"
    named = calibrate.calibrate(bank, straight, find=made_finder, zero=("1.2.21", lowest))
    assert named.heights.intercept_mm == pytest.approx(0.0)
    assert named.landmarks["lung_base"].height_mm == pytest.approx(60.0)
    moved = named.landmarks["lung_base"].height_mm - free.landmarks["lung_base"].height_mm
    for before, after in zip(free.regions, named.regions, strict=True):
        for a, b in ((before.low_mm, after.low_mm), (before.high_mm, after.high_mm)):
            assert (a is None) == (b is None)
            assert a is None or b - a == pytest.approx(moved, abs=0.11)


def test_without_landmarks_height_0_must_be_named(bank, straight):
    def nothing(inputs, z_mm, spec) -> dict[str, float]:
        return {}

    with pytest.raises(ValueError, match="no landmark of"):
        calibrate.calibrate(bank, straight, find=nothing)
    result = calibrate.calibrate(bank, straight, find=nothing, zero=("1.2.21", 0.0))
    assert {r.low.support for r in result.regions} == {"unsupported"}


def test_an_evaluation_tells_seen_from_unseen_patients(bank, reading, scores):
    figures = evaluate.series_figures(bank, reading)
    assert [(f.patient, f.seen) for f in figures] == [
        ("P3", False),
        ("P1", True),
        ("P1", True),
        ("P2", True),
        ("phantom-0", True),
    ]
    first = figures[0]
    assert (first.series_uid, first.slices, first.extent_mm) == ("1.2.31", 40, 390.0)
    z_mm, height_mm = np.asarray(bank.series[3].z_mm), 10 * scores["1.2.31"]
    assert first.pearson_r == pytest.approx(np.corrcoef(z_mm, height_mm)[0, 1])
    assert (first.lowest_mm, first.highest_mm) == (height_mm.min(), height_mm.max())


def test_an_evaluation_aligns_the_series_of_one_patient(bank, reading):
    """The same body, moved: the offset is the way it was moved, whatever the network knows."""
    (pair,) = evaluate.pair_figures(bank, reading)
    assert (pair.patient, pair.fixed, pair.moving) == ("P1", "1.2.11", "1.2.12")
    assert (pair.seen, pair.same_study) == (True, False)
    assert pair.l1_mm == pytest.approx(-SHIFT_MM)


def test_an_evaluation_can_be_written(tmp_path, bank, reading):
    series = evaluate.series_figures(bank, reading)
    pairs = evaluate.pair_figures(bank, reading)
    text = evaluate.to_markdown(series, pairs)
    assert "| P1 | yes | no | -50.0 |" in text
    values = json.loads(json.dumps(evaluate.to_json(series, pairs)))
    assert len(values["series"]) == 5 and len(values["pairs"]) == 1
    counted = {(s["part"], s["seen"]): s["series"] for s in values["summary"]}
    assert sum(counted.values()) == 5 and counted[evaluate.PHANTOM, True] == 1
    evaluate.plot(bank, reading, series, tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_marked_anatomy_is_read_along_its_line(tmp_path, bank):
    """Heights that are 1.1 times the position: slope 1.1, nothing left."""
    height_mm = {s.series_uid: 1.1 * np.asarray(s.z_mm) for s in bank.series}
    read = evaluate.Reading(height_mm, frozenset(), frozenset())
    marks = tmp_path / "marks.json"
    vertebrae = {f"T{k}": {"z_mm": 90.0 + 10 * k} for k in range(1, 6)}
    marks.write_text(json.dumps({"series": "1.2.21", "vertebrae": vertebrae}))
    found = evaluate.mark_figures(bank, read, marks)
    assert (found.marks, found.seen) == (5, True)
    assert found.slope == pytest.approx(1.1) and found.residual_sd_mm == pytest.approx(0, abs=1e-6)
    marks.write_text(json.dumps({"series": "1.9", "vertebrae": vertebrae}))
    with pytest.raises(ConfigError, match=r"1\.9"):
        evaluate.mark_figures(bank, read, marks)


def test_every_patient_is_held_out_by_one_fold_and_read_by_it(tmp_path, bank):
    config = replace(FULL, steps=3, stacks=2, m=4, augmentation=None)
    told = []
    folds.run(bank, config, tmp_path, count=3, report=lambda k, p: told.append((k, p.step)))
    assert {k for k, _ in told} == {0, 1, 2}
    listing = json.loads((tmp_path / "folds.json").read_text())
    assert sorted(listing) == ["P1", "P2", "P3", "phantom-0"]
    for k in range(3):
        _, saved, steps = train.load(tmp_path / f"fold-{k}")
        assert steps == 3
        assert set(saved.held_out) == {p for p, f in listing.items() if f == f"fold-{k}"}
    reading = evaluate.read_folds(tmp_path, bank)
    assert reading.unseen == set(listing)
    assert reading.height_mm.keys() == {s.series_uid for s in bank.series}
    # Again, nothing is left to do; a fold that saw its patients is refused.
    told.clear()
    folds.run(bank, config, tmp_path, count=3, report=lambda k, p: told.append(k))
    assert not told
    (tmp_path / "folds.json").write_text(json.dumps(dict.fromkeys(listing, "fold-0")))
    with pytest.raises(ConfigError, match="fold-0"):
        evaluate.read_folds(tmp_path, bank)


def test_an_exported_bundle_scores_as_the_run_does(tmp_path, run, bank, scores):
    heights = calibrate.fit(bank, scores, zero=("1.2.21", 100.0))
    digest = export.bundle(
        run, bank, heights, name="made", out=tmp_path, zero="the middle", commit="c0ffee"
    )
    bundle = weights.load(tmp_path)
    assert (bundle.digest, bundle.name) == (digest, "made")
    assert (bundle.heights, bundle.spec) == (heights, bank.spec)
    scorer = Scorer(bundle, torch.device("cpu"), 32)
    for s in bank.series:
        np.testing.assert_allclose(
            scorer.score(list(bank.inputs(s))), scores[s.series_uid], atol=1e-3
        )


def test_an_exported_bundle_says_what_it_came_from(tmp_path, run, bank):
    export.bundle(
        run,
        bank,
        HeightMap(10.0, 0.0, 5.0),
        name="made",
        out=tmp_path,
        zero="the middle",
        commit="c0ffee",
    )
    training = json.loads((tmp_path / weights.MANIFEST).read_text())["training"]
    assert training == {
        "steps": 20,
        "seed": 0,
        "stacks": 4,
        "m": 8,
        "loss": {
            "order": 1.0,
            "distance": 1.0,
            "millimetres": 1.0,
            "anchored": 0.0,
            "below": 0.0,
        },
        "patients": 2,  # P3 was held out
        "series": 3,
        "slices": 120,
        "phantoms": 1,
        "bank_sha256": bank.digest(),
        "height_zero": "the middle",
        "commit": "c0ffee",
    }


# The command line


def test_the_command_line_helps():
    done = subprocess.run(
        [sys.executable, "-m", "training", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for command in ("index", "train", "evaluate", "calibrate", "export"):
        assert command in done.stdout


def test_the_command_line_goes_from_an_archive_to_a_bundle(tmp_path, folder):
    def call(*arguments: object) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    config = tmp_path / "config.toml"
    config.write_text('steps = 2\nstacks = 2\nm = 4\n[network]\nkind = "compact"\nwidth = 0.25\n')
    bank, run, out = tmp_path / "bank", tmp_path / "run", tmp_path / "bundle"
    text = call("index", folder, "--bank", bank, "--workers", 1)
    assert text.splitlines()[0] == "4 series of 3 patients, 160 slices"
    assert "refused, not_dicom: 2" in text
    call("train", "--bank", bank, "--run", run, "--config", config, "--held-out", "P3")
    assert "| P3 | trunk | no | 40 |" in call(
        "evaluate", "--bank", bank, "--run", run, "--out", run
    )
    assert json.loads((run / "evaluation.json").read_text())["series"][0]["patient"] == "P3"
    refused = CliRunner().invoke(
        main, ["export", "--bank", str(bank), "--run", str(run), "--name", "x", "--out", str(out)]
    )
    assert refused.exit_code == 1 and "not calibrated" in refused.output
    call("calibrate", "--bank", bank, "--run", run, "--zero", "1.2.21", "100")
    digest = call("export", "--bank", bank, "--run", run, "--name", "site", "--out", out)
    bundle = weights.load(out)
    assert bundle.digest == digest.strip()
    assert bundle.manifest["training"]["height_zero"] == "100 mm in Series 1.2.21"
    table = json.loads((run / "regions.json").read_text())
    assert [r.name for r in bundle.regions] == [r["name"] for r in table["regions"]]
    assert len(bundle.regions) == len(regions.CATALOGUE)
    assert "| **chest** | 816094009 |" in (run / "regions.md").read_text()


def test_the_command_line_says_when_an_archive_holds_nothing_to_train_on(tmp_path):
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(
        main, ["index", str(tmp_path / "empty"), "--bank", str(tmp_path / "bank")]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "0 series" in result.output or result.exit_code != 0


def test_an_ablation_takes_one_term_away_at_a_time(tmp_path, bank):
    config = replace(FULL, steps=2, stacks=2, m=4, augmentation=None)
    rows = ablate.run(bank, config, tmp_path, terms=ablate.named(["order", "ends"]), count=3)
    assert [r["without"] for r in rows] == [ablate.WHOLE, "order", "ends"]
    whole, order = (train.load(tmp_path / n)[1] for n in ("as-configured", "order"))
    assert (whole.order, order.order) == (config.order, 0.0)
    assert whole == replace(order, order=config.order)
    text = ablate.to_markdown(rows, config)
    assert "| nothing |" in text and "| order | Yan et al. 2018, equation 2 |" in text
    with pytest.raises(ConfigError, match="no term 'x'"):
        ablate.named(["x"])
