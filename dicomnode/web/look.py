"""What pages are made of: templates, style sheets and scripts, all in this package."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from starlette.responses import FileResponse

from dicomnode.web import words
from dicomnode.web.problem import Problem

router = APIRouter(include_in_schema=False)

HERE = Path(__file__).parent
STATIC = HERE / "static"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@cache
def files() -> dict[str, Path]:
    """Return name -> file of all that is served as it is; none is found by a path of a caller's."""
    found = [path for path in STATIC.rglob("*") if path.suffix in TYPES]
    return {path.relative_to(STATIC).as_posix(): path for path in found}


@cache
def address(name: str) -> str:
    """Return where a file is served, with its digest: a browser may keep it until that changes."""
    digest = hashlib.sha256(files()[name].read_bytes()).hexdigest()[:12]
    return f"/static/{name}?v={digest}"


@router.get("/static/{name:path}")
def static(name: str) -> FileResponse:
    """Return one of the files, which are all known by name."""
    path = files().get(name)
    if path is None:
        raise Problem(404, "nothing is at this address")
    headers = {"Cache-Control": "max-age=86400"}
    return FileResponse(path, media_type=TYPES[path.suffix], headers=headers)


def render(template: str, **values: Any) -> str:
    """Return a page."""
    return _environment.get_template(template).render(**values)


def _signed(value: float, digits: int = 1) -> str:
    text = f"{value:+.{digits}f}"
    return _minus(text) if text.strip("+-0.") else "0"  # neither +0 nor -0


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


_environment = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=select_autoescape(),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.globals["static"] = address
_environment.filters["signed"] = _signed
_environment.filters["number"] = lambda value, digits=0: _minus(f"{value:,.{digits}f}")
_environment.filters |= {"stated": words.state, "reason": words.reason, "flag": words.flag}
_environment.filters["day"] = lambda when: f"{when:%Y-%m-%d}" if when else "no date"
