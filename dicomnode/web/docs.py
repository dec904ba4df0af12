"""The reference of the REST interface at /docs: one page, without scripts, made of its schema."""

from functools import lru_cache
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from dicomnode.web.look import render

router = APIRouter(include_in_schema=False)

METHODS = ("get", "post", "put", "patch", "delete")
COMMON = {"400", "401", "403", "413", "414", "421", "422", "429", "503"}


@router.get("/docs")
def reference(request: Request) -> HTMLResponse:
    """Return the reference as a page."""
    headers = {"Cache-Control": "no-cache"}
    return HTMLResponse(_page(request.app.openapi), headers=headers)


@lru_cache(maxsize=1)
def _page(openapi: Any) -> str:
    schema = openapi()
    operations = [
        {"path": path, "method": method.upper(), **operation}
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
        if method in METHODS
    ]
    by_tag: dict[str, list[dict[str, Any]]] = {}
    for operation in operations:
        by_tag.setdefault(operation["tags"][0], []).append(operation)
    return render(
        "docs.html",
        info=schema["info"],
        tags=by_tag,
        schemas=schema["components"]["schemas"],
        answer=_answer,
        kind=_kind,
        common=COMMON,
    )


def _answer(operation: dict[str, Any]) -> list[str]:
    """Return what a request is answered with: schemas, and media types without one."""
    found = []
    for media_type, content in operation["responses"]["200"].get("content", {}).items():
        found.append(_kind(content["schema"]) if content.get("schema") else media_type)
    return found


def _kind(schema: dict[str, Any]) -> str:
    """Return a schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(_kind(part) for part in schema[several])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(_kind(part) for part in schema["prefixItems"]) + "]"
        return f"list of {_kind(schema.get('items', {}))}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    return str(schema.get("format") or schema.get("type") or "anything")
