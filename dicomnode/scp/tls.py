"""TLS of the DICOM port: the BCP 195 RFC 8996, 9325 profile of PS3.15 B.12.

TLS 1.2 and 1.3, 1.3 preferred; no renegotiation, compression or resumption; of TLS 1.2 only what
RFC 9325 4.2 recommends: ephemeral elliptic curves with AES-GCM or ChaCha20-Poly1305. OpenSSL's
security level 2 refuses RSA keys below 2048 bits and signatures by SHA-1 (RFC 9325 4.5).
"""

import hashlib
import logging
import os
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dicomnode.config import Peer, Settings, TLSSettings
from dicomnode.errors import ConfigError
from dicomnode.scp.connection import PromptTLSSocket

logger = logging.getLogger(__name__)

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"
LOOK_S = 10.0  # between looks at the files
SOON_DAYS = 30


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a peer's certificate says: enough to know it again, and to name it in the audit log."""

    subject: str
    sha256: str
    names: tuple[str, ...]  # DNS names; the common name where it has none


def check(settings: Settings) -> None:
    """Refuse settings that ask for certificates without TLS.

    Raises
    ------
    ConfigError
        The message names the key.
    """
    tls = settings.tls
    if tls.certificate is None:
        for key in ("key", "client_ca"):
            if getattr(tls, key) is not None:
                raise ConfigError(f"tls.{key}: needs tls.certificate")
        for peer in settings.node.peers:
            if peer.certificate_sha256 or peer.certificate_name:
                raise ConfigError(
                    f"node.peers: {peer.ae_title}: a certificate can be asked for with TLS only: "
                    "set tls.certificate"
                )
    elif tls.client_ca is None and tls.require_client_certificate:
        raise ConfigError(
            "tls.client_ca: missing; name the authorities of your peers' certificates, or set "
            "require_client_certificate = false"
        )


class Endpoint:
    """The node's side of TLS. Certificates renewed on disk are taken up without a restart."""

    def __init__(self, settings: TLSSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._looked_at = time.monotonic()
        self._stamp = _stamp(settings)
        self._context = server_context(settings)

    def wrap(self, connection: socket.socket) -> PromptTLSSocket:
        """Return the connection under TLS, before its handshake."""
        wrapped: Any = self._current().wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        )
        assert isinstance(wrapped, PromptTLSSocket)
        return wrapped

    def _current(self) -> ssl.SSLContext:
        with self._lock:
            now = time.monotonic()
            if now - self._looked_at >= LOOK_S:
                self._looked_at = now
                self._renew()
            return self._context

    def _renew(self) -> None:
        stamp = _stamp(self._settings)
        if stamp == self._stamp:
            return
        try:
            self._context = server_context(self._settings)
        except ConfigError as exc:
            # Perhaps the key is still to come; the next look tells.
            logger.error("certificate not renewed", extra={"reason": str(exc)})
        else:
            self._stamp = stamp
            logger.info("certificate renewed", extra={"file": str(self._settings.certificate)})


def server_context(settings: TLSSettings) -> ssl.SSLContext:
    """Return the context in which peers are answered.

    Raises
    ------
    ConfigError
        If a file cannot be used, or our certificate has expired. The message names the key.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, settings)
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    if settings.client_ca is not None:
        required = settings.require_client_certificate
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    # RFC 9325 3.4: resumption would keep a peer whose authority we no longer trust.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def client_context(settings: TLSSettings, peer: Peer) -> ssl.SSLContext:
    """Return the context in which we call a peer; our certificate is shown to it.

    Its certificate must carry its host or `certificate_name`, unless it is one of
    `certificate_sha256`, which `accepts` looks at.

    Raises
    ------
    ConfigError
        As for `server_context`.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, settings)
    context.check_hostname = not peer.certificate_sha256
    return context


def accepts(peer: Peer, certificate: Certificate | None) -> bool:
    """Whether a peer may show that certificate, which is of a trusted authority."""
    if peer.certificate_sha256:
        if certificate is None or certificate.sha256 not in peer.certificate_sha256:
            return False
    if peer.certificate_name:
        wanted = peer.certificate_name.lower()
        return certificate is not None and wanted in (name.lower() for name in certificate.names)
    return True


def certificate_of(connection: socket.socket) -> Certificate | None:
    """Return what the peer's certificate says; None without TLS, or without a certificate."""
    if not isinstance(connection, ssl.SSLSocket):
        return None
    der, said = connection.getpeercert(binary_form=True), connection.getpeercert()
    if not der or not said:
        return None
    subject: list[tuple[str, str]] = [pair for part in _pairs(said, "subject") for pair in part]
    names = [value for kind, value in _pairs(said, "subjectAltName") if kind == "DNS"]
    common = [value for key, value in subject if key == "commonName"]
    return Certificate(
        ",".join(f"{key}={value}" for key, value in subject),
        hashlib.sha256(der).hexdigest(),
        tuple(names or common),
    )


def expiry(path: Path) -> datetime:
    """Return when the first certificate of a PEM file expires.

    Raises
    ------
    OSError, ValueError
        If it cannot be read, or is none.
    """
    pem = path.read_text(encoding="latin-1")  # beside PEM there may be any text
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    if begin not in pem or end not in pem:
        raise ValueError("no PEM certificate")
    first = pem[pem.index(begin) : pem.index(end) + len(end)]
    return _not_after(ssl.PEM_cert_to_DER_cert(first))


def reason_of(exc: OSError) -> str:
    """Return why a handshake failed, in a few words without data of the peer."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"certificate: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError) and exc.reason:
        return str(exc.reason).replace("_", " ").lower()
    return "no answer in time" if isinstance(exc, TimeoutError) else "connection lost"


def _context(protocol: int, settings: TLSSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.sslsocket_class = PromptTLSSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    certificate, key = settings.certificate, settings.key
    if certificate is None:
        raise ConfigError("tls.certificate: missing")
    _readable("certificate", certificate)
    if key is not None:
        _readable("key", key)
    try:
        # A password, so that OpenSSL does not ask the terminal for the one of an encrypted key.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as exc:
        raise ConfigError(f"tls.{_culprit(certificate, exc)}: {_problem(exc)}") from exc
    try:
        until = expiry(certificate)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"tls.certificate: {certificate}: {_problem(exc)}") from exc
    if until < datetime.now(UTC):
        raise ConfigError(f"tls.certificate: {certificate}: expired on {until:%Y-%m-%d}")
    if settings.client_ca is not None:
        _readable("client_ca", settings.client_ca)
        try:
            context.load_verify_locations(settings.client_ca)
        except (OSError, ValueError) as exc:
            raise ConfigError(f"tls.client_ca: {settings.client_ca}: {_problem(exc)}") from exc
    return context


def _readable(key: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"tls.{key}: {path}: {exc.strerror}") from exc


def _culprit(certificate: Path, exc: Exception) -> str:
    """Which of the two keys to blame."""
    reason = getattr(exc, "reason", "")
    if reason == "KEY_VALUES_MISMATCH":
        return "key"
    if reason in ("EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
        return "certificate"
    try:
        expiry(certificate)
    except (OSError, ValueError):
        return "certificate"
    return "key"


def _problem(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError):
        known = {
            "KEY_VALUES_MISMATCH": "it is not the key of tls.certificate",
            "EE_KEY_TOO_SMALL": "its key is too short",
            "CA_MD_TOO_WEAK": "its signature is too weak",
        }
        return known.get(exc.reason or "", "not a PEM file that can be used (encrypted?)")
    return str(exc)


def _stamp(settings: TLSSettings) -> tuple[tuple[int, int, int] | None, ...]:
    """What changes when one of the files does."""
    stamps = []
    for path in (settings.certificate, settings.key, settings.client_ca):
        try:
            stat = os.stat(path) if path is not None else None
        except OSError:
            stat = None
        stamps.append(stat and (stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(stamps)


def _pairs(said: Any, key: str) -> Any:
    return said.get(key, ())


def _not_after(der: bytes) -> datetime:
    """Return notAfter of a certificate, RFC 5280 4.1: the standard library does not tell."""
    try:
        certificate = _values(_values(der)[0][1])
        fields = _values(certificate[0][1])
        if fields[0][0] == 0xA0:  # [0] version
            fields = fields[1:]
        tag, text = _values(fields[3][1])[1]  # serial, signature, issuer, validity
        form = "%y%m%d%H%M%SZ" if tag == 0x17 else "%Y%m%d%H%M%SZ"
        parsed = datetime.strptime(text.decode("ascii"), form).replace(tzinfo=UTC)
    except IndexError as exc:
        raise ValueError("no certificate") from exc
    # UTCTime: years 50 to 99 are those of the last century; strptime draws the line at 69.
    return parsed.replace(year=parsed.year - 100) if tag == 0x17 and parsed.year >= 2050 else parsed


def _values(data: bytes) -> list[tuple[int, bytes]]:
    """Return tag and content of each DER value."""
    found, at = [], 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            count = length & 0x7F
            length, at = int.from_bytes(data[at : at + count]), at + count
        found.append((tag, data[at : at + length]))
        at += length
    return found
