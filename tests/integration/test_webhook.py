"""Webhooks: what they are told, how it is signed, and servers that behave badly."""

import contextlib
import hashlib
import hmac
import http.server
import json
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, update

from db import schema
from dicomnode import log, store
from dicomnode.config import Settings
from dicomnode.errors import ConfigError
from dicomnode.model import DeliveryState
from dicomnode.node.deliver import Deliver
from dicomnode.outgoing import webhook
from dicomnode.outgoing.to_webhook import ToWebhook
from tests.deliveries import (
    FIXED,
    MOVING,
    PAIR,
    SETTLE_S,
    Clock,
    arrive,
    every,
    settings_for,
    with_bundle,
)
from tests.dicom import leaks
from tests.peers import listening

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
SECRET = b"a secret of the hospital"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(engine) -> Engine:
    return with_bundle(engine)


@pytest.fixture(autouse=True)
def _soon(monkeypatch) -> None:
    monkeypatch.setattr(webhook, "CONNECT_S", 1.0)
    monkeypatch.setattr(webhook, "STALL_S", 0.5)
    monkeypatch.setattr(webhook, "TOTAL_S", 1.0)


class Hook:
    """A server that notes what it is told, and answers in turn."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.requests.append((self.path, dict(self.headers), body))
                status, headers = hook.answers.pop(0) if hook.answers else (204, {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=t0ps3cret"

    def __enter__(self) -> "Hook":
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def told_by(hook_url: str, tmp_path: Path, **more: Any) -> Settings:
    key = tmp_path / "webhook.key"
    key.write_bytes(SECRET + b"\n")
    wanted = {"registration": [], "report": [], "webhooks": [hook_url]}
    return settings_for(104, tmp_path, webhook_secret_file=key, **{**wanted, **more})


def to_hook(settings: Settings, engine: Engine, clock: Clock) -> Deliver:
    (url,) = settings.deliver.webhooks
    return Deliver(settings, engine, url, ToWebhook(), clock=clock, luck=lambda: 0.5)


def verify(headers: dict[str, str], body: bytes, now: float) -> None:
    """What docs/operations.md tells who listens to do."""
    fields = dict(part.split("=", 1) for part in headers["Dicomnode-Signature"].split(","))
    expected = hmac.new(SECRET, fields["t"].encode() + b"." + body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected, fields["v1"]):
        raise ValueError("not signed by our node")
    if abs(now - int(fields["t"])) > 300:
        raise ValueError("too old: perhaps somebody sends it again")


def test_a_webhook_is_told_of_the_offset_of_a_pair_once(node, tmp_path, clock):
    with Hook() as hook:
        settings = told_by(hook.url, tmp_path)
        arrive(node, settings, clock.now, MOVING, FIXED)
        service = to_hook(settings, node, clock)
        assert service.step(clock.now) == 0
        assert service.step(clock.pass_(seconds=SETTLE_S)) == 1
        assert service.step(clock.pass_(days=9)) == 0
        ((path, headers, body),) = hook.requests
    assert path == "/hook?token=t0ps3cret"
    told = json.loads(body)
    with store.reading(node) as session:
        best = store.offsets_of(session, fixed_study=PAIR[0], moving_study=PAIR[1])[0]
    assert told == {
        "id": headers["Dicomnode-Delivery"],
        "event": "offset",
        "fixed": {"study_uid": PAIR[0], "series_uid": FIXED},
        "moving": {"study_uid": PAIR[1], "series_uid": MOVING},
        "method": "l1",
        "status": "ok",
        "reason": None,
        "offset_mm": best.offset.offset_mm,
        "sigma_mm": None,
        "overlap_mm": best.offset.overlap_mm,
        "dx_mm": best.offset.dx_mm,
        "dy_mm": best.offset.dy_mm,
        "model": best.model,
        "computed_at": best.computed_at.isoformat(),
    }
    assert not leaks(body.decode())
    assert {d.state for d in every(node)} == {DeliveryState.DONE}


@on_sqlite
def test_who_listens_can_tell_who_spoke_and_when(node, tmp_path, clock):
    with Hook() as hook:
        settings = told_by(hook.url, tmp_path)
        arrive(node, settings, clock.now, MOVING, FIXED)
        to_hook(settings, node, clock).step(clock.pass_(seconds=SETTLE_S))
        ((_, headers, body),) = hook.requests
    verify(headers, body, clock.now.timestamp())
    with pytest.raises(ValueError, match="not signed"):
        verify(headers, body.replace(b'"ok"', b'"no"'), clock.now.timestamp())
    with pytest.raises(ValueError, match="too old"):
        verify(headers, body, clock.now.timestamp() + 301)
    signed = headers["Dicomnode-Signature"]
    with pytest.raises(ValueError, match="not signed"):
        later = {"Dicomnode-Signature": signed.replace("t=1", "t=2")}
        verify(later, body, clock.now.timestamp())


def test_the_signature_is_that_of_the_documents():
    at = datetime.fromtimestamp(1_700_000_000, UTC)
    # printf '1700000000.{}' | openssl dgst -sha256 -hmac 0123456789abcdef
    expected = "e4f8e2ecae2295b2ddb2f0b5584c8275e226c0ebe9b3b819e70156bb67122e3e"
    made = webhook.signature(webhook.Secret(b"0123456789abcdef"), b"{}", at)
    assert made == f"t=1700000000,v1={expected}"


@on_sqlite
def test_a_repeat_has_the_same_id_and_another_result_another(node, tmp_path, clock):
    with Hook() as hook:
        hook.answers = [(500, {})]
        settings = told_by(hook.url, tmp_path)
        arrive(node, settings, clock.now, MOVING, FIXED)
        service = to_hook(settings, node, clock)
        service.step(clock.pass_(seconds=SETTLE_S))
        assert every(node)[0].reason == f"{webhook.host_of(hook.url)} answers HTTP 500"
        service.step(clock.pass_(seconds=10))
        with store.writing(node) as session:
            store.requeue_deliveries(session, clock.now, [every(node)[0].id])
            session.execute(update(schema.Offset).values(status="refused", offset_mm=None))
        service.step(clock.now)
        ids = [headers["Dicomnode-Delivery"] for _, headers, _ in hook.requests]
        assert ids[0] == ids[1] != ids[2]
        # Who was told of an offset hears that it is gone.
        last = json.loads(hook.requests[-1][2])
        assert (last["status"], last["offset_mm"]) == ("refused", None)


@on_sqlite
@pytest.mark.parametrize("status", [400, 401, 404, 408, 429, 500, 503, 302, 307])
def test_what_is_not_taken_is_told_again_and_given_up(node, tmp_path, clock, status):
    with Hook() as hook, Hook() as elsewhere:
        hook.answers = [(status, {"Location": elsewhere.url})] * 100
        settings = told_by(hook.url, tmp_path, give_up_hours=0.05)
        arrive(node, settings, clock.now, MOVING, FIXED)
        service = to_hook(settings, node, clock)
        clock.pass_(seconds=SETTLE_S)
        for _ in range(60):
            service.step(clock.pass_(seconds=10))
        found = every(node)[0]
        assert (found.state, found.attempts) == (DeliveryState.FAILED, len(hook.requests))
        assert 5 <= len(hook.requests) <= 8
        assert found.reason == f"{webhook.host_of(hook.url)} answers HTTP {status}"
        assert elsewhere.requests == []  # a redirect is not followed


@on_sqlite
def test_a_webhook_that_is_gone_is_given_up_at_once(node, tmp_path, clock):
    with Hook() as hook:
        hook.answers = [(410, {})]
        settings = told_by(hook.url, tmp_path)
        arrive(node, settings, clock.now, MOVING, FIXED)
        to_hook(settings, node, clock).step(clock.pass_(seconds=SETTLE_S))
    assert every(node)[0].state is DeliveryState.FAILED


@on_sqlite
def test_a_server_that_asks_to_be_left_alone_is(node, tmp_path, clock):
    with Hook() as hook:
        hook.answers = [(429, {"Retry-After": "900"})]
        settings = told_by(hook.url, tmp_path)
        arrive(node, settings, clock.now, MOVING, FIXED)
        service = to_hook(settings, node, clock)
        service.step(clock.pass_(seconds=SETTLE_S))
        service.step(clock.pass_(seconds=899))
        assert len(hook.requests) == 1
        service.step(clock.pass_(seconds=2))
        assert len(hook.requests) == 2


def trickle(connection: Any) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-More: 1\r\n")
        time.sleep(0.05)


def pour(connection: Any) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    while True:
        connection.sendall(bytes(1 << 16))


def be_silent(connection: Any) -> None:
    while connection.recv(1 << 16):
        pass


@pytest.mark.parametrize(
    ("deed", "says"),
    [(be_silent, "does not answer in time"), (trickle, "no answer of"), (pour, None)],
)
def test_a_server_that_behaves_badly_costs_little_time(deed, says):
    with listening(deed) as port:
        start = time.monotonic()
        expected = pytest.raises(webhook.WebhookError, match=says) if says else None
        with expected or contextlib.nullcontext():
            webhook.post(f"http://127.0.0.1:{port}/x", {}, "1.1", None, datetime.now(UTC))
        assert time.monotonic() - start < 4


@on_sqlite
def test_nothing_of_the_path_is_logged(node, tmp_path, clock, caplog):
    caplog.set_level("DEBUG")
    with Hook() as hook:
        url = hook.url
    settings = told_by(url, tmp_path)  # nobody listens there any more
    arrive(node, settings, clock.now, MOVING, FIXED)
    to_hook(settings, node, clock).step(clock.pass_(seconds=SETTLE_S))
    assert every(node)[0].state is DeliveryState.WAITING
    assert any(r.getMessage() == "destination not reached" for r in caplog.records)
    with Hook() as hook:
        webhook.post(hook.url, {}, "1.1", None, clock.now)  # of which httpx2 would tell
    logged = [r for r in caplog.records if log._may_pass(r)]
    said = " ".join(f"{r.getMessage()} {vars(r)}" for r in logged)
    assert "t0ps3cret" not in said and "t0ps3cret" not in (every(node)[0].reason or "")


def test_a_secret_that_can_be_guessed_is_refused(tmp_path):
    (tmp_path / "short").write_text("hunter2\n")
    with pytest.raises(ConfigError, match=r"deliver.webhook_secret_file: 7 bytes"):
        webhook.read_secret(tmp_path / "short")
    with pytest.raises(ConfigError, match=r"deliver.webhook_secret_file: .*No such file"):
        webhook.read_secret(tmp_path / "missing")
    assert webhook.read_secret(None) is None
    assert "hunter" not in repr(webhook.Secret(b"hunter2"))


@pytest.mark.parametrize(
    ("after", "seconds"),
    [
        ("7", 7),
        ("", 0),
        ("soon", 0),
        ("-3", 0),
        ("Mon, 05 Jan 2026 09:00:30 GMT", 30),
        ("nan", 0),
        ("inf", 3600),
        ("1e300", 3600),
    ],
)
def test_retry_after_is_seconds_or_a_date(after, seconds):
    assert webhook._seconds(after, datetime(2026, 1, 5, 9, tzinfo=UTC)) == seconds
