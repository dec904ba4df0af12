import errno
import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG2MPML
from sqlalchemy import Engine, event, func, select

from db import engine as engines
from db import schema
from dicomnode import dicomio, store, weights
from dicomnode.config import NodeSettings, Settings
from dicomnode.core import network
from dicomnode.core.curve import HeightMap
from dicomnode.core.network import NetworkConfig
from dicomnode.core.preprocess import Input, PreprocessSpec
from dicomnode.errors import DeviceUnavailable, DicomError, StoreUnavailable, WeightsError
from dicomnode.model import (
    Method,
    OffsetStatus,
    PatientKey,
    Reason,
    Scores,
    SeriesState,
    SpooledInstance,
)
from dicomnode.node import serve
from dicomnode.node.align import AlignStage
from dicomnode.node.assemble import AssembleStage
from dicomnode.node.score import POISON_ATTEMPTS, Scorer, ScoreStage, Taken
from dicomnode.spool import Spool
from dicomnode.weights import Bundle
from tests.dicom import PATIENT_ID, PATIENT_NAME, ct_dataset, part10
from tests.unit.test_robust import COVARIANCE

A, B = "0123456789abcdef", "fedcba9876543210"  # associations
SERIES, PRIOR, FOLLOW_UP = "1.2.1", "1.2.2", "1.2.3"
POISON = b"POISON"
QUIET = timedelta(seconds=5)
LEVELS = 21
BATCH = 8

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


# A body whose brightness grows with height, and a network that tells brightness: what curves
# and offsets come out is known beforehand.


def ct_slice(series_uid: str, level: int, *, table_mm: float = 0.0, **attributes: Any) -> Dataset:
    """Return a disc at body height 5 mm times `level`, 0 <= level < LEVELS."""
    y, x = np.mgrid[:64, :64] - 31.5
    # 25 HU are 8 grey values of the input, so that nothing is rounded.
    image_hu = np.where(x**2 + y**2 < 20**2, -200 + 25 * level, -1000)
    values: dict[str, Any] = {
        "SOPInstanceUID": f"{series_uid}.{level + 1}",
        "SeriesInstanceUID": series_uid,
        "StudyInstanceUID": f"{series_uid}.0",
        "FrameOfReferenceUID": f"{series_uid}.99",
        "ImagePositionPatient": ["-110", "-110", f"{5 * level + table_mm}"],
        "PixelSpacing": ["3.5", "3.5"],
        "RescaleIntercept": "-1024",
        "PixelData": (image_hu + 1024).astype("<i2").tobytes(),
    }
    return ct_dataset(**{**values, **attributes})


def brightness_bundle(folder: Path) -> Bundle:
    """Return a saved bundle that scores `ct_slice` 0.5 a level: a body height of 5 mm."""
    net = network.build(NetworkConfig(kind="compact", width=0.25))
    convolutions = [m for m in net.basis if isinstance(m, torch.nn.Conv2d)]
    spec = PreprocessSpec()
    ends = [
        dicomio.decode(part10(ct_slice(SERIES, level)), spec)[0].input for level in (0, LEVELS - 1)
    ]
    with torch.no_grad():
        for conv in convolutions:
            conv.weight.fill_(1 / conv.weight[0].numel())
            conv.bias.zero_()
        convolutions[0].bias.fill_(1.0)  # values -1..1 become 0..2, which no ReLU cuts
        net.head.weight.fill_(1.0)
        net.head.bias.zero_()
        dark, bright = net(torch.from_numpy(np.stack(ends))[:, None]).tolist()
        scale = 0.5 * (LEVELS - 1) / (bright - dark)
        net.head.weight.fill_(scale)
        net.head.bias.fill_(-scale * dark)
    heights = HeightMap(mm_per_score=10.0, intercept_mm=0.0, residual_sd_mm=5.0)
    weights.save(
        folder,
        net,
        name="brightness",
        spec=spec,
        heights=heights,
        training={},
        covariance=COVARIANCE,
    )
    return weights.load(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return brightness_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def spool(tmp_path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def node(engine, bundle) -> Engine:
    """A database that knows the bundle."""
    with store.writing(engine) as session:
        store.record_model(session, bundle.digest, bundle.manifest, datetime.now(UTC))
    return engine


Build = Callable[..., ScoreStage]


@pytest.fixture
def build(spool, node, bundle) -> Iterator[Build]:
    """Make score stages, as a worker does when it starts."""
    made: list[ScoreStage] = []

    def build(kind: type[ScoreStage] = ScoreStage, **arguments: Any) -> ScoreStage:
        scorer = Scorer(bundle, torch.device("cpu"), BATCH)
        values = {"spool": spool, "engine": node, "scorer": scorer, "threads": 2}
        made.append(kind(**{**values, **arguments}))
        return made[-1]

    yield build
    for stage in made:
        stage.close()


@pytest.fixture
def stage(build) -> ScoreStage:
    return build()


def put(spool: Spool, *datasets: Dataset, association: str = A) -> list[SpooledInstance]:
    return [spool.put(part10(ds), association) for ds in datasets]


def put_scan(spool: Spool, series_uid: str, levels: range = range(12), **attributes: Any) -> None:
    put(spool, *(ct_slice(series_uid, level, **attributes) for level in levels))


def drain(stage: ScoreStage) -> list[Taken]:
    """Step until the spool is empty."""
    taken = []
    while (step := stage.step()).until is not None:
        taken.append(step)
    return taken


def assemble(engine: Engine, horizon: datetime | None = None) -> int:
    """Finish what is complete by `horizon`; without one, every Series that may ever be."""
    later = horizon or datetime.now(UTC) + timedelta(days=1)
    return AssembleStage(engine, QUIET.total_seconds(), 600.0).step(later, later)


def series_of(engine: Engine, series_uid: str) -> store.SeriesRow:
    with store.reading(engine) as session:
        (row,) = store.list_series(session, series_uid=series_uid)
        return row


def received(engine: Engine) -> dict[str, int]:
    with store.reading(engine) as session:
        return {row.series_uid: row.received for row in store.list_series(session)}


def ends(engine: Engine) -> dict[str, tuple[str | None, ...]]:
    with store.reading(engine) as session:
        return {s.series_uid: s.ends for s in store.open_series(session)}


def quarantined(engine: Engine) -> dict[str, int]:
    with store.reading(engine) as session:
        return store.count_quarantined(session)


def kept(spool: Spool) -> dict[str, bytes]:
    """Return name -> content of every file in quarantine."""
    return {p.name: p.read_bytes() for p in (spool.path / "quarantine").iterdir()}


# The way through


def test_two_studies_go_from_the_spool_to_their_offset(spool, node, stage):
    """The follow-up lies 37 mm higher on the table, and shows other levels."""
    put_scan(spool, FOLLOW_UP, range(4, 20), table_mm=37.0, StudyDate="20260301")
    put_scan(spool, PRIOR, range(12), StudyDate="20250301")
    spool.put_event(A, "released")
    drain(stage)
    assert assemble(node) == 2
    with store.reading(node) as session:
        prior, follow_up = (store.curve_of(session, uid) for uid in (PRIOR, FOLLOW_UP))
    assert prior is not None and follow_up is not None
    assert prior.z_mm.tolist() == [5.0 * k for k in range(12)]
    np.testing.assert_allclose(prior.height_mm, [5.0 * k for k in range(12)], atol=1e-3)
    assert follow_up.z_mm.tolist() == [5.0 * k + 37 for k in range(4, 20)]
    np.testing.assert_allclose(follow_up.height_mm, [5.0 * k for k in range(4, 20)], atol=1e-3)
    assert prior.quality.flags == follow_up.quality.flags == ()

    align = AlignStage(node)
    assert align.step() == len(Method)
    assert align.step() == 0
    with store.reading(node) as session:
        found = store.offsets_of(session, fixed_study=f"{FOLLOW_UP}.0", moving_study=f"{PRIOR}.0")
    assert [s.offset.method for s in found] == [Method.ROBUST, Method.L1, Method.FAST]
    for stored in found:
        assert stored.offset.status is OffsetStatus.OK
        # Of a few slices, robust says what its prior says of such short scans, to a mm.
        within = 1.5 if stored.offset.method is Method.ROBUST else 0.01
        assert stored.offset.offset_mm == pytest.approx(37.0, abs=within)
        assert stored.offset.overlap_mm == pytest.approx(35.0, abs=within)  # levels 4 to 11


def test_a_batch_mixes_series(spool, node, stage):
    for level in range(4):
        put(spool, ct_slice(PRIOR, level), ct_slice(FOLLOW_UP, level))
    assert stage.step().instances == 8
    assert received(node) == {PRIOR: 4, FOLLOW_UP: 4}


def test_no_more_than_a_batch_is_taken_at_a_time(spool, node, stage):
    put_scan(spool, SERIES)
    arrived = [entry.arrived_at for entry in spool.pending(100)]
    assert stage.step() == Taken(BATCH, arrived[BATCH - 1])
    assert received(node) == {SERIES: BATCH}
    assert len(spool.pending(100)) == 12 - BATCH
    assert stage.step() == Taken(12 - BATCH, arrived[-1], last=True)
    assert stage.step() == Taken(0, None)


@on_sqlite
def test_a_batch_ends_at_the_end_of_an_association(spool, node, stage):
    put(spool, ct_slice(SERIES, 0), ct_slice(SERIES, 1))
    spool.put_event(A, "released")
    put(spool, ct_slice(SERIES, 2), association=B)
    assert stage.step().instances == 2
    assert ends(node) == {SERIES: (None,)}
    assert stage.step().instances == 0
    assert ends(node) == {SERIES: ("released",)}
    assert stage.step().instances == 1
    assert sorted(ends(node)[SERIES], key=str) == [None, "released"]


@on_sqlite
@pytest.mark.parametrize("kind", ["released", "aborted"])
def test_the_end_of_an_association_is_noted(spool, node, stage, kind):
    put(spool, ct_slice(SERIES, 0))
    put(spool, ct_slice(PRIOR, 0), association=B)
    spool.put_event(A, kind)
    drain(stage)
    assert ends(node) == {SERIES: (kind,), PRIOR: (None,)}
    assert spool.pending(1) == []


@on_sqlite
def test_a_receiver_that_starts_anew_loses_the_associations_before(spool, node, stage):
    put(spool, ct_slice(SERIES, 0))
    put(spool, ct_slice(FOLLOW_UP, 0), association=B)  # of another receiver, which runs on
    spool.put_event(A[:8] + "0" * 8, "started")
    put(spool, ct_slice(PRIOR, 0), association=A[:8] + "1" * 8)
    drain(stage)
    assert ends(node) == {SERIES: ("lost",), FOLLOW_UP: (None,), PRIOR: (None,)}


@on_sqlite
def test_a_peer_may_have_a_default_issuer(spool, node, build):
    stage = build(default_issuers={"NORTH_PACS": "NORTH"})
    senders = {"1.2.1": "NORTH_PACS", "1.2.2": "NORTH_PACS", "1.2.3": "OTHER", "1.2.4": None}
    for series_uid, ae_title in senders.items():
        ds = ct_slice(series_uid, 0, PatientID="P1")
        if series_uid == "1.2.2":
            ds.IssuerOfPatientID = "SOUTH"
        if ae_title:
            ds.file_meta.SourceApplicationEntityTitle = ae_title
        put(spool, ds)
    drain(stage)
    patients = {uid: series_of(node, uid).patient for uid in senders}
    assert patients == {
        "1.2.1": PatientKey("P1", "NORTH"),
        "1.2.2": PatientKey("P1", "SOUTH"),
        "1.2.3": PatientKey("P1", ""),
        "1.2.4": PatientKey("P1", ""),
    }


@on_sqlite
def test_what_is_no_axial_ct_is_set_aside_with_its_reason(spool, node, stage):
    put_scan(spool, SERIES)
    put(spool, ct_slice(SERIES, 20, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    drain(stage)
    row = series_of(node, SERIES)
    assert (row.received, row.scored, row.set_aside) == (13, 12, {"localizer": 1})
    assert kept(spool) == {}


# Nothing is lost


@on_sqlite
def test_files_wait_while_the_database_is_away(spool, node, build):
    away = engines.create("postgresql://127.0.0.1:1/none")  # nobody listens there
    put_scan(spool, SERIES)
    waiting = spool.pending(100)
    stage = build(engine=away)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            stage.step()
        assert spool.pending(100) == waiting
    stage.engine = node
    drain(stage)
    assert received(node) == {SERIES: 12}
    assert kept(spool) == {}
    away.dispose()


@on_postgres
def test_files_stay_in_the_spool_when_their_commit_fails(spool, node, stage):
    put_scan(spool, SERIES, range(6))
    put(spool, ct_slice(SERIES, 6, PixelData=b"short"))  # would go to quarantine
    waiting = spool.pending(100)
    cuts: list[int] = []

    def cut(connection: Any) -> None:
        if not cuts:
            cuts.append(connection.connection.dbapi_connection.info.backend_pid)
            with node.connect() as other:
                other.execute(select(func.pg_terminate_backend(cuts[0], 5000)))

    event.listen(node, "commit", cut)
    with pytest.raises(StoreUnavailable):
        stage.step()
    event.remove(node, "commit", cut)
    assert spool.pending(100) == waiting
    assert kept(spool) == received(node) == {}

    drain(stage)
    assert received(node) == {SERIES: 7}
    assert len(kept(spool)) == 1
    assert spool.pending(100) == []


@on_sqlite
def test_a_device_that_is_away_loses_nothing(spool, node, bundle, build):
    put_scan(spool, SERIES)
    waiting = spool.pending(100)
    stage = build(scorer=BrokenScorer(bundle, torch.device("cpu"), BATCH))
    with pytest.raises(DeviceUnavailable):
        stage.step()
    assert spool.pending(100) == waiting
    assert received(node) == {}


class BrokenScorer(Scorer):
    """A scorer whose device never answers."""

    def score(self, inputs: Any) -> Scores:
        raise DeviceUnavailable("cuda:0: out of memory")


@on_sqlite
def test_scores_that_are_no_numbers_are_the_device_s_fault(spool, node, bundle, build):
    net = network.build(NetworkConfig(kind="compact", width=0.25)).eval()
    torch.nn.init.constant_(net.head.bias, float("nan"))
    scorer = Scorer(replace(bundle, network=net), torch.device("cpu"), BATCH)
    put_scan(spool, SERIES)
    with pytest.raises(DeviceUnavailable):
        build(scorer=scorer).step()
    assert len(spool.pending(100)) == 12


class Blind(torch.nn.Module):
    """A network that gives no number for inputs of some brightness; `times` of them, then it does.

    Brightness is that of the middle, which tells levels of `ct_slice` apart.
    """

    def __init__(self, net: torch.nn.Module, blind: set[int], times: float = math.inf) -> None:
        super().__init__()
        self.net, self.blind, self.times = net, blind, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.net(x).clone()
        for k, middle in enumerate(x[:, 0, 64, 64].tolist()):
            if middle in self.blind and self.times > 0:
                self.times -= 1
                scores[k] = math.nan
        return scores


def brightness(bundle: Bundle, *levels: int) -> set[int]:
    found = set()
    for level in levels:
        (decoded,) = dicomio.decode(part10(ct_slice(SERIES, level)), bundle.spec)
        assert decoded.input is not None
        found.add(int(decoded.input[64, 64]))
    return found


def blind_scorer(bundle: Bundle, *levels: int, times: float = math.inf) -> Scorer:
    net = Blind(bundle.network, brightness(bundle, *levels), times)
    return Scorer(replace(bundle, network=net), torch.device("cpu"), BATCH)


@on_sqlite
@pytest.mark.parametrize("levels", [[5], [0], [11], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_a_slice_for_which_the_network_gives_no_number_is_set_aside(
    spool, node, bundle, build, levels, caplog
):
    """Whole batches of them included: the device is asked about a drawn trunk."""
    put_scan(spool, SERIES, range(LEVELS))
    drain(build(scorer=blind_scorer(bundle, *levels)))
    spool.put_event(A, "released")
    drain(build())
    assert assemble(node) == 1
    row = series_of(node, SERIES)
    assert (row.state, row.scored) == (SeriesState.CURVE, LEVELS - len(levels))
    assert row.set_aside == {Reason.NO_SCORE: len(levels)}
    with store.reading(node) as session:
        curve = store.curve_of(session, SERIES)
        assert curve is not None
        assert store.count_quarantined(session) == {Reason.NO_SCORE: len(levels)}
    others = [k for k in range(LEVELS) if k not in levels]
    np.testing.assert_allclose(curve.height_mm, [5.0 * k for k in others], atol=1e-3)
    # The file is kept for who makes bundles, and none waits any more.
    assert sorted(kept(spool).values()) == sorted(part10(ct_slice(SERIES, k)) for k in levels)
    assert spool.pending(1) == []
    told = [r for r in caplog.records if r.getMessage() == "instance quarantined"]
    assert {vars(r)["reason"] for r in told} == {"no_score"}


@on_sqlite
def test_a_slice_alone_in_its_series_is_set_aside_too(spool, node, bundle, build):
    put(spool, ct_slice(SERIES, 5))
    drain(build(scorer=blind_scorer(bundle, 5)))
    assert assemble(node, datetime.now(UTC)) == 0  # its association goes on
    spool.put_event(A, "released")
    drain(build())
    assert assemble(node) == 1
    row = series_of(node, SERIES)
    assert (row.state, row.reason) == (SeriesState.QUARANTINED, Reason.NO_SCORE)


@on_sqlite
@pytest.mark.parametrize(("patient_id", "pairs"), [("UNKNOWN", 0), ("0000", 0), ("UNKNOWN 7", 3)])
def test_whoever_has_a_placeholder_is_nobody(spool, node, build, patient_id, pairs):
    """Two strangers whose scanners knew no Patient ID are not one patient."""
    uids = ("1.2.1", "1.2.2")
    for uid in uids:
        put_scan(spool, uid, PatientID=patient_id)
    spool.put_event(A, "released")
    drain(build(placeholders=NodeSettings().placeholder_ids))
    assert assemble(node) == 2
    with store.reading(node) as session:
        assert len(store.pending_offsets(session, 10)) == pairs
        for uid in uids:  # what is written of them says what the images say
            known = store.source_of(session, uid)
            assert known is not None and known.curve.z_mm.size
    assert {series_of(node, uid).patient for uid in uids} == {
        PatientKey(patient_id if pairs else "")
    }


@on_sqlite
def test_a_number_that_was_missing_once_is_asked_for_again(spool, node, bundle, build):
    put_scan(spool, SERIES)
    drain(build(scorer=blind_scorer(bundle, 5, times=1)))
    spool.put_event(A, "released")
    drain(build())
    assert assemble(node) == 1
    row = series_of(node, SERIES)
    assert (row.scored, row.set_aside) == (12, {})


@on_sqlite
def test_a_slice_without_a_score_gets_one_by_another_bundle(spool, node, bundle, build):
    put_scan(spool, SERIES)
    spool.put_event(A, "released")
    drain(build(scorer=blind_scorer(bundle, 5)))
    assert assemble(node) == 1
    put_scan(spool, SERIES)
    spool.put_event(A, "released")
    drain(build())
    assert assemble(node) == 1
    row = series_of(node, SERIES)
    assert (row.scored, row.set_aside, row.revision) == (12, {}, 2)


def test_a_scorer_takes_more_inputs_than_a_batch(bundle):
    scorer = Scorer(bundle, torch.device("cpu"), 2)
    inputs: list[Input] = []
    for level in range(5):
        file = pydicom.filebase.DicomBytesIO(part10(ct_slice(SERIES, level)))
        (decoded,) = dicomio.decode(file, bundle.spec)
        assert decoded.input is not None
        inputs.append(decoded.input)
    score = scorer.score(inputs)
    assert score.dtype == np.float32
    np.testing.assert_allclose(score, [0.5 * k for k in range(5)], atol=1e-4)
    assert scorer.score([]).shape == (0,)


# Ahead


class Watched(ScoreStage):
    """Notes what is decoded, in order."""

    def __init__(self, *arguments: Any, **values: Any) -> None:
        super().__init__(*arguments, **values)
        self.decoded: list[str] = []

    def _decode(self, entry: SpooledInstance) -> tuple[dicomio.Decoded, ...] | DicomError:
        self.decoded.append(entry.name)
        return super()._decode(entry)


class Patient(Scorer):
    """Scores only once the batch behind is being decoded, as a slow device would."""

    stage: Watched
    waits_for: set[str]

    def score(self, inputs: Any) -> Scores:
        deadline = time.monotonic() + 20
        while not self.waits_for <= set(self.stage.decoded):
            assert time.monotonic() < deadline, "nothing is decoded meanwhile"
            time.sleep(0.001)
        return super().score(inputs)


@on_sqlite
def test_the_next_batch_is_decoded_while_one_is_scored(spool, node, bundle, build):
    put_scan(spool, SERIES, range(20))
    names = [entry.name for entry in spool.pending(100)]
    scorer = Patient(bundle, torch.device("cpu"), BATCH)
    stage = scorer.stage = build(Watched, scorer=scorer)
    scorer.waits_for = set(names[: 2 * BATCH])
    assert stage.step().instances == BATCH
    assert received(node) == {SERIES: BATCH}
    assert set(stage.decoded) == set(names[: 2 * BATCH]), "and no further"
    assert [entry.name for entry in spool.pending(100)] == names[BATCH:]
    drain(stage)
    assert received(node) == {SERIES: 20}
    assert sorted(stage.decoded) == names, "each once"


@on_sqlite
def test_what_is_less_than_a_batch_waits_for_company(spool, node, build):
    put_scan(spool, SERIES, range(BATCH + 3))
    stage = build(Watched)
    assert stage.step().instances == BATCH
    assert len(stage.decoded) == BATCH
    put_scan(spool, PRIOR, range(2))
    assert stage.step().instances == 5


@on_sqlite
def test_the_end_of_an_association_is_not_run_ahead_of(spool, node, stage):
    put_scan(spool, SERIES, range(BATCH))
    spool.put_event(A, "released")
    put_scan(spool, PRIOR, range(BATCH))
    assert stage.step().instances == BATCH
    assert ends(node) == {SERIES: (None,)}
    assert stage.step().instances == 0
    assert ends(node) == {SERIES: ("released",)}
    assert stage.step().instances == BATCH
    assert ends(node)[PRIOR] == (None,)


@on_sqlite
def test_a_batch_ahead_comes_again_when_the_device_fails(spool, node, bundle, build):
    put_scan(spool, SERIES, range(20))
    waiting = spool.pending(100)
    stage = build(scorer=BrokenScorer(bundle, torch.device("cpu"), BATCH))
    for _ in range(3):
        with pytest.raises(DeviceUnavailable):
            stage.step()
        assert spool.pending(100) == waiting
        assert not (spool.path / ".in-flight.json").exists()
    stage.scorer = Scorer(bundle, torch.device("cpu"), BATCH)
    drain(stage)
    assert received(node) == {SERIES: 20}
    assert kept(spool) == {}
    assert not (spool.path / ".in-flight.json").exists()


@on_sqlite
def test_an_input_gets_its_own_score(spool, node, bundle, build):
    """Slices without an input stand between; another batch size gives the same bits."""
    found = []
    for batch in (5, 64):
        series = f"{SERIES}.{batch}"
        for level in range(LEVELS):
            put(spool, ct_slice(series, level))
            localizer = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            uid = f"{series}.{100 + level}"
            put(spool, ct_slice(series, level, ImageType=localizer, SOPInstanceUID=uid))
        drain(build(scorer=Scorer(bundle, torch.device("cpu"), batch)))
        with store.reading(node) as session:
            claimed = store.open_slices(session, series)
        assert claimed is not None and len(claimed.set_aside) == LEVELS
        found.append([s.score for s in sorted(claimed.slices, key=lambda s: s.image_position)])
    assert found[0] == found[1]
    np.testing.assert_allclose(found[0], [0.5 * k for k in range(LEVELS)], atol=1e-3)


# What cannot be used


def bad_files() -> dict[str, bytes]:
    """Return expected reason -> content of a file that a person should look at."""
    uncompressed = part10(ct_slice(SERIES, 0))
    mpeg = ct_slice(SERIES, 1, TransferSyntaxUID=MPEG2MPML, PixelData=encapsulate([b"mpeg"]))
    mpeg["PixelData"].VR = "OB"
    with pydicom.config.disable_value_validation():
        bad_uid = part10(ct_slice(SERIES, 2, SeriesInstanceUID="1.2.x"))
    return {
        "not_dicom": b"no DICOM at all",
        "pixel_data": uncompressed[:-100],
        "unsupported_transfer_syntax": part10(mpeg),
        "bad_uid": bad_uid,
        "no_geometry": part10(ct_slice(SERIES, 3, ImagePositionPatient=None)),
    }


@pytest.mark.filterwarnings("ignore:The pixel data length:UserWarning")
def test_an_unsound_file_is_kept_for_a_person_to_look_at(spool, node, stage):
    files = bad_files()
    names = {reason: Path(spool.put(data, A).name).stem for reason, data in files.items()}
    put_scan(spool, SERIES, range(4, 8))
    drain(stage)
    assert kept(spool) == {f"{names[reason]}-{reason}.dcm": data for reason, data in files.items()}
    assert quarantined(node) == dict.fromkeys(files, 1)
    assert spool.pending(100) == []
    row = series_of(node, SERIES)
    # A file that does not tell its Series cannot be shown there.
    assert (row.scored, row.set_aside) == (
        4,
        {"pixel_data": 1, "unsupported_transfer_syntax": 1, "no_geometry": 1},
    )


@on_sqlite
def test_a_file_that_breaks_off_anywhere_is_quarantined(spool, node, stage, caplog):
    data = part10(ct_slice(SERIES, 0))
    lengths = [0, 100, 131, 132, 140, 200, 350, 500, 700, 900]
    for length in lengths:
        spool.put(data[:length], A)
    drain(stage)
    assert sorted(map(len, kept(spool).values())) == lengths
    assert sum(quarantined(node).values()) == len(lengths)
    assert PATIENT_ID not in caplog.text and PATIENT_NAME not in caplog.text


@on_sqlite
def test_what_is_said_of_a_quarantined_file_names_no_patient(spool, node, stage, caplog):
    for data in bad_files().values():
        spool.put(data, A)
    drain(stage)
    with store.reading(node) as session:
        details = session.scalars(select(schema.Quarantined.detail)).all()
    for canary in (PATIENT_ID, PATIENT_NAME):
        assert canary not in "".join(details)
        assert canary not in caplog.text


def hostile_files() -> dict[str, bytes]:
    """Return what files hold that scanners, archives and attackers have written."""
    overrides: dict[str, dict[str, Any]] = {
        "a Patient ID of more than 64 characters": {"PatientID": "P" * 70},
        "an issuer of more than 64 characters": {"IssuerOfPatientID": "H" * 70},
        "a NUL in a Patient ID": {"PatientID": "P\0001"},
        "a NUL in the manufacturer": {"Manufacturer": "ma\0de"},
        "a modality of more than 16 characters": {"Modality": "CT" * 10},
        "a frame of reference of more than 64 characters": {"FrameOfReferenceUID": "1." * 40 + "1"},
        "more Instances expected than 32 bits count": {
            "NumberOfSeriesRelatedInstances": str(2**31)
        },
        "less than no Instances expected": {"NumberOfSeriesRelatedInstances": "-1"},
        "a position that is no number": {"ImagePositionPatient": ["0", "0", "nan"]},
        "a position at infinity": {"ImagePositionPatient": ["0", "0", "1e400"]},
        "an orientation that is no number": {
            "ImageOrientationPatient": ["nan", "0", "0", "0", "1", "0"]
        },
        "a study in the year 1": {"StudyDate": "00010101"},
        "no study date": {"StudyDate": None},
        "a slope that is no number": {"RescaleSlope": "nan"},
        "an infinite slope": {"RescaleSlope": "1e300"},
        "no pixels": {"Rows": 0, "Columns": 0, "PixelData": b""},
        "one pixel": {"Rows": 1, "Columns": 1, "PixelData": b"\0\0"},
        "pixels of no size": {"PixelSpacing": ["1e-300", "1e-300"]},
        "pixels of a mile": {"PixelSpacing": ["1609344", "1609344"]},
    }
    files = {}
    with pydicom.config.disable_value_validation():
        for k, (name, values) in enumerate(overrides.items()):
            files[name] = part10(ct_slice(f"1.5.{k}", 0, **values))
        latin = ct_slice("1.5.100", 0, SpecificCharacterSet="ISO_IR 100", PatientID="P\xff\xfe")
    files["text in another character set than it says"] = part10(latin).replace(
        b"ISO_IR 100", b"ISO_IR 192"
    )
    return files


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_no_file_stops_the_queue_behind_it(spool, node, stage):
    """Whatever it holds, it is stored, set aside or quarantined: it must not come for ever."""
    failures = {}
    for name, data in hostile_files().items():
        entry = spool.put(data, A)
        try:
            assert stage.step().instances == 1
        except Exception as exc:
            failures[name] = f"{type(exc).__name__}: {str(exc).splitlines()[0]}"
            spool.remove(entry)
    assert not failures, "\n".join(f"{name}: {text}" for name, text in failures.items())
    assert spool.pending(10) == []


# Workers that die


class Mortal(ScoreStage):
    """Dies of a file that holds POISON, as a worker does when a codec crashes."""

    def _decode(self, entry: SpooledInstance) -> tuple[dicomio.Decoded, ...] | DicomError:
        if POISON in bytes(self.spool.read(entry)):
            raise SystemExit("killed")
        return super()._decode(entry)


class Sick(ScoreStage):
    """Cannot decode a file that holds POISON, but lives."""

    def _decode(self, entry: SpooledInstance) -> tuple[dicomio.Decoded, ...] | DicomError:
        if POISON in bytes(self.spool.read(entry)):
            raise MemoryError
        return super()._decode(entry)


def deaths_until_done(build: Build) -> int:
    """Start worker after worker until one comes to the end of the queue."""
    for deaths in range(20):
        stage = build(Mortal)
        try:
            drain(stage)
            return deaths
        except SystemExit:
            continue
    raise AssertionError("the queue does not go on")


@on_sqlite
@pytest.mark.parametrize("position", [0, 3, 7, 10, 12, 19, 20])  # batches are of 8
def test_a_file_that_kills_the_worker_is_put_aside(spool, node, build, position):
    put_scan(spool, SERIES, range(position))
    entry = spool.put(POISON, A)
    put_scan(spool, SERIES, range(position, LEVELS))
    assert deaths_until_done(build) == POISON_ATTEMPTS
    assert kept(spool) == {f"{Path(entry.name).stem}-corrupt.dcm": POISON}
    assert quarantined(node) == {"corrupt": 1}
    assert received(node) == {SERIES: LEVELS}
    assert spool.pending(1) == []


@on_sqlite
def test_two_files_that_kill_the_worker_are_put_aside(spool, node, build):
    put_scan(spool, SERIES, range(2))
    spool.put(POISON + b"1", A)
    spool.put(POISON + b"2", A)
    put_scan(spool, SERIES, range(2, LEVELS))
    deaths_until_done(build)
    assert sorted(kept(spool).values()) == [POISON + b"1", POISON + b"2"]
    assert received(node) == {SERIES: LEVELS}


@on_sqlite
@pytest.mark.parametrize("position", [3, 12])
def test_a_file_that_fails_in_the_same_worker_again_and_again_is_put_aside(
    spool, node, build, position
):
    put_scan(spool, SERIES, range(position))
    spool.put(POISON, A)
    put_scan(spool, SERIES, range(position, LEVELS))
    stage = build(Sick)
    failures = 0
    while spool.pending(1):
        try:
            stage.step()
        except MemoryError:
            failures += 1
            assert failures <= POISON_ATTEMPTS
    assert list(kept(spool).values()) == [POISON]
    assert received(node) == {SERIES: LEVELS}


@on_sqlite
def test_what_a_dead_worker_had_in_flight_goes_alone(spool, node, build):
    put_scan(spool, SERIES, range(6))
    first, second = spool.pending(2)
    names = {first.name: 1, second.name: 1}
    (spool.path / ".in-flight.json").write_text(json.dumps(names))
    assert [t.instances for t in drain(build())] == [1, 1, 4]
    assert received(node) == {SERIES: 6}
    assert not (spool.path / ".in-flight.json").exists()


@on_sqlite
def test_a_file_is_tried_as_often_as_it_says(spool, node, build):
    put_scan(spool, SERIES, range(6))
    first, second, *_ = spool.pending(10)
    names = {first.name: POISON_ATTEMPTS, second.name: POISON_ATTEMPTS - 1}
    (spool.path / ".in-flight.json").write_text(json.dumps(names))
    data = bytes(spool.read(first))
    drain(build())
    assert kept(spool) == {f"{Path(first.name).stem}-corrupt.dcm": data}
    assert received(node) == {SERIES: 5}


@on_sqlite
@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', '{"a": "b"}'])
def test_notes_of_a_dead_worker_that_cannot_be_read_are_passed_over(spool, node, build, text):
    (spool.path / ".in-flight.json").write_text(text)
    put_scan(spool, SERIES, range(6))
    assert [t.instances for t in drain(build())] == [6]


@on_sqlite
def test_a_worker_restarted_while_the_device_is_away_suspects_no_file(spool, node, bundle, build):
    """No file stopped these workers: all are sound, and none may end in quarantine."""
    put_scan(spool, SERIES)
    for _ in range(POISON_ATTEMPTS + 2):
        stage = build(scorer=BrokenScorer(bundle, torch.device("cpu"), BATCH))
        with pytest.raises(DeviceUnavailable):
            stage.step()
    drain(build())
    assert kept(spool) == {}
    assert received(node) == {SERIES: 12}


KILLED = """
import os, sys, torch
from pathlib import Path
from db import engine as engines
from dicomnode import weights
from dicomnode.node.score import Scorer, ScoreStage
from dicomnode.spool import Spool

class Killed(ScoreStage):
    def _decode(self, entry):
        if b"POISON" in bytes(self.spool.read(entry)):
            os._exit(9)
        return super()._decode(entry)

folder, url, spool = sys.argv[1:]
torch.set_num_threads(1)
deaths = 0
while True:
    pid = os.fork()
    if pid == 0:
        scorer = Scorer(weights.load(Path(folder)), torch.device("cpu"), 8)
        stage = Killed(Spool(Path(spool)), engines.create(url), scorer, threads=2)
        while stage.step().until is not None:
            pass
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        break
    deaths += 1
    assert deaths < 20
print(deaths)
"""


@on_sqlite
def test_processes_that_a_file_kills_come_to_the_end(spool, node, database_url, tmp_path):
    brightness_bundle(tmp_path / "bundle")
    put_scan(spool, SERIES, range(11))  # in the batch that is decoded ahead
    spool.put(POISON, A)
    put_scan(spool, SERIES, range(11, LEVELS))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "bundle", database_url, spool.path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == POISON_ATTEMPTS
    assert list(kept(spool).values()) == [POISON]
    assert received(node) == {SERIES: LEVELS}


# Completion


@on_sqlite
def test_a_backlog_does_not_look_like_silence(spool, node, stage):
    put_scan(spool, SERIES)
    last = spool.pending(100)[-1].arrived_at
    spool.put_event(A, "released")
    drain(stage)
    assert assemble(node, horizon=last + QUIET - timedelta(milliseconds=1)) == 0
    assert assemble(node, horizon=last + QUIET) == 1
    assert series_of(node, SERIES).state is SeriesState.CURVE


@on_sqlite
def test_a_worker_that_comes_late_finishes_each_series_once(
    spool, node, bundle, tmp_path, monkeypatch
):
    """An hour's backlog of a Series that two associations carried."""
    real, hour = time.time_ns, 3_600_000_000_000
    with monkeypatch.context() as earlier:
        earlier.setattr(time, "time_ns", lambda: real() - hour)
        put_scan(spool, SERIES, range(4))
        spool.put_event(A, "released")
        put(spool, *(ct_slice(SERIES, level) for level in range(4, 12)), association=B)
        spool.put_event(B, "released")

    brightness_bundle(tmp_path / "bundle")
    score = {"model": tmp_path / "bundle", "device": "cpu", "batch": 4}
    worker = serve.Worker(Settings(score=score, spool={"path": spool.path}), spool, node)
    try:
        for _ in range(20):
            worker._assembled_at = 0.0  # look for complete Series after every batch
            worker.step()
    finally:
        worker.close()
    row = series_of(node, SERIES)
    assert (row.state, row.scored, row.revision) == (SeriesState.CURVE, 12, 1)


def worker_of(spool: Spool, engine: Engine, folder: Path, **series: float) -> serve.Worker:
    brightness_bundle(folder)
    score = {"model": folder, "device": "cpu", "dtype": "float32", "batch": BATCH}
    settings = Settings(score=score, spool={"path": spool.path}, series=series)
    return serve.Worker(settings, spool, engine)


@on_sqlite
def test_a_worker_tells_how_far_it_took_what_arrived(spool, node, tmp_path, monkeypatch):
    """Who had a peer send something looks there before it asks again."""
    monkeypatch.setattr(serve, "BEAT_S", 0.0)
    brightness_bundle(tmp_path / "bundle")
    priors = {"dicomweb": [{"name": "web", "url": "http://127.0.0.1:9"}]}
    score = {"model": tmp_path / "bundle", "device": "cpu", "dtype": "float32", "batch": BATCH}
    worker = serve.Worker(Settings(score=score, priors=priors), spool, node)

    def taken() -> datetime:
        with store.reading(node) as session:
            at = store.last_beat(session, store.WORKER)
        assert at is not None
        return at

    try:
        put_scan(spool, SERIES, range(BATCH))
        behind = put(spool, *(ct_slice(SERIES, level) for level in range(BATCH, 2 * BATCH)))
        worker.step()
        assert taken() < behind[0].arrived_at
        while worker.step():
            pass
        assert taken() >= behind[-1].arrived_at
    finally:
        worker.close()


@on_sqlite
def test_a_worker_sleeps_until_a_series_becomes_quiet(spool, node, tmp_path):
    worker = worker_of(spool, node, tmp_path / "bundle", quiet_seconds=0.3)
    try:
        assert worker.step() == 0
        assert worker.idle_s() == serve.IDLE_S
        put_scan(spool, SERIES)
        while worker.step():
            pass
        assert worker.idle_s() == serve.IDLE_S, "the association goes on"
        last = spool.put_event(A, "released").arrived_at
        while worker.step():
            pass
        assert series_of(node, SERIES).state is SeriesState.OPEN
        idle_s = worker.idle_s()
        due = series_of(node, SERIES).last_arrival_at + timedelta(seconds=0.3)
        assert 0 <= idle_s <= 0.3
        assert datetime.now(UTC) + timedelta(seconds=idle_s) >= due - timedelta(seconds=0.001)
        time.sleep(max(0.0, (due - datetime.now(UTC)).total_seconds()))
        assert worker.step() > 0
        assert series_of(node, SERIES).state is SeriesState.CURVE
        assert series_of(node, SERIES).last_arrival_at <= last
    finally:
        worker.close()


@on_sqlite
def test_a_series_that_is_quiet_is_finished_though_others_arrive(spool, node, tmp_path):
    worker = worker_of(spool, node, tmp_path / "bundle", quiet_seconds=0.2)
    try:
        put_scan(spool, SERIES)
        spool.put_event(A, "released")
        while worker.step():
            pass
        due = series_of(node, SERIES).last_arrival_at + timedelta(seconds=0.2)
        deadline = time.monotonic() + 10
        level = 0
        while series_of(node, SERIES).state is SeriesState.OPEN:
            assert time.monotonic() < deadline
            put(spool, ct_slice(PRIOR, level % LEVELS), association=B)
            level += 1
            # Never an empty spool: only the time that is due makes it look.
            worker._assembled_at = time.monotonic()
            assert worker.step() > 0
        assert spool.pending(1) == []
        assert datetime.now(UTC) >= due
    finally:
        worker.close()


@on_sqlite
def test_a_few_slices_wait_for_company_and_a_backlog_does_not(spool, node, tmp_path):
    worker = worker_of(spool, node, tmp_path / "bundle")
    try:
        put_scan(spool, SERIES, range(BATCH + 2))
        worker.step()
        assert not worker.is_alone
        worker.step()
        assert worker.is_alone
        spool.put_event(A, "released")
        worker.step()
        assert not worker.is_alone
    finally:
        worker.close()


@on_sqlite
def test_a_series_of_an_association_without_an_end_is_finished_in_the_end(spool, node, stage):
    put_scan(spool, SERIES)
    last = spool.pending(100)[-1].arrived_at
    drain(stage)
    assert assemble(node, horizon=last + timedelta(seconds=600)) == 0
    assert assemble(node, horizon=last + timedelta(seconds=601)) == 1
    assert series_of(node, SERIES).evidence == "association_lost"


@on_sqlite
def test_a_series_without_any_score_ends_with_its_commonest_reason(spool, node, stage):
    put(spool, ct_slice(SERIES, 0, Modality="PT"))
    for level in (1, 2):
        put(spool, ct_slice(SERIES, level, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    spool.put_event(A, "released")
    drain(stage)
    assert assemble(node) == 1
    row = series_of(node, SERIES)
    assert (row.state, row.reason) == (SeriesState.IGNORED, Reason.LOCALIZER)


@on_sqlite
def test_a_series_of_many_phases_may_be_reopened_to_the_end(spool, node, stage):
    """Each position three times, then slices that are not of the stack, one after the other."""
    for phase in range(3):
        for level in range(12):
            put(spool, ct_slice(SERIES, level, SOPInstanceUID=f"{SERIES}.{phase}.{level}"))
    oblique = ["1", "0", "0", "0", "0.98", "0.199"]
    late = [
        ct_slice(SERIES, 12, ImageOrientationPatient=oblique),
        ct_slice(SERIES, 13, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    ]
    expected = [SeriesState.CURVE, SeriesState.QUARANTINED, SeriesState.QUARANTINED]
    found = []
    for ds in (None, *late):
        if ds is not None:
            put(spool, ds)
        spool.put_event(A, "released")
        drain(stage)
        assert assemble(node) == 1
        found.append(series_of(node, SERIES).state)
    assert found == expected


# Weight bundles


def test_a_bundle_is_known_by_its_digest(bundle, tmp_path):
    again = brightness_bundle(tmp_path)
    assert again.digest == bundle.digest == weights.digest(bundle.manifest)
    altered = {**bundle.manifest, "heights": {**bundle.manifest["heights"], "intercept_mm": 1.0}}
    assert weights.digest(altered) != bundle.digest


def test_a_bundle_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="no weight bundle"):
        weights.load(tmp_path / "none")


@pytest.mark.parametrize("missing", [weights.MANIFEST, weights.WEIGHTS])
def test_a_bundle_without_one_of_its_files_is_refused(tmp_path, missing):
    brightness_bundle(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(WeightsError, match=missing):
        weights.load(tmp_path)


def test_altered_weights_are_refused(tmp_path):
    brightness_bundle(tmp_path)
    path = tmp_path / weights.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=weights.WEIGHTS):
        weights.load(tmp_path)


def altered(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: {**manifest, **values}


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: {k: v for k, v in manifest.items() if k != key}


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": altered(format=2),
    "another version of preprocessing": lambda m: {
        **m,
        "preprocess": {**m["preprocess"], "version": 2},
    },
    "a step of preprocessing that is unknown": lambda m: {
        **m,
        "preprocess": {**m["preprocess"], "sharpen": True},
    },
    "another network": lambda m: {**m, "network": {**m["network"], "width": 0.5}},
    "an unknown network": lambda m: {**m, "network": {**m["network"], "kind": "resnet"}},
    "an unknown part of a network": lambda m: {**m, "network": {**m["network"], "depth": 3}},
    "no digest": without("weights_sha256"),
    "no network": without("network"),
    "no preprocessing": without("preprocess"),
    "no heights": without("heights"),
    "heights of other names": altered(heights={"slope": 1.0}),
    "a list": lambda m: [m],
}


@pytest.mark.parametrize("alter", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_this_node_does_not_understand_is_refused(tmp_path, alter):
    manifest = brightness_bundle(tmp_path).manifest
    (tmp_path / weights.MANIFEST).write_text(json.dumps(alter(manifest)))
    with pytest.raises(WeightsError):
        weights.load(tmp_path)


def test_weights_that_are_no_tensors_are_refused(tmp_path):
    manifest = brightness_bundle(tmp_path).manifest
    (tmp_path / weights.WEIGHTS).write_bytes(b"no tensors")
    manifest["weights_sha256"] = hashlib.sha256(b"no tensors").hexdigest()
    (tmp_path / weights.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(WeightsError):
        weights.load(tmp_path)


@on_sqlite
def test_a_full_disk_does_not_hide_who_kills_the_worker(spool, node, build, monkeypatch):
    put_scan(spool, SERIES, range(6))
    stage = build()
    room = spool.path / ".in-flight.room"
    assert stage.step().instances
    assert room.stat().st_size > 0
    put_scan(spool, PRIOR, range(2))
    replace_ = ScoreStage._replace_in_flight
    noted = []

    def on_a_full_disk(self: ScoreStage, text: str) -> None:
        if room.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_(self, text)
        noted.append(sorted(json.loads((spool.path / ".in-flight.json").read_text())))

    monkeypatch.setattr(ScoreStage, "_replace_in_flight", on_a_full_disk)
    waiting = sorted(entry.name for entry in spool.pending(10))
    drain(stage)
    assert noted and noted[0] == waiting[: len(noted[0])]


@on_sqlite
def test_a_pair_that_cannot_be_read_does_not_stop_the_others(spool, node, stage, monkeypatch):
    put_scan(spool, FOLLOW_UP, range(4, 20), table_mm=37.0, StudyDate="20260301")
    put_scan(spool, PRIOR, range(12), StudyDate="20250301")
    spool.put_event(A, "released")
    drain(stage)
    assert assemble(node) == 2
    curves_of = store.curves_of
    calls = []

    def failing(session, uids):
        calls.append(uids)
        if len(calls) <= 2:  # all at once, then the first pair alone
            raise TypeError("a manifest of another version")
        return curves_of(session, uids)

    monkeypatch.setattr(store, "curves_of", failing)
    align = AlignStage(node)
    assert align.step() == len(Method)
    assert align.step() == 0
    with store.reading(node) as session:
        found = store.offsets_of(session, fixed_study=f"{FOLLOW_UP}.0", moving_study=f"{PRIOR}.0")
    reasons = [stored.offset.reason for stored in found]
    assert len(found) == len(Method)
    assert reasons.count("failed: TypeError") == 1
