"""Patients of several keys: whatever the order of merges and unmerges, pairs are those of today."""

import json
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, event, select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode import store
from dicomnode.cli import main
from dicomnode.errors import StoreUnavailable
from dicomnode.mining import evaluate
from dicomnode.model import DeliveryKind, DeliveryState, Method, PatientKey, SeriesState
from dicomnode.store import Ask, Changed, LinkSource, intake
from tests.integration import test_mining as mining
from tests.integration.test_store import (
    EARLIER,
    LATER,
    MODEL,
    OTHER_MODEL,
    T0,
    add_curve,
    exchange_bundle,
    finish,
    finish_in,
    node,
    pairs,
    record,
    scan,
    scored,
    series_of,
    settle,
)
from tests.soak import patients as soak

__all__ = ["node"]

A, B, C = (PatientKey(name, "HOSPITAL") for name in "ABC")
on_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
MIDDLE = datetime(2024, 9, 1, 9, 0)


def link(engine: Engine, merged: PatientKey, into: PatientKey) -> Changed:
    with store.writing(engine) as session:
        return store.link_patients(session, merged, into, LinkSource.CLI, T0)


def unlink(engine: Engine, link_id: int) -> Changed:
    with store.writing(engine) as session:
        changed = store.unlink_patients(session, link_id, T0)
    assert changed is not None
    return changed


def keys(engine: Engine, key: PatientKey) -> set[PatientKey]:
    with store.reading(engine) as session:
        return set(store.patient_keys(session, key))


def three(engine: Engine) -> None:
    """A Study each of three patients."""
    add_curve(engine, "1.3.1", patient=A, study_datetime=EARLIER)
    add_curve(engine, "1.3.2", patient=B, study_datetime=LATER)
    add_curve(engine, "1.3.3", patient=C, study_datetime=MIDDLE)


# Links


def test_merged_patients_are_one_and_their_studies_are_paired(node):
    three(node)
    assert pairs(node) == set()
    changed = link(node, A, B)
    assert (changed.is_new, changed.pairs) == (True, 1)
    assert pairs(node) == {("1.3.2", "1.3.1")}  # the newer one is fixed
    assert link(node, C, A).pairs == 2
    assert pairs(node) == {("1.3.2", "1.3.1"), ("1.3.2", "1.3.3"), ("1.3.3", "1.3.1")}
    assert keys(node, A) == keys(node, B) == keys(node, C) == {A, B, C}
    assert series_of(node, "1.3.1").patient == A  # what the header says stays


def test_what_arrives_later_under_either_key_belongs_to_both(node):
    link(node, A, B)
    add_curve(node, "1.3.1", patient=A, study_datetime=EARLIER)
    assert add_curve(node, "1.3.2", patient=B, study_datetime=LATER) == 1
    assert add_curve(node, "1.3.3", patient=A, study_datetime=MIDDLE) == 2


def test_a_link_taken_back_takes_the_pairs_across_it_along_and_no_others(node):
    three(node)
    add_curve(node, "1.3.4", patient=A, study_datetime=MIDDLE)
    first = link(node, A, B)
    link(node, B, C)
    settle(node)
    changed = unlink(node, first.link.id)
    assert (changed.is_new, changed.together, changed.pairs) == (True, False, 4)
    with store.reading(node) as session:
        left = {(o.fixed_series, o.moving_series) for o in store.offsets_of(session)}
    assert left == {("1.3.4", "1.3.1"), ("1.3.2", "1.3.3")}  # with their offsets
    assert keys(node, A) == {A}
    assert keys(node, C) == {B, C}
    assert not unlink(node, first.link.id).is_new


def test_patients_stay_one_while_another_link_holds(node):
    three(node)
    first, _, _ = link(node, A, B), link(node, B, C), link(node, C, A)
    changed = unlink(node, first.link.id)
    assert (changed.together, changed.pairs) == (True, 0)
    assert len(pairs(node)) == 3


def test_a_merge_said_twice_is_one_link(node):
    first = link(node, A, B)
    again = link(node, B, A)
    assert not again.is_new and again.link == first.link
    unlink(node, first.link.id)
    assert keys(node, A) == {A}
    assert link(node, A, B).is_new


def test_nobody_is_merged_with_nobody(node):
    for merged, into in ((PatientKey("", "HOSPITAL"), A), (A, PatientKey("")), (A, A)):
        with pytest.raises(ValueError):
            link(node, merged, into)
    # Not even by a link of somebody else's that came into the table.
    add_curve(node, "1.3.1", patient=PatientKey(""))
    assert add_curve(node, "1.3.2", patient=PatientKey("")) == 0


def test_case_and_issuer_tell_patients_apart(node):
    add_curve(node, "1.3.1", patient=PatientKey("a", "HOSPITAL"))
    add_curve(node, "1.3.2", patient=PatientKey("A", "OTHER"))
    add_curve(node, "1.3.3", patient=B)
    assert link(node, A, B).pairs == 0


def test_series_of_one_study_are_not_paired_by_a_merge(node):
    add_curve(node, "1.3.1", patient=A, study_uid="1.3")
    add_curve(node, "1.3.2", patient=B, study_uid="1.3")
    assert link(node, A, B).pairs == 0
    assert pairs(node) == set()


def test_curves_of_two_bundles_are_not_paired_by_a_merge(node):
    exchange_bundle(node)
    add_curve(node, "1.3.1", patient=A, study_datetime=EARLIER)
    record(node, scan("1.3.2", patient=B, study_datetime=LATER), model=OTHER_MODEL)
    finish(node, "1.3.2")
    assert link(node, A, B).pairs == 0
    with store.reading(node) as session:
        found = store.offsets_of(session)
    assert {o.offset.reason for o in found} == {"scored by different bundles"}
    assert len(found) == len(Method)


def test_links_are_listed_by_patient(node):
    first, second = link(node, A, B), link(node, PatientKey("X"), PatientKey("Y"))
    with store.reading(node) as session:
        assert store.list_links(session) == [second.link, first.link]
        assert store.list_links(session, patient=B) == [first.link]
    unlink(node, first.link.id)
    with store.reading(node) as session:
        assert store.list_links(session) == [second.link]
        (taken_back,) = store.list_links(session, patient=A, every=True)
    assert taken_back.unlinked_at == T0


# What waits to go out

WAITS, DONE, DROPPED = DeliveryState.WAITING, DeliveryState.DONE, DeliveryState.DROPPED


def test_what_waits_to_be_told_of_a_dropped_pair_is_not_told(node):
    three(node)
    first = link(node, A, B)
    link(node, B, C)
    kinds = DeliveryKind.REGISTRATION, DeliveryKind.WEBHOOK
    across = [Ask(kind, "PACS", "1.3.2.0", "1.3.1.0") for kind in kinds]
    other = [
        Ask(DeliveryKind.REGISTRATION, "PACS", "1.3.2.0", "1.3.3.0"),
        Ask(DeliveryKind.REPORT, "PACS", "1.3.1"),
    ]
    sent = Ask(DeliveryKind.REGISTRATION, "OLD", "1.3.2.0", "1.3.1.0")
    with store.writing(node) as session:
        store.ask_deliveries(session, [*across, *other, sent], T0, T0)
        session.execute(
            update(schema.Delivery)
            .where(schema.Delivery.destination == "OLD")
            .values(state=DONE, done_at=T0)
        )
    assert unlink(node, first.link.id).delivered == 1
    with store.reading(node) as session:
        states = {d.what: (d.state, d.reason) for d in store.list_deliveries(session)}
    assert states[across[0]] == (DROPPED, "not one patient any more")
    # What a webhook is told, should it know of the pair, is that it is gone.
    assert {states[ask] for ask in (across[1], *other)} == {(WAITS, None)}
    assert states[sent] == (DONE, "not one patient any more")


# A Study that comes again under another patient


@pytest.mark.parametrize("whole", [True, False])
def test_a_study_that_comes_again_corrected_moves_with_all_its_series(node, whole):
    """A Study has one patient (PS3.3 A.1.2), though an archive sends one Series of it alone."""
    three(node)  # A: 1.3.1, B: 1.3.2
    for k in (1, 2):
        add_curve(node, f"1.4.{k}", patient=A, study_uid="1.4", study_datetime=MIDDLE)
    assert pairs(node) == {("1.4.1", "1.3.1"), ("1.4.2", "1.3.1")}
    later = MIDDLE.replace(hour=23)  # what else is corrected is of the Study, too
    for k in (1, 2) if whole else (1,):
        record(node, scan(f"1.4.{k}", patient=B, study_uid="1.4", study_datetime=later))
    rows = [series_of(node, f"1.4.{k}") for k in (1, 2)]
    assert {(row.patient, row.study_datetime) for row in rows} == {(B, later)}
    assert [row.state for row in rows] == [SeriesState.OPEN, SeriesState.CURVE]
    finish(node, "1.4.1")
    assert pairs(node) == {("1.3.2", "1.4.1"), ("1.3.2", "1.4.2")}


def test_a_series_of_another_patient_in_the_study_stays(node):
    add_curve(node, "1.4.1", patient=A, study_uid="1.4")
    add_curve(node, "1.4.2", patient=C, study_uid="1.4")
    record(node, scan("1.4.1", patient=B, study_uid="1.4"))
    assert series_of(node, "1.4.2").patient == C


def test_a_series_that_goes_to_another_study_goes_alone(node):
    for k in (1, 2):
        add_curve(node, f"1.4.{k}", patient=A, study_uid="1.4")
    record(node, scan("1.4.1", patient=B, study_uid="1.5"))
    assert series_of(node, "1.4.2").patient == A


def test_a_sender_that_names_no_issuer_moves_no_study(node):
    for k in (1, 2):
        add_curve(node, f"1.4.{k}", patient=A, study_uid="1.4")
    default = PatientKey("A", "DEFAULT")
    record(node, scan("1.4.1", patient=default, study_uid="1.4", issuer_is_default=True))
    record(node, scan("1.4.1", patient=PatientKey("A"), study_uid="1.4"))
    assert {series_of(node, f"1.4.{k}").patient for k in (1, 2)} == {A}
    assert series_of(node, "1.4.1").state is SeriesState.CURVE


def test_what_was_linked_stays_linked_when_a_study_moves(node):
    three(node)
    link(node, A, B)
    record(node, scan("1.3.1", patient=C, study_datetime=EARLIER))
    finish(node, "1.3.1")
    assert pairs(node) == {("1.3.3", "1.3.1")}
    assert keys(node, A) == {A, B}
    # And back, under the key into which it was merged meanwhile.
    record(node, scan("1.3.1", patient=B, study_datetime=EARLIER))
    finish(node, "1.3.1")
    assert pairs(node) == {("1.3.2", "1.3.1")}


def test_a_corrected_issuer_leads_to_the_links_of_that_key(node):
    add_curve(node, "1.3.1", patient=PatientKey("A", "WRONG"), study_datetime=EARLIER)
    add_curve(node, "1.3.2", patient=B, study_datetime=LATER)
    link(node, A, B)
    record(node, scan("1.3.1", patient=A, study_datetime=EARLIER))
    assert finish(node, "1.3.1") == 1


# Two at once, on Postgres


def together(first: Callable[[Session], Any], second: Callable[[], Any], engine: Engine) -> None:
    """Do the second while the transaction of the first is under way, then let both end."""
    other = threading.Thread(target=second)
    with store.writing(engine) as session:
        first(session)
        other.start()
        other.join(0.3)  # it may go through, or wait for the first one's commit
    other.join(20)
    assert not other.is_alive()


def asked(engine: Engine) -> None:
    """Hold what the database has against the truth."""
    result = soak.Result()
    soak.judge(engine, result)
    assert result.sound, result


@on_postgres
def test_a_series_that_is_finished_during_a_merge_misses_no_pair(node):
    add_curve(node, "1.3.1", patient=A, study_datetime=EARLIER)
    record(node, scan("1.3.2", patient=B, study_datetime=LATER))
    together(
        lambda session: store.link_patients(session, A, B, LinkSource.CLI, T0),
        lambda: finish(node, "1.3.2"),
        node,
    )
    assert pairs(node) == {("1.3.2", "1.3.1")}


@on_postgres
def test_a_merge_during_which_a_series_is_finished_misses_no_pair(node):
    add_curve(node, "1.3.1", patient=A, study_datetime=EARLIER)
    record(node, scan("1.3.2", patient=B, study_datetime=LATER))
    together(lambda session: finish_in(session, "1.3.2"), lambda: link(node, A, B), node)
    assert pairs(node) == {("1.3.2", "1.3.1")}


@on_postgres
def test_two_merges_at_once_miss_no_pair(node):
    three(node)
    together(
        lambda session: store.link_patients(session, A, B, LinkSource.CLI, T0),
        lambda: link(node, B, C),
        node,
    )
    assert len(pairs(node)) == 3
    assert keys(node, A) == {A, B, C}


@on_postgres
def test_an_unmerge_leaves_no_pair_of_a_series_that_is_finished_meanwhile(node):
    add_curve(node, "1.3.1", patient=A, study_datetime=EARLIER)
    found = link(node, A, B).link
    record(node, scan("1.3.2", patient=B, study_datetime=LATER))
    together(lambda session: finish_in(session, "1.3.2"), lambda: unlink(node, found.id), node)
    assert pairs(node) == set()


@on_postgres
@pytest.mark.parametrize("correction_first", [True, False])
def test_a_merge_beside_a_correction_asks_for_the_pairs_of_both(node, correction_first):
    three(node)
    corrected = scan("1.3.1", patient=C, study_datetime=EARLIER)

    def correct(session: Session) -> None:
        store.record_slices(session, MODEL, corrected)

    def merge(session: Session) -> None:
        store.link_patients(session, A, B, LinkSource.CLI, T0)

    def alone(act: Callable[[Session], None]) -> Callable[[], None]:
        def run() -> None:
            with store.writing(node) as session:
                act(session)

        return run

    if correction_first:
        together(correct, alone(merge), node)
    else:
        together(merge, alone(correct), node)
    assert pairs(node) == set()  # at once, not only when the Series is finished again
    finish(node, "1.3.1")
    assert pairs(node) == {("1.3.3", "1.3.1")}


@on_postgres
def test_a_series_that_is_finished_beside_a_correction_is_not_paired_with_what_left(node):
    three(node)
    record(node, scan("1.3.9", patient=A, study_datetime=LATER))
    corrected = scan("1.3.1", patient=C, study_datetime=EARLIER)
    together(
        lambda session: store.record_slices(session, MODEL, corrected),
        lambda: finish(node, "1.3.9"),
        node,
    )
    assert pairs(node) == set()


@on_postgres
def test_an_unmerge_and_a_series_that_is_finished_again_do_not_wait_for_each_other(
    node, monkeypatch
):
    """The Series drops the offsets that the unmerge wants to drop, and then asks for new ones."""
    three(node)
    found = link(node, A, B).link
    record(node, [scored("1.3.1", 12, patient=A, study_datetime=EARLIER)])
    plain, failed = intake.ask_offsets, []

    def take_back() -> None:
        try:
            unlink(node, found.id)
        except StoreUnavailable as exc:
            failed.append(exc)

    other = threading.Thread(target=take_back)

    def ask(*arguments: Any) -> int:
        other.start()
        other.join(0.3)
        return plain(*arguments)

    monkeypatch.setattr(intake, "ask_offsets", ask)
    finish(node, "1.3.1")
    other.join(20)
    assert not failed
    assert pairs(node) == set()


# Mining sees the same patients


def test_a_prior_under_another_key_of_the_patient_is_found(node):
    day = mining.DAY0
    rows = [
        mining.scan(0, 100, patient_id="P1", study=1, study_datetime=day),
        mining.scan(0, 100, patient_id="P2", study=2, study_datetime=day.replace(day=20)),
        mining.scan(0, 100, patient_id="P3", study=3, study_datetime=day.replace(day=25)),
        mining.scan(0, 100, patient_id="", study=4, study_datetime=day.replace(day=25)),
        mining.scan(0, 100, patient_id="P1", study=5, study_datetime=day.replace(day=28)),
    ]
    ids = mining.fill(node, rows)

    def found(text: str) -> list[int]:
        by_sql = sorted(mining.found(node, text))
        with store.reading(node) as session:
            expression, records = mining.asked(text), store.records(session, ids)
            assert store.count_matches(session, expression) == len(by_sql)
        assert sorted(i for i in ids if evaluate(expression, records[i])) == by_sql
        return by_sql

    assert found("prior()") == [ids[4]]
    first = link(node, PatientKey("P1"), PatientKey("P2"))
    assert found("prior()") == [ids[1], ids[4]]
    assert found("prior(within=18d)") == [ids[4]]
    assert found("prior(within=19d)") == [ids[1], ids[4]]
    assert found("not prior()") == [ids[0], ids[2], ids[3]]
    link(node, PatientKey("P3"), PatientKey("P2"))
    assert found("prior(within=5d)") == [ids[2], ids[4]]
    unlink(node, first.link.id)
    assert found("prior()") == [ids[2], ids[4]]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_patient_of_several_keys_is_looked_up_in_the_index(node):
    three(node)
    link(node, A, B)
    record(node, scan("1.3.9", patient=A, study_datetime=LATER))
    seen: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *rest: Any) -> None:
        seen.append((statement, parameters))

    event.listen(node, "before_cursor_execute", note)
    finish(node, "1.3.9")
    event.remove(node, "before_cursor_execute", note)
    with node.connect() as connection:
        plans = [
            str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values).all())
            for sql, values in seen
            if sql.startswith("SELECT") and "series.patient_id = " in sql
        ]
    assert len(plans) == 1
    assert plans[0].count("ix_series_patient") == 2 and "ix_series_state" not in plans[0]


# Any order

PATIENTS = 6
ACTS = st.lists(st.sampled_from(list(soak.ACTS)), min_size=5, max_size=40)


@given(acts=ACTS, seed=st.integers(0, 1 << 30))
@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_pairs_are_those_of_the_final_grouping_whatever_came_before(node, acts, seed):
    with store.writing(node) as session:
        for table in reversed(schema.Base.metadata.sorted_tables):
            if table.name != "model":
                session.execute(delete(table))
    world = soak.World(node, PATIENTS, seed)
    for act in acts:
        world.act(act)
    asked(node)
    assert world.truth() == soak.truth(node)


def test_hundreds_of_patients_merged_and_unmerged_at_random_keep_the_pairs_of_the_last_grouping(
    node,
):
    """The short form of `python -m tests.soak.patients`."""
    result = soak.run(node, patients=40, seed=7, acts=160)
    assert result.sound, result
    assert result.acts["unmerge"] > 15 and result.largest > 2 and result.pairs > 30, result


@on_postgres
def test_patients_are_merged_from_several_threads_at_once(node):
    result = soak.run(node, patients=15, seed=3, acts=120, threads=3)
    assert result.sound, result


# The command


@pytest.fixture
def cli(node: Engine, tmp_path: Path, database_url: str) -> Callable[..., Any]:
    config = tmp_path / "node.toml"
    config.write_text(
        f'[database]\nurl = "{database_url}"\n[spool]\npath = "{tmp_path}/spool"\n'
        '[node]\ndefault_issuer = "HOME"\n'
    )

    def run(*arguments: str, status: int = 0) -> Any:
        result = CliRunner().invoke(main, ["patient", *arguments, "--config", str(config)])
        assert result.exit_code == status, result.output
        return result

    return run


def audited(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]


def test_patients_are_merged_and_taken_apart_by_hand(node, cli, tmp_path):
    three(node)
    assert "1 pairs are computed" in cli("merge", "A^^^HOSPITAL", "B").output
    assert "one patient already, by link 1" in cli("merge", "B", "A").output
    (listed,) = json.loads(cli("links", "--patient", "A", "--json").output)
    assert listed["merged"] == {"patient_id": "A", "issuer": "HOSPITAL"}
    assert (listed["id"], listed["source"], listed["unlinked_at"]) == (1, "cli", None)
    assert "1 pairs dropped" in cli("unmerge", "1").output
    assert "before" in cli("unmerge", "1").output
    cli("links", status=1)
    assert "A^^^HOSPITAL" in cli("links", "--all").output
    cli("unmerge", "99", status=1)
    events = [line for line in audited(tmp_path) if line["event"].startswith("patients")]
    assert [(line["event"], line["link"]) for line in events] == [
        ("patients linked", 1),
        ("patients unlinked", 1),
    ]
    assert all(line["user"] for line in events)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_who_is_unknown_or_ambiguous_is_not_merged_by_mistake(node, cli):
    three(node)
    assert "--force" in cli("merge", "A", "Z", status=1).output
    assert "--force" in cli("merge", "A^^^OTHER", "B", status=1).output
    add_curve(node, "1.3.9", patient=PatientKey("A", "OTHER"))
    assert "several issuers, 'HOSPITAL', 'OTHER'" in cli("merge", "A", "B", status=2).output
    cli("merge", "A^^^HOSPITAL", "A^^^HOSPITAL", status=2)
    cli("merge", "", "B", status=2)
    assert "placeholder" in cli("merge", "B", "N/A", "--force", status=2).output
    cli("merge", "A" * 65, "B", "--force", status=2)
    found = json.loads(cli("merge", "Z", "B", "--force", "--json").output)
    assert found["merged"] == {"patient_id": "Z", "issuer": "HOME"}
    assert keys(node, B) == {B, PatientKey("Z", "HOME")}


def test_a_late_slice_of_a_merged_patient_keeps_its_pairs(node):
    three(node)
    link(node, A, B)
    record(node, [scored("1.3.1", 12, patient=A, study_datetime=EARLIER)])
    assert finish(node, "1.3.1") == 1
    assert pairs(node) == {("1.3.2", "1.3.1")}
    with store.reading(node) as session:
        assert len(session.scalars(select(schema.PatientMember.group_id)).all()) == 2
