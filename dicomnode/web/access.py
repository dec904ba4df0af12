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
from dicomnode.web.tokens import Holder, Role, Tokens

# Failed attempts of one address: these are audited one by one, further ones answered 429 and
# counted. A right token is let in all the same: tokens of 256 bits are not found by trying, and
# one client with an old token must not lock out its neighbours behind the same address.
FAILURES, FAILURE_S = 10, 6.0
MAX_NAME = 200

# What a reverse proxy adds. Where nobody has to sign in, such a request comes from elsewhere.
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")

_bearer = HTTPBearer(auto_error=False, description="A token made by `dicomnode token`.")


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

    def __init__(self, settings: WebSettings) -> None:
        self._tokens = Tokens(settings.token_file) if settings.token_file else None
        self._header = settings.user_header
        self._proxies = [ipaddress.ip_network(network) for network in settings.proxies]
        self._admins = frozenset(settings.admins)
        self._failures = Allowance(FAILURES, FAILURE_S)

    @property
    def is_open(self) -> bool:
        """Whether everybody on this machine may read without a token."""
        return self._tokens is None and self._header is None

    def holder(self, request: Request, token: str | None) -> Holder:
        """Return who asks.

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
        if not self.is_open:
            raise self._refusal(address, "sign in with a token: Authorization: Bearer TOKEN")
        if any(name in request.headers for name in FORWARDED):
            raise Problem(403, "through a proxy it needs token_file or user_header")
        # A page of another site, opened in a browser on this machine, is not a user of it.
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Problem(403, "asked for by a page of another site")
        return Holder("local", Role.READ)

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
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
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
