"""Storage Commitment: asked, answered on either association, failed, and never answered."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, Association, build_context, build_role, evt
from pynetdicom.sop_class import (
    CTImageStorage,
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)
from sqlalchemy import Engine

from dicomnode.config import Settings
from dicomnode.errors import SpoolFull
from dicomnode.model import Commitment, DeliveryState
from dicomnode.node import receive
from dicomnode.node.commit import Commitments
from dicomnode.node.receive import Receiver
from dicomnode.scu import commitment
from dicomnode.spool.disk import Disk
from dicomnode.spool.reports import Report, Reports
from tests import deliveries
from tests.deliveries import (
    FIXED,
    MOVING,
    OURS,
    SETTLE_S,
    Clock,
    arrive,
    eventually,
    every,
    hurry,
    to_peer,
    with_bundle,
)
from tests.dicom import ct_dataset
from tests.peers import archive

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(engine) -> Engine:
    return with_bundle(engine)


@pytest.fixture(autouse=True)
def _soon(monkeypatch) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(commitment, "STAY_S", 0.3)
    monkeypatch.setattr(receive, "STOP_GRACE_S", 0.1)


def settings_for(port: int, tmp_path: Path, **more: Any) -> Settings:
    return deliveries.settings_for(port, tmp_path, commitment=True, registration=[], **more)


def references(action: Dataset) -> list[tuple[str, str]]:
    items = action.ReferencedSOPSequence
    return [(i.ReferencedSOPClassUID, i.ReferencedSOPInstanceUID) for i in items]


def answer(action: Dataset, failed: dict[str, int] | None = None) -> tuple[int, Dataset]:
    """Return event type and information of the answer to an N-ACTION."""
    failed = failed or {}
    information = Dataset()
    information.TransactionUID = action.TransactionUID
    committed, not_so = [], []
    for sop_class_uid, sop_instance_uid in references(action):
        item = Dataset()
        item.ReferencedSOPClassUID = sop_class_uid
        item.ReferencedSOPInstanceUID = sop_instance_uid
        if sop_instance_uid in failed:
            item.FailureReason = failed[sop_instance_uid]
            not_so.append(item)
        else:
            committed.append(item)
    if committed:
        information.ReferencedSOPSequence = committed
    if not_so:
        information.FailedSOPSequence = not_so
    return (2 if not_so else 1), information


def report(assoc: Association, event_type: int, information: Dataset | None) -> int:
    status, _ = assoc.send_n_event_report(
        information, event_type, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
    )
    return int(status.Status) if "Status" in status else -1


def call_back(port: int, *, scp: bool = True, ae_title: str = "PACS") -> Association:
    """Return an association of the peer with the node, for its answers."""
    ae = AE(ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
    ae.add_requested_context(StorageCommitmentPushModel)
    ae.add_requested_context(CTImageStorage)
    roles = [build_role(StorageCommitmentPushModel, scp_role=True)] if scp else []
    return ae.associate("127.0.0.1", port, ae_title="DICOMNODE", ext_neg=roles)


@contextlib.contextmanager
def receiving(settings: Settings) -> Iterator[Receiver]:
    node = settings.node.model_copy(update={"port": 0})
    spool = settings.spool.model_copy(update={"reserve_bytes": 0})
    receiver = Receiver(settings.model_copy(update={"node": node, "spool": spool}))
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


def deliver_and_ask(engine: Engine, settings: Settings, clock: Clock, *series: str) -> None:
    arrive(engine, settings, clock.now, *series)
    service = to_peer(settings, engine, clock)
    clock.pass_(seconds=SETTLE_S)
    while service.step(clock.now):
        pass


def states(engine: Engine) -> set[tuple[DeliveryState, Commitment | None]]:
    return {(d.state, d.commitment) for d in every(engine)}


def test_a_peer_answers_on_the_association_on_which_it_is_asked(node, tmp_path, clock):
    with archive(*OURS, commitment=True) as pacs:
        said: list[int] = []

        def act(event: evt.Event) -> tuple[int, None]:
            # In a thread: the N-ACTION is to be answered first.
            told = answer(event.action_information)
            pacs.later = threading.Timer(0.05, lambda: said.append(report(event.assoc, *told)))
            pacs.later.start()
            return 0x0000, None

        pacs.on_action = act
        settings = settings_for(pacs.port, tmp_path)
        deliver_and_ask(node, settings, clock, MOVING, FIXED)
        eventually(lambda: said)
        assert said == [0x0000]
        (action,) = pacs.actions
        assert sorted(uid for _, uid in references(action)) == sorted(pacs.uids)
        assert states(node) == {(DeliveryState.DONE, Commitment.ASKED)}
        commitments = Commitments(settings, node)
        assert commitments.step(clock.now) == 1
        assert commitments.step(clock.now) == 0
    assert states(node) == {(DeliveryState.DONE, Commitment.COMMITTED)}
    assert to_peer(settings, node, clock).step(clock.pass_(days=9)) == 0


def test_a_peer_answers_later_on_an_association_of_its_own(node, tmp_path, clock):
    with archive(*OURS, commitment=True) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        deliver_and_ask(node, settings, clock, FIXED)
        with receiving(settings) as receiver:
            assoc = call_back(receiver.port)
            assert report(assoc, *answer(pacs.actions[0])) == 0x0000
            # It may send images on the same association, by the fast lane, and report again.
            assert assoc.send_c_store(ct_dataset()).Status == 0x0000
            assert report(assoc, *answer(pacs.actions[0])) == 0x0000
            assoc.release()
        assert Commitments(settings, node).step(clock.now) == 2
    assert states(node) == {(DeliveryState.DONE, Commitment.COMMITTED)}


def test_who_is_no_scp_of_commitment_is_not_taken_for_one(tmp_path):
    settings = settings_for(104, tmp_path)
    with receiving(settings) as receiver:
        assoc = call_back(receiver.port, scp=False)
        assert assoc.is_established  # its images are welcome
        accepted = [c.abstract_syntax for c in assoc.accepted_contexts]
        assert accepted == [CTImageStorage]
        assoc.release()
    assert Reports.of(settings.spool).pending(10) == []


def test_we_commit_ourselves_to_nothing(tmp_path):
    with receiving(settings_for(104, tmp_path)) as receiver:
        ae = AE("PACS")
        ae.acse_timeout = ae.dimse_timeout = 10
        role = build_role(StorageCommitmentPushModel, scp_role=True, scu_role=True)
        contexts = [build_context(StorageCommitmentPushModel)]
        port = receiver.port
        assoc = ae.associate("127.0.0.1", port, contexts, ae_title="DICOMNODE", ext_neg=[role])
        (context,) = assoc.accepted_contexts
        assert context.as_scp and not context.as_scu
        assoc.release()


@pytest.mark.parametrize("what", ["type", "no transaction", "no uid", "nothing"])
def test_a_report_that_makes_no_sense_is_refused(tmp_path, what):
    settings = settings_for(104, tmp_path)
    item, information = Dataset(), Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = "1.2", "1.3"
    information.TransactionUID = "1.2.3"
    information.ReferencedSOPSequence = [item]
    wanted = {"type": 0x0113, "no transaction": 0x0115, "no uid": 0x0115, "nothing": 0x0115}
    if what == "no transaction":
        del information.TransactionUID
    if what == "no uid":
        item.ReferencedSOPInstanceUID = "1"  # a UID has more than one component
    with receiving(settings) as receiver:
        assoc = call_back(receiver.port)
        told = None if what == "nothing" else information
        assert report(assoc, 7 if what == "type" else 1, told) == wanted[what]
        assert Reports.of(settings.spool).pending(10) == []
        assoc.release()


def test_a_report_that_the_disk_does_not_take_is_refused(tmp_path, monkeypatch):
    settings = settings_for(104, tmp_path)

    def no_space(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dicomnode.spool.reports.Disk.sync_whole", no_space)
    action = Dataset()
    action.TransactionUID, action.ReferencedSOPSequence = "1.2.3", []
    with receiving(settings) as receiver:
        assoc = call_back(receiver.port)
        assert report(assoc, *answer(action)) == 0x0213
        assoc.release()


@on_sqlite
def test_what_a_peer_did_not_keep_is_sent_again(node, tmp_path, clock):
    with archive(*OURS, commitment=True) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        deliver_and_ask(node, settings, clock, MOVING, FIXED)
        lost = pacs.uids[0]
        commitments = Commitments(settings, node, luck=lambda: 0.5)
        reports = Reports.of(settings.spool)
        transaction = str(pacs.actions[0].TransactionUID)
        told = Report("PACS", transaction, (pacs.uids[1],), ((lost, 0x0112),))
        reports.put(told)
        commitments.step(clock.now)
        (again,) = (d for d in every(node) if d.sop_instance_uid == lost)
        assert (again.state, again.commitment) == (DeliveryState.WAITING, Commitment.FAILED)
        assert again.reason == "commitment failed: 0112 no such object instance"
        reports.put(told)  # a repeat, as after a crash
        commitments.step(clock.now)

        service = to_peer(settings, node, clock)
        assert service.step(clock.now) == 0
        clock.pass_(minutes=3)
        while service.step(clock.now):
            pass
        assert pacs.uids.count(lost) == 2 and len(pacs.uids) == 3
        assert len(pacs.actions) == 2
        assert references(pacs.actions[1]) == [(str(OURS[1]), lost)]
        # What the peer said of the first does not count against the second.
        reports.put(told)
        commitments.step(clock.now)
        assert {d.state for d in every(node)} == {DeliveryState.DONE}
        reports.put(Report("PACS", str(pacs.actions[1].TransactionUID), (lost,), ()))
        commitments.step(clock.now)
    assert states(node) == {(DeliveryState.DONE, Commitment.COMMITTED)}


@on_sqlite
def test_a_peer_that_keeps_nothing_is_given_up(node, tmp_path, clock):
    with archive(*OURS, commitment=True) as pacs:
        settings = settings_for(pacs.port, tmp_path, give_up_hours=10)
        arrive(node, settings, clock.now, FIXED)
        service, commitments = to_peer(settings, node, clock), Commitments(settings, node)
        clock.pass_(seconds=SETTLE_S)
        for _ in range(200):
            while service.step(clock.now):
                pass
            for action in pacs.actions:
                failed = tuple((uid, 0x0110) for _, uid in references(action))
                Reports.of(settings.spool).put(
                    Report("PACS", str(action.TransactionUID), (), failed)
                )
            pacs.actions.clear()
            commitments.step(clock.now)
            if every(node)[0].state is DeliveryState.FAILED:
                break
            clock.pass_(minutes=10)
        assert 5 <= len(pacs.stored) <= 12
    assert every(node)[0].state is DeliveryState.FAILED
    assert every(node)[0].reason == "commitment failed: 0110 processing failure"


@on_sqlite
def test_a_class_that_a_peer_commits_itself_to_for_nobody_is_not_sent_for_ever(
    node, tmp_path, clock
):
    with archive(*OURS, commitment=True) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        deliver_and_ask(node, settings, clock, FIXED)
        (uid,) = pacs.uids
        transaction = str(pacs.actions[0].TransactionUID)
        Reports.of(settings.spool).put(Report("PACS", transaction, (), ((uid, 0x0122),)))
        Commitments(settings, node).step(clock.now)
    assert states(node) == {(DeliveryState.DONE, Commitment.FAILED)}
    assert every(node)[0].reason == "commitment failed: 0122 referenced SOP Class not supported"


@on_sqlite
def test_a_peer_that_does_not_answer_is_asked_again_and_given_up_visibly(
    node, tmp_path, clock, caplog
):
    with archive(*OURS, commitment=True) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        deliver_and_ask(node, settings, clock, FIXED)
        service = to_peer(settings, node, clock)
        for _ in range(100):
            service.step(clock.pass_(hours=1))
        asked = {str(a.TransactionUID) for a in pacs.actions}
        assert len(asked) == len(pacs.actions) == 7
        assert states(node) == {(DeliveryState.DONE, Commitment.UNANSWERED)}
        assert any(r.getMessage() == "commitment not answered" for r in caplog.records)
        # It does in the end, to the first time it was asked.
        transaction = str(pacs.actions[0].TransactionUID)
        Reports.of(settings.spool).put(Report("PACS", transaction, tuple(pacs.uids), ()))
        Commitments(settings, node).step(clock.now)
    assert states(node) == {(DeliveryState.DONE, Commitment.COMMITTED)}


@on_sqlite
def test_who_does_not_offer_it_is_not_asked(node, tmp_path, clock):
    with archive(*OURS) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        deliver_and_ask(node, settings, clock, FIXED)
        assert states(node) == {(DeliveryState.DONE, None)}
        asked = pacs.associations
        assert to_peer(settings, node, clock).step(clock.pass_(days=1)) == 0
        assert pacs.associations == asked


@on_sqlite
def test_a_peer_that_refuses_the_question_still_gets_what_is_due(node, tmp_path, clock):
    with archive(*OURS, commitment=True) as pacs:
        pacs.on_action = lambda event: (0x0110, None)
        settings = settings_for(pacs.port, tmp_path)
        arrive(node, settings, clock.now, MOVING)
        service = to_peer(settings, node, clock)
        clock.pass_(seconds=SETTLE_S)
        assert [service.step(clock.now) for _ in range(3)] == [1, 1, 0]
        assert states(node) == {(DeliveryState.DONE, Commitment.WANTED)}
        arrive(node, settings, clock.now, FIXED)
        service.step(clock.pass_(seconds=SETTLE_S))
        assert len(pacs.stored) == 2


@on_sqlite
def test_what_was_never_asked_is_not_unanswered(node, tmp_path, clock):
    with archive(*OURS, commitment=True) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        arrive(node, settings, clock.now, FIXED)
        to_peer(settings, node, clock).step(clock.pass_(seconds=SETTLE_S))
        pacs.stop()
        service = to_peer(settings, node, clock)
        tries = sum(bool(service.step(clock.pass_(hours=1))) for _ in range(80))  # and it is away
        assert states(node) == {(DeliveryState.DONE, Commitment.WANTED)}
        assert tries >= 70 and service.step(clock.pass_(minutes=59)) == 0  # once an hour by now
        pacs.start()
        service.step(clock.pass_(minutes=2))
        assert states(node) == {(DeliveryState.DONE, Commitment.ASKED)} and len(pacs.actions) == 1
        service.step(clock.pass_(hours=2))
    assert states(node) == {(DeliveryState.DONE, Commitment.UNANSWERED)}


@on_sqlite
def test_a_forger_commits_nobody(node, tmp_path, clock):
    with archive(*OURS, commitment=True) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        deliver_and_ask(node, settings, clock, FIXED)
        Reports.of(settings.spool).put(Report("MODALITY", "1.2.3", tuple(pacs.uids), ()))
        Reports.of(settings.spool).put(
            Report("MODALITY", "1.2.3", (), tuple((uid, 0x0112) for uid in pacs.uids))
        )
        assert Commitments(settings, node).step(clock.now) == 2
    assert states(node) == {(DeliveryState.DONE, Commitment.ASKED)}


# The folder


REPORT = Report("PACS", "1.2.3", ("1.2.4",), (("1.2.5", 0x0112),))


def test_reports_wait_in_the_order_of_their_coming(tmp_path):
    reports = Reports(tmp_path)
    assert reports.pending(10) == []
    for k in range(3):
        reports.put(Report("PACS", f"1.{k}", (), ()))
    (tmp_path / ".reports" / ".half.json.part").write_text("{")
    waiting = reports.pending(2)
    assert [reports.read(p).transaction_uid for p in waiting] == ["1.0", "1.1"]
    reports.remove(waiting[0])
    reports.remove(waiting[0])
    assert len(reports.pending(10)) == 2


def test_a_report_is_synced_before_it_has_its_name(tmp_path):
    calls: list[str] = []

    class Noting(Disk):
        def sync_whole(self, fd: int) -> None:
            calls.append("sync")
            super().sync_whole(fd)

        def rename(self, source: Path, target: Path) -> None:
            calls.append("rename")
            super().rename(source, target)

        def sync_directory(self, path: Path) -> None:
            calls.append("directory")
            super().sync_directory(path)

    reports = Reports(tmp_path, Noting())
    reports.put(REPORT)
    assert calls[-3:] == ["sync", "rename", "directory"]
    (path,) = reports.pending(10)
    assert reports.read(path) == REPORT
    assert os.stat(path).st_mode & 0o077 == 0


def test_a_full_disk_is_not_filled_with_halves(tmp_path):
    class Full(Disk):
        def write(self, *arguments: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

    reports = Reports(tmp_path, Full())
    for _ in range(3):
        with pytest.raises(SpoolFull, match="No space left"):
            reports.put(REPORT)
    assert list(reports.path.iterdir()) == []


def test_what_was_left_half_written_goes_in_time(tmp_path):
    reports = Reports(tmp_path)
    reports.put(REPORT)
    old, new = (reports.path / f".{name}.json.part" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (0, 0))
    reports.clean()
    assert not old.exists() and new.exists() and len(reports.pending(10)) == 1


def test_no_more_reports_wait_than_there_may(tmp_path, monkeypatch):
    monkeypatch.setattr("dicomnode.spool.reports.MAXIMUM", 2)
    reports = Reports(tmp_path)
    reports.put(REPORT)
    reports.put(REPORT)
    with pytest.raises(SpoolFull):
        reports.put(REPORT)


@on_sqlite
def test_a_report_that_cannot_be_read_stops_no_other(node, tmp_path, clock, caplog):
    settings = settings_for(104, tmp_path)
    reports = Reports.of(settings.spool)
    reports.put(REPORT)
    (reports.path / "0-broken.json").write_text('{"peer": 1')
    assert Commitments(settings, node).step(clock.now) == 2
    assert reports.pending(10) == []
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == ["report not read"]
