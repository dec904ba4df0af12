"""Enhanced CT goes the whole way, and gives the curve that its slices give one by one."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless
from sqlalchemy import Engine

from dicomnode import files, store
from dicomnode.config import Settings
from dicomnode.model import ScoreCurve, SeriesState
from dicomnode.node.assemble import AssembleStage
from dicomnode.node.receive import Receiver
from dicomnode.node.score import Scorer, ScoreStage
from dicomnode.spool import Spool
from dicomnode.weights import Bundle
from tests.dicom import compress, ct_dataset, enhanced_ct, part10
from tests.e2e.conftest import association
from tests.integration.test_stages import brightness_bundle

FRAMES = 60
# pynetdicom leaves a socket to the garbage collector when the peer closed it first.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


def slices(series_uid: str) -> list[Dataset]:
    """Sixty slices, 2.5 mm apart, each a little brighter than the one below; shuffled."""
    y, x = np.mgrid[:64, :64] - 31.5
    found = []
    for k in np.random.default_rng(0).permutation(FRAMES).tolist():
        image_hu = np.where(x**2 + y**2 < 20**2, -200 + 7 * k, -1000)
        found.append(
            ct_dataset(
                SOPInstanceUID=f"{series_uid}.1.{k}",
                SeriesInstanceUID=series_uid,
                StudyInstanceUID=f"{series_uid}.0",
                FrameOfReferenceUID="1.2.99",
                ImagePositionPatient=["-110", "-110", f"{2.5 * k}"],
                PixelSpacing=["3.5", "3.5"],
                PixelData=(image_hu + 1024).astype("<i2").tobytes(),
            )
        )
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return brightness_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def settings(tmp_path) -> Settings:
    peers = [{"ae_title": "PACS", "host": "127.0.0.1", "port": 104}]
    spool = {"path": tmp_path / "spool", "reserve_bytes": 0}
    return Settings(node={"port": 0, "peers": peers}, spool=spool)


@pytest.fixture
def receiver(settings) -> Iterator[Receiver]:
    receiver = Receiver(settings)
    receiver.start()
    yield receiver
    receiver.stop()


def send(receiver: Receiver, *datasets: Dataset) -> None:
    contexts = {(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID) for ds in datasets}
    titles = {"calling_ae_title": "PACS", "called_ae_title": "DICOMNODE"}
    offered = [(sop_class_uid, [syntax]) for sop_class_uid, syntax in sorted(contexts)]
    with association(receiver.port, *offered, **titles) as assoc:
        assert assoc.is_established
        for ds in datasets:
            assert assoc.send_c_store(ds).Status == 0x0000


def work(engine: Engine, settings: Settings, bundle: Bundle) -> None:
    """Score what waits, then make curves of it."""
    with store.writing(engine) as session:
        store.record_model(session, bundle.digest, bundle.manifest, datetime.now(UTC))
    stage = ScoreStage(
        Spool(settings.spool.path), engine, Scorer(bundle, torch.device("cpu"), 16), threads=2
    )
    try:
        while stage.step().until is not None:
            pass
    finally:
        stage.close()
    later = datetime.now(UTC) + timedelta(days=1)
    AssembleStage(engine, 1.0, 600.0).step(later, later)


def curve_of(engine: Engine, series_uid: str) -> ScoreCurve:
    with store.reading(engine) as session:
        found = store.curve_of(session, series_uid)
    assert found is not None
    return found


def row_of(engine: Engine, series_uid: str) -> store.SeriesRow:
    with store.reading(engine) as session:
        (row,) = store.list_series(session, series_uid=series_uid)
    return row


def assert_same(one: ScoreCurve, other: ScoreCurve) -> None:
    np.testing.assert_array_equal(one.z_mm, other.z_mm)
    np.testing.assert_allclose(one.score, other.score, atol=1e-5)
    np.testing.assert_array_equal(one.body_centre_mm, other.body_centre_mm)
    assert one.quality.flags == other.quality.flags


@pytest.mark.parametrize("compressed", [False, True], ids=["native", "JPEG-LS"])
@pytest.mark.parametrize("legacy", [False, True], ids=["enhanced", "legacy converted"])
def test_an_enhanced_ct_gives_the_curve_of_its_slices(
    engine, receiver, settings, bundle, compressed, legacy
):
    singles, frames = slices("1.2.1"), slices("1.2.2")
    many = enhanced_ct(frames, legacy=legacy)
    send(receiver, *singles)
    send(receiver, compress(many, JPEGLSLossless) if compressed else many)
    work(engine, settings, bundle)
    expected, got = curve_of(engine, "1.2.1"), curve_of(engine, "1.2.2")
    assert len(expected.z_mm) == FRAMES
    assert_same(expected, got)
    assert set(got.sop_instance_uids) == {many.SOPInstanceUID}
    height = [float(one.ImagePositionPatient[2]) for one in frames]
    assert got.frames == tuple(1 + k for k in np.argsort(height).tolist())
    row = row_of(engine, "1.2.2")
    assert (row.state, row.received, row.scored) == (SeriesState.CURVE, 1, FRAMES)
    with store.reading(engine) as session:
        assert store.pending_offsets(session, 10)  # the two studies are a pair


def test_frames_are_set_aside_one_by_one_and_sent_again_change_nothing(
    engine, receiver, settings, bundle
):
    many = enhanced_ct(
        slices("1.2.2"), frame_types={5: ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]}
    )
    send(receiver, many)
    work(engine, settings, bundle)
    first, row = curve_of(engine, "1.2.2"), row_of(engine, "1.2.2")
    assert row.set_aside == {"localizer": 1}
    assert 5 not in first.frames and len(first.frames) == FRAMES - 1
    send(receiver, many)
    work(engine, settings, bundle)
    again = row_of(engine, "1.2.2")
    assert (again.revision, again.received, again.set_aside) == (1, 1, {"localizer": 1})
    # A slice beside it reopens the Series: every Frame comes back, and the one set aside.
    late = slices("1.2.2")[0]
    late.ImagePositionPatient = ["-110", "-110", "160"]
    send(receiver, late)
    work(engine, settings, bundle)
    row, curve = row_of(engine, "1.2.2"), curve_of(engine, "1.2.2")
    assert (row.revision, row.received, row.set_aside) == (2, 2, {"localizer": 1})
    assert len(curve.z_mm) == FRAMES
    np.testing.assert_array_equal(curve.z_mm[:-1], first.z_mm)


def test_an_enhanced_ct_of_files_gives_the_same_curve(bundle, tmp_path):
    (tmp_path / "many").write_bytes(part10(enhanced_ct(slices("1.2.2"))))
    for k, one in enumerate(slices("1.2.1")):
        (tmp_path / f"{k}").write_bytes(part10(one))
    scored = files.score([tmp_path], Scorer(bundle, torch.device("cpu"), 16))
    one, many = (series.outcome for series in scored.series)
    assert isinstance(one, ScoreCurve) and isinstance(many, ScoreCurve)
    assert_same(one, many)
    assert sorted(many.frames) == list(range(1, FRAMES + 1))
