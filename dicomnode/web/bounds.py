"""What a request may be: its host, its length, its time; and what every answer carries.

The outermost layer, as plain ASGI, so that nothing is read or computed for a request that is out
of bounds. What is refused, here or within, goes to the audit log; neither path nor query does:
people paste patients into both.
"""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dicomnode.audit import MINOR_FAILURE, Act, AuditLog
from dicomnode.log import Seldom
from dicomnode.web.limits import Allowance
from dicomnode.web.problem import Problem

logger = logging.getLogger(__name__)

MAX_TARGET = 8192  # bytes of path and query
MAX_HEADERS = 16 << 10
MAX_BODY = 64 << 10
BODY_S = 10.0  # for the whole body to arrive
SEND_S = 60.0  # for each piece of an answer to be taken
REFUSED = frozenset({400, 401, 403, 404, 405, 408, 413, 414, 415, 421, 422, 429, 431})
# Refusals of one address that are audited one by one; further ones are counted.
ONE_BY_ONE, ONE_MORE_S = 30, 2.0
COUNTED_S = 60.0

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Refusals:
    """Writes what is refused to the audit log, thinned out where it comes in masses."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._allowance = Allowance(ONE_BY_ONE, ONE_MORE_S)
        self._seldom = Seldom(COUNTED_S)

    def tell(
        self, address: str, status: int, route: str | None = None, user: str | None = None
    ) -> None:
        """Record a refusal; of an address that causes many, how many."""
        if status != 429 and self._allowance.take(address):
            count = 1
        else:
            count = self._seldom.due((address, status))
        if count:
            act = Act.SIGN_IN_REFUSED if status in (401, 429) else Act.REQUEST_REFUSED
            data = {"status": status, "route": route, "user": user, "address": address}
            self._audit.write(act, MINOR_FAILURE, **data, count=count if count > 1 else None)


class _NotTaken(Exception):
    """The other end reads no more."""


class Bounds:
    """Holds requests to their bounds, and answers to theirs."""

    def __init__(self, app: ASGIApp, names: Iterable[str], refusals: Refusals) -> None:
        self.app = app
        self._names = {"localhost", socket.gethostname().lower(), *names}
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; pass on the start and the end of the server."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
                self._tell(scope, message["status"])
            try:
                async with asyncio.timeout(SEND_S):
                    await send(message)
            except TimeoutError:
                raise _NotTaken from None

        try:
            problem = self._judge(scope)
            if problem is None:
                await self.app(scope, _bounded(receive), answer)
                return
        except _NotTaken:  # nothing more to say: the server closes the connection
            return
        except Problem as exc:  # of the body, while it was read
            problem = exc
        except Exception:  # must not end the server
            logger.exception("request failed", extra={"route": _route(scope)})
            problem = Problem(500, "see the log of the node")
        if not started:
            await problem.response()(scope, receive, answer)

    def _judge(self, scope: Scope) -> Problem | None:
        """Return why a request is refused before it is looked at, None where it is not."""
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_TARGET:
            return Problem(414, f"path and query have more than {MAX_TARGET} bytes")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            return Problem(431, f"the headers have more than {MAX_HEADERS} bytes")
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        # Else a page of another site, whose name is made to lead here, could read all. Health
        # checks of HTTP/1.0 name no host; a browser always does.
        if len(hosts) > 1 or (hosts and not self._is_ours(hosts[0])):
            return Problem(421, "not a name of this node: [web] names lists them")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > MAX_BODY:
            return Problem(413, f"a body has at most {MAX_BODY} bytes", {"Connection": "close"})
        return None

    def _is_ours(self, host: str) -> bool:
        name, _, port = host.rpartition(":")
        if not port.isdigit():
            name = host
        try:
            # An address is nobody's name: only who knows it asks for it.
            return bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return name.lower().rstrip(".") in self._names

    def _tell(self, scope: Scope, status: int) -> None:
        route, user = _route(scope), scope["state"].get("user")
        honest = status in (404, 422) and user is not None and route is not None
        if status in REFUSED and not honest:  # an honest question was audited as one
            address = scope["client"][0] if scope["client"] else ""
            self._refusals.tell(address, status, route, user)


def _route(scope: Scope) -> str | None:
    """Return the pattern that the path fits, never the path itself."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else None


def _bounded(receive: Receive) -> Receive:
    """Return what gives a body no longer than it may be, in the time that it may take."""
    left = MAX_BODY
    until: float | None = None
    done = False

    async def bounded() -> Message:
        nonlocal left, until, done
        if done:  # now it waits for the caller to go away, as long as the answer takes
            return await receive()
        until = until or asyncio.get_running_loop().time() + BODY_S
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise Problem(408, "the body took too long", {"Connection": "close"}) from None
        left -= len(message.get("body", b""))
        if left < 0:
            raise Problem(413, f"a body has at most {MAX_BODY} bytes", {"Connection": "close"})
        done = not message.get("more_body", False)
        return message

    return bounded
