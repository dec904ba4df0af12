"""Which of the Studies and Series that an archive answers are wanted: pure, whoever asked how.

An archive may pass over a key of the question, and answer with the Studies of other patients:
nothing is taken on trust that an answer can be held against.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta

from dicomnode.model import PatientKey

DAYS_A_YEAR = 365.2425
# PS3.4 C.2.2.2.4: in a question they stand for other characters, and there is no way to write the
# character itself; a backslash is between two values (PS3.5 6.4).
NOT_ASKABLE = frozenset("*?\\")
# Of these one Instance may hold a whole Series.
ENHANCED = frozenset({"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"})


@dataclass(frozen=True, slots=True)
class StudyAnswer:
    """A Study as an archive describes it; what it did not tell is empty, or None."""

    study_uid: str
    patient: PatientKey
    study_date: date | None = None
    modalities: tuple[str, ...] = ()
    sop_classes: tuple[str, ...] = ()
    series: int | None = None  # NumberOfStudyRelatedSeries (0020,1206)
    instances: int | None = None  # NumberOfStudyRelatedInstances (0020,1208)

    @property
    def may_have_ct(self) -> bool:
        """Whether nothing says that it has none."""
        return not self.modalities or "CT" in self.modalities


@dataclass(frozen=True, slots=True)
class SeriesAnswer:
    """A Series likewise."""

    study_uid: str
    series_uid: str
    modality: str = ""
    instances: int | None = None  # NumberOfSeriesRelatedInstances (0020,1209)


def is_askable(patient_id: str) -> bool:
    """Whether a question for this Patient ID can only mean this one."""
    return bool(patient_id) and not NOT_ASKABLE & set(patient_id) and patient_id.isprintable()


def of_patient(
    answers: Iterable[StudyAnswer], patient: PatientKey, default_issuer: str, *, required: bool
) -> list[StudyAnswer]:
    """Return the answers that are about a patient.

    Parameters
    ----------
    default_issuer
        Issuer taken for what this archive sends without one.
    required
        Whether an answer without any issuer is left out, where the patient has one.

    Notes
    -----
    The issuer is compared where both have one. Where the patient has none and the archive knows
    more than one, it is not known which of them is meant: then there is no such answer.
    """
    same = [answer for answer in answers if answer.patient.patient_id == patient.patient_id]
    issuers = [answer.patient.issuer or default_issuer for answer in same]
    if not patient.issuer:
        return same if len(set(issuers) - {""}) <= 1 else []
    allowed = {patient.issuer} if required else {patient.issuer, ""}
    return [answer for answer, issuer in zip(same, issuers, strict=True) if issuer in allowed]


def of_keys(
    answers: Mapping[str, Sequence[StudyAnswer]],
    keys: Iterable[PatientKey],
    default_issuer: str,
    *,
    required: bool,
) -> list[StudyAnswer]:
    """Return the answers that are about a patient of several keys, each Study once.

    Parameters
    ----------
    answers
        Patient ID that was asked for -> what was answered.
    keys, default_issuer, required
        See `of_patient`, which looks at each key.
    """
    found: dict[str, StudyAnswer] = {}
    for key in keys:
        told = answers.get(key.patient_id, ())
        for answer in of_patient(told, key, default_issuer, required=required):
            found.setdefault(answer.study_uid, answer)
    return list(found.values())


def priors(
    answers: Iterable[StudyAnswer],
    study_uid: str,
    study_date: date,
    known: Mapping[str, date],
    years: float,
) -> list[StudyAnswer | str]:
    """Return the earlier Studies of a patient, newest first.

    Parameters
    ----------
    answers
        About the patient.
    study_uid, study_date
        Of the Study that asks.
    known
        Study -> date, of those that are here, or asked for already.
    years
        Age beyond which a Study is left out.

    Returns
    -------
    list of StudyAnswer or str
        The answer; the UID alone of a Study that is known, and that this archive does not have.

    Notes
    -----
    A Study without a date is left out: whether it is earlier is not known. One of the same day is
    taken for earlier.
    """
    oldest = earliest(study_date, years)
    found: dict[str, tuple[date, StudyAnswer | str]] = {u: (day, u) for u, day in known.items()}
    for answer in answers:
        if answer.study_date is not None and answer.may_have_ct:
            found[answer.study_uid] = (answer.study_date, answer)
    found.pop(study_uid, None)
    within = [(day, uid, a) for uid, (day, a) in found.items() if oldest <= day <= study_date]
    return [a for _, _, a in sorted(within, key=lambda entry: entry[:2], reverse=True)]


def earliest(study_date: date, years: float) -> date:
    """Return the first day that lies no more than so many years before another."""
    try:
        return study_date - timedelta(days=years * DAYS_A_YEAR)
    except OverflowError:
        return date.min


def wanted_series(
    answers: Iterable[SeriesAnswer], study: StudyAnswer, minimum_instances: int
) -> list[SeriesAnswer]:
    """Return the CT Series of a Study that are no localizers, as far as their counts tell.

    A Series without a count may be anything, and is wanted.
    """
    enhanced = bool(ENHANCED & set(study.sop_classes))
    return [
        answer
        for answer in answers
        if answer.study_uid == study.study_uid
        and answer.modality == "CT"
        and answer.instances != 0
        and (enhanced or answer.instances is None or answer.instances >= minimum_instances)
    ]


def is_missing(expected: int | None, received: int, rejected: int = 0) -> bool:
    """Whether a Series is not here in full.

    Parameters
    ----------
    expected
        Instances that the archive says it has. Of a Series whose count it does not tell, anything
        at all passes for all of it.
    received
        Instances that are here.
    rejected
        Those of them that were taken back.

    Notes
    -----
    Whether an archive counts what was taken back, or has replaced it, its count does not tell: the
    Series is wanted until it was fetched once more in vain. One that was taken back as a whole is
    not: nobody wants it.
    """
    if rejected and rejected >= received:
        return received < (expected or 0)
    return received - rejected < (1 if expected is None else expected)


def is_within(hours: tuple[time, time] | None, now: time) -> bool:
    """Whether a time of the day lies in hours that may go past midnight; None is always."""
    if hours is None:
        return True
    begin, end = hours
    return begin <= now < end if begin < end else now >= begin or now < end


def missed_days(last_up: date | None, today: date, most: int) -> Sequence[date]:
    """Return the days to ask for: today and yesterday, and since it was last up, at most so many
    days back.
    """
    yesterday = today - timedelta(days=1)
    first = max(min(last_up or yesterday, yesterday), today - timedelta(days=max(most, 1)))
    return [first + timedelta(days=n) for n in range((today - first).days + 1)]
