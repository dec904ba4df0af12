"""Rules, a whole node: what an analysis AE gets of what a PACS sent, whatever dies on the way."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from pynetdicom import AE, StoragePresentationContexts, evt
from sqlalchemy import update

from db import schema
from dicomnode import store
from dicomnode.model import DeliveryState, SeriesState
from tests.dicom import part10, without_meta
from tests.e2e.conftest import Node, Scan, eventually, free_port, scan, send

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

RULES = """
[keep]
late_seconds = 3
[[rule]]
name = "whole"
when = "covers(liver, 0.9)"
send_to = "AI"
[[rule]]
name = "liver alone"
when = "covers(liver, 0.9)"
send_to = "LIVERAI"
region = "liver"
margin_mm = 10
"""


class Analysis:
    """An AE that takes what it is sent, and keeps the bytes of each data set."""

    def __init__(self) -> None:
        self.port = free_port()
        self.got: dict[str, list[bytes]] = {}  # SOP Instance UID -> each time it came
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._server = None

    def start(self) -> None:
        ae = AE("ANALYSIS")
        ae.supported_contexts = StoragePresentationContexts
        handlers = [(evt.EVT_C_STORE, self._take)]
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)

    def stop(self) -> None:
        self.may_answer.set()
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _take(self, event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        self.got.setdefault(uid, []).append(event.request.DataSet.getvalue())
        self.may_answer.wait(60)
        return 0x0000

    def of(self, made: Scan) -> dict[str, set[bytes]]:
        """SOP Instance UID -> what came of it, of one Series."""
        return {uid: set(self.got[uid]) for uid in made.uids & self.got.keys()}


@pytest.fixture(scope="module")
def analyses() -> Iterator[dict[str, Analysis]]:
    found = {"AI": Analysis(), "LIVERAI": Analysis()}
    yield found
    for analysis in found.values():
        analysis.stop()


@pytest.fixture(scope="module")
def node(tmp_path_factory, analyses) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("rules")
    made = Node(folder, more_settings=RULES)
    peers = {"TEST": made.port} | {title: a.port for title, a in analyses.items()}
    made.write_config(made.config, peers)
    # pynetdicom prints one of an association whose requestor is killed.
    made.tracebacks_of = {"pynetdicom.dul"}
    try:
        made.start()
        yield made
        assert made.stop() == 0
        made.check_log()
    finally:
        made.close()


@pytest.fixture(autouse=True)
def all_up(analyses) -> Iterator[None]:
    for analysis in analyses.values():
        if analysis._server is None:
            analysis.start()
    yield


def abdomen(seed: int, **arguments: object) -> Scan:
    """All of the liver, and more."""
    return scan(seed, lowest="iliac_crest", highest="lung_apex", spacing_mm=10.0, **arguments)  # type: ignore[arg-type]  # any of them


def sent(made: Scan) -> dict[str, set[bytes]]:
    return {str(ds.SOPInstanceUID): {without_meta(part10(ds))} for ds in made.slices}


def held(node: Node) -> list[Path]:
    return list((node.spool.path / "held").rglob("*.dcm"))


def states(node: Node, made: Scan) -> dict[str, DeliveryState]:
    with store.reading(node.engine) as session:
        found = store.list_deliveries(session, subject=made.series_uid)
    return {d.what.rule: d.state for d in found}


def is_served(node: Node, made: Scan) -> bool:
    found = states(node, made)
    return len(found) == 2 and set(found.values()) == {DeliveryState.DONE}


def try_now(node: Node) -> None:
    """Let leases and pauses in the database be over."""
    with store.writing(node.engine) as session:
        waiting = schema.Delivery.state == DeliveryState.WAITING
        session.execute(update(schema.Delivery).where(waiting).values(due_at=datetime.now(UTC)))


def exchange_of(node: Node) -> psutil.Process:
    children = node.supervisor.children(recursive=True)
    return next(p for p in children if "exchange" in p.cmdline())


def test_an_analysis_ae_gets_the_series_or_the_slices_that_a_rule_wants(node, analyses):
    wanted, other = abdomen(9100), scan(9101)  # of the second the liver is cut
    assert set(send(node.port, [*wanted.slices, *other.slices])) == {0}
    eventually(lambda: is_served(node, wanted), "both rules are served")
    assert analyses["AI"].of(wanted) == sent(wanted)
    assert node.finished(other.series_uid, len(other.slices)).state is SeriesState.CURVE
    assert states(node, other) == {}
    assert not any(a.of(other) for a in analyses.values())
    eventually(lambda: not held(node), "pixels are gone")

    got = analyses["LIVERAI"].of(wanted)
    with store.reading(node.engine) as session:
        curve = store.curve_of(session, wanted.series_uid)
        liver = next(r for r in store.regions_of(session, curve.model) if r.name == "liver")
    inside = (curve.height_mm >= liver.low_mm - 10) & (curve.height_mm <= liver.high_mm + 10)
    came = [uid in got for uid in curve.sop_instance_uids]
    first, last = came.index(True), len(came) - 1 - came[::-1].index(True)
    assert sum(came) == len(got) == last - first + 1  # those between two ends, and no others
    # A slice at an end may be in or out: what decides is the height that its neighbours agree on.
    assert abs(first - int(inside.argmax())) <= 1
    assert abs(last - (len(inside) - 1 - int(inside[::-1].argmax()))) <= 1
    assert got.items() <= sent(wanted).items()


def test_what_one_destination_missed_waits_for_it(node, analyses):
    analyses["AI"].stop()
    wanted = abdomen(9102)
    send(node.port, list(wanted.slices))
    eventually(
        lambda: states(node, wanted).get("liver alone") is DeliveryState.DONE, "one is served"
    )
    assert states(node, wanted)["whole"] is DeliveryState.WAITING
    (part,) = (p for p in node.json("spool") if p["name"] == "held")
    assert part["waiting"] == len(wanted.slices) == len(held(node))
    assert part["waiting_bytes"] == sum(f.stat().st_size for f in held(node))
    analyses["AI"].start()
    eventually(lambda: is_served(node, wanted), "the other is served")
    assert analyses["AI"].of(wanted) == sent(wanted)
    eventually(lambda: not held(node), "pixels are gone")


def test_an_exchange_that_is_killed_in_the_midst_sends_all(node, analyses):
    analyses["AI"].may_answer.clear()
    wanted = abdomen(9103)
    send(node.port, list(wanted.slices))
    eventually(lambda: analyses["AI"].of(wanted), "the first slice is on its way")
    node.kill_processes([exchange_of(node)])
    analyses["AI"].may_answer.set()
    node.finished(wanted.series_uid, len(wanted.slices))
    assert len(held(node)) == len(wanted.slices)
    eventually(lambda: try_now(node) or is_served(node, wanted), "both are served")  # type: ignore[func-returns-value]  # it returns none
    assert analyses["AI"].of(wanted) == sent(wanted)
    eventually(lambda: not held(node), "pixels are gone")


def test_a_worker_that_is_killed_in_the_midst_loses_nothing(node, analyses):
    wanted = abdomen(9104, matrix=128)
    sender = threading.Thread(target=send, args=(node.port, list(wanted.slices)))
    sender.start()
    # As soon as something is held: it is not stored yet, or has not left the spool.
    eventually(lambda: held(node), "something is held")
    node.kill("worker")
    sender.join()
    node.finished(wanted.series_uid, len(wanted.slices))
    eventually(
        lambda: try_now(node) or (node.is_idle() and is_served(node, wanted)),  # type: ignore[func-returns-value]  # as above
        "both are served",
    )
    assert analyses["AI"].of(wanted) == sent(wanted)
    eventually(lambda: not held(node), "pixels are gone")


def test_a_rule_that_cannot_be_read_keeps_the_node_from_starting(tmp_path):
    node = Node(tmp_path / "node", more_settings=RULES.replace("covers(liver", "covers(livre", 1))
    node.write_config(node.config, {"TEST": 1, "AI": 1, "LIVERAI": 1})
    result = node.cli("serve")
    assert result.returncode == 2
    lines = result.stderr.splitlines()[-3:]
    assert lines[0].startswith("Error: rule.whole.when: no region 'livre': did you mean liver")
    assert lines[1].strip() == "covers(livre, 0.9)" and lines[2].index("^") == 9
    node.close()
