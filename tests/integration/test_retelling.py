"""Who was told of what is not so any more hears of it: notes, unmerged and corrected patients."""

import json
from datetime import timedelta
from io import BytesIO
from typing import Any

import pytest
from pydicom import dcmread
from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.model import DeliveryKind, DeliveryState, PatientKey, Rejection
from dicomnode.node.deliver import Deliver
from dicomnode.store import LinkSource
from tests.deliveries import (
    FIXED,
    MOVING,
    OURS,
    PAIR,
    SETTLE_S,
    Clock,
    arrive,
    deliveries,
    every,
    settings_for,
    to_peer,
    with_bundle,
)
from tests.integration.test_outbox import LEASE
from tests.integration.test_store import MODEL, scan, sop_uid
from tests.integration.test_webhook import Hook, to_hook, told_by
from tests.peers import archive

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ONE, OTHER = PatientKey("CANARY-A", "H"), PatientKey("CANARY-B", "H")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(engine) -> Engine:
    return with_bundle(engine)


def reject(node: Engine, series_uid: str, clock: Clock) -> None:
    """Reject all of a Series of the fixed Study."""
    note = Rejection(
        sop_instance_uid=f"1.99.{series_uid}",
        study_uid=PAIR[0],
        code="113037",
        instances=frozenset(sop_uid(series_uid, k) for k in range(40)),
        studies=frozenset([PAIR[0]]),
        series=frozenset([series_uid]),
    )
    with store.writing(node) as session:
        assert store.record_rejection(session, note, "z" * 16, clock.now).instances == 40
        store.end_association(session, "z" * 16, "released")


def run(service: Deliver, clock: Clock) -> None:
    for _ in range(4):
        clock.pass_(seconds=SETTLE_S)
        while service.step(clock.now):
            pass


def told(hook: Hook) -> list[dict[str, Any]]:
    return [json.loads(body) for _, _, body in hook.requests]


GONE = {"event": "gone", "fixed": {"study_uid": PAIR[0]}, "moving": {"study_uid": PAIR[1]}}


@on_sqlite
def test_a_webhook_hears_that_a_pair_is_gone_once_a_side_was_rejected(node, tmp_path, clock):
    with Hook() as hook:
        settings = told_by(hook.url, tmp_path)
        arrive(node, settings, clock.now, MOVING, FIXED)
        service = to_hook(settings, node, clock)
        run(service, clock)
        reject(node, FIXED, clock)
        arrive(node, settings, clock.pass_(hours=1))
        run(service, clock)
        first, second = told(hook)
    assert first["event"] == "offset"
    assert {k: v for k, v in second.items() if k != "id"} == GONE
    assert [d.state for d in every(node)] == [DeliveryState.DONE]


@on_sqlite
def test_the_next_best_pair_goes_out_once_the_best_was_rejected(node, tmp_path, clock):
    with archive(*OURS) as pacs:
        settings = settings_for(pacs.port, tmp_path, report=[])
        arrive(node, settings, clock.now, MOVING, FIXED)
        arrive(node, settings, clock.now, f"{FIXED}7", study_uid=PAIR[0])
        service = to_peer(settings, node, clock)
        run(service, clock)
        with store.reading(node) as session:
            best = store.offsets_of(session, fixed_study=PAIR[0])[0].fixed_series
        reject(node, best, clock)
        arrive(node, settings, clock.pass_(hours=1))
        run(service, clock)
        of = [
            dcmread(BytesIO(data), force=True).ReferencedSeriesSequence[0].SeriesInstanceUID
            for _, _, data in pacs.stored
        ]
        assert of == [best, ({FIXED, f"{FIXED}7"} - {best}).pop()]
        for uid in {FIXED, f"{FIXED}7"} - {best}:
            reject(node, uid, clock)
        arrive(node, settings, clock.pass_(hours=1))
        run(service, clock)
    (found,) = every(node)
    assert found.state is DeliveryState.DROPPED and len(pacs.stored) == 2
    assert found.reason == "the offset is gone; what was delivered stays there"


def linked(node: Engine, settings: Settings, clock: Clock) -> int:
    arrive(node, settings, clock.now, MOVING, patient=ONE)
    arrive(node, settings, clock.now, FIXED, patient=OTHER)
    with store.writing(node) as session:
        link = store.link_patients(session, ONE, OTHER, LinkSource.CLI, clock.now).link
    arrive(node, settings, clock.now)
    return link.id


def test_who_was_told_of_a_pair_hears_that_its_merge_was_taken_back(node, tmp_path, clock):
    with Hook() as hook, archive(*OURS) as pacs:
        both = settings_for(pacs.port, tmp_path, report=[], webhooks=[hook.url])
        link = linked(node, both, clock)
        services = [to_peer(both, node, clock), to_hook(both, node, clock)]
        for service in services:
            run(service, clock)
        with store.writing(node) as session:
            changed = store.unlink_patients(session, link, clock.now)
        assert changed is not None and changed.delivered == 1
        for service in services:
            run(service, clock)
        assert [t["event"] for t in told(hook)] == ["offset", "gone"]
        assert len(pacs.stored) == 1
    registration = deliveries(node)[DeliveryKind.REGISTRATION]
    assert (registration.state, registration.reason) == (
        DeliveryState.DONE,
        "not one patient any more",
    )


@on_sqlite
def test_a_notice_on_its_way_while_a_merge_is_taken_back_is_followed_by_another(
    node, tmp_path, clock
):
    with Hook() as hook:
        settings = told_by(hook.url, tmp_path)
        link = linked(node, settings, clock)
        with store.writing(node) as session:
            (taken,) = store.claim_deliveries(session, clock.pass_(minutes=2), LEASE, 9)
        with store.writing(node) as session:
            store.unlink_patients(session, link, clock.now)
        with store.writing(node) as session:  # it arrived
            assert not store.settle_delivery(session, taken, DeliveryState.DONE, clock.now)
        clock.pass_(seconds=LEASE.total_seconds())
        run(to_hook(settings, node, clock), clock)
        assert [t["event"] for t in told(hook)] == ["gone"]


@on_sqlite
def test_nobody_hears_that_a_pair_is_gone_of_which_nobody_was_told(node, tmp_path, clock):
    with Hook() as hook:
        settings = told_by(hook.url, tmp_path)
        link = linked(node, settings, clock)
        with store.writing(node) as session:
            store.unlink_patients(session, link, clock.now)
        run(to_hook(settings, node, clock), clock)
        assert hook.requests == []
    assert [d.state for d in every(node)] == [DeliveryState.DROPPED]


def test_all_reports_of_a_study_follow_it_to_its_patient(node, tmp_path, clock):
    with archive(*OURS) as pacs:
        settings = settings_for(pacs.port, tmp_path, registration=[])

        def record(uid: str, patient: PatientKey) -> None:
            sent = scan(
                uid, 40, at=clock.now - timedelta(hours=1), patient=patient, study_uid="1.9"
            )
            texts = {"PatientID": patient.patient_id, "IssuerOfPatientID": patient.issuer}
            with store.writing(node) as session:
                store.record_slices(session, MODEL, sent, lambda result: texts)

        record("1.3.1", ONE)
        record("1.3.2", ONE)
        arrive(node, settings, clock.now)
        service = to_peer(settings, node, clock)
        run(service, clock)
        record("1.3.1", OTHER)  # alone
        arrive(node, settings, clock.now)
        run(service, clock)
        said = [dcmread(BytesIO(data), force=True) for _, _, data in pacs.stored]
    assert [ds.PatientID for ds in said] == [ONE.patient_id] * 2 + [OTHER.patient_id] * 2
    assert len(set(pacs.uids)) == 4


def test_a_report_of_a_series_that_arrives_again_waits(node, tmp_path, clock):
    with archive(*OURS) as pacs:
        settings = settings_for(pacs.port, tmp_path, registration=[])
        arrive(node, settings, clock.now, MOVING, patient=ONE)
        part = scan(MOVING, 30, at=clock.now, patient=OTHER)  # corrected, and not all of it yet
        with store.writing(node) as session:
            store.record_slices(session, MODEL, part)
        run(to_peer(settings, node, clock), clock)
        assert pacs.stored == []
    (found,) = every(node)
    assert (found.state, found.attempts) == (DeliveryState.WAITING, 0)
    assert found.reason == "the Series is arriving again"
