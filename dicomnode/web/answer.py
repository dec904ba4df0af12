"""Answers: JSON that a caller may keep until it changes, files, and what the routes share."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from dicomnode.web.models import MAX_ID, ProblemFound
from dicomnode.web.problem import MEDIA_TYPE

API = "/api/v1"

# PS3.5 section 9.1: components of digits, 64 characters in all. Two of them at least: digits alone
# may be a Patient ID that somebody asks for by mistake, and UIDs are written to the audit log.
UID = r"^[0-9]+(\.[0-9]+)+$"
KEY = r"^[A-Za-z0-9_-]+$"

SeriesUID = Annotated[
    str, Path(max_length=64, pattern=UID, description="Series Instance UID (0020,000E).")
]
FixedUID = Annotated[
    str, Path(max_length=64, pattern=UID, description="Study Instance UID of the fixed Study.")
]
MovingUID = Annotated[
    str, Path(max_length=64, pattern=UID, description="Study Instance UID of the moving Study.")
]
Limit = Annotated[int, Query(ge=1, le=1000, description="Of a page.")]
Before = Annotated[
    int | None, Query(ge=1, le=MAX_ID, description="`next` of the page before this one.")
]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return how the errors of a route are documented; every route has some."""
    schema = {"schema": {"$ref": f"#/components/schemas/{ProblemFound.__name__}"}}
    common = {400, 401, 403, 413, 414, 421, 422, 429, 503}
    return {
        status: {"model": ProblemFound, "content": {MEDIA_TYPE: schema}}
        for status in sorted({*common, *statuses})
    }


def tagged(
    request: Request, model: BaseModel, without: Mapping[str, Any] | None = None
) -> Response:
    """Return a model as JSON with an ETag, or 304 where the caller has it already.

    The tag is a weak one (RFC 9110 section 8.8.1), of what the answer means: `without` names
    members that may differ, such as when a number was worked out.
    """
    meaning = model.model_dump_json(exclude=dict(without) if without else None)
    tag = f'W/"{hashlib.sha256(meaning.encode()).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Authorization"}
    if _has(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    return Response(model.model_dump_json(), media_type="application/json", headers=headers)


def plain(model: BaseModel) -> Response:
    """Return a model as JSON."""
    return Response(model.model_dump_json(), media_type=JSONResponse.media_type)


def file(content: bytes, media_type: str, name: str) -> Response:
    """Return bytes to be saved as a file of that name, which is of our own making."""
    disposition = f'attachment; filename="{name}"'
    return Response(content, media_type=media_type, headers={"Content-Disposition": disposition})


def _has(if_none_match: str | None, tag: str) -> bool:
    if if_none_match is None:
        return False
    asked = [part.strip() for part in if_none_match.split(",")]
    return "*" in asked or tag in asked or tag.removeprefix("W/") in asked
