"""An archive becomes a bank: in one process, in several, on Ray, in one go or in many."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from pydicom.dataset import Dataset
from pydicom.uid import KeyObjectSelectionDocumentStorage

from dicomnode import dicomio
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import ConfigError
from tests.dicom import ct_dataset, part10
from training import archive, bank, fill
from training.__main__ import main

ROOT = Path(__file__).parents[2]
UIDS = ("1.2.1", "1.2.2", "1.2.3", "1.2.4")
SLICES = 9


def write(
    root: Path, uid: str, *, slices: int = SLICES, hu: int = -1024, **attributes: Any
) -> None:
    """Write one Series whose slices all differ, its files in no order of position."""
    for k in range(slices):
        ds = ct_dataset(
            PatientID=f"P{uid[-1]}",
            StudyInstanceUID=f"{uid}.0",
            SeriesInstanceUID=uid,
            SOPInstanceUID=f"{uid}.{k + 1}",
            ImagePositionPatient=["0", "0", str(10 * k)],
            RescaleIntercept=str(hu + 20 * k + int(uid[-1])),
            **attributes,
        )
        path = root / f"{k % 2}" / f"{uid}-{(k * 7) % slices}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part10(ds))


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "archive"
    for uid in UIDS:
        write(root, uid)
    write(root, "1.2.8", slices=3)  # too few
    (root / "notes.txt").write_text("no DICOM")
    return root


def fill_from(folder: Path, out: Path, spread=map) -> fill.Filled:
    found = archive.index([folder], cache=out / "headers.jsonl", spread=spread)
    return fill.build(out, found.series, spread=spread)


def contents(folder: Path) -> dict[str, bytes]:
    names = ("bank.json", "slices.npy", "journal.jsonl", "headers.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def whole(folder, tmp_path) -> Path:
    """The bank as one process makes it in one go."""
    out = tmp_path / "whole"
    out.mkdir()
    fill_from(folder, out)
    return out


def index(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["index", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_several_processes_make_the_same_bank(folder, whole, tmp_path):
    summary = index(folder, "--bank", tmp_path / "bank", "--workers", 2)
    assert (summary["series"], summary["decoded_series"]) == (4, 4)
    assert contents(tmp_path / "bank") == contents(whole)


def test_a_ray_cluster_makes_the_same_bank(folder, whole, tmp_path):
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "training", "index", folder, "--bank", tmp_path / "bank"]
    done = subprocess.run(
        [*command, "--ray", "local", "--workers", "2", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["series"] == 4
    assert contents(tmp_path / "bank") == contents(whole)


def test_without_ray_its_option_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["index", str(folder), "--bank", str(tmp_path / "bank"), "--ray", "local"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "dicomnode-ssbr[ray]" in result.output


KILLED = """
import os, signal, sys
from pathlib import Path
from training import archive, fill

def spread(function, items):
    for k, item in enumerate(items):
        if k == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield function(item)

out = Path(sys.argv[2])
found = archive.index([Path(sys.argv[1])], cache=out / "headers.jsonl")
fill.build(out, found.series, spread=spread)
"""


def test_a_killed_run_goes_on_and_makes_the_same_bank(folder, whole, tmp_path, monkeypatch):
    out = tmp_path / "bank"
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, folder, out, "2"], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(ConfigError, match="no finished bank"):
        bank.load(out)
    # As if it had been killed within the writing of the third Series.
    with open(out / "slices.npy", "ab") as slices:
        slices.write(b"\xff" * 70_000)
    for name in ("journal.jsonl", "headers.jsonl"):
        with open(out / name, "a") as journal:
            journal.write('{"patient": "P3", "st')

    read: list[Path] = []
    decode, header = dicomio.decode, archive._read_header
    monkeypatch.setattr(dicomio, "decode", lambda p, spec: (read.append(p), decode(p, spec))[1])
    monkeypatch.setattr(archive, "_read_header", lambda p, s: (read.append(p), header(p, s))[1])
    filled = fill_from(folder, out)
    assert filled.decoded == 2
    assert len(read) == 2 * SLICES  # and no header again
    assert contents(out) == contents(whole)


def test_a_second_run_decodes_nothing_and_changes_nothing(folder, tmp_path):
    first = index(folder, "--bank", tmp_path / "bank", "--workers", 1)
    before = contents(tmp_path / "bank")
    second = index(folder, "--bank", tmp_path / "bank", "--workers", 1)
    assert (first["decoded_series"], second["decoded_series"]) == (4, 0)
    assert contents(tmp_path / "bank") == before
    assert first["refused"] == second["refused"]


def test_what_is_new_is_added_and_what_is_gone_is_forgotten(folder, tmp_path):
    out = tmp_path / "bank"
    out.mkdir()
    old = fill_from(folder, out).bank
    inputs = {s.series_uid: np.array(old.inputs(s)) for s in old.series}
    for path in folder.rglob("1.2.1-*.dcm"):
        path.unlink()
    write(folder, "1.2.3", hu=-900)  # another reconstruction under the same name
    write(folder, "1.2.5")
    filled = fill_from(folder, out)
    assert filled.decoded == 2
    new = {s.series_uid: np.array(filled.bank.inputs(s)) for s in filled.bank.series}
    assert list(new) == ["1.2.2", "1.2.3", "1.2.4", "1.2.5"]
    for uid in ("1.2.2", "1.2.4"):
        np.testing.assert_array_equal(new[uid], inputs[uid])
    assert not np.array_equal(new["1.2.3"], inputs["1.2.3"])
    # Of a patient who is gone from the archive nothing stays.
    assert len(filled.bank.slices) == 4 * SLICES
    assert [p.name for p in out.glob("*.npy")] == ["slices-2.npy"]
    for file in out.iterdir():
        assert b"1.2.1.0" not in file.read_bytes()


def test_a_bank_of_other_inputs_is_made_anew(folder, tmp_path):
    found = archive.index([folder])
    fill.build(tmp_path / "bank", found.series)
    other = PreprocessSpec(pixel_mm=5.0)
    filled = fill.build(tmp_path / "bank", found.series, spec=other)
    assert (filled.decoded, filled.bank.spec) == (4, other)
    direct = fill.build(tmp_path / "direct", found.series, spec=other)
    np.testing.assert_array_equal(filled.bank.slices, direct.bank.slices)


def test_two_runs_do_not_fill_one_bank(folder, tmp_path):
    out = tmp_path / "bank"

    def spread(function, items):
        result = CliRunner().invoke(main, ["index", str(folder), "--bank", str(out)])
        assert result.exit_code == 1 and "another process" in result.output
        return map(function, items)

    assert fill.build(out, archive.index([folder]).series, spread=spread).decoded == 4


def test_phases_copies_and_what_was_rejected_are_no_slices_to_train_on(folder, tmp_path):
    """As of the node: one phase makes the Series, and rejection notes hold wherever they lie."""
    for phase, brighter in ((1, 0), (2, 500)):
        write(
            folder / f"phase {phase}", "1.2.5", slices=8 + phase, hu=-1024 + brighter,
            AcquisitionNumber=str(phase),
        )  # fmt: skip
    for path in sorted((folder / "phase 2").rglob("*.dcm")):
        ds = dicomio.read(path)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ds.SOPInstanceUID}.2"
        path.write_bytes(part10(ds))
        (path.parent / f"copy {path.name}").write_bytes(part10(ds))
    note = ct_dataset(
        SOPClassUID=KeyObjectSelectionDocumentStorage, Modality="KO",
        SeriesInstanceUID="1.2.4.99", SOPInstanceUID="1.2.4.99.1",
    )  # fmt: skip
    title, item = Dataset(), Dataset()
    title.CodeValue, title.CodingSchemeDesignator = "113001", "DCM"
    item.ReferencedSOPSequence = [Dataset() for _ in range(SLICES)]
    for k, reference in enumerate(item.ReferencedSOPSequence):
        reference.ReferencedSOPInstanceUID = f"1.2.4.{k + 1}"
    note.ConceptNameCodeSequence, note.ContentSequence = [title], [item]
    (folder / "0" / "note.dcm").write_bytes(part10(note))
    for _ in range(2):  # from the headers, then from what is kept of them
        summary = index(folder, "--bank", tmp_path / "bank")
        refused = summary["refused"]
        assert (summary["series"], summary["slices"]) == (4, 3 * SLICES + 10)
        assert refused["series"] == {"too_few_positions": 1, "rejected": 1, "not_ct_image": 1}
        assert refused["slices"] == {"duplicate_position": 9 + 10}
    found = archive.index([folder])
    (series,) = [s for s in found.series if s.series_uid == "1.2.5"]
    assert all("phase 2" in str(path) for path in series.paths)


def test_headers_that_an_earlier_release_kept_are_read_again(folder, tmp_path):
    out = tmp_path / "headers.jsonl"
    archive.index([folder], cache=out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    out.write_text("".join(json.dumps(row[:9]) + "\n" for row in rows))
    archive.index([folder], cache=out)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row[0]: row for row in again} == {row[0]: row for row in rows}


def test_a_series_whose_slices_do_not_decode_is_refused(folder, tmp_path):
    for path in folder.rglob("1.2.2-*.dcm"):
        path.write_bytes(path.read_bytes()[:-500])
    summary = index(folder, "--bank", tmp_path / "bank", "--workers", 1)
    assert summary["refused"]["series"] == {"too_few_positions": 1, "pixel_data": 1}
    assert (summary["series"], summary["slices"]) == (3, 3 * SLICES)
    again = index(folder, "--bank", tmp_path / "bank", "--workers", 1)
    assert again["refused"] == summary["refused"] and again["decoded_series"] == 0


def test_what_cannot_be_read_is_counted(folder, tmp_path):
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    summary = index(folder, "--bank", tmp_path / "bank", "--workers", 1)
    assert summary["refused"]["files"] == {"not_readable": 2, "not_dicom": 1}
    assert summary["files"] == 4 * SLICES + 3 + 3
    assert json.loads((tmp_path / "bank" / "index.json").read_text()) == summary


def test_a_summary_can_be_read(folder, tmp_path):
    write(folder, "1.2.2", slices=1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    result = CliRunner().invoke(main, ["index", str(folder), "--bank", str(tmp_path / "bank")])
    assert result.stdout.splitlines() == [
        "4 series of 4 patients, 35 slices",
        "refused, not_dicom: 1 files",
        "refused, too_few_positions: 1 series",
        "set aside, localizer: 1 slices",
    ]


def test_workers_of_an_index_do_not_load_torch():
    program = "import sys, training.__main__, training.fill; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
def test_an_index_can_be_interrupted_in_its_processes(folder, whole, tmp_path):
    """SIGINT of the group, as a terminal sends it; then it goes on."""
    command = [sys.executable, "-m", "training", "index", str(folder), "--workers", "2"]
    out = tmp_path / "bank"
    with subprocess.Popen([*command, "--bank", out], cwd=ROOT, start_new_session=True) as process:
        while not (out / "headers.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)  # until it is at work: nothing else tells
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    index(folder, "--bank", out, "--workers", 2)
    assert contents(out) == contents(whole)
