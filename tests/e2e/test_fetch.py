"""Catching up with an Orthanc that was not told of us; what comes of asking shows `test_circle`."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from dicomnode import store
from dicomnode.model import FetchState
from tests.e2e import pacs
from tests.e2e.conftest import (
    Node,
    Scan,
    dcmsend,
    eventually,
    need,
    network_namespace,
    run,
    save,
    scan,
    skip,
)

pytestmark = pytest.mark.slow

TODAY = datetime.now().replace(hour=9, minute=0, second=0, microsecond=0)
ORTHANC = 14242


@pytest.fixture
def prefix() -> Iterator[list[str]]:
    need("Orthanc", "dcmsend", "unshare", "nsenter", "ip")
    with ExitStack() as stack:
        try:
            yield stack.enter_context(network_namespace())
        except RuntimeError as exc:
            skip(f"no network namespace: {exc}")


def make_node(folder: Path, prefix: Sequence[str], priors: str) -> Node:
    node = Node(folder, prefix=prefix, more_settings=f"[priors]\n{priors}\nper_minute = 600\n")
    node.write_config(node.config, {"ORTHANC": ORTHANC, "TEST": node.port})
    return node


def fetches(node: Node) -> dict[str, store.Fetch]:
    with store.reading(node.engine) as session:
        return {f.what.series_uid: f for f in store.list_fetches(session)}


def send(prefix: Sequence[str], scans: Sequence[Scan], folder: Path) -> None:
    for n, part in enumerate(scans):
        save(part.slices, folder / str(n))
    run([*prefix, *dcmsend(ORTHANC, folder, options=["-aec", "ORTHANC"])])


# A PACS that lets us ask, and does not know where we are.
STRANGER = {
    "DicomModalities": {},
    "LuaScripts": [],
    "DicomAlwaysAllowFind": True,
    "DicomAlwaysAllowMove": True,
}


def test_where_the_pacs_does_not_know_our_ae_title_it_says_what_to_do(tmp_path, prefix):
    part = scan(matrix=64, spacing_mm=12.0, when=TODAY - timedelta(days=1))
    priors = 'catch_up = ["ORTHANC"]\nsettle_seconds = 0.5'
    node = make_node(tmp_path / "node", prefix, priors)
    with ExitStack() as stack:
        stack.callback(node.close)
        stack.enter_context(
            pacs.orthanc(tmp_path / "orthanc", prefix, node_port=node.port, more_settings=STRANGER)
        )
        send(prefix, [part], tmp_path / "ct")
        node.start()
        failed = eventually(
            lambda: [f for f in fetches(node).values() if f.reason], "asked for in vain"
        )
        assert failed[0].what.series_uid == part.series_uid
        assert failed[0].state is FetchState.WAITING
        assert "register our AE title" in failed[0].reason
        assert node.stop() == 0
        node.check_log()
