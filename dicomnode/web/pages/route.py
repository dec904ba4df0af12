"""What all pages share: who looks, forms, and errors that people can read."""

import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials
from starlette.exceptions import HTTPException

from dicomnode.errors import ConfigError, NodeError
from dicomnode.web import look
from dicomnode.web.access import Caller, address_of, bearer
from dicomnode.web.part import part_of
from dicomnode.web.problem import Problem

FORM_TYPE = "application/x-www-form-urlencoded"
FIELD = "form"  # of a form: proof that it is one of ours
MAX_FIELDS = 20
HEADING = {
    400: "That cannot be read",
    401: "Sign in",
    403: "Not allowed",
    404: "Not found",
    422: "That is not right",
    429: "Too many failed attempts",
    503: "Not available now",
}


class PageRoute(APIRoute):
    """A route whose errors are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await answer(request)
            except SignInFirst as exc:
                return RedirectResponse(exc.address, 303)
            except (HTTPException, RequestValidationError, NodeError, ConfigError) as exc:
                return await _refused(request, exc)

        return handler


class SignInFirst(Exception):
    """Nobody says who asks: not a refusal, the page to sign in is shown."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        # Paths of pages hold UIDs and keys, never a patient; queries are left out.
        path = request.url.path if request.method == "GET" else "/"
        self.address = "/sign-in" + (f"?{urlencode({'next': path})}" if path != "/" else "")


Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


def pages() -> APIRouter:
    """Return a router for pages."""
    return APIRouter(route_class=PageRoute, include_in_schema=False)


async def visitor(request: Request, credentials: Bearer) -> Caller:
    """Return who looks at a page."""
    return _caller(request, credentials, by_form=False)


async def posted(request: Request, credentials: Bearer) -> tuple[Caller, Mapping[str, str]]:
    """Return who sent a form of ours, and what is in it."""
    caller = _caller(request, credentials, by_form=True)
    fields = await fields_of(request)
    whose = caller.part.doorkeeper.form_of(request, caller.holder)
    if not caller.part.doorkeeper.sessions.is_form(fields.get(FIELD, ""), whose):
        raise Problem(403, "the form is not one of this page, or of before you signed in")
    return caller, fields


Visitor = Annotated[Caller, Depends(visitor)]
Posted = Annotated[tuple[Caller, Mapping[str, str]], Depends(posted)]


async def fields_of(request: Request) -> dict[str, str]:
    """Return what is in a form, sent by a page of ours."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Problem(403, "sent by a page of another site")
    origin = request.headers.get("origin")
    # Referrer-Policy lets browsers say `null` of our own pages too; another name is another site.
    if origin not in (None, "null") and urlsplit(origin).netloc != request.headers.get("host"):
        raise Problem(403, "sent by a page of another site")
    if request.headers.get("content-type", "").partition(";")[0].strip() != FORM_TYPE:
        raise Problem(415, "expected a form")
    try:
        text = (await request.body()).decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except ValueError:
        raise Problem(400, "expected a form") from None
    return dict(pairs)


def show(
    request: Request, caller: Caller, template: str, status: int = 200, **values: Any
) -> HTMLResponse:
    """Return a page for somebody who signed in."""
    doorkeeper = caller.part.doorkeeper
    form = doorkeeper.sessions.form(doorkeeper.form_of(request, caller.holder))
    page = look.render(
        template,
        user=caller.holder.name,
        role=caller.holder.role,
        may_sign_out=doorkeeper.takes_tokens,
        form=form,
        here=request.url.path,
        **values,
    )
    return HTMLResponse(page, status)


def _caller(request: Request, credentials: Bearer, *, by_form: bool) -> Caller:
    part = part_of(request)
    token = credentials.credentials if credentials is not None else None
    if part.doorkeeper.takes_tokens and not part.doorkeeper.may_ask(request, token):
        raise SignInFirst(request)
    holder = part.doorkeeper.holder(request, token, by_form=by_form)
    request.state.user = holder.name
    return Caller(holder, address_of(request), part)


async def _refused(request: Request, exc: Exception) -> Response:
    """Return an error as a page; which status it has and what it says, REST answers too."""
    handlers = request.app.exception_handlers
    handler = next(handlers[kind] for kind in type(exc).__mro__ if kind in handlers)
    answer = await handler(request, exc)
    said = json.loads(answer.body)
    page = look.render(
        "error.html",
        heading=HEADING.get(answer.status_code, "Something went wrong"),
        detail=said["detail"],
        status=answer.status_code,
        user=getattr(request.state, "user", None),
        here="",
    )
    headers = {k: v for k, v in answer.headers.items() if k in ("retry-after", "www-authenticate")}
    return HTMLResponse(page, answer.status_code, headers)
