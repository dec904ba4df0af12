"""Signing in by a token, and out again."""

import secrets
from typing import Annotated

from fastapi import Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from dicomnode.audit import Act
from dicomnode.web import look
from dicomnode.web.access import address_of
from dicomnode.web.pages.route import FIELD, Posted, fields_of, pages
from dicomnode.web.part import Part, part_of
from dicomnode.web.problem import Problem
from dicomnode.web.session import COOKIE, FORM_COOKIE, FORM_S, SESSION_S, cookie, forget, keep

router = pages()

# A path of this site: not `//host`, which is another one.
PATH = r"^/([A-Za-z0-9][A-Za-z0-9._/-]*)?$"
Next = Annotated[str, Query(max_length=2048, pattern=PATH)]


@router.get("/sign-in")
def form(request: Request, next: Next = "/") -> Response:
    """Return the form to sign in."""
    part = part_of(request)
    if not part.doorkeeper.takes_tokens:
        return RedirectResponse("/", 303)
    return _form(request, part, next)


@router.post("/sign-in")
async def sign_in(request: Request, next: Next = "/") -> Response:
    """Take a token, and let the browser keep a session."""
    part = part_of(request)
    fields = await fields_of(request)
    nonce = cookie(request, FORM_COOKIE) or ""
    if not nonce or not part.doorkeeper.sessions.is_form(fields.get(FIELD, ""), nonce.encode()):
        raise Problem(403, "the form has expired, or cookies are off: try again")
    try:
        holder, kept = part.doorkeeper.sign_in(request, fields.get("token", "").strip())
    except Problem as exc:
        return _form(request, part, next, exc.status_code, exc.detail)
    request.state.user = holder.name
    part.audit.write(Act.SIGNED_IN, user=holder.name, address=address_of(request))
    answer = RedirectResponse(next, 303)
    secure = part.doorkeeper.is_secure(request)
    keep(answer, COOKIE, kept, SESSION_S, secure=secure)
    forget(answer, FORM_COOKIE, secure=secure)
    return answer


@router.post("/sign-out")
def sign_out(request: Request, sent: Posted) -> Response:
    """Let the browser forget its session."""
    caller, _ = sent
    caller.saw(Act.SIGNED_OUT)
    answer = RedirectResponse("/sign-in", 303)
    forget(answer, COOKIE, secure=caller.part.doorkeeper.is_secure(request))
    return answer


def _form(
    request: Request, part: Part, next: str, status: int = 200, problem: str = ""
) -> HTMLResponse:
    nonce = secrets.token_urlsafe(16)
    page = look.render(
        "sign.html",
        form=part.doorkeeper.sessions.form(nonce.encode()),
        next=next,
        problem=problem,
        user=None,
        here="",
    )
    answer = HTMLResponse(page, status)
    keep(answer, FORM_COOKIE, nonce, FORM_S, secure=part.doorkeeper.is_secure(request))
    return answer
