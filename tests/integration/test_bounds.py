"""Who is let in, and what a stranger or a peer gone wrong can hold: over real sockets."""

import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom import AE, AllStoragePresentationContexts, Association
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.sop_class import Verification

from dicomnode.config import Settings
from dicomnode.node import receive
from dicomnode.node.receive import Receiver
from dicomnode.scp import access, listener
from dicomnode.scp.contexts import TRANSFER_SYNTAXES
from dicomnode.spool import Spool
from tests.dicom import ct_dataset
from tests.integration.test_receive import (
    CT,
    assert_serves,
    associate,
    ends,
    eventually,
    make_settings,
    store,
)

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

HERE = {"host": "192.0.2.1", "port": 104}  # an address that nobody has


@pytest.fixture(autouse=True)
def _stop_at_once(monkeypatch) -> Iterator[None]:
    """Associations that a test leaves open need no time to finish."""
    monkeypatch.setattr(receive, "STOP_GRACE_S", 0.1)
    yield
    gc.collect()  # pynetdicom's sockets, within the test that passes over the warning


@contextmanager
def running(settings: Settings) -> Iterator[Receiver]:
    receiver = Receiver(settings)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


def peer(ae_title: str, **more: Any) -> dict[str, Any]:
    return {"ae_title": ae_title, **HERE, **more}


def call(port: int, ae_title: str, address: str = "127.0.0.1") -> Association:
    ae = AE(ae_title)
    ae.acse_timeout = ae.network_timeout = ae.connection_timeout = 10
    ae.add_requested_context(Verification, ImplicitVRLittleEndian)
    return ae.associate("127.0.0.1", port, ae_title="DICOMNODE", bind_address=(address, 0))


def refusal(assoc: Association) -> tuple[int, int, int] | None:
    """Result, source and reason of the A-ASSOCIATE-RJ; None where there was none."""
    answer = assoc.acceptor.primitive
    if not assoc.is_rejected or not isinstance(answer, A_ASSOCIATE):
        return None
    return answer.result, answer.result_source, answer.diagnostic


def codes(rejection: access.Rejection) -> tuple[int, int, int]:
    return rejection.result, rejection.source, rejection.reason


def audited(settings: Settings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in settings.audit_log.read_text().splitlines()]


def warnings(caplog) -> list[tuple[str, str]]:
    return [
        (r.message, vars(r).get("reason", ""))
        for r in caplog.records
        if r.name.startswith("dicomnode") and r.levelname == "WARNING"
    ]


# Addresses


def test_a_peer_calls_from_its_own_address_only(tmp_path, caplog):
    peers = [peer("A", addresses=["127.0.0.1"]), peer("B", addresses=["127.0.0.2"])]
    settings = make_settings(tmp_path, peers=peers)
    with running(settings) as receiver:
        assoc = call(receiver.port, "A", "127.0.0.1")
        assert assoc.is_established
        assoc.release()
        assert refusal(call(receiver.port, "A", "127.0.0.2")) == codes(access.OTHER_ADDRESS)
        assert refusal(call(receiver.port, "C", "127.0.0.2")) == codes(access.CALLING_AE_TITLE)
    assert warnings(caplog) == [
        ("association rejected", "not an address of this peer"),
        ("association rejected", "calling AE title not recognized"),
    ]
    lines = [line for line in audited(settings) if line["event"] == "association rejected"]
    assert [(x["calling_ae_title"], x["address"], x["reason"], x["code"]) for x in lines] == [
        ("A", "127.0.0.2", "not an address of this peer", "110113"),
        ("C", "127.0.0.2", "calling AE title not recognized", "110113"),
    ]


def test_an_address_of_no_peer_is_not_listened_to(tmp_path, caplog):
    settings = make_settings(tmp_path, peers=[peer("A", addresses=["127.0.0.1"])])
    with running(settings) as receiver:
        for _ in range(20):
            source = ("127.0.0.3", 0)
            with socket.create_connection(
                ("127.0.0.1", receiver.port), timeout=10, source_address=source
            ) as connection:
                assert connection.recv(1) == b""
        assert threading.active_count() < 20
        assert call(receiver.port, "A").is_established
    # One line for the twenty: a load balancer looks every few seconds whether we live.
    assert warnings(caplog) == [("connection refused", "address of no peer")]
    (line,) = [line for line in audited(settings) if line["event"] == "connection refused"]
    assert (line["address"], line["times"], line["outcome"]) == ("127.0.0.3", 1, 4)


def test_a_health_check_from_the_address_of_a_peer_leaves_no_line(tmp_path, caplog):
    caplog.set_level("INFO")
    settings = make_settings(tmp_path)
    with running(settings) as receiver:
        before = len(caplog.records)
        for _ in range(10):
            socket.create_connection(("127.0.0.1", receiver.port)).close()
        assert eventually(lambda: receiver.connections == 0)
        assert caplog.records[before:] == []
        assert [line["event"] for line in audited(settings)] == ["started"]


def test_any_address_must_be_said(tmp_path):
    peers = [peer("ANY", addresses=["*"]), peer("ONE", addresses=["127.0.0.1"])]
    with running(make_settings(tmp_path, peers=peers)) as receiver:
        assert call(receiver.port, "ANY", "127.0.0.9").is_established
        assert refusal(call(receiver.port, "ONE", "127.0.0.9")) == codes(access.OTHER_ADDRESS)


def test_an_error_of_ours_lets_nobody_in(tmp_path, monkeypatch, caplog):
    with running(make_settings(tmp_path)) as receiver:
        monkeypatch.setattr(receiver._directory, "peer", lambda ae_title: 1 / 0)
        assert refusal(associate(receiver.port)) == codes(access.NOT_JUDGED)
    assert "association not judged" in caplog.text


# Associations


def test_a_peer_leaves_room_for_others(tmp_path):
    peers = [
        {"ae_title": "A", "host": "127.0.0.1", "port": 1},
        {"ae_title": "B", "host": "127.0.0.1", "port": 1, "maximum_associations": 1},
    ]
    settings = make_settings(
        tmp_path, peers=peers, maximum_associations=3, maximum_associations_per_peer=2
    )
    with running(settings) as receiver:
        held = [call(receiver.port, "A"), call(receiver.port, "A")]
        assert all(assoc.is_established for assoc in held)
        assert refusal(call(receiver.port, "A")) == codes(access.TOO_MANY_OF_PEER) == (2, 3, 2)
        held.append(call(receiver.port, "B"))
        assert held[-1].is_established
        assert refusal(call(receiver.port, "B")) == (2, 3, 2)
        held.pop(0).release()
        assert eventually(lambda: call(receiver.port, "A").is_established)


def test_a_requestor_that_was_rejected_does_not_stay(tmp_path):
    here = {"host": "127.0.0.1", "port": 104}
    settings = make_settings(
        tmp_path,
        peers=[{"ae_title": "PACS", **here}, {"ae_title": "B", **here}],
        maximum_associations=1,
        maximum_associations_per_peer=2,
    )
    with running(settings) as receiver, ExitStack() as stack:
        held = call(receiver.port, "B")
        assert held.is_established
        request = a_request()
        for _ in range(3):  # requestors that do not close after the A-ASSOCIATE-RJ
            connection = socket.create_connection(("127.0.0.1", receiver.port), timeout=10)
            stack.enter_context(connection).sendall(request)
            assert connection.recv(100)[:1] == b"\x03"
            assert connection.recv(1) == b""
        assert eventually(lambda: receiver.connections == 1)
        held.release()
        # Nor does what it held of its peer's share.
        assert eventually(lambda: associate(receiver.port).is_established)


def a_request() -> bytes:
    """An A-ASSOCIATE-RQ of PACS for Verification."""
    ae = AE("PACS")
    ae.add_requested_context(Verification, ImplicitVRLittleEndian)
    sent: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                sent.append(connection.recv(1 << 16))

        thread = threading.Thread(target=answer)
        thread.start()
        ae.associate("127.0.0.1", server.getsockname()[1], ae_title="DICOMNODE")
        thread.join(10)
    return sent[0]


def test_two_receivers_count_together(tmp_path):
    settings = make_settings(tmp_path, maximum_associations=2)
    with running(settings) as one, running(settings) as two:
        assert one.port != two.port  # port 0 gave each its own
        first, second = associate(one.port), associate(two.port)
        assert first.is_established and second.is_established
        assert refusal(associate(one.port)) == refusal(associate(two.port)) == (2, 3, 2)
        first.release()
        assert eventually(lambda: associate(two.port).is_established)


def test_a_disk_short_of_space_accepts_no_association(tmp_path, monkeypatch):
    settings = make_settings(tmp_path)
    monkeypatch.setattr(receive, "WATERMARK_S", 0.0)
    with running(settings) as receiver:
        running_one = associate(receiver.port, CT)
        free = receiver._spool.free_bytes()
        spool = settings.spool.model_copy(update={"refuse_below_bytes": free + (1 << 40)})
        receiver._settings = settings.model_copy(update={"spool": spool})
        assert refusal(associate(receiver.port)) == codes(access.DISK_SHORT) == (2, 3, 2)
        # What runs may finish.
        assert running_one.send_c_store(ct_dataset()).Status == 0x0000
        receiver._settings = settings
        assert associate(receiver.port).is_established


def test_free_space_is_looked_at_once_a_second_at_most(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(Spool, "free_bytes", lambda self: looks.append(1) or 1 << 50)
    receiver = Receiver(make_settings(tmp_path))
    assert not any(receiver._is_short() for _ in range(1000))
    assert len(looks) <= 2


@pytest.mark.parametrize(
    ("spool", "below"),
    [
        ({}, 2 << 30),
        ({"reserve_bytes": 10}, 20),
        ({"refuse_below_bytes": 5}, 5),
        ({"refuse_below_bytes": 0}, 0),
    ],
)
def test_the_watermark_is_twice_the_reserve(spool, below):
    assert Settings(spool=spool).refuse_below_bytes == below


# Connections that become none


def threads() -> int:
    return threading.active_count()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def leakless(tmp_path) -> Iterator[Receiver]:
    """A receiver that afterwards has the threads and descriptors that it had before."""
    settings = make_settings(tmp_path, maximum_connecting=1024)
    with running(settings) as receiver:
        assert_serves(receiver.port)
        assert eventually(lambda: receiver.connections == 0)
        gc.collect()
        before = threads(), descriptors()
        yield receiver
        assert eventually(lambda: receiver.connections == 0), receiver.connections

        def after() -> bool:
            gc.collect()
            return threads() <= before[0] and descriptors() <= before[1]

        assert eventually(after), (before, threads(), descriptors())
        assert receiver._visits == {}
        assert_serves(receiver.port)


def test_300_connections_that_close_leave_nothing(leakless):
    for _ in range(300):
        socket.create_connection(("127.0.0.1", leakless.port)).close()


def test_300_connections_that_break_off_leave_nothing(leakless):
    for i in range(300):
        with socket.create_connection(("127.0.0.1", leakless.port)) as connection:
            connection.sendall((b"\x01", b"\x01\x00\x00\x00\x01\x00" + bytes(20), b"GET /")[i % 3])


def test_300_associations_that_are_aborted_leave_nothing(leakless):
    for _ in range(300):
        assoc = associate(leakless.port)
        assert assoc.is_established
        assoc.dul.socket.socket.sendall(b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00")
        assoc.dul.socket.close()
    assert eventually(lambda: leakless.connections == 0)


def test_500_silent_connections_hold_up_nobody(tmp_path):
    settings = make_settings(tmp_path, maximum_connecting=40, handshake_seconds=60)
    with running(settings) as receiver, ExitStack() as stack:
        before = threads()
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", receiver.port), 10))
            for _ in range(500)
        ]
        assert eventually(lambda: receiver.connections == 40)
        started = time.monotonic()
        assert_serves(receiver.port)
        assert time.monotonic() - started < 5.0
        # Each costs one thread, and the oldest were closed.
        assert eventually(lambda: threads() - before <= 41), threads() - before
        assert silent[0].recv(1) == b""
        silent[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            silent[-1].recv(1)


def test_a_silent_connection_sleeps(tmp_path):
    """pynetdicom's threads look a thousand times a second; these must not, or forty cost a core."""
    with running(make_settings(tmp_path)) as receiver, ExitStack() as stack:
        for _ in range(40):
            connection = socket.create_connection(("127.0.0.1", receiver.port))
            stack.enter_context(connection).sendall(b"\x01\x00\x00\x00")
        assert eventually(lambda: receiver.connections == 40)
        before, cpu = time.monotonic(), time.process_time()
        threading.Event().wait(1.0)
        share = (time.process_time() - cpu) / (time.monotonic() - before)
        assert share < 0.2, share


@pytest.mark.parametrize(
    "trickle",
    [b"\x01", b"\x01\x00\x00\x00\x10\x00" + bytes(10), b"\x01\x00\x00\x01\x00\x00" + bytes(10)],
    ids=["header", "request", "long_request"],
)
def test_a_request_that_trickles_in_has_only_so_long(tmp_path, trickle):
    """Each byte comes in time for a time-out of its own; together they must not last for ever."""
    with running(make_settings(tmp_path, handshake_seconds=1.0)) as receiver:
        with socket.create_connection(("127.0.0.1", receiver.port), timeout=0.1) as connection:
            started = time.monotonic()
            connection.sendall(trickle)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                while time.monotonic() - started < 8.0:
                    connection.sendall(b"\x00")
                    try:
                        if connection.recv(1) == b"":
                            raise BrokenPipeError
                    except TimeoutError:
                        continue
            assert time.monotonic() - started < 6.0
        assert eventually(lambda: receiver.connections == 0)


@pytest.mark.parametrize("syntaxes", [1, 8, 16])
def test_a_long_request_is_served(tmp_path, syntaxes):
    """Of 128 presentation contexts: 9 to 60 kB, beyond what is waited for."""
    with running(make_settings(tmp_path)) as receiver:
        ae = AE("PACS")
        for context in AllStoragePresentationContexts[:128]:
            ae.add_requested_context(context.abstract_syntax, list(TRANSFER_SYNTAXES[:syntaxes]))
        assoc = ae.associate("127.0.0.1", receiver.port, ae_title="DICOMNODE")
        assert len(assoc.accepted_contexts) == 128
        assoc.release()


def test_a_request_of_400_mib_is_not_read(tmp_path):
    with running(make_settings(tmp_path)) as receiver:
        with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection:
            connection.sendall(b"\x01\x00" + (400 << 20).to_bytes(4))
            sent = 0
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                while sent < 64 << 20:
                    sent += connection.send(bytes(1 << 16))
        assert sent < 16 << 20  # what the two ends of TCP hold, and a little
        assert eventually(lambda: receiver.connections == 0)
        assert_serves(receiver.port)


def test_strangers_of_many_addresses_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(listener, "MAXIMUM_CONNECTING", 20)
    peers = [peer("ANY", addresses=["*"])]
    settings = make_settings(tmp_path, peers=peers, maximum_connecting=5)
    with running(settings) as receiver, ExitStack() as stack:
        for i in range(100):
            source = (f"127.0.1.{i % 50 + 1}", 0)
            to = ("127.0.0.1", receiver.port)
            stack.enter_context(socket.create_connection(to, 10, source_address=source))
        assert eventually(lambda: receiver.connections == 20)
        assert call(receiver.port, "ANY").is_established


FEW_HANDLES = """
import json, resource, sys, threading
from dicomnode.config import Settings
from dicomnode.node.receive import Receiver
import logging; logging.basicConfig()
receiver = Receiver(Settings(**json.loads(sys.argv[1])))
receiver.start()
soft = len(__import__("os").listdir("/proc/self/fd")) + 12
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
print(receiver.port, flush=True)
sys.stdin.read()
receiver.stop()
"""


def test_without_file_handles_connections_wait_and_nothing_spins(tmp_path):
    settings = make_settings(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", FEW_HANDLES, settings.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    port = int(process.stdout.readline())
    before = sum(psutil.Process(process.pid).cpu_times()[:2])
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        threading.Event().wait(1.0)
        assert sum(psutil.Process(process.pid).cpu_times()[:2]) - before < 0.5
    assert eventually(lambda: associate(port).is_established)
    process.stdin.close()
    told = process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(20) == 0
    assert told.count("connection refused") == 1 and "Traceback" not in told


def test_ipv6_is_an_address_like_another(tmp_path):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    peers = [peer("A", addresses=["::1"]), peer("B", addresses=["2001:db8::/32"])]
    with running(make_settings(tmp_path, host="::1", peers=peers)) as receiver:
        for ae_title, answer in (("A", None), ("B", codes(access.OTHER_ADDRESS))):
            ae = AE(ae_title)
            ae.add_requested_context(Verification, ImplicitVRLittleEndian)
            assoc = ae.associate("::1", receiver.port, ae_title="DICOMNODE")
            assert refusal(assoc) == answer
            assert assoc.is_established is (answer is None)


# Several receivers on one spool


def started(spool: Spool) -> list[str]:
    return [e.association_id for e in spool.pending(1000) if getattr(e, "kind", "") == "started"]


def test_each_receiver_ends_its_own_associations_only(tmp_path):
    settings = make_settings(tmp_path)
    spool = Spool(settings.spool.path)
    with running(settings) as one:
        assert started(spool) == ["0" * 16]
        with running(settings) as two:
            assert started(spool)[1:] == ["00000001" + "0" * 8]
            store(one.port, ct_dataset())
            store(two.port, ct_dataset())
            assert eventually(lambda: len(ends(spool)) == 2)
            assert [i[:8] for i, _ in ends(spool)] == ["00000000", "00000001"]
        with running(settings):  # in its place
            assert started(spool)[2:] == ["00000001" + "0" * 8]


def test_a_receiver_ends_the_associations_of_those_that_are_gone(tmp_path):
    settings = make_settings(tmp_path)
    spool = Spool(settings.spool.path)
    with running(settings), running(settings):
        pass
    with running(settings):
        assert started(spool)[2:] == ["0" * 16, "00000001" + "0" * 8]
    with running(settings):  # and only once
        assert started(spool)[4:] == ["0" * 16]


# Audit


def test_an_association_is_audited_from_end_to_end(tmp_path):
    settings = make_settings(tmp_path)
    with running(settings) as receiver:
        ds = ct_dataset()
        assert store(receiver.port, ds) == 0x0000
        assert eventually(lambda: receiver.connections == 0)
        associate(receiver.port).abort()
        assert eventually(lambda: receiver.connections == 0)
    lines = audited(settings)
    assert [(line["event"], line["code"]) for line in lines] == [
        ("started", "110100"),
        ("association opened", "110102"),
        ("association ended", "110104"),
        ("association opened", "110102"),
        ("association ended", "110104"),
        ("stopped", "110100"),
    ]
    opened, ended = lines[1:3]
    for line in (opened, ended):
        assert line["calling_ae_title"] == "PACS"
        assert line["called_ae_title"] == "DICOMNODE"
        assert line["address"] == "127.0.0.1"
    assert opened["association_id"] == ended["association_id"]
    assert (ended["kind"], ended["instances"], ended["outcome"]) == ("released", 1, 0)
    assert ended["bytes"] > len(ds.PixelData)
    assert (lines[4]["kind"], lines[4]["instances"], lines[4]["outcome"]) == ("aborted", 0, 4)


def test_a_full_disk_of_the_audit_log_stops_nothing(tmp_path, caplog):
    settings = make_settings(tmp_path, audit_log=str(tmp_path / "none" / "audit.jsonl"))
    with running(settings) as receiver:
        assert_serves(receiver.port)
    assert caplog.text.count("audit not written") == 1


def test_the_audit_log_lies_beside_the_spool(tmp_path):
    assert make_settings(tmp_path).audit_log == tmp_path / "audit.jsonl"
    elsewhere = make_settings(tmp_path, audit_log="/var/log/dicomnode.jsonl")
    assert elsewhere.audit_log == Path("/var/log/dicomnode.jsonl")
