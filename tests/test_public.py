"""The public names are those of `__all__`, and what is public says what it gives back."""

import ast
from pathlib import Path

import pytest

import dicomnode

PACKAGE = Path(dicomnode.__file__).parent
DOCUMENTED = [PACKAGE / "model.py", PACKAGE / "errors.py", *sorted((PACKAGE / "core").glob("*.py"))]

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: list[ast.stmt]) -> list[Definition]:
    """Public functions and classes of a module or class body, those inside classes too."""
    found = [n for n in body if isinstance(n, Definition) and not n.name.startswith("_")]
    inner = [m for n in found if isinstance(n, ast.ClassDef) for m in public(n.body)]
    return found + inner


def test_all_is_sorted():
    assert dicomnode.__all__ == sorted(dicomnode.__all__)


def test_all_is_complete():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    names = {n.name for n in public(body)}
    for node in body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dicomnode"):
            names |= {alias.asname or alias.name for alias in node.names}
    assert set(dicomnode.__all__) == names


@pytest.mark.parametrize("name", dicomnode.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(dicomnode, name).__doc__


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_public_function_and_class_has_a_docstring(path):
    module = ast.parse(path.read_text())
    assert ast.get_docstring(module)
    missing = [
        f"{n.name}, line {n.lineno}" for n in public(module.body) if not ast.get_docstring(n)
    ]
    assert not missing
