"""Curves, offsets and what they ask for, for tests of delivery."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import Comprehensive3DSRStorage, SpatialRegistrationStorage
from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.model import DeliveryKind, PatientKey
from dicomnode.node.align import AlignStage
from dicomnode.node.assemble import AssembleStage
from dicomnode.node.deliver import Deliver
from dicomnode.outgoing.asking import Asking
from dicomnode.outgoing.to_peer import ToPeer
from dicomnode.scu import association, storage, transport
from dicomnode.store import Delivery
from tests.integration.test_store import MODEL, T0, A, manifest, record, scan

OURS = (SpatialRegistrationStorage, Comprehensive3DSRStorage)
FIXED, MOVING = "1.2.2", "1.2.1"  # Series; their Studies end in .0
PAIR = ("1.2.2.0", "1.2.1.0")
PATIENT = PatientKey("CANARY-ID", "HOSPITAL")
SETTLE_S = 60.0


class Clock:
    """The time, which passes when it is told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 5, 9, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **time: float) -> datetime:
        self.now += timedelta(**time)
        return self.now


def with_bundle(engine: Engine) -> Engine:
    """Return a database that knows the bundle."""
    with store.writing(engine) as session:
        store.record_model(session, MODEL, {**manifest(), "regions": []}, T0)
    return engine


def hurry(monkeypatch: pytest.MonkeyPatch, *, accept_s: float = 8.0, answer_s: float = 8.0) -> None:
    """Wait for a peer as long as a busy machine needs, or for one that hangs as a test may."""
    monkeypatch.setattr(association, "ACSE_S", accept_s)
    monkeypatch.setattr(association, "GRACE_S", 0.5)
    monkeypatch.setattr(storage, "ANSWER_S", answer_s)
    monkeypatch.setattr(storage, "STALL_S", answer_s)
    monkeypatch.setattr(transport, "STALL_S", answer_s)


def settings_for(port: int, tmp_path: Path, **more: Any) -> Settings:
    wanted = {"registration": ["PACS"], "report": ["PACS"], "commitment": False}
    return Settings(
        node={"peers": [{"ae_title": "PACS", "host": "127.0.0.1", "port": port}]},
        spool={"path": tmp_path / "spool"},
        deliver={**wanted, "settle_seconds": SETTLE_S, **more},
    )


def arrive(
    engine: Engine, settings: Settings, now: datetime, *series: str, **attributes: Any
) -> None:
    """Store the curves of Series and the offsets that follow, as the worker does."""
    for uid in series:
        day = 5 if uid.startswith(FIXED) else 4
        values = {"patient": PATIENT, "study_datetime": datetime(2026, 1, day), **attributes}
        record(engine, scan(uid, 40, at=now - timedelta(hours=1), **values))
    with store.writing(engine) as session:
        store.end_association(session, A, "released")
    asking = Asking(settings)
    AssembleStage(engine, 1.0, 600.0, asking=asking).step(now, now)
    align = AlignStage(engine, asking, clock=lambda: now)
    while align.step():
        pass


def deliveries(engine: Engine, **filters: Any) -> dict[DeliveryKind, Delivery]:
    with store.reading(engine) as session:
        return {d.what.kind: d for d in store.list_deliveries(session, **filters)}


def every(engine: Engine) -> list[Delivery]:
    with store.reading(engine) as session:
        return store.list_deliveries(session)


def to_peer(settings: Settings, engine: Engine, clock: Clock) -> Deliver:
    peer = settings.peer("PACS")
    assert peer is not None
    courier = ToPeer(settings, peer)
    return Deliver(settings, engine, "PACS", courier, clock=clock, luck=lambda: 0.5)


def eventually(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return found
