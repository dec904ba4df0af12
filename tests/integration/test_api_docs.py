"""The examples of docs/api.md are run as they stand, and it names what there is."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from dicomnode.web.answer import API
from tests import served
from tests.dicom import PATIENT_ID
from tests.served import FIXED, FIXED_SERIES, MOVING, Page

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    url = f"sqlite:///{folder / 'node.sqlite'}"
    served.make(url)
    with served.page(folder, url) as found:
        yield found


@pytest.mark.parametrize("block", blocks("sh"))
def test_the_examples_for_the_shell_work(page, tmp_path, block):
    if not (shutil.which("curl") and shutil.which("jq")):
        pytest.skip("no curl and jq here")
    given = {
        "NODE": page.url,
        "AUTH": f"Authorization: Bearer {page.tokens['read']}",
        "FIXED": FIXED,
        "MOVING": MOVING,
        "SERIES": FIXED_SERIES,
        "PATIENT_ID": PATIENT_ID,
        "NO_PROXY": "*",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        env={**os.environ, **given},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    files = re.findall(r"-o (\w+\.\w+)", block)
    assert done.stdout or files
    assert all((tmp_path / name).stat().st_size > 0 for name in files)
    if "# 304" in block:
        assert done.stdout.strip() == "304"


def test_the_example_for_python_works(page, capsys):
    (block,) = blocks("python")
    names = {"NODE": page.url, "TOKEN": page.tokens["read"], "FIXED": FIXED, "MOVING": MOVING}
    exec(compile(block, "docs/api.md", "exec"), {**names, "PATIENT_ID": PATIENT_ID})
    told = capsys.readouterr().out
    assert "ok" in told and FIXED_SERIES in told and told.count("SeriesState.CURVE") >= 2


def test_every_address_is_named_in_the_document(page):
    schema = httpx.get(f"{page.url}{API}/openapi.json", trust_env=False).json()
    for path in schema["paths"]:
        if path in (f"{API}/deliveries", f"{API}/regions"):  # in the reference alone
            continue
        shown = re.escape(path)
        for name in re.findall(r"\\\{(\w+)\\\}", shown):
            shown = shown.replace(rf"\{{{name}\}}", r"\$\w+")
        assert re.search(shown, TEXT), path
