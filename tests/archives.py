"""Archives to ask for priors: one in memory, and one over C-FIND and C-MOVE, well or badly."""

import contextlib
import fnmatch
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, evt
from pynetdicom.dimse_primitives import C_MOVE
from pynetdicom.sop_class import (
    CTImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from dicomnode.config import Peer
from dicomnode.core.retrieval import SeriesAnswer, StudyAnswer
from dicomnode.errors import PeerRefused, PeerUnavailable
from dicomnode.scu.archive import Conversation
from dicomnode.scu.move import Retrieved


class Books:
    """An archive in memory, with the interface of `dicomnode.scu.archive.Archive`.

    `on_retrieve` says what becomes of a Series that is asked for; `trouble` what is raised by the
    next calls, by name of the call: `opened`, `find_studies`, `find_series`, `retrieve`.
    """

    def __init__(self, name: str = "PACS") -> None:
        self.name, self.default_issuer = name, ""
        self.studies: dict[str, StudyAnswer] = {}
        self.series: dict[str, SeriesAnswer] = {}
        self.passes_over_keys = False
        self.our_port_is_open = True
        self.trouble: dict[str, list[Exception | None]] = {}
        self.calls: list[tuple[str, Any]] = []
        self.on_retrieve: Callable[[SeriesAnswer], Retrieved] = lambda s: Retrieved(
            s.instances, 0, 0
        )

    def add(self, study: StudyAnswer, *series: SeriesAnswer) -> None:
        """Take in a Study."""
        self.studies[study.study_uid] = study
        self.series |= {s.series_uid: s for s in series}

    @property
    def retrieved(self) -> list[str]:
        """Series that were asked for, in turn."""
        return [what for call, what in self.calls if call == "retrieve"]

    def count(self, call: str) -> int:
        """Return how often something was called."""
        return sum(name == call for name, _ in self.calls)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Conversation]:
        """Give a conversation."""
        self._called("opened", None)
        yield self

    def check(self) -> str:
        """Say that it is there."""
        return "in memory"

    def finds_us(self) -> bool:
        """Say what it was told to."""
        return self.our_port_is_open

    def find_studies(
        self, *, patient_id: str = "", days: tuple[date, date] | None = None, most: int
    ) -> list[StudyAnswer]:
        """Return Studies."""
        self._called("find_studies", (patient_id, days))
        found = [
            study
            for study in self.studies.values()
            if self.passes_over_keys
            or (
                (not patient_id or study.patient.patient_id == patient_id)
                and (days is None or (study.study_date and days[0] <= study.study_date <= days[1]))
            )
        ]
        if len(found) > most:
            raise PeerRefused("too many")
        return found

    def find_series(self, study_uid: str, series_uid: str = "") -> list[SeriesAnswer]:
        """Return Series."""
        self._called("find_series", study_uid)
        return [
            s
            for s in self.series.values()
            if self.passes_over_keys
            or (s.study_uid == study_uid and series_uid in ("", s.series_uid))
        ]

    def retrieve(self, study_uid: str, series_uid: str) -> Retrieved:
        """Do as told with a Series."""
        self._called("retrieve", series_uid)
        return self.on_retrieve(self.series[series_uid])

    def _called(self, call: str, what: Any) -> None:
        self.calls.append((call, what))
        trouble = self.trouble.get(call)
        if trouble and (error := trouble.pop(0)) is not None:
            raise error


class QueryRetrieve:
    """A Query/Retrieve SCP, Study Root, over data sets; what it does badly is set as it goes.

    Parameters
    ----------
    destination
        AE title -> port of 127.0.0.1, whom it sends to.
    """

    def __init__(self, datasets: Sequence[Dataset], destination: dict[str, int]) -> None:
        self.ae_title = "PACS"
        self.datasets, self.destination = list(datasets), destination
        self.passes_over_keys = False
        self.gives_issuer = True
        self.gives_counts = True
        self.find_status: int | None = None
        self.find_never_ends = False
        self.move_status: int | None = None
        self.move_never_ends = False  # pending, again and again
        self.hangs = False  # never answers a question
        self.withholds = 0  # Instances that it cannot send, of each Series
        self.aborts_after: int | None = None  # Instances
        self.over = threading.Event()
        self.identifiers: list[Dataset] = []
        self.moved: list[str] = []
        self.ae = AE(self.ae_title)
        self.ae.require_called_aet = True
        self.ae.acse_timeout = self.ae.dimse_timeout = self.ae.network_timeout = 20
        self.offers = [
            StudyRootQueryRetrieveInformationModelFind,
            StudyRootQueryRetrieveInformationModelMove,
        ]
        self._server: Any = None
        self.port = 0

    def __enter__(self) -> "QueryRetrieve":
        for sop_class in (*self.offers, Verification):
            self.ae.add_supported_context(sop_class)
        self.ae.requested_contexts = [build_context(CTImageStorage)]
        handlers = [(evt.EVT_C_FIND, self._find), (evt.EVT_C_MOVE, self._move)]
        self._server = self.ae.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=handlers
        )
        self.port = self._server.socket.getsockname()[1]
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def peer(self) -> Peer:
        """Itself, as the node knows it."""
        return Peer(ae_title=self.ae_title, host="127.0.0.1", port=self.port)

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        asked = event.identifier
        self.identifiers.append(asked)
        if self.hangs:
            self.over.wait(20)
        if self.find_status is not None:
            yield self.find_status, None
            return
        answers = self._answers(asked)
        while self.find_never_ends and event.assoc.is_established and not self.over.wait(0.01):
            yield 0xFF00, answers[0]
        for answer in answers:
            yield 0xFF00, answer

    def _answers(self, asked: Dataset) -> list[Dataset]:
        level = asked.QueryRetrieveLevel
        keyword = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID"}[level]
        groups: dict[str, list[Dataset]] = {}
        for ds in self.datasets:
            if self.passes_over_keys or _matches(ds, asked):
                groups.setdefault(str(ds[keyword].value), []).append(ds)
        answers = []
        for group in groups.values():
            answer = Dataset()
            answer.QueryRetrieveLevel = level
            for name in ("PatientID", "StudyInstanceUID", "StudyDate"):
                setattr(answer, name, group[0].get(name, ""))
            if self.gives_issuer and "IssuerOfPatientID" in group[0]:
                answer.IssuerOfPatientID = group[0].IssuerOfPatientID
            if level == "STUDY":
                answer.ModalitiesInStudy = sorted({ds.Modality for ds in group})
                counts = {"NumberOfStudyRelatedInstances": len(group)}
                uids = {ds.SeriesInstanceUID for ds in group}
                counts["NumberOfStudyRelatedSeries"] = len(uids)
            else:
                answer.SeriesInstanceUID = group[0].SeriesInstanceUID
                answer.Modality = group[0].Modality
                counts = {"NumberOfSeriesRelatedInstances": len(group)}
            if self.gives_counts:
                for name, count in counts.items():
                    setattr(answer, name, count)
            answers.append(answer)
        return answers

    def _move(self, event: evt.Event) -> Iterator[Any]:
        asked = event.identifier
        self.moved.append(str(asked.SeriesInstanceUID))
        port = self.destination.get(event.move_destination)
        if port is None:
            yield None, None  # pynetdicom answers 0xA801
            return
        yield "127.0.0.1", port, {"ae_title": event.move_destination}
        group = [ds for ds in self.datasets if ds.SeriesInstanceUID == asked.SeriesInstanceUID]
        group = [ds for ds in group if ds.StudyInstanceUID == asked.StudyInstanceUID]
        yield len(group)
        if self.move_status is not None:
            yield self.move_status, None
            return
        while self.move_never_ends and event.assoc.is_established and not self.over.wait(0.02):
            pending = C_MOVE()
            pending.MessageIDBeingRespondedTo = event.request.MessageID
            pending.AffectedSOPClassUID = event.request.AffectedSOPClassUID
            pending.Status = 0xFF00
            pending.NumberOfRemainingSuboperations = len(group)
            pending.NumberOfCompletedSuboperations = 0
            event.assoc.dimse.send_msg(pending, event.context.context_id)
        for n, ds in enumerate(group):
            if self.aborts_after == n:
                event.assoc.abort()
                return
            if n < self.withholds:
                yield 0xC000, None
                return
            yield 0xFF00, ds


def _matches(ds: Dataset, asked: Dataset) -> bool:
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality"):
        key = str(asked.get(keyword) or "")
        if key and not fnmatch.fnmatchcase(str(ds.get(keyword, "")), key):
            return False
    if asked.get("ModalitiesInStudy") and ds.Modality != asked.ModalitiesInStudy:
        return False
    days = str(asked.get("StudyDate") or "")
    if days:
        first, _, last = days.partition("-")
        return bool(first <= str(ds.StudyDate) <= (last or first))
    return True


def unanswering() -> socket.socket:
    """Return a socket that listens, and answers nobody."""
    return socket.create_server(("127.0.0.1", 0))


AWAY = PeerUnavailable("no connection to 127.0.0.1:104: Connection refused")
