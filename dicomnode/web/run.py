"""Runs the page: one process, uvicorn on a socket of ours."""

import contextlib
import errno
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import uvicorn

from dicomnode import notify
from dicomnode.audit import Act, AuditLog
from dicomnode.config import Settings, WebSettings
from dicomnode.errors import ConfigError
from dicomnode.web import app as application
from dicomnode.web.protocol import MAX_HEAD, protocol

logger = logging.getLogger(__name__)

PORT_S = 15.0  # how long to wait for the port: the page of a node that was killed lets go soon
BACKLOG = 128
STOP_S = 5  # for answers that are on their way
ALIVE_S = 1  # between words to systemd that it is alive, where it asks for them


def run(settings: Settings, stop: threading.Event, listening: socket.socket | None = None) -> None:
    """Serve the page until `stop` is set.

    Parameters
    ----------
    listening
        A socket that listens, in place of one at the address of the settings.

    Raises
    ------
    ConfigError
        If a file or the address cannot be used.
    """
    web = settings.web
    _, app, refusals = application.create(settings)
    context = tls(web)
    listening = listening or _listen(web, stop)
    if listening is None:
        return
    config = uvicorn.Config(
        app,
        http=protocol(refusals.tell),
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,  # addresses and queries are for the audit log, in its words
        proxy_headers=False,  # who is at the other end is told by the socket alone
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_graceful_shutdown=STOP_S,
        callback_notify=_alive,
        timeout_notify=ALIVE_S,
        ssl_context_factory=(lambda config, default: context) if context is not None else None,
    )
    server = _Server(config)
    threading.Thread(target=_stop_with, args=(stop, server), daemon=True).start()
    host, port = listening.getsockname()[:2]
    kind = "https" if context else "http"
    if context is None and not web.is_local and not web.user_header:
        logger.warning("page without TLS", extra={"host": host})
    logger.info("page started", extra={"url": f"{kind}://{_shown(host)}:{port}"})
    audit = AuditLog(settings.audit_log)
    audit.write(Act.STARTED, part="web")
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
        audit.write(Act.STOPPED, part="web")
        audit.close()


class _Server(uvicorn.Server):
    """Stops when it is told to, not by signals, which are the command line's."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that it is up, once it is."""
        await super().startup(sockets)
        notify.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals as they are."""
        yield


async def _alive() -> None:
    notify.alive()


def _stop_with(stop: threading.Event, server: uvicorn.Server) -> None:
    stop.wait()
    notify.stopping()
    server.should_exit = True


def _listen(web: WebSettings, stop: threading.Event) -> socket.socket | None:
    """Return the socket that listens; None where `stop` was set before it could be had."""
    deadline = time.monotonic() + PORT_S
    while not stop.is_set():
        try:
            return bind(web)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ConfigError(f"web.host, web.port: {web.host}:{web.port}: {exc}") from exc
        stop.wait(0.2)
    return None


def bind(web: WebSettings) -> socket.socket:
    """Return a socket that listens at the address of the settings; raises OSError."""
    family = socket.AF_INET6 if ":" in web.host else socket.AF_INET
    return socket.create_server((web.host, web.port), family=family, backlog=BACKLOG)


def tls(web: WebSettings) -> ssl.SSLContext | None:
    """Return what HTTPS is spoken with, None where it is HTTP.

    Raises
    ------
    ConfigError
        If the certificate or its key cannot be used.
    """
    if web.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(web.certificate, web.key)
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        raise ConfigError(f"web.certificate, web.key: {exc}") from exc
    return context


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
