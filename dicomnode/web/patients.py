"""Keys that stand for patients in addresses, so that no Patient ID is in a URL, log or history.

A key is the Patient ID and its issuer, encrypted by AES-SIV (RFC 5297): the same patient has the
same key, one key is one patient, and without the secret neither can a key be read nor one be
made. Being reversible, it needs no table to be looked up in. Texts are padded, so that keys of
common lengths do not differ in theirs.
"""

import base64
import binascii
import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from dicomnode.errors import ConfigError
from dicomnode.model import PatientKey

SECRET_BYTES = 64  # two keys of AES-256
BLOCK = 32
MAX_LENGTH = 1024  # characters of a key, of Patient IDs as long as the database takes
PURPOSE = b"dicomnode patient key 1"


class PatientKeys:
    """Patients to keys and back, by one secret."""

    def __init__(self, secret: bytes) -> None:
        self._cipher = AESSIV(secret)

    @classmethod
    def of(cls, path: Path) -> "PatientKeys":
        """Return those of the secret in a file; see `secret_of`."""
        return cls(secret_of(path))

    def key(self, patient: PatientKey) -> str | None:
        """Return the key of a patient; nobody has none."""
        if not patient.known:
            return None
        parts = [patient.issuer.encode(), patient.patient_id.encode()]
        plain = b"".join(len(part).to_bytes(2) + part for part in parts)
        plain += bytes(-len(plain) % BLOCK)
        sealed = self._cipher.encrypt(plain, [PURPOSE])
        return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()

    def patient(self, key: str) -> PatientKey | None:
        """Return whose key it is, None where it is nobody's."""
        if not key.isascii() or not 0 < len(key) <= MAX_LENGTH:
            return None
        try:
            sealed = base64.b64decode(key + "=" * (-len(key) % 4), altchars=b"-_", validate=True)
            plain = self._cipher.decrypt(sealed, [PURPOSE])
        except (binascii.Error, ValueError, InvalidTag):
            return None
        end = 2 + int.from_bytes(plain[:2])
        start = end + 2
        last = start + int.from_bytes(plain[end:start])
        return PatientKey(plain[start:last].decode(), plain[2:end].decode())


def secret_of(path: Path) -> bytes:
    """Return the secret in a file, which is made where it is not there.

    Raises
    ------
    ConfigError
        If the file cannot be read or made, or is not such a secret.
    """
    try:
        return _secret(path)
    except OSError as exc:
        raise ConfigError(f"web.key_file: {path}: {exc.strerror}") from exc


def _secret(path: Path) -> bytes:
    """Return the secret in a file; of several processes that make it at once, one does."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # for us alone
        try:
            with open(fd, "wb") as file:
                file.write(secrets.token_hex(SECRET_BYTES).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(part, path)  # fails where another process was first, unlike a rename
        finally:
            os.unlink(part)
    try:
        secret = bytes.fromhex(path.read_text(encoding="ascii"))
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise ConfigError(
            f"web.key_file: {path}: expected {SECRET_BYTES} bytes in hexadecimal, "
            f"as `openssl rand -hex {SECRET_BYTES}` makes them"
        )
    return secret
