"""What a hospital network sends besides sound CT: each gets its status or its stored reason.

One node for all of it: it must stay up, and what is sound must be scored behind what is not. A
test that leaves the node stuck fails alone: the next one gets a new node.
"""

import contextlib
import os
import random
import secrets
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pynetdicom import _config
from pynetdicom.sop_class import Verification
from sqlalchemy import make_url

from dicomnode import store
from dicomnode.model import Reason, SeriesState
from tests.conftest import postgres_database
from tests.dicom import ct_dataset, part10
from tests.e2e.conftest import (
    CT,
    Node,
    association,
    eventually,
    running_node,
    save,
    scan,
    send,
    skip,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    # What is wrong with these data sets is the point.
    pytest.mark.filterwarnings("ignore:.*[Ii]nvalid value"),
    pytest.mark.filterwarnings("ignore:.*value length"),
]

ECHO = (Verification, ["1.2.840.10008.1.2"])


class Bench:
    """Gives each test the one node, or a new one where a test left it stuck."""

    def __init__(self, folder: Path, database: contextlib.ExitStack, server: str | None) -> None:
        self._folder, self._server, self._resources = folder, server, database
        self._node: Node | None = None

    def node(self) -> Node:
        if self._node is None:
            name = secrets.token_hex(4)
            url = self._server and self._resources.enter_context(postgres_database(self._server))
            self._node = Node(self._folder / name, url)
            self._node.tracebacks_of = {"pynetdicom.dul"}
            self._node.start()
        return self._node

    def discard(self) -> None:
        if self._node is not None:
            node, self._node = self._node, None
            node.close()


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    server = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    with contextlib.ExitStack() as resources:
        bench = Bench(tmp_path_factory.mktemp("bad"), resources, server)
        try:
            yield bench
        finally:
            bench.discard()


@pytest.fixture
def node(bench: Bench) -> Iterator[Node]:
    """A node that has to be the same, idle, and without a traceback in its log afterwards."""
    node = bench.node()
    before = {name: part.pid for name, part in node.parts().items()}
    try:
        yield node
        with association(node.port, ECHO, CT) as assoc:
            assert assoc.send_c_echo().Status == 0x0000
        node.idle(30)
        node.check_log()
        assert {name: part.pid for name, part in node.parts().items()} == before
    except BaseException:
        bench.discard()
        raise


def spooled(node: Node, data: bytes) -> None:
    """Put a file as it is into the spool, as a C-STORE of this data set would."""
    association_id = secrets.token_hex(8)
    node.spool.put(data, association_id)
    node.spool.put_event(association_id, "released")


def assert_scores(node: Node) -> None:
    good = scan(spacing_mm=12.0)
    assert set(send(node.port, good.slices)) == {0x0000}
    assert node.finished(good.series_uid, len(good.slices)).state is SeriesState.CURVE
    assert node.curve_uids(good.series_uid) == good.uids


# The port


STRANGERS = {
    "random bytes": random.Random(1).randbytes(4096),
    "HTTP": b"GET / HTTP/1.1\r\nHost: pacs\r\n\r\n",
    "an A-ASSOCIATE-RQ of 4 GiB": b"\x01\x00\xff\xff\xff\xff" + bytes(64),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "half a header": b"\x01\x00\x00",
    "silence": b"",
}


def test_bytes_that_are_no_dicom_disturb_nobody(node):
    with contextlib.ExitStack() as connected:
        for data in STRANGERS.values():
            connection = socket.create_connection(("127.0.0.1", node.port))
            connected.enter_context(connection).sendall(data)
        assert_scores(node)  # while the strangers are still connected
    assert_scores(node)


@pytest.mark.parametrize(
    "titles", [{"called_ae_title": "OTHER"}, {"calling_ae_title": "STRANGER"}], ids=str
)
def test_a_wrong_ae_title_is_rejected(node, titles):
    with association(node.port, **titles) as assoc:
        assert assoc.is_rejected
    eventually(
        lambda: any(
            e["event"] == "association rejected" and e.items() >= titles.items()
            for e in node.events()
        ),
        "the operator is told",
    )


# One slice that is unsound


# What is wrong, and the reason that is stored; None: it may be scored alone and then be too
# few positions, or be set aside, but it must not stay.
UNSOUND: dict[str, tuple[dict[str, Any], Reason | None]] = {
    "no position": ({"ImagePositionPatient": None}, Reason.NO_GEOMETRY),
    "a position of two": ({"ImagePositionPatient": ["1", "2"]}, Reason.NO_GEOMETRY),
    "a position that is NaN": ({"ImagePositionPatient": ["NaN", "0", "0"]}, Reason.NO_GEOMETRY),
    "an infinite position": ({"ImagePositionPatient": ["1e400", "0", "0"]}, Reason.NO_GEOMETRY),
    "parallel cosines": (
        {"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]},
        Reason.NO_GEOMETRY,
    ),
    "cosines that are NaN": ({"ImageOrientationPatient": ["NaN"] * 6}, Reason.NO_GEOMETRY),
    "NaN spacing": ({"PixelSpacing": ["NaN", "NaN"]}, Reason.NO_GEOMETRY),
    "no spacing": ({"PixelSpacing": None}, Reason.NO_GEOMETRY),
    "spacing 0": ({"PixelSpacing": ["0", "0"]}, Reason.NO_GEOMETRY),
    "short pixel data": ({"PixelData": bytes(100)}, Reason.PIXEL_DATA),
    "no pixel data": ({"PixelData": None}, Reason.PIXEL_DATA),
    "Rows 0": ({"Rows": 0}, Reason.PIXEL_DATA),
    "4 Gpixel": ({"Rows": 65535, "Columns": 65535}, Reason.PIXEL_DATA),
    "three samples": ({"SamplesPerPixel": 3}, Reason.NOT_CT),
    "a slope that is NaN": ({"RescaleSlope": "NaN"}, None),
    "a huge intercept": ({"RescaleIntercept": "1e300"}, None),
    "spacing 1e-30": ({"PixelSpacing": ["1e-30", "1e-30"]}, None),
    "spacing 1e30": ({"PixelSpacing": ["1e30", "1e30"]}, None),
    "a huge position": ({"ImagePositionPatient": ["1e300", "0", "1e300"]}, None),
    "a huge count": ({"NumberOfSeriesRelatedInstances": "999999999999"}, None),
    "a negative count": ({"NumberOfSeriesRelatedInstances": "-5"}, None),
    "NUL in the PatientID": ({"PatientID": "CANARY-ID\0-NUL"}, None),
    "a long PatientID": ({"PatientID": "CANARY-ID" * 40}, None),
    "NUL in the text": ({"Manufacturer": "made \0 up", "BodyPartExamined": "CHE\0ST"}, None),
    "NUL in a UID": ({"FrameOfReferenceUID": "1.2.3\0.4"}, None),
    "no date": ({"StudyDate": "99999999", "StudyTime": "not a time"}, None),
    "an old date": ({"StudyDate": "00010101"}, None),
}


def test_unsound_attributes_end_with_a_reason(node):
    made = {name: ct_dataset(**attributes) for name, (attributes, _) in UNSOUND.items()}
    before = sum(node.quarantined().values())
    assert set(send(node.port, list(made.values()))) == {0x0000}
    node.idle()
    rows = {name: node.one(str(ds.SeriesInstanceUID)) for name, ds in made.items()}
    assert [name for name, row in rows.items() if row is None or row.reason is None] == []
    got = {name: str(row.reason) for name, row in rows.items() if row}
    wanted = {name: str(reason) for name, (_, reason) in UNSOUND.items() if reason}
    assert got | wanted == got
    # Their files are kept for a person to look at, and counted.
    quarantined = sum(row.state is SeriesState.QUARANTINED for row in rows.values() if row)
    assert sum(node.quarantined().values()) == before + quarantined
    assert len(list((node.spool.path / "quarantine").iterdir())) == before + quarantined

    result = node.cli("series", "--state", "quarantined")
    assert result.returncode == 0
    assert f"{before + quarantined} files in quarantine: " in result.stderr
    for name, reason in wanted.items():
        lines = [
            line for line in result.stdout.splitlines() if str(made[name].SeriesInstanceUID) in line
        ]
        if reason == Reason.NOT_CT:  # sound, but no CT: nobody needs to look
            assert lines == []
        else:
            assert [f"quarantined:{reason}" in line for line in lines] == [True]


def test_a_truncated_pixel_data_element_is_quarantined(node, tmp_path, monkeypatch):
    before = sum(node.quarantined().values())
    ds = ct_dataset()
    path = tmp_path / "short.dcm"
    path.write_bytes(part10(ds)[:-5000])  # its length field still tells the whole
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)  # sends the file as it is
    with association(node.port) as assoc:
        assert assoc.send_c_store(path).Status == 0x0000
    node.idle()
    (row,) = node.series(series_uid=str(ds.SeriesInstanceUID)) or [None]
    # Whether the header survives depends on the parser; that a file is kept does not.
    assert row is None or row.reason is Reason.PIXEL_DATA
    assert sum(node.quarantined().values()) == before + 1


def test_one_bad_slice_costs_one_slice(node):
    made = scan()
    bad = ct_dataset(
        StudyInstanceUID=made.study_uid,
        SeriesInstanceUID=made.series_uid,
        PatientID=made.slices[0].PatientID,
        PixelData=bytes(10),
    )
    assert set(send(node.port, [*made.slices[:9], bad, *made.slices[9:]])) == {0x0000}
    row = node.finished(made.series_uid, len(made.slices) + 1)
    assert (row.state, row.set_aside) == (SeriesState.CURVE, {"pixel_data": 1})
    assert row.quality is not None and "slices_refused" in row.quality.flags
    assert node.curve_uids(made.series_uid) == made.uids


def test_an_empty_patient_id_gets_a_curve_but_no_pairs(node):
    scans = [scan(patient_id="") for _ in range(2)]
    for made in scans:
        send(node.port, made.slices)
        assert node.finished(made.series_uid, len(made.slices)).state is SeriesState.CURVE
    node.idle()
    with store.reading(node.engine) as session:
        for made in scans:
            assert not store.offsets_of(session, fixed_study=made.study_uid)
            assert not store.offsets_of(session, moving_study=made.study_uid)


def test_a_uid_that_is_a_path_is_quarantined_and_leads_nowhere(node):
    keywords = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
    before, files = node.quarantined().get("bad_uid", 0), outside(node)
    made = [ct_dataset(**{keyword: "../../../etc/x"}) for keyword in keywords]
    assert set(send(node.port, made)) == {0x0000}
    eventually(lambda: node.quarantined().get("bad_uid", 0) == before + len(made), "bad_uid")
    node.idle()
    assert outside(node) == files
    aside = list((node.spool.path / "quarantine").glob("*-bad_uid.dcm"))
    assert len(aside) == before + len(made)
    assert not any(node.one(str(ds.SeriesInstanceUID)) for ds in made)
    assert f"bad_uid {before + len(made)}" in node.cli("series").stderr


def outside(node: Node) -> set[Path]:
    """Return the files near the node that are not in its spool, nor its database."""
    near = (path for path in node.folder.parent.rglob("*") if node.spool.path not in path.parents)
    return {path for path in near if not path.name.startswith("node.sqlite")}


# Files that are none


def unreadable() -> dict[str, bytes]:
    rng = random.Random(7)
    head = bytes(128) + b"DICM"
    whole = part10(ct_dataset())
    return {
        "empty": b"",
        "random": rng.randbytes(5000),
        "random_behind_dicm": head + rng.randbytes(5000),
        "only_dicm": head,
        "meta_alone": whole[:144],
        "half_a_header": whole[:500],
        "lengths_of_4_gib": head + b"\x02\x00\x10\x00UI\xff\xff" + b"\xff" * 400,
        "zeros": head + bytes(4000),
    }


def broken_off() -> bytes:
    """Return the beginning of a file, up to the first item of a sequence."""
    code = Dataset()
    code.CodeValue = "1"
    ds = ct_dataset(ProcedureCodeSequence=Sequence([code]))
    ds["ProcedureCodeSequence"].is_undefined_length = True
    data = part10(ds)
    return data[: data.index(struct.pack("<HH", 0x0008, 0x1032)) + 20]


def test_files_that_cannot_be_read_are_quarantined(node):
    before = sum(node.quarantined().values())
    files = unreadable()
    for data in files.values():
        spooled(node, data)
    node.idle()
    assert sum(node.quarantined().values()) == before + len(files)
    assert set(node.quarantined()) <= {str(r) for r in Reason}
    assert f"{before + len(files)} files in quarantine" in node.cli("series").stderr


def test_a_file_that_breaks_off_in_a_sequence_is_quarantined(node):
    before = sum(node.quarantined().values())
    spooled(node, broken_off())
    node.idle()
    assert sum(node.quarantined().values()) == before + 1


def test_damaged_files_do_not_stop_the_queue(node):
    # Each a sound slice with some bytes changed, in the header or anywhere.
    rng = random.Random(11)
    whole = part10(ct_dataset())
    header = whole.index(struct.pack("<HH", 0x7FE0, 0x0010))
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4, 40))):
            data[rng.randrange(132, header + 12)] = rng.randrange(256)
        node.spool.put(bytes(data), "0123456789abcdef")
    node.spool.put_event("0123456789abcdef", "released")
    node.idle(60)
    assert_scores(node)


def test_import_of_such_files_goes_on(node, tmp_path):
    made = scan(spacing_mm=12.0)
    folder = save(made.slices, tmp_path / "archive")
    for name, data in unreadable().items():
        (folder / name).write_bytes(data)
    result = node.cli("import", folder)
    assert result.returncode == 0, result.stderr
    assert node.curve_uids(made.series_uid) == made.uids


# What the node needs is taken away


def test_slices_that_come_while_the_database_is_away_are_scored_later(postgres_url, tmp_path):
    made = scan()
    half = len(made.slices) // 2
    with (
        postgres_database(postgres_url) as url,
        running_node(tmp_path / "node", url) as node,
        psycopg.connect(postgres_url, autocommit=True) as server,
    ):
        name = sql.Identifier(make_url(url).database or "")
        send(node.port, made.slices[:half])
        with association(node.port) as assoc:
            server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
            server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                [make_url(url).database],
            )
            for ds in made.slices[half:]:
                assert assoc.send_c_store(ds).Status == 0x0000
        eventually(
            lambda: any(e.get("event") == "worker waits" for e in node.events()), "worker waits"
        )
        assert len(node.spool.pending(1000)) >= len(made.slices) - half
        node.engine.dispose()
        server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
        row = node.finished(made.series_uid, len(made.slices))
        assert row.state is SeriesState.CURVE
        assert node.curve_uids(made.series_uid) == made.uids
        assert node.quarantined() == {}


def test_a_database_that_is_away_at_the_start_is_waited_for(postgres_url, tmp_path):
    made = scan(spacing_mm=12.0)
    with (
        postgres_database(postgres_url) as url,
        psycopg.connect(postgres_url, autocommit=True) as server,
    ):
        name = sql.Identifier(make_url(url).database or "")
        server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
        node = Node(tmp_path / "node", url)
        try:
            node.start(wait=False)
            eventually(
                lambda: {"receiver started", "worker waits"} <= {e["event"] for e in node.events()},
                "the receiver is up, the worker waits",
            )
            assert set(send(node.port, made.slices)) == {0x0000}
            server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
            eventually(
                lambda: "worker started" in {e["event"] for e in node.events()}, "worker started"
            )
            assert node.finished(made.series_uid, len(made.slices)).state is SeriesState.CURVE
            assert node.stop() == 0
            node.check_log()
        finally:
            node.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(disk)]
    result = subprocess.run(mount, capture_output=True, text=True)
    if result.returncode:
        skip(f"mount: {result.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_answered_a700_and_a_resend_works(small_disk, tmp_path):
    made = scan(matrix=128)
    with running_node(tmp_path / "node", spool=small_disk / "spool", lost_seconds=3.0) as node:
        first, rest = made.slices[:5], made.slices[5:]
        assert send(node.port, first) == [0x0000] * 5
        eventually(lambda: not node.spool.pending(1), "first slices taken")
        fill = small_disk / "something else"
        _fill(fill)
        assert set(send(node.port, rest)) == {0xA700}
        assert [e["event"] for e in node.events()].count("instance refused") == len(rest)
        fill.unlink()
        assert set(send(node.port, rest)) == {0x0000}
        row = node.finished(made.series_uid, len(made.slices))
        assert row.state is SeriesState.CURVE
        assert node.curve_uids(made.series_uid) == made.uids
        assert not list((node.spool.path / "incoming").glob(".*"))


def test_a_spool_that_filled_its_disk_is_worked_off(small_disk, tmp_path):
    made = scan(matrix=128)
    node = Node(tmp_path / "node", spool=small_disk / "spool")
    for ds in made.slices:
        node.spool.put(part10(ds), "0123456789abcdef")
    node.spool.put_event("0123456789abcdef", "released")
    _fill(small_disk / "something else")  # not a byte is left: scoring is what makes room
    try:
        node.start(wait=False)
        assert node_finishes(node, made.series_uid, len(made.slices))
        assert node.curve_uids(made.series_uid) == made.uids
        assert node.stop() == 0
        node.check_log()
    finally:
        node.close()


def node_finishes(node: Node, series_uid: str, slices: int) -> Any:
    eventually(lambda: "worker started" in {e["event"] for e in node.events()}, "worker started")
    return node.finished(series_uid, slices, seconds=30)


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
