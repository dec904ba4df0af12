"""Imports point down the layers of `ARCHITECTURE.md`; read from the source, nothing is run."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dicomnode", "db", "training")

# Lowest first. A name of `dicomnode` without its package; "" is `dicomnode/__init__.py`.
LAYERS = (
    ("errors", "model"),
    ("core",),
    ("config", "log", "audit", "notify", "db"),
    (
        "dicomio",
        "spool",
        "manifest",
        "weights",
        "device",
        "mining",
        "store",
        "objects",
        "scp",
        "held",
        "rules",
        "scu",
        "outgoing",
        "hl7",
    ),
    ("node",),
    ("query", "files", "backfill", "rescore", "plot", "present", "bpreg", "export"),
    ("web",),
    ("client", "checks"),
    ("cli", "demo", "", "__main__"),
)
FOR_TRAINING = ("errors", "model", "core", "dicomio", "manifest", "weights")
IMPORTS_TORCH = (
    "dicomnode.core.batches",
    "dicomnode.core.network",
    "dicomnode.weights",
    "dicomnode.device",
    "dicomnode.node.score",
)
HOMELESS = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def name_of(path: Path) -> str:
    """`dicomnode/node/score.py` -> `dicomnode.node.score`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}
# Packages without an `__init__.py` of their own, such as a folder of migrations.
KNOWN = {".".join(m.split(".")[:n]) for m in MODULES for n in range(1, m.count(".") + 2)}


def imported(node: ast.AST, module: str) -> Iterator[str]:
    """Names that one statement imports, submodules by their full name."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module}, line {node.lineno}: relative import"
        assert node.module is not None
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in KNOWN else node.module


def imports(module: str) -> set[str]:
    """All that a module imports, inside functions too."""
    tree = ast.parse(MODULES[module].read_text())
    return {name for node in ast.walk(tree) for name in imported(node, module)}


def imports_at_start(module: str) -> set[str]:
    """What a module imports when it is itself imported."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from statements(node.orelse)
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node
                for part in ("body", "orelse", "finalbody"):
                    yield from statements(getattr(node, part, []))
                for handler in getattr(node, "handlers", []):
                    yield from statements(handler.body)

    tree = ast.parse(MODULES[module].read_text())
    return {name for node in statements(tree.body) for name in imported(node, module)}


def of(package: str) -> list[str]:
    return [m for m in MODULES if m == package or m.startswith(f"{package}.")]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer(name: str) -> int:
    """The layer of a module of `dicomnode` or `db`, counted from the lowest."""
    parts = name.split(".")
    key = "db" if parts[0] == "db" else parts[1] if len(parts) > 1 else ""
    (found,) = [i for i, members in enumerate(LAYERS) if key in members] or [None]
    assert found is not None, f"{name} has no layer; give it one in LAYERS and ARCHITECTURE.md"
    return found


@pytest.mark.parametrize("module", of("dicomnode") + of("db"))
def test_imports_point_down(module):
    own = layer(module)
    for name in sorted(imports(module)):
        if within(name, "dicomnode") or within(name, "db"):
            assert layer(name) <= own, f"{module} imports {name}, which lies above it"


RUNNERS = ("dicomnode.node.serve", "dicomnode.node.exchange")


@pytest.mark.parametrize("module", [m for m in of("dicomnode.node") if m not in RUNNERS])
def test_stages_do_not_import_each_other(module):
    others = {n for n in imports(module) if n.startswith("dicomnode.node.") and n != module}
    assert not others


@pytest.mark.parametrize("module", of("training"))
def test_training_imports_only_what_the_node_shares_with_it(module):
    for name in imports(module):
        if within(name, "dicomnode"):
            assert any(within(name, f"dicomnode.{part}") for part in FOR_TRAINING), name
        assert not within(name, "db")


@pytest.mark.parametrize("module", of("dicomnode"))
def test_the_node_does_not_import_training(module):
    assert not [n for n in imports(module) if within(n, "training")]


@pytest.mark.parametrize("module", of("db"))
def test_the_database_knows_neither_node_nor_training(module):
    assert not [n for n in imports(module) if within(n, "dicomnode") or within(n, "training")]


@pytest.mark.parametrize("module", of("dicomnode") + of("db"))
def test_only_these_import_torch_when_they_are_imported(module):
    torch = {n for n in imports_at_start(module) if within(n, "torch")}
    assert not torch or module in IMPORTS_TORCH


@pytest.mark.parametrize("module", of("dicomnode.core"))
def test_the_core_has_no_door_outwards(module):
    doors = {"os", "sys", "io", "pathlib", "socket", "time", "logging", "subprocess", "threading"}
    assert not {n.split(".")[0] for n in imports(module)} & doors


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_home_of_its_own(module):
    assert not set(module.split(".")) & HOMELESS


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("dicomnode", {"torch", "sqlalchemy", "pydicom", "SimpleITK", "matplotlib"}),
        ("dicomnode.cli", {"torch"}),
        ("dicomnode.node.receive", {"torch", "sqlalchemy"}),
        ("dicomnode.node.exchange", {"torch"}),
        ("dicomnode.web.run", {"torch", "matplotlib", "SimpleITK", "pyarrow"}),
        ("dicomnode.client", {"torch", "fastapi", "sqlalchemy", "pydicom"}),
    ],
)
def test_a_process_starts_without_what_it_does_not_need(module, unwanted):
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert module in loaded
    assert not unwanted & set(loaded)
