"""Deliveries when something goes wrong between the outbox and a peer: here, there, or the clock."""

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.model import DeliveryKind, DeliveryState, PatientKey
from dicomnode.node.serve import Worker
from dicomnode.outgoing import Outgoing, report
from dicomnode.outgoing import to_peer as sending
from dicomnode.spool import Spool
from dicomnode.store import Ask, LinkSource
from tests.deliveries import (
    FIXED,
    MOVING,
    OURS,
    PATIENT,
    SETTLE_S,
    Clock,
    arrive,
    deliveries,
    every,
    hurry,
    settings_for,
    to_peer,
    with_bundle,
)
from tests.integration.test_outbox import LEASE, NOON, REPORT, ask, claim, listed, settle
from tests.integration.test_stages import brightness_bundle
from tests.integration.test_store import record, scan
from tests.peers import Archive, archive

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


@pytest.fixture
def pacs() -> Iterator[Archive]:
    with archive(*OURS) as peer:
        yield peer


# What changes while a batch is on its way


def test_what_is_taken_apart_while_others_are_sent_is_not_sent(node, tmp_path, clock, pacs):
    settings = settings_for(pacs.port, tmp_path)
    one, other = PatientKey("CANARY-A", "H"), PatientKey("CANARY-B", "H")
    arrive(node, settings, clock.now, MOVING, patient=one)
    arrive(node, settings, clock.now, FIXED, patient=other)
    with store.writing(node) as session:
        link = store.link_patients(session, one, other, LinkSource.CLI, clock.now).link
    arrive(node, settings, clock.now)

    def unlink(event: Any) -> int:
        with store.writing(node) as session:
            store.unlink_patients(session, link.id, clock.now)
        return 0x0000

    pacs.answers = [unlink]  # during a report; the registration of the two waits behind it
    to_peer(settings, node, clock).step(clock.pass_(seconds=SETTLE_S))
    assert deliveries(node)[DeliveryKind.REGISTRATION].state is DeliveryState.DROPPED
    reports = [d.sop_instance_uid for d in every(node) if d.what.kind is DeliveryKind.REPORT]
    assert sorted(pacs.uids) == sorted(reports)


def test_what_is_dropped_while_others_are_sent_is_not_sent(node, tmp_path, clock, pacs):
    settings = settings_for(pacs.port, tmp_path, registration=[])
    arrive(node, settings, clock.now, MOVING, FIXED)
    last = max(d.id for d in every(node))

    def drop(event: Any) -> int:
        with store.writing(node) as session:
            assert store.drop_deliveries(session, clock.now, "by hand", [last]) == [last]
        return 0x0000

    pacs.answers = [drop]
    to_peer(settings, node, clock).step(clock.pass_(seconds=SETTLE_S))
    assert len(pacs.stored) == 1
    assert {d.id: d.state for d in every(node)}[last] is DeliveryState.DROPPED


@pytest.mark.parametrize("state", [DeliveryState.DONE, DeliveryState.WAITING])
def test_a_pair_that_is_taken_apart_while_it_is_sent_stays_dropped(node, tmp_path, clock, state):
    settings = settings_for(104, tmp_path, report=[])
    one, other = PatientKey("CANARY-A", "H"), PatientKey("CANARY-B", "H")
    arrive(node, settings, clock.now, MOVING, patient=one)
    arrive(node, settings, clock.now, FIXED, patient=other)
    with store.writing(node) as session:
        link = store.link_patients(session, one, other, LinkSource.CLI, clock.now).link
    arrive(node, settings, clock.now)
    with store.writing(node) as session:
        (taken,) = store.claim_deliveries(session, clock.pass_(minutes=2), LEASE, 9)
    with store.writing(node) as session:
        store.unlink_patients(session, link.id, clock.now)
    with store.writing(node) as session:
        assert not store.settle_delivery(session, taken, state, clock.now)
    (found,) = every(node)
    assert (found.state, found.reason) == (DeliveryState.DROPPED, "not one patient any more")


def test_what_was_given_up_while_it_arrived_did_arrive(engine):
    ask(engine, REPORT)
    (taken,) = claim(engine)
    with store.writing(engine) as session:
        assert store.fail_deliveries(session, "PACS", taken.asked_at, "why") == 1
    assert not settle(engine, taken, DeliveryState.WAITING)
    assert settle(engine, taken, DeliveryState.DONE)
    assert listed(engine)[0].state is DeliveryState.DONE


# What cannot be read, and what nobody foresaw


def unreadable() -> bytes:
    raise OSError(errno.EIO, "Input/output error")


def nonsense() -> bytes:
    raise ZeroDivisionError


@on_sqlite
@pytest.mark.parametrize(
    ("read", "says"), [(unreadable, "Input/output error"), (nonsense, "ZeroDivisionError")]
)
def test_what_cannot_be_read_stops_nothing_and_is_given_up(
    node, tmp_path, clock, pacs, monkeypatch, read, says
):
    settings = settings_for(pacs.port, tmp_path, registration=[], give_up_hours=1)
    arrive(node, settings, clock.now, MOVING, FIXED)
    first = min(every(node), key=lambda d: d.id).what.subject

    def make(*arguments: Any) -> Any:
        made = report.make(*arguments)
        bad = arguments[-1].what.subject == first
        return [replace(o, read=read) for o in made] if bad else made

    monkeypatch.setitem(sending.MAKERS, DeliveryKind.REPORT, make)
    service = to_peer(settings, node, clock)
    clock.pass_(seconds=SETTLE_S)
    for _ in range(8):
        service.step(clock.pass_(minutes=11))
    found = {d.what.subject: d for d in every(node)}
    assert found.pop(first).state is DeliveryState.FAILED
    assert [d.state for d in found.values()] == [DeliveryState.DONE]
    failed = next(d for d in every(node) if d.what.subject == first)
    assert failed.reason == f"cannot be read: {says}" and failed.attempts >= 5


@on_sqlite
def test_an_error_that_nobody_foresaw_is_an_attempt_of_that_delivery(
    node, tmp_path, clock, pacs, monkeypatch, caplog
):
    settings = settings_for(pacs.port, tmp_path, registration=[])
    arrive(node, settings, clock.now, MOVING, FIXED, f"{FIXED}.5")
    calls: list[int] = []

    def store_on(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("never seen before")
        return real(*arguments)

    real = sending.store_on
    monkeypatch.setattr(sending, "store_on", store_on)
    to_peer(settings, node, clock).step(clock.pass_(seconds=SETTLE_S))
    (failed,) = (d for d in every(node) if d.state is DeliveryState.WAITING)
    assert (failed.attempts, failed.reason) == (1, "not sent: RuntimeError")
    assert failed.due_at == clock.now + timedelta(seconds=10)
    assert len(pacs.stored) == 2 and pacs.associations == 2  # one of them was in the way
    assert any(r.getMessage() == "delivery not sent" for r in caplog.records)


@on_sqlite
def test_an_error_outside_of_a_delivery_is_an_attempt_of_all(node, tmp_path, clock, monkeypatch):
    settings = settings_for(104, tmp_path, registration=[])
    arrive(node, settings, clock.now, MOVING, FIXED)
    service = to_peer(settings, node, clock)

    def carry(*arguments: Any) -> None:
        raise RuntimeError("never seen before")

    monkeypatch.setattr(service._courier, "carry", carry)
    assert service.step(clock.pass_(seconds=SETTLE_S)) == 2
    assert {(d.attempts, d.reason) for d in every(node)} == {(1, "not sent: RuntimeError")}


# Peers that refuse for now


def images(count: int) -> list[Outgoing]:
    """Return objects that nobody can read as images, and every archive may store."""
    data = b"\0" * 128 + b"DICM\x02\0\0\0UL\x04\0\0\0\0\0" + b"\x10\0\x20\0LO\x02\0A "
    return [
        Outgoing(str(CTImageStorage), f"1.5.{k}", str(ExplicitVRLittleEndian), lambda: data)
        for k in range(count)
    ]


def series_for(node: Engine, clock: Clock, monkeypatch: Any, *sent: list[Outgoing]) -> None:
    """Ask for deliveries of these objects."""
    asks = [Ask(DeliveryKind.REPORT, "PACS", f"1.9.{k}") for k in range(len(sent))]
    made = {a.subject: objects for a, objects in zip(asks, sent, strict=True)}
    with store.writing(node) as session:
        store.ask_deliveries(session, asks, clock.now, clock.now)
    monkeypatch.setitem(sending.MAKERS, DeliveryKind.REPORT, lambda e, s, d: made[d.what.subject])


@on_sqlite
@pytest.mark.parametrize("status", [0xA700, 0xA701, 0x0124])
def test_a_peer_that_takes_nothing_now_is_left_alone_and_gets_the_rest_later(
    node, tmp_path, clock, monkeypatch, status
):
    with archive(CTImageStorage) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        series_for(node, clock, monkeypatch, images(6), images(2))
        said: list[int] = []

        def refuse(event: Any) -> int:
            said.append(status)
            return status

        pacs.answers = [0, 0, refuse]
        service = to_peer(settings, node, clock)
        service.step(clock.now)
        # Neither the rest of that delivery, nor the one behind it.
        assert pacs.uids == ["1.5.0", "1.5.1"] and len(said) == 1
        first, second = sorted(every(node), key=lambda d: d.id)
        assert (first.attempts, second.attempts) == (1, 0)
        assert (first.reason or "").startswith(f"4 of 6: {status:04X} ")
        assert service.step(clock.pass_(seconds=9)) == 0
        service.step(clock.pass_(seconds=2))
        # What it has it does not get again.
        assert sorted(pacs.uids[2:]) == sorted(
            [*(f"1.5.{k}" for k in range(2, 6)), "1.5.0", "1.5.1"]
        )
    assert {d.state for d in every(node)} == {DeliveryState.DONE}


@on_sqlite
def test_a_peer_that_does_not_take_a_sop_class_is_asked_once_a_delivery(
    node, tmp_path, clock, monkeypatch
):
    with archive(CTImageStorage) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        series_for(node, clock, monkeypatch, images(6), images(2))
        asked: list[str] = []

        def refuse(event: Any) -> int:
            asked.append(str(event.request.AffectedSOPInstanceUID))
            return 0x0122

        pacs.answers = [refuse]
        to_peer(settings, node, clock).step(clock.now)
        assert asked == ["1.5.0"]
        assert pacs.uids == ["1.5.0", "1.5.1"]  # of the delivery behind it
    assert sorted(d.state for d in every(node)) == [DeliveryState.DONE, DeliveryState.WAITING]


@on_sqlite
def test_what_was_taken_before_a_peer_broke_off_does_not_go_again(
    node, tmp_path, clock, monkeypatch
):
    with archive(CTImageStorage) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        series_for(node, clock, monkeypatch, images(4))

        def abort(event: Any) -> int:
            event.assoc.abort()
            return 0xC000

        pacs.answers = [0, 0, abort]
        service = to_peer(settings, node, clock)
        service.step(clock.now)
        service.step(clock.pass_(seconds=11))
        assert pacs.uids == [f"1.5.{k}" for k in range(4)]
        # Asked for anew, all of it goes.
        with store.writing(node) as session:
            store.requeue_deliveries(session, clock.now, [every(node)[0].id])
        service.step(clock.now)
        assert len(pacs.uids) == 8


@on_sqlite
def test_an_object_that_needs_another_context_gets_another_association(
    node, tmp_path, clock, monkeypatch
):
    with archive(CTImageStorage, MRImageStorage) as pacs:
        settings = settings_for(pacs.port, tmp_path)
        other = [replace(o, sop_class_uid=str(MRImageStorage)) for o in images(1)]
        series_for(node, clock, monkeypatch, images(1), other, images(1))
        to_peer(settings, node, clock).step(clock.now)
        assert len(pacs.uids) == 3 and pacs.associations == 2
    assert {d.state for d in every(node)} == {DeliveryState.DONE}


# This node, and its clock


@on_sqlite
@pytest.mark.parametrize("count", [3, 25])
def test_what_waited_while_this_node_was_down_is_not_late(
    node, tmp_path, clock, monkeypatch, count
):
    with archive(CTImageStorage) as pacs:
        settings = settings_for(pacs.port, tmp_path, give_up_hours=1)
        series_for(node, clock, monkeypatch, *([image] for image in images(count)))
        clock.pass_(hours=96)
        pacs.stop()
        service = to_peer(settings, node, clock)
        start = clock.now
        while {d.state for d in every(node)} == {DeliveryState.WAITING}:
            service.step(clock.pass_(minutes=2))
        # All of them, and each was tried, though a step takes but a part of them.
        assert {d.state for d in every(node)} == {DeliveryState.FAILED}
        assert all(d.attempts >= 5 for d in every(node))
        assert timedelta(hours=1) <= clock.now - start < timedelta(hours=1.5)


@on_sqlite
def test_what_was_asked_for_late_while_a_peer_is_down_has_its_time(node, tmp_path, clock):
    settings = settings_for(1, tmp_path, give_up_hours=1)
    service = to_peer(settings, node, clock)
    with store.writing(node) as session:
        store.ask_deliveries(session, [replace(REPORT, subject=FIXED)], clock.now, clock.now)
    for _ in range(110):
        service.step(clock.pass_(seconds=30))
    arrive(node, settings, clock.now, FIXED)  # asked for anew
    for _ in range(60):
        service.step(clock.pass_(seconds=30))
    (found,) = deliveries(node, subject=FIXED).values()
    assert found.state is DeliveryState.WAITING and found.attempts >= 2


@on_sqlite
@pytest.mark.parametrize("hours", [1, 24, 24 * 365])
def test_a_clock_that_is_set_back_stops_nothing(node, tmp_path, clock, pacs, hours):
    settings = settings_for(pacs.port, tmp_path, registration=[])
    arrive(node, settings, clock.now, MOVING)
    service = to_peer(settings, node, clock)
    pacs.stop()
    service.step(clock.pass_(seconds=SETTLE_S))
    pacs.start()
    service.step(clock.pass_(hours=-hours))
    service.step(clock.pass_(seconds=1))
    assert {d.state for d in every(node)} == {DeliveryState.DONE}


@on_sqlite
def test_what_is_due_beyond_every_wait_is_due_now(node, tmp_path, clock, pacs):
    settings = settings_for(pacs.port, tmp_path, registration=[])
    arrive(node, settings, clock.now, MOVING)
    clock.pass_(days=-30)  # and nobody saw it: the exchange was off
    service = to_peer(settings, node, clock)
    assert service.step(clock.now) == 1
    service.step(clock.pass_(seconds=1))
    assert {d.state for d in every(node)} == {DeliveryState.DONE}


def test_who_gives_up_does_not_wait_for_who_asks(engine):
    asks = [replace(REPORT, subject=f"1.{k}") for k in (9, 1)]
    for one in asks:  # ids in another order than that in which all are asked for
        ask(engine, one)
    if engine.dialect.name == "sqlite":
        return  # one writer at a time
    with store.writing(engine) as asking:
        store.ask_deliveries(asking, [asks[1]], NOON, NOON)
        with store.writing(engine) as session:
            assert store.fail_deliveries(session, "PACS", NOON, "why") == 1
            store.note_unreached(session, "PACS", NOON, "why")
        store.ask_deliveries(asking, [asks[0]], NOON, NOON)
    assert {(d.state, d.version) for d in listed(engine)} == {(DeliveryState.WAITING, 2)}


@on_sqlite
def test_an_offset_that_is_computed_again_is_the_same_object_to_the_bit(
    node, tmp_path, clock, pacs
):
    settings = settings_for(pacs.port, tmp_path, report=[])
    one, other = PatientKey("CANARY-A", "H"), PatientKey("CANARY-B", "H")
    arrive(node, settings, clock.now, MOVING, patient=one)
    arrive(node, settings, clock.now, FIXED, patient=other)
    service = to_peer(settings, node, clock)
    for _ in range(2):
        with store.writing(node) as session:
            made = store.link_patients(session, one, other, LinkSource.CLI, clock.now)
        arrive(node, settings, clock.now)
        service.step(clock.pass_(seconds=SETTLE_S))
        with store.writing(node) as session:
            store.unlink_patients(session, made.link.id, clock.pass_(hours=5))
    first, second = pacs.stored
    assert first == second


@on_sqlite
def test_the_worker_says_that_what_waits_has_no_destination(
    engine, tmp_path, clock, database_url, caplog
):
    made = brightness_bundle(tmp_path / "bundle")
    settings = Settings(
        spool={"path": tmp_path / "spool", "reserve_bytes": 0},
        database={"url": database_url},
        score={"model": tmp_path / "bundle", "device": "cpu", "dtype": "float32"},
    )
    assert made.digest
    with store.writing(engine) as session:
        asks = [REPORT, Ask(DeliveryKind.WEBHOOK, "http://h/a?token=t0ps3cret", "1.2", "1.1")]
        store.ask_deliveries(session, asks, clock.now, clock.now)
    with contextlib.closing(Spool(tmp_path / "spool")) as spool:
        Worker(settings, spool, engine).close()
    (said,) = (r for r in caplog.records if r.getMessage() == "deliveries wait for nobody")
    assert said.destinations == ["PACS", "h"]


# Floods


OTHER = PatientKey("CANARY-OTHER", "HOSPITAL")


def asked(node: Engine) -> set[tuple[str, str, str]]:
    return {(str(d.what.kind), d.what.subject, d.what.other) for d in every(node)}


def day(k: int) -> datetime:
    return datetime(2026, 1, 1 + k)


@pytest.mark.parametrize("which", ["newest", "all"])
def test_a_prior_is_registered_to_the_newest_study_alone(node, tmp_path, clock, which):
    hook = "http://127.0.0.1:1/hook"
    settings = settings_for(104, tmp_path, report=[], registration_pairs=which, webhooks=[hook])
    arrive(node, settings, clock.now, "1.3.3", study_datetime=day(3))
    for k in (1, 2):  # its priors come later, as they are fetched
        arrive(node, settings, clock.now, f"1.3.{k}", study_datetime=day(k))
    pairs = {("1.3.3.0", "1.3.1.0"), ("1.3.3.0", "1.3.2.0")}
    every_pair = pairs | {("1.3.2.0", "1.3.1.0")}
    wanted = pairs if which == "newest" else every_pair
    found = asked(node)
    assert {tuple(p) for kind, *p in found if kind == "registration"} == wanted
    assert {tuple(p) for kind, *p in found if kind == "webhook"} == every_pair
    # A newer one: the pair that went out before goes out again when it changes.
    arrive(node, settings, clock.now, "1.3.4", study_datetime=day(4))
    before = {(d.what.subject, d.what.other): d.version for d in every(node)}
    arrive(node, settings, clock.now, "1.3.3.5", study_uid="1.3.3.0", study_datetime=day(3))
    after = {(d.what.subject, d.what.other): d.version for d in every(node)}
    assert after["1.3.3.0", "1.3.1.0"] > before["1.3.3.0", "1.3.1.0"]
    assert ("registration", "1.3.4.0", "1.3.1.0") in asked(node)


def test_all_studies_of_the_latest_day_are_the_newest(node, tmp_path, clock):
    settings = settings_for(104, tmp_path)
    morning = datetime(2026, 1, 4, 8)
    for uid, when in (("1.3.1", day(2)), ("1.3.2", morning), ("1.3.3", morning.replace(hour=9))):
        arrive(node, settings, clock.now, uid, study_datetime=when)
    arrive(node, settings, clock.now, "1.3.9", study_datetime=None, patient=OTHER)
    arrive(node, settings, clock.now, "1.3.8", study_datetime=day(20), patient=OTHER)
    with store.reading(node) as session:
        studies = [f"1.3.{k}.0" for k in (1, 2, 3, 8, 9)]
        assert store.newest_studies(session, studies) == {"1.3.2.0", "1.3.3.0", "1.3.8.0"}


@on_sqlite
def test_an_archive_that_is_imported_goes_to_nobody(node, tmp_path, clock):
    settings = settings_for(104, tmp_path, webhooks=["http://127.0.0.1:1/hook"])
    old = clock.now.replace(tzinfo=None) - timedelta(days=32)
    arrive(node, settings, clock.now, "1.3.1", study_datetime=old - timedelta(days=400))
    arrive(node, settings, clock.now, "1.3.2", study_datetime=old)
    assert every(node) == []
    # The prior of one of today is registered, and has no report of its own.
    arrive(node, settings, clock.now, "1.3.3", study_datetime=old + timedelta(days=2))
    kinds = {(kind, subject) for kind, subject, _ in asked(node)}
    assert kinds == {(k, "1.3.3.0") for k in ("registration", "webhook")} | {("report", "1.3.3")}
    # A year later, what was told of is told anew where it changes.
    clock.pass_(days=365)
    versions = {d.what: d.version for d in every(node)}
    record(node, scan("1.3.3", 41, patient=PATIENT, study_datetime=old + timedelta(days=2))[40:])
    arrive(node, settings, clock.now)
    assert all(d.version == versions[d.what] + 1 for d in every(node))
    everything = settings_for(104, tmp_path, recent_days=0)
    arrive(node, everything, clock.now, "1.3.0", study_datetime=old - timedelta(days=900))
    assert ("report", "1.3.0", "") in asked(node)
