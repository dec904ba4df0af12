"""The outbox: asked for once, taken once, tried again, settled by the version that was sent."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine

from dicomnode import store
from dicomnode.model import DeliveryKind, DeliveryState
from dicomnode.store import Ask

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LEASE = timedelta(minutes=10)
REPORT = Ask(DeliveryKind.REPORT, "PACS", "1.2.3")
PAIR = Ask(DeliveryKind.REGISTRATION, "PACS", "1.2", "1.1")


def ask(engine: Engine, *asks: Ask, at: datetime = NOON, after_s: float = 0) -> None:
    with store.writing(engine) as session:
        store.ask_deliveries(session, asks, at, at + timedelta(seconds=after_s))


def claim(engine: Engine, at: datetime = NOON, limit: int = 10) -> list[store.Delivery]:
    with store.writing(engine) as session:
        return store.claim_deliveries(session, at, LEASE, limit)


def listed(engine: Engine) -> list[store.Delivery]:
    with store.reading(engine) as session:
        return store.list_deliveries(session)


def settle(
    engine: Engine, delivery: store.Delivery, state: DeliveryState, **values: object
) -> bool:
    with store.writing(engine) as session:
        return store.settle_delivery(session, delivery, state, NOON, **values)  # type: ignore[arg-type]  # any of them


def test_what_is_asked_for_twice_is_there_once(engine):
    ask(engine, REPORT, PAIR, REPORT)
    ask(engine, REPORT, at=NOON + timedelta(minutes=1))
    found = {d.what: d for d in listed(engine)}
    assert set(found) == {REPORT, PAIR}
    assert (found[REPORT].version, found[PAIR].version) == (2, 1)
    assert found[REPORT].due_at == NOON + timedelta(minutes=1)


def test_a_delivery_is_taken_when_it_is_due_and_by_one_alone(engine):
    ask(engine, REPORT, after_s=60)
    assert claim(engine) == []
    with store.reading(engine) as session:
        assert store.next_delivery_at(session) == NOON + timedelta(seconds=60)
    (taken,) = claim(engine, NOON + timedelta(seconds=60))
    assert taken.what == REPORT
    assert claim(engine, NOON + timedelta(seconds=61)) == []
    # Whoever took it died: it comes again.
    (again,) = claim(engine, NOON + timedelta(seconds=60) + LEASE)
    assert again.attempts == 1


def test_oldest_first_and_no_more_than_asked_for(engine):
    for n in range(5):
        ask(engine, Ask(DeliveryKind.REPORT, "PACS", f"1.{9 - n}"), after_s=n)
    taken = claim(engine, NOON + timedelta(minutes=1), limit=3)
    assert [d.what.subject for d in taken] == ["1.9", "1.8", "1.7"]


def test_only_the_kinds_and_the_destination_that_are_asked_for(engine):
    ask(engine, REPORT, PAIR, Ask(DeliveryKind.REPORT, "OTHER", "1.2.3"))
    with store.writing(engine) as session:
        kinds = [DeliveryKind.REPORT]
        (taken,) = store.claim_deliveries(session, NOON, LEASE, 9, kinds, "OTHER")
    assert taken.what.destination == "OTHER"


@pytest.mark.parametrize("state", [DeliveryState.DONE, DeliveryState.FAILED, DeliveryState.DROPPED])
def test_what_is_settled_waits_no_more_until_it_is_asked_for_anew(engine, state):
    ask(engine, REPORT)
    (taken,) = claim(engine)
    assert settle(engine, taken, state, reason="why")
    (found,) = listed(engine)
    assert (found.state, found.reason) == (state, "why")
    assert claim(engine, NOON + 2 * LEASE) == []
    ask(engine, REPORT)
    (again,) = claim(engine)
    assert (again.version, again.attempts, again.reason) == (2, 0, None)


def test_an_older_attempt_does_not_settle_what_was_asked_for_meanwhile(engine):
    ask(engine, REPORT)
    (taken,) = claim(engine)
    ask(engine, REPORT)
    assert not settle(engine, taken, DeliveryState.DONE, sop_instance_uid="1.5")
    (found,) = listed(engine)
    assert (found.state, found.sop_instance_uid) == (DeliveryState.WAITING, None)


def test_a_failed_attempt_is_tried_again_at_its_time(engine):
    ask(engine, REPORT)
    (taken,) = claim(engine)
    later = NOON + timedelta(minutes=2)
    assert settle(engine, taken, DeliveryState.WAITING, due_at=later, reason="0xA700")
    assert claim(engine, later - timedelta(seconds=1)) == []
    (again,) = claim(engine, later)
    assert (again.attempts, again.reason) == (1, "0xA700")


def test_what_is_rolled_back_is_not_asked_for(engine):
    with pytest.raises(ZeroDivisionError), store.writing(engine) as session:
        store.ask_deliveries(session, [REPORT], NOON, NOON)
        raise ZeroDivisionError
    assert listed(engine) == []
