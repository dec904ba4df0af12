"""Browsers that signed in by a token, and proof that a form was one of ours.

What the browser keeps is sealed by AES-SIV: the digest of the token, a random number and when
that ends. The token itself is in no cookie, and a line taken out of the token file ends each
session of it. Nothing is kept here, so that a restart signs nobody out.
"""

import base64
import binascii
import hmac
import secrets
import time
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from fastapi import Request, Response

SESSION_S = 12 * 3600  # a working day
FORM_S = 3600  # to fill in the form to sign in
SEAL, FORM = b"dicomnode session 1", b"dicomnode form 1"
DIGEST_BYTES = 32
NONCE_BYTES = 16
TIME_BYTES = 8
MAX_LENGTH = 256
COOKIE, FORM_COOKIE = "dicomnode", "dicomnode-form"
HOST = "__Host-"  # a name that browsers take over TLS alone, and from this host alone


@dataclass(frozen=True, slots=True)
class Session:
    """A browser that signed in."""

    digest: bytes  # of its token
    nonce: bytes


class Sessions:
    """Seals sessions and forms, by one secret."""

    def __init__(self, secret: bytes) -> None:
        self._cipher = AESSIV(hmac.digest(secret, SEAL, "sha512"))
        self._form = hmac.digest(secret, FORM, "sha512")

    def begin(self, digest: bytes) -> str:
        """Return what the browser of a token's holder is to keep."""
        until = int(time.time() + SESSION_S).to_bytes(TIME_BYTES)
        sealed = self._cipher.encrypt(digest + secrets.token_bytes(NONCE_BYTES) + until, [SEAL])
        return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()

    def session(self, kept: str | None) -> Session | None:
        """Return the session that a browser kept, None where it is none or has ended."""
        if not kept or not kept.isascii() or len(kept) > MAX_LENGTH:
            return None
        try:
            sealed = base64.b64decode(kept + "=" * (-len(kept) % 4), altchars=b"-_", validate=True)
            plain = self._cipher.decrypt(sealed, [SEAL])
        except (binascii.Error, ValueError, InvalidTag):
            return None
        digest, nonce = plain[:DIGEST_BYTES], plain[DIGEST_BYTES:-TIME_BYTES]
        if int.from_bytes(plain[-TIME_BYTES:]) < time.time():
            return None
        return Session(digest, nonce)

    def form(self, whose: bytes) -> str:
        """Return what a form of somebody carries, which no page of another site can know."""
        return hmac.digest(self._form, whose, "sha256").hex()

    def is_form(self, given: str, whose: bytes) -> bool:
        """Whether a form is one of ours, made for the same."""
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.form(whose).encode())


def cookie(request: Request, name: str) -> str | None:
    """Return what a browser kept under a name."""
    return request.cookies.get(HOST + name) or request.cookies.get(name)


def keep(response: Response, name: str, value: str, seconds: int, *, secure: bool) -> None:
    """Let a browser keep something, out of reach of scripts and of other sites."""
    response.set_cookie(
        HOST + name if secure else name,
        value,
        max_age=seconds,
        path="/",
        secure=secure,
        httponly=True,
        samesite="strict",
    )


def forget(response: Response, name: str, *, secure: bool) -> None:
    """Let a browser keep it no longer."""
    keep(response, name, "", 0, secure=secure)
