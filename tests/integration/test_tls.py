"""TLS of the DICOM port: DCMTK and pynetdicom as senders, certificates of an authority of ours."""

import gc
import hashlib
import json
import os
import socket
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, Association
from pynetdicom.sop_class import Verification

from dicomnode import checks
from dicomnode.config import Settings
from dicomnode.errors import ConfigError
from dicomnode.node import receive
from dicomnode.node.receive import Receiver
from dicomnode.scp import access, tls
from dicomnode.spool import Spool
from tests.dicom import ct_dataset, part10
from tests.integration.test_bounds import codes, refusal
from tests.integration.test_receive import eventually, instances, read

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")


class Papers:
    """An authority, and PEM files of what it issued."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.ca = folder, trustme.CA()
        self.authority = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.authority)

    def issue(self, name: str, **more: Any) -> tuple[Path, Path]:
        """Return certificate and key files of a certificate for a host name."""
        issued = self.ca.issue_cert(name, common_name=name, **more)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.unlink(missing_ok=True)
        for blob in issued.cert_chain_pems:
            blob.write_to_path(certificate, append=True)
        issued.private_key_pem.write_to_path(key)
        return certificate, key


@pytest.fixture(scope="module")
def papers(tmp_path_factory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"))


@pytest.fixture(autouse=True)
def _stop_at_once(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(receive, "STOP_GRACE_S", 0.1)
    yield
    gc.collect()  # pynetdicom's sockets, within the test that passes over the warning


def fingerprint(certificate: Path) -> str:
    pem = certificate.read_text()
    first = pem[: pem.index("-----END CERTIFICATE-----") + 25]
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first)).hexdigest()


def make_settings(tmp_path: Path, papers: Papers, *peers: dict[str, Any], **more: Any) -> Settings:
    certificate, key = papers.issue("127.0.0.1")
    here = {"host": "127.0.0.1", "port": 104}
    node = more.pop("node", {})
    return Settings(
        node={
            "port": 0,
            "peers": [{**here, **p} for p in peers or ({"ae_title": "PACS"},)],
            **node,
        },
        tls={"certificate": certificate, "key": key, "client_ca": papers.authority, **more},
        spool={"path": tmp_path / "spool", "reserve_bytes": 0},
    )


@contextmanager
def running(settings: Settings) -> Iterator[Receiver]:
    receiver = Receiver(settings)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


def client(papers: Papers, certificate: tuple[Path, Path] | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(papers.authority))
    if certificate:
        context.load_cert_chain(*certificate)
    return context


def associate(port: int, context: ssl.SSLContext, ae_title: str = "PACS") -> Association:
    ae = AE(ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = 10
    ae.add_requested_context(Verification, ImplicitVRLittleEndian)
    ae.add_requested_context(ct_dataset().SOPClassUID, ExplicitVRLittleEndian)
    tls_args = (context, "127.0.0.1")
    return ae.associate("127.0.0.1", port, ae_title="DICOMNODE", tls_args=tls_args)


def audited(settings: Settings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in settings.audit_log.read_text().splitlines()]


# Senders


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_peer_with_a_certificate_sends(tmp_path, papers, version):
    settings = make_settings(tmp_path, papers)
    context = client(papers, papers.issue("pacs.example"))
    context.minimum_version = context.maximum_version = version
    ds = ct_dataset()
    with running(settings) as receiver:
        assoc = associate(receiver.port, context)
        assert assoc.is_established
        assert assoc.dul.socket.socket.version() == version.name.replace("v1_", "v1.")
        assert assoc.send_c_store(ds).Status == 0x0000
        assoc.release()
        assert eventually(lambda: receiver.connections == 0)
    (instance,) = instances(spool := Spool(settings.spool.path))
    assert read(spool, instance) == ds
    (ended,) = [line for line in audited(settings) if line["event"] == "association ended"]
    assert ended["kind"] == "released"
    assert "commonName=pacs.example" in ended["certificate"]


def storescu(*arguments: object) -> subprocess.CompletedProcess[str]:
    found = [p for p in os.get_exec_path() if Path(p, "storescu").exists() and ".venv" not in p]
    if not found:
        pytest.skip("storescu of DCMTK is not installed")
    return subprocess.run(
        [Path(found[0], "storescu"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_dcmtk_sends(tmp_path, papers):
    settings = make_settings(tmp_path, papers)
    certificate, key = papers.issue("pacs.example")
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.dcm")
        files[-1].write_bytes(part10(ct_dataset(InstanceNumber=number)))
    stranger = Papers(tmp_path / "other").issue("pacs.example")
    with running(settings) as receiver:
        to = ["-aet", "PACS", "-aec", "DICOMNODE", "127.0.0.1", receiver.port, *files]
        trust = ["+cf", papers.authority]
        good = storescu("+tls", key, certificate, *trust, *to)
        assert good.returncode == 0, good.stderr
        assert len(instances(Spool(settings.spool.path))) == 3
        # No certificate, one of another authority, and no TLS at all.
        for options in (["+tla", *trust], ["+tls", *stranger[::-1], *trust], []):
            assert storescu(*options, *to).returncode != 0
        assert eventually(lambda: receiver.connections == 0)
    assert len(instances(Spool(settings.spool.path))) == 3
    refused = [x["reason"] for x in audited(settings) if x["event"] == "connection refused"]
    assert len(refused) == 3
    assert all(reason.startswith("TLS handshake failed: ") for reason in refused)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_nobody_comes_in_without_a_certificate_of_ours(tmp_path, papers, caplog, version):
    other = Papers(tmp_path / "other")
    with running(make_settings(tmp_path, papers)) as receiver:
        for certificate in (None, other.issue("pacs.example")):
            context = client(papers, certificate)
            context.maximum_version = version
            assert not associate(receiver.port, context).is_established
        assert eventually(lambda: receiver.connections == 0)
    reasons = [vars(r)["reason"] for r in caplog.records if r.message == "connection refused"]
    assert len(reasons) == 2
    assert "peer did not return a certificate" in reasons[0]
    assert "certificate:" in reasons[1]


def test_an_expired_certificate_is_refused(tmp_path, papers):
    expired = papers.issue("pacs.example", not_after=datetime.now(UTC) - timedelta(days=1))
    with running(make_settings(tmp_path, papers)) as receiver:
        assert not associate(receiver.port, client(papers, expired)).is_established


def test_a_certificate_may_be_optional(tmp_path, papers):
    settings = make_settings(tmp_path, papers, require_client_certificate=False)
    with running(settings) as receiver:
        assert associate(receiver.port, client(papers, None)).is_established
        stranger = Papers(tmp_path / "other").issue("pacs.example")
        assert not associate(receiver.port, client(papers, stranger)).is_established


def test_a_peer_may_be_held_to_its_certificate(tmp_path, papers):
    pacs, archive = papers.issue("pacs.example"), papers.issue("archive.example")
    peers = (
        {"ae_title": "PACS", "certificate_sha256": [fingerprint(pacs[0]).upper()]},
        {"ae_title": "ARCHIVE", "certificate_name": "Archive.example"},
    )
    settings = make_settings(tmp_path, papers, *peers)
    with running(settings) as receiver:
        for ae_title, certificate, established in (
            ("PACS", pacs, True),
            ("PACS", archive, False),
            ("ARCHIVE", archive, True),
            ("ARCHIVE", pacs, False),
        ):
            assoc = associate(receiver.port, client(papers, certificate), ae_title)
            assert assoc.is_established is established
            if not established:
                assert refusal(assoc) == codes(access.OTHER_CERTIFICATE)
    rejected = [line for line in audited(settings) if line["event"] == "association rejected"]
    assert [(x["calling_ae_title"], x["certificate"].rpartition("=")[2]) for x in rejected] == [
        ("PACS", "archive.example"),
        ("ARCHIVE", "pacs.example"),
    ]


def test_what_is_weak_is_not_spoken(tmp_path, papers):
    certificate = papers.issue("pacs.example")
    with running(make_settings(tmp_path, papers)) as receiver:
        for weaken in (
            tls_1_1,
            lambda c: c.set_ciphers("ECDHE-ECDSA-AES128-SHA256"),  # CBC
            lambda c: c.set_ciphers("ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0"),  # and SHA-1
        ):
            context = client(papers, certificate)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            weakened(context, weaken)
            connection = socket.create_connection(("127.0.0.1", receiver.port), timeout=10)
            with connection, pytest.raises(ssl.SSLError, match="alert"):  # its word, not ours
                context.wrap_socket(connection, server_hostname="127.0.0.1")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_session_is_resumed(tmp_path, papers, version):
    context = client(papers, papers.issue("pacs.example"))
    context.minimum_version = context.maximum_version = version
    settings = make_settings(tmp_path, papers, node={"handshake_seconds": 0.3})
    session = None
    with running(settings) as receiver:
        for _ in range(2):
            with (
                socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection,
                context.wrap_socket(
                    connection, server_hostname="127.0.0.1", session=session
                ) as secure,
            ):
                assert secure.recv(1) == b""  # a ticket of TLS 1.3 would have come before
                assert not secure.session_reused
                session = secure.session


def tls_1_1(context: ssl.SSLContext) -> None:
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.maximum_version = ssl.TLSVersion.TLSv1_1


def weakened(context: ssl.SSLContext, weaken: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        weaken(context)


# Those who hold it up


def test_silent_clients_hold_up_nobody(tmp_path, papers):
    settings = make_settings(tmp_path, papers, node={"handshake_seconds": 30})
    context = client(papers, papers.issue("pacs.example"))
    with running(settings) as receiver, ExitStack() as stack:
        for sent in (b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03") * 5:
            connection = socket.create_connection(("127.0.0.1", receiver.port))
            stack.enter_context(connection).sendall(sent)
        assert eventually(lambda: receiver.connections == 15)
        for _ in range(3):
            started = time.monotonic()
            assoc = associate(receiver.port, context)
            assert assoc.is_established
            assert assoc.send_c_echo().Status == 0x0000
            assert time.monotonic() - started < 5.0
            assoc.release()


def test_a_silent_client_is_closed_in_time(tmp_path, papers):
    settings = make_settings(tmp_path, papers, node={"handshake_seconds": 0.5})
    with running(settings) as receiver:
        for sent in (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
            with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection:
                connection.sendall(sent)
                assert connection.recv(1) == b""
        # One that shook hands and says nothing in TLS:
        context = client(papers, papers.issue("pacs.example"))
        with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection:
            with context.wrap_socket(connection, server_hostname="127.0.0.1") as secure:
                assert secure.recv(1) == b""
        assert eventually(lambda: receiver.connections == 0)


def test_50_failures_leave_nothing(tmp_path, papers):
    context = client(papers, None)
    with running(make_settings(tmp_path, papers)) as receiver:
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for i in range(50):
            with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection:
                if i % 2:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    connection.recv(100)
                else:
                    with (
                        pytest.raises((ssl.SSLError, ConnectionError)),
                        context.wrap_socket(connection, server_hostname="127.0.0.1") as secure,
                    ):
                        if secure.recv(1) == b"":
                            raise ConnectionResetError
        assert eventually(lambda: receiver.connections == 0)
        assert eventually(lambda: threading.active_count() <= before[0])
        assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before[1])


# Our own certificate


def test_a_renewed_certificate_is_taken_up(tmp_path, papers, monkeypatch, caplog):
    monkeypatch.setattr(tls, "LOOK_S", 0.0)
    caplog.set_level("INFO")
    settings = make_settings(tmp_path, papers)
    context = client(papers, papers.issue("pacs.example"))

    def shown(port: int) -> str:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            with context.wrap_socket(connection, server_hostname="127.0.0.1") as secure:
                return hashlib.sha256(secure.getpeercert(binary_form=True)).hexdigest()

    with running(settings) as receiver:
        old = fingerprint(settings.tls.certificate)
        assert shown(receiver.port) == old
        kept = settings.tls.key.read_bytes()
        papers.issue("127.0.0.1")
        renewed = settings.tls.key.read_bytes()
        settings.tls.key.write_bytes(kept)  # the key is still to come
        assert shown(receiver.port) == old
        settings.tls.key.write_bytes(renewed)
        assert shown(receiver.port) == fingerprint(settings.tls.certificate) != old
    told = [r.message for r in caplog.records if r.message.startswith("certificate")]
    assert told == ["certificate not renewed", "certificate renewed"]


def broken(folder: Path, papers: Papers) -> dict[str, tuple[dict[str, Any], str]]:
    """What is wrong -> settings of [tls], and what the error must say."""
    certificate, key = papers.issue("127.0.0.1")
    other_key = papers.issue("other.example")[1]
    text = folder / "text"
    text.write_text("no PEM")
    missing = folder / "missing"
    expired = Papers(folder / "expired").issue(
        "127.0.0.1", not_after=datetime.now(UTC) - timedelta(days=1)
    )
    encrypted = folder / "encrypted.key"
    private = ec.generate_private_key(ec.SECP256R1())
    encrypted.write_bytes(
        private.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password")
        )
    )
    short = self_signed(folder, rsa.generate_private_key(65537, 1024))
    sound = {"certificate": certificate, "key": key, "client_ca": papers.authority}
    return {
        "missing certificate": ({**sound, "certificate": missing}, "tls.certificate: "),
        "missing key": ({**sound, "key": missing}, "tls.key: "),
        "missing authority": ({**sound, "client_ca": missing}, "tls.client_ca: "),
        "no authority": ({**sound, "client_ca": None}, "tls.client_ca: missing"),
        "certificate of text": ({**sound, "certificate": text}, "tls.certificate: "),
        "key of text": ({**sound, "key": text}, "tls.key: "),
        "authority of text": ({**sound, "client_ca": text}, "tls.client_ca: "),
        "other key": ({**sound, "key": other_key}, "tls.key: it is not the key"),
        "encrypted key": ({**sound, "key": encrypted}, "tls.key: "),
        "no key": ({**sound, "key": None}, "tls.key: "),
        "expired": (
            {**sound, "certificate": expired[0], "key": expired[1]},
            "expired on",
        ),
        "short key": ({**sound, **short}, "tls.certificate: its key is too short"),
        "key alone": ({"key": key}, "tls.key: needs tls.certificate"),
        "authority alone": ({"client_ca": papers.authority}, "tls.client_ca: needs"),
    }


def self_signed(folder: Path, private: Any) -> dict[str, Path]:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(private, SHA256())
    )
    certificate, key = folder / "short.pem", folder / "short.key"
    certificate.write_bytes(made.public_bytes(Encoding.PEM))
    key.write_bytes(
        private.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    return {"certificate": certificate, "key": key}


def test_files_that_cannot_be_used_are_settings_to_correct(tmp_path, papers):
    for name, (values, words) in broken(tmp_path, papers).items():
        settings = make_settings(tmp_path, papers)
        settings = settings.model_copy(update={"tls": type(settings.tls)(**values)})
        with pytest.raises(ConfigError) as caught:
            Receiver(settings)
        assert words in str(caught.value), name


def test_a_pin_without_tls_is_a_setting_to_correct(tmp_path):
    for pin in ({"certificate_sha256": ["ab" * 32]}, {"certificate_name": "pacs.example"}):
        peer = {"ae_title": "PACS", "host": "127.0.0.1", "port": 104, **pin}
        settings = Settings(node={"port": 0, "peers": [peer]}, spool={"path": tmp_path / "spool"})
        with pytest.raises(ConfigError, match=r"node\.peers: PACS: .*tls\.certificate"):
            Receiver(settings)


@pytest.mark.parametrize("year", [2026, 2049, 2050, 2150])
def test_the_expiry_is_that_of_the_certificate(tmp_path, year):
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x" * 60)])
    until = datetime(year, 12, 31, 23, 59, 58, tzinfo=UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(until)
        .sign(private, SHA256())
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes("subject=Universitätsklinikum\n".encode() + made.public_bytes(Encoding.PEM))
    assert tls.expiry(path) == until


def test_check_tells_when_the_certificate_expires(tmp_path, papers):
    settings = make_settings(tmp_path, papers)
    for days, ok in ((400, True), (20, False), (-1, False)):
        # A minute more, as the check counts whole days.
        until = datetime.now(UTC) + timedelta(days=days, minutes=1)
        papers.issue("127.0.0.1", not_after=until)
        (found,) = [c for c in checks.run(settings) if c.name == "tls"]
        assert found.ok is ok, found
        assert f"{until:%Y-%m-%d}" in found.message
    papers.issue("127.0.0.1")


def test_check_calls_a_peer_over_tls(tmp_path, papers):
    settings = make_settings(tmp_path, papers)
    with running(settings) as receiver:
        ours = fingerprint(settings.tls.certificate)
        for more, ok in (
            ({"tls": True}, True),
            ({"tls": True, "certificate_sha256": [ours]}, True),
            ({"tls": True, "certificate_sha256": ["ab" * 32]}, False),
            ({"tls": True, "certificate_name": "other.example"}, False),
            ({"tls": False}, False),
        ):
            peer = {"ae_title": "DICOMNODE", "host": "127.0.0.1", "port": receiver.port, **more}
            asking = settings.model_copy(
                update={
                    "node": settings.node.model_copy(
                        update={
                            "ae_title": "PACS",
                            "peers": (type(settings.node.peers[0])(**peer),),
                        }
                    )
                }
            )
            (found,) = [c for c in checks.run(asking) if c.name == "peer DICOMNODE"]
            assert found.ok is ok, (more, found)
