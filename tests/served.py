"""A database with a little of everything, and the page on a socket of its own."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2 as httpx
from sqlalchemy import Engine

from db import engine as engines
from db import migrate
from dicomnode import manifest, store
from dicomnode.config import Settings
from dicomnode.model import DeliveryKind, PatientKey, Reason, SliceHeader
from dicomnode.node.align import AlignStage
from dicomnode.store import Ask, SliceResult
from dicomnode.web import run
from dicomnode.web.tokens import Holder, Role, add
from tests.dicom import CANARIES
from tests.integration.test_store import MODEL, finish, header

# Two Studies of one patient, whose moving one lies 40 mm off, and one of another.
FIXED, MOVING, OTHER = "1.2.30", "1.2.20", "1.2.40"
FIXED_SERIES, MOVING_SERIES, OTHER_SERIES = f"{FIXED}.1", f"{MOVING}.1", f"{OTHER}.1"
OPEN_SERIES, REFUSED_SERIES = f"{OTHER}.2", f"{OTHER}.3"
SHIFT_MM = 40.0
PATIENT = PatientKey(CANARIES["PatientID"], "HOSPITAL")
OTHER_PATIENT = PatientKey("CANARY-2", "HOSPITAL")
T0 = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
START_S = 20.0


def make(url: str) -> None:
    """Make a database, and fill it."""
    engine = engines.create(url)
    migrate.upgrade(engine)
    fill(engine)
    engine.dispose()


def fill(engine: Engine) -> None:
    """Put Series of each state, a pair with its offsets, and deliveries into a database."""
    bundle = manifest.read_manifest(None)
    with store.writing(engine) as session:
        store.record_model(session, MODEL, bundle, T0)
    stack(engine, MOVING_SERIES, MOVING, PATIENT, datetime(2025, 3, 1, 9, 30), SHIFT_MM)
    stack(engine, FIXED_SERIES, FIXED, PATIENT, datetime(2026, 1, 5, 9, 30), 0.0)
    stack(engine, OTHER_SERIES, OTHER, OTHER_PATIENT, None, 0.0, count=30)
    stack(engine, OPEN_SERIES, OTHER, OTHER_PATIENT, None, 0.0, count=12, closed=False)
    with store.writing(engine) as session:
        parts = [
            SliceResult(header_of(REFUSED_SERIES, OTHER, OTHER_PATIENT, None, k), "a" * 16, T0,
                        reason=Reason.LOCALIZER)
            for k in range(3)
        ]  # fmt: skip
        store.record_slices(session, MODEL, parts)
    finish(engine, REFUSED_SERIES)
    while AlignStage(engine).step():
        pass
    with store.writing(engine) as session:
        asks = [Ask(DeliveryKind.REPORT, "PACS", f"1.2.{n}") for n in range(5)]
        asks.append(Ask(DeliveryKind.REGISTRATION, "PACS", FIXED, MOVING))
        store.ask_deliveries(session, asks, T0, T0 + timedelta(minutes=1))


def stack(
    engine: Engine,
    series_uid: str,
    study_uid: str,
    patient: PatientKey,
    when: datetime | None,
    shift_mm: float,
    *,
    count: int = 100,
    closed: bool = True,
) -> None:
    """Store a Series of slices 5 mm apart from body height 0 on; z is height less the shift."""
    heights = manifest.read_manifest(None)["heights"]
    slices = []
    for k in range(count):
        height_mm = 5.0 * k
        score = (height_mm - heights["intercept_mm"]) / heights["mm_per_score"]
        h = header_of(series_uid, study_uid, patient, when, k, height_mm - shift_mm)
        slices.append(SliceResult(h, "a" * 16, T0 + timedelta(seconds=k), score, None, (0.0, 0.0)))
    with store.writing(engine) as session:
        store.record_slices(session, MODEL, slices)
    if closed:
        finish(engine, series_uid)


def header_of(
    series_uid: str,
    study_uid: str,
    patient: PatientKey,
    when: datetime | None,
    k: int,
    z_mm: float = 0.0,
) -> SliceHeader:
    """Return the header of a slice."""
    return header(
        series_uid,
        k,
        study_uid=study_uid,
        patient=patient,
        study_datetime=when,
        image_position=(-100.0, -100.0, z_mm),
    )


@dataclass(frozen=True)
class Page:
    """A page that is up."""

    url: str
    port: int
    settings: Settings
    tokens: dict[str, str]  # role -> token

    def http(self, role: str | None = "read", **headers: str) -> httpx.Client:
        """Return a client that is signed in; None: not."""
        if role is not None and self.tokens:
            headers["Authorization"] = f"Bearer {self.tokens[role]}"
        return httpx.Client(base_url=self.url, headers=headers, timeout=30.0, trust_env=False)

    def audit(self) -> str:
        """Return the audit log."""
        return self.settings.audit_log.read_text()


def settings_of(folder: Path, database_url: str, **web: Any) -> Settings:
    """Return settings of a page."""
    (folder / "spool").mkdir(exist_ok=True)
    return Settings(
        spool={"path": folder / "spool", "reserve_bytes": 0},
        database={"url": database_url},
        web={"port": 0, **web},
    )


@contextlib.contextmanager
def page(folder: Path, database_url: str, *, tokens: bool = True, **web: Any) -> Iterator[Page]:
    """Serve a page in a thread, on a free port of this machine."""
    made = {}
    if tokens:
        web["token_file"] = folder / "tokens"
        made = {str(role): add(web["token_file"], Holder(f"{role}er", role)) for role in Role}
    settings = settings_of(folder, database_url, **web)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    stop, ended = threading.Event(), []

    def serve() -> None:
        try:
            run.run(settings, stop, listening)
        except BaseException as exc:
            ended.append(exc)
            raise

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    scheme = "https" if settings.web.certificate else "http"
    found = Page(f"{scheme}://127.0.0.1:{port}", port, settings, made)
    try:
        deadline = time.monotonic() + START_S
        while not ended and not _answers(found):
            assert time.monotonic() < deadline, "the page does not come up"
            time.sleep(0.02)
        assert not ended
        yield found
    finally:
        stop.set()
        thread.join(START_S)
        assert not thread.is_alive()


def _answers(page: Page) -> bool:
    verify = not page.url.startswith("https")
    with httpx.Client(base_url=page.url, timeout=5.0, trust_env=False, verify=verify) as http:
        try:
            return http.get("/healthz").is_success
        except httpx.TransportError:
            return False
