"""Senders that go on whatever happens to the node, and the visits that they send."""

import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from pydicom.dataset import Dataset
from pynetdicom import Association

from tests.dicom import PATIENT_ID
from tests.e2e.conftest import DEADLINE_S, Scan, association, scan

TABLE_MM = 40.0  # by which the second timepoint lies higher


class Load:
    """Several associations at a time, each for a share of slices.

    A slice is sent until it is answered 0x0000, and never again after that.
    """

    def __init__(self, port: int, associations: int, deadline_s: float = DEADLINE_S) -> None:
        self.acknowledged: set[str] = set()
        self.refused: list[int] = []  # statuses other than Success
        self.turned_away = 0  # associations that were refused
        self.again = 0  # slices that were sent again, since no answer came
        self._port, self._deadline_s = port, deadline_s
        self._given = 0
        self._taken: dict[str, tuple[float, Dataset]] = {}  # when, `time.monotonic`
        self._shares: deque[list[Dataset]] = deque()
        self._changed = threading.Condition()
        self._closed = self._given_up = False
        self._pool = ThreadPoolExecutor(associations, "sender")
        self._runs = [self._pool.submit(self._run) for _ in range(associations)]

    def put(self, share: Sequence[Dataset]) -> None:
        """Have some slices sent over an association of their own."""
        self._given += len(share)
        self._queue(share)

    def _queue(self, share: Sequence[Dataset]) -> None:
        with self._changed:
            self._shares.append(list(share))
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Slices that were not acknowledged yet."""
        return self._given - len(self.acknowledged)

    def doubt(self, since: float) -> None:
        """Send again what was acknowledged since a moment, of `time.monotonic`."""
        doubtful = [ds for at, ds in list(self._taken.values()) if at >= since]
        if doubtful:
            self.acknowledged -= {str(ds.SOPInstanceUID) for ds in doubtful}
            self.again += len(doubtful)
            self._queue(doubtful)

    def check(self) -> None:
        """Raise what a sender raised, should one have failed."""
        for run in self._runs:
            if run.done():
                run.result()

    def finish(self) -> None:
        """Return when all was acknowledged, and raise what a sender raised."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown()
        for run in self._runs:
            run.result()

    def give_up(self) -> None:
        """Let the senders end, whatever they still hold."""
        with self._changed:
            self._given_up = self._closed = True
            self._shares.clear()
            self._changed.notify_all()
        self._pool.shutdown()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._shares or self._closed)
                if not self._shares:
                    return
                share = self._shares.popleft()
            self._send(share)

    def _send(self, share: list[Dataset]) -> None:
        waiting = list(reversed(share))
        deadline = time.monotonic() + self._deadline_s
        while waiting and not self._given_up:
            assert time.monotonic() < deadline, f"{len(waiting)} slices find no receiver"
            with association(self._port) as assoc:
                self.turned_away += assoc.is_rejected
                while waiting and assoc.is_established:
                    status = self._store(assoc, waiting[-1])
                    if status is None:  # it broke off: nobody knows whether the slice arrived
                        self.again += 1
                        break
                    if status == 0x0000:
                        ds = waiting.pop()
                        self._taken[str(ds.SOPInstanceUID)] = (time.monotonic(), ds)
                        self.acknowledged.add(str(ds.SOPInstanceUID))
                    else:
                        self.refused.append(status)
                        break
            if waiting:
                time.sleep(0.1)  # a receiver that was killed is not back at once

    @staticmethod
    def _store(assoc: Association, ds: Dataset) -> int | None:
        try:
            return assoc.send_c_store(ds).get("Status")
        except RuntimeError:  # it broke off between two slices
            return None


@dataclass(frozen=True)
class Visit:
    """Two timepoints of one patient, of one of a few bodies."""

    body: int  # seed of the phantom
    prior: Scan
    follow_up: Scan

    @property
    def scans(self) -> tuple[Scan, Scan]:
        return self.prior, self.follow_up

    def shares(self, rng: random.Random, count: int) -> list[list[Dataset]]:
        """Return all slices, mixed, for so many associations."""
        slices = [ds for made in self.scans for ds in made.slices]
        rng.shuffle(slices)
        return [slices[i::count] for i in range(count)]


def visit(body: int, number: int, spacing_mm: float = 15.0) -> Visit:
    """Return the visit of a new patient; `number` tells patients apart."""
    patient_id = f"{PATIENT_ID}-{number}"
    return Visit(
        body,
        scan(body, patient_id=patient_id, spacing_mm=spacing_mm, when=datetime(2023, 5, 2, 14, 5)),
        scan(body, patient_id=patient_id, spacing_mm=spacing_mm, table_mm=TABLE_MM),
    )
