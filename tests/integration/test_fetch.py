"""What peers are asked for: which questions, which Series, when, how often, and how it ends."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine

from dicomnode import store
from dicomnode.audit import AuditLog
from dicomnode.cli import main
from dicomnode.config import Settings, load
from dicomnode.core.retrieval import SeriesAnswer, StudyAnswer
from dicomnode.errors import PeerRefused, PeerUnavailable, StoreUnavailable
from dicomnode.model import Evidence, FetchCause, FetchState, PatientKey, Rejection
from dicomnode.node import exchange
from dicomnode.node import fetch as module
from dicomnode.node.catch_up import CatchUp
from dicomnode.node.fetch import Fetcher
from dicomnode.node.hl7 import HL7Listener
from dicomnode.scu import questions
from dicomnode.scu.archive import archive_of
from dicomnode.scu.move import Retrieved
from dicomnode.store import AskPriors, Order, intake
from tests.archives import AWAY, Books
from tests.integration.test_store import (
    MODEL,
    PATIENT,
    finish,
    manifest,
    on_postgres,
    scored,
    sop_uid,
)

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)
TODAY = NOW.astimezone().date()
# What is the same whatever the database.
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
NEW = "1.2.900"  # the Study that arrives
ASK = AskPriors(("PACS",), 30)


def settings(tmp_path: Path, **priors: Any) -> Settings:
    peers = [{"ae_title": name, "host": "127.0.0.1", "port": 104} for name in ("PACS", "VNA")]
    values = {"peers": ["PACS"], "per_minute": 6000, "settle_seconds": 60, **priors}
    return Settings(node={"peers": peers}, spool={"path": tmp_path / "spool"}, priors=values)


@pytest.fixture
def node(engine: Engine) -> Engine:
    with store.writing(engine) as session:
        store.record_model(session, MODEL, manifest(), NOW)
    return engine


@pytest.fixture
def pacs() -> Books:
    return Books()


def arrive(
    engine: Engine,
    study_uid: str = NEW,
    *,
    series_uid: str | None = None,
    count: int = 1,
    at: datetime = NOW,
    ask: AskPriors | None = ASK,
    **attributes: Any,
) -> None:
    """Let slices of a Study arrive."""
    attributes = {"study_datetime": datetime(2026, 3, 4, 9), **attributes}
    results = [
        scored(series_uid or f"{study_uid}.1", k, at=at, study_uid=study_uid, **attributes)
        for k in range(count)
    ]
    with store.writing(engine) as session:
        store.record_slices(session, MODEL, results, priors=ask)


def prior(
    pacs: Books, uid: str, day: date, *, patient: PatientKey = PATIENT, counts: tuple = (40,)
) -> list[str]:
    """Give the archive a Study, and return the UIDs of its Series."""
    series = [SeriesAnswer(uid, f"{uid}.{n}", "CT", c) for n, c in enumerate(counts, 1)]
    total = sum(c or 0 for c in counts)
    pacs.add(StudyAnswer(uid, patient, day, ("CT",), (), len(counts), total), *series)
    return [s.series_uid for s in series]


class Run:
    """A fetcher, and time that goes on as it is told."""

    def __init__(self, engine: Engine, pacs: Books, tmp_path: Path, **priors: Any) -> None:
        self.engine, self.now = engine, NOW
        self.settings = settings(tmp_path, **priors)
        self.audit = tmp_path / "audit.jsonl"
        self.fetcher = Fetcher(self.settings, engine, pacs, AuditLog(self.audit))

    def step(self) -> int:
        done = self.fetcher.step(self.now)
        self.now += timedelta(seconds=1)
        return done

    def steps(self, most: int = 200) -> int:
        """Step until nothing is due, the turns of the peer coming as they come."""
        done = 0
        while self.step():
            done += 1
            assert done < most
        return done

    def after(self, later: timedelta) -> int:
        self.now += later
        with store.writing(self.engine) as session:  # the worker took all that there is
            store.beat(session, store.WORKER, self.now)
        return self.steps()

    def fetches(self) -> dict[str, store.Fetch]:
        with store.reading(self.engine) as session:
            return {f.what.series_uid: f for f in store.list_fetches(session)}

    def inquiries(self) -> dict[str, store.Inquiry]:
        with store.reading(self.engine) as session:
            return {i.subject: i for i in store.list_inquiries(session)}

    def audited(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@pytest.fixture
def run(node: Engine, pacs: Books, tmp_path: Path) -> Iterator[Run]:
    before = threading.active_count()
    yield Run(node, pacs, tmp_path)
    assert threading.active_count() == before


# Priors


def test_the_newest_priors_of_the_patient_are_fetched_series_by_series(run, pacs):
    uids = {}
    for n, year in enumerate((2025, 2024, 2023, 2022), 1):
        uids[year] = prior(pacs, f"1.2.{n}", date(year, 1, 1), counts=(40, 2, 60))
    prior(pacs, "1.2.8", date(2025, 6, 1), patient=PatientKey("P2", "HOSPITAL"))
    arrive(run.engine)
    run.steps()
    first, scout, second = uids[2025]
    assert pacs.retrieved[:2] == [first, second]
    assert set(pacs.retrieved) == {u for y in (2025, 2024, 2023) for u in (uids[y][0], uids[y][2])}
    assert scout not in run.fetches()
    found = run.fetches()[first]
    assert (found.state, found.completed, found.failed) == (FetchState.SENT, 40, 0)
    asked = run.inquiries()[NEW]
    assert (asked.state, asked.studies, asked.series) == (FetchState.DONE, 3, 6)
    assert run.steps() == 0


def test_each_study_asks_once_however_many_series_it_has(run, pacs):
    for n in range(3):
        arrive(run.engine, series_uid=f"{NEW}.{n}")
        run.steps()
    arrive(run.engine, series_uid=f"{NEW}.0", at=NOW + HOUR, count=3)
    run.steps()
    assert pacs.count("find_studies") == 1


def test_a_prior_that_comes_asks_for_no_priors_of_its_own(run, pacs):
    for n, year in enumerate((2025, 2024, 2023, 2022, 2021, 2020), 1):
        prior(pacs, f"1.2.{n}", date(year, 1, 1))

    def send(series: SeriesAnswer) -> Retrieved:
        when = pacs.studies[series.study_uid].study_date
        arrive(
            run.engine,
            series.study_uid,
            series_uid=series.series_uid,
            count=series.instances or 0,
            study_datetime=datetime(when.year, 1, 1),
            ask=AskPriors(("PACS",), 0),  # whatever its age: it is not the age that tells
        )
        return Retrieved(series.instances, 0, 0)

    pacs.on_retrieve = send
    arrive(run.engine)
    run.steps()
    assert sorted(pacs.retrieved) == ["1.2.1.1", "1.2.2.1", "1.2.3.1"]
    assert set(run.inquiries()) == {NEW}


def test_a_study_of_old_asks_for_nothing(run, pacs):
    arrive(run.engine, study_datetime=datetime(2026, 1, 1))
    assert run.inquiries() == {}
    arrive(run.engine, "1.2.901", study_datetime=None)
    assert set(run.inquiries()) == {"1.2.901"}


@pytest.mark.parametrize("attributes", [{"modality": "MR"}, {"patient": PatientKey("")}])
def test_what_is_no_ct_or_nobodys_asks_for_nothing(run, attributes):
    arrive(run.engine, **attributes)
    assert run.inquiries() == {}


def test_nobody_is_asked_unless_one_is_named(run):
    arrive(run.engine, ask=AskPriors((), 30))
    assert run.inquiries() == {}


@pytest.mark.parametrize("patient_id", ["*", "P?", "A\\B"])
def test_a_patient_id_that_would_match_others_is_not_asked_for(run, pacs, patient_id):
    arrive(run.engine, patient=PatientKey(patient_id))
    run.steps()
    asked = run.inquiries()[NEW]
    assert (asked.state, asked.reason) == (FetchState.DROPPED, questions.NOT_ASKABLE)
    assert pacs.calls == []


def test_a_peer_that_passes_over_the_patient_id_makes_us_fetch_nobody_else(run, pacs, caplog):
    pacs.passes_over_keys = True
    own = prior(pacs, "1.2.1", date(2025, 1, 1))
    for n in range(2, 9):
        prior(pacs, f"1.2.{n}", date(2025, 1, n), patient=PatientKey(f"CANARY-{n}", "HOSPITAL"))
    arrive(run.engine)
    run.steps()
    assert pacs.retrieved == own
    assert "7 Studies" in (run.inquiries()[NEW].reason or "")
    assert "answers of other patients" in caplog.text


def test_what_is_here_in_full_is_not_fetched_and_what_is_here_in_part_is(run, pacs):
    whole, part = prior(pacs, "1.2.1", date(2025, 1, 1), counts=(12, 12))
    long_ago = {"at": NOW - DAY, "study_datetime": datetime(2025, 1, 1), "ask": None}
    arrive(run.engine, "1.2.1", series_uid=whole, count=12, **long_ago)
    arrive(run.engine, "1.2.1", series_uid=part, count=11, **long_ago)
    arrive(run.engine)
    run.steps()
    assert pacs.retrieved == [part]


def test_a_series_on_its_way_is_left_alone(run, pacs):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1), counts=(12,))
    old = {"study_datetime": datetime(2025, 1, 1), "ask": None}
    arrive(run.engine, "1.2.1", series_uid=uid, count=3, **old)
    arrive(run.engine)
    run.steps()
    assert pacs.retrieved == []
    arrive(run.engine, "1.2.1", series_uid=uid, count=12, at=NOW + timedelta(seconds=30), **old)
    run.after(timedelta(minutes=5))
    assert pacs.retrieved == []
    assert run.fetches()[uid].state is FetchState.DROPPED
    assert run.fetches()[uid].attempts == 1


def test_what_stopped_half_way_is_fetched_after_a_while(run, pacs):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1), counts=(12,))
    arrive(run.engine, "1.2.1", series_uid=uid, count=3, study_datetime=datetime(2025, 1, 1))
    arrive(run.engine)
    run.steps()
    run.after(timedelta(seconds=61))
    assert pacs.retrieved == [uid]


def test_two_archives_bring_no_more_studies_than_one(node, pacs, tmp_path):
    vna = Books("VNA")
    first = Run(node, pacs, tmp_path, peers=["PACS", "VNA"], count=2)
    second = Run(node, vna, tmp_path, peers=["PACS", "VNA"], count=2)
    for n, year in enumerate((2025, 2023), 1):
        prior(pacs, f"1.2.{n}", date(year, 1, 1))
    for n, year in enumerate((2024, 2022), 5):
        prior(vna, f"1.2.{n}", date(year, 1, 1))
    arrive(node, ask=AskPriors(("PACS", "VNA"), 30))
    first.steps()
    second.steps()
    assert sorted(pacs.retrieved) == ["1.2.1.1", "1.2.2.1"]
    # Of all that is known now, the newest two are one of the first's and one of its own.
    assert vna.retrieved == ["1.2.5.1"]


def test_a_corrected_patient_is_asked_for_anew(run, pacs):
    arrive(run.engine)
    run.steps()
    other = PatientKey("P9", "HOSPITAL")
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1), patient=other)
    arrive(run.engine, patient=other, at=NOW + HOUR)
    run.after(HOUR)
    assert pacs.retrieved == [uid]


OLD = PatientKey("OLD", PATIENT.issuer)


def merge(engine: Engine, merged: PatientKey, into: PatientKey) -> None:
    with store.writing(engine) as session:
        store.link_patients(session, merged, into, store.LinkSource.HL7, NOW, priors=ASK)


def test_priors_are_asked_for_under_every_key_of_the_patient(run, pacs):
    """The archive has earlier Studies under the number of before the merge."""
    (old,) = prior(pacs, "1.2.1", date(2025, 1, 1), patient=OLD)
    (own,) = prior(pacs, "1.2.2", date(2024, 1, 1))
    (odd,) = prior(pacs, "1.2.3", date(2023, 1, 1), patient=PatientKey("A*", PATIENT.issuer))
    prior(pacs, "1.2.4", date(2025, 1, 2), patient=PatientKey("OLD", "ELSEWHERE"))
    known = {"patient": OLD, "study_datetime": datetime(2022, 1, 1)}
    arrive(run.engine, "1.2.5", series_uid="1.2.5.1", count=40, at=NOW - DAY, ask=None, **known)
    merge(run.engine, OLD, PATIENT)
    merge(run.engine, PatientKey("A*", PATIENT.issuer), PATIENT)
    assert run.inquiries() == {}  # nothing of late
    arrive(run.engine)
    run.steps()
    assert pacs.retrieved == [old, own]
    assert odd not in run.fetches()
    asked = [what[0] for call, what in pacs.calls if call == "find_studies"]
    assert sorted(asked) == ["OLD", "P1"]
    assert "1 Studies" in (run.inquiries()[NEW].reason or "")


def test_a_merge_asks_anew_for_the_newest_study(run, pacs):
    """An emergency gets a number of its own, and HL7 says later who that was."""
    emergency = PatientKey("TEMP", PATIENT.issuer)
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1))
    arrive(run.engine, "1.2.901", patient=emergency, study_datetime=datetime(2026, 3, 1))
    arrive(run.engine, patient=emergency)
    run.steps()
    assert pacs.retrieved == []
    merge(run.engine, emergency, PATIENT)
    run.steps()
    assert pacs.retrieved == [uid]
    assert run.fetches()[uid].what.asked_by == NEW
    arrive(run.engine, "1.2.1", series_uid=uid, count=40, study_datetime=datetime(2025, 1, 1))
    # Said once more, it asks nobody; and what came as a prior asks for none by another merge.
    questions = pacs.count("find_studies")
    merge(run.engine, emergency, PATIENT)
    assert run.steps() == 0 and pacs.count("find_studies") == questions
    merge(run.engine, OLD, PATIENT)
    assert {i.subject: i.version for i in run.inquiries().values()} == {NEW: 3, "1.2.901": 1}


@pytest.mark.parametrize("how", ["hl7", "command"])
@on_sqlite
def test_whoever_merges_asks_whom_the_settings_say(run, database_url, tmp_path, how):
    arrive(run.engine, study_datetime=datetime(2020, 1, 1), patient=OLD, ask=None)
    own = f'[database]\nurl = "{database_url}"\n[spool]\npath = "{tmp_path / "spool"}"\n'
    peer = '{ ae_title = "PACS", host = "127.0.0.1", port = 104 }'
    node = f'[node]\npeers = [{peer}]\n[priors]\npeers = ["PACS"]\nrecent_days = 0\n'
    config = tmp_path / "node.toml"
    config.write_text(own + node + '[hl7]\nport = 0\nissuers = { ADT = "HOSPITAL" }\n')
    if how == "command":
        said = ["patient", "merge", "OLD^^^HOSPITAL", "P1^^^HOSPITAL", "--force"]
        done = CliRunner().invoke(main, [*said, "--config", str(config)])
        assert done.exit_code == 0, done.output
    else:
        head = "MSH|^~\\&|ADT|KIS|NODE|RAD|20260501123000||ADT^A40^ADT_A39|M1|P|2.5.1"
        text = f"{head}\rEVN|A40|20260501\rPID|||P1^^^ADT||DOE^JANE\rMRG|OLD^^^ADT\r"
        with contextlib.closing(HL7Listener(load(config), run.engine)) as listener:
            answer = listener._answer(text.encode(), "127.0.0.1", whole=True)
        assert answer is not None and b"MSA|AA" in answer
    assert set(run.inquiries()) == {NEW}


def test_a_rolled_back_arrival_asks_for_nothing(run):
    with pytest.raises(ZeroDivisionError), store.writing(run.engine) as session:
        results = [scored(f"{NEW}.1", 0, at=NOW, study_uid=NEW)]
        store.record_slices(session, MODEL, results, priors=ASK)
        raise ZeroDivisionError
    assert run.inquiries() == {}


# Limits


def test_priors_wait_for_their_hours_and_catching_up_does_not(node, pacs, tmp_path):
    local = NOW.astimezone()
    begin, end = (local + HOUR, local + 2 * HOUR)
    hours = f"{begin:%H:%M}-{end:%H:%M}"
    run = Run(node, pacs, tmp_path, hours=hours, catch_up=["PACS"])
    prior(pacs, "1.2.1", date(2025, 1, 1))
    missed = prior(pacs, "1.2.2", TODAY, patient=PatientKey("P7"))
    arrive(node)
    with store.writing(node) as session:
        store.ask_days(session, "PACS", [TODAY], NOW)
    run.steps()
    run.after(timedelta(minutes=2))
    assert pacs.retrieved == missed
    run.after(HOUR)
    assert pacs.retrieved == [*missed, "1.2.1.1"]


def test_a_peer_is_asked_so_often_a_minute_also_after_a_restart(node, pacs, tmp_path):
    prior(pacs, "1.2.1", date(2025, 1, 1), counts=(40,) * 5)
    arrive(node)
    now, seconds = NOW, []
    while len(seconds) < 6:
        run = Run(node, pacs, tmp_path, per_minute=6)  # each time another process
        if run.fetcher.step(now):
            seconds.append((now - NOW).total_seconds())
        now += timedelta(seconds=1)
        assert now < NOW + HOUR
    # The question takes two requests: it looks into the Study.
    assert [b - a for a, b in pairwise(seconds)] == [20.0, *[10.0] * 4]


def test_what_waits_for_the_turn_is_no_attempt(node, pacs, tmp_path):
    arrive(node)
    with store.writing(node) as session:
        assert store.take_turn(session, "PACS", NOW, HOUR)
        assert not store.take_turn(session, "PACS", NOW + timedelta(minutes=59), HOUR)
    run = Run(node, pacs, tmp_path, per_minute=1 / 60)
    assert run.steps() == 0 and pacs.calls == []
    # Two processes found it due, and the other was quicker.
    claimed = run.fetcher._claim(run.now, tuple(FetchCause))
    assert claimed is not None and not run.fetcher._take_turn(claimed)
    assert run.inquiries()[NEW].attempts == 0
    assert run.inquiries()[NEW].state is FetchState.WAITING


def test_a_turn_from_before_the_clock_was_set_back_is_no_bar(node):
    with store.writing(node) as session:
        assert store.take_turn(session, "PACS", NOW + 100 * DAY, timedelta(seconds=3))
        assert store.take_turn(session, "PACS", NOW, timedelta(seconds=3))


# What goes wrong


def test_a_peer_that_is_away_is_left_alone_and_nothing_counts_as_tried(run, pacs):
    prior(pacs, "1.2.1", date(2025, 1, 1))
    arrive(run.engine)
    pacs.trouble["opened"] = [AWAY] * 3
    assert run.steps() == 1
    assert run.inquiries()[NEW].attempts == 0
    assert run.after(timedelta(seconds=20)) == 0
    assert run.after(timedelta(seconds=10)) == 1  # half a minute after the first
    with store.reading(run.engine) as session:
        (turn,) = store.list_turns(session)
    assert (turn.failures, turn.reason) == (2, str(AWAY))
    assert run.after(timedelta(minutes=2)) == 1
    run.after(timedelta(minutes=10))
    assert pacs.retrieved == ["1.2.1.1"]
    with store.reading(run.engine) as session:
        assert store.list_turns(session)[0].failures == 0


@pytest.mark.parametrize(
    "trouble",
    [PeerUnavailable("PACS broke off during C-MOVE"), PeerRefused("0xA801, Move Destination")],
)
def test_what_fails_is_tried_again_and_keeps_nothing_else_waiting(run, pacs, trouble):
    first, second = prior(pacs, "1.2.1", date(2025, 1, 1), counts=(40, 50))
    pacs.trouble["retrieve"] = [trouble]
    arrive(run.engine)
    run.steps()
    assert pacs.retrieved == [first, second]
    found = run.fetches()
    assert (found[first].state, found[first].reason) == (FetchState.WAITING, str(trouble))
    assert found[second].state is FetchState.SENT
    run.after(timedelta(minutes=1))
    assert run.fetches()[first].state is FetchState.SENT
    assert run.fetches()[first].reason is None


def test_what_never_succeeds_is_given_up_with_its_reason_and_can_be_queued_again(run, pacs):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1))
    pacs.trouble["retrieve"] = [PeerRefused("0xA801, Move Destination unknown")] * 100
    arrive(run.engine)
    for _ in range(100):
        run.after(HOUR)
    found = run.fetches()[uid]
    assert (found.state, found.reason) == (FetchState.FAILED, "0xA801, Move Destination unknown")
    assert found.attempts == module.ATTEMPTS == len(pacs.retrieved)
    pacs.trouble.clear()
    with store.writing(run.engine) as session:
        assert store.requeue_fetches(session, run.now, ["1.2.1"]) == 1
        assert store.requeue_fetches(session, run.now) == 0
    run.steps()
    assert run.fetches()[uid].state is FetchState.SENT


def test_what_waited_too_long_is_given_up(node, pacs, tmp_path):
    run = Run(node, pacs, tmp_path, give_up_hours=2)
    arrive(node)
    pacs.trouble["opened"] = [AWAY] * 100
    for _ in range(10):
        run.after(timedelta(minutes=31))
    assert run.inquiries()[NEW].state is FetchState.FAILED
    assert run.inquiries()[NEW].reason == str(AWAY)


@pytest.mark.parametrize(
    ("retrieved", "reason"),
    [
        (Retrieved(30, 10, 0, "10 of 40 were not sent"), "10 of 40 were not sent"),
        (Retrieved(30, 0, 0), "PACS sent 30 of 40 Instances"),
        (Retrieved(0, 0, 0), "PACS sent 0 of 40 Instances"),
    ],
)
def test_a_series_that_comes_in_part_is_asked_for_again(run, pacs, retrieved, reason):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1))
    answers = [retrieved, Retrieved(40, 0, 0)]
    pacs.on_retrieve = lambda series: answers.pop(0)
    arrive(run.engine)
    run.steps()
    found = run.fetches()[uid]
    assert (found.state, found.reason) == (FetchState.WAITING, reason)
    assert (found.completed, found.failed) == (retrieved.completed, retrieved.failed)
    run.after(timedelta(minutes=2))
    assert run.fetches()[uid].state is FetchState.SENT


def test_a_peer_without_counts_is_believed(run, pacs):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1), counts=(None,))
    pacs.on_retrieve = lambda series: Retrieved(None, None, None)
    arrive(run.engine)
    run.steps()
    assert run.fetches()[uid].state is FetchState.SENT


def test_what_the_peer_names_no_more_fails(run, pacs):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1))
    arrive(run.engine)
    assert run.step()
    pacs.series.clear()
    run.steps()
    assert "names no such" in (run.fetches()[uid].reason or "")
    assert pacs.retrieved == []


@pytest.mark.parametrize("call", ["find_studies", "retrieve"])
def test_what_a_process_that_died_had_claimed_is_done_after_its_lease(run, pacs, call):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1))
    arrive(run.engine)
    pacs.trouble[call] = [KeyboardInterrupt()]  # what nothing catches
    with pytest.raises(KeyboardInterrupt):
        run.steps()
    assert run.steps() == 0
    run.after(module.LEASE + timedelta(seconds=1))
    assert run.fetches()[uid].state is FetchState.SENT


def test_a_lease_is_renewed_while_the_peer_sends(run, pacs, monkeypatch):
    monkeypatch.setattr(module, "RENEW_S", 0.01)
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1))
    arrive(run.engine)
    assert run.step()
    renewed = threading.Event()
    real = store.renew_lease

    def renew(*values: Any) -> bool:
        done = real(*values)
        renewed.set()
        return done

    monkeypatch.setattr(store, "renew_lease", renew)

    def slowly(series: SeriesAnswer) -> Retrieved:
        assert renewed.wait(10)
        return Retrieved(40, 0, 0)

    pacs.on_retrieve = slowly
    run.steps()
    assert run.fetches()[uid].state is FetchState.SENT


def test_two_processes_never_ask_for_the_same(node, pacs, tmp_path):
    prior(pacs, "1.2.1", date(2025, 1, 1), counts=(40,) * 12)
    arrive(node)
    runs = [Run(node, pacs, tmp_path) for _ in range(2)]
    runs[0].fetcher.step(NOW)
    errors: list[BaseException] = []

    def work(run: Run) -> None:
        try:
            for n in range(60):
                run.fetcher.step(NOW + timedelta(seconds=1 + n))
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(pacs.retrieved) == 12 and len(set(pacs.retrieved)) == 12


def test_what_nobody_foresaw_is_tried_some_times_and_given_up(run, pacs, caplog):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1))
    pacs.trouble["retrieve"] = [ZeroDivisionError()] * 100
    arrive(run.engine)
    for _ in range(60):
        run.after(HOUR)
    found = run.fetches()[uid]
    assert (found.state, found.reason) == (FetchState.FAILED, "not understood: ZeroDivisionError")
    assert "fetch not understood" in caplog.text


@on_postgres  # SQLite has one writer at a time
def test_two_workers_that_store_the_same_studies_do_not_wait_for_each_other(node, monkeypatch):
    failed: list[BaseException] = []
    both = threading.Barrier(2)
    real = intake.ask_priors

    def ask(*values: Any, **more: Any) -> None:
        real(*values, **more)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # for the other, should it come so far

    monkeypatch.setattr(intake, "ask_priors", ask)

    def work(*studies: str) -> None:
        results = [
            scored(f"{n}.{uid}", 0, at=NOW, study_uid=uid, study_datetime=datetime(2026, 3, 4))
            for n, uid in enumerate(studies, 1)
        ]
        try:
            with store.writing(node) as session:
                store.record_slices(session, MODEL, results, priors=ASK)
        except BaseException as exc:
            failed.append(exc)

    threads = [
        threading.Thread(target=work, args=studies) for studies in (("7.1", "7.2"), ("7.2", "7.1"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with store.reading(node) as session:
        assert {i.subject for i in store.list_inquiries(session)} == {"7.1", "7.2"}


# What it leaves behind


def test_questions_and_retrievals_are_audited_without_the_patient(run, pacs):
    prior(pacs, "1.2.1", date(2025, 1, 1), patient=PatientKey("CANARY-ID"))
    pacs.trouble["retrieve"] = [PeerRefused("0xA801")]
    arrive(run.engine, patient=PatientKey("CANARY-ID"))
    run.steps()
    lines = run.audited()
    assert [(line["event"], line["outcome"]) for line in lines] == [
        ("query", 0),
        ("query", 0),
        ("retrieve", 4),
    ]
    assert lines[0] | {"peer": "PACS", "by_patient": True, "study_uid": NEW} == lines[0]
    assert lines[0]["studies"] == 1
    assert "CANARY" not in run.audit.read_text()


def test_the_count_that_a_peer_told_completes_a_series_at_once(run, pacs):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1), counts=(12,))
    arrive(run.engine)
    run.steps()
    old = {"study_datetime": datetime(2025, 1, 1), "series_uid": uid}
    arrive(run.engine, "1.2.1", count=11, **old)
    with store.reading(run.engine) as session:
        (series,) = [s for s in store.open_series(session) if s.series_uid == uid]
        assert series.expected == 12
        assert store.next_completion(series, NOW, DAY) is None
    arrive(run.engine, "1.2.1", count=12, **old)
    with store.reading(run.engine) as session:
        (series,) = [s for s in store.open_series(session) if s.series_uid == uid]
        assert store.next_completion(series, NOW, DAY) is Evidence.EXPECTED_COUNT


def test_a_count_of_what_comes_by_itself_completes_nothing(run, pacs):
    (missed,) = prior(pacs, "1.2.1", TODAY, counts=(12,), patient=PatientKey("P7"))
    (early,) = prior(pacs, "1.2.2", date(2025, 1, 1), counts=(12,))
    ask_day(run.engine)
    arrive(run.engine)
    while set(run.fetches()) != {missed, early}:  # both are ordered, and neither is asked for yet
        assert run.step()
    # The forward of one begins, and somebody sends the other: neither needs to end at 12.
    for uid in (missed, early):
        arrive(run.engine, uid[:-2], series_uid=uid, count=12)
    with store.reading(run.engine) as session:
        found = {s.series_uid: s for s in store.open_series(session)}
    for uid in (missed, early):
        assert found[uid].expected is None
        assert store.next_completion(found[uid], NOW, DAY) is None


# Catching up


def ask_day(engine: Engine, day: date = TODAY, at: datetime = NOW) -> None:
    with store.writing(engine) as session:
        store.ask_days(session, "PACS", [day], at)


def test_what_never_came_is_fetched_once_it_was_missing_for_a_while(run, pacs):
    missed = prior(pacs, "1.2.1", TODAY, counts=(12, 13))
    came = prior(pacs, "1.2.2", TODAY, counts=(12,))
    arrive(run.engine, "1.2.2", series_uid=came[0], count=12, at=NOW - HOUR, ask=None)
    prior(pacs, "1.2.3", TODAY - 9 * DAY)
    ask_day(run.engine)
    run.steps()
    assert pacs.retrieved == []
    # One of them comes by itself meanwhile: it had waited in the spool.
    arrive(run.engine, "1.2.1", series_uid=missed[0], count=12, ask=None)
    run.after(timedelta(minutes=2))
    assert pacs.retrieved == [missed[1]]
    assert run.fetches()[missed[0]].state is FetchState.DROPPED
    assert run.fetches()[missed[1]].what.cause is FetchCause.CATCH_UP
    # Nor is it asked for again, the next time the day is looked at.
    ask_day(run.engine, at=run.now)
    run.after(HOUR)
    assert pacs.retrieved == [missed[1]]


def test_what_still_arrives_there_is_left_to_its_forward(run, pacs):
    (uid,) = prior(pacs, "1.2.1", TODAY, counts=(20,))
    ask_day(run.engine)
    run.steps()
    for count in (30, 40, 50):
        pacs.series[uid] = SeriesAnswer("1.2.1", uid, "CT", count)
        run.after(timedelta(minutes=2))
        assert pacs.retrieved == []
    run.after(timedelta(minutes=2))
    assert pacs.retrieved == [uid]
    assert run.fetches()[uid].what.expected == 50


def test_what_grew_after_it_was_fetched_is_fetched_again(run, pacs):
    (uid,) = prior(pacs, "1.2.1", TODAY, counts=(20,))
    ask_day(run.engine)
    run.steps()
    run.after(timedelta(minutes=2))
    assert pacs.retrieved == [uid]
    arrive(run.engine, "1.2.1", series_uid=uid, count=20, ask=None)
    run.after(timedelta(minutes=2))
    assert run.fetches()[uid].state is FetchState.DONE
    pacs.series[uid] = SeriesAnswer("1.2.1", uid, "CT", 25)
    pacs.studies["1.2.1"] = StudyAnswer("1.2.1", PATIENT, TODAY, ("CT",), (), 1, 25)
    ask_day(run.engine, at=run.now)
    run.steps()
    run.after(timedelta(minutes=2))
    assert pacs.retrieved == [uid, uid]


def test_a_study_that_was_complete_and_has_not_grown_is_not_looked_into_again(run, pacs):
    (uid,) = prior(pacs, "1.2.1", TODAY, counts=(12,))
    arrive(run.engine, "1.2.1", series_uid=uid, count=12, at=NOW - HOUR, ask=None)
    for _ in range(3):
        ask_day(run.engine, at=run.now)
        run.steps()
    assert pacs.count("find_series") == 1
    pacs.series["1.2.1.2"] = SeriesAnswer("1.2.1", "1.2.1.2", "CT", 30)
    pacs.studies["1.2.1"] = StudyAnswer("1.2.1", PATIENT, TODAY, ("CT",), (), 2, 42)
    ask_day(run.engine, at=run.now)
    run.steps()
    assert set(run.fetches()) == {"1.2.1.2"}


def test_what_was_missed_asks_for_its_priors_when_it_comes(run, pacs):
    (uid,) = prior(pacs, "1.2.1", TODAY, counts=(12,))
    (old,) = prior(pacs, "1.2.2", date(2024, 1, 1))
    ask_day(run.engine)
    run.steps()
    arrive(run.engine, "1.2.1", series_uid=uid, count=12)
    run.after(timedelta(minutes=2))
    assert pacs.retrieved == [old]


def test_a_node_that_was_down_asks_for_all_of_those_days_and_beats(node, tmp_path):
    conf = settings(tmp_path, catch_up=["PACS", "VNA"], catch_up_minutes=15)
    with store.writing(node) as session:
        store.beat(session, "exchange", NOW - 2 * DAY - HOUR)
    catch_up = CatchUp(conf, node)

    def asked() -> dict[tuple[str, str], int]:
        with store.reading(node) as session:
            return {(i.peer, i.subject): i.version for i in store.list_inquiries(session)}

    catch_up.step(NOW)
    days = [f"{TODAY - n * DAY:%Y%m%d}" for n in range(3)]
    assert {subject for peer, subject in asked() if peer == "VNA"} >= set(days)
    assert set(asked().values()) == {1}
    with store.reading(node) as session:
        assert store.last_beat(session, "exchange") == NOW
    # Not answered yet: it is not asked again, and so what is under way can be settled.
    for seconds in (1, 11, 1000):
        catch_up.step(NOW + timedelta(seconds=seconds))
    assert set(asked().values()) == {1}
    with store.writing(node) as session:
        claimed = store.claim_inquiry(session, "PACS", NOW, HOUR)
        while claimed:
            store.settle_inquiry(session, claimed, FetchState.DONE, NOW + HOUR, found=(0, 0))
            claimed = store.claim_inquiry(session, "PACS", NOW, HOUR)
    catch_up.step(NOW + HOUR + timedelta(minutes=14))
    assert set(asked().values()) == {1}
    catch_up.step(NOW + HOUR + timedelta(minutes=16))
    again = {key for key, version in asked().items() if version == 2}
    assert again == {("PACS", days[0]), ("PACS", days[1])}
    # Nor is what was asked anew asked once more before it is answered.
    catch_up.step(NOW + HOUR + timedelta(minutes=16, seconds=11))
    assert max(asked().values()) == 2
    # A node that starts anew looks at once.
    CatchUp(conf, node).step(NOW + HOUR + timedelta(minutes=17))
    assert asked()["PACS", days[0]] == 3


def test_down_time_is_caught_up_with_as_far_as_the_setting_goes(node, tmp_path):
    with store.writing(node) as session:
        store.beat(session, "exchange", NOW - 300 * DAY)
    CatchUp(settings(tmp_path, catch_up=["PACS"], catch_up_hours=96), node).step(NOW)
    with store.reading(node) as session:
        assert len(store.list_inquiries(session)) == 5


def test_a_crash_before_the_question_is_stored_does_not_hide_the_down_time(
    node, tmp_path, monkeypatch
):
    conf = settings(tmp_path, catch_up=["PACS"])
    with store.writing(node) as session:
        store.beat(session, "exchange", NOW - 3 * DAY)

    def fail(*values: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(store, "ask_days", fail)
        with pytest.raises(ZeroDivisionError):
            CatchUp(conf, node).step(NOW)
    CatchUp(conf, node).step(NOW + timedelta(minutes=1))
    with store.reading(node) as session:
        assert len(store.list_inquiries(session)) == 4


# What a peer says, and what is here


def bring(run: Run, pacs: Books, uid: str, count: int, **attributes: Any) -> None:
    """Let the archive send so many Instances of a Series whenever it is asked for it."""

    def send(series: SeriesAnswer) -> Retrieved:
        when = {"study_datetime": datetime(2025, 1, 1), "ask": None, "at": run.now, **attributes}
        arrive(run.engine, series.study_uid, series_uid=series.series_uid, count=count, **when)
        return Retrieved(series.instances, 0, 0)

    pacs.on_retrieve = send


def test_what_was_sent_is_done_when_it_is_here(run, pacs):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1), counts=(12,))
    bring(run, pacs, uid, 12)
    arrive(run.engine)
    run.steps()
    assert run.fetches()[uid].state is FetchState.SENT
    # Outside its hours, too: nobody is asked.
    run.fetcher._hours = ((run.now - 2 * HOUR).time(), (run.now - HOUR).time())
    run.after(timedelta(minutes=1))
    assert run.fetches()[uid].state is FetchState.DONE
    assert pacs.retrieved == [uid]
    assert run.after(DAY) == 0


def test_what_a_peer_says_it_sent_and_is_not_here_is_asked_for_again(run, pacs):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1), counts=(12,))
    bring(run, pacs, uid, 5)
    arrive(run.engine)
    run.steps()
    run.after(timedelta(minutes=1, seconds=5))
    found = run.fetches()[uid]
    assert (found.state, found.reason) == (
        FetchState.WAITING,
        "PACS says that it sent 12 Instances, and 5 are here",
    )
    bring(run, pacs, uid, 12)
    run.after(timedelta(minutes=2))
    run.after(timedelta(minutes=2))
    assert pacs.retrieved == [uid] * 2
    assert run.fetches()[uid].state is FetchState.DONE


@on_sqlite
def test_nothing_is_asked_for_again_while_it_may_wait_in_the_spool(run, pacs):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1), counts=(12,))
    arrive(run.engine)
    run.steps()
    for _ in range(10):  # the worker is far behind
        run.now += HOUR
        run.steps()
    assert pacs.retrieved == [uid]
    assert run.fetches()[uid].state is FetchState.SENT
    arrive(run.engine, "1.2.1", series_uid=uid, count=12, study_datetime=datetime(2025, 1, 1))
    run.after(HOUR)
    assert run.fetches()[uid].state is FetchState.DONE


@on_sqlite
def test_a_series_that_never_comes_whole_is_sent_three_times_at_most(run, pacs):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1), counts=(12,))
    arrive(run.engine)
    bring(run, pacs, uid, 11)
    send = pacs.on_retrieve

    def in_part(series: SeriesAnswer) -> Retrieved:
        send(series)
        return Retrieved(11, 1, 0, "1 of 12 were not sent")

    pacs.on_retrieve = in_part
    for _ in range(30):
        run.after(HOUR)
    found = run.fetches()[uid]
    assert (found.state, len(pacs.retrieved)) == (FetchState.FAILED, 1 + module.FRUITLESS)
    assert found.reason == "1 of 12 were not sent; sent again 2 times, it brought nothing new"
    # By hand, it is asked for as if it never was.
    with store.writing(run.engine) as session:
        store.requeue_fetches(session, run.now, [uid])
    bring(run, pacs, uid, 12)
    run.after(HOUR)
    run.after(HOUR)
    assert run.fetches()[uid].state is FetchState.DONE


@on_sqlite
def test_a_count_that_goes_up_and_down_is_no_growth(run, pacs):
    (uid,) = prior(pacs, "1.2.1", TODAY, counts=(20,))
    bring(run, pacs, uid, 20, study_datetime=datetime(2026, 3, 4))
    ask_day(run.engine)
    run.steps()
    for n in range(16):
        count = 21 - n % 2
        pacs.series[uid] = SeriesAnswer("1.2.1", uid, "CT", count)
        pacs.studies["1.2.1"] = StudyAnswer("1.2.1", PATIENT, TODAY, ("CT",), (), 1, count)
        ask_day(run.engine, at=run.now)
        run.after(timedelta(minutes=15))
    assert len(pacs.retrieved) <= 1 + module.FRUITLESS
    assert run.fetches()[uid].state is not FetchState.WAITING


@on_sqlite
def test_what_grows_at_the_archive_for_days_is_fetched_as_far_as_it_is(node, pacs, tmp_path):
    run = Run(node, pacs, tmp_path, give_up_hours=1, settle_seconds=600)
    (uid,) = prior(pacs, "1.2.1", TODAY, counts=(20,))
    ask_day(node)
    for n in range(9):
        pacs.series[uid] = SeriesAnswer("1.2.1", uid, "CT", 21 + n)
        run.after(timedelta(minutes=11))
    assert pacs.retrieved == [uid]


def reject(engine: Engine, uid: str, numbers: Iterable[int], code: str = "113001") -> None:
    """Take slices of a Series back."""
    uids = frozenset(sop_uid(uid, k) for k in numbers)
    note = Rejection(f"1.9.{len(uids)}", "1.2.1", code, uids, frozenset(), frozenset({uid}))
    with store.writing(engine) as session:
        store.record_rejection(session, note, "0" * 16, NOW)


@pytest.mark.parametrize("is_finished", [False, True])
def test_what_was_taken_back_in_part_is_fetched_once_more_and_no_more(run, pacs, is_finished):
    """Its archive may have replaced it, or may count it still: its count does not tell."""
    (uid,) = prior(pacs, "1.2.1", TODAY, counts=(20,))
    when = {"study_datetime": datetime(2026, 3, 4), "ask": None, "at": NOW - HOUR}
    arrive(run.engine, "1.2.1", series_uid=uid, count=20, **when)
    reject(run.engine, uid, range(5))
    if is_finished:
        finish(run.engine, uid)
    with store.reading(run.engine) as session:
        held = store.held_series(session, [uid])[uid]
    assert (held.received, held.rejected) == (20, 5)
    bring(run, pacs, uid, 20, study_datetime=datetime(2026, 3, 4))
    for _ in range(8):
        ask_day(run.engine, at=run.now)
        run.after(HOUR)
    assert pacs.retrieved == [uid]
    assert run.fetches()[uid].state is FetchState.DONE


@pytest.mark.parametrize(("code", "count"), [("113001", 20), ("113039", 20), ("113039", 5)])
def test_what_was_taken_back_as_a_whole_or_had_its_time_is_not_fetched(run, pacs, code, count):
    """What expired would count as new, sent again: not because we asked for it."""
    (uid,) = prior(pacs, "1.2.1", TODAY, counts=(20,))
    arrive(run.engine, "1.2.1", series_uid=uid, count=20, at=NOW - HOUR, ask=None)
    reject(run.engine, uid, range(count), code)
    ask_day(run.engine)
    run.steps()
    run.after(HOUR)
    assert run.fetches() == {} and pacs.retrieved == []


# Other archives, and ourselves


def two(node: Engine, pacs: Books, tmp_path: Path) -> tuple[Run, Run, Books, str]:
    """Two archives that have the same prior."""
    vna, (uid,) = Books("VNA"), prior(pacs, "1.2.1", date(2025, 1, 1))
    prior(vna, "1.2.1", date(2025, 1, 1))
    first, second = (Run(node, books, tmp_path, peers=["PACS", "VNA"]) for books in (pacs, vna))
    arrive(node, ask=AskPriors(("PACS", "VNA"), 30))
    return first, second, vna, uid


def test_where_one_archive_fails_another_is_asked_at_once_and_each_in_turn(node, pacs, tmp_path):
    first, second, vna, uid = two(node, pacs, tmp_path)
    first.step()
    second.steps()  # it has it, too
    assert vna.retrieved == []
    for books in (pacs, vna):
        books.trouble["retrieve"] = [PeerRefused("the tape is broken")] * 100
    first.steps()
    assert pacs.retrieved == [uid] and first.fetches()[uid].what.peer == "VNA"
    second.steps()
    assert vna.retrieved == [uid] and first.fetches()[uid].what.peer == "PACS"
    assert first.steps() == 0  # each had its turn
    vna.trouble.clear()
    first.after(timedelta(minutes=6))
    second.after(timedelta(minutes=22))
    assert (len(pacs.retrieved), len(vna.retrieved)) == (2, 2)
    assert first.fetches()[uid].state is FetchState.SENT


@on_sqlite
def test_where_no_archive_can_it_ends(node, pacs, tmp_path):
    first, second, vna, uid = two(node, pacs, tmp_path)
    for books in (pacs, vna):
        books.trouble["retrieve"] = [PeerRefused("the tape is broken")] * 100
    for _ in range(40):
        first.after(HOUR)
        second.after(HOUR)
    assert first.fetches()[uid].state is FetchState.FAILED
    assert len(pacs.retrieved) + len(vna.retrieved) == module.ATTEMPTS


def test_what_waits_for_an_archive_that_is_away_goes_to_another(node, pacs, tmp_path):
    first, second, vna, uid = two(node, pacs, tmp_path)
    (more,) = prior(pacs, "1.2.2", date(2024, 1, 1))
    prior(vna, "1.2.2", date(2024, 1, 1))
    first.step()
    second.steps()
    pacs.trouble["opened"] = [AWAY]
    first.steps()
    second.steps()
    assert sorted(vna.retrieved) == [uid, more] and pacs.retrieved == []
    assert {f.attempts for f in first.fetches().values()} == {1}


def test_another_archive_is_asked_for_what_one_gave_up(node):
    put_order(node, order())
    with store.writing(node) as session:
        taken = store.claim_fetch(session, "PACS", NOW, HOUR)
        assert taken is not None
        store.settle_fetch(session, taken, FetchState.FAILED, NOW, reason="why")
    assert put_order(node, order(peer="VNA")) == ["1.2.1.1"]
    with store.writing(node) as session:
        taken = store.claim_fetch(session, "VNA", NOW, HOUR)
        assert taken is not None
        store.settle_fetch(session, taken, FetchState.FAILED, NOW, reason="why")
    # And neither of them again and again, by looks at the same day.
    assert put_order(node, order(peer="VNA")) == [] and put_order(node, order()) == []


@on_sqlite
@pytest.mark.parametrize(
    "trouble", [PeerRefused("0xA702"), Retrieved(0, 40, 0, "40 of 40 were not sent")]
)
def test_where_our_own_receiver_is_down_no_attempt_is_lost(run, pacs, trouble):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1))
    pacs.our_port_is_open = False

    def fail(series: SeriesAnswer) -> Retrieved:
        if isinstance(trouble, Exception):
            raise trouble
        return trouble

    pacs.on_retrieve = fail
    arrive(run.engine)
    for _ in range(10):  # more than there are attempts
        run.after(HOUR)
    found = run.fetches()[uid]
    assert (found.state, found.attempts) == (FetchState.WAITING, 0)
    assert module.OWN_PORT in (found.reason or "")
    assert len(pacs.retrieved) == 10
    pacs.our_port_is_open = True
    run.after(HOUR)
    assert run.fetches()[uid].attempts == 1
    pacs.our_port_is_open = False
    run.after(3 * DAY)  # nor is it asked for without end
    assert run.fetches()[uid].state is FetchState.FAILED


def test_whether_our_own_port_takes_connections_is_tried(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        conf = settings(tmp_path)
        for host in ("127.0.0.1", "0.0.0.0"):
            own = conf.node.model_copy(update={"host": host, "port": port})
            archive = archive_of(conf.model_copy(update={"node": own}), "PACS")
            assert archive.finds_us()
    assert not archive.finds_us()


# The clock


@pytest.mark.parametrize("what", ["inquiry", "fetch", "turn"])
def test_what_waits_since_before_the_clock_was_set_back_is_due(run, pacs, what):
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1))
    arrive(run.engine)
    later = run.now + 400 * DAY
    with store.writing(run.engine) as session:
        if what == "inquiry":
            store.claim_inquiry(session, "PACS", later, HOUR)
        if what == "fetch":
            store.order_series(session, [order()], later, later)
        if what == "turn":
            store.put_off(session, "PACS", later, module.AWAY, "away")
    run.steps()
    assert pacs.retrieved == [uid]


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25"])  # clocks go on, and back
@on_sqlite
def test_hours_past_midnight_are_those_of_the_wall_when_summer_comes_and_goes(
    node, pacs, tmp_path, berlin, day
):
    run = Run(node, pacs, tmp_path, hours="22:00-06:00")
    begin = datetime.fromisoformat(f"{day}T00:00:00+00:00") - timedelta(hours=6)
    asked = []
    for n in range(24):
        arrive(node, f"1.7.{n}", at=begin, study_datetime=None)
        run.now = begin + n * HOUR
        before = pacs.count("find_studies")
        run.steps()
        if pacs.count("find_studies") > before:
            asked.append(run.now.astimezone().hour)
    missing = {2} if day == "2026-03-29" else set()  # there was no such hour
    assert set(asked) == {22, 23, 0, 1, 2, 3, 4, 5} - missing


# How fast


@on_sqlite
def test_a_day_is_looked_into_by_and_by_and_others_have_their_turn(node, pacs, tmp_path):
    """A request a minute is a request a minute, however many Studies a day has."""
    run = Run(node, pacs, tmp_path, per_minute=60, catch_up=["PACS"])
    for n in range(35):
        prior(pacs, f"1.2.{n}", TODAY, counts=(12,), patient=PatientKey("P7"))
    (old,) = prior(pacs, "1.3.1", date(2025, 1, 1))
    ask_day(node)
    run.step()
    assert pacs.count("find_series") == questions.LOOKS_A_TURN
    assert "25 Studies" in (run.inquiries()[f"{TODAY:%Y%m%d}"].reason or "")
    arrive(node)
    began, looks = run.now, []
    while run.inquiries()[f"{TODAY:%Y%m%d}"].state is not FetchState.DONE:
        run.step()
        looks.append(pacs.count("find_series") + pacs.count("find_studies"))
        assert run.now < began + HOUR
    seconds = (run.now - began).total_seconds()
    assert looks[-1] <= seconds + 2 * questions.LOOKS_A_TURN
    assert old in pacs.retrieved  # before the day was done
    day = run.inquiries()[f"{TODAY:%Y%m%d}"]
    assert (day.studies, day.series, day.attempts) == (35, 35, 1)
    assert len(run.fetches()) == 36


@on_sqlite
def test_what_could_not_be_stored_of_a_day_is_looked_into_again(run, pacs, monkeypatch):
    for n in range(15):
        prior(pacs, f"1.2.{n}", TODAY, counts=(12,), patient=PatientKey("P7"))
    ask_day(run.engine)
    run.step()

    def fail(*values: object) -> None:
        raise StoreUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(store, "order_series", fail)
        with pytest.raises(StoreUnavailable):
            run.after(timedelta(seconds=1))
    run.after(module.LEASE)
    assert len(run.fetches()) == 15


# The tables


def order(uid: str = "1.2.1.1", **values: Any) -> Order:
    given = {
        "study_uid": "1.2.1",
        "peer": "PACS",
        "cause": FetchCause.PRIOR,
        "asked_by": NEW,
        "study_date": date(2025, 1, 1),
        "expected": 40,
    }
    return Order(uid, **{**given, **values})


def put_order(engine: Engine, *orders: Order) -> list[str]:
    with store.writing(engine) as session:
        return store.order_series(session, orders, NOW, NOW)


def test_a_series_is_ordered_once_but_where_it_grew(node):
    assert put_order(node, order(), order("1.2.1.2")) == ["1.2.1.1", "1.2.1.2"]
    assert put_order(node, order(), order(peer="VNA", expected=99)) == []
    with store.writing(node) as session:
        taken = store.claim_fetch(session, "PACS", NOW, HOUR)
        assert taken is not None and taken.what == order()
        assert store.claim_fetch(session, "VNA", NOW, HOUR) is None
        told = {"counts": (40, 0, 0), "fruitless": 1}  # it was sent, and is not here for all that
        assert store.settle_fetch(session, taken, FetchState.DONE, NOW, **told)
    assert put_order(node, order(asked_by="1.2.77")) == []
    assert put_order(node, order(expected=None)) == []
    assert put_order(node, order(expected=41, cause=FetchCause.CATCH_UP)) == ["1.2.1.1"]
    with store.reading(node) as session:
        (again,) = [f for f in store.list_fetches(session) if f.what.series_uid == "1.2.1.1"]
    assert (again.version, again.attempts, again.what.cause) == (2, 0, FetchCause.PRIOR)


def test_what_was_given_up_is_ordered_again_when_another_study_asks(node):
    put_order(node, order())
    with store.writing(node) as session:
        taken = store.claim_fetch(session, "PACS", NOW, HOUR)
        assert taken is not None
        store.settle_fetch(session, taken, FetchState.FAILED, NOW, reason="why")
    assert put_order(node, order()) == []
    assert put_order(node, order(asked_by="1.2.77", peer="VNA")) == ["1.2.1.1"]
    with store.writing(node) as session:
        again = store.claim_fetch(session, "VNA", NOW, HOUR)
    assert again is not None and (again.reason, again.attempts) == (None, 1)


def test_an_older_attempt_does_not_settle_what_was_asked_for_anew(node):
    ask_day(node)
    with store.writing(node) as session:
        taken = store.claim_inquiry(session, "PACS", NOW, HOUR)
    ask_day(node)
    assert taken is not None
    with store.writing(node) as session:
        assert not store.settle_inquiry(session, taken, FetchState.DONE, NOW, found=(0, 0))
        assert not store.renew_lease(session, taken, NOW + DAY)
        assert store.claim_inquiry(session, "PACS", NOW, HOUR) is not None


# Around it


def test_the_exchange_has_a_service_for_each_who_is_asked(node, tmp_path):
    web = {"name": "web", "url": "http://127.0.0.1:9"}
    conf = settings(tmp_path, dicomweb=[web], catch_up=["VNA", "PACS"])
    others = [service.name for service in exchange.services_of(settings(tmp_path, peers=[]), node)]
    names = [service.name for service in exchange.services_of(conf, node)]
    assert names == [*others, "catch up", "fetch PACS", "fetch web", "fetch VNA"]


def cli(database_url: str, tmp_path: Path, *arguments: str, priors: str = "") -> Result:
    config = tmp_path / "node.toml"
    peers = 'peers = [{ ae_title = "PACS", host = "127.0.0.1", port = 104 }]'
    config.write_text(
        f'[database]\nurl = "{database_url}"\n[spool]\npath = "{tmp_path / "spool"}"\n'
        f"[node]\n{peers}\n[priors]\n{priors}\n"
    )
    return CliRunner().invoke(main, ["fetches", "--config", str(config), *arguments])


def test_the_command_lists_what_was_asked_for_and_queues_again(run, pacs, database_url, tmp_path):
    assert cli(database_url, tmp_path).exit_code == 1
    (uid,) = prior(pacs, "1.2.1", date(2025, 1, 1), patient=PatientKey("CANARY-ID"))
    pacs.trouble["retrieve"] = [PeerRefused("0xA801, register our AE title")] * 8
    arrive(run.engine, patient=PatientKey("CANARY-ID"))
    for _ in range(60):
        run.after(HOUR)
    pacs.trouble["opened"] = [AWAY]
    with store.writing(run.engine) as session:
        store.ask_days(session, "PACS", [TODAY], run.now)
    run.steps()
    listed = cli(database_url, tmp_path)
    assert listed.exit_code == 0
    for word in (uid, NEW, "failed", "register our AE title", "Connection refused", "0/40"):
        assert word in listed.output
    assert "PACS is not asked any more" in listed.output  # in the command's settings it is not
    now = datetime.now()
    hours = f"{now + HOUR:%H:%M}-{now + 2 * HOUR:%H:%M}"
    named = cli(database_url, tmp_path, priors=f'catch_up = ["PACS"]\nhours = "{hours}"').output
    assert f"wait for their hours, {hours}" in named and "not asked any more" not in named
    found = json.loads(cli(database_url, tmp_path, "--json", "--state", "failed").stdout)
    assert found["inquiries"] == []
    assert [(s["series_uid"], s["attempts"]) for s in found["series"]] == [(uid, 8)]
    assert found["away"][0]["peer"] == "PACS"
    assert "CANARY" not in listed.output + json.dumps(found)
    assert cli(database_url, tmp_path, "--requeue", "1.2.99").exit_code == 1
    assert "1 queued again" in cli(database_url, tmp_path, "--requeue", uid).output
    run.now = datetime.now(UTC)  # which is the command's
    run.steps()
    assert run.fetches()[uid].state is FetchState.SENT
    assert cli(database_url, tmp_path, "--peer", "VNA").exit_code == 1
