"""When a Series goes to another patient: what is a correction, and what a copy from before it."""

import threading
from dataclasses import replace

import pytest
from sqlalchemy import Engine, select

from db import schema
from dicomnode import store
from dicomnode.errors import StoreUnavailable
from dicomnode.model import PatientKey, SeriesState
from dicomnode.store import SliceResult
from tests.integration.test_rejection import wait_for_one_that_waits
from tests.integration.test_store import (
    EARLIER,
    LATER,
    MODEL,
    add_curve,
    finish,
    node,
    pairs,
    record,
    refused,
    scan,
    scored,
    series_of,
)

__all__ = ["node"]

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)

A, B, C, NOBODY = (PatientKey(name, "HOSPITAL") for name in ("A", "B", "C", ""))
STUDY, ONE, TWO = "1.4", "1.4.1", "1.4.2"


def whose(engine: Engine, *series: str) -> list[PatientKey]:
    return [series_of(engine, uid).patient for uid in series or (ONE, TWO)]


def again(
    engine: Engine, patient: PatientKey, uid: str = ONE, slices: range = range(12), **more: object
) -> None:
    """Send slices of a Series once more, under a patient."""
    values = {"study_uid": STUDY, **more}
    record(engine, [scored(uid, k, patient=patient, **values) for k in slices])


@pytest.fixture
def study(node: Engine) -> Engine:
    """A Study of two Series of A, with a prior, and a Study of B."""
    add_curve(node, "1.2.1", patient=A, study_datetime=EARLIER)
    add_curve(node, "1.2.2", patient=B, study_datetime=EARLIER)
    for uid in (ONE, TWO):
        add_curve(node, uid, patient=A, study_uid=STUDY, study_datetime=LATER)
    return node


def test_one_instance_from_before_the_correction_takes_nothing_back(study):
    for uid in (ONE, TWO):
        again(study, B, uid, study_datetime=LATER)
    finish(study, ONE)  # the other one went along, and brought nothing new
    before = pairs(study)
    assert before == {(ONE, "1.2.2"), (TWO, "1.2.2")}
    again(study, A, TWO, range(3, 4))
    assert whose(study) == [B, B]
    assert series_of(study, TWO).state is SeriesState.CURVE
    assert pairs(study) == before


@on_sqlite
def test_a_series_moves_once_more_than_half_of_it_says_so(study):
    again(study, B, slices=range(4))
    again(study, B, slices=range(4))  # twice is no more than once
    again(study, B, slices=range(4, 6))
    assert whose(study) == [A, A]
    again(study, B, slices=range(6, 7))
    assert whose(study) == [B, B]


@on_sqlite
def test_an_instance_counts_by_what_it_said_last(study):
    again(study, B, slices=range(6))
    again(study, C, slices=range(2))  # each for itself
    again(study, A, slices=range(2, 4))
    again(study, B, slices=range(6, 9))
    assert whose(study) == [A, A]  # 5 of 12
    again(study, B, slices=range(9, 11))
    assert whose(study) == [B, B]


@on_sqlite
def test_new_instances_count_as_those_of_before(study):
    again(study, B, slices=range(12, 24))  # half of 24
    assert whose(study) == [A, A]
    again(study, B, slices=range(24, 25))
    assert whose(study) == [B, B]


@on_sqlite
def test_what_was_set_aside_is_not_asked(study):
    """Half of the Series are localizers: nobody waits for their word, nor heeds it."""
    record(study, [refused(ONE, k, patient=A, study_uid=STUDY) for k in range(12, 60)])
    again(study, B)
    assert whose(study) == [B, B]


@on_sqlite
def test_a_series_that_goes_back_to_whom_it_was_corrected_from_goes_alone(study):
    """It may be a copy of then, whole as it is: the Study stays where it was corrected to."""
    again(study, B)
    assert whose(study) == [B, B]
    again(study, A, TWO)
    assert whose(study) == [B, A]
    again(study, B, TWO)
    assert whose(study) == [B, B]
    again(study, C)  # somebody new: it is a correction, and of the Study
    assert whose(study) == [C, C]


@on_sqlite
def test_a_series_that_comes_after_its_study_was_corrected_joins_it(study):
    """Under the ID of before: it was on its way, or an archive knows of no correction."""
    again(study, B, study_datetime=LATER)
    for part in (range(5), range(5, 12)):
        again(study, A, "1.4.3", part, study_datetime=LATER)
    finish(study, "1.4.3")
    finish(study, ONE)
    assert whose(study, "1.4.3") == [B]
    assert pairs(study) == {(uid, "1.2.2") for uid in (ONE, TWO, "1.4.3")}
    again(study, A, "1.4.3")  # whole and again: it is its own correction
    assert whose(study, ONE, "1.4.3") == [B, A]
    add_curve(study, "1.4.4", patient=A, study_uid=STUDY)  # and not alone any more
    add_curve(study, "1.4.5", patient=C, study_uid=STUDY)  # by mistake in this Study
    assert whose(study, "1.4.4", "1.4.5") == [A, C]


@on_sqlite
def test_nobody_is_no_correction(study):
    again(study, NOBODY, study_datetime=LATER)
    again(study, PatientKey(""), TWO)
    again(study, NOBODY, slices=range(12, 13))
    assert whose(study) == [A, A]
    finish(study, ONE)
    assert pairs(study) == {(ONE, "1.2.1"), (TWO, "1.2.1")}


@on_sqlite
def test_somebody_is_a_correction_of_nobody(node):
    add_curve(node, ONE, patient=NOBODY, study_uid=STUDY)
    again(node, A)
    assert whose(node, ONE) == [A]
    # Of one batch, those who name somebody say whose the Series is.
    damaged = scored(TWO, 11, patient=NOBODY, study_uid=STUDY)
    record(node, [*scan(TWO, 11, patient=A, study_uid=STUDY), damaged])
    assert whose(node) == [A, A]


@on_sqlite
def test_a_sender_that_corrects_nobody_moves_nothing(study):
    for uid in (ONE, TWO):
        record(study, [replace(r, corrects=False) for r in scan(uid, patient=B, study_uid=STUDY)])
    assert whose(study) == [A, A]


@on_sqlite
def test_a_copy_from_before_the_correction_does_not_name_its_patient(study):
    def describe(result: SliceResult) -> dict[str, str]:
        return {"PatientName": result.header.patient.patient_id}

    def take(patient: PatientKey, slices: range) -> str | None:
        results = [scored(ONE, k, patient=patient, study_uid=STUDY) for k in slices]
        with store.writing(study) as session:
            store.record_slices(session, MODEL, results, describe)
        with store.reading(study) as session:
            header = select(schema.Series.header).where(schema.Series.series_uid == ONE)
            found = session.scalar(header)
        return found and found["PatientName"]

    assert take(B, range(12)) == "B"
    finish(study, ONE)
    assert take(A, range(1)) == "B"
    assert take(NOBODY, range(12)) == "B"


@on_postgres
@pytest.mark.parametrize("known", [True, False])
def test_what_was_decided_before_a_lock_is_decided_anew_after_it(node, known):
    """While a worker waits, another one moves the Series, or makes it."""
    if known:
        add_curve(node, ONE, patient=A, study_uid=STUDY)
    other_patient, failed = PatientKey("A" if known else "B", "HOSPITAL"), []

    def beside() -> None:
        try:
            again(node, other_patient)
        except StoreUnavailable as exc:
            failed.append(str(exc))

    other = threading.Thread(target=beside)
    with store.writing(node) as session:
        first = scan(ONE, patient=B if known else A, study_uid=STUDY)
        store.record_slices(session, MODEL, first)
        other.start()
        wait_for_one_that_waits(node)
    other.join(30)
    assert not other.is_alive()
    assert failed == ["a Series changed its patient meanwhile"]
    again(node, other_patient)  # as the worker does
    assert whose(node, ONE) == [other_patient]
