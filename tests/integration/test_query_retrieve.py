"""C-FIND and C-MOVE to peers kind and odd, and a receiver of our own that they send to."""

import gc
import logging
import threading
import time
from collections.abc import Iterator
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.config import IGNORE
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind

from dicomnode import checks
from dicomnode.config import Settings
from dicomnode.core.retrieval import SeriesAnswer
from dicomnode.errors import PeerRefused, PeerUnavailable, SpoolFull
from dicomnode.model import PatientKey, SpooledInstance
from dicomnode.node.receive import Receiver
from dicomnode.scu import association, find, move
from dicomnode.scu.archive import Conversation, archive_of
from dicomnode.scu.find import study_of
from dicomnode.scu.move import Retrieved
from dicomnode.spool import Spool
from tests.archives import QueryRetrieve, unanswering
from tests.dicom import CANARIES, ct_dataset, leaks

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")

DAY = date(2026, 1, 5)


@pytest.fixture(autouse=True)
def _soon(monkeypatch) -> Iterator[None]:
    """Wait for a peer that hangs as long as a test may, and leave no thread behind."""
    monkeypatch.setattr(association, "ACSE_S", 2.0)
    monkeypatch.setattr(association, "GRACE_S", 0.5)
    before = threading.active_count()
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before, "a thread was left behind"


def study(patient_id: str, counts: tuple[int, ...], **attributes: Any) -> list[Dataset]:
    """Return a Study of CT Series of so many Instances."""
    uid = generate_uid(None)
    made = []
    for count in counts:
        series_uid = generate_uid(None)
        made += [
            ct_dataset(
                **{
                    **CANARIES,
                    "StudyInstanceUID": uid,
                    "SeriesInstanceUID": series_uid,
                    "PatientID": patient_id,
                    "IssuerOfPatientID": "HOSPITAL",
                    **attributes,
                }
            )
            for _ in range(count)
        ]
    return made


class Site:
    """A PACS with Studies, and our node, which it may know as a destination."""

    def __init__(self, folder: Path, datasets: list[Dataset]) -> None:
        self.pacs = QueryRetrieve(datasets, {})
        self._folder = folder
        self.settings = self._settings(1)

    def __enter__(self) -> "Site":
        self.pacs.__enter__()
        self.settings = self._settings(self.pacs.port)
        self.receiver = Receiver(self.settings)
        self.receiver.start()
        self.pacs.destination["DICOMNODE"] = self.receiver.port
        return self

    def __exit__(self, *exc: object) -> None:
        self.receiver.stop()
        self.pacs.__exit__()

    def _settings(self, port: int) -> Settings:
        peer = {"ae_title": "PACS", "host": "127.0.0.1", "port": port}
        return Settings(
            node={"port": 0, "peers": [peer]},
            spool={"path": self._folder / "spool", "reserve_bytes": 0},
            priors={"peers": ["PACS"]},
        )

    def opened(self) -> Any:
        return archive_of(self.settings, "PACS").opened()

    def spooled(self) -> list[str]:
        """Return the SOP Instance UIDs in our spool."""
        spool = Spool(self.settings.spool.path)
        try:
            entries = [e for e in spool.pending(1000) if isinstance(e, SpooledInstance)]
            return sorted(_sop_uid(bytes(spool.read(e))) for e in entries)
        finally:
            spool.close()


def _sop_uid(data: bytes) -> str:
    return str(pydicom.dcmread(BytesIO(data), stop_before_pixels=True).SOPInstanceUID)


@pytest.fixture
def datasets() -> list[Dataset]:
    return [
        *study("CANARY-ID", (3, 5), StudyDate="20260105"),
        *study("CANARY-ID", (4,), StudyDate="20200105"),
        *study("CANARY-OTHER", (2,), StudyDate="20260105"),
    ]


@pytest.fixture
def site(tmp_path: Path, datasets: list[Dataset]) -> Iterator[Site]:
    with Site(tmp_path, datasets) as site:
        yield site


def series_of(conversation: Conversation, datasets: list[Dataset], n: int) -> SeriesAnswer:
    ds = datasets[n]
    (answer,) = conversation.find_series(ds.StudyInstanceUID, ds.SeriesInstanceUID)
    return answer


# Kind


def test_studies_and_series_of_a_patient_are_found(site, datasets):
    with site.opened() as pacs:
        found = pacs.find_studies(patient_id="CANARY-ID", most=100)
        by_uid = {answer.study_uid: answer for answer in found}
        assert set(by_uid) == {datasets[0].StudyInstanceUID, datasets[8].StudyInstanceUID}
        first = by_uid[datasets[0].StudyInstanceUID]
        assert first.patient == PatientKey("CANARY-ID", "HOSPITAL")
        assert (first.study_date, first.modalities) == (DAY, ("CT",))
        assert (first.series, first.instances) == (2, 8)
        series = pacs.find_series(first.study_uid)
        assert {s.series_uid: s.instances for s in series} == {
            datasets[0].SeriesInstanceUID: 3,
            datasets[3].SeriesInstanceUID: 5,
        }
        recent = pacs.find_studies(patient_id="CANARY-ID", days=(DAY, DAY), most=100)
        assert [answer.study_uid for answer in recent] == [first.study_uid]
        assert len(pacs.find_studies(days=(DAY, DAY), most=100)) == 2
    asked = site.pacs.identifiers[0]
    assert (asked.QueryRetrieveLevel, asked.PatientID) == ("STUDY", "CANARY-ID")
    assert asked.IssuerOfPatientID in (None, "")  # asked for, and no key


def test_a_patient_id_beyond_ascii_says_in_which_characters(site):
    with site.opened() as pacs:
        pacs.find_studies(patient_id="Å-7", most=100)
    assert site.pacs.identifiers[0].SpecificCharacterSet == "ISO_IR 192"
    assert site.pacs.identifiers[0].PatientID == "Å-7"


def test_a_series_comes_by_c_move_to_our_own_receiver(site, datasets):
    with site.opened() as pacs:
        what = series_of(pacs, datasets, 3)
        assert pacs.retrieve(what.study_uid, what.series_uid) == Retrieved(5, 0, 0)
    wanted = [ds.SOPInstanceUID for ds in datasets if ds.SeriesInstanceUID == what.series_uid]
    assert site.spooled() == sorted(wanted)


def test_hundreds_of_questions_go_on_one_association(site, datasets):
    with site.opened() as pacs:
        for n in range(200):
            assert series_of(pacs, datasets, (0, 3, 8)[n % 3]).instances in (3, 4, 5)
    assert len(site.pacs.identifiers) == 200


def test_check_says_what_the_peer_takes_and_what_cannot_be_tried(site):
    (check,) = [c for c in checks.run(site.settings) if c.name == "priors PACS"]
    assert check.ok and "Move Destination" in check.message


def test_check_says_that_a_peer_offers_no_c_move(tmp_path):
    site = Site(tmp_path, [])
    site.pacs.offers = [StudyRootQueryRetrieveInformationModelFind]
    with site:
        (check,) = [c for c in checks.run(site.settings) if c.name == "priors PACS"]
        assert not check.ok and "does not offer C-MOVE" in check.message
        with site.opened() as pacs, pytest.raises(PeerRefused, match="does not offer C-MOVE"):
            pacs.retrieve("1.2", "1.2.3")


# Odd


def test_a_destination_it_does_not_know_is_told_with_what_to_do(site, datasets):
    site.pacs.destination.clear()
    with site.opened() as pacs, pytest.raises(PeerRefused, match=r"0xA801.*register our AE title"):
        pacs.retrieve(datasets[0].StudyInstanceUID, datasets[0].SeriesInstanceUID)


@pytest.mark.parametrize("status", [0xA702, 0xA900, 0xC001, 0x0124])
def test_a_refused_c_move_is_told(site, datasets, status):
    site.pacs.move_status = status
    with site.opened() as pacs, pytest.raises(PeerRefused, match=f"0x{status:04X}"):
        pacs.retrieve(datasets[0].StudyInstanceUID, datasets[0].SeriesInstanceUID)


def test_a_cancelled_c_move_is_told(site, datasets):
    site.pacs.move_status = 0xFE00
    with site.opened() as pacs, pytest.raises(PeerRefused, match="cancelled"):
        pacs.retrieve(datasets[0].StudyInstanceUID, datasets[0].SeriesInstanceUID)


def test_failed_sub_operations_are_counted(site, datasets):
    # The receiver refuses what does not fit any more.
    real = Spool.put
    refused = []

    def full(self: Spool, data: Any, association_id: str) -> Any:
        if len(refused) < 2:
            refused.append(1)
            raise SpoolFull("no room")
        return real(self, data, association_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spool, "put", full)
        with site.opened() as pacs:
            got = pacs.retrieve(datasets[3].StudyInstanceUID, datasets[3].SeriesInstanceUID)
    assert (got.completed, got.failed) == (3, 2)
    assert got.reason == "2 of 5 were not sent"
    assert len(site.spooled()) == 3


@pytest.mark.parametrize(
    ("status", "counts", "reason"),
    [
        (0x0000, (5, 0, 0), ""),
        (0x0000, (None, None, None), ""),
        (0x0000, (3, 0, 2), ""),
        (0x0000, (3, 2, 0), "2 of 5 were not sent"),
        (0xB000, (3, 2, 0), "2 of 5 were not sent"),
        (0xB000, (None, None, None), "not all were sent"),
        (0xFE00, (3, 0, 0), "C-MOVE ended with 0xFE00, cancelled by the peer"),
        (0xA702, (0, 0, 1), "C-MOVE ended with 0xA702, out of resources to send it"),
    ],
)
def test_the_last_response_says_what_came(status, counts, reason):
    assert move._outcome(status, counts, "PACS") == Retrieved(*counts, reason)


def test_a_receiver_that_is_down_leaves_all_sub_operations_failed(site, datasets):
    site.receiver.stop()
    with site.opened() as pacs, pytest.raises(PeerRefused, match="C-MOVE"):
        pacs.retrieve(datasets[0].StudyInstanceUID, datasets[0].SeriesInstanceUID)


def test_a_peer_that_aborts_half_way_is_told(site, datasets):
    site.pacs.aborts_after = 2
    with site.opened() as pacs, pytest.raises(PeerUnavailable, match="during C-MOVE"):
        pacs.retrieve(datasets[3].StudyInstanceUID, datasets[3].SeriesInstanceUID)


def test_pending_for_ever_ends(site, datasets, monkeypatch):
    monkeypatch.setattr(move, "STALL_S", 0.3)
    site.pacs.move_never_ends = True
    with site.opened() as pacs, pytest.raises(PeerRefused, match="sent nothing for"):
        pacs.retrieve(datasets[0].StudyInstanceUID, datasets[0].SeriesInstanceUID)


def test_a_question_that_is_never_answered_ends(site, monkeypatch):
    monkeypatch.setattr(find, "ANSWER_S", 0.3)
    site.pacs.hangs = True
    with site.opened() as pacs, pytest.raises(PeerUnavailable, match="C-FIND"):
        pacs.find_studies(patient_id="CANARY-ID", most=100)
    site.pacs.over.set()


def test_answers_without_end_end(site, monkeypatch):
    site.pacs.find_never_ends = True
    with site.opened() as pacs, pytest.raises(PeerRefused, match="pass over"):
        pacs.find_studies(patient_id="CANARY-ID", most=20)
    monkeypatch.setattr(find, "FIND_S", 0.5)
    with site.opened() as pacs, pytest.raises(PeerUnavailable, match="C-FIND"):
        pacs.find_studies(patient_id="CANARY-ID", most=10_000)
    site.pacs.over.set()


@pytest.mark.parametrize("status", [0xA700, 0xA900, 0xC000, 0x0122, 0x0124, 0xFE00])
def test_a_refused_question_is_told(site, status):
    site.pacs.find_status = status
    with site.opened() as pacs, pytest.raises(PeerRefused, match=f"0x{status:04X}"):
        pacs.find_studies(patient_id="CANARY-ID", most=100)


def test_a_peer_that_passes_over_all_keys_answers_what_it_answers(site):
    site.pacs.passes_over_keys = True
    site.pacs.gives_issuer = site.pacs.gives_counts = False
    with site.opened() as pacs:
        found = pacs.find_studies(patient_id="CANARY-ID", most=100)
    # Whose they are is theirs to say, and ours to compare.
    assert {a.patient.patient_id for a in found} == {"CANARY-ID", "CANARY-OTHER"}
    assert {(a.patient.issuer, a.series, a.instances) for a in found} == {("", None, None)}


def test_nobody_there_and_nobody_answering():
    with unanswering() as server:
        port = server.getsockname()[1]
        peer = {"ae_title": "PACS", "host": "127.0.0.1", "port": port}
        settings = Settings(node={"peers": [peer]}, priors={"peers": ["PACS"]})
        with pytest.raises(PeerUnavailable, match="does not answer"):
            archive_of(settings, "PACS").opened().__enter__()
    with pytest.raises(PeerUnavailable, match="no connection"):
        archive_of(settings, "PACS").opened().__enter__()


def test_damaged_answers_are_no_more_than_empty():
    ds = Dataset()
    ds.StudyInstanceUID = "1.2.3"
    ds.PatientID = ["A", "B"]
    ds.add(DataElement("StudyDate", "DA", "2026-1-5", validation_mode=IGNORE))
    ds.add(DataElement("NumberOfStudyRelatedSeries", "IS", "", validation_mode=IGNORE))
    ds.ModalitiesInStudy = None
    answer = study_of(ds)
    assert answer.patient == PatientKey("")
    assert (answer.study_date, answer.modalities, answer.instances) == (None, (), None)
    ds.add(DataElement("StudyDate", "DA", "2026.01.05", validation_mode=IGNORE))
    ds.PatientID = " A "
    assert study_of(ds).study_date == DAY and study_of(ds).patient.patient_id == "A"


def test_nothing_of_a_patient_is_said_when_it_fails(site, datasets, caplog):
    caplog.set_level(logging.DEBUG, "dicomnode")
    reasons = []
    for setting, value in (("find_status", 0xC000), ("passes_over_keys", True)):
        setattr(site.pacs, setting, value)
        with site.opened() as pacs:
            try:
                pacs.find_studies(patient_id="CANARY-ID", most=0)
            except (PeerRefused, PeerUnavailable) as exc:
                reasons.append(str(exc))
        setattr(site.pacs, setting, None)
    assert len(reasons) == 2
    assert not leaks(" ".join(reasons)) and not leaks(caplog.text)
