"""Errors as application/problem+json (RFC 9457): what went wrong, in a form programs can read.

Nothing that a caller sent is repeated, but for the excerpt that shows where an expression, asked
by that caller, cannot be read.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dicomnode.errors import (
    ConfigError,
    ExpressionError,
    ObjectError,
    RegionError,
    StoreUnavailable,
)
from dicomnode.log import Seldom

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_S = 5
TOLD_S = 60.0  # between lines of the log that say the same
TITLES = {
    400: "the request cannot be read",
    401: "sign in",
    403: "not allowed",
    404: "not found",
    405: "no such method here",
    408: "the request took too long to arrive",
    409: "there is no such object",
    413: "the body is too long",
    414: "the address is too long",
    415: "not a media type that is read here",
    421: "another host was asked for",
    422: "a parameter is wrong",
    429: "too many failed attempts",
    431: "the headers are too long",
    500: "an error of this program",
    503: "not available now",
}
# How a database says that a statement was stopped for its time: SQLite, Postgres.
STOPPED = ("interrupted", "statement timeout")

_seldom = Seldom(TOLD_S)


class Problem(HTTPException):
    """An answer that is no success; handlers raise it, and what reads the body for them."""

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.members = members

    def response(self) -> JSONResponse:
        """Return it as a response."""
        return response(self.status_code, self.detail, self.headers, **self.members)


def response(
    status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any
) -> JSONResponse:
    """Return a problem as a response."""
    body = {"type": "about:blank", "title": TITLES.get(status, "refused"), "status": status}
    return JSONResponse(
        body | {"detail": detail} | members,
        status,
        headers={"Cache-Control": "no-store", **(headers or {})},
        media_type=MEDIA_TYPE,
    )


def install(app: FastAPI) -> None:
    """Let an application answer every error as a problem."""
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(ExpressionError, _expression)
    app.add_exception_handler(RegionError, _region)
    app.add_exception_handler(ObjectError, _object)
    app.add_exception_handler(StoreUnavailable, _unavailable)
    app.add_exception_handler(ConfigError, _unavailable)
    app.add_exception_handler(Exception, _error)


async def _problem(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, Problem)
    return exc.response()


async def _http(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, HTTPException)
    detail = "nothing is at this address" if exc.status_code == 404 else str(exc.detail)
    return response(exc.status_code, detail, exc.headers)


async def _validation(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestValidationError)
    # Without `input` and `ctx`, which repeat what was sent.
    errors = [
        {"where": ".".join(str(part) for part in error["loc"]), "message": error["msg"]}
        for error in exc.errors()
    ]
    return response(422, "; ".join(f"{e['where']}: {e['message']}" for e in errors), errors=errors)


async def _expression(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, ExpressionError)
    excerpt = str(exc).removeprefix(exc.message + "\n")
    return response(422, exc.message, position=exc.position, excerpt=excerpt)


async def _region(request: Request, exc: Exception) -> JSONResponse:
    return response(422, str(exc))


async def _object(request: Request, exc: Exception) -> JSONResponse:
    return response(409, str(exc))


async def _unavailable(request: Request, exc: Exception) -> JSONResponse:
    reason = str(exc)
    if any(word in reason for word in STOPPED):
        return response(503, "the question took too long: narrow it", {"Retry-After": "60"})
    if count := _seldom.due("database"):
        logger.warning("page waits", extra={"reason": reason, "count": count})
    retry = {"Retry-After": str(RETRY_S)}
    if isinstance(exc, ConfigError):
        return response(503, "the database is not one of this version", retry)
    return response(503, "the database does not answer", retry)


async def _error(request: Request, exc: Exception) -> JSONResponse:
    return response(500, "see the log of the node")
