"""The HL7 listener over real sockets, with a database behind it: python-hl7 is the sender."""

import json
import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hl7
import pytest
import trustme
from hl7.client import MLLPClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from dicomnode import config, store
from dicomnode.config import Settings
from dicomnode.errors import StoreUnavailable, TransientError
from dicomnode.hl7 import mllp
from dicomnode.model import PatientKey
from dicomnode.node import exchange
from dicomnode.node import hl7 as service
from dicomnode.node.hl7 import HL7Listener
from tests.integration.test_store import EARLIER, LATER, add_curve, node, pairs
from tests.unit.test_hl7 import PIECES

__all__ = ["node"]

# What is the same whatever the database.
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

A, B = PatientKey("4711", "HOSPITAL"), PatientKey("0815", "HOSPITAL")
VT, FS, CR = mllp.VT, mllp.FS, mllp.CR


def a40(
    merged: str = "4711", into: str = "0815", control_id: str = "M1", event: str = "A40"
) -> str:
    return (
        f"MSH|^~\\&|ADT|KIS|NODE|RAD|20260501123000||ADT^{event}^ADT_A39|{control_id}|P|2.5.1\r"
        f"EVN|{event}|20260501\rPID|||{into}^^^ADT1||DOE^JANE\rMRG|{merged}^^^ADT1\r"
    )


def made(tmp_path: Path, tls_files: tuple[str, str] | None = None, **values: Any) -> Settings:
    tls = {"certificate": tls_files[0], "client_ca": tls_files[1]} if tls_files else {}
    return Settings(
        spool=config.SpoolSettings(path=tmp_path / "spool"),
        tls=tls,
        hl7=config.HL7Settings(port=0, issuers={"ADT1": "HOSPITAL"}, **values),
    )


@contextmanager
def listening(own: Settings, engine: Engine) -> Iterator[HL7Listener]:
    """Run the listener as the exchange does."""
    listener, stop = HL7Listener(own, engine), threading.Event()
    listener.server.listen()
    thread = threading.Thread(target=exchange.keep_on, args=(listener, stop))
    thread.start()
    try:
        yield listener
    finally:
        stop.set()
        thread.join()
        listener.close()


@pytest.fixture(autouse=True)
def _stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mllp, "POLL_S", 0.05)


@pytest.fixture
def listener(node: Engine, tmp_path: Path) -> Iterator[HL7Listener]:
    with listening(made(tmp_path), node) as found:
        yield found


def send(listener: HL7Listener, *texts: str) -> list[str]:
    """Send messages over one connection, and return MSA-1 of each answer."""
    with MLLPClient("127.0.0.1", listener.server.port) as client:
        return [code_of(client.send_message(text)) for text in texts]


def code_of(answer: bytes) -> str:
    return str(hl7.parse(answer.strip(VT + FS + CR).decode())["MSA"][0][1])


def links(engine: Engine) -> list[tuple[PatientKey, PatientKey]]:
    with store.reading(engine) as session:
        return [(link.merged, link.into) for link in store.list_links(session)]


def audited(settings_path: Path) -> list[dict[str, Any]]:
    path = settings_path / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_merge_links_both_and_asks_for_their_pairs(node, listener, tmp_path):
    add_curve(node, "1.3.1", patient=A, study_datetime=EARLIER)
    add_curve(node, "1.3.2", patient=B, study_datetime=LATER)
    assert send(listener, a40()) == ["AA"]
    assert links(node) == [(A, B)]
    assert pairs(node) == {("1.3.2", "1.3.1")}
    (line,) = audited(tmp_path)
    assert (line["event"], line["pairs"], line["address"]) == ("patients linked", 1, "127.0.0.1")
    assert not {"4711", "0815", "DOE"} & set(json.dumps(line).replace('"', " ").split())


def test_a_message_sent_again_does_nothing_twice(node, listener):
    assert send(listener, a40(), a40()) == ["AA", "AA"]
    (link,) = listed(node)
    with store.writing(node) as session:
        store.unlink_patients(session, link.id, link.linked_at)
    assert send(listener, a40()) == ["AA"]
    assert links(node) == []
    # Another message that says the same does it.
    assert send(listener, a40(control_id="M2")) == ["AA"]
    assert links(node) == [(A, B)]
    # So does another one with a number that its sender used before.
    assert send(listener, a40("4712", control_id="M1")) == ["AA"]
    assert len(links(node)) == 2


def listed(engine: Engine) -> list[store.Link]:
    with store.reading(engine) as session:
        return store.list_links(session)


def test_a_link_is_taken_back_by_a_message(node, listener, tmp_path):
    two = "\r".join(a40(event="A24").split("\r")[:2]) + "\rPID|||0815^^^ADT1\rPID|||4711^^^ADT1\r"
    assert send(listener, two) == ["AA"]
    assert links(node) == [(A, B)]
    back = two.replace("A24", "A37").replace("|M1|", "|M2|")
    assert send(listener, back) == ["AA"]
    assert links(node) == []
    assert [line["event"] for line in audited(tmp_path)] == ["patients linked", "patients unlinked"]


def test_a_merge_that_comes_before_any_image_is_remembered(node, listener):
    assert send(listener, a40()) == ["AA"]
    add_curve(node, "1.3.1", patient=A, study_datetime=EARLIER)
    assert add_curve(node, "1.3.2", patient=B, study_datetime=LATER) == 1
    assert pairs(node) == {("1.3.2", "1.3.1")}


@on_sqlite
def test_what_does_not_concern_us_is_accepted_and_counted(node, listener):
    events = ["A08", "A01", "A47"]
    assert send(listener, *(a40(event=event) for event in events)) == ["AA"] * 3
    assert listener.counts == {"ignored": 3}
    assert links(node) == []


@on_sqlite
def test_what_cannot_be_understood_is_rejected(node, listener, tmp_path):
    training = a40(control_id="M3").replace("|P|2.5.1", "|T|2.5.1")
    wrong = [a40(into=""), "PID|||1", training, a40("UNKNOWN"), a40() + a40(control_id="M2")]
    assert send(listener, *wrong) == ["AR"] * 5
    assert listener.counts == {"refused": 5}
    assert links(node) == []
    assert [line["reason"] for line in audited(tmp_path)] == [
        "PID-3 names no patient",
        "no MSH segment",
        "processing ID (MSH-11) is not taken",
        "MRG-1 names a placeholder, and no patient",
        "several messages in one block",
    ]
    assert send(listener, a40()) == ["AA"]  # it goes on


@on_sqlite
def test_an_acknowledgment_is_not_acknowledged(node, listener):
    ack = "MSH|^~\\&|ADT|KIS|NODE|RAD|20260501||ACK^A40^ACK|M1|P|2.5.1\rMSA|AA|1\r"
    with socket.create_connection(("127.0.0.1", listener.server.port), 5) as connection:
        for text in (ack, a40()):
            connection.sendall(VT + text.encode() + FS + CR)
        assert code_of(receive(connection)) == "AA"
    assert listener.counts == {"ignored": 1, "taken": 1}


def test_an_error_is_answered_while_the_database_is_away(node, listener, monkeypatch, caplog):
    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("database: connection refused")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(store, "take_message", away)
        assert send(listener, a40()) == ["AE"]
        patched.setattr(store, "take_message", lambda *_: 1 / 0)
        assert send(listener, a40()) == ["AE"]
    assert links(node) == []
    assert send(listener, a40()) == ["AA"]  # the same message, when its sender tries again
    assert links(node) == [(A, B)]
    assert {r.message for r in caplog.records} >= {"HL7 message not stored", "HL7 message failed"}


@on_sqlite
def test_nothing_is_acknowledged_that_was_not_committed(node, listener, monkeypatch):
    """The process dies between the two: what the sender was not told, it sends again."""
    seen: list[list[Any]] = []
    plain = service.messages.answer

    def answer(*args: Any) -> bytes:
        seen.append(links(node))  # by a transaction of its own
        return plain(*args)

    monkeypatch.setattr(service.messages, "answer", answer)
    assert send(listener, a40()) == ["AA"]
    assert seen == [[(A, B)]]


def receive(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(FS + CR):
        more = connection.recv(4096)
        if not more:
            return data
        data += more
    return data


@on_sqlite
def test_messages_come_in_pieces_and_several_at_once(node, listener):
    with socket.create_connection(("127.0.0.1", listener.server.port), 5) as connection:
        whole = VT + a40().encode() + FS + CR
        for k in range(0, len(whole), 7):
            connection.sendall(whole[k : k + 7])
        assert code_of(receive(connection)) == "AA"
        more = [VT + a40(f"P{k}", control_id=f"N{k}").encode() + FS + CR for k in range(20)]
        connection.sendall(b"".join(more))
        answers = b""
        while answers.count(FS) < 20:
            answers += connection.recv(4096)
    assert answers.count(b"MSA|AA|N") == 20
    assert len(links(node)) == 21


@on_sqlite
def test_too_long_a_message_is_refused_and_the_connection_ends(node, listener):
    with socket.create_connection(("127.0.0.1", listener.server.port), 5) as connection:
        with pytest.raises(OSError):  # it may end while we still send
            connection.sendall(VT + a40().encode() + b"Z" * mllp.MAX_BYTES + b"Z" * 100_000)
            answer = receive(connection)
            assert answer == b"" or code_of(answer) == "AR"
            raise OSError("over")
    assert links(node) == []
    assert send(listener, a40()) == ["AA"]


@on_sqlite
@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"])
def test_what_is_no_mllp_is_closed(node, listener, tmp_path, data):
    with socket.create_connection(("127.0.0.1", listener.server.port), 5) as connection:
        connection.sendall(data)
        assert receive(connection) == b""
    assert [line["reason"] for line in audited(tmp_path)] == ["not MLLP"]


@on_sqlite
def test_a_stranger_is_closed_unheard(node, tmp_path):
    with listening(made(tmp_path, senders=["10.9.8.0/24"]), node) as listener:
        with socket.create_connection(("127.0.0.1", listener.server.port), 5) as connection:
            try:
                connection.sendall(VT + a40().encode() + FS + CR)
                assert receive(connection) == b""
            except OSError:
                pass  # closed before it could be sent
    assert links(node) == []
    assert [line["reason"] for line in audited(tmp_path)] == ["address of no sender"]


@on_sqlite
def test_senders_are_admitted_by_address(node, tmp_path):
    for senders in (["127.0.0.0/8"], ["*"]):
        with listening(made(tmp_path, senders=senders), node) as listener:
            assert send(listener, a40()) == ["AA"]


@on_sqlite
def test_a_silent_connection_is_closed(node, tmp_path):
    with listening(made(tmp_path, idle_seconds=0.2), node) as listener:
        with socket.create_connection(("127.0.0.1", listener.server.port), 5) as connection:
            assert receive(connection) == b""


@on_sqlite
def test_a_message_that_does_not_end_is_closed(node, listener, monkeypatch):
    monkeypatch.setattr(mllp, "MESSAGE_S", 0.2)
    with socket.create_connection(("127.0.0.1", listener.server.port), 5) as connection:
        connection.sendall(VT + b"MSH")
        assert receive(connection) == b""


@on_sqlite
def test_of_too_many_connections_the_one_silent_longest_goes(node, listener, monkeypatch):
    monkeypatch.setattr(mllp, "MAX_CONNECTIONS", 3)
    opened = []
    for k in range(4):
        opened.append(socket.create_connection(("127.0.0.1", listener.server.port), 5))
        if k < 3:
            opened[-1].sendall(VT + a40(control_id=f"K{k}").encode() + FS + CR)
            assert code_of(receive(opened[-1])) == "AA"
    try:
        assert receive(opened[0]) == b""
        for connection in opened[1:]:
            connection.sendall(VT + a40(control_id="L").encode() + FS + CR)
            assert code_of(receive(connection)) == "AA"
    finally:
        for connection in opened:
            connection.close()


def test_many_senders_at_once_are_each_answered(node, listener):
    codes: list[str] = []

    def one(n: int) -> None:
        codes.extend(send(listener, *(a40(f"P{n}", f"P{k}", f"{n}-{k}") for k in range(100, 104))))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == ["AA"] * 32
    assert len(links(node)) == 32


@on_sqlite
def test_a_port_that_is_taken_is_waited_for(node, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        own, port = made(tmp_path), taken.getsockname()[1]
        section = own.hl7.model_copy(update={"port": port})
        listener = HL7Listener(own.model_copy(update={"hl7": section}), node)
        with pytest.raises(TransientError, match=f"cannot listen on 127.0.0.1:{port}"):
            listener.server.listen()


@on_sqlite
def test_a_sender_shows_its_certificate_where_tls_is_on(node, tmp_path):
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    with (
        authority.cert_pem.tempfile() as ca,
        issued.private_key_and_cert_chain_pem.tempfile() as pem,
    ):
        own = made(tmp_path, tls=True, tls_files=(pem, ca))
        with listening(own, node) as listener:
            context = ssl.create_default_context(cafile=ca)
            where = "127.0.0.1", listener.server.port
            with socket.create_connection(where, 5) as plain, pytest.raises(OSError):
                with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                    assert receive(connection) != b""  # TLS 1.3: our certificate is asked for late
                    raise OSError
            context.load_cert_chain(pem)
            with socket.create_connection(where, 5) as plain:
                with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                    for k in range(3):
                        text = a40(f"P{k}", control_id=f"{k}")
                        connection.sendall(VT + text.encode() + FS + CR)
                        assert code_of(receive(connection)) == "AA"
    assert len(links(node)) == 3
    assert audited(tmp_path)[0]["reason"] == "TLS handshake failed"


@on_sqlite
@given(
    data=st.sampled_from([a40().encode(), b""]), rest=st.lists(PIECES, max_size=12), at=st.data()
)
@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_comes_is_answered_once(node, listener, data, rest, at):
    place = at.draw(st.integers(0, len(data)))
    text = data[:place] + b"".join(rest) + data[place:]
    answer = listener._answer(text, "127.0.0.1", True)
    if answer is not None:
        assert answer.count(b"\rMSA") == 1
    else:
        assert b"ACK" in text
    # Whatever it was, it was for the message: the database or a bug would be an error of ours.
    assert answer is None or b"MSA|AE" not in answer


@on_sqlite
def test_the_exchange_runs_where_a_port_is_set(node, tmp_path):
    own = made(tmp_path)
    assert own.exchanges and not Settings().exchanges
    found = exchange.services_of(own, node)
    assert [s.name for s in found] == ["hl7"]
