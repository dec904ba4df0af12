"""Priors and catching up, with an Orthanc that forwards: what is not here is asked for, and comes.

The node is down for some seconds here; DICOMNODE_TEST_DOWN_S=300 makes it five minutes.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from dicomnode import store
from dicomnode.model import FetchCause, FetchState, SeriesState
from tests.e2e import pacs
from tests.e2e.conftest import (
    Node,
    Scan,
    dcmsend,
    eventually,
    localizer,
    need,
    network_namespace,
    run,
    save,
    scan,
    skip,
)

pytestmark = pytest.mark.slow

DOWN_S = float(os.environ.get("DICOMNODE_TEST_DOWN_S", "3"))
TODAY = datetime.now().replace(hour=9, minute=0, second=0, microsecond=0)
ORTHANC = 14242


@pytest.fixture
def prefix() -> Iterator[list[str]]:
    need("Orthanc", "dcmsend", "unshare", "nsenter", "ip")
    with ExitStack() as stack:
        try:
            yield stack.enter_context(network_namespace())
        except RuntimeError as exc:
            skip(f"no network namespace: {exc}")


def make_node(folder: Path, prefix: Sequence[str], priors: str) -> Node:
    node = Node(folder, prefix=prefix, more_settings=f"[priors]\n{priors}\nper_minute = 600\n")
    node.write_config(node.config, {"ORTHANC": ORTHANC, "TEST": node.port})
    return node


def fetches(node: Node) -> dict[str, store.Fetch]:
    with store.reading(node.engine) as session:
        return {f.what.series_uid: f for f in store.list_fetches(session)}


def send(prefix: Sequence[str], scans: Sequence[Scan], folder: Path) -> None:
    for n, part in enumerate(scans):
        save(part.slices, folder / str(n))
    run([*prefix, *dcmsend(ORTHANC, folder, options=["-aec", "ORTHANC"])])


def failed_jobs(prefix: Sequence[str]) -> int:
    """Return how many forwards Orthanc gave up."""
    url = "http://127.0.0.1:18042/jobs?expand"
    look = f"import urllib.request as u; print(u.urlopen({url!r}).read().decode())"
    result = run([*prefix, sys.executable, "-c", look])
    return sum(job["State"] == "Failure" for job in json.loads(result.stdout))


def test_the_newest_priors_come_by_c_move_when_a_new_study_does(tmp_path, prefix):
    years = (2025, 2023, 2021, 2019)
    olds = [scan(9100, matrix=128, when=datetime(y, 3, 4), table_mm=float(y % 50)) for y in years]
    other = scan(9200, matrix=128, when=datetime(2024, 3, 4))
    new = scan(9100, matrix=128, when=TODAY, table_mm=90.0)
    scout = localizer(olds[0])
    priors = 'peers = ["ORTHANC"]\ncount = 2\nsettle_seconds = 2.0'
    node = make_node(tmp_path / "node", prefix, priors)
    with ExitStack() as stack:
        stack.callback(node.close)
        forward = {"node_port": node.port, "forward": pacs.FORWARD_ALL}
        stack.enter_context(pacs.orthanc(tmp_path / "orthanc", prefix, **forward))
        send(prefix, [*olds, other, scout], tmp_path / "old")
        # Forwarded while nobody listened: these are priors that are not here.
        eventually(lambda: failed_jobs(prefix) == 6, "forwards given up")
        node.start()
        run(
            [
                *prefix,
                *dcmsend(ORTHANC, save(new.slices, tmp_path / "new"), options=["-aec", "ORTHANC"]),
            ]
        )
        for part in (new, olds[0], olds[1]):
            row = node.finished(part.series_uid, len(part.slices))
            assert (row.state, row.revision) == (SeriesState.CURVE, 1)
            assert node.curve_uids(part.series_uid) == part.uids
        node.idle()
        answer = node.json("offset", new.study_uid, olds[0].study_uid)
        assert abs(answer["offset_mm"] - (90.0 - olds[0].table_mm)) <= 10.0
        # Neither more of them, nor somebody else's, nor priors of priors.
        assert {row.series_uid for row in node.series()} == {
            part.series_uid for part in (new, olds[0], olds[1])
        }
        found = node.json("fetches")
        assert [i["subject"] for i in found["inquiries"]] == [new.study_uid]
        assert {
            s["series_uid"]: (s["state"], s["completed"], s["failed"]) for s in found["series"]
        } == {part.series_uid: ("done", len(part.slices), 0) for part in olds[:2]}
        asked = [line for line in node.audited("query") if line.get("part") == "fetch"]
        assert asked[0]["by_patient"] and asked[0]["study_uid"] == new.study_uid
        assert node.stop() == 0
        node.check_log()


def test_all_that_a_forward_missed_while_the_node_was_down_arrives_once(tmp_path, prefix):
    scans = [scan(9100 + n, matrix=64, spacing_mm=12.0, when=TODAY) for n in range(10)]
    before = scan(9150, matrix=64, spacing_mm=12.0, when=TODAY)
    # At first, what a look finds on its way has all the time to come by itself.
    priors = 'catch_up = ["ORTHANC"]\nsettle_seconds = 600.0\ncatch_up_minutes = 0.1'
    node = make_node(tmp_path / "node", prefix, priors)
    with ExitStack() as stack:
        stack.callback(node.close)
        forward = {"node_port": node.port, "forward": pacs.FORWARD_ALL}
        stack.enter_context(pacs.orthanc(tmp_path / "orthanc", prefix, **forward))
        node.start()
        send(prefix, [before], tmp_path / "before")
        node.finished(before.series_uid, len(before.slices))
        assert node.stop() == 0
        down = time.monotonic()
        text = node.config.read_text()
        node.config.write_text(text.replace("settle_seconds = 600.0", "settle_seconds = 2.0"))
        send(prefix, scans, tmp_path / "ct")
        eventually(lambda: failed_jobs(prefix) == 10, "forwards given up")
        while time.monotonic() < down + DOWN_S:
            time.sleep(min(1.0, max(0.0, down + DOWN_S - time.monotonic())))
        node.start()
        for part in scans:
            row = node.finished(part.series_uid, len(part.slices))
            assert (row.state, row.revision, row.received) == (
                SeriesState.CURVE,
                1,
                len(part.slices),
            )
            assert node.curve_uids(part.series_uid) == part.uids
        missed = {part.series_uid for part in scans}
        eventually(
            lambda: {fetches(node)[uid].state for uid in missed} == {FetchState.DONE}, "all settled"
        )
        # It is looked again and again, and nothing comes twice.
        looked = len(node.audited("query"))
        eventually(lambda: len(node.audited("query")) >= looked + 4, "two more looks")
        found = {uid: f for uid, f in fetches(node).items() if uid != before.series_uid}
        assert set(found) == missed
        assert {f.what.cause for f in found.values()} == {FetchCause.CATCH_UP}
        assert {f.attempts for f in found.values()} == {1}
        came = [line["instances"] for line in node.audited("association ended")]
        assert sum(came) == sum(len(part.slices) for part in [*scans, before])
        assert len(node.series()) == 11
        assert node.stop() == 0
        node.check_log()


# A PACS that lets us ask, and does not know where we are.
STRANGER = {
    "DicomModalities": {},
    "LuaScripts": [],
    "DicomAlwaysAllowFind": True,
    "DicomAlwaysAllowMove": True,
}


def test_where_the_pacs_does_not_know_our_ae_title_it_says_what_to_do(tmp_path, prefix):
    part = scan(matrix=64, spacing_mm=12.0, when=TODAY - timedelta(days=1))
    priors = 'catch_up = ["ORTHANC"]\nsettle_seconds = 0.5'
    node = make_node(tmp_path / "node", prefix, priors)
    with ExitStack() as stack:
        stack.callback(node.close)
        stack.enter_context(
            pacs.orthanc(tmp_path / "orthanc", prefix, node_port=node.port, more_settings=STRANGER)
        )
        send(prefix, [part], tmp_path / "ct")
        node.start()
        failed = eventually(
            lambda: [f for f in fetches(node).values() if f.reason], "asked for in vain"
        )
        assert failed[0].what.series_uid == part.series_uid
        assert failed[0].state is FetchState.WAITING
        assert "register our AE title" in failed[0].reason
        assert node.stop() == 0
        node.check_log()


WEB = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"


def test_priors_come_from_a_dicomweb_server(tmp_path, prefix):
    if not Path(WEB).exists():
        skip(f"not installed: {WEB}")
    old = scan(9100, matrix=128, when=datetime(2025, 3, 4), table_mm=40.0)
    other = scan(9200, matrix=128, when=datetime(2025, 3, 4))
    new = scan(9100, matrix=128, when=TODAY, table_mm=90.0)
    url = "http://127.0.0.1:18042/dicom-web/"
    node = make_node(
        tmp_path / "node", prefix, f'dicomweb = [{{ name = "archive", url = "{url}" }}]'
    )
    # It knows nothing of the node, and forwards nothing.
    more = {"DicomModalities": {}, "LuaScripts": [], "Plugins": [WEB]}
    with ExitStack() as stack:
        stack.callback(node.close)
        stack.enter_context(
            pacs.orthanc(tmp_path / "orthanc", prefix, node_port=node.port, more_settings=more)
        )
        send(prefix, [old, other], tmp_path / "ct")
        node.start()
        titles = ["-aet", "TEST", "-aec", "DICOMNODE", "+sd", "127.0.0.1", str(node.port)]
        run([*prefix, "dcmsend", *titles, str(save(new.slices, tmp_path / "new"))])
        for part in (new, old):
            row = node.finished(part.series_uid, len(part.slices))
            assert (row.state, row.revision) == (SeriesState.CURVE, 1)
            assert node.curve_uids(part.series_uid) == part.uids
        node.idle()
        assert len(node.series()) == 2
        answer = node.json("offset", new.study_uid, old.study_uid)
        assert abs(answer["offset_mm"] - 50.0) <= 10.0
        (fetch,) = fetches(node).values()
        assert (fetch.what.peer, fetch.completed) == ("archive", len(old.slices))
        assert node.stop() == 0
        node.check_log()
