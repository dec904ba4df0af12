"""Which answers of an archive are wanted: worked out by hand."""

from datetime import date, time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.core import retrieval
from dicomnode.core.retrieval import SeriesAnswer, StudyAnswer
from dicomnode.model import PatientKey

DAY = date(2026, 3, 4)
KEY = PatientKey("P1", "HOSPITAL")


def study(uid: str, day: date | None = date(2025, 1, 1), **more: object) -> StudyAnswer:
    return StudyAnswer(uid, more.pop("patient", KEY), day, **more)  # type: ignore[arg-type]  # any of them


@pytest.mark.parametrize("patient_id", ["*", "P*", "P?1", "A\\B", "", "P\n1", "P\x001"])
def test_what_a_question_takes_for_something_else_is_not_asked(patient_id):
    assert not retrieval.is_askable(patient_id)


@pytest.mark.parametrize("patient_id", ["1", "P-1", "O'Neil 7", "Å_7^8", "[a-z]", "%41", "#&="])
def test_any_other_patient_id_is(patient_id):
    assert retrieval.is_askable(patient_id)


def test_other_patients_are_left_out_however_alike():
    answers = [
        study("1"),
        study("2", patient=PatientKey("p1", "HOSPITAL")),
        study("3", patient=PatientKey("P11", "HOSPITAL")),
        study("4", patient=PatientKey("", "HOSPITAL")),
        study("5", patient=PatientKey("P1", "OTHER")),
    ]
    assert [a.study_uid for a in retrieval.of_patient(answers, KEY, "", required=False)] == ["1"]


def test_without_an_issuer_it_is_taken_for_the_patient_unless_one_is_required():
    answers = [study("1", patient=PatientKey("P1"))]
    assert retrieval.of_patient(answers, KEY, "", required=False) == answers
    assert retrieval.of_patient(answers, KEY, "", required=True) == []
    # What it sends without one will count as of this issuer: then that decides.
    assert retrieval.of_patient(answers, KEY, "HOSPITAL", required=True) == answers
    assert retrieval.of_patient(answers, KEY, "OTHER", required=False) == []


def test_a_patient_without_an_issuer_is_asked_for_where_there_is_one_such_patient():
    nobody = PatientKey("P1")
    one = [study("1"), study("2", patient=PatientKey("P1"))]
    two = [*one, study("3", patient=PatientKey("P1", "OTHER"))]
    assert retrieval.of_patient(one, nobody, "", required=False) == one
    assert retrieval.of_patient(two, nobody, "", required=False) == []


def test_priors_are_earlier_and_newest_first():
    answers = [
        study("old", date(2015, 1, 1)),
        study("newer", date(2025, 6, 1)),
        study("older", date(2024, 6, 1)),
        study("later", date(2026, 3, 5)),
        study("same day", DAY),
        study("itself", DAY),
        study("undated", None),
        study("MR", date(2025, 7, 1), modalities=("MR", "SR")),
        study("PET", date(2025, 5, 1), modalities=("CT", "PT")),
    ]
    known = {"here": date(2025, 5, 15), "older": date(2024, 6, 1), "itself": DAY}
    found = retrieval.priors(answers, "itself", DAY, known, 10)
    uids = [a if isinstance(a, str) else a.study_uid for a in found]
    assert uids == ["same day", "newer", "here", "PET", "older"]
    # What is here and there too is answered for: it may be here in part.
    assert isinstance(found[-1], StudyAnswer) and found[2] == "here"


def test_ten_years_are_ten_years():
    answers = [study("in", date(2016, 3, 4)), study("out", date(2016, 3, 3))]
    assert [a.study_uid for a in retrieval.priors(answers, "x", DAY, {}, 10)] == ["in"]
    assert retrieval.earliest(date(100, 1, 1), 200) == date.min


def test_localizers_are_told_by_their_count_unless_one_instance_may_be_a_series():
    of = study("1")
    answers = [
        SeriesAnswer("1", "1.1", "CT", 2),
        SeriesAnswer("1", "1.2", "CT", 10),
        SeriesAnswer("1", "1.3", "CT", None),
        SeriesAnswer("1", "1.4", "SR", 50),
        SeriesAnswer("1", "1.5", "CT", 0),
        SeriesAnswer("2", "2.1", "CT", 50),
        SeriesAnswer("1", "1.6", "", 50),
    ]
    wanted = retrieval.wanted_series(answers, of, 10)
    assert [a.series_uid for a in wanted] == ["1.2", "1.3"]
    enhanced = study("1", sop_classes=("1.2.840.10008.5.1.4.1.1.2.1",))
    wanted = retrieval.wanted_series(answers, enhanced, 10)
    assert [a.series_uid for a in wanted] == ["1.1", "1.2", "1.3"]


@pytest.mark.parametrize(
    ("expected", "received", "missing"),
    [(10, 9, True), (10, 10, False), (10, 11, False), (None, 0, True), (None, 1, False)],
)
def test_a_series_is_missing_by_its_count(expected, received, missing):
    assert retrieval.is_missing(expected, received) is missing


@pytest.mark.parametrize(
    ("expected", "received", "rejected", "missing"),
    [
        (15, 20, 5, False),  # its archive shows them no more
        (20, 20, 5, True),  # or counts them still, or has others in their place
        (20, 20, 20, False),
        (25, 20, 20, True),
        (None, 20, 20, False),
    ],
)
def test_what_was_taken_back_is_not_here_unless_all_of_it_was(
    expected, received, rejected, missing
):
    assert retrieval.is_missing(expected, received, rejected) is missing


NIGHT, DAYTIME = (time(18), time(6)), (time(6), time(18))


@pytest.mark.parametrize(
    ("at", "in_night"),
    [
        (time(17, 59), False),
        (time(18), True),
        (time(0), True),
        (time(5, 59), True),
        (time(6), False),
    ],
)
def test_hours_go_past_midnight(at, in_night):
    assert retrieval.is_within(NIGHT, at) is in_night
    assert retrieval.is_within(DAYTIME, at) is not in_night
    assert retrieval.is_within(None, at)


def test_yesterday_is_always_asked_for_and_down_time_up_to_the_bound():
    assert retrieval.missed_days(None, DAY, 3) == [date(2026, 3, 3), DAY]
    assert retrieval.missed_days(DAY, DAY, 3) == [date(2026, 3, 3), DAY]
    assert retrieval.missed_days(date(2026, 3, 2), DAY, 3)[0] == date(2026, 3, 2)
    assert retrieval.missed_days(date(2020, 1, 1), DAY, 3)[0] == date(2026, 3, 1)


@given(
    st.dates(date(2000, 1, 1), date(2030, 1, 1)),
    st.dates(date(2000, 1, 1), date(2030, 1, 1)),
    st.integers(1, 400),
)
def test_days_have_no_gaps_and_end_today(last_up, today, most):
    days = list(retrieval.missed_days(last_up, today, most))
    assert days[-1] == today and len(days) >= 2
    assert all((b - a).days == 1 for a, b in pairwise(days))
    assert len(days) <= most + 1 or len(days) == 2
