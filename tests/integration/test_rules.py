"""Rules: pixels wait until every rule is served, and go when nobody wants them any more."""

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from pydicom import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from sqlalchemy import Engine

from dicomnode import checks, rescore, rules, store, weights
from dicomnode.config import Settings
from dicomnode.core import region
from dicomnode.core.region import Limit, Region, Support
from dicomnode.errors import ConfigError, DicomError, HeldUnavailable
from dicomnode.held import Held
from dicomnode.model import DeliveryKind, DeliveryState
from dicomnode.node import serve
from dicomnode.node.serve import Worker
from dicomnode.outgoing import Nothing, NotYet, forward, matched
from dicomnode.rules import Rules
from dicomnode.scu.storage import data_set_of
from dicomnode.spool import Spool
from dicomnode.spool.disk import Disk
from tests.dicom import compress, enhanced_ct, part10, without_meta
from tests.integration.test_regions import TABLE
from tests.integration.test_stages import SERIES, A, B, brightness_bundle, ct_slice

OTHER = "1.2.4"
SEEDS = int(os.environ.get("DICOMNODE_TEST_SOAK", "0")) or 4  # of the test of whatever happens
ALL = {"name": "all", "when": "slices >= 8", "send_to": "AI"}
CHEST = {"name": "chest", "when": "covers(chest, 0.5)", "send_to": "AI", "region": "chest"}
TELL = {"name": "tell", "when": "slices >= 8", "webhook": "http://127.0.0.1:1/told"}
NEVER = {"name": "never", "when": "slices >= 1000", "send_to": "AI"}

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    made = brightness_bundle(tmp_path_factory.mktemp("plain"))
    folder = tmp_path_factory.mktemp("bundle")
    weights.save(
        folder, made.network, name="tabled", spec=made.spec, heights=made.heights, training={},
        regions=TABLE,
    )  # fmt: skip
    return folder


class Node:
    """A spool and a worker that is stepped by hand."""

    def __init__(self, folder: Path, engine: Engine, bundle: Path, database_url: str) -> None:
        self.folder, self.engine = folder, engine
        self.values: dict[str, Any] = {
            "node": {"peers": [{"ae_title": n, "host": "h", "port": 1} for n in ("AI", "AI2")]},
            "spool": {"path": folder / "spool", "reserve_bytes": 0},
            "database": {"url": database_url},
            "score": {"model": bundle, "device": "cpu", "dtype": "float32", "batch": 8},
            "series": {"quiet_seconds": 0},
            "keep": {"late_seconds": 0},
        }
        self.spool = Spool(folder / "spool")
        self._worker: Worker | None = None

    def settings(self, *given: dict[str, Any], **keep: Any) -> Settings:
        if given:
            self.values["rule"] = given
        self.values["keep"] |= keep
        return Settings(**self.values)

    def start(self, *given: dict[str, Any], **keep: Any) -> Worker:
        """Make a worker, in place of one that there was."""
        self.stop()
        self._worker = Worker(self.settings(*given, **keep), self.spool, self.engine)
        return self._worker

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    @property
    def worker(self) -> Worker:
        assert self._worker is not None
        return self._worker

    def put(self, *datasets: Dataset, association: str = A) -> dict[str, bytes]:
        """Spool Instances and the end of what brought them; SOP Instance UID -> bytes."""
        sent = {str(ds.SOPInstanceUID): part10(ds) for ds in datasets}
        for data in sent.values():
            self.spool.put(data, association)
        self.spool.put_event(association, "released")
        return sent

    def work(self) -> None:
        """Step until nothing is left to do, and look through held pixels once more."""
        while self.worker.step():
            pass
        self.worker.step()

    def receive(self, *datasets: Dataset, association: str = A) -> dict[str, bytes]:
        sent = self.put(*datasets, association=association)
        self.work()
        return sent

    @property
    def held(self) -> dict[str, bytes]:
        """SOP Instance UID -> bytes of all that is held."""
        files = (self.folder / "spool" / "held").rglob("*.dcm")
        return {file.stem: file.read_bytes() for file in files}

    def deliveries(self) -> dict[str, store.Delivery]:
        """Rule -> the delivery that it asked for; there is one Series of each."""
        with store.reading(self.engine) as session:
            found = store.list_deliveries(session)
        assert len({d.what.rule for d in found}) == len(found)
        return {d.what.rule: d for d in found}

    def make(self, rule: str) -> dict[str, bytes]:
        """Return SOP Instance UID -> bytes of what a rule sends now."""
        outgoing = forward.make(self.engine, self.settings(), self.deliveries()[rule])
        return {out.sop_instance_uid: out.read() for out in outgoing}

    def settle(self, rule: str, state: DeliveryState, at: datetime | None = None) -> None:
        with store.writing(self.engine) as session:
            now = at or datetime.now(UTC)
            assert store.settle_delivery(session, self.deliveries()[rule], state, now)


@pytest.fixture
def node(tmp_path, engine, bundle, database_url, monkeypatch) -> Iterator[Node]:
    monkeypatch.setattr(serve, "SWEEP_S", 0.0)  # at each step
    monkeypatch.setattr(serve, "SWEEP_SHARE", 0)
    node = Node(tmp_path, engine, bundle, database_url)
    yield node
    node.stop()
    node.spool.close()


def scan(series_uid: str = SERIES, levels: range = range(12), **values: Any) -> list[Dataset]:
    return [ct_slice(series_uid, level, **values) for level in levels]


# What is asked for, held and sent


def test_a_series_that_a_rule_wants_goes_on_as_it_came_and_then_its_pixels_go(node):
    node.start(ALL)
    sent = node.receive(*scan())
    assert node.held == sent
    (asked,) = node.deliveries().values()
    assert asked.what == store.Ask(DeliveryKind.FORWARD, "AI", SERIES, rule="all")
    assert asked.due_at <= datetime.now(UTC)  # nothing is waited for
    assert node.make("all") == sent
    node.settle("all", DeliveryState.DONE)
    node.work()
    assert node.held == {}
    assert list((node.folder / "spool" / "held").iterdir()) == []


@on_sqlite
def test_a_series_that_no_rule_wants_leaves_nothing(node):
    node.start(NEVER)
    node.put(*scan())
    node.worker.step()
    assert node.held  # it might be wanted yet
    node.work()
    assert node.held == {} and node.deliveries() == {}


@on_sqlite
def test_without_a_rule_that_sends_nothing_is_held(node):
    node.start(TELL)
    node.put(*scan())
    while node.worker.step():
        assert node.held == {}
    (asked,) = node.deliveries().values()
    assert asked.what == store.Ask(DeliveryKind.WEBHOOK, TELL["webhook"], SERIES, rule="tell")


def test_what_one_destination_has_stays_for_the_other(node):
    node.start(ALL, {**ALL, "name": "second", "send_to": "AI2"}, TELL, NEVER)
    sent = node.receive(*scan())
    assert set(node.deliveries()) == {"all", "second", "tell"}
    node.settle("all", DeliveryState.DONE)
    node.work()
    assert node.held == sent == node.make("second")
    node.settle("second", DeliveryState.DROPPED)
    node.work()
    assert node.held == {}  # whether a webhook was told or not


@on_sqlite
def test_series_that_end_without_a_curve_are_not_kept(node):
    node.start(ALL)
    node.put(*scan(levels=range(4)), association=A)  # too few positions
    node.put(*scan(OTHER, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), association=B)
    node.worker.step()
    assert node.held
    node.work()
    assert node.held == {} and node.deliveries() == {}


@on_sqlite
def test_a_slice_that_was_set_aside_is_part_of_its_series_and_other_objects_are_not(node):
    node.start(ALL)
    scout = ct_slice(SERIES, 15, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    mr = ct_slice(SERIES, 16, Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    broken = ct_slice(SERIES, 17, PixelData=b"\0\0")
    sent = node.receive(*scan(), scout, mr, broken)
    left_out = {str(mr.SOPInstanceUID), str(broken.SOPInstanceUID)}
    assert node.make("all") == {uid: sent[uid] for uid in sent.keys() - left_out}


@on_sqlite
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless, DeflatedExplicitVRLittleEndian])
def test_each_object_keeps_its_transfer_syntax(node, syntax):
    node.start(ALL)
    slices = scan()
    for ds in slices:
        if syntax == DeflatedExplicitVRLittleEndian:
            ds.file_meta.TransferSyntaxUID = syntax
        else:
            compress(ds, syntax)
    sent = node.receive(*slices)
    made = forward.make(node.engine, node.settings(), node.deliveries()["all"])
    assert {o.transfer_syntax_uid for o in made} == {syntax}
    assert {o.sop_class_uid for o in made} == {slices[0].SOPClassUID}
    assert {o.sop_instance_uid: o.read() for o in made} == sent


@on_sqlite
def test_a_file_without_the_length_of_its_meta_information_goes_all_the_same(node):
    """From media; what is received has it."""
    node.start(ALL)
    whole = {str(ds.SOPInstanceUID): part10(ds) for ds in scan()}
    for data in whole.values():
        node.spool.put(data[:132] + data[144:], A)
    node.spool.put_event(A, "released")
    node.work()
    made = node.make("all")
    assert {uid: bytes(data_set_of(data)) for uid, data in made.items()} == {
        uid: without_meta(data) for uid, data in whole.items()
    }
    assert made == whole


# A region


def heights(uids: Any) -> list[float]:
    """Body heights of `ct_slice`s, ascending, of their SOP Instance UIDs."""
    return sorted(5.0 * (int(uid.rpartition(".")[2]) - 1) for uid in uids)


@on_sqlite
def test_the_slices_of_a_region_go_by_themselves(node):
    """The chest lies from 37.5 to 87.5 mm."""
    node.start(CHEST, {**CHEST, "name": "wide", "margin_mm": 10.0}, ALL)
    sent = node.receive(*scan(levels=range(20)))
    assert heights(node.make("chest")) == [5.0 * n for n in range(8, 18)]
    assert heights(node.make("wide")) == [5.0 * n for n in range(6, 20)]
    assert node.make("all") == sent
    assert all(sent[uid] == data for uid, data in node.make("chest").items())
    for rule in ("chest", "wide", "all"):
        assert node.held == sent  # all of it, until all are served
        node.settle(rule, DeliveryState.DONE)
        node.work()
    assert node.held == {}


def test_slices_at_one_position_go_together(node):
    """Of two phases in one Series the curve has one, which is not the one that is wanted."""
    node.start(CHEST)
    second = [
        ct_slice(SERIES, level, SOPInstanceUID=f"{SERIES}.9.{level + 1}") for level in range(20)
    ]
    node.receive(*scan(levels=range(20)), *second)
    assert heights(node.make("chest")) == sorted([5.0 * n for n in range(8, 18)] * 2)


@on_sqlite
def test_an_enhanced_ct_goes_whole(node):
    node.start({**CHEST, "when": "overlaps(chest)"})
    halves = [enhanced_ct(scan(levels=levels)) for levels in (range(7), range(7, 20))]
    sent = node.receive(*halves)
    assert list(node.make("chest")) == [str(halves[1].SOPInstanceUID)]
    assert set(node.make("chest").items()) <= set(sent.items())


@on_sqlite
def test_a_region_whose_slices_are_not_held_any_more_is_nothing_to_send(node):
    node.start(CHEST)
    node.receive(*scan(levels=range(20)))
    node.settle("chest", DeliveryState.DONE)
    node.work()
    node.receive(ct_slice(SERIES, 20), association=B)  # of the head side, late
    assert heights(node.held) == [100.0]
    with pytest.raises(Nothing, match="no slice that is held shows chest"):
        node.make("chest")


@pytest.mark.parametrize("margin_mm", [0.0, 4.0, 25.0])
@pytest.mark.parametrize("rising", [True, False])
def test_bounds_are_the_slices_within_the_ends(margin_mm, rising):
    z_mm = np.arange(0.0, 300.0, 3.0)
    height_mm = z_mm if rising else z_mm[::-1].copy()
    chest = next(r for r in TABLE if r.name == "chest")
    inside = (height_mm >= 37.5 - margin_mm) & (height_mm <= 87.5 + margin_mm)
    where = np.flatnonzero(inside)
    assert region.bounds(z_mm, height_mm, chest, margin_mm) == (where[0], where[-1])


def test_bounds_hold_a_slice_that_was_read_wrongly_and_none_where_nothing_is_shown():
    z_mm = np.arange(0.0, 300.0, 3.0)
    height_mm = z_mm.copy()
    height_mm[20] = 900.0  # metal
    chest, head = (next(r for r in TABLE if r.name == n) for n in ("chest", "head"))
    assert region.bounds(z_mm, height_mm, chest) == (13, 29)
    assert region.bounds(z_mm, height_mm, head) == (67, 99)  # its upper end is not known
    assert region.bounds(z_mm[:50], z_mm[:50], head) is None
    thin = Region("thin", "1", "Thin", *(Limit(Support.LANDMARK, h, 1.0) for h in (10.2, 10.8)))
    assert region.bounds(z_mm, z_mm, thin) == (3, 3)  # between two slices: the nearer


# Late slices, changes, repeats


def test_a_late_slice_goes_alone_where_the_rest_is_gone(node):
    node.start(ALL)
    node.receive(*scan())
    node.settle("all", DeliveryState.DONE)
    node.work()
    late = node.receive(ct_slice(SERIES, 12), association=B)
    assert node.deliveries()["all"].version == 2
    assert node.make("all") == node.held == late


@on_sqlite
def test_a_series_that_comes_in_two_parts_goes_whole(node):
    """The first part alone meets no rule, for one it has no curve even."""
    node.start(ALL, {**ALL, "name": "long", "when": "slices >= 14"}, late_seconds=60)
    sent = node.receive(*scan(levels=range(6)))
    assert node.deliveries() == {} and node.held == sent
    sent |= node.receive(*scan(levels=range(6, 12)), association=B)
    assert node.make("all") == sent
    node.settle("all", DeliveryState.DONE)
    node.work()
    sent |= node.receive(*scan(levels=range(12, 14)), association=B)
    assert node.make("long") == node.make("all") == sent
    for rule in ("all", "long"):
        node.settle(rule, DeliveryState.DONE)
    node.work()
    assert node.held == sent
    (later,) = (
        s.changed_at + timedelta(seconds=61) for s in Held(node.settings().held_path).series()
    )
    node.worker._sweep.step(later)
    assert node.held == {}


@on_sqlite
def test_a_late_slice_goes_with_the_rest_that_waits(node):
    node.start(ALL)
    sent = node.receive(*scan())
    sent |= node.receive(ct_slice(SERIES, 12), association=B)
    assert node.make("all") == sent


@on_sqlite
def test_while_a_series_arrives_again_nothing_of_it_is_sent(node):
    node.start(ALL)
    node.receive(*scan())
    node.spool.put(part10(ct_slice(SERIES, 12)), B)  # its association goes on
    node.work()
    with pytest.raises(NotYet, match="arriving"):
        node.make("all")
    assert len(node.held) == 13


@on_sqlite
def test_a_series_that_does_not_meet_the_rule_any_more_is_not_sent(node):
    node.start({**ALL, "when": "slices < 13"})
    node.receive(*scan())
    assert len(node.make("all")) == 12
    node.receive(ct_slice(SERIES, 12), association=B)
    with pytest.raises(Nothing, match="does not meet the rule all any more"):
        node.make("all")


@on_sqlite
def test_what_is_sent_again_unchanged_is_not_asked_for_again_and_does_not_stay(node):
    node.start(ALL)
    node.receive(*scan())
    node.settle("all", DeliveryState.DONE)
    node.receive(*scan(), association=B)
    assert node.deliveries()["all"].version == 1
    assert node.held == {}


@on_sqlite
def test_a_study_whose_uid_was_corrected_goes_under_the_new_one(node):
    node.start(ALL)
    node.receive(*scan())
    sent = node.receive(*scan(StudyInstanceUID="1.2.77"), association=B)
    assert node.make("all") == sent
    node.settle("all", DeliveryState.DONE)
    node.work()
    assert node.held == {}


@on_sqlite
@pytest.mark.parametrize(
    ("now", "why"),
    [
        ({**ALL, "name": "renamed"}, "no rule all asks"),
        ({**ALL, "send_to": "AI2"}, "no rule all asks"),
        ({**ALL, "when": "slices > 50"}, "does not meet the rule all"),
    ],
)
def test_a_rule_that_was_altered_sends_nothing_of_before(node, now, why):
    node.start(ALL)
    node.receive(*scan())
    node.settings(now)
    with pytest.raises(Nothing, match=why):
        node.make("all")


@on_sqlite
def test_what_a_rule_of_before_wanted_stays_for_rule_days(node):
    node.start(ALL)
    sent = node.receive(*scan())
    node.start({**ALL, "name": "renamed"})
    node.work()
    assert node.held == sent  # a slip of the pen costs nothing
    node.start(rule_days=0)
    node.work()
    assert node.held == {}


@on_sqlite
def test_pixels_that_were_dropped_are_nothing_to_send(node):
    node.start(ALL)
    node.receive(*scan())
    made = forward.make(node.engine, node.settings(), node.deliveries()["all"])
    Held(node.settings().held_path).drop(f"{SERIES}.0", SERIES)
    with pytest.raises(Nothing, match="not held any more"):
        node.make("all")
    with pytest.raises(DicomError, match="not held any more"):
        made[0].read()


@on_sqlite
def test_priors_count(node):
    rule = {**ALL, "when": "prior(within=365d)"}
    node.start(rule)
    node.receive(*scan(SERIES, StudyDate="20250601"))
    assert node.held == {}
    sent = node.receive(*scan(OTHER, StudyDate="20260301"), association=B)
    assert node.deliveries()["all"].what.subject == OTHER
    assert node.make("all") == sent


def test_a_rule_finds_what_mining_finds(node):
    texts = [
        "covers(chest, 0.4)", "covers(chest, 0.9)", "overlaps(head)", "not overlaps(bladder)",
        "slices >= 12 and quality > 0.9", "height(10, 50)", "flag = gap", "modality = MR",
        "manufacturer ~ made", "prior()", "state = curve", "study_date < 2026-02-01",
    ]  # fmt: skip
    given = [{"name": f"rule {n}", "when": t, "send_to": "AI"} for n, t in enumerate(texts)]
    node.start(*given)
    node.receive(*scan(StudyDate="20250601"))
    node.receive(*scan(OTHER, range(9, 21), StudyDate="20260301"), association=B)
    with store.reading(node.engine) as session:
        asked = {(d.what.rule, d.what.subject) for d in store.list_deliveries(session)}
        counts = dict((rule.name, n) for rule, n in Rules.of(node.settings()).count(session))
    for name, count in counts.items():
        assert count == sum(rule == name for rule, _ in asked), name
    assert 0 < len(asked) < 2 * len(texts)


@on_sqlite
def test_rescoring_asks_for_nothing(node, bundle, tmp_path):
    node.start(ALL)
    node.receive(*scan())
    node.settle("all", DeliveryState.DONE)
    node.work()
    node.stop()
    made = weights.load(bundle)
    weights.save(
        tmp_path / "other", made.network, name="other", spec=made.spec, heights=made.heights,
        training={}, regions=TABLE,
    )  # fmt: skip
    node.values["score"]["model"] = tmp_path / "other"
    node.start(ALL)
    scorer = node.worker._score.scorer
    plan = rescore.plan(node.engine, scorer.bundle)
    assert len(rescore.run(node.engine, scorer, plan.series).rescored) == 1
    node.work()
    assert node.deliveries()["all"].state is DeliveryState.DONE


# Crashes and disks


class Killed(BaseException):
    """The worker is no more."""


def dying(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    """Return a call that kills in place of what it does, once it was called so often."""
    calls = itertools.count()

    def called(*arguments: Any, **others: Any) -> Any:
        if next(calls) == after:
            raise Killed
        return call(*arguments, **others)

    return called


@on_sqlite
@pytest.mark.parametrize(
    ("where", "name"), [(Held, "put"), (store, "record_slices"), (Spool, "remove")]
)
def test_a_worker_that_dies_loses_nothing_and_sends_all(node, monkeypatch, where, name):
    """The Series says how many Instances it has: its last slice finishes it at once."""
    node.start(ALL)
    sent = node.put(*scan(NumberOfSeriesRelatedInstances=12))
    with monkeypatch.context() as patch:
        patch.setattr(where, name, dying(getattr(where, name), 1))  # in the second batch
        with pytest.raises(Killed):
            node.work()
    node.spool.close()
    node.spool = Spool(node.folder / "spool")
    asked_with: list[int] = []
    ask = store.ask_deliveries

    def looked(session: Any, asks: Any, *times: Any) -> None:
        asked_with.extend(len(node.held) for _ in asks)
        ask(session, asks, *times)

    monkeypatch.setattr(store, "ask_deliveries", looked)
    node.start()
    node.work()
    assert asked_with == [12]  # never while some were still to be held
    assert node.make("all") == sent


@on_sqlite
@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_happens_all_is_sent_and_nothing_stays(node, monkeypatch, seed):
    """Slices in any order and number, kills anywhere, a destination that comes and goes."""
    rng = random.Random(seed)
    series = [f"1.2.{n}" for n in range(1, 4)]
    wanted = {uid: scan(uid, range(12)) for uid in series}
    left = [(uid, ds) for uid, slices in wanted.items() for ds in slices]
    rng.shuffle(left)
    got: dict[str, set[bytes]] = {}
    places = [(Held, "put"), (Held, "drop"), (store, "record_slices"), (store, "ask_deliveries"),
              (Spool, "remove"), (store, "wanting")]  # fmt: skip
    node.start(ALL, {**ALL, "name": "second", "send_to": "AI2"}, late_seconds=1000)

    def live(kill: bool) -> None:
        with monkeypatch.context() as patch:
            if kill:
                where, name = rng.choice(places)
                patch.setattr(where, name, dying(getattr(where, name), rng.randrange(4)))
            try:
                node.work()
                return
            except Killed:
                pass
        node.spool.close()
        node.spool = Spool(node.folder / "spool")
        node.start()

    def deliver(share: float) -> None:
        with store.reading(node.engine) as session:
            waiting = store.list_deliveries(session, state=DeliveryState.WAITING)
        for delivery in waiting:
            if rng.random() > share:
                continue
            state = DeliveryState.DONE
            try:
                for out in forward.make(node.engine, node.settings(), delivery):
                    key = f"{delivery.what.rule} {out.sop_instance_uid}"
                    got.setdefault(key, set()).add(out.read())
            except Nothing:
                state = DeliveryState.DROPPED
            except NotYet:
                continue
            with store.writing(node.engine) as session:
                store.settle_delivery(session, delivery, state, datetime.now(UTC))

    while left:
        count = rng.randrange(1, 20)
        node.put(*(ds for _, ds in left[:count]), association=rng.choice([A, B]))
        left = left[count:]
        live(kill=rng.random() < 0.6)
        deliver(rng.random())
    for _ in range(3):
        live(kill=False)
        deliver(1.0)
    assert got == {
        f"{rule} {ds.SOPInstanceUID}": {part10(ds)}
        for rule in ("all", "second") for slices in wanted.values() for ds in slices
    }  # fmt: skip
    assert node.spool.pending(1) == []
    node.start(late_seconds=0)
    node.work()
    assert node.held == {}


@on_sqlite
def test_a_worker_that_died_before_the_pixels_went_drops_them_later(node, monkeypatch):
    monkeypatch.setattr(serve, "SWEEP_S", 1e9)
    node.start(NEVER)
    monkeypatch.setattr(node.worker, "_sweep_at", 1e18)
    node.receive(*scan())
    assert node.held
    monkeypatch.setattr(serve, "SWEEP_S", 0.0)
    node.start()
    node.work()
    assert node.held == {}


class Full(Disk):
    """Takes no more of held pixels, until it is told to."""

    number = errno.ENOSPC
    refuses = ""  # what is in the paths that it refuses

    def create(self, path: Path) -> int:
        if self.refuses and self.refuses in path.name:
            raise OSError(self.number, os.strerror(self.number))
        return super().create(path)


@on_sqlite
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_nothing_stops_the_worker_until_it_does(node, number):
    node.start(ALL)
    disk = Full()
    disk.number = number
    node.worker._score.held._disk = disk
    disk.refuses = "."
    sent = node.put(*scan())
    for _ in range(3):
        with pytest.raises(HeldUnavailable, match=os.strerror(number)):
            node.worker.step()
    with store.reading(node.engine) as session:
        assert store.list_series(session) == []
    disk.refuses = ""
    node.work()
    assert node.make("all") == sent


@on_sqlite
@pytest.mark.parametrize("refused", [f"{OTHER}.3.dcm", f"{OTHER}."])
def test_what_cannot_be_held_lets_others_pass_and_comes_again(node, caplog, refused):
    node.start(ALL)
    disk = Full()
    node.worker._score.held._disk = disk
    disk.number, disk.refuses = errno.EACCES, f".{refused}"
    sent = node.put(*scan(OTHER), *scan())
    node.work()
    with store.reading(node.engine) as session:
        states = {row.series_uid: row.received for row in store.list_series(session)}
    assert states == {SERIES: 12} | ({OTHER: 11} if "dcm" in refused else {})
    assert "pixels not held" in caplog.text
    assert node.spool.pending(9) == []  # for now
    disk.refuses = ""
    node.spool._stuck.clear()  # the time is over
    node.spool.put_event(A, "released")  # of which nothing is known any more: or lost_seconds pass
    node.work()
    assert node.held == sent
    with store.reading(node.engine) as session:
        assert {d.what.subject for d in store.list_deliveries(session)} == {SERIES, OTHER}


def test_a_dead_letter_keeps_its_pixels_for_rule_days(node, caplog):
    node.start(ALL, rule_days=3)
    sent = node.receive(*scan())
    now = datetime.now(UTC)
    node.settle("all", DeliveryState.FAILED, now - timedelta(days=2.9))
    node.work()
    assert node.held == sent
    with store.writing(node.engine) as session:
        assert store.requeue_deliveries(session, now)
    node.settle("all", DeliveryState.FAILED, now - timedelta(days=3.1))
    node.work()
    assert node.held == {}
    assert "pixels given up" in caplog.text
    with pytest.raises(Nothing, match="not held any more"):
        node.make("all")


def test_what_is_dropped_by_hand_lets_go_of_its_pixels(node):
    """Even where it is being sent: how that goes tells nothing any more."""
    node.start(ALL, {**ALL, "name": "second", "send_to": "AI2"}, TELL)
    node.receive(*scan())
    node.settle("second", DeliveryState.FAILED)
    being_sent = node.deliveries()["all"]
    ids = {rule: d.id for rule, d in node.deliveries().items()}
    with store.writing(node.engine) as session:
        dropped = store.drop_deliveries(session, datetime.now(UTC), "by hand")
        assert dropped == [ids["second"]]  # of those that failed
    node.work()
    assert node.held
    with store.writing(node.engine) as session:
        now = datetime.now(UTC)
        assert store.drop_deliveries(session, now, "by hand", [ids["all"], 99]) == [ids["all"]]
        assert store.drop_deliveries(session, now, "by hand", [ids["second"]]) == []
        assert not store.settle_delivery(session, being_sent, DeliveryState.WAITING, now)
    found = node.deliveries()
    assert {r: d.state for r, d in found.items()} == {
        "all": DeliveryState.DROPPED,
        "second": DeliveryState.DROPPED,
        "tell": DeliveryState.WAITING,
    }
    assert found["all"].reason == "by hand"
    node.work()
    assert node.held == {}


@on_sqlite
def test_on_a_disk_that_is_short_dead_letters_go_and_nothing_that_waits(node, monkeypatch, caplog):
    node.start(ALL, {**ALL, "name": "second", "send_to": "AI2"})
    node.receive(*scan())
    node.settle("all", DeliveryState.FAILED)
    node.worker._sweep.watermark_bytes = 1 << 62
    node.work()
    assert node.held  # the second is still tried
    assert "held pixels fill the disk" in caplog.text
    node.settle("second", DeliveryState.FAILED)
    node.worker._sweep.watermark_bytes = 0
    node.worker._sweep.late = timedelta(hours=1)
    node.receive(*scan(OTHER, range(3)), association=B)  # that no rule wants
    assert len(node.held) == 15
    monkeypatch.setattr(Held, "free_bytes", lambda held: 1000 - sum(1 for _ in held.series()))
    node.worker._sweep.watermark_bytes = 999
    node.work()
    assert len(node.held) == 12  # that goes first
    node.worker._sweep.watermark_bytes = 1000
    node.work()
    assert node.held == {}


@on_sqlite
def test_what_the_database_does_not_know_waits_for_a_person_while_there_is_room(node, caplog):
    node.start(NEVER, rule_days=3)
    file = node.folder / "spool" / "held" / "1.2.9" / "1.2.10" / "1.2.11.dcm"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of a database that is gone")

    def left(days: float, watermark_bytes: int = 0) -> bool:
        then = datetime.now(UTC).timestamp() - days * 86_400
        os.utime(file.parent, (then, then))
        node.worker._sweep.watermark_bytes = watermark_bytes
        node.work()
        return file.exists()

    assert left(0.9, 1 << 62)  # it may be stored this moment
    assert left(2.9)
    assert not left(3.1)
    (told,) = (r for r in caplog.records if r.message == "pixels given up")
    assert vars(told)["reason"] == "the database does not know it"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of a database that is gone")
    assert not left(1.1, 1 << 62)


# Kept for good


@on_sqlite
def test_a_folder_for_good_has_every_instance_that_could_be_read(node, tmp_path):
    node.start(NEVER, dicom_path=tmp_path / "kept")
    sent = node.receive(*scan(), *scan(OTHER, range(3)), ct_slice(OTHER, 9, PixelData=b"\0\0"))
    kept = {f.stem: f.read_bytes() for f in (tmp_path / "kept").rglob("*.dcm")}
    assert kept == {uid: data for uid, data in sent.items() if uid != f"{OTHER}.10"}
    assert node.held == {}
    folders = {f.parent.relative_to(tmp_path / "kept") for f in (tmp_path / "kept").rglob("*.dcm")}
    assert folders == {Path(f"{SERIES}.0/{SERIES}"), Path(f"{OTHER}.0/{OTHER}")}


@on_sqlite
def test_rules_send_from_the_folder_for_good_and_what_lay_elsewhere_before(node, tmp_path):
    node.start(ALL)
    sent = node.receive(*scan())
    node.start(dicom_path=tmp_path / "kept")
    sent |= node.receive(ct_slice(SERIES, 12), association=B)
    assert node.make("all") == sent
    node.settle("all", DeliveryState.DONE)
    node.work()
    assert node.held == {}
    assert len(list((tmp_path / "kept").rglob("*.dcm"))) == 1


@on_sqlite
def test_a_folder_for_good_that_cannot_be_made_stops_the_node(node, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"keep\.dicom_path: "):
        node.start(dicom_path=tmp_path / "file" / "kept")


@on_postgres
def test_two_nodes_at_one_database_send_from_one_folder(node, bundle, database_url, tmp_path):
    """A Series that comes in on both, in turn: whichever finishes it, all of it is there."""
    other = Node(tmp_path / "other", node.engine, bundle, database_url)
    for one in (node, other):
        one.start(ALL, dicom_path=tmp_path / "kept")
    slices = scan()
    sent = node.put(*slices[::2], association=A) | other.put(*slices[1::2], association=B)
    while sum(one.worker.step() for one in (node, other)):
        pass
    assert node.make("all") == other.make("all") == sent
    other.stop()
    other.spool.close()


@on_sqlite
def test_what_is_kept_for_good_lies_where_nothing_is_dropped(node, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "spool")
    for place in ("spool/held", "spool", "link/held", "spool/../spool/x"):
        with pytest.raises(
            ValidationError, match=r"keep\.dicom_path: what lies within spool\.path"
        ):
            node.settings(ALL, dicom_path=tmp_path / place)


@on_sqlite
def test_a_folder_that_cannot_be_looked_through_stops_nothing(node, monkeypatch, caplog):
    def refused(held: Held) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    node.start(ALL)
    monkeypatch.setattr(Held, "series", refused)
    sent = node.receive(*scan())
    assert node.make("all") == sent
    assert "pixels not dropped" in caplog.text


# Rules that cannot be read


@on_sqlite
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"when": "covers(liver, 0.8) an slices > 3"}, "rule.all.when: "),
        ({"when": "covers(livre, 0.8)"}, "rule.all.when: no region 'livre'"),
        ({"when": "slices > lots"}, "rule.all.when: slices is a whole number"),
        ({"region": "tail"}, "rule.all.region: no region 'tail': the weight bundle has pelvis"),
    ],
)
def test_a_rule_that_cannot_be_read_names_its_key_and_shows_where(node, changes, message):
    with pytest.raises(ConfigError) as raised:
        Rules.of(node.settings({**ALL, **changes}))
    assert str(raised.value).startswith(message)
    if "when" in changes:
        _, shown, caret = str(raised.value).splitlines()
        assert shown.strip() == changes["when"]
        assert caret.strip() == "^" and caret.index("^") < len(shown)
    with pytest.raises(ConfigError):
        node.start()


@on_sqlite
def test_check_tries_each_rule_and_counts_what_it_would_find(node, tmp_path):
    node.start(ALL, NEVER)
    node.receive(*scan())
    found = {c.name: c for c in checks._rules(node.settings())}
    assert all(c.ok for c in found.values())
    assert found["rule all"].message == "to AI; it is met by 1 of the Series stored"
    assert found["rule never"].message == "to AI; it is met by 0 of the Series stored"
    assert "\nrule.all.send_to = 'AI'\n" in "\n".join(checks.lines(node.settings()))
    node.values["database"] = {"url": f"sqlite:///{tmp_path / 'none.sqlite'}"}
    assert [c.message for c in checks._rules(node.settings())] == ["to AI; it can be read"] * 2
    (wrong,) = checks._rules(node.settings({**ALL, "when": "slices >"}))
    assert not wrong.ok and wrong.message.startswith("rule.all.when: ")
    kept = checks._keep(node.settings(ALL, dicom_path=tmp_path / "kept"))
    assert kept.startswith(f"{tmp_path / 'kept'}, to be made by the node, ")


def test_asks_are_one_a_rule():
    given = Settings(
        node={"peers": [{"ae_title": "AI", "host": "h", "port": 1}]}, rule=[ALL, TELL]
    ).rule
    assert [(a.kind, a.destination, a.rule) for a in rules.asks(SERIES, given)] == [
        (DeliveryKind.FORWARD, "AI", "all"),
        (DeliveryKind.WEBHOOK, TELL["webhook"], "tell"),
    ]


# What a webhook is told


@on_sqlite
def test_a_webhook_is_told_what_matched_and_nothing_of_the_patient(node):
    node.start(TELL)
    node.receive(*scan(levels=range(4, 20)))
    told = matched.make(node.engine, node.settings(), node.deliveries()["tell"])
    shares = {c["region"]: c["fraction"] for c in told.pop("coverage")}
    assert shares == {
        "pelvis": pytest.approx(0.6, abs=0.01), "bladder": 1.0, "chest": pytest.approx(1.0)
    }  # fmt: skip
    quality = told.pop("quality")
    assert quality["pearson_r"] > 0.999 and quality["flags"] == ()
    low, high = told.pop("height_mm")
    assert (low, high) == (pytest.approx(17.5, abs=0.1), pytest.approx(97.5, abs=0.1))
    assert told == {
        "event": "rule",
        "rule": "tell",
        "study_uid": f"{SERIES}.0",
        "series_uid": SERIES,
        "model": node.worker._score.scorer.bundle.digest,
        "slices": 16,
        "spacing_mm": 5.0,
    }


@on_sqlite
def test_a_webhook_is_not_told_what_is_not_true_any_more(node):
    node.start({**TELL, "when": "slices < 13"})
    node.receive(*scan())
    asked = node.deliveries()["tell"]
    node.receive(ct_slice(SERIES, 12), association=B)
    with pytest.raises(Nothing, match="does not meet the rule tell"):
        matched.make(node.engine, node.settings(), asked)
