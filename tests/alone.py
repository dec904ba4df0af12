"""Runs Python in processes of their own, some as if hardly anything were installed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What is not the standard library, numpy, torch, click or what torch itself is installed with is
# not there for this process.
ALONE = """
import runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

THERE = {"numpy", "torch", "click", "dicomnode", "training", "benchmarks"}
TORCHS = {"torchgen", "functorch", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2",
          "markupsafe", "fsspec", "filelock", "triton", "nvidia", "cuda"}

class Alone(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        standard = top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        if standard or top in THERE | TORCHS:
            return super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Alone]
try:
    import pydicom
except ModuleNotFoundError:
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def call(*command: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the interpreter on one thread, and check how it ends."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, done.stderr
    return done
