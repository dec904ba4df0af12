"""Regions through the command line: of a bundle, of files, of what a node stored."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dicomnode import weights
from dicomnode.cli import main
from dicomnode.core.region import Limit, Region, Support
from dicomnode.errors import WeightsError
from tests.integration.test_files import FOLLOW_UP, PRIOR, follow_up, prior, write
from tests.integration.test_stages import brightness_bundle


def at(height_mm: float) -> Limit:
    return Limit(Support.LANDMARK, height_mm, 9.0)


TABLE = (
    Region("pelvis", "816092008", "Pelvis", at(-2.5), at(47.5)),
    Region("bladder", "89837001", "Bladder", at(60.0), at(70.0), part="pelvis"),
    Region("chest", "816094009", "Chest", at(37.5), at(87.5)),
    Region("head", "69536005", "Head", at(200.0), Limit(Support.UNSUPPORTED)),
)
# Of slices 5 mm apart: at 0 to 55 mm in the prior, at 20 to 95 mm in the follow-up.
SHARES = {
    PRIOR: {"pelvis": 1.0, "bladder": 0.0, "chest": 0.4},
    FOLLOW_UP: {"pelvis": 0.6, "bladder": 1.0, "chest": 1.0},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    brightness_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(plain, tmp_path_factory) -> Path:
    made = weights.load(plain)
    folder = tmp_path_factory.mktemp("bundle")
    weights.save(
        folder, made.network, name="tabled", spec=made.spec, heights=made.heights, training={},
        regions=TABLE,
    )  # fmt: skip
    return folder


@pytest.fixture
def archive(tmp_path) -> Path:
    write(tmp_path / "archive" / "prior", *prior())
    write(tmp_path / "archive" / "follow-up", *follow_up())
    return tmp_path / "archive"


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def shares(coverage: list[dict[str, Any]]) -> dict[str, float]:
    codes = {r.name: r.code for r in TABLE}
    assert all(codes[c["region"]] == c["code"] for c in coverage)
    return {c["region"]: pytest.approx(c["fraction"], abs=0.01) for c in coverage}


def test_a_bundle_carries_its_regions(plain, bundle):
    assert weights.load(bundle).regions == TABLE
    assert weights.load(plain).regions == ()
    assert weights.load(bundle).digest != weights.load(plain).digest


def test_a_bundle_with_a_bad_table_is_refused(bundle, tmp_path):
    for name in (weights.WEIGHTS, weights.MANIFEST):
        (tmp_path / name).write_bytes((bundle / name).read_bytes())
    manifest = json.loads((tmp_path / weights.MANIFEST).read_text())
    manifest["regions"][2]["low_mm"] = "near the top"
    (tmp_path / weights.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match=r"manifest.json: regions\[2\] \(chest\): low_mm"):
        weights.load(tmp_path)
    assert "regions[2] (chest)" in call("regions", "--model", tmp_path, code=2)


def test_regions_are_listed(bundle):
    assert json.loads(call("regions", "--model", bundle, "--json")) == [r.to_dict() for r in TABLE]
    lines = call("regions", "--model", bundle).splitlines()
    assert lines[1].split() == [
        "pelvis", "SCT", "816092008", "Pelvis", "-2", "9", "48", "9", "landmark",
    ]  # fmt: skip
    assert lines[2].startswith("  bladder")
    assert lines[4].split()[-6:] == ["200", "9", "-", "-", "landmark,", "unsupported"]


def test_a_bundle_without_regions_lists_none_and_covers_nothing(plain, archive):
    assert "brightness has no regions" in call("regions", "--model", plain, code=1)
    scored = json.loads(call("score", archive, "--model", plain, "--json"))
    assert [s["coverage"] for s in scored] == [[], []]


def test_files_are_scored_with_their_coverage(archive, bundle):
    scored = json.loads(call("score", archive, "--model", bundle, "--json"))
    assert {s["series_uid"]: shares(s["coverage"]) for s in scored} == SHARES
    text = call("score", archive, "--model", bundle)
    assert "covers pelvis" in text and "covers pelvis and chest" in text


def test_a_node_tells_the_coverage_of_what_it_stored(archive, bundle, tmp_path):
    config = tmp_path / "node.toml"
    config.write_text(
        f'[spool]\npath = "{tmp_path}/spool"\nreserve_bytes = 0\n'
        f'[database]\nurl = "sqlite:///{tmp_path}/node.sqlite"\n'
        f'[score]\nmodel = "{bundle}"\ndevice = "cpu"\n'
        "[series]\nquiet_seconds = 0\n"
    )
    call("import", archive, "--config", config)
    rows = json.loads(call("series", "--config", config, "--json"))
    assert {r["series_uid"]: shares(r["coverage"]) for r in rows} == SHARES
    text = call("series", "--config", config)
    assert "covers" in text.splitlines()[0] and "pelvis, chest" in text
    stored = json.loads(call("curve", PRIOR, "--config", config, "--json"))
    assert shares(stored["coverage"]) == SHARES[PRIOR]
    assert "covers pelvis" in call("curve", PRIOR, "--config", config)
    listed = json.loads(call("regions", "--config", config, "--json"))
    assert [r["name"] for r in listed] == [r.name for r in TABLE]
