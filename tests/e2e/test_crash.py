"""`kill -9` of any process at any moment: what was answered 0x0000 ends in a curve.

Nothing that was answered is sent again. `DICOMNODE_TEST_SOAK=200` makes a long soak of it: so
many rounds for each process, each with another seed.
"""

import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pynetdicom import Association

from dicomnode.model import SeriesState
from tests.e2e.conftest import (
    DEADLINE_S,
    Node,
    Scan,
    association,
    eventually,
    running_node,
    scan,
)

# pynetdicom leaves sockets of associations that the peer broke off to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.slow,
]

ROUNDS = int(os.environ.get("DICOMNODE_TEST_SOAK", "2"))
SERIES = 5
ASSOCIATIONS = 4


class Senders:
    """Several associations that each store a share of the slices, whatever happens to the node.

    A slice is sent until it is answered 0x0000, and never again after that.
    """

    def __init__(self, port: int, shares: list[list[Dataset]]) -> None:
        self._port = port
        self.acknowledged: set[str] = set()
        self.others: list[int] = []  # statuses other than Success
        self._deadline = time.monotonic() + DEADLINE_S
        self._pool = ThreadPoolExecutor(len(shares))
        self._runs = [self._pool.submit(self._send, share) for share in shares]

    def wait(self) -> None:
        """Return when all was acknowledged, and raise what a sender raised."""
        self._pool.shutdown()
        for run in self._runs:
            run.result()

    def _send(self, share: list[Dataset]) -> None:
        waiting = list(reversed(share))
        while waiting:
            assert time.monotonic() < self._deadline, f"{len(waiting)} slices find no receiver"
            with association(self._port) as assoc:
                while waiting and assoc.is_established:
                    status = self._store(assoc, waiting[-1])
                    if status is None:  # it broke off: nobody knows whether the slice arrived
                        break
                    if status == 0x0000:
                        self.acknowledged.add(str(waiting.pop().SOPInstanceUID))
                    else:
                        self.others.append(status)
            if waiting:
                time.sleep(0.1)  # a receiver that was killed is not back at once

    @staticmethod
    def _store(assoc: Association, ds: Dataset) -> int | None:
        try:
            return assoc.send_c_store(ds).get("Status")
        except RuntimeError:  # it broke off between two slices
            return None


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    # pynetdicom prints one of senders that are cut off when they stop sending.
    dul = frozenset({"pynetdicom.dul"})
    with running_node(tmp_path / "node", tracebacks_of=dul) as node:
        yield node


@pytest.mark.parametrize("part", ["receiver", "worker", "supervisor"])
def test_what_was_acknowledged_survives_a_kill(node, part):
    for round_ in range(ROUNDS):
        if round_ and round_ % 3 == 0:  # the supervisor lets a part that dies often wait longer
            assert node.stop() == 0
            node.start()
        rng = random.Random(f"{part} {round_}")
        scans = [scan(spacing_mm=12.0) for _ in range(SERIES)]
        slices = [ds for made in scans for ds in made.slices]
        rng.shuffle(slices)
        senders = Senders(node.port, [slices[i::ASSOCIATIONS] for i in range(ASSOCIATIONS)])
        # Somewhere while the slices arrive; the worker also while it works them off.
        after = rng.randrange(1, len(slices))
        eventually(lambda: len(senders.acknowledged) >= after, f"{after} slices")  # noqa: B023
        time.sleep(rng.uniform(0, 1.0 if part == "worker" else 0.02))
        node.kill(part)
        if part == "supervisor":
            node.start(wait=False)
        senders.wait()
        assert senders.others == []
        assert senders.acknowledged == {str(ds.SOPInstanceUID) for ds in slices}
        assert_all_in_curves(node, scans)


def test_a_node_that_was_killed_whole_goes_on_where_it_was(node):
    scans = [scan(spacing_mm=12.0) for _ in range(SERIES)]
    slices = [ds for made in scans for ds in made.slices]
    half = len(slices) // 2
    Senders(node.port, [slices[:half]]).wait()
    for part in ("worker", "receiver", "supervisor"):
        node.kill(part)
    node.wait_for_parts_to_end()
    node.start()
    Senders(node.port, [slices[half:]]).wait()
    assert_all_in_curves(node, scans)


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
