"""Tokens: who may sign in, and as what, from a file that is read again when it changes.

A line a token: `ROLE NAME SHA-256`, where SHA-256 is the digest of the token in hexadecimal; `#`
begins a comment. The tokens themselves are in no file of ours: they are 256 random bits, made by
`dicomnode token`, so that neither a salt nor a slow hash is needed.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from dicomnode.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between looks whether the file changed
TOKEN_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
DIGEST = re.compile(r"[0-9a-f]{64}")


class Role(StrEnum):
    """What a caller may do; an admin may do all that a reader may."""

    READ = "read"
    ADMIN = "admin"

    def includes(self, other: "Role") -> bool:
        """Whether this role may do what the other may."""
        return self is Role.ADMIN or other is Role.READ


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose token it is."""

    name: str
    role: Role


def line_of(holder: Holder, token: str) -> str:
    """Return the line of the file that lets this token in."""
    return f"{holder.role} {holder.name} {digest_of(token).hex()}\n"


def add(path: Path, holder: Holder) -> str:
    """Append a new token to the file, which is made where it is not there, and return it.

    Raises
    ------
    ConfigError
        If the name is none, is there already, or the file cannot be read or written.
    """
    if not NAME.fullmatch(holder.name):
        raise ConfigError("a name has 1 to 64 letters, digits, '.', '_', '@' or '-'")
    if path.exists() and any(h.name == holder.name for _, h in read(path)):
        raise ConfigError(f"{path}: {holder.name} has a token: take its line out first")
    token = secrets.token_urlsafe(TOKEN_BYTES)
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            end = os.fstat(fd).st_size
            cut = end > 0 and os.pread(fd, 1, end - 1) != b"\n"  # a last line without its end
            os.write(fd, (b"\n" if cut else b"") + line_of(holder, token).encode())
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    return token


def read(path: Path) -> list[tuple[bytes, Holder]]:
    """Return (digest, whose) of each token in a file.

    Raises
    ------
    ConfigError
        If it cannot be read, others may write to it, or a line is none. What is in the line is
        not repeated: it may be a token that was pasted there.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"web.token_file: {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConfigError(f"web.token_file: {path}: not UTF-8") from exc
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"web.token_file: {path}: others may write to it: chmod 600")
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or words[0] not in list(Role) or not NAME.fullmatch(words[1]):
            raise ConfigError(
                f"web.token_file: {path}, line {number}: expected ROLE NAME SHA-256, "
                f"with a role of {' and '.join(Role)}"
            )
        if not DIGEST.fullmatch(words[2].lower()):
            raise ConfigError(
                f"web.token_file: {path}, line {number}: expected the SHA-256 of the token, "
                "64 hexadecimal digits: `dicomnode token` writes it"
            )
        found.append((bytes.fromhex(words[2]), Holder(words[1], Role(words[0]))))
    return found


class Tokens:
    """The tokens of a file, as it is now.

    While it cannot be read, or a line of it is none, no token is let in: what was taken out of
    the file must not live on because of a slip of the pen elsewhere.
    """

    def __init__(self, path: Path, look_s: float = LOOK_S) -> None:
        self.path, self._look_s = path, look_s
        self._lock = threading.Lock()
        self._seen = self._look()  # before it is read: a change meanwhile is seen next time
        self._known = read(path)  # at the start, a file that is none is a wrong setting
        self._looked = time.monotonic()

    def holder(self, token: str) -> Holder | None:
        """Return whose token it is, None where it is nobody's."""
        return self.holder_of(digest_of(token))

    def holder_of(self, digest: bytes) -> Holder | None:
        """Return whose token has this digest, None where it is nobody's."""
        found = None
        for known, holder in self._current():  # all of them: time tells nothing of where it is
            if hmac.compare_digest(known, digest):
                found = holder
        return found

    def _current(self) -> list[tuple[bytes, Holder]]:
        with self._lock:
            if time.monotonic() - self._looked >= self._look_s:
                self._looked = time.monotonic()
                seen = self._look()
                if seen != self._seen:
                    self._seen = seen
                    try:
                        self._known = read(self.path)
                        logger.info("tokens read", extra={"count": len(self._known)})
                    except ConfigError as exc:
                        self._known = []
                        logger.error("tokens not read", extra={"reason": str(exc)})
            return self._known

    def _look(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode


def digest_of(token: str) -> bytes:
    """Return the digest of a token, as the file has it."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
