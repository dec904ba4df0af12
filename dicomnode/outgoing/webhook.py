"""One HTTP POST of a notice: signed, bounded in time, nothing of the answer but its status."""

import contextlib
import email.utils
import hashlib
import hmac
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from dicomnode.errors import ConfigError, TransientError
from dicomnode.scp.connection import shut_down

CONNECT_S = 10.0
STALL_S = 30.0  # without a byte
TOTAL_S = 60.0  # whatever the server does
SECRET_BYTES = 16
LONGEST_S = 3600.0  # that a server may ask to be left alone
GONE = 410
SIGNATURE = "Dicomnode-Signature"
DELIVERY = "Dicomnode-Delivery"


class WebhookError(TransientError):
    """A webhook did not take a notice; `after_s` is how long it asks to be left alone."""

    def __init__(self, message: str, *, status: int | None = None, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class Secret:
    """The key that signs."""

    key: bytes

    def __repr__(self) -> str:
        return "Secret()"


def read_secret(path: Path | None) -> Secret | None:
    """Return the key of a file, white space around it aside; None where none is named.

    Raises
    ------
    ConfigError
        If it cannot be read, or is short enough to be guessed.
    """
    if path is None:
        return None
    try:
        key = path.read_bytes().strip()
    except OSError as exc:
        raise ConfigError(f"deliver.webhook_secret_file: {path}: {exc.strerror}") from exc
    if len(key) < SECRET_BYTES:
        raise ConfigError(
            f"deliver.webhook_secret_file: {len(key)} bytes in {path}, {SECRET_BYTES} are the least"
        )
    return Secret(key)


def signature(secret: Secret, body: bytes, at: datetime) -> str:
    """Return the value of the header that signs a body: HMAC-SHA256 of `TIME.BODY`.

    The time is signed with the body, so that who listens can refuse what is old.
    """
    seconds = int(at.timestamp())
    digest = hmac.new(secret.key, b"%d.%b" % (seconds, body), hashlib.sha256).hexdigest()
    return f"t={seconds},v1={digest}"


def post(
    url: str, notice: dict[str, Any], identity: str, secret: Secret | None, now: datetime
) -> None:
    """Tell a webhook.

    Parameters
    ----------
    url : str
        Of the webhook; redirects are not followed.
    notice : dict
        What to tell.
    identity : str
        The same for each repeat of one notice, so that who listens may pass over a repeat.

    Raises
    ------
    WebhookError
        If it answers anything but 2xx, or nothing in time.
    """
    body = json.dumps(notice, separators=(",", ":"), sort_keys=True).encode()
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "dicomnode",
        DELIVERY: identity,
    }
    if secret is not None:
        headers[SIGNATURE] = signature(secret, body, now)
    where = host_of(url)
    try:
        with (
            _client() as client,
            _bounded() as trace,
            # The body of the answer is not read: it is of no use, and may be endless.
            client.stream(
                "POST", url, content=body, headers=headers, extensions={"trace": trace}
            ) as answer,
        ):
            status, after = answer.status_code, answer.headers.get("Retry-After", "")
    except httpx2.TimeoutException as exc:
        raise WebhookError(f"{where} does not answer in time") from exc
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as exc:
        # The message of httpx2 may quote the URL, and that may hold a token.
        raise WebhookError(f"no answer of {where}: {type(exc).__name__}") from exc
    if not 200 <= status < 300:
        raise WebhookError(
            f"{where} answers HTTP {status}", status=status, after_s=_seconds(after, now)
        )


def host_of(url: str) -> str:
    """Return the part of a URL that may be logged: paths and queries hold tokens."""
    return urlsplit(url).netloc


def reach(url: str) -> None:
    """Connect to a webhook's server, with TLS where its URL says so, and send nothing.

    Raises
    ------
    WebhookError
        If it cannot be reached.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    try:
        with socket.create_connection((host, port), CONNECT_S) as connection:
            if parts.scheme == "https":
                context = ssl.create_default_context()
                context.wrap_socket(connection, server_hostname=host).close()
    except ssl.SSLCertVerificationError as exc:
        raise WebhookError(f"{parts.netloc}: certificate: {exc.verify_message}") from exc
    except OSError as exc:
        raise WebhookError(f"no connection to {parts.netloc}: {exc.strerror or exc}") from exc


def _client() -> httpx2.Client:
    # Not of the environment: no proxy and no .netrc that the settings do not name. The
    # authorities are those of the machine, where a hospital puts its own.
    return httpx2.Client(
        verify=ssl.create_default_context(),
        trust_env=False,
        follow_redirects=False,
        timeout=httpx2.Timeout(STALL_S, connect=CONNECT_S),
    )


@contextlib.contextmanager
def _bounded() -> Iterator[Any]:
    """Give what notes the connection, and cut that when the time is over.

    Time-outs of httpx2 are for each read: a server that sends a byte now and then has no bound.
    """
    streams: list[Any] = []

    def trace(event: str, info: dict[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            streams.append(info["return_value"])

    def cut() -> None:
        for stream in streams:
            shut_down(stream.get_extra_info("socket"))

    timer = threading.Timer(TOTAL_S, cut)
    timer.daemon = True
    timer.start()
    try:
        yield trace
    finally:
        timer.cancel()


def _seconds(after: str, now: datetime) -> float:
    """Return what Retry-After says (RFC 9110 10.2.3), 0 where it says nothing, an hour at most."""
    try:
        return max(0.0, min(float(after), LONGEST_S))
    except ValueError:
        pass
    try:
        at = email.utils.parsedate_to_datetime(after)
    except (TypeError, ValueError):
        return 0.0
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(0.0, min((at - now).total_seconds(), LONGEST_S))
