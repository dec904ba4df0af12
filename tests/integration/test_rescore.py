"""A bundle is exchanged: stored curves are scored anew from the inputs that were kept."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from sqlalchemy import Engine, delete

from db import engine as engines
from db import schema
from dicomnode import backfill, dicomio, files, rescore, store, weights
from dicomnode.cli import main
from dicomnode.config import Settings
from dicomnode.core import network, outline, phantom
from dicomnode.core.curve import HeightMap
from dicomnode.core.network import NetworkConfig
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import WeightsError
from dicomnode.model import OffsetStatus, PatientKey, Reason, SeriesState
from dicomnode.node import serve
from dicomnode.node.score import Scorer
from dicomnode.spool import Spool
from dicomnode.weights import Bundle
from tests.dicom import PATIENT_ID, part10

PATIENT = PatientKey(PATIENT_ID, "HOSPITAL")
PRIOR, FOLLOW_UP = "1.2.2", "1.2.3"
STUDIES = {PRIOR: (datetime(2025, 3, 1), 0.0), FOLLOW_UP: (datetime(2026, 3, 1), 37.0)}
SLICES = 14
MATRIX, PIXEL_MM = 96, 4.5

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def random_bundle(folder: Path, seed: int, **spec: Any) -> Bundle:
    """Return a saved bundle of untrained weights: its scores mean nothing, but are its own."""
    torch.manual_seed(seed)
    net = network.build(NetworkConfig(kind="compact", width=0.25)).eval()
    torch.nn.init.normal_(net.head.weight, std=3.0)
    weights.save(
        folder,
        net,
        name=f"random {seed}",
        spec=replace(PreprocessSpec(), **spec),
        heights=HeightMap(mm_per_score=10.0 + seed, intercept_mm=5.0 * seed, residual_sd_mm=5.0),
        training={},
    )
    return weights.load(folder)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Two studies of a phantom, in files; the newer lies 37 mm higher and 9 mm to the left."""
    root = tmp_path_factory.mktemp("archive")
    z_mm = np.linspace(80.0, 280.0, SLICES)
    for series_uid, (when, shift) in STUDIES.items():
        images = phantom.volume(
            phantom.patient(5), z_mm, pixel_mm=PIXEL_MM, matrix=MATRIX, seed=int(shift)
        )
        for k, image in enumerate(images):
            first = -(MATRIX - 1) / 2 * PIXEL_MM
            ds = dicomio.ct_dataset(
                image,
                patient=PATIENT,
                study_uid=f"{series_uid}.0",
                series_uid=series_uid,
                sop_instance_uid=f"{series_uid}.{k + 1}",
                instance_number=k + 1,
                image_position=(first + shift / 4, first, float(z_mm[k]) + shift),
                pixel_mm=PIXEL_MM,
                spacing_mm=float(z_mm[1] - z_mm[0]),
                study_datetime=when,
                frame_of_reference_uid=f"{series_uid}.99",
            )
            path = root / series_uid / f"{k:03d}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(part10(ds))
    return root


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    random_bundle(folder / "a", 1)
    random_bundle(folder / "b", 2)
    random_bundle(folder / "other input", 3, pixel_mm=4.0)
    return {path.name: path for path in folder.iterdir()}


@dataclass
class Node:
    """The settings of a node that imports, and its database; on its own or beside another."""

    folder: Path
    url: str
    bundle: Path
    previews_days: int = 30

    @property
    def settings(self) -> Settings:
        return Settings(
            node={"port": 0, "peers": [{"ae_title": "PACS", "host": "127.0.0.1", "port": 104}]},
            spool={"path": self.folder / "spool", "reserve_bytes": 0},
            database={"url": self.url},
            score={"model": self.bundle, "device": "cpu", "batch": 8},
            series={"quiet_seconds": 0},
            keep={"previews_days": self.previews_days},
        )

    def cli(self, *arguments: str) -> Result:
        """Run a command under these settings."""
        config = self.folder / "node.toml"
        config.write_text(
            f"""\
[spool]
path = "{self.folder / "spool"}"
reserve_bytes = 0
[database]
url = "{self.url}"
[score]
model = "{self.bundle}"
device = "cpu"
batch = 8
[series]
quiet_seconds = 0
[keep]
previews_days = {self.previews_days}
"""
        )
        command = [*arguments, "--config", str(config)]
        return CliRunner().invoke(main, command, catch_exceptions=False)

    def found(self) -> dict[str, Any]:
        """Return what is stored of each Series, and the offsets of every pair."""
        with store.opened(self.url) as engine, store.reading(engine) as session:
            rows = {row.series_uid: row for row in store.list_series(session)}
            curves = store.curves_of(session, rows)
            offsets = {s.offset.method: s for s in store.offsets_of(session)}
        return {"rows": rows, "curves": curves, "offsets": offsets}


@pytest.fixture
def node(tmp_path, database_url, archive, bundles) -> Node:
    """A node that imported the archive by bundle A."""
    made = Node(tmp_path, database_url, bundles["a"])
    backfill.run([archive], made.settings)
    return made


@pytest.fixture
def fresh(tmp_path_factory, archive, bundles) -> dict[str, Any]:
    """What a node that imported the archive by bundle B holds."""
    folder = tmp_path_factory.mktemp("fresh")
    made = Node(folder, f"sqlite:///{folder / 'node.sqlite'}", bundles["b"])
    backfill.run([archive], made.settings)
    return made.found()


def opened(node: Node) -> Engine:
    return engines.create(node.url)


def test_rescored_curves_and_offsets_are_those_of_a_fresh_import(node, fresh, bundles):
    before = node.found()
    a, b = (weights.load(bundles[name]).digest for name in ("a", "b"))
    assert {c.model for c in before["curves"].values()} == {a}
    node.bundle = bundles["b"]
    result = node.cli("rescore", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert sorted(told.pop("rescored")) == [PRIOR, FOLLOW_UP]
    assert told == {
        "model": b,
        "pairs": 1,
        "without_inputs": [],
        "other_input": [],
        "changed": [],
    }
    after = node.found()
    for uid, mine in after["curves"].items():
        theirs, old = fresh["curves"][uid], before["curves"][uid]
        assert mine.model == theirs.model == b
        assert mine.z_mm.tolist() == theirs.z_mm.tolist()
        assert (mine.sop_instance_uids, mine.frames) == (theirs.sop_instance_uids, theirs.frames)
        np.testing.assert_allclose(mine.score, theirs.score, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mine.height_mm, theirs.height_mm, rtol=1e-4, atol=1e-3)
        np.testing.assert_array_equal(mine.body_centre_mm, theirs.body_centre_mm)
        assert mine.quality.flags == theirs.quality.flags
        assert np.abs(mine.score - old.score).max() > 0.1  # the two bundles do differ
    assert list(after["offsets"]) == list(fresh["offsets"])
    for method, mine in after["offsets"].items():
        theirs = fresh["offsets"][method]
        assert (mine.model, mine.fixed_series, mine.moving_series) == (b, FOLLOW_UP, PRIOR)
        assert mine.offset.status is theirs.offset.status
        for name in ("offset_mm", "overlap_mm"):
            assert getattr(mine.offset, name) == pytest.approx(
                getattr(theirs.offset, name), abs=0.01
            )
    for uid, row in after["rows"].items():
        old = before["rows"][uid]
        assert (row.revision, row.state) == (2, SeriesState.CURVE)
        assert replace(row, revision=1, quality=None, height_mm=None, model=None) == replace(
            old, quality=None, height_mm=None, model=None
        )
    assert PATIENT_ID not in result.output


@on_sqlite
def test_the_shift_in_plane_is_known_from_node_and_files(node, archive, bundles):
    scorer = Scorer(weights.load(bundles["a"]), torch.device("cpu"), 8)
    from_files = {s.header.series_uid: s.outcome for s in files.score([archive], scorer).series}
    for curves in (node.found()["curves"], from_files):
        dx_mm, dy_mm = outline.in_plane(curves[FOLLOW_UP], curves[PRIOR], 37.0)
        assert dx_mm == pytest.approx(37.0 / 4, abs=1.0)
        assert dy_mm == pytest.approx(0.0, abs=1.0)


@on_sqlite
def test_rescoring_again_does_nothing(node, bundles):
    node.bundle = bundles["b"]
    assert node.cli("rescore").exit_code == 0
    before = node.found()
    result = node.cli("rescore", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rescored"] == []
    assert "0 Series scored anew by random 2" in result.stderr
    after = node.found()
    assert after["rows"] == before["rows"]
    assert after["offsets"] == before["offsets"]


@on_sqlite
def test_going_back_gives_the_first_curves(node, bundles):
    before = node.found()
    for name in ("b", "a"):
        node.bundle = bundles[name]
        assert node.cli("rescore").exit_code == 0
    after = node.found()
    for uid, mine in after["curves"].items():
        assert mine.model == before["curves"][uid].model
        np.testing.assert_allclose(mine.score, before["curves"][uid].score, rtol=1e-4, atol=1e-4)
    assert {row.revision for row in after["rows"].values()} == {3}


@on_sqlite
def test_one_series_may_be_named_and_pairs_wait_for_the_other(node, bundles):
    node.bundle = bundles["b"]
    result = node.cli("rescore", "--series", PRIOR)
    assert result.exit_code == 0 and "1 Series scored anew" in result.stderr
    found = node.found()
    digests = {uid: c.model for uid, c in found["curves"].items()}
    assert digests[PRIOR] != digests[FOLLOW_UP]
    for stored in found["offsets"].values():
        assert stored.offset.status is OffsetStatus.REFUSED
        assert "different bundles" in stored.offset.reason
    assert node.cli("rescore", "--series", FOLLOW_UP).exit_code == 0
    statuses = {stored.offset.status for stored in node.found()["offsets"].values()}
    assert statuses <= {OffsetStatus.OK, OffsetStatus.EXTRAPOLATED, OffsetStatus.REFUSED}
    assert all(
        "different bundles" not in (stored.offset.reason or "")
        for stored in node.found()["offsets"].values()
    )


@on_sqlite
def test_a_run_that_is_broken_off_goes_on_where_it_was(node, bundles, caplog):
    caplog.set_level(logging.DEBUG)
    bundle = weights.load(bundles["b"])
    scorer = Scorer(bundle, torch.device("cpu"), 8)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    engine = opened(node)
    plan = rescore.plan(engine, bundle)
    assert {s.series_uid for s in plan.series} == {PRIOR, FOLLOW_UP}
    with pytest.raises(KeyboardInterrupt):
        rescore.run(engine, scorer, plan.series, stop)
    (left,) = rescore.plan(engine, bundle).series
    summary = rescore.run(
        engine, scorer, plan.series
    )  # of the old plan: what is done is not redone
    assert summary.rescored == [left.series_uid]
    assert len(summary.changed) == 1
    engine.dispose()
    assert {row.revision for row in node.found()["rows"].values()} == {2}
    assert caplog.text.count("series rescored") == 2
    assert PATIENT_ID not in caplog.text


def test_a_slice_that_arrives_meanwhile_is_not_lost(node, bundles, archive):
    """The worker reopens the Series between the inputs being read and the scores stored."""
    bundle = weights.load(bundles["b"])

    class Slow(Scorer):
        def score(self, inputs: Any) -> Any:
            if not late:
                late.append(deliver())
            return super().score(inputs)

    late: list[None] = []

    def deliver() -> None:
        ds = dicomio.read(archive / PRIOR / "000")
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{PRIOR}.500"
        ds.ImagePositionPatient[2] = 70.0
        path = node.folder / "late"
        path.write_bytes(part10(ds))
        backfill.run([path], node.settings)

    engine = opened(node)
    plan = rescore.plan(engine, bundle)
    summary = rescore.run(engine, Slow(bundle, torch.device("cpu"), 8), plan.series)
    assert (summary.rescored, summary.changed) == ([FOLLOW_UP], [PRIOR])
    plan = rescore.plan(engine, bundle)
    summary = rescore.run(engine, Scorer(bundle, torch.device("cpu"), 8), plan.series)
    engine.dispose()
    assert (summary.rescored, summary.pairs) == ([PRIOR], 1)
    found = node.found()["curves"]
    assert {c.model for c in found.values()} == {bundle.digest}
    assert len(found[PRIOR].z_mm) == SLICES + 1


@on_sqlite
def test_a_slice_for_which_another_bundle_gives_no_number_is_set_aside(node, bundles):
    bundle = weights.load(bundles["b"])

    class Blind(Scorer):
        def score(self, inputs: Any) -> Any:
            scores = super().score(inputs)
            scores[3] = np.nan
            return scores

    engine = opened(node)
    plan = rescore.plan(engine, bundle)
    summary = rescore.run(engine, Blind(bundle, torch.device("cpu"), 8), plan.series)
    engine.dispose()
    assert (sorted(summary.rescored), summary.pairs) == ([PRIOR, FOLLOW_UP], 1)
    found = node.found()
    for uid, curve in found["curves"].items():
        assert len(curve.z_mm) == SLICES - 1
        assert f"{uid}.4" not in curve.sop_instance_uids
        assert found["rows"][uid].set_aside == {Reason.NO_SCORE: 1}


@on_sqlite
def test_curves_without_inputs_are_counted_and_come_back_by_import(node, bundles, archive, fresh):
    engine = opened(node)
    with store.writing(engine) as session:
        session.execute(delete(schema.Preview))
    engine.dispose()
    before = node.found()
    node.bundle = bundles["b"]
    result = node.cli("rescore", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["without_inputs"] == [PRIOR, FOLLOW_UP]
    assert "2 Series without kept inputs: import their files again" in result.stderr
    assert node.found()["rows"] == before["rows"]
    backfill.run([archive], node.settings)
    for uid, mine in node.found()["curves"].items():
        assert mine.model == fresh["curves"][uid].model
        assert mine.score.tolist() == pytest.approx(fresh["curves"][uid].score.tolist(), abs=1e-3)
    assert node.cli("rescore").exit_code == 0


@on_sqlite
def test_inputs_made_another_way_are_refused_with_the_reason(node, bundles):
    before = node.found()
    result = node.cli("rescore", "--json", "--model", str(bundles["other input"]))
    assert result.exit_code == 1
    assert json.loads(result.stdout)["other_input"] == [PRIOR, FOLLOW_UP]
    assert "2 Series whose inputs were made another way than this bundle's" in result.stderr
    assert "[score] model is another bundle" in result.stderr
    assert node.found()["rows"] == before["rows"]
    assert node.found()["offsets"] == before["offsets"]


@on_sqlite
def test_wrong_words_are_told(node, tmp_path):
    unknown = node.cli("rescore", "--series", "9.9")
    assert (unknown.exit_code, unknown.stderr) == (1, "the node never saw this Series\n")
    (tmp_path / "no bundle").mkdir()
    assert node.cli("rescore", "--model", str(tmp_path / "no bundle")).exit_code == 2
    assert node.cli("rescore", "--model", str(tmp_path / "nothing")).exit_code == 2
    node.url = f"sqlite:///{tmp_path / 'none.sqlite'}"
    assert node.cli("rescore").exit_code == 2


@on_sqlite
def test_a_series_that_still_arrives_is_left_to_the_node(node, bundles):
    engine = opened(node)
    with store.writing(engine) as session:
        session.query(schema.Series).filter_by(series_uid=PRIOR).update({"state": "open"})
    engine.dispose()
    node.bundle = bundles["b"]
    result = node.cli("rescore", "--series", PRIOR)
    assert (result.exit_code, result.stderr[:14]) == (1, "still arriving")
    assert json.loads(node.cli("rescore", "--json").stdout)["rescored"] == [FOLLOW_UP]


# The node


Count = Callable[[], tuple[int, int]]


@pytest.fixture
def count_previews(node) -> Count:
    def count() -> tuple[int, int]:
        """Return how many curves, and how many inputs beside slices, are kept."""
        engine = opened(node)
        with store.reading(engine) as session:
            found = (
                session.query(schema.Preview).count(),
                session.query(schema.Slice).filter(schema.Slice.preview.is_not(None)).count(),
            )
        engine.dispose()
        return found

    return count


def idle(node: Node) -> None:
    """Let a worker do all that there is to do."""
    with serve.opened_worker(node.settings) as (worker, _, _):
        while worker.step():
            pass


@on_sqlite
def test_the_worker_drops_what_was_kept_long_enough(node, count_previews):
    assert count_previews() == (2, 0)
    idle(node)
    assert count_previews() == (2, 0)
    engine = opened(node)
    with store.writing(engine) as session:
        ages = {PRIOR: datetime(2020, 1, 1).astimezone(), FOLLOW_UP: datetime.now().astimezone()}
        for uid, when in ages.items():
            series = session.query(schema.Series).filter_by(series_uid=uid).one()
            session.get_one(schema.Preview, series.id).arrived_at = when
    engine.dispose()
    idle(node)
    assert count_previews() == (1, 0)
    assert len(node.found()["curves"]) == 2


@on_sqlite
def test_a_node_that_keeps_none_stores_none_and_drops_what_was_kept(
    node, count_previews, bundles, archive
):
    node.previews_days = 0
    idle(node)
    assert count_previews() == (0, 0)
    node.bundle = bundles["b"]  # so that all is scored and stored once more
    backfill.run([archive], node.settings)
    assert count_previews() == (0, 0)
    assert {c.model for c in node.found()["curves"].values()} == {weights.load(bundles["b"]).digest}


@on_sqlite
def test_the_worker_says_that_the_bundle_was_exchanged(node, bundles, caplog):
    caplog.set_level(logging.WARNING)
    idle(node)
    assert "curves of another bundle" not in caplog.text
    node.bundle = bundles["b"]
    idle(node)
    (record,) = [r for r in caplog.records if r.message == "curves of another bundle"]
    assert record.curves == 2


@on_sqlite
@pytest.mark.parametrize("key", ["weights_sha256", "preprocess"])
def test_the_worker_refuses_a_bundle_whose_digest_or_input_does_not_match(node, tmp_path, key):
    folder = tmp_path / "altered"
    manifest = dict(random_bundle(folder, 4).manifest)
    manifest[key] = {**manifest[key], "version": 2} if key == "preprocess" else "0" * 64
    (folder / weights.MANIFEST).write_text(json.dumps(manifest))
    node.bundle = folder
    with pytest.raises(WeightsError), serve.opened_worker(node.settings):
        pass
    assert Spool(node.folder / "spool").pending(1) == []
