"""From the outbox to peers that take it, and to such as refuse, hang, break off and lie."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import (
    ImplicitVRLittleEndian,
)
from sqlalchemy import Engine, update

from db import schema
from dicomnode import store
from dicomnode.config import Settings
from dicomnode.model import DeliveryKind, DeliveryState, SeriesState
from dicomnode.node.deliver import Deliver, Strays
from dicomnode.outgoing import work as working
from dicomnode.outgoing.asking import Asking, destinations
from dicomnode.outgoing.work import NOT_CONFIGURED, backoff
from dicomnode.store import Ask
from tests.deliveries import (
    FIXED,
    MOVING,
    OURS,
    PAIR,
    PATIENT,
    SETTLE_S,
    Clock,
    arrive,
    deliveries,
    eventually,
    every,
    hurry,
    settings_for,
    to_peer,
    with_bundle,
)
from tests.integration.test_outbox import LEASE
from tests.integration.test_store import record, scan, sop_uid
from tests.peers import Archive, accept, archive, listening, read_pdu

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(engine) -> Engine:
    return with_bundle(engine)


@pytest.fixture(autouse=True)
def _soon(monkeypatch) -> None:
    hurry(monkeypatch)


# What asks


def test_results_ask_for_what_tells_of_them(node, tmp_path, clock):
    settings = settings_for(104, tmp_path, webhooks=["http://127.0.0.1/hook"])
    # Two Series a Study: four pairs of Series, and one of Studies.
    arrive(node, settings, clock.now, MOVING, study_uid=PAIR[1])
    arrive(node, settings, clock.now, f"{MOVING}.5", study_uid=PAIR[1])
    arrive(node, settings, clock.now, FIXED, study_uid=PAIR[0])
    arrive(node, settings, clock.now, f"{FIXED}.5", study_uid=PAIR[0])
    asked = {d.what for d in every(node)}
    assert asked == {
        *(
            Ask(DeliveryKind.REPORT, "PACS", u)
            for u in (MOVING, f"{MOVING}.5", FIXED, f"{FIXED}.5")
        ),
        Ask(DeliveryKind.REGISTRATION, "PACS", *PAIR),
        Ask(DeliveryKind.WEBHOOK, "http://127.0.0.1/hook", *PAIR),
    }
    assert {d.due_at for d in every(node)} == {clock.now + timedelta(seconds=SETTLE_S)}
    pair = deliveries(node)[DeliveryKind.REGISTRATION]
    assert pair.version > 1  # the second Series of the Study put it off


@on_sqlite
def test_nothing_is_stored_without_what_it_asks_for(node, tmp_path, clock, monkeypatch):
    settings = settings_for(104, tmp_path)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("between two statements")

    with monkeypatch.context() as patch:
        patch.setattr(Asking, "curve_stored", fail)
        arrive(node, settings, clock.now, FIXED)
    assert every(node) == []
    with store.reading(node) as session:
        (row,) = store.list_series(session)
    assert row.state is SeriesState.OPEN


def test_the_settings_say_where_anything_goes():
    settings = Settings(
        node={"peers": [{"ae_title": "PACS", "host": "h", "port": 104}]},
        deliver={"registration": ["PACS"], "webhooks": ["http://h/a"]},
        rule=[
            {"name": "a", "when": "slices > 1", "send_to": "PACS"},
            {"name": "b", "when": "slices > 1", "webhook": "http://h/b"},
        ],
    )
    assert destinations(settings) == {
        (DeliveryKind.REGISTRATION, "PACS", ""),
        (DeliveryKind.WEBHOOK, "http://h/a", ""),
        (DeliveryKind.FORWARD, "PACS", "a"),
        (DeliveryKind.WEBHOOK, "http://h/b", "b"),
    }


# What is sent


def test_a_pair_and_its_reports_are_delivered_once_they_settled(node, tmp_path, clock):
    with archive(*OURS) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        arrive(node, settings, clock.now, MOVING, FIXED)
        service = to_peer(settings, node, clock)
        assert service.step(clock.now) == 0
        clock.pass_(seconds=SETTLE_S)
        assert service.step(clock.now) == 3
        assert service.step(clock.now) == 0
        assert pacs.associations == 1
    done = every(node)
    assert {(d.state, d.attempts, d.reason) for d in done} == {(DeliveryState.DONE, 1, None)}
    assert {d.sop_instance_uid for d in done} == set(pacs.uids)
    registration = deliveries(node)[DeliveryKind.REGISTRATION]
    (data,) = (d for uid, _, d in pacs.stored if uid == registration.sop_instance_uid)
    ds = dcmread(BytesIO(data), force=True)
    assert (ds.StudyInstanceUID, ds.PatientID) == (PAIR[0], PATIENT.patient_id)
    matrix = ds.RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence[0]
    assert float(matrix.FrameOfReferenceTransformationMatrix[11]) == pytest.approx(0.0, abs=0.5)


def sent_again(node: Engine, settings: Settings, clock: Clock, pacs: Archive) -> list[Any]:
    """Return what comes when everything is queued again."""
    before = len(pacs.stored)
    with store.writing(node) as session:
        store.requeue_deliveries(session, clock.now, [d.id for d in store.list_deliveries(session)])
    to_peer(settings, node, clock).step(clock.now)
    return sorted(pacs.stored[before:])


@on_sqlite
def test_a_repeat_is_the_same_to_the_bit_and_a_revision_another_object(node, tmp_path, clock):
    with archive(*OURS) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        arrive(node, settings, clock.now, MOVING, FIXED)
        first = sent_again(node, settings, clock, pacs)
        clock.pass_(days=1)
        assert sent_again(node, settings, clock, pacs) == first
        # A late slice: another revision of one curve.
        record(node, scan(FIXED, 41, patient=PATIENT, study_datetime=datetime(2026, 1, 5))[40:])
        arrive(node, settings, clock.now)
        assert {d.state for d in deliveries(node, subject=PAIR[0]).values()} == {
            DeliveryState.WAITING
        }
        later = sent_again(node, settings, clock, pacs)
        # The patient was corrected: the same curves, and not the same objects.
        with store.writing(node) as session:
            session.execute(update(schema.Series).values(patient_id="CANARY-NEW"))
        corrected = sent_again(node, settings, clock, pacs)
    uids = [{uid for uid, _, _ in sent} for sent in (first, later, corrected)]
    assert [len(u) for u in uids] == [3, 3, 3]
    assert len(uids[0] & uids[1]) == 1  # the report of the Series that did not change
    assert not uids[2] & (uids[0] | uids[1])


@on_sqlite
def test_a_pair_without_an_offset_is_dropped(node, tmp_path, clock):
    with archive(*OURS) as pacs:
        settings = settings_for(pacs.port, tmp_path, report=[])
        arrive(node, settings, clock.now, MOVING, FIXED)
        with store.writing(node) as session:
            session.execute(update(schema.Offset).values(status="refused", reason="low_overlap"))
        clock.pass_(seconds=SETTLE_S)
        to_peer(settings, node, clock).step(clock.now)
        assert pacs.associations == 0
    assert deliveries(node)[DeliveryKind.REGISTRATION].state is DeliveryState.DROPPED


def test_a_study_that_still_arrives_is_waited_for(node, tmp_path, clock):
    with archive(*OURS) as pacs:
        settings = settings_for(pacs.port, tmp_path, report=[])
        arrive(node, settings, clock.now, MOVING, FIXED)
        record(node, scan(f"{FIXED}.7", 3, study_uid=PAIR[0], patient=PATIENT))
        service = to_peer(settings, node, clock)
        service.step(clock.pass_(seconds=SETTLE_S))
        waiting = deliveries(node)[DeliveryKind.REGISTRATION]
        assert (waiting.state, waiting.attempts) == (DeliveryState.WAITING, 0)
        assert waiting.due_at == clock.now + timedelta(seconds=SETTLE_S)
        # Not for ever: a Series may never be finished.
        service.step(clock.pass_(hours=1))
    assert deliveries(node)[DeliveryKind.REGISTRATION].state is DeliveryState.DONE


@on_sqlite
def test_what_is_asked_anew_while_it_is_sent_waits_for_that(node, tmp_path, clock):
    settings = settings_for(104, tmp_path, report=[])

    def ask_anew(event: Any) -> int:
        with store.writing(node) as session:
            ask = Ask(DeliveryKind.REGISTRATION, "PACS", *PAIR)
            store.ask_deliveries(session, [ask], clock.now, clock.now + timedelta(minutes=1))
        return 0x0000

    with archive(*OURS) as pacs:
        pacs.answers = [ask_anew]
        settings = settings_for(pacs.port, tmp_path, report=[])
        arrive(node, settings, clock.now, MOVING, FIXED)
        service = to_peer(settings, node, clock)
        service.step(clock.pass_(seconds=SETTLE_S))
        found = deliveries(node)[DeliveryKind.REGISTRATION]
        assert (found.state, found.attempts) == (DeliveryState.WAITING, 0)
        service.step(clock.pass_(minutes=1))
        assert len(pacs.stored) == 2 and len(set(pacs.uids)) == 1
    assert deliveries(node)[DeliveryKind.REGISTRATION].state is DeliveryState.DONE


# Peers that behave badly


def hang(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def abort_mid_transfer(connection: socket.socket) -> None:
    _, request = read_pdu(connection)
    connection.sendall(accept(request))
    read_pdu(connection)
    connection.sendall(b"\x07\0\0\0\0\x04\0\0\0\0")
    hang(connection)


def hang_mid_transfer(connection: socket.socket) -> None:
    _, request = read_pdu(connection)
    connection.sendall(accept(request))
    hang(connection)


@contextlib.contextmanager
def refusing() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port


@contextlib.contextmanager
def knows_another_title() -> Iterator[int]:
    with archive(*OURS, ae_title="OTHER") as pacs:
        yield pacs.port


@contextlib.contextmanager
def full() -> Iterator[int]:
    with archive(*OURS) as pacs:
        pacs.answers = [0xA700] * 1000
        yield pacs.port


@contextlib.contextmanager
def takes_images_only() -> Iterator[int]:
    with archive("1.2.840.10008.5.1.4.1.1.2") as pacs:
        yield pacs.port


BAD = {
    "refuses": (refusing, "Connection refused"),
    "knows another title": (knows_another_title, "Called AE title not recognised"),
    "hangs": (lambda: listening(hang), "does not answer the association request"),
    "hangs mid-transfer": (lambda: listening(hang_mid_transfer), "did not answer C-STORE"),
    "aborts mid-transfer": (lambda: listening(abort_mid_transfer), "aborted during C-STORE"),
    "is full": (full, "A700 Refused: Out of Resources"),
    "takes images only": (takes_images_only, "accepts no presentation context"),
}


@on_sqlite
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_peer_is_tried_again_given_up_and_queued_by_hand(
    node, tmp_path, clock, kind, caplog, monkeypatch
):
    bad, reason = BAD[kind]
    if kind == "hangs":
        hurry(monkeypatch, accept_s=0.3)
    if kind == "hangs mid-transfer":
        hurry(monkeypatch, answer_s=0.3)
    tries: list[datetime] = []
    with bad() as port:
        settings = settings_for(port, tmp_path, report=[], give_up_hours=0.05)
        arrive(node, settings, clock.now, MOVING, FIXED)
        service = to_peer(settings, node, clock)
        clock.pass_(seconds=SETTLE_S)
        for _ in range(10_000):
            before = deliveries(node)[DeliveryKind.REGISTRATION]
            if before.state is not DeliveryState.WAITING:
                break
            if service.step(clock.now):
                tries.append(clock.now)
                assert reason in (deliveries(node)[DeliveryKind.REGISTRATION].reason or "")
            clock.pass_(seconds=1)
    found = deliveries(node)[DeliveryKind.REGISTRATION]
    assert found.state is DeliveryState.FAILED and reason in (found.reason or "")
    gaps = [(b - a).total_seconds() for a, b in itertools.pairwise(tries)]
    assert gaps[:4] == [10, 20, 40, 80]
    assert tries[-1] - found.asked_at >= timedelta(hours=0.05)
    assert any(
        r.getMessage() in ("delivery given up", "deliveries given up") for r in caplog.records
    )

    hurry(monkeypatch)
    with archive(*OURS) as pacs:  # a person repaired it, and says so
        repaired = settings_for(pacs.port, tmp_path, report=[])
        with store.writing(node) as session:
            assert store.requeue_deliveries(session, clock.now) == [found.id]
        to_peer(repaired, node, clock).step(clock.now)
        assert len(pacs.stored) == 1
    assert deliveries(node)[DeliveryKind.REGISTRATION].state is DeliveryState.DONE


@on_sqlite
def test_a_refused_object_delays_no_other(node, tmp_path, clock):
    with archive(*OURS) as pacs:
        settings = settings_for(pacs.port, tmp_path, registration=[])
        arrive(node, settings, clock.now, MOVING, FIXED)
        pacs.answers = [0xC000]
        service = to_peer(settings, node, clock)
        service.step(clock.pass_(seconds=SETTLE_S))
        states = sorted((str(d.state), d.reason) for d in every(node))
        assert states == [("done", None), ("waiting", "C000 Cannot Understand")]
        service.step(clock.pass_(seconds=10))
        assert len(pacs.stored) == 2


@on_sqlite
def test_an_object_that_a_peer_cannot_bear_comes_behind_the_others(node, tmp_path, clock):
    # The peer dies of one object, whenever it comes.
    poison: list[str] = []
    with archive(*OURS) as pacs:

        def take(event: Any) -> int:
            uid = str(event.request.AffectedSOPInstanceUID)
            if not poison:
                poison.append(uid)
            if uid in poison:
                event.assoc.abort()
            return 0x0000

        pacs.answers = [take] * 20
        settings = settings_for(pacs.port, tmp_path, registration=[])
        arrive(node, settings, clock.now, *(f"{FIXED}.{k}" for k in range(4)))
        service = to_peer(settings, node, clock)
        clock.pass_(seconds=SETTLE_S)
        for _ in range(60):
            service.step(clock.pass_(seconds=5))
            if sum(d.state is DeliveryState.DONE for d in every(node)) == 3:
                break
        (left,) = (d for d in every(node) if d.state is not DeliveryState.DONE)
        assert left.state is DeliveryState.WAITING and "C-STORE" in (left.reason or "")
        assert set(pacs.uids) - set(poison) == {
            d.sop_instance_uid for d in every(node) if d.state is DeliveryState.DONE
        }


@on_sqlite
def test_a_certificate_that_is_missing_is_repaired_by_hand_too(node, tmp_path, clock):
    settings = settings_for(104, tmp_path, report=[])
    arrive(node, settings, clock.now, MOVING, FIXED)
    with archive(*OURS) as pacs:
        peer = pacs.peer.model_copy(update={"tls": True})  # and no [tls]
        with_tls = settings.model_copy(
            update={"node": settings.node.model_copy(update={"peers": (peer,)})}
        )
        to_peer(with_tls, node, clock).step(clock.pass_(seconds=SETTLE_S))
        found = deliveries(node)[DeliveryKind.REGISTRATION]
        assert (found.state, found.reason) == (DeliveryState.WAITING, "tls.certificate: missing")
        assert found.due_at == clock.now + timedelta(seconds=10)


@on_sqlite
def test_a_peer_that_is_down_is_not_called_for_each_delivery(node, tmp_path, clock):
    calls: list[float] = []

    def close(connection: socket.socket) -> None:
        calls.append(time.monotonic())

    with listening(close) as port:
        settings = settings_for(port, tmp_path, registration=[])
        asks = [Ask(DeliveryKind.REPORT, "PACS", FIXED) for _ in range(1)]
        arrive(node, settings, clock.now, FIXED)
        with store.writing(node) as session:
            asks = [Ask(DeliveryKind.REPORT, "PACS", f"1.9.{k}") for k in range(100)]
            store.ask_deliveries(session, asks, clock.now, clock.now)
            session.execute(
                update(schema.Delivery).values(due_at=clock.now, subject=schema.Delivery.subject)
            )
        service = to_peer(settings, node, clock)
        for _ in range(60):  # five minutes
            service.step(clock.pass_(seconds=5))
    assert 1 <= len(calls) <= 6
    dropped = [d for d in every(node) if d.state is DeliveryState.DROPPED]
    assert len(dropped) > 0  # those of which there is nothing to say need no peer


def test_a_destination_that_is_configured_no_more_is_given_up(node, tmp_path, clock):
    settings = settings_for(104, tmp_path)
    arrive(node, settings, clock.now, MOVING, FIXED)
    after = settings_for(104, tmp_path, registration=[])
    strays = Strays(after, node)
    # Perhaps it is this exchange that has the settings of before.
    assert strays.step(clock.now) == 0
    assert {d.state for d in every(node)} == {DeliveryState.WAITING}
    assert strays.step(clock.pass_(hours=1)) == 1
    found = deliveries(node)
    assert found[DeliveryKind.REGISTRATION].state is DeliveryState.FAILED
    assert found[DeliveryKind.REGISTRATION].reason == NOT_CONFIGURED
    assert found[DeliveryKind.REPORT].state is DeliveryState.WAITING
    assert strays.step(clock.now) == 0
    # The service of a destination gives up what is not for it any more, too.
    with store.writing(node) as session:
        store.requeue_deliveries(session, clock.now)
    with archive(*OURS) as pacs:
        only_reports = settings_for(pacs.port, tmp_path, registration=[])
        service = to_peer(only_reports, node, clock)
        service.step(clock.pass_(seconds=SETTLE_S))
        assert len(pacs.stored) == 2
        waits = deliveries(node)[DeliveryKind.REGISTRATION]
        assert (waits.state, waits.reason) == (DeliveryState.WAITING, NOT_CONFIGURED)
        service.step(clock.pass_(hours=1))
    given_up = deliveries(node)[DeliveryKind.REGISTRATION]
    assert (given_up.state, given_up.reason) == (DeliveryState.FAILED, NOT_CONFIGURED)


def test_the_wait_doubles_up_to_an_hour():
    waits = [backoff(n, 0.5).total_seconds() for n in (0, 1, 2, 3, 8, 9, 500)]
    assert waits == [10, 20, 40, 80, 2560, 3600, 3600]
    assert backoff(0, 0.0).total_seconds() == 7.5
    assert backoff(0, 1.0).total_seconds() == 12.5


def test_what_is_being_sent_stays_hidden(node, clock, monkeypatch, tmp_path):
    monkeypatch.setattr(working, "LEASE", timedelta(seconds=0.3))
    settings = settings_for(104, tmp_path)
    with store.writing(node) as session:
        ask = Ask(DeliveryKind.REPORT, "PACS", FIXED)
        store.ask_deliveries(session, [ask], clock.now, clock.now)
        (taken,) = store.claim_deliveries(session, clock.now, working.LEASE, 1)
    work = to_peer(settings, node, clock).work
    with work.holding([taken]):
        clock.pass_(seconds=100)
        deadline = time.monotonic() + 5
        while every(node)[0].due_at < clock.now and time.monotonic() < deadline:
            time.sleep(0.02)
        assert every(node)[0].due_at == clock.now + working.LEASE


# More than one


def test_two_exchanges_deliver_each_once(node, tmp_path, clock):
    with archive(*OURS) as pacs:
        settings = settings_for(pacs.port, tmp_path, registration=[])
        arrive(node, settings, clock.now, *(f"{FIXED}.{k}" for k in range(50)), study_uid=PAIR[0])
        clock.pass_(seconds=SETTLE_S)
        services = [to_peer(settings, node, clock) for _ in range(2)]

        def work(service: Deliver) -> None:
            while service.step(clock.now):
                pass

        threads = [threading.Thread(target=work, args=(s,)) for s in services]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(pacs.uids) == len(set(pacs.uids)) == 50
    assert {d.state for d in every(node)} == {DeliveryState.DONE}


def write_config(path: Path, url: str, pacs_port: int, spool: Path) -> Path:
    path.write_text(
        f"""
[node]
peers = [{{ ae_title = "PACS", host = "127.0.0.1", port = {pacs_port} }}]
[spool]
path = "{spool}"
[database]
url = "{url}"
[deliver]
registration = ["PACS"]
settle_seconds = 0
commitment = false
"""
    )
    return path


def run_exchange(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dicomnode", "serve", "--only", "exchange"]
    return subprocess.Popen([*command, "--config", str(config)], cwd=Path(__file__).parents[2])


@on_sqlite
def test_a_kill_between_sending_and_noting_sends_the_same_again(
    node, database_url, tmp_path, clock
):
    killed: list[int] = []
    process: subprocess.Popen[bytes] | None = None
    with archive(*OURS) as pacs:

        def kill(event: Any) -> int:
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.wait())
            return 0x0000

        pacs.answers = [kill]
        config = write_config(tmp_path / "node.toml", database_url, pacs.port, tmp_path / "spool")
        arrive(node, settings_for(pacs.port, tmp_path, report=[]), clock.now, MOVING, FIXED)
        with store.writing(node) as session:  # its time is that of the machine
            session.execute(update(schema.Delivery).values(due_at=clock.now))
        process = run_exchange(config)
        eventually(lambda: killed)
        found = deliveries(node)[DeliveryKind.REGISTRATION]
        assert (found.state, found.attempts) == (DeliveryState.WAITING, 1)
        assert found.sop_instance_uid is None and len(pacs.stored) == 1
        assert timedelta(0) < found.due_at - datetime.now(UTC) <= LEASE
        with store.writing(node) as session:  # ten minutes later
            session.execute(update(schema.Delivery).values(due_at=datetime.now(UTC)))
        process = run_exchange(config)
        try:
            eventually(
                lambda: deliveries(node)[DeliveryKind.REGISTRATION].state is DeliveryState.DONE
            )
        finally:
            process.terminate()
            assert process.wait(20) == 0
    first, second = pacs.stored
    assert first == second
    assert deliveries(node)[DeliveryKind.REGISTRATION].sop_instance_uid == first[0]


# Other implementations


@on_sqlite
def test_dcmtk_takes_it(node, tmp_path, clock):
    program = Path("/usr/bin/storescp")
    if not program.exists():
        pytest.skip("no storescp of DCMTK")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    folder = tmp_path / "stored"
    folder.mkdir()
    peer = subprocess.Popen([program, "-aet", "PACS", "-od", folder, "+xe", str(port)])
    try:

        def listens() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        eventually(listens)
        settings = settings_for(port, tmp_path)
        arrive(node, settings, clock.now, MOVING, FIXED)
        to_peer(settings, node, clock).step(clock.pass_(seconds=SETTLE_S))
    finally:
        peer.terminate()
        peer.wait(10)
    assert {d.state for d in every(node)} == {DeliveryState.DONE}
    stored = [dcmread(path) for path in folder.iterdir()]
    assert {ds.SOPInstanceUID for ds in stored} == {d.sop_instance_uid for d in every(node)}
    assert {ds.SOPClassUID for ds in stored} == set(OURS)


@on_sqlite
def test_a_peer_of_the_default_transfer_syntax_alone_gets_it_in_that(node, tmp_path, clock):
    with Archive(contexts=[(uid, [ImplicitVRLittleEndian]) for uid in OURS]) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        arrive(node, settings, clock.now, MOVING, FIXED)
        to_peer(settings, node, clock).step(clock.pass_(seconds=SETTLE_S))
    assert {syntax for _, syntax, _ in pacs.stored} == {ImplicitVRLittleEndian}
    assert sop_uid(FIXED, 0).encode() in b"".join(data for _, _, data in pacs.stored)
