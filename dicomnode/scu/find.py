"""C-FIND, Study Root (PS3.4 C.4.1): which Studies and Series a peer has."""

import time
from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID
from pynetdicom import build_context
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as StudyRootFind

from dicomnode.core.retrieval import SeriesAnswer, StudyAnswer
from dicomnode.errors import PeerRefused
from dicomnode.model import PatientKey
from dicomnode.scu.association import Link

ANSWER_S = 60.0  # until the next answer
FIND_S = 600.0  # until the last one
# A peer that answers more passes over what it was asked for, or has more than one question can get.
MAX_ANSWERS = 20_000
FIND_BYTES = 64 << 20
PENDING = (0xFF00, 0xFF01)

# What a value of a data set by a stranger may raise when it is looked at.
BAD_VALUE = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, OverflowError)


def find_context() -> PresentationContext:
    """Return what to propose."""
    return build_context(StudyRootFind)


def find_studies(
    link: Link,
    *,
    patient_id: str = "",
    days: tuple[date, date] | None = None,
    most: int = MAX_ANSWERS,
) -> list[StudyAnswer]:
    """Return the Studies with CT that a peer names, of a patient or of some days, or of both.

    Parameters
    ----------
    patient_id
        Patient ID (0010,0020), without wild cards.
    days
        First and last Study Date (0008,0020).
    most
        Answers beyond which the peer is taken to pass over the question.

    Returns
    -------
    list of StudyAnswer
        As the peer answered, whether they are what was asked for or not; those without a valid
        Study Instance UID left out.

    Raises
    ------
    PeerRefused
        If the peer refuses, or answers more than that.
    PeerUnavailable
        If the association broke.
    """
    ds = Dataset()
    ds.QueryRetrieveLevel = "STUDY"
    if not patient_id.isascii():
        ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientID = patient_id
    # Asked for, but no key of matching: many a PACS passes over it, and some match nothing by it.
    ds.IssuerOfPatientID = ""
    ds.StudyInstanceUID = ""
    ds.StudyDate = f"{days[0]:%Y%m%d}-{days[1]:%Y%m%d}" if days else ""
    ds.ModalitiesInStudy = "CT"
    ds.SOPClassesInStudy = ""
    ds.NumberOfStudyRelatedSeries = ""
    ds.NumberOfStudyRelatedInstances = ""
    answers = [study_of(answer) for answer in _find(link, ds, most)]
    return [answer for answer in answers if is_uid(answer.study_uid)]


def find_series(link: Link, study_uid: str, series_uid: str = "") -> list[SeriesAnswer]:
    """Return the CT Series of a Study that a peer names, or one of them.

    Raises
    ------
    PeerRefused, PeerUnavailable
        As `find_studies`.
    """
    ds = Dataset()
    ds.QueryRetrieveLevel = "SERIES"
    ds.StudyInstanceUID = study_uid
    ds.SeriesInstanceUID = series_uid
    ds.Modality = "CT"
    ds.NumberOfSeriesRelatedInstances = ""
    answers = [series_of(answer, study_uid) for answer in _find(link, ds, MAX_ANSWERS)]
    return [answer for answer in answers if is_uid(answer.series_uid)]


def study_of(ds: Dataset) -> StudyAnswer:
    """Return what an answer at Study level says."""
    return StudyAnswer(
        study_uid=text_of(ds, "StudyInstanceUID"),
        patient=PatientKey(text_of(ds, "PatientID"), text_of(ds, "IssuerOfPatientID")),
        study_date=_day(text_of(ds, "StudyDate")),
        modalities=_texts(ds, "ModalitiesInStudy"),
        sop_classes=_texts(ds, "SOPClassesInStudy"),
        series=_count(ds, "NumberOfStudyRelatedSeries"),
        instances=_count(ds, "NumberOfStudyRelatedInstances"),
    )


def series_of(ds: Dataset, study_uid: str) -> SeriesAnswer:
    """Return what an answer at Series level says; of the Study asked for where it names none."""
    return SeriesAnswer(
        study_uid=text_of(ds, "StudyInstanceUID") or study_uid,
        series_uid=text_of(ds, "SeriesInstanceUID"),
        modality=text_of(ds, "Modality"),
        instances=_count(ds, "NumberOfSeriesRelatedInstances"),
    )


def is_uid(text: str) -> bool:
    """Whether a text is a UID."""
    return bool(text) and UID(text).is_valid


def text_of(ds: Dataset, keyword: str) -> str:
    """Return a value without the spaces around it; empty where there is none, or more than one."""
    try:
        value = ds.get(keyword)
        return "" if value is None or isinstance(value, MultiValue) else str(value).strip(" \0")
    except BAD_VALUE:
        return ""


def status_of(status: int) -> str:
    """Return what a status of a query or retrieval says, and what to do where that is known.

    The peer's own Error Comment is left out: it may well tell of the patient.
    """
    known = {
        0x0122: "it does not offer this service",
        0x0124: "it does not allow us this: give our AE title leave to query and retrieve there",
        0xA701: "out of resources to count what matches",
        0xA702: "out of resources to send it",
        0xA801: (
            "Move Destination unknown: register our AE title, with host and port, at the peer "
            "(docs/operations.md, Priors)"
        ),
        0xFE00: "cancelled by the peer",
    }
    families = {0xA7: "out of resources", 0xA9: "it does not understand the question"}
    meaning = known.get(status) or families.get(status >> 8)
    meaning = meaning or ("unable to process" if status >> 12 == 0xC else "failed")
    return f"0x{status:04X}, {meaning}"


def _find(link: Link, identifier: Dataset, most: int) -> Sequence[Dataset]:
    found: list[Dataset] = []
    deadline = time.monotonic() + FIND_S
    assoc = link.assoc
    with link.bounded(FIND_S, FIND_BYTES):
        assoc.dimse_timeout = ANSWER_S
        try:
            responses = assoc.send_c_find(identifier, StudyRootFind, msg_id=link.next_message_id())
        except RuntimeError as exc:  # it is not established any more
            raise link.broken("C-FIND") from exc
        except ValueError as exc:
            raise PeerRefused(f"{link.peer.ae_title} does not offer C-FIND, Study Root") from exc
        for answer, ds in responses:
            status = _status(answer)
            if status is None:
                raise link.broken("C-FIND")
            if status not in PENDING:
                if status != 0x0000:
                    raise PeerRefused(f"{link.peer.ae_title} refuses C-FIND: {status_of(status)}")
                return found
            if ds is not None:
                found.append(ds)
            if len(found) > most:
                assoc.abort()
                raise PeerRefused(
                    f"{link.peer.ae_title} answers more than {most} times: does it pass over what "
                    "it is asked for?"
                )
            if time.monotonic() > deadline:
                assoc.abort()
                raise link.broken("C-FIND")
    raise link.broken("C-FIND")


def _status(answer: Dataset) -> int | None:
    status = answer.get("Status")
    return None if status is None else int(status)


def _texts(ds: Dataset, keyword: str) -> tuple[str, ...]:
    try:
        value: Any = ds.get(keyword)
        values = value if isinstance(value, MultiValue | list | tuple) else [value]
        return tuple(str(v).strip(" \0") for v in values if v not in (None, ""))
    except BAD_VALUE:
        return ()


def _count(ds: Dataset, keyword: str) -> int | None:
    try:
        count = int(text_of(ds, keyword))
    except ValueError:
        return None
    return count if 0 <= count < 1 << 31 else None


def _day(text: str) -> date | None:
    try:
        # The form of before 1993, 1992.04.30, is still sent (PS3.5 Table 6.2-1).
        return datetime.strptime(text.replace(".", ""), "%Y%m%d").date()
    except ValueError:
        return None
