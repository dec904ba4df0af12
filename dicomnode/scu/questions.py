"""What an archive is asked about a patient or a day, and which Series follow from its answer.

Reads what is here; who asks for those Series, and settles the question, is `fetch`.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from dicomnode import store
from dicomnode.audit import Act
from dicomnode.config import Settings
from dicomnode.core import retrieval
from dicomnode.core.retrieval import SeriesAnswer, StudyAnswer
from dicomnode.model import FetchCause, PatientKey
from dicomnode.scu.archive import Archive, Conversation

logger = logging.getLogger(__name__)

# Studies of one patient: a peer that answers more passes over the Patient ID.
MAX_STUDIES_OF_PATIENT = 1000
MAX_STUDIES_OF_DAY = 20_000
# Of the Studies of a patient, newest first, so many are looked into for CT Series at most.
MAX_LOOKED_INTO = 50
# Studies of a day that are looked into in one turn; in between others have theirs.
LOOKS_A_TURN = 10
MAX_DAYS = 400  # remembered

NOT_ASKABLE = (
    "its Patient ID has a character that a question takes for a wild card or for two values"
)
GONE = "the Study is not here any more"

# Study -> how much the peer has of it where all of that is here, None where some lacks.
Looked = dict[str, tuple[int, int] | None]
Audited = Callable[..., AbstractContextManager[dict[str, object]]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a question."""

    orders: Sequence[store.Order] = ()  # Series that are not here in full
    studies: int = 0  # that are wanted
    requests: int = 1  # that it took
    reason: str | None = None
    is_done: bool = True  # False: there is more to look into
    series: int = 0  # that were asked for because of the same question in turns before
    dropped: str = ""  # why nobody was asked
    looked_into: Looked = field(default_factory=dict)  # of a day, in this turn and before


@dataclass(frozen=True, slots=True)
class _Patient:
    """Whose a Study is: every key of today's patient, and the time of the Study."""

    keys: tuple[PatientKey, ...]
    study_datetime: datetime | None

    @property
    def patient_ids(self) -> list[str]:
        """Patient IDs that a question can be asked for, each once."""
        ids = dict.fromkeys(key.patient_id for key in self.keys)
        return [patient_id for patient_id in ids if retrieval.is_askable(patient_id)]


def lacks(expected: int | None, held: store.Held) -> bool:
    """Whether a Series, of so many Instances, is not here in full."""
    return retrieval.is_missing(expected, held.received, held.rejected)


class Questions:
    """The questions to one archive, and what it answered to those about days before.

    Parameters
    ----------
    audited
        Gives a context that records a question, and to which the answer may add.
    """

    def __init__(
        self, settings: Settings, engine: Engine, archive: Archive, audited: Audited
    ) -> None:
        self._settings, self._engine = settings.priors, engine
        self._archive, self._audited = archive, audited
        # Day -> Study -> how much the peer had of it when all of that was here.
        self._complete: dict[str, dict[str, tuple[int, int]]] = {}
        # Day and version of its question -> how far it was looked into, and Series asked for.
        self._passes: dict[tuple[str, int], tuple[Looked, int]] = {}

    def why_not(self, inquiry: store.Inquiry) -> str:
        """Return why nobody is to be asked; empty: somebody is."""
        if inquiry.cause is not FetchCause.PRIOR:
            return ""
        with store.reading(self._engine) as session:
            return _why_not(_patient(session, inquiry.subject))

    def ask(self, conversation: Conversation, inquiry: store.Inquiry, now: datetime) -> Answer:
        """Ask a question, or a part of one.

        Raises
        ------
        PeerRefused, PeerUnavailable
            As the archive does.
        """
        if inquiry.cause is FetchCause.PRIOR:
            return self._ask_for_priors(conversation, inquiry, now)
        return self._ask_for_day(conversation, inquiry)

    def note(self, inquiry: store.Inquiry, answer: Answer, series: int) -> None:
        """Remember an answer about a day, once it is stored that so many Series are asked for."""
        if inquiry.cause is not FetchCause.CATCH_UP:
            return
        day = inquiry.subject
        # Of a question that was asked anew meanwhile, what an older one saw is of no use.
        self._passes = {k: v for k, v in self._passes.items() if k[0] != day}
        if not answer.is_done:
            self._passes[day, inquiry.version] = answer.looked_into, answer.series + series
            return
        complete = {uid: size for uid, size in answer.looked_into.items() if size is not None}
        self._complete = dict([*self._complete.items(), (day, complete)][-MAX_DAYS:])

    def _ask_for_priors(
        self, conversation: Conversation, inquiry: store.Inquiry, now: datetime
    ) -> Answer:
        study_uid = inquiry.subject
        with store.reading(self._engine) as session:
            patient = _patient(session, study_uid)
            known = store.dates_of_studies(session, patient.keys, study_uid) if patient else {}
        if patient is None or not patient.patient_ids:  # by now
            return Answer(dropped=_why_not(patient))
        when = patient.study_datetime
        day = when.date() if when else now.astimezone().date()
        years = self._settings.years
        answers: dict[str, list[StudyAnswer]] = {}
        for patient_id in patient.patient_ids:
            with self._audited(Act.QUERY, by_patient=True, study_uid=study_uid) as told:
                answers[patient_id] = conversation.find_studies(
                    patient_id=patient_id,
                    days=(retrieval.earliest(day, years), day),
                    most=MAX_STUDIES_OF_PATIENT,
                )
                told["studies"] = len(answers[patient_id])
        own = retrieval.of_keys(
            answers,
            patient.keys,
            self._archive.default_issuer,
            required=self._settings.issuer == "required",
        )
        wanted: dict[str, list[SeriesAnswer]] = {}
        counted = 0
        for answer in retrieval.priors(own, study_uid, day, known, years)[:MAX_LOOKED_INTO]:
            if counted == self._settings.count:
                break
            if isinstance(answer, StudyAnswer):
                wanted[answer.study_uid] = self._wanted(conversation, answer)
                counted += bool(wanted[answer.study_uid])
            else:
                counted += 1  # here, and unknown to this peer
        reason = None
        named = {answer.study_uid for found in answers.values() for answer in found}
        if others := len(named - {answer.study_uid for answer in own}):
            reason = f"{others} Studies of the answer are not known to be of this patient"
            extra = {"peer": self._archive.name, "studies": others}
            logger.warning("answers of other patients", extra=extra)
        return Answer(
            self._orders(inquiry, own, wanted),
            sum(map(bool, wanted.values())),
            len(answers) + len(wanted),
            reason,
        )

    def _ask_for_day(self, conversation: Conversation, inquiry: store.Inquiry) -> Answer:
        subject = inquiry.subject
        day = datetime.strptime(subject, "%Y%m%d").date()
        with self._audited(Act.QUERY, day=subject) as told:
            answers = conversation.find_studies(days=(day, day), most=MAX_STUDIES_OF_DAY)
            told["studies"] = len(answers)
        answers = [a for a in answers if a.study_date in (None, day) and a.may_have_ct]
        sizes = {a.study_uid: (a.series or 0, a.instances or 0) for a in answers}
        before = self._complete.get(subject, {})
        looked_into, series = self._passes.get((subject, inquiry.version), ({}, 0))
        looked_into = dict(looked_into)
        wanted: dict[str, list[SeriesAnswer]] = {}
        later = 0
        for answer in answers:
            uid = answer.study_uid
            if uid in looked_into:
                continue
            if answer.instances is not None and before.get(uid) == sizes[uid]:
                looked_into[uid] = sizes[uid]  # nothing came since
            elif len(wanted) < LOOKS_A_TURN:
                wanted[uid] = self._wanted(conversation, answer)
            else:
                later += 1
        orders = self._orders(inquiry, answers, wanted)
        lacking = {order.study_uid for order in orders}
        for uid in wanted:
            looked_into[uid] = None if uid in lacking else sizes[uid]
        return Answer(
            orders,
            len(answers),
            1 + len(wanted),
            f"{later} Studies are still to be looked into" if later else None,
            is_done=not later,
            series=series,
            looked_into=looked_into,
        )

    def _wanted(self, conversation: Conversation, study: StudyAnswer) -> list[SeriesAnswer]:
        answers = conversation.find_series(study.study_uid)
        return retrieval.wanted_series(answers, study, self._settings.minimum_instances)

    def _orders(
        self,
        inquiry: store.Inquiry,
        studies: Sequence[StudyAnswer],
        wanted: dict[str, list[SeriesAnswer]],
    ) -> list[store.Order]:
        """Return the Series that are not here in full."""
        dates = {study.study_uid: study.study_date for study in studies}
        series = [answer for answers in wanted.values() for answer in answers]
        with store.reading(self._engine) as session:
            held = store.held_series(session, [answer.series_uid for answer in series])
        return [
            store.Order(
                series_uid=answer.series_uid,
                study_uid=answer.study_uid,
                peer=self._archive.name,
                cause=inquiry.cause,
                asked_by=inquiry.subject,
                study_date=dates[answer.study_uid],
                expected=answer.instances,
            )
            for answer in series
            if answer.series_uid not in held or lacks(answer.instances, held[answer.series_uid])
        ]


def _patient(session: Session, study_uid: str) -> _Patient | None:
    """Return whose a Study is today, None where it is not here."""
    found = store.patient_of_study(session, study_uid)
    if found is None:
        return None
    return _Patient(tuple(store.patient_keys(session, found[0])), found[1])


def _why_not(patient: _Patient | None) -> str:
    if patient is None:
        return GONE
    return "" if patient.patient_ids else NOT_ASKABLE
