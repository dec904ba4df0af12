"""What the node sends to peers: kind ones, and such as refuse, hang, lie and break off."""

import socket
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from pynetdicom import evt

from dicomnode.config import Peer, Settings
from dicomnode.errors import DicomError, PeerUnavailable
from dicomnode.outgoing import Outgoing
from dicomnode.scp import tls
from dicomnode.scu import association
from dicomnode.scu.association import associated, echo
from dicomnode.scu.storage import Stored, data_set_of, storage_contexts, store
from tests.deliveries import hurry
from tests.dicom import compress, ct_dataset, part10
from tests.integration.test_tls import Papers, make_settings
from tests.peers import Archive, accept, archive, listening, read_pdu

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")

SETTINGS = Settings()
OVER = threading.Event()  # the test


@pytest.fixture(autouse=True)
def _soon(monkeypatch) -> Iterator[None]:
    hurry(monkeypatch)
    OVER.clear()
    before = threading.enumerate()
    yield
    OVER.set()

    def left() -> list[threading.Thread]:
        # The peer of a test is not ours to look after.
        threads = [t for t in threading.enumerate() if t not in before]
        return [t for t in threads if not t.name.startswith("AcceptorThread")]

    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left()


def outgoing(ds: Dataset) -> Outgoing:
    data = part10(ds)
    syntax = ds.file_meta.TransferSyntaxUID
    return Outgoing(str(ds.SOPClassUID), str(ds.SOPInstanceUID), str(syntax), lambda: data)


def peer_at(port: int, **more: Any) -> Peer:
    return Peer(ae_title="PACS", host="127.0.0.1", port=port, **more)


def test_objects_arrive_byte_for_byte_on_one_association():
    objects = [outgoing(ct_dataset()) for _ in range(5)]
    with archive(CTImageStorage) as pacs:
        answers = store(SETTINGS, pacs.peer, objects)
    assert [a.ok for a in answers] == [True] * 5
    assert pacs.associations == 1
    assert pacs.stored == [
        (o.sop_instance_uid, ExplicitVRLittleEndian, bytes(data_set_of(o.read()))) for o in objects
    ]


def test_a_compressed_object_goes_as_it_is_where_the_peer_takes_it():
    ds = compress(ct_dataset(), RLELossless)
    plain = ct_dataset()
    with Archive(contexts=[(CTImageStorage, [ImplicitVRLittleEndian, RLELossless])]) as pacs:
        store(SETTINGS, pacs.peer, [outgoing(ds), outgoing(plain)])
    (_, first, data), (_, second, _) = pacs.stored
    assert (first, second) == (RLELossless, ImplicitVRLittleEndian)
    assert data == data_set_of(part10(ds))


def test_else_it_goes_uncompressed_under_its_own_uid():
    ds = compress(ct_dataset(), JPEG2000Lossless)
    with archive(CTImageStorage) as pacs:
        (answer,) = store(SETTINGS, pacs.peer, [outgoing(ds)])
    assert answer == Stored(CTImageStorage, ds.SOPInstanceUID, 0x0000)
    ((uid, syntax, data),) = pacs.stored
    assert (uid, syntax) == (ds.SOPInstanceUID, ExplicitVRLittleEndian)
    assert ct_dataset().PixelData in data
    assert ds.SOPInstanceUID.encode() in data


def test_what_cannot_be_decoded_is_told_and_the_rest_goes():
    broken = compress(ct_dataset(), JPEG2000Lossless)
    broken.PixelData = broken.PixelData[:40] + bytes(len(broken.PixelData) - 40)
    other = ct_dataset(SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    good = ct_dataset()
    with archive(CTImageStorage) as pacs:
        answers = store(SETTINGS, pacs.peer, [outgoing(d) for d in (broken, other, good)])
    assert [(a.ok, a.status) for a in answers] == [(False, None), (False, None), (True, 0)]
    assert "uncompressed" in answers[0].reason
    assert "SOP Class MR Image Storage" in answers[1].reason
    assert pacs.uids == [good.SOPInstanceUID]


def test_each_object_has_its_own_status():
    objects = [outgoing(ct_dataset()) for _ in range(6)]
    with archive(CTImageStorage) as pacs:
        pacs.answers = [0xA700, 0xB000, 0x0111, 0xC123, 0xA900, 0x0000]
        answers = store(SETTINGS, pacs.peer, objects)
    assert [a.ok for a in answers] == [False, True, True, False, False, True]
    assert answers[0].reason == "A700 Refused: Out of Resources"
    assert answers[3].reason == "C123 Cannot Understand"
    assert answers[4].reason == "A900 Data Set Does Not Match SOP Class"
    assert len({id(a) for a in answers}) == 6 and pacs.associations == 1


def test_a_large_object_goes_in_small_pdus_whatever_the_peer_says_it_takes():
    ds = ct_dataset(Rows=1024, Columns=2048, PixelData=bytes(range(256)) * (1 << 14))
    with archive(CTImageStorage) as pacs:
        pacs.ae.maximum_pdu_size = 0  # any length
        (answer,) = store(SETTINGS, pacs.peer, [outgoing(ds)])
    assert answer.ok
    assert pacs.stored[0][2] == data_set_of(part10(ds))


def fails(settings: Settings, peer: Peer) -> str:
    start = time.monotonic()
    with pytest.raises(PeerUnavailable) as caught:
        store(settings, peer, [outgoing(ct_dataset(PixelData=bytes(8 << 20)))])
    assert time.monotonic() - start < 20
    return str(caught.value)


def test_a_peer_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert (
        fails(SETTINGS, peer_at(port)) == f"no connection to 127.0.0.1:{port}: Connection refused"
    )
    unknown = Peer(ae_title="PACS", host="no.such.host.invalid", port=104)
    assert "no connection to no.such.host.invalid:104: " in fails(SETTINGS, unknown)


def test_a_peer_that_does_not_know_us_or_itself():
    with archive(CTImageStorage, ae_title="OTHER") as pacs:
        said = fails(SETTINGS, peer_at(pacs.port))
    assert said.endswith("rejects the association: Called AE title not recognised")


def test_a_peer_that_takes_nothing_of_it():
    with archive("1.2.840.10008.5.1.4.1.1.4") as pacs:
        assert "accepts no presentation context" in fails(SETTINGS, pacs.peer)


def hang(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def be_silent(connection: socket.socket) -> None:
    OVER.wait(8)


def close(connection: socket.socket) -> None:
    read_pdu(connection)


def take_and_hang(connection: socket.socket) -> None:
    _, request = read_pdu(connection)
    connection.sendall(accept(request))
    hang(connection)


def take_and_read_no_more(connection: socket.socket) -> None:
    _, request = read_pdu(connection)
    connection.sendall(accept(request))
    be_silent(connection)


def take_and_abort(connection: socket.socket) -> None:
    _, request = read_pdu(connection)
    connection.sendall(accept(request))
    read_pdu(connection)
    read_pdu(connection)
    connection.sendall(b"\x07\0\0\0\0\x04\0\0\0\0")
    hang(connection)


def take_and_close(connection: socket.socket) -> None:
    _, request = read_pdu(connection)
    connection.sendall(accept(request))
    read_pdu(connection)


def take_and_trickle(connection: socket.socket) -> None:
    _, request = read_pdu(connection)
    connection.sendall(accept(request))
    threading.Thread(target=hang, args=(connection,), daemon=True).start()
    for byte in b"\x04\0\0\0\x40\0" + bytes(10_000):
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def take_and_pour(connection: socket.socket) -> None:
    _, request = read_pdu(connection)
    connection.sendall(accept(request))
    threading.Thread(target=hang, args=(connection,), daemon=True).start()
    connection.sendall(b"\x04\0\xff\xff\xff\xff")
    while True:
        connection.sendall(bytes(1 << 20))


def talk_http(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize(
    ("deed", "says"),
    [
        (hang, "does not answer the association request"),
        (be_silent, "does not answer the association request"),
        (close, "aborts or closes instead of answering"),
        (talk_http, "aborts or closes instead of answering"),
        (take_and_hang, "PACS did not answer C-STORE"),
        (take_and_read_no_more, "PACS "),
        (take_and_abort, "PACS aborted during C-STORE"),
        (take_and_close, "PACS broke off during C-STORE"),
        (take_and_trickle, "PACS "),
        (take_and_pour, "PACS "),
    ],
)
def test_a_peer_that_behaves_badly_costs_little_time_and_no_thread(deed, says, monkeypatch):
    monkeypatch.setattr(association, "ANSWER_BYTES", 1 << 20)
    if deed in (hang, be_silent):
        hurry(monkeypatch, accept_s=0.3)
    else:
        hurry(monkeypatch, answer_s=0.3)
    with listening(deed) as port:
        assert says in fails(SETTINGS, peer_at(port))


def test_tls_shows_our_certificate_and_looks_at_theirs(tmp_path):
    papers = Papers(tmp_path / "papers")
    settings = make_settings(tmp_path, papers)
    context = tls.server_context(settings.tls)
    with archive(CTImageStorage, tls=context) as pacs:
        ours = pacs.peer.model_copy(update={"tls": True})
        (answer,) = store(settings, ours, [outgoing(ct_dataset())])
        assert answer.ok
        pinned = ours.model_copy(update={"certificate_sha256": ("0" * 64,)})
        assert "shows another certificate" in fails(settings, pinned)
        named = ours.model_copy(update={"certificate_name": "pacs.example"})
        assert "no TLS with" in fails(settings, named)
        assert "aborts or closes" in fails(settings, pacs.peer)  # it speaks TLS alone
        assert len(pacs.stored) == 1


def test_echo():
    with archive() as pacs:
        echo(SETTINGS, pacs.peer, 5.0)
        assert pacs.associations == 1
    with pytest.raises(PeerUnavailable):
        echo(SETTINGS, pacs.peer, 1.0)


def test_an_association_is_released_or_after_an_error_aborted():
    ends: list[str] = []
    handlers = [
        (evt.EVT_RELEASED, lambda event: ends.append("released")),
        (evt.EVT_ABORTED, lambda event: ends.append("aborted")),
    ]
    with archive(CTImageStorage, handlers=handlers) as pacs:
        sent = outgoing(ct_dataset())
        contexts = storage_contexts([(sent.sop_class_uid, sent.transfer_syntax_uid)])
        with associated(SETTINGS, pacs.peer, contexts):
            pass
        with pytest.raises(ZeroDivisionError), associated(SETTINGS, pacs.peer, contexts):
            raise ZeroDivisionError
        deadline = time.monotonic() + 5
        while len(ends) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert ends == ["released", "aborted"]


def test_the_data_set_is_found_in_a_file():
    ds = ct_dataset()
    data = data_set_of(part10(ds))
    assert dcmread(BytesIO(part10(ds))).PatientID == ds.PatientID
    assert bytes(data[:2]) == b"\x08\x00"
    for bad in (b"", bytes(200), part10(ds)[:200]):
        with pytest.raises(DicomError):
            data_set_of(bad)
