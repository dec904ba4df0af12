import gc
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG2MPML,
    UID,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE, Association, _config
from pynetdicom.sop_class import PatientRootQueryRetrieveInformationModelFind, Verification

from dicomnode.config import Settings
from dicomnode.errors import ConfigError
from dicomnode.model import SpooledEvent, SpooledInstance
from dicomnode.node import receive
from dicomnode.node.receive import Receiver
from dicomnode.scp.contexts import COMPRESSED, TRANSFER_SYNTAXES
from dicomnode.spool import Spool
from tests.dicom import ct_dataset, part10, without_meta
from tests.e2e.conftest import association

PRIVATE_STORAGE = UID("1.3.12.2.1107.5.9.1")  # Siemens CSA Non-Image
RETIRED_STORAGE = UID("1.2.840.10008.5.1.4.1.1.5")  # Nuclear Medicine, of 1993

ECHO = (Verification, [ImplicitVRLittleEndian])
CT = (CTImageStorage, [ExplicitVRLittleEndian])

# pynetdicom leaves a socket to the garbage collector when the peer closed it first
# (AssociationSocket._shutdown_socket: `shutdown` raises, `close` is not reached).
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

T = TypeVar("T")


@pytest.fixture(autouse=True)
def _sockets_are_collected() -> Iterator[None]:
    """Let go of them within the test that passes over the warning."""
    yield
    gc.collect()


def eventually(get: Callable[[], T], seconds: float = 10.0) -> T:
    """Return the first true value, or the last one when time is up."""
    deadline = time.monotonic() + seconds
    while not (value := get()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def make_settings(tmp_path: Path, **node) -> Settings:
    peers = [
        {"ae_title": "PACS", "host": "127.0.0.1", "port": 104},
        {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": 105, "calling": False},
    ]
    return Settings(
        node={"port": 0, "peers": peers, **node},
        spool={"path": tmp_path / "spool", "reserve_bytes": 0},
    )


@pytest.fixture(params=[True, False], ids=["lane", "plain"])
def settings(request, tmp_path) -> Settings:
    return make_settings(tmp_path, fast_lane=request.param)


@pytest.fixture
def receiver(settings) -> Iterator[Receiver]:
    receiver = Receiver(settings)
    receiver.start()
    yield receiver
    receiver.stop()


@pytest.fixture
def spool(settings) -> Spool:
    return Spool(settings.spool.path)


def read(spool: Spool, entry: SpooledInstance) -> Dataset:
    return pydicom.dcmread(BytesIO(spool.read(entry)))


def instances(spool: Spool) -> list[SpooledInstance]:
    return [entry for entry in spool.pending(1000) if isinstance(entry, SpooledInstance)]


def ends(spool: Spool) -> list[tuple[str, str]]:
    """Return association and kind of each end in the spool, oldest first."""
    events = [entry for entry in spool.pending(1000) if isinstance(entry, SpooledEvent)]
    return [(event.association_id, event.kind) for event in events if event.kind != "started"]


def associate(
    port: int,
    *contexts: tuple[str, list[UID]],
    calling_ae_title: str = "PACS",
    called_ae_title: str = "DICOMNODE",
) -> Association:
    ae = AE(calling_ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
    for abstract_syntax, transfer_syntaxes in contexts or [
        (Verification, [ImplicitVRLittleEndian])
    ]:
        ae.add_requested_context(abstract_syntax, transfer_syntaxes)
    return ae.associate("127.0.0.1", port, ae_title=called_ae_title)


def store(port: int, ds: pydicom.Dataset) -> int:
    """Send a data set in an association of its own and return the status."""
    assoc = associate(port, (ds.SOPClassUID, [ds.file_meta.TransferSyntaxUID]))
    assert assoc.is_established
    status = assoc.send_c_store(ds).Status
    assoc.release()
    return status


def assert_serves(port: int) -> None:
    assoc = associate(port)
    assert assoc.is_established
    assert assoc.send_c_echo().Status == 0x0000
    assoc.release()
    assert store(port, ct_dataset()) == 0x0000


def dcmtk(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    if shutil.which(program) is None:
        pytest.skip(f"{program} of DCMTK is not installed")
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=30
    )


# Verification and storage


def test_echo(receiver):
    assoc = associate(receiver.port)
    assert assoc.send_c_echo().Status == 0x0000
    assoc.release()


def test_echo_by_dcmtk(receiver):
    result = dcmtk("echoscu", "-aet", "PACS", "-aec", "DICOMNODE", "127.0.0.1", receiver.port)
    assert result.returncode == 0, result.stderr


def test_store_answers_success_once_the_instance_is_in_the_spool(receiver, spool):
    ds = ct_dataset()
    assoc = associate(receiver.port, CT)
    assert assoc.send_c_store(ds).Status == 0x0000
    (instance,) = instances(spool)
    assoc.release()
    assert read(spool, instance) == ds


def test_file_meta_tells_who_sent_what_to_whom(receiver, spool):
    ds = ct_dataset()
    store(receiver.port, ds)
    (instance,) = instances(spool)
    assert spool.read(instance)[:132] == bytes(128) + b"DICM"
    meta = read(spool, instance).file_meta
    assert meta.MediaStorageSOPClassUID == CTImageStorage
    assert meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
    assert meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert meta.SourceApplicationEntityTitle == "PACS"
    assert meta.SendingApplicationEntityTitle == "PACS"
    assert meta.ReceivingApplicationEntityTitle == "DICOMNODE"
    assert meta.ImplementationClassUID == AE().implementation_class_uid
    group_length = meta.pop("FileMetaInformationGroupLength").value
    assert len(meta) == 9
    assert 144 + group_length + len(without_meta(part10(ds))) == len(spool.read(instance))


@pytest.mark.parametrize("transfer_syntax", TRANSFER_SYNTAXES, ids=lambda uid: uid.keyword)
def test_the_data_set_is_spooled_byte_by_byte(
    receiver, spool, tmp_path, monkeypatch, transfer_syntax
):
    ds = ct_dataset(TransferSyntaxUID=transfer_syntax)
    if transfer_syntax in COMPRESSED:
        ds.PixelData = encapsulate([b"\xff\xd8 no real frame \xff\xd9"])
    sent = tmp_path / "sent.dcm"
    sent.write_bytes(part10(ds))
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)  # sends a file as it is
    assoc = associate(receiver.port, (CTImageStorage, [transfer_syntax]))
    assert assoc.send_c_store(sent).Status == 0x0000
    assoc.release()
    (instance,) = instances(spool)
    received = spool.read(instance)
    assert without_meta(received) == without_meta(sent.read_bytes())
    assert read(spool, instance).file_meta.TransferSyntaxUID == transfer_syntax


@pytest.mark.parametrize("program", ["storescu", "dcmsend"])
def test_store_by_dcmtk(receiver, spool, tmp_path, program):
    sent = [ct_dataset(InstanceNumber=number) for number in (1, 2, 3)]
    paths = [tmp_path / f"{number}.dcm" for number in range(len(sent))]
    for path, ds in zip(paths, sent, strict=True):
        path.write_bytes(part10(ds))
    result = dcmtk(program, "-aet", "PACS", "-aec", "DICOMNODE", "127.0.0.1", receiver.port, *paths)
    assert result.returncode == 0, result.stderr
    assert [read(spool, entry) for entry in instances(spool)] == sent
    (end,) = eventually(lambda: ends(spool))
    assert end == (instances(spool)[0].association_id, "released")


@pytest.mark.parametrize(
    "sop_class_uid", [SecondaryCaptureImageStorage, RETIRED_STORAGE, PRIVATE_STORAGE], ids=str
)
def test_objects_other_than_ct_are_stored_too(receiver, spool, sop_class_uid):
    ds = ct_dataset(SOPClassUID=sop_class_uid)
    assert store(receiver.port, ds) == 0x0000
    (instance,) = instances(spool)
    assert read(spool, instance) == ds


def test_a_duplicate_is_stored_again(receiver, spool):
    ds = ct_dataset()
    assert [store(receiver.port, ds), store(receiver.port, ds)] == [0x0000, 0x0000]
    assert len(instances(spool)) == 2


def others(folder: Path) -> set[Path]:
    """All paths that are no Instance and no lock of a process."""
    return {path for path in folder.rglob("*") if path.parent.name not in ("incoming", ".slots")}


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_a_uid_that_is_a_path_does_no_harm(receiver, spool, tmp_path):
    before = others(tmp_path)
    uid = "../../../../etc/x"
    assert store(receiver.port, ct_dataset(SOPInstanceUID=uid)) == 0x0000
    (instance,) = instances(spool)
    assert spool.waits(instance)
    assert read(spool, instance).file_meta.MediaStorageSOPInstanceUID == uid
    assert others(tmp_path) == before


# Negotiation


@pytest.mark.parametrize(
    ("proposed", "accepted"),
    [
        # Uncompressed: what is cheapest to decode, whatever the order.
        ([ImplicitVRLittleEndian, ExplicitVRLittleEndian], ExplicitVRLittleEndian),
        ([ExplicitVRBigEndian, ImplicitVRLittleEndian], ImplicitVRLittleEndian),
        # A sender that could also compress is not made to.
        ([ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless], ImplicitVRLittleEndian),
        # A sender that holds it compressed is not made to decompress, ...
        ([JPEG2000Lossless, RLELossless, ExplicitVRLittleEndian], JPEG2000Lossless),
        # ... unless in a way we do not know.
        ([MPEG2MPML, ExplicitVRLittleEndian], ExplicitVRLittleEndian),
    ],
)
def test_the_transfer_syntax_is_cheap_for_both(receiver, proposed, accepted):
    assoc = associate(receiver.port, (CTImageStorage, proposed))
    assert [context.transfer_syntax for context in assoc.accepted_contexts] == [[accepted]]
    assoc.release()


def test_each_context_of_a_sop_class_gets_its_own_transfer_syntax(receiver):
    assoc = associate(
        receiver.port,
        (CTImageStorage, [ImplicitVRLittleEndian, ExplicitVRLittleEndian]),
        (CTImageStorage, [JPEG2000Lossless, ImplicitVRLittleEndian]),
        (CTImageStorage, [RLELossless]),
    )
    assert [context.transfer_syntax[0] for context in assoc.accepted_contexts] == [
        ExplicitVRLittleEndian,
        JPEG2000Lossless,
        RLELossless,
    ]
    assoc.release()


def test_what_is_not_served_is_not_accepted(receiver):
    assoc = associate(
        receiver.port,
        ECHO,
        (PatientRootQueryRetrieveInformationModelFind, [ImplicitVRLittleEndian]),
        (CTImageStorage, [MPEG2MPML]),
    )
    assert [context.abstract_syntax for context in assoc.accepted_contexts] == [Verification]
    assoc.release()


@pytest.mark.parametrize(
    "titles",
    [
        {"called_ae_title": "OTHER"},
        {"calling_ae_title": "STRANGER"},
        {"calling_ae_title": "ARCHIVE"},  # calling = false
    ],
)
def test_an_ae_title_that_is_not_expected_is_rejected(receiver, caplog, titles):
    assoc = associate(receiver.port, **titles)
    assert assoc.is_rejected
    (record,) = (record for record in caplog.records if record.name == receive.logger.name)
    assert record.message == "association rejected"
    assert vars(record).items() >= titles.items()


def test_associations_are_limited_in_number(tmp_path):
    receiver = Receiver(make_settings(tmp_path, maximum_associations=1))
    receiver.start()
    first = associate(receiver.port)
    assert first.is_established
    assert associate(receiver.port).is_rejected
    first.release()
    receiver.stop()


# Refusals


def test_store_answers_a700_when_the_spool_is_full(settings, tmp_path):
    full = settings.model_copy(
        update={
            "spool": settings.spool.model_copy(
                update={"reserve_bytes": 1 << 62, "refuse_below_bytes": 0}
            )
        }
    )
    receiver = Receiver(full)
    receiver.start()
    assert store(receiver.port, ct_dataset()) == 0xA700
    receiver.stop()
    assert [entry.kind for entry in Spool(settings.spool.path).pending(10)] == ["started"]


def test_store_answers_a700_when_the_spool_is_gone(receiver, spool, caplog):
    shutil.rmtree(spool.path / "journal")
    assert store(receiver.port, ct_dataset()) == 0xA700
    (record,) = (record for record in caplog.records if record.name == receive.logger.name)
    assert record.message == "instance refused"


def test_store_answers_c211_when_anything_else_fails(receiver, monkeypatch, caplog):
    monkeypatch.delattr(receive, "file_meta")
    assert store(receiver.port, ct_dataset()) == 0xC211
    (record,) = (record for record in caplog.records if record.name == receive.logger.name)
    assert record.message == "instance not stored"
    assert record.exc_info is not None


# Peers that do not speak DICOM


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x00\x00",
        b"\x01\x00\xff\xff\xff\xff" + bytes(1000),
        b"GET / HTTP/1.1\r\nHost: pacs\r\n\r\n",
        bytes(range(256)) * 16,
        b"\x05\x00\x00\x00\x00\x04\x00\x00\x00\x00",  # A-RELEASE-RQ before any association
    ],
    ids=["silence", "half_a_header", "4_gib", "http", "bytes", "release"],
)
@pytest.mark.parametrize("stays", [True, False])
def test_a_peer_that_does_not_speak_dicom_harms_nobody(receiver, data, stays):
    with socket.create_connection(("127.0.0.1", receiver.port)) as connection:
        connection.sendall(data)
        if stays:
            assert_serves(receiver.port)
    if not stays:
        assert_serves(receiver.port)


@pytest.mark.parametrize("data", [b"", b"\x01\x00\x00"])
def test_a_peer_that_stays_silent_is_disconnected(tmp_path, data):
    receiver = Receiver(make_settings(tmp_path, handshake_seconds=0.2))
    receiver.start()
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection:
        connection.sendall(data)
        assert connection.recv(1) == b""
    receiver.stop()


# Ends of associations


def test_a_release_is_spooled_after_its_instances(receiver, spool):
    with association(receiver.port, calling_ae_title="PACS") as assoc:
        for _ in range(3):
            assert assoc.send_c_store(ct_dataset()).Status == 0x0000
        assert ends(spool) == []
    assert eventually(lambda: ends(spool)) == [(instances(spool)[0].association_id, "released")]
    *stored, last = spool.pending(10)[1:]
    assert stored == instances(spool)
    assert isinstance(last, SpooledEvent)
    assert len({instance.association_id for instance in stored}) == 1


def test_an_abort_is_spooled(receiver, spool):
    assoc = associate(receiver.port, CT)
    assoc.send_c_store(ct_dataset())
    assoc.abort()
    assert eventually(lambda: ends(spool)) == [(instances(spool)[0].association_id, "aborted")]


def test_each_association_has_an_id_of_its_own(receiver, spool):
    for _ in range(2):
        store(receiver.port, ct_dataset())
    assert eventually(lambda: len(ends(spool)) == 2)
    ids = [instance.association_id for instance in instances(spool)]
    assert len(set(ids)) == 2
    assert ids == [association_id for association_id, _ in ends(spool)]


def test_an_association_that_stored_nothing_leaves_no_trace(receiver, spool):
    assoc = associate(receiver.port)
    assoc.send_c_echo()
    assoc.release()
    store(receiver.port, ct_dataset())
    assert eventually(lambda: ends(spool))
    assert len(ends(spool)) == 1


def test_a_start_is_spooled(receiver, spool):
    assert [entry.kind for entry in spool.pending(10)] == ["started"]


KILLED_SENDER = """
import os, signal, sys
from pynetdicom import AE
from tests.dicom import ct_dataset
ae = AE("PACS")
ds = ct_dataset()
ae.add_requested_context(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID)
assoc = ae.associate("127.0.0.1", int(sys.argv[1]), ae_title="DICOMNODE")
assert assoc.send_c_store(ds).Status == 0x0000
assoc.dul.socket.socket.sendall(bytes.fromhex(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("sent_last", ["", "0400000fffff"], ids=["between", "within_a_pdu"])
def test_a_sender_that_is_killed_counts_as_aborted(receiver, spool, sent_last):
    sender = subprocess.run([sys.executable, "-c", KILLED_SENDER, str(receiver.port), sent_last])
    assert sender.returncode == -signal.SIGKILL
    assert eventually(lambda: ends(spool)) == [(instances(spool)[0].association_id, "aborted")]
    assert_serves(receiver.port)


def test_a_sender_that_breaks_off_within_a_pdu_is_aborted(tmp_path, spool):
    receiver = Receiver(make_settings(tmp_path, idle_seconds=0.3))
    receiver.start()
    assoc = associate(receiver.port, CT)
    assoc.send_c_store(ct_dataset())
    assoc.dul.socket.socket.sendall(b"\x04\x00\x00\x0f\xff\xff")
    assert eventually(lambda: ends(spool)) == [(instances(spool)[0].association_id, "aborted")]
    assoc.abort()
    receiver.stop()


# Start and stop


@pytest.mark.parametrize(
    "peers", [[], [{"ae_title": "ARCHIVE", "host": "h", "port": 1, "calling": False}]]
)
def test_a_node_without_senders_does_not_start(tmp_path, peers):
    with pytest.raises(ConfigError, match=r"node\.peers"):
        Receiver(make_settings(tmp_path, peers=peers))


def test_a_port_in_use_is_a_setting_to_correct(receiver, spool, tmp_path):
    other = Receiver(make_settings(tmp_path, port=receiver.port))
    with pytest.raises(ConfigError, match=rf"node\.port: .*:{receiver.port}: Address already in"):
        other.start()
    assert len(spool.pending(10)) == 1  # the start of the first


def test_stop_lets_a_running_association_finish(settings, spool):
    receiver = Receiver(settings)
    receiver.start()
    assoc = associate(receiver.port, CT)
    stopping = threading.Thread(target=receiver.stop)
    stopping.start()
    # No longer listening:
    assert eventually(lambda: not associate(receiver.port).is_established)
    assert assoc.send_c_store(ct_dataset()).Status == 0x0000
    assoc.release()
    stopping.join(10)
    assert not stopping.is_alive()
    assert [kind for _, kind in ends(spool)] == ["released"]


@pytest.mark.parametrize("sent_last", [b"", b"\x04\x00\x00\x0f\xff\xff"])
def test_stop_aborts_what_does_not_finish(monkeypatch, settings, spool, sent_last):
    monkeypatch.setattr(receive, "STOP_GRACE_S", 0.2)
    monkeypatch.setattr(receive, "ABORT_GRACE_S", 0.5)
    receiver = Receiver(settings)
    receiver.start()
    assoc = associate(receiver.port, CT)
    assoc.send_c_store(ct_dataset())
    assoc.dul.socket.socket.sendall(sent_last)
    threads = threading.active_count()
    receiver.stop()
    assert [kind for _, kind in ends(spool)] == ["aborted"]
    assert eventually(lambda: assoc.is_aborted)
    assert eventually(lambda: threading.active_count() < threads)


def test_a_silent_connection_does_not_hold_up_a_stop(settings):
    receiver = Receiver(settings)
    receiver.start()
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection:
        assert_serves(receiver.port)
        started = time.monotonic()
        receiver.stop()
        assert time.monotonic() - started < receive.STOP_GRACE_S
        assert connection.recv(1) == b""


def test_the_receiver_needs_neither_torch_nor_a_database():
    program = (
        "import sys, dicomnode.node.receive; assert not {'torch', 'sqlalchemy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


PROCESS = """
import json, signal, sys, threading
from dicomnode import log
from dicomnode.config import Settings
from dicomnode.node import receive
log.setup("DEBUG", json=True)
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
receive.run(Settings(**json.loads(sys.argv[1])), stop)
"""


def test_the_log_of_a_process_holds_nothing_of_a_patient(settings, spool):
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, settings.model_dump_json()], stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    started = json.loads(process.stderr.readline())
    assert started["event"] == "receiver started"
    port = started["port"]

    assert store(port, ct_dataset()) == 0x0000
    assert store(port, ct_dataset(SOPClassUID=PRIVATE_STORAGE)) == 0x0000
    assert eventually(lambda: len(ends(spool)) == 2)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    shutil.move(spool.path / "journal", spool.path / "moved")
    assert store(port, ct_dataset()) == 0xA700

    process.send_signal(signal.SIGTERM)
    log = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(10) == 0
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events.count("instance stored") == 2
    assert events.count("instance refused") == 1
    assert events[-1] == "receiver stopped"
    assert not re.search("canary", log, re.IGNORECASE)
