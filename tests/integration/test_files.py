import gc
import random
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydicom import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage, Verification

from dicomnode import backfill, checks, files, store
from dicomnode.checks import Check
from dicomnode.config import Settings
from dicomnode.core import curve
from dicomnode.core.curve import HeightMap
from dicomnode.errors import ConfigError
from dicomnode.model import (
    Flag,
    Method,
    OffsetStatus,
    Reason,
    Refusal,
    ScoreCurve,
    ScoredSlice,
    SeriesState,
)
from dicomnode.node import serve
from dicomnode.node.score import Scorer
from dicomnode.spool import Spool
from dicomnode.weights import Bundle
from tests.dicom import part10
from tests.integration.test_stages import brightness_bundle, ct_slice

PRIOR, FOLLOW_UP = "1.2.2", "1.2.3"
SHIFT_MM = 37.0
LOCALIZER = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}

# pynetdicom leaves a socket to the garbage collector when the peer closed it first.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()  # while the filter above holds


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bundle")


@pytest.fixture(scope="module")
def bundle(bundle_folder) -> Bundle:
    return brightness_bundle(bundle_folder)


@pytest.fixture
def scorer(bundle) -> Scorer:
    return Scorer(bundle, torch.device("cpu"), 8)


def write(folder: Path, *datasets: Dataset) -> None:
    """Write files in no order, some folders down."""
    names = [f"{k % 3}/{k:03d}" for k in range(len(datasets))]
    random.Random(len(datasets)).shuffle(names)
    for name, ds in zip(names, datasets, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part10(ds))


def prior() -> list[Dataset]:
    return [ct_slice(PRIOR, level, StudyDate="20250301") for level in range(12)]


def follow_up() -> list[Dataset]:
    """Return levels that the prior has in part, on a table that stands higher."""
    return [
        ct_slice(FOLLOW_UP, level, table_mm=SHIFT_MM, StudyDate="20260301")
        for level in range(4, 20)
    ]


@pytest.fixture
def archive(tmp_path) -> Path:
    """A folder of two studies and much else."""
    root = tmp_path / "archive"
    write(root / "prior", *prior(), ct_slice(PRIOR, 20, **LOCALIZER))
    write(root / "follow-up", *follow_up())
    write(root / "scout", ct_slice("1.2.4", 0, **LOCALIZER), ct_slice("1.2.4", 1, **LOCALIZER))
    write(root / "few", *(ct_slice("1.2.5", level) for level in range(5)))
    (root / "notes.txt").write_text("no DICOM")
    (root / "DICOMDIR").write_text("passed over")
    return root


FILES = 13 + 16 + 2 + 5


# Files, without a database


def test_every_series_of_a_folder_is_scored(archive, scorer):
    found = files.score([archive], scorer)
    assert found.unreadable == {"not_dicom": 1}
    assert [s.header.series_uid for s in found.series] == [PRIOR, FOLLOW_UP, "1.2.4", "1.2.5"]
    first, second, scout, few = found.series
    assert isinstance(first.outcome, ScoreCurve) and isinstance(second.outcome, ScoreCurve)
    np.testing.assert_allclose(first.outcome.height_mm, 5.0 * np.arange(12), atol=1e-3)
    assert second.outcome.z_mm.tolist() == [5.0 * k + SHIFT_MM for k in range(4, 20)]
    assert first.outcome.model == scorer.bundle.digest
    assert first.set_aside == {"localizer": 1}
    assert first.outcome.quality.flags == (Flag.SLICES_REFUSED,)
    assert second.set_aside == {} and second.outcome.quality.flags == ()
    assert scout.outcome == Refusal("1.2.4", Reason.LOCALIZER)
    assert few.outcome == Refusal("1.2.5", Reason.TOO_FEW_POSITIONS)


def test_progress_is_told_of_each_file(archive, scorer):
    told: list[int] = []
    files.score([archive], scorer, told.append)
    assert told == [1] * (FILES + 1)


def test_a_file_given_twice_counts_once(archive, scorer):
    (found,) = files.score([archive / "follow-up", archive / "follow-up"], scorer).series
    assert isinstance(found.outcome, ScoreCurve)
    assert len(found.outcome.z_mm) == 16
    assert found.outcome.quality.flags == ()


def test_single_files_may_be_named(archive, scorer):
    paths = [p for p in (archive / "follow-up").rglob("*") if p.is_file()]
    (found,) = files.score(paths, scorer).series
    assert isinstance(found.outcome, ScoreCurve) and len(found.outcome.z_mm) == 16


@pytest.mark.filterwarnings("ignore:The pixel data length:UserWarning")
def test_damaged_files_do_not_hinder_the_others(archive, scorer):
    whole = part10(ct_slice(PRIOR, 15))
    (archive / "short-pixels").write_bytes(whole[:-100])
    (archive / "short-header").write_bytes(whole[:200])
    (archive / "empty").write_bytes(b"")
    found = files.score([archive], scorer)
    assert found.unreadable == {"not_dicom": 2, "bad_uid": 1}
    assert found.series[0].set_aside == {"localizer": 1, "pixel_data": 1}
    assert isinstance(found.series[0].outcome, ScoreCurve)


def test_an_empty_folder_has_no_series(tmp_path, scorer):
    assert files.score([tmp_path], scorer) == files.ScoredFiles((), {})


def outcomes(found: files.ScoredFiles) -> list[ScoreCurve]:
    return [s.outcome for s in found.series if isinstance(s.outcome, ScoreCurve)]


@pytest.mark.parametrize("method", list(Method))
def test_the_offset_of_two_folders_is_how_far_the_table_moved(archive, scorer, method):
    fixed = outcomes(files.score([archive / "follow-up"], scorer))
    moving = outcomes(files.score([archive / "prior"], scorer))
    best = files.best_offset(fixed, moving, method, scorer.bundle.covariance)
    assert best is not None
    assert (best[0].series_uid, best[1].series_uid) == (FOLLOW_UP, PRIOR)
    assert (best[2].method, best[2].status) == (method, OffsetStatus.OK)
    # Of a few slices, robust says what its prior says of such short scans, to a mm.
    within = 1.5 if method is Method.ROBUST else 0.01
    assert best[2].offset_mm == pytest.approx(SHIFT_MM, abs=within)


def straight(series_uid: str, start: int, count: int) -> ScoreCurve:
    """Return a curve whose body height is its position."""
    made = curve.assemble(
        [
            ScoredSlice(f"{series_uid}.{k}", (0, 0, 5.0 * k), (1, 0, 0, 0, 1, 0), 0.5 * k)
            for k in range(start, start + count)
        ],
        series_uid=series_uid,
        model="m",
        heights=HeightMap(10.0, 0.0, 5.0),
    )
    assert isinstance(made, ScoreCurve)
    return made


def test_of_several_series_the_pair_with_the_longest_overlap_is_taken():
    fixed = [straight("1.1", 0, 20), straight("1.2", 10, 40)]
    moving = [straight("2.1", 0, 15), straight("2.2", 20, 30), straight("2.3", 200, 100)]
    best = files.best_offset(fixed, moving, Method.L1)
    assert best is not None
    assert (best[0].series_uid, best[1].series_uid) == ("1.2", "2.2")
    assert best[2].offset_mm == pytest.approx(0.0)


def test_an_extrapolated_offset_is_better_than_none():
    best = files.best_offset([straight("1", 0, 20)], [straight("2", 200, 20)], Method.FAST)
    assert best is not None and best[2].status is OffsetStatus.EXTRAPOLATED
    assert files.best_offset([], [straight("2", 0, 20)], Method.L1) is None


# Back-fill


@pytest.fixture
def settings(tmp_path, bundle, bundle_folder) -> Settings:
    return Settings(
        node={"port": 0, "peers": [{"ae_title": "PACS", "host": "127.0.0.1", "port": 104}]},
        spool={"path": tmp_path / "spool", "reserve_bytes": 0},
        database={"url": f"sqlite:///{tmp_path / 'node.sqlite'}"},
        score={"model": bundle_folder, "device": "cpu", "batch": 8},
        series={"quiet_seconds": 0},
    )


def rows(settings: Settings) -> dict[str, store.SeriesRow]:
    with store.opened(settings.database.url) as engine, store.reading(engine) as session:
        return {row.series_uid: row for row in store.list_series(session)}


def assert_filled(settings: Settings) -> None:
    found = rows(settings)
    assert {uid: (r.state, r.reason) for uid, r in found.items()} == {
        PRIOR: (SeriesState.CURVE, None),
        FOLLOW_UP: (SeriesState.CURVE, None),
        "1.2.4": (SeriesState.IGNORED, Reason.LOCALIZER),
        "1.2.5": (SeriesState.IGNORED, Reason.TOO_FEW_POSITIONS),
    }
    assert {r.revision for r in found.values()} == {1}
    with store.opened(settings.database.url) as engine, store.reading(engine) as session:
        stored = store.offsets_of(session)
    assert [s.offset.method for s in stored] == [Method.ROBUST, Method.L1, Method.FAST]
    for s in stored:
        assert (s.fixed_series, s.moving_series) == (FOLLOW_UP, PRIOR)
        within = 1.5 if s.offset.method is Method.ROBUST else 0.01
        assert s.offset.offset_mm == pytest.approx(SHIFT_MM, abs=within)


def test_a_back_fill_goes_from_files_to_offsets(archive, settings):
    told: list[int] = []
    summary = backfill.run([archive], settings, told.append)
    assert (summary.files, summary.skipped, summary.curves) == (FILES, {"no DICOM": 1}, 2)
    assert told == [1] * (FILES + 1)
    assert_filled(settings)
    assert Spool(settings.spool.path).pending(1) == []


def test_a_back_fill_repeated_changes_nothing(archive, settings):
    backfill.run([archive], settings)
    before = rows(settings)
    again = backfill.run([archive], settings)
    assert (again.files, again.curves) == (FILES, 2)
    assert rows(settings) == before
    assert_filled(settings)


def test_a_back_fill_does_not_fill_the_spool(archive, settings, monkeypatch):
    monkeypatch.setattr(backfill, "AHEAD", 6)
    spool = Spool(settings.spool.path)
    most = 0

    def watch(count: int) -> None:
        nonlocal most
        most = max(most, len(spool.pending(100)))

    assert backfill.run([archive], settings, watch).files == FILES
    assert most <= 6 + 1  # the end of a folder comes on top
    assert_filled(settings)


def test_a_back_fill_feeds_a_node_that_is_running(archive, settings):
    with store.opened(settings.database.url, create=True):
        pass
    stop = threading.Event()
    worker = threading.Thread(target=serve.work, args=(settings, stop))
    worker.start()
    try:
        await_lease(settings)
        summary = backfill.run([archive], settings)
    finally:
        stop.set()
        worker.join()
    assert (summary.files, summary.skipped, summary.curves) == (FILES, {"no DICOM": 1}, 2)
    assert_filled(settings)


def await_lease(settings: Settings) -> None:
    """Wait until another worker holds the spool."""
    spool = Spool(settings.spool.path)
    deadline = time.monotonic() + 20
    with pytest.raises(ConfigError):
        while time.monotonic() < deadline:
            with spool.lease():
                time.sleep(0.001)
            time.sleep(0.05)


def test_a_back_fill_under_wrong_settings_stops(archive, settings, tmp_path):
    values = settings.model_dump()
    values["database"] = {"url": "mysql://127.0.0.1/none"}
    with pytest.raises(ConfigError, match=r"database\.url"):
        backfill.run([archive], Settings(**values))


# Checks


def checked(settings: Settings, **sections: Any) -> dict[str, Check]:
    """Return what was tried by name, under settings changed by section."""
    values = settings.model_dump()
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    return {check.name: check for check in checks.run(Settings(**values))}


def failed(found: dict[str, Check]) -> set[str]:
    assert all(check.message for check in found.values())
    return {name for name, check in found.items() if not check.ok}


@contextmanager
def peer(*contexts: str, **settings: Any) -> Iterator[int]:
    """Serve a DICOM node of other make and give its port."""
    ae = AE("PEER")
    for uid in contexts:
        ae.add_supported_context(uid)
    for name, value in settings.items():
        setattr(ae, name, value)
    handlers = [(evt.EVT_C_ECHO, lambda event: 0x0000)]
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_all_is_well_where_all_is_well(settings, bundle):
    with peer(Verification) as port:
        peers = [{"ae_title": "PEER", "host": "127.0.0.1", "port": port}]
        found = checked(settings, node={"peers": peers})
    assert list(found) == [
        "listen", "tls", "access", "audit", "spool", "database", "weights", "device", "peer PEER",
    ]  # fmt: skip
    assert failed(found) == set()
    assert found["weights"].message == f"brightness, {bundle.digest[:16]}"
    assert found["device"].message == "cpu"
    assert str(port) in found["peer PEER"].message


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a spool where a file is": ("spool", {"path": "{tmp}/a-file"}, "a-file"),
    "a spool on a disk that is full": ("spool", {"reserve_bytes": 10**18}, "free"),
    "a database of an unknown kind": ("database", {"url": "mysql://127.0.0.1/x"}, "mysql"),
    "a database that nobody serves": ("database", {"url": "postgresql://127.0.0.1:1/x"}, "data"),
    "a database in a file of something else": ("database", {"url": "sqlite:///{tmp}/a-file"}, ""),
    "a database of a later version": ("database", {"url": "sqlite:///{tmp}/newer.sqlite"}, "9999"),
    "a database in no folder": ("database", {"url": "sqlite:///{tmp}/a-file/x.sqlite"}, ""),
    "weights that are not there": ("score", {"model": "{tmp}/none"}, "none"),
    "a device that is not there": ("score", {"device": "cuda:63"}, "cuda:63"),
    "nobody who may send": ("node", {"peers": []}, "nobody may send"),
}
NAMES = {"score model": "weights", "score device": "device", "node peers": "peers"}


@pytest.mark.parametrize(("section", "change", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_and_the_rest_is_tried(settings, tmp_path, section, change, words):
    (tmp_path / "a-file").write_text("neither a folder nor a database")
    with sqlite3.connect(tmp_path / "newer.sqlite") as connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.execute("INSERT INTO alembic_version VALUES ('9999')")
    connection.close()
    ((key, value),) = change.items()
    value = value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
    changes: dict[str, dict[str, Any]] = {"node": {"peers": []}}
    changes[section] = {**changes.get(section, {}), key: value}
    found = checked(settings, **changes)
    assert list(found) == [
        "listen", "tls", "audit", "spool", "database", "weights", "device", "peers",
    ]  # fmt: skip
    name = NAMES.get(f"{section} {key}", section)
    assert failed(found) == {name, "peers"}
    assert words in found[name].message


def test_each_peer_is_tried(settings):
    with peer(Verification) as good, peer(Verification, require_called_aet=True) as named:
        with peer(CTImageStorage) as deaf:
            ports = {"GOOD": good, "NAMED": named, "DEAF": deaf, "GONE": closed_port()}
            peers = [
                {"ae_title": name, "host": "127.0.0.1", "port": port, "calling": name == "GOOD"}
                for name, port in ports.items()
            ]
            found = checked(settings, node={"peers": peers})
    assert failed(found) == {"peer NAMED", "peer DEAF", "peer GONE"}
    for name in ("NAMED", "DEAF", "GONE"):
        assert str(ports[name]) in found[f"peer {name}"].message


def test_settings_are_shown_without_the_password(settings):
    values = settings.model_dump()
    values["database"] = {"url": "postgresql://node:tulip@db/dicomnode"}
    lines = list(checks.lines(Settings(**values)))
    assert not any("tulip" in line for line in lines)
    assert "database.url = 'postgresql://node:***@db/dicomnode'" in lines
    assert "score.batch = 8" in lines
