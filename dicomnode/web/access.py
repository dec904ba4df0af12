"""Who asks: signed in by a token, by a reverse proxy that is believed, or on this very machine.

Reads of patient data are written to the audit log here, by the caller that they are for.
"""

import ipaddress
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from dicomnode.audit import Act
from dicomnode.config import WebSettings
from dicomnode.web.limits import Allowance
from dicomnode.web.part import Part, part_of
from dicomnode.web.problem import Problem
from dicomnode.web.session import COOKIE, Sessions, cookie
from dicomnode.web.tokens import Holder, Role, Tokens, digest_of

# Failed attempts of one address: these are audited one by one, further ones answered 429 and
# counted. A right token is let in all the same: tokens of 256 bits are not found by trying, and
# one client with an old token must not lock out its neighbours behind the same address.
FAILURES, FAILURE_S = 10, 6.0
MAX_NAME = 200

# What a session may do by itself: all else takes a form of ours, or the token.
SAFE = ("GET", "HEAD")

# What a reverse proxy adds. Where nobody has to sign in, such a request comes from elsewhere.
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")

bearer = HTTPBearer(auto_error=False, description="A token made by `dicomnode token`.")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and from where."""

    holder: Holder
    address: str
    part: Part

    def saw(self, act: Act = Act.QUERY, **data: Any) -> None:
        """Write to the audit log what is about to be shown. Never a patient attribute."""
        self.part.audit.write(act, user=self.holder.name, address=self.address, **data)


class Doorkeeper:
    """Finds out who asks."""

    def __init__(self, settings: WebSettings, sessions: Sessions) -> None:
        self.sessions = sessions
        self._tokens = Tokens(settings.token_file) if settings.token_file else None
        self._header = settings.user_header
        self._proxies = [ipaddress.ip_network(network) for network in settings.proxies]
        self._admins = frozenset(settings.admins)
        self._failures = Allowance(FAILURES, FAILURE_S)

    @property
    def is_open(self) -> bool:
        """Whether everybody on this machine may read without a token."""
        return self._tokens is None and self._header is None

    @property
    def takes_tokens(self) -> bool:
        """Whether one may sign in by a token."""
        return self._tokens is not None

    def holder(self, request: Request, token: str | None, *, by_form: bool = False) -> Holder:
        """Return who asks.

        Parameters
        ----------
        by_form
            Whether the request came by a form of ours, so that a session may change something.

        Raises
        ------
        Problem
            If that is nobody who may.
        """
        address = address_of(request)
        named = request.headers.getlist(self._header) if self._header else []
        # First: a proxy that has signed somebody in may pass on a token of its own as well.
        if named and self._is_proxy(address):
            return self._of_header(named, address)
        if token is not None:
            holder = self._tokens.holder(token) if self._tokens is not None else None
            if holder is None:
                raise self._refusal(address, "the token is not known")
            return holder
        if (by_form or request.method in SAFE) and (found := self._of_session(request)):
            return found
        if not self.is_open:
            raise self._refusal(address, "sign in with a token: Authorization: Bearer TOKEN")
        if any(name in request.headers for name in FORWARDED):
            raise Problem(403, "through a proxy it needs token_file or user_header")
        # A page of another site, opened in a browser on this machine, is not a user of it.
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Problem(403, "asked for by a page of another site")
        return Holder("local", Role.READ)

    def sign_in(self, request: Request, token: str) -> tuple[Holder, str]:
        """Return whose token it is, and what the browser is to keep.

        Raises
        ------
        Problem
            If it is nobody's.
        """
        holder = self._tokens.holder(token) if self._tokens is not None else None
        if holder is None:
            raise self._refusal(address_of(request), "the token is not known")
        return holder, self.sessions.begin(digest_of(token))

    def may_ask(self, request: Request, token: str | None) -> bool:
        """Whether somebody asks who says who that is, or need not."""
        named = self._header is not None and self._header in request.headers
        return self.is_open or named or token is not None or self._of_session(request) is not None

    def form_of(self, request: Request, holder: Holder) -> bytes:
        """Return what forms for this caller are bound to."""
        session = self.sessions.session(cookie(request, COOKIE))
        return (session.nonce if session else b"") + holder.name.encode()

    def is_secure(self, request: Request) -> bool:
        """Whether the browser speaks TLS, to this node or to a proxy that is believed."""
        proxied = self._is_proxy(address_of(request))
        told = request.headers.get("x-forwarded-proto") if proxied else None
        return (told or request.url.scheme) == "https"

    def _of_session(self, request: Request) -> Holder | None:
        session = self.sessions.session(cookie(request, COOKIE))
        if session is None or self._tokens is None:
            return None
        return self._tokens.holder_of(session.digest)

    def _of_header(self, values: Sequence[str], address: str) -> Holder:
        name = values[0].strip() if len(values) == 1 else ""
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise self._refusal(address, "the proxy does not name one user")
        return Holder(name, Role.ADMIN if name in self._admins else Role.READ)

    def _is_proxy(self, address: str) -> bool:
        try:
            return any(ipaddress.ip_address(address) in network for network in self._proxies)
        except ValueError:
            return False

    def _refusal(self, address: str, detail: str) -> Problem:
        if not self._failures.take(address):
            return Problem(429, "too many failed attempts", {"Retry-After": str(int(FAILURE_S))})
        return Problem(401, detail, {"WWW-Authenticate": 'Bearer realm="dicomnode"'})


def address_of(request: Request) -> str:
    """Return the address at the other end of the connection, which no header can change."""
    return request.client.host if request.client else ""


def signed_in(role: Role) -> Callable[..., Coroutine[Any, Any, Caller]]:
    """Return the dependency that gives who asks, if that one has the role."""

    async def caller(
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> Caller:
        part = part_of(request)
        token = credentials.credentials if credentials is not None else None
        holder = part.doorkeeper.holder(request, token)
        request.state.user = holder.name
        if not holder.role.includes(role):
            raise Problem(403, f"for the role {role} alone")
        return Caller(holder, address_of(request), part)

    return caller


Reader = Annotated[Caller, Depends(signed_in(Role.READ))]
Admin = Annotated[Caller, Depends(signed_in(Role.ADMIN))]
