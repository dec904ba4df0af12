"""Several receiver processes on one port, one of which is killed; and who did what, audited."""

import contextlib
import getpass
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from dicomnode.model import Evidence, SeriesState
from tests.e2e.conftest import Node, association, eventually, running_node, scan

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    dul = frozenset({"pynetdicom.dul"})
    with running_node(tmp_path / "node", tracebacks_of=dul, receivers=2) as node:
        eventually(lambda: len(node.audited("started")) == 3, "two receivers, one worker")
        yield node


def receivers(node: Node) -> set[int]:
    """Process ids of the receivers that run."""
    assert node._process is not None
    found = set()
    for child in psutil.Process(node._process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie, which is one of these
            if "receive" in child.cmdline():
                found.add(child.pid)
    return found


def test_a_receiver_that_is_killed_leaves_the_other_its_associations(node):
    before = receivers(node)
    assert len(before) == 2
    with ExitStack() as stack:
        # Whichever is free takes a connection: open some, until each has one.
        held = {}
        while len(held) < 2:
            made = scan(spacing_mm=12.0)
            count = len(node.audited("association opened"))
            assert count < 16, "one receiver took sixteen associations in a row"
            assoc = stack.enter_context(association(node.port))
            assert assoc.is_established
            lines = eventually(
                lambda: node.audited("association opened")[count:],  # noqa: B023
                "association audited",
            )
            assert assoc.send_c_store(made.slices[0]).Status == 0x0000
            held.setdefault(lines[0]["pid"], (assoc, made))
        assert set(held) == before
        gone, left = sorted(held)
        os.kill(gone, signal.SIGKILL)
        # Nobody is turned away meanwhile.
        with association(node.port) as assoc:
            assert assoc.is_established
        assoc, made = held[left]
        eventually(lambda: len(receivers(node) - {gone}) == 2, "a receiver in its place")
        eventually(lambda: len(node.audited("started")) == 4, "which has started")
        # Its start ends what its forerunner held, and nothing else.
        lost = node.finished(held[gone][1].series_uid, 1)
        assert lost.evidence is Evidence.ASSOCIATION_LOST
        row = node.one(made.series_uid)
        assert row is not None and row.state is SeriesState.OPEN
        for ds in made.slices[1:]:
            assert assoc.send_c_store(ds).Status == 0x0000
    row = node.finished(made.series_uid, len(made.slices))
    assert (row.state, row.evidence) == (SeriesState.CURVE, Evidence.RELEASED_AND_QUIET)
    assert node.curve_uids(made.series_uid) == made.uids


def test_a_connection_waits_for_the_receiver_that_follows(tmp_path):
    with running_node(tmp_path / "node", tracebacks_of=frozenset({"pynetdicom.dul"})) as node:
        node.kill("receiver")
        with association(node.port) as assoc:
            assert assoc.is_established
            assert assoc.send_c_store(scan().slices[0]).Status == 0x0000


def test_who_sent_and_who_asked_is_audited(node):
    prior, follow_up = scan(spacing_mm=12.0), scan(spacing_mm=12.0, table_mm=30.0)
    for made in (prior, follow_up):
        with association(node.port) as assoc:
            for ds in made.slices:
                assert assoc.send_c_store(ds).Status == 0x0000
        node.finished(made.series_uid, len(made.slices))
    node.idle()
    ended = {line["association_id"]: line for line in node.audited("association ended")}
    for made in (prior, follow_up):
        (line,) = [x for x in node.audited("series received") if x["series_uid"] == made.series_uid]
        assert (line["study_uid"], line["instances"]) == (made.study_uid, len(made.slices))
        (association_id,) = line["associations"]
        assert ended[association_id]["calling_ae_title"] == "TEST"
        assert ended[association_id]["instances"] == len(made.slices)
    node.json("offset", follow_up.study_uid, prior.study_uid)
    node.json("curve", prior.series_uid)
    node.json("series", "--patient", str(prior.slices[0].PatientID))
    node.json("series", "--study", prior.study_uid)
    queries = node.audited("query")
    assert {line["user"] for line in queries} == {getpass.getuser()}
    assert [line["command"] for line in queries] == ["offset", "curve", "series", "series"]
    assert queries[0]["study_uid"] == [follow_up.study_uid, prior.study_uid]
    assert queries[1]["series_uid"] == prior.series_uid
    assert queries[2]["by_patient"] is True
    assert queries[3]["study_uid"] == prior.study_uid
    assert oct(node.audit_log.stat().st_mode)[-3:] == "600"
