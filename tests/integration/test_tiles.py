"""The tiles of the live page: what each says of a node, and when it asks for somebody to look."""

import os
import re
import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.errors import DeviceUnavailable, StoreUnavailable
from dicomnode.held import Held, Pixels
from dicomnode.model import DeliveryKind, DeliveryState, FetchCause, FetchState, Flag, Reason
from dicomnode.node import serve
from dicomnode.spool import Spool, pulse
from dicomnode.spool.pulse import Sign
from dicomnode.store import Ask, Order
from dicomnode.web import words
from dicomnode.web.pages import tiles

NOW = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
H100 = "cuda:0, NVIDIA H100, bfloat16"


def part_of(path, **settings):
    """What tiles see of a node."""
    return SimpleNamespace(settings=Settings(spool={"path": path, "reserve_bytes": 0}, **settings))


def device(part, *, later_s: float = 0.0) -> tuple[bool, str]:
    found = tiles.device(part, True, datetime.now(UTC) + timedelta(seconds=later_s))
    return found["fine"], found["said"]


# The device


def test_the_device_is_what_the_worker_says_it_is(tmp_path):
    part = part_of(tmp_path)
    assert device(part) == (True, "the worker starts")
    sign = Sign(tmp_path)
    sign.works_on(H100)
    assert device(part) == (True, H100)
    sign.waits("cuda:0: an illegal memory access")
    assert device(part, later_s=180) == (
        False, f"{H100}: nothing heard of it for 3 minutes"
    )  # fmt: skip
    assert device(part, later_s=10) == (
        False, "cuda:0: an illegal memory access, for less than a minute"
    )  # fmt: skip
    sign.waits("the database does not answer")
    assert device(part)[1].startswith(f"{H100}: the database does not answer")
    sign.goes_on()
    assert device(part) == (True, H100)


def test_without_a_worker_nobody_is_at_the_device(tmp_path):
    Sign(tmp_path).works_on(H100)  # one that died said so
    found = tiles.device(part_of(tmp_path), False, NOW)
    assert not found["fine"] and "no worker" in found["said"]


def test_what_a_worker_of_before_said_is_forgotten(tmp_path):
    spool = Spool.of(Settings(spool={"path": tmp_path / "spool", "reserve_bytes": 0}).spool)
    Sign(spool.path).works_on(H100)
    with spool.lease():
        assert pulse.read(spool.path) is None
    spool.close()


def test_a_worker_that_goes_on_is_heard_of_without_a_byte_written(tmp_path, monkeypatch):
    sign = Sign(tmp_path)
    sign.works_on(H100)
    file = tmp_path / pulse.FILE
    os.utime(file, (0, 0))
    inode = file.stat().st_ino
    sign.goes_on()
    assert file.stat().st_mtime == 0  # not yet: it goes on many times a second
    monkeypatch.setattr(pulse, "BEAT_S", 0.0)
    sign.goes_on()
    assert file.stat().st_ino == inode and file.stat().st_mtime > 1e9
    file.unlink()
    sign.goes_on()  # a folder that was cleared
    found = pulse.read(tmp_path)
    assert found is not None and found.device == H100 and found.waits is None


def test_a_sign_that_cannot_be_given_stops_nobody(tmp_path):
    sign = Sign(tmp_path / "none")
    sign.works_on(H100)
    sign.goes_on()
    assert pulse.read(tmp_path / "none") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"device": "cpu"}', '{"since": "x"}'])
def test_a_sign_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / pulse.FILE).write_text(text)
    assert pulse.read(tmp_path) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DeviceUnavailable("cuda:0: it is gone"), "cuda:0: it is gone"),
        (StoreUnavailable("host db.example, user node"), "the database does not answer"),
        (ValueError("of a patient"), "a step failed: see the log"),
    ],
    ids=["device", "database", "error"],
)
def test_why_a_worker_waits_is_said_until_it_goes_on(tmp_path, monkeypatch, error, said):
    monkeypatch.setattr(serve, "RETRY_S", (0.0,))
    sign, seen = Sign(tmp_path), []

    def step() -> bool:
        seen.append(pulse.read(tmp_path))
        if len(seen) == 1:
            raise error
        sign.goes_on()
        return True

    assert serve._persist(step, threading.Event(), sign)
    assert seen[0] is None and seen[1].waits == said
    assert pulse.read(tmp_path).waits is None


# What waits


def test_held_pixels_are_no_queue(tmp_path):
    part = part_of(tmp_path)
    assert tiles.held().of(part) is None  # no rule sends pixels
    assert tiles.held().of(
        part_of(tmp_path, rule=[{"name": "r", "when": "slices > 1", "send_to": "PACS"}],
                node={"peers": [{"ae_title": "PACS", "host": "127.0.0.1", "port": 104}]})
    )["said"] == "none"  # fmt: skip
    held = Held(part.settings.held_path)
    held.make()
    for series in ("1.2.1", "1.2.2"):
        held.put([Pixels("1.2", series, f"{series}.{k}", b"x" * 100) for k in range(3)])
    held.close()
    assert tiles.held().of(part)["said"] == "2 Series, the oldest for less than a minute"
    assert tiles.queue().of(part) == {"name": "Queue", "fine": True, "said": "nothing waits"}


def test_a_queue_that_does_not_get_on_is_shown(tmp_path):
    part = part_of(tmp_path)
    spool = Spool.of(part.settings.spool)
    entry = spool.put(b"x" * 2_000_000, "a" * 16)
    spool.close()
    found = tiles.queue().of(part)
    assert found["fine"] and found["said"] == "1 waiting, 2.0 MB, for less than a minute"
    assert entry is not None
    kept = tiles.queue()
    assert kept.of(part) == kept.of(part_of(tmp_path / "elsewhere"))  # looked at once in a while
    assert not tiles.queue().of(part_of(tmp_path / "elsewhere"))["fine"]


def test_a_queue_is_old_when_what_came_first_waits_long(tmp_path, monkeypatch):
    part = part_of(tmp_path)
    spool = Spool.of(part.settings.spool)
    spool.put(b"x", "a" * 16)
    spool.close()
    monkeypatch.setattr(tiles, "QUEUE_S", -1.0)
    assert not tiles.queue().of(part)["fine"]


def test_deliveries_that_nobody_sends_are_overdue(engine):
    with store.writing(engine) as session:
        store.ask_deliveries(
            session, [Ask(DeliveryKind.REPORT, "PACS", f"1.2.{n}") for n in range(3)], NOW, NOW
        )
    with store.reading(engine) as session:
        found = tiles.deliveries(session, NOW + timedelta(minutes=5))
        assert found == {"name": "Deliveries", "fine": True, "said": "3 waiting"}
        late = tiles.deliveries(session, NOW + timedelta(minutes=90))
        assert not late["fine"] and "overdue for 1 hour" in late["said"]
    with store.writing(engine) as session:
        for one in store.claim_deliveries(session, NOW, timedelta(minutes=1), 1):
            store.settle_delivery(session, one, DeliveryState.FAILED, NOW, reason="no")
    with store.reading(engine) as session:
        failed = tiles.deliveries(session, NOW)
    assert not failed["fine"] and failed["said"] == "2 waiting, 1 given up"


def test_fetches_are_counted_by_peer(engine, tmp_path):
    part = part_of(tmp_path)
    orders = [
        Order(f"1.2.{n}", "1.2", "OLD" if n % 2 else "NEW", FetchCause.PRIOR, "1.1", None, 20)
        for n in range(5)
    ]
    with store.reading(engine) as session:
        assert tiles.fetches(part, session, NOW) is None  # nobody is asked for anything
    with store.writing(engine) as session:
        store.order_series(session, orders, NOW, NOW)
        store.ask_days(session, "OLD", [NOW.date()], NOW)
        assert store.take_turn(session, "OLD", NOW, timedelta(0))
        one = store.claim_fetch(session, "OLD", NOW, timedelta(minutes=1))
        store.settle_fetch(session, one, FetchState.FAILED, NOW, reason="no")
        done = store.claim_fetch(session, "NEW", NOW, timedelta(minutes=1))
        store.settle_fetch(session, done, FetchState.DONE, NOW)
    with store.reading(engine) as session:
        day_ago = NOW - timedelta(days=1)
        assert store.count_fetches(session, ["NEW"], day_ago) == {FetchState.WAITING: 2}
        found = tiles.fetches(part, session, NOW)
        later = tiles.fetches(part, session, NOW + timedelta(days=2))
    assert not found["fine"] and found["said"] == "2 asked for, 1 given up"  # of OLD alone
    assert later["fine"] and later["said"] == "2 asked for"
    with store.writing(engine) as session:
        store.put_off(session, "OLD", NOW, [timedelta(minutes=1)], "no route")
    with store.reading(engine) as session:
        assert tiles.fetches(part, session, NOW)["said"].endswith("; not reached: OLD")


# Words


def test_every_state_reason_and_flag_has_words_of_its_own():
    for codes, known in ((Reason, words.REASONS), (Flag, words.FLAGS)):
        assert set(known) == set(codes)
        assert len(set(known.values())) == len(known)
        assert not [w for w in known.values() if re.search("_", w)]
    assert words.reason("of_before") == "of before"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "less than a minute"), (59, "less than a minute"), (60, "1 minute"), (7300, "2 hours"),
     (86_400, "1 day"), (1e6, "11 days")],
)  # fmt: skip
def test_how_long_ago_is_said_in_words(seconds, said):
    assert words.ago(seconds) == said
