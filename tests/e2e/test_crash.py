"""`kill -9` of any process at any moment, and power cuts: what was answered 0x0000 is in a curve.

Nothing that was answered is sent again. `DICOMNODE_TEST_SOAK=200` makes a long soak of it: so
many kills, and a tenth as many power cuts. `python -m tests.soak.kill` is the same by hand.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicomnode.model import SeriesState
from tests.e2e.conftest import Node, Scan, running_node, scan, skip
from tests.soak import kill
from tests.soak.disk import mounted
from tests.soak.load import Load

# pynetdicom leaves sockets of associations that the peer broke off to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.slow,
]

SOAK = int(os.environ.get("DICOMNODE_TEST_SOAK", "0"))
SERIES = 5


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    # pynetdicom prints one of senders that are cut off when they stop sending.
    dul = frozenset({"pynetdicom.dul"})
    with running_node(tmp_path / "node", tracebacks_of=dul) as node:
        yield node


def test_what_was_acknowledged_survives_kills(tmp_path):
    count = max(SOAK, len(kill.KILLS))
    with kill.opened(tmp_path, power=False) as (node, _):
        result = kill.run(node, count, seed=1)
    assert_sound(result, count)
    assert not result.refused
    assert set(result.kills) == set(kill.KILLS)


def test_what_was_acknowledged_survives_power_cuts(tmp_path):
    count = max(SOAK // 10, 2)
    try:
        with kill.opened(tmp_path, power=True) as (node, disk):
            result = kill.run(node, count, parts=["power"], seed=1, disk=disk)
    except RuntimeError as exc:
        skip(f"no disk whose power can be cut: {exc}")
    assert_sound(result, count)
    assert set(result.refused) <= {0xA700}  # what was underway when the disk went


def test_the_disk_whose_power_is_cut_forgets_what_was_not_synced(tmp_path):
    try:
        with mounted(tmp_path, 64) as disk:
            with open(disk.path / "synced", "wb") as file:
                file.write(bytes(5000))
                file.flush()
                os.fsync(file.fileno())
            folder = os.open(disk.path, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            (disk.path / "not synced").write_bytes(bytes(5000))
            with open(disk.path / "synced", "r+b") as file:
                file.write(b"changed")
            disk.cut()
            with pytest.raises(OSError):
                (disk.path / "too late").write_bytes(b"")
            disk.restore()
            assert {p.name for p in disk.path.iterdir()} == {"synced", "lost+found"}
            assert (disk.path / "synced").read_bytes() == bytes(5000)
    except RuntimeError as exc:
        skip(f"no disk whose power can be cut: {exc}")


def test_a_node_that_was_killed_whole_goes_on_where_it_was(node):
    scans = [scan(spacing_mm=12.0) for _ in range(SERIES)]
    slices = [ds for made in scans for ds in made.slices]
    random.Random(3).shuffle(slices)
    half = len(slices) // 2
    for share in (slices[:half], slices[half:]):
        load = Load(node.port, 1)
        load.put(share)
        load.finish()
        assert load.acknowledged == {str(ds.SOPInstanceUID) for ds in share}
        if share[0] is slices[0]:
            for part in ("worker", "receiver", "supervisor"):
                node.kill(part)
            node.wait_for_parts_to_end()
            node.start()
    assert_all_in_curves(node, scans)


def assert_sound(result: kill.Result, count: int) -> None:
    print(result)
    assert result.kills.total() == count
    assert result.acknowledged >= count * kill.UNDER_WAY // 2
    assert result.sound, result
    assert result.offsets == 3 * result.curves / 2


def assert_all_in_curves(node: Node, scans: list[Scan]) -> None:
    for made in scans:
        row = node.finished(made.series_uid, len(made.slices))
        assert row.state is SeriesState.CURVE, row
    node.idle()
    for made in scans:
        row = node.one(made.series_uid)
        assert row is not None and row.set_aside == {}
        assert node.curve_uids(made.series_uid) == made.uids
    assert node.quarantined() == {}
    assert node.spool.pending(1) == []
