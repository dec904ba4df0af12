"""The node's main job through its front door: what is sent becomes curves and offsets.

Every command as a person types it, with the exit status that is documented.
"""

import copy
import csv
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
import SimpleITK
from click.testing import CliRunner
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid
from sqlalchemy import text

from dicomnode import store
from dicomnode.cli import main
from dicomnode.model import Evidence, Reason, SeriesState
from tests.e2e.conftest import (
    Node,
    Scan,
    association,
    cli,
    dcmsend,
    eventually,
    free_port,
    localizer,
    need,
    run,
    running_node,
    save,
    scan,
    send,
    storescu,
)

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

TOLERANCE_MM = 10.0
SEED = 9104  # of a patient that neither training nor the demo draws


def prior_of(seed: int = SEED, **options) -> Scan:
    """A thorax and abdomen, at 5 mm."""
    options = {"lowest": "iliac_crest", "spacing_mm": 5.0, "matrix": 256, **options}
    return scan(seed, table_mm=-120.0, when=datetime(2023, 3, 4, 9, 30), **options)


def follow_up_of(seed: int = SEED, **options) -> Scan:
    """A thorax and neck, at 3 mm, on another table."""
    options = {"highest": "chin", "spacing_mm": 3.0, "matrix": 256, **options}
    return scan(seed, table_mm=55.0, when=datetime(2024, 5, 2, 14, 5), **options)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running_node(tmp_path_factory.mktemp("main")) as node:
        yield node


def small(node: Node, patient: str, **options) -> Scan:
    """Send a small scan of a patient of this name, and wait for its curve."""
    made = scan(patient_id=f"CANARY-ID-{patient}", **options)
    assert set(send(node.port, made.slices)) == {0x0000}
    assert node.finished(made.series_uid, len(made.slices)).state is SeriesState.CURVE
    return made


def offset(node: Node, fixed: Scan, moving: Scan, *options: object) -> dict:
    answer = node.json("offset", fixed.study_uid, moving.study_uid, *options)
    assert answer["fixed"] == {"study_uid": fixed.study_uid, "series_uid": fixed.series_uid}
    assert answer["moving"] == {"study_uid": moving.study_uid, "series_uid": moving.series_uid}
    return answer


# The main job, on each database


def test_a_follow_up_and_its_late_prior_are_aligned(tmp_path, database_url):
    need("storescu", "dcmsend")
    prior, follow_up = prior_of(), follow_up_of()
    truth = follow_up.table_mm - prior.table_mm
    with running_node(tmp_path / "node", database_url) as node:
        run(storescu(node.port, save(follow_up.slices, tmp_path / "follow-up")))
        row = node.finished(follow_up.series_uid, len(follow_up.slices))
        assert (row.state, row.scored, row.set_aside) == (
            SeriesState.CURVE,
            len(follow_up.slices),
            {},
        )
        assert row.evidence is Evidence.RELEASED_AND_QUIET
        run(dcmsend(node.port, save(prior.slices, tmp_path / "prior")))
        assert node.finished(prior.series_uid, len(prior.slices)).state is SeriesState.CURVE
        node.idle()

        stored = offset(node, follow_up, prior)
        assert abs(stored["offset_mm"] - truth) <= TOLERANCE_MM
        assert (stored["status"], stored["method"], stored["reason"]) == ("ok", "robust", None)
        assert node.curve_uids(follow_up.series_uid) == follow_up.uids
        assert node.curve_uids(prior.series_uid) == prior.uids

        # The other way round it is the same offset, negated.
        back = offset(node, prior, follow_up)
        assert abs(back["offset_mm"] + truth) <= TOLERANCE_MM

        listed = node.json("series", "--study", prior.study_uid)
        assert [s["series_uid"] for s in listed] == [prior.series_uid]
        assert [s["state"] for s in listed] == ["curve"]


# A Series while it arrives, and after


def test_slices_are_scored_while_their_series_arrives(node):
    made = scan(patient_id="CANARY-ID-live")
    half = len(made.slices) // 2

    def listed() -> dict | None:
        rows = node.json("series", "--study", made.study_uid)
        return rows[0] if rows[0]["scored"] == half else None

    with association(node.port) as assoc:
        for ds in made.slices[:half]:
            assert assoc.send_c_store(ds).Status == 0x0000
        eventually(lambda: node.one(made.series_uid), "the Series is listed")
        seen = eventually(listed, "half of the slices are scored")
        assert (seen["state"], seen["received"], seen["revision"]) == ("open", half, 0)
        result = node.cli("curve", made.series_uid)
        assert result.returncode == 1
        assert f"still arriving: {half} slices scored of {half} received" in result.stderr
        for ds in made.slices[half:]:
            assert assoc.send_c_store(ds).Status == 0x0000
    row = node.finished(made.series_uid, len(made.slices))
    assert (row.state, row.scored, row.revision) == (SeriesState.CURVE, len(made.slices), 1)


def test_a_late_slice_reopens_its_series_and_its_offset_is_made_anew(node):
    prior = small(node, "late", when=datetime(2022, 1, 1))
    late = scan(patient_id="CANARY-ID-late", table_mm=40.0)
    *early, last = late.slices
    send(node.port, early)
    assert node.finished(late.series_uid, len(early)).revision == 1
    node.idle()
    first = offset(node, late, prior)
    send(node.port, [last])
    row = node.finished(late.series_uid, len(late.slices))
    assert (row.state, row.revision, row.scored) == (SeriesState.CURVE, 2, len(late.slices))
    assert node.curve_uids(late.series_uid) == late.uids
    node.idle()
    second = offset(node, late, prior)
    assert second["computed_at"] > first["computed_at"]
    assert abs(second["offset_mm"] - 40.0) <= TOLERANCE_MM


@pytest.mark.parametrize("first", [1, 5], ids=["one_slice", "five_slices"])
def test_what_came_before_a_long_pause_is_in_the_curve(node, first):
    # Alone these slices make no curve; the rest comes when that has long been stored.
    made = scan(patient_id="CANARY-ID-pause")
    send(node.port, made.slices[:first])
    row = node.finished(made.series_uid, first)
    assert row.reason is Reason.TOO_FEW_POSITIONS
    send(node.port, made.slices[first:])
    row = node.finished(made.series_uid, len(made.slices))
    assert row.state is SeriesState.CURVE
    assert node.curve_uids(made.series_uid) == made.uids
    assert row.set_aside == {}


def test_a_slice_that_was_sent_whole_after_all_is_in_the_curve(node):
    made = scan(patient_id="CANARY-ID-repaired")
    broken = copy.deepcopy(made.slices[5])
    broken.PixelData = broken.PixelData[:100]
    send(node.port, [*made.slices[:5], broken, *made.slices[6:]])
    row = node.finished(made.series_uid, len(made.slices))
    assert (row.state, row.set_aside) == (SeriesState.CURVE, {"pixel_data": 1})
    send(node.port, [made.slices[5]])
    eventually(
        lambda: node.curve_uids(made.series_uid) == made.uids, "the whole slice in the curve", 20
    )


def test_duplicates_change_nothing(node):
    prior = small(node, "again", when=datetime(2022, 1, 1))
    made = small(node, "again")
    node.idle()
    before = offset(node, made, prior), node.one(made.series_uid), node.one(prior.series_uid)
    for _ in range(2):
        send(node.port, made.slices)
    send(node.port, prior.slices[3:5])
    node.idle()
    after = offset(node, made, prior), node.one(made.series_uid), node.one(prior.series_uid)
    assert after == before
    assert after[1] is not None and after[1].revision == 1


def test_a_series_sent_over_two_associations_at_once_is_one_curve(node):
    made = scan(patient_id="CANARY-ID-two")
    with association(node.port) as first, association(node.port) as second:
        for i, ds in enumerate(made.slices):
            assert (first, second)[i % 2].send_c_store(ds).Status == 0x0000
    row = node.finished(made.series_uid, len(made.slices))
    assert (row.state, row.revision) == (SeriesState.CURVE, 1)
    assert node.curve_uids(made.series_uid) == made.uids


# What is no axial CT


def test_an_object_other_than_ct_is_ignored_with_its_reason(node):
    ds = copy.deepcopy(scan().slices[0])
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    ds.Modality, ds.SeriesInstanceUID, ds.SOPInstanceUID = "OT", generate_uid(), generate_uid()
    assert send(node.port, [ds]) == [0x0000]
    row = node.finished(ds.SeriesInstanceUID, 1)
    assert (row.state, row.reason) == (SeriesState.IGNORED, Reason.NOT_CT)
    (listed,) = node.json("series", "--study", ds.StudyInstanceUID)
    assert (listed["state"], listed["reason"]) == ("ignored", "not_ct_image")
    assert node.cli("curve", ds.SeriesInstanceUID).returncode == 1


def test_a_localizer_is_ignored_and_pairs_with_nothing(node):
    made = small(node, "localizer")
    scout = localizer(made)
    send(node.port, scout.slices)
    row = node.finished(scout.series_uid, len(scout.slices))
    assert (row.state, row.reason) == (SeriesState.IGNORED, Reason.LOCALIZER)
    assert "ignored:localizer" in node.cli("series", "--study", made.study_uid).stdout


def test_patients_with_one_id_of_two_issuers_are_two_patients(node):
    scans = [scan(patient_id="CANARY-ID-issuer") for _ in range(2)]
    for made, issuer in zip(scans, ("HOSPITAL-A", "HOSPITAL-B"), strict=True):
        for ds in made.slices:
            ds.IssuerOfPatientID = issuer
        send(node.port, made.slices)
        node.finished(made.series_uid, len(made.slices))
    node.idle()
    text = node.cli("offset", scans[0].study_uid, scans[1].study_uid, "--json").stdout
    # Computed because it was asked for, hence just now; nothing is stored.
    assert json.loads(text)["status"] == "ok"
    assert not stored_offsets(node, scans[0]) and not stored_offsets(node, scans[1])


def stored_offsets(node: Node, made: Scan) -> list[store.StoredOffset]:
    with store.reading(node.engine) as session:
        return [
            *store.offsets_of(session, fixed_study=made.study_uid),
            *store.offsets_of(session, moving_study=made.study_uid),
        ]


# Every command


@dataclass(frozen=True)
class Pair:
    """Two studies that a node holds, and the same as files."""

    fixed: Scan
    moving: Scan
    folder: Path


@pytest.fixture(scope="module")
def pair(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    made = Pair(follow_up_of(SEED + 1), prior_of(SEED + 1), folder)
    for name, part in (("fixed", made.fixed), ("moving", made.moving)):
        save(part.slices, folder / name)
        send(node.port, part.slices)
        node.finished(part.series_uid, len(part.slices))
    node.idle()
    return made


def assert_status(result: subprocess.CompletedProcess, expected: int) -> None:
    assert result.returncode == expected, f"{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr


def assert_png(path: Path) -> None:
    image = SimpleITK.ReadImage(str(path))
    assert min(image.GetSize()) > 200


def test_series_lists_by_patient_study_and_state(node, pair):
    patient = str(pair.fixed.slices[0].PatientID)
    rows = node.json("series", "--patient", patient)
    assert {r["series_uid"] for r in rows} == {pair.fixed.series_uid, pair.moving.series_uid}
    assert {r["patient_id"] for r in rows} == {patient}
    table = node.cli("series", "--state", "curve", "--study", pair.fixed.study_uid)
    assert_status(table, 0)
    assert pair.fixed.series_uid in table.stdout
    assert_status(node.cli("series", "--study", generate_uid()), 1)
    assert_status(node.cli("series", "--state", "bogus"), 2)


def test_curve_writes_json_csv_and_png(node, pair, tmp_path):
    uid = pair.fixed.series_uid
    text = node.cli("curve", uid)
    assert_status(text, 0)
    assert "body height" in text.stdout
    curve = node.json("curve", uid, "--csv", tmp_path / "c.csv", "--png", tmp_path / "c.png")
    assert curve["series_uid"] == uid
    z_mm = [s["z_mm"] for s in curve["slices"]]
    assert z_mm == sorted(z_mm) and len(z_mm) == len(pair.fixed.slices)
    assert {s["sop_instance_uid"] for s in curve["slices"]} == pair.fixed.uids
    heights = [s["height_mm"] for s in curve["slices"]]
    assert heights[-1] > heights[0] + 100
    with open(tmp_path / "c.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [float(r["z_mm"]) for r in rows] == z_mm
    assert {r["series_uid"] for r in rows} == {uid}
    assert_png(tmp_path / "c.png")
    assert_status(node.cli("curve", generate_uid()), 1)
    assert_status(node.cli("curve"), 2)


def test_offset_writes_a_transform_that_itk_reads(node, pair, tmp_path):
    truth = pair.fixed.table_mm - pair.moving.table_mm
    written = ("--transform", tmp_path / "t.tfm", "--png", tmp_path / "o.png")
    answer = offset(node, pair.fixed, pair.moving, *written)
    assert abs(answer["offset_mm"] - truth) <= TOLERANCE_MM
    transform = SimpleITK.ReadTransform(str(tmp_path / "t.tfm"))
    # ITK maps points of the fixed image to points of the moving one.
    x, y, z = transform.TransformPoint((1.0, 2.0, 3.0))
    moved = [answer[key] or 0.0 for key in ("dx_mm", "dy_mm", "offset_mm")]
    assert (x, y, z) == pytest.approx((1.0 - moved[0], 2.0 - moved[1], 3.0 - moved[2]), abs=1e-3)
    assert answer["sigma_mm"] > 0
    assert_png(tmp_path / "o.png")
    text = node.cli("offset", pair.fixed.study_uid, pair.moving.study_uid)
    assert_status(text, 0)
    assert f"{answer['offset_mm']:+.1f} mm" in text.stdout
    fast = offset(node, pair.fixed, pair.moving, "--method", "fast")
    assert fast["method"] == "fast"


def test_offset_of_what_is_not_there(node, pair):
    assert_status(node.cli("offset", pair.fixed.study_uid, generate_uid()), 1)
    assert_status(node.cli("offset", pair.fixed.study_uid), 2)
    studies = (pair.fixed.study_uid, pair.moving.study_uid)
    assert_status(node.cli("offset", *studies, "--method", "bogus"), 2)


def test_align_gives_the_offset_between_two_folders(pair, tmp_path):
    folders = (pair.folder / "fixed", pair.folder / "moving")
    written = ("--transform", tmp_path / "t.tfm", "--png", tmp_path / "a.png")
    result = cli("align", *folders, "--json", *written, cwd=tmp_path)
    assert_status(result, 0)
    answer = json.loads(result.stdout)
    assert abs(answer["offset_mm"] - (55.0 + 120.0)) <= TOLERANCE_MM
    assert answer["fixed"] == {
        "study_uid": pair.fixed.study_uid,
        "series_uid": pair.fixed.series_uid,
    }
    transform = SimpleITK.ReadTransform(str(tmp_path / "t.tfm"))
    assert transform.TransformPoint((0.0, 0.0, 0.0))[2] == pytest.approx(-answer["offset_mm"])
    assert_png(tmp_path / "a.png")


def test_align_without_two_curves(pair, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_status(cli("align", pair.folder / "fixed", tmp_path / "empty", cwd=tmp_path), 1)
    assert_status(cli("align", pair.folder / "fixed", tmp_path / "missing", cwd=tmp_path), 2)


def test_score_writes_json_csv_and_png_and_agrees_with_the_node(node, pair, tmp_path):
    written = ("--csv", tmp_path / "s.csv", "--png", tmp_path / "s.png")
    result = cli("score", pair.folder, "--json", *written, cwd=tmp_path)
    assert_status(result, 0)
    scored = {s["series_uid"]: s for s in json.loads(result.stdout)}
    assert scored.keys() == {pair.fixed.series_uid, pair.moving.series_uid}
    for made in (pair.fixed, pair.moving):
        one = scored[made.series_uid]
        assert (one["state"], one["reason"]) == ("curve", None)
        assert one["study_uid"] == made.study_uid
        assert one["patient_id"] == made.slices[0].PatientID
        assert {s["sop_instance_uid"] for s in one["slices"]} == made.uids
        stored = node.json("curve", made.series_uid)
        assert one["model"] == stored["model"]
        assert one["quality"]["pearson_r"] == pytest.approx(
            stored["quality"]["pearson_r"], abs=0.01
        )
        for a, b in zip(one["slices"], stored["slices"], strict=True):
            assert a["sop_instance_uid"] == b["sop_instance_uid"]
            assert a["z_mm"] == b["z_mm"]
            assert a["score"] == pytest.approx(b["score"], abs=0.01)
    with open(tmp_path / "s.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert {r["sop_instance_uid"] for r in rows} == pair.fixed.uids | pair.moving.uids
    assert_png(tmp_path / "s.png")


def test_score_of_what_is_no_ct(pair, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no image")
    result = cli("score", tmp_path / "other", cwd=tmp_path)
    assert_status(result, 1)
    assert "1 files not read: not_dicom" in result.stderr
    assert_status(cli("score", tmp_path / "missing", cwd=tmp_path), 2)
    assert_status(cli("score", cwd=tmp_path), 2)


def test_import_without_a_node_does_the_work_itself(tmp_path):
    made = scan()
    folder = save(made.slices, tmp_path / "archive" / "deep" / "er")
    (folder.parent / "index.txt").write_text("an archive's own file")
    alone = Node(tmp_path / "alone")
    try:
        result = alone.cli("import", tmp_path / "archive")
        assert_status(result, 0)
        assert f"{len(made.slices)} files taken" in result.stderr
        assert "1 files skipped: no DICOM" in result.stderr
        assert "1 curves" in result.stderr
        (row,) = alone.json("series")
        assert (row["state"], row["scored"]) == ("curve", len(made.slices))
        assert_status(alone.cli("import", tmp_path / "archive"), 0)  # a repeat does no harm
        (row,) = alone.json("series")
        assert row["revision"] == 1
        assert_status(alone.cli("import", tmp_path / "missing"), 2)
        assert_status(alone.cli("import"), 2)
        assert not alone.spool.pending(1)
    finally:
        alone.close()


def test_import_beside_a_running_node_feeds_it(node, tmp_path):
    prior = small(node, "import", when=datetime(2022, 1, 1))
    made = scan(patient_id="CANARY-ID-import", table_mm=70.0)
    result = node.cli("import", save(made.slices, tmp_path / "archive"))
    assert_status(result, 0)
    assert f"{len(made.slices)} files taken" in result.stderr
    # When the command is over, so is the work.
    assert node.curve_uids(made.series_uid) == made.uids
    assert abs(offset(node, made, prior)["offset_mm"] - 70.0) <= TOLERANCE_MM


def test_check_tries_everything_and_says_what_failed(node, tmp_path):
    good = node.write_config(tmp_path / "good.toml", {"DICOMNODE": node.port})
    result = node.cli("check", config=good)
    assert_status(result, 0)
    assert "series.quiet_seconds = 1.0" in result.stdout
    for name in ("spool", "database", "weights", "device", "peer DICOMNODE"):
        assert f"ok   {name}: " in result.stdout
    bad = node.write_config(tmp_path / "bad.toml", {"DICOMNODE": node.port, "GONE": free_port()})
    result = node.cli("check", "--json", config=bad)
    assert_status(result, 1)
    answer = json.loads(result.stdout)
    assert [c["name"] for c in answer["checks"] if not c["ok"]] == ["peer GONE"]
    assert answer["settings"]["node"]["port"] == node.port


def test_a_wrong_setting_stops_every_command(node, tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[node]\nprot = 11112\n")
    for arguments in (["check"], ["serve"], ["series"], ["db", "current"], ["import", tmp_path]):
        result = node.cli(*arguments, config=wrong)
        assert_status(result, 2)
        assert "node.prot: no such setting" in result.stderr


def test_serve_says_which_setting_is_wrong(node, tmp_path):
    nobody = node.write_config(tmp_path / "nobody.toml", {})
    result = node.cli("serve", "--only", "receive", config=nobody)
    assert_status(result, 2)
    assert "node.peers: nobody may send" in result.stderr
    taken = Node(tmp_path / "taken", port=node.port)
    result = taken.cli("serve", seconds=90)  # the whole node; it waits a while for the port
    assert_status(result, 2)
    assert "Address already in use" in result.stderr


def test_db_current_and_upgrade(tmp_path, database_url):
    empty = Node(tmp_path / "empty", database_url)
    result = empty.cli("db", "current")
    assert_status(result, 1)
    assert result.stdout.startswith("empty (this version needs ")
    head = result.stdout.split("needs ")[1].strip(")\n")
    result = empty.cli("series")  # a reader does not make a database by itself
    assert_status(result, 2)
    assert "dicomnode db upgrade" in result.stderr
    for _ in range(2):
        result = empty.cli("db", "upgrade")
        assert_status(result, 0)
        assert result.stdout.strip() == head
    result = empty.cli("db", "current")
    assert_status(result, 0)
    assert result.stdout.startswith(f"{head} (this version needs {head})")
    assert_status(empty.cli("series"), 1)  # no Series yet
    empty.close()


def test_a_database_of_a_later_version_is_left_alone(tmp_path, database_url):
    later = Node(tmp_path / "later", database_url)
    assert_status(later.cli("db", "upgrade"), 0)
    with later.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for arguments in (["db", "upgrade"], ["series"], ["serve", "--only", "work"]):
        result = later.cli(*arguments)
        assert_status(result, 2)
        assert "newer" in result.stderr
    later.close()


def test_every_command_shows_help_with_an_example():
    for arguments in (
        ["serve"], ["check"], ["import"], ["score"], ["series"], ["curve"], ["offset"], ["align"],
        ["demo"], ["db", "upgrade"], ["db", "current"],
    ):  # fmt: skip
        result = CliRunner().invoke(main, [*arguments, "--help"])
        assert result.exit_code == 0
        assert "Example:  dicomnode " in result.output
    assert CliRunner().invoke(main, ["bogus"]).exit_code == 2
