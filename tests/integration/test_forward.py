"""What a rule sends is what the database says it is, to its last byte, and goes in no circle."""

import io
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage, JPEG2000Lossless

from dicomnode import store
from dicomnode.errors import DicomError, StoreUnavailable
from dicomnode.held import Held
from dicomnode.model import DeliveryKind, DeliveryState, PatientKey, Rejection
from dicomnode.node.deliver import Deliver, ToPeer
from dicomnode.outgoing import Nothing, Outgoing, circle, forward, standing
from dicomnode.store import Ask, Delivery, LinkSource, Whose
from tests.dicom import compress, leaks, part10
from tests.integration.test_rules import (
    ALL,
    OTHER,
    SERIES,
    B,
    Node,
    bundle,
    ct_slice,
    node,
    on_sqlite,
    scan,
)
from tests.peers import archive

STUDY = "1.2.77"
THIRD = "1.2.5"
SLICES = 12
WRONG, RIGHT = {"PatientID": "CANARY-WRONG"}, {"PatientID": "CANARY-RIGHT"}

__all__ = ["bundle", "node"]


@pytest.fixture(autouse=True)
def looks_each_time(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(standing, "LOOK_S", 0.0)
    yield


def few(series_uid: str = SERIES, **values: Any) -> list[Dataset]:
    return scan(series_uid, range(SLICES), **values)


def by_subject(node: Node) -> dict[str, Delivery]:
    with store.reading(node.engine) as session:
        return {d.what.subject: d for d in store.list_deliveries(session)}


def make(node: Node, subject: str = SERIES) -> list[Outgoing]:
    return list(forward.make(node.engine, node.settings(), by_subject(node)[subject]))


def patients(made: list[Outgoing]) -> list[str]:
    return [str(dcmread(io.BytesIO(out.read())).PatientID) for out in made]


def settle(node: Node, subject: str, state: DeliveryState, **values: Any) -> None:
    with store.writing(node.engine) as session:
        now = datetime.now(UTC)
        assert store.settle_delivery(session, by_subject(node)[subject], state, now, **values)


def reject(node: Node, uid: str) -> None:
    note = Rejection("1.99", f"{SERIES}.0", "113037", frozenset([uid]), frozenset(), frozenset())
    with store.writing(node.engine) as session:
        store.record_rejection(session, note, "f" * 16, datetime.now(UTC))


# Whose


@pytest.mark.parametrize(
    ("study", "patient", "has"),
    [
        ("1.1", ("P", "H"), True),
        ("1.1", ("P", ""), True),  # as it came; what was taken for it is in the database
        ("1.1", ("Q", "X"), True),  # one patient, by a link
        ("1.1", ("Q", ""), True),
        ("1.1", ("P", "X"), False),
        ("1.1", ("p", ""), False),
        ("1.1", ("", ""), False),
        ("1.2", ("P", "H"), False),
    ],
)
def test_an_image_is_of_the_patient_it_names(study, patient, has):
    whose = Whose("1.1", frozenset([PatientKey("P", "H"), PatientKey("Q", "X")]))
    assert whose.has(study, PatientKey(*patient)) is has
    assert Whose("1.1", frozenset([PatientKey("")])).has("1.1", PatientKey(""))


def test_a_correction_that_broke_off_sends_nothing_until_the_rest_has_come(node, caplog):
    node.start(ALL)
    node.receive(*few(**WRONG))
    for ds in few(**RIGHT)[:3]:
        node.spool.put(part10(ds), B)
    node.spool.put_event(B, "aborted")
    node.work()
    with pytest.raises(DicomError, match="names another patient or Study") as raised:
        make(node)
    # It is tried again for as long as anything is, and then a person is told why.
    at = datetime.now(UTC)
    node.values["deliver"] = {"give_up_hours": 1}
    settings = node.settings()
    peer = settings.peer("AI")
    deliver = Deliver(settings, node.engine, "AI", ToPeer(settings, peer), clock=lambda: at)
    while (asked := by_subject(node)[SERIES]).state is DeliveryState.WAITING:
        at = max(at, asked.due_at)
        deliver.step(at)
    assert asked.state is DeliveryState.FAILED and asked.attempts >= 5
    assert asked.reason == str(raised.value) and not leaks(str(raised.value) + caplog.text)
    with store.writing(node.engine) as session:
        store.requeue_deliveries(session, at)
    node.receive(*few(**RIGHT), association="c" * 16)
    assert patients(make(node)) == [RIGHT["PatientID"]] * SLICES


@on_sqlite
def test_images_of_nobody_go_out_as_they_came(node):
    node.start(ALL)
    node.receive(*few(PatientID="UNKNOWN"))
    assert patients(make(node)) == ["UNKNOWN"] * SLICES


@on_sqlite
def test_images_of_keys_that_are_linked_are_of_one_patient(node):
    node.start(ALL)
    node.receive(*few(**WRONG))
    node.receive(ct_slice(SERIES, SLICES, **RIGHT), association=B)
    with pytest.raises(DicomError):
        make(node)
    keys = [PatientKey(p["PatientID"]) for p in (WRONG, RIGHT)]
    with store.writing(node.engine) as session:
        link = store.link_patients(session, *keys, LinkSource.CLI, datetime.now(UTC)).link
    made = make(node)
    assert sorted(set(patients(made))) == [RIGHT["PatientID"], WRONG["PatientID"]]
    with store.writing(node.engine) as session:  # while it is being sent
        store.unlink_patients(session, link.id, datetime.now(UTC))
    with pytest.raises(DicomError, match="another patient"):
        patients(made)


def test_a_study_that_moves_takes_along_what_was_asked_for_its_other_series(node):
    """The archive corrects one Series, and later the others."""
    node.start(ALL)
    study = {"StudyInstanceUID": STUDY}
    node.receive(*(ds for uid in (SERIES, OTHER, THIRD) for ds in few(uid, **study, **WRONG)))
    settle(node, OTHER, DeliveryState.DONE)
    on_its_way = by_subject(node)[THIRD]
    node.receive(*few(SERIES, **study, **RIGHT), association=B)
    assert patients(make(node, SERIES)) == [RIGHT["PatientID"]] * SLICES
    found = by_subject(node)
    assert found[OTHER].state is DeliveryState.FAILED and "was corrected" in found[OTHER].reason
    assert found[THIRD].state is DeliveryState.WAITING
    with pytest.raises(DicomError, match="another patient"):
        make(node, THIRD)
    with store.writing(node.engine) as session:  # what was under way settles nothing
        now = datetime.now(UTC)
        assert not store.settle_delivery(session, on_its_way, DeliveryState.DONE, now)
    Held(node.settings().held_path).drop(STUDY, OTHER)  # it was delivered long ago
    node.receive(*(ds for uid in (OTHER, THIRD) for ds in few(uid, **study, **RIGHT)))
    for uid in (OTHER, THIRD):
        assert by_subject(node)[uid].state is DeliveryState.WAITING
        assert patients(make(node, uid)) == [RIGHT["PatientID"]] * SLICES
    versions = {uid: d.version for uid, d in by_subject(node).items()}
    node.receive(*few(OTHER, **study, **RIGHT), association="c" * 16)  # and nothing new
    assert {uid: d.version for uid, d in by_subject(node).items()} == versions
    for uid in versions:  # all at once, a second time
        settle(node, uid, DeliveryState.DONE)
    third = {"PatientID": "CANARY-THIRD"}
    node.receive(
        *(ds for uid in versions for ds in few(uid, **study, **third)), association="d" * 16
    )
    for uid in versions:
        assert patients(make(node, uid)) == [third["PatientID"]] * SLICES


@on_sqlite
def test_a_series_that_joins_its_corrected_study_late_goes_once_it_is_corrected(node):
    node.start(ALL)
    study = {"StudyInstanceUID": STUDY}
    node.receive(*few(SERIES, **study, **WRONG))
    node.receive(*few(SERIES, **study, **RIGHT), association=B)
    node.receive(*few(OTHER, **study, **WRONG), association="c" * 16)  # it was on its way
    with pytest.raises(DicomError, match="another patient"):
        make(node, OTHER)
    settle(node, OTHER, DeliveryState.FAILED)
    node.receive(*few(OTHER, **study, **RIGHT), association="d" * 16)
    assert by_subject(node)[OTHER].state is DeliveryState.WAITING
    assert patients(make(node, OTHER)) == [RIGHT["PatientID"]] * SLICES


@on_sqlite
def test_a_report_of_a_series_that_moved_along_is_made_anew(node):
    node.start(ALL)
    node.receive(*(ds for uid in (SERIES, OTHER) for ds in few(uid, StudyInstanceUID=STUDY)))
    now = datetime.now(UTC)
    with store.writing(node.engine) as session:
        store.ask_deliveries(session, [Ask(DeliveryKind.REPORT, "PACS", OTHER)], now, now)
        (report,) = store.list_deliveries(session, destination="PACS")
        assert store.settle_delivery(session, report, DeliveryState.DONE, now)
    node.receive(*few(SERIES, StudyInstanceUID=STUDY, **RIGHT), association=B)
    with store.reading(node.engine) as session:
        (report,) = store.list_deliveries(session, destination="PACS")
    assert (report.state, report.version) == (DeliveryState.WAITING, 2)


# While it is being sent


@on_sqlite
def test_what_is_sent_again_otherwise_meanwhile_goes_under_no_other_name(node):
    node.start(ALL)
    node.receive(*few())
    made = make(node)
    node.receive(*few(), association=B)  # the same
    assert len([out.read() for out in made]) == SLICES
    again = few()
    for ds in again:
        compress(ds, JPEG2000Lossless)
    node.receive(*again, association=B)
    for out in made:
        with pytest.raises(DicomError, match="sent again meanwhile"):
            out.read()
    assert {out.transfer_syntax_uid for out in make(node)} == {JPEG2000Lossless}


@on_sqlite
def test_what_is_rejected_while_the_rest_is_being_sent_is_not(node):
    node.start(ALL)
    sent = node.receive(*few())
    first, *rest = make(node)
    assert first.read() == sent[first.sop_instance_uid]
    reject(node, rest[0].sop_instance_uid)
    with pytest.raises(DicomError, match="a rejection note"):
        rest[0].read()
    assert [out.read() for out in rest[1:]] == [sent[o.sop_instance_uid] for o in rest[1:]]


@on_sqlite
def test_a_look_at_the_database_serves_for_a_while(node, monkeypatch):
    monkeypatch.setattr(standing, "LOOK_S", 1e9)
    node.start(ALL)
    node.receive(*few())
    looks = []
    whose = store.whose
    monkeypatch.setattr(store, "whose", lambda *given: looks.append(1) or whose(*given))
    assert len([out.read() for out in make(node)]) == SLICES
    assert len(looks) == 1


@on_sqlite
def test_a_disk_that_does_not_give_a_file_is_the_matter_of_that_delivery(node, monkeypatch):
    node.start(ALL)
    node.receive(*few())
    made = make(node)

    def bad(*given: Any, **named: Any) -> Any:
        raise OSError(5, "Input/output error", "/spool/held")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", bad)
        with pytest.raises(DicomError, match=r"cannot be read: Input/output error$"):
            made[0].read()
    for where, name in ((forward.dicomio, "identity"), (Held, "instances")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, bad)
            with pytest.raises(DicomError, match=r"cannot be read: Input/output error$"):
                make(node)


@on_sqlite
def test_a_database_that_is_away_while_images_are_sent_is_no_fault_of_theirs(node, monkeypatch):
    node.start(ALL)
    node.receive(*few())
    whose, looks = store.whose, itertools.count()

    def away(*given: Any) -> Any:
        if next(looks) >= SLICES + 3:  # once for each before any is sent
            raise StoreUnavailable("away")
        return whose(*given)

    monkeypatch.setattr(store, "whose", away)
    with archive(CTImageStorage, ae_title="AI") as peer:
        node.values["node"] = {
            "peers": [{"ae_title": "AI", "host": "127.0.0.1", "port": peer.port}]
        }
        settings = node.settings()
        to_peer = ToPeer(settings, peer.peer)
        deliver = Deliver(settings, node.engine, "AI", to_peer)
        with pytest.raises(StoreUnavailable):
            deliver.step(datetime.now(UTC))
        assert len(peer.uids) == 3
    waiting = by_subject(node)[SERIES]
    assert waiting.state is DeliveryState.WAITING and waiting.reason is None


@on_sqlite
def test_a_disk_that_is_not_mounted_is_no_reason_to_let_go_of_a_delivery(node, tmp_path):
    kept = tmp_path / "kept"
    node.start(ALL, dicom_path=kept)
    node.receive(*few())
    assert len(make(node)) == SLICES
    kept.rename(tmp_path / "elsewhere")
    with pytest.raises(DicomError, match="No such file or directory"):
        make(node)
    kept.mkdir()
    with pytest.raises(DicomError, match="is its disk mounted"):
        make(node)
    (kept / "1.2.9").mkdir()  # it is another Series that is there
    with pytest.raises(Nothing, match="not held any more"):
        make(node)


# Circles


def sent_by(ae_title: str, datasets: list[Dataset]) -> list[Dataset]:
    for ds in datasets:
        ds.file_meta.SourceApplicationEntityTitle = ae_title
    return datasets


def derived(series_uid: str, *source_uids: str) -> list[Dataset]:
    found = few(
        series_uid, ImageType=["DERIVED", "SECONDARY", "AXIAL"], StudyInstanceUID=f"{SERIES}.0"
    )
    for ds in found:
        ds.SourceImageSequence = [Dataset() for _ in source_uids]
        for item, uid in zip(ds.SourceImageSequence, source_uids, strict=True):
            item.ReferencedSOPInstanceUID = uid
    return found


@on_sqlite
def test_what_a_destination_sends_does_not_go_back_to_it(node):
    node.start(ALL)
    back = sent_by("AI", few())
    node.receive(*back)
    with pytest.raises(Nothing, match="came from AI itself"):
        make(node)
    late = node.receive(*sent_by("CT1", [ct_slice(SERIES, SLICES)]), association=B)
    assert [out.sop_instance_uid for out in make(node)] == list(late)


@on_sqlite
def test_what_was_made_of_images_that_a_destination_got_does_not_go_there(node, monkeypatch):
    """Sent by the archive, perhaps."""
    node.start(ALL)
    node.receive(*few())
    node.receive(*derived(OTHER, f"{SERIES}.3"), association=B)
    node.receive(*derived(THIRD), association="c" * 16)
    assert len(make(node, OTHER)) == SLICES  # it did not get them yet
    settle(node, SERIES, DeliveryState.DONE, sop_instance_uid=f"{SERIES}.12")
    with pytest.raises(Nothing, match="derived from images that AI got"):
        make(node, OTHER)
    assert len(make(node, THIRD)) == SLICES  # of what, it does not say
    monkeypatch.setattr(circle, "MOST", 1)
    with pytest.raises(Nothing, match="AI got 1 Series of its Study"):
        make(node, THIRD)
