"""What the store keeps so that objects can refer to a Series: its header, its SOP Classes."""

import json
import threading
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import torch
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage
from sqlalchemy import Engine, event, select, update
from sqlalchemy.orm import Session

from db import schema
from dicomnode import rescore, store, weights
from dicomnode.core.admission import CT_IMAGE
from dicomnode.errors import ObjectError, StoreUnavailable
from dicomnode.model import PatientKey, SeriesState
from dicomnode.node.assemble import AssembleStage
from dicomnode.node.score import Scorer, ScoreStage
from dicomnode.objects import source
from dicomnode.spool import Spool
from dicomnode.weights import Bundle
from tests.dicom import CANARIES, enhanced_ct, leaks, part10
from tests.integration.test_stages import brightness_bundle, ct_slice
from tests.integration.test_store import MODEL, manifest, scan

SERIES, A = "1.2.1", "0123456789abcdef"
SENT = {
    "IssuerOfPatientID": "HOSPITAL",
    "PatientSex": "O",
    "StudyID": "S1",
    "StudyTime": "081500.25",
    "TimezoneOffsetFromUTC": "+0100",
    "Laterality": "L",
}
KEPT = {
    **SENT,
    "PatientName": CANARIES["PatientName"],
    "PatientID": CANARIES["PatientID"],
    "PatientBirthDate": CANARIES["PatientBirthDate"],
    "AccessionNumber": CANARIES["AccessionNumber"],
    "ReferringPhysicianName": CANARIES["ReferringPhysicianName"],
    "StudyDescription": CANARIES["StudyDescription"],
    "SeriesDescription": CANARIES["SeriesDescription"],
    "StudyDate": "20260105",
    "BodyPartExamined": "CHEST",
    "SeriesNumber": "2",
}


class Node:
    """The stages that a slice goes through, in a database and a spool of their own."""

    def __init__(self, engine: Engine, spool: Spool, bundle: Bundle) -> None:
        self.engine, self.spool, self.bundle = engine, spool, bundle
        with store.writing(engine) as session:
            store.record_model(session, bundle.digest, bundle.manifest, datetime.now(UTC))
        self.start()

    def start(self) -> None:
        scorer = Scorer(self.bundle, torch.device("cpu"), 8)
        self.stage = ScoreStage(self.spool, self.engine, scorer, threads=1)

    def restart(self) -> None:
        self.stage.close()
        self.start()

    def take(self, *datasets: Dataset) -> None:
        for ds in datasets:
            self.spool.put(part10(ds), A)
        self.spool.put_event(A, "released")
        while self.stage.step().until is not None:
            pass

    def finish(self) -> int:
        later = datetime.now(UTC) + timedelta(days=1)
        return AssembleStage(self.engine, 1.0, 600.0).step(later, later)

    def header(self, series_uid: str = SERIES) -> dict[str, str] | None:
        with store.reading(self.engine) as session:
            query = select(schema.Series.header).where(schema.Series.series_uid == series_uid)
            return session.scalars(query).one()

    def known(self, series_uid: str = SERIES) -> store.KnownSource:
        with store.reading(self.engine) as session:
            found = store.source_of(session, series_uid)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return brightness_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def node(engine, bundle, tmp_path) -> Iterator[Node]:
    node = Node(engine, Spool(tmp_path / "spool"), bundle)
    yield node
    node.stage.close()


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """SOP Instance UIDs of the headers that were read as a whole."""
    found: list[str] = []
    whole = source.texts_of

    def noted(header: Dataset) -> dict[str, str]:
        found.append(str(header.SOPInstanceUID))
        return whole(header)

    monkeypatch.setattr(source, "texts_of", noted)
    return found


def slices(levels: range = range(12), series_uid: str = SERIES, **attributes: Any) -> list[Dataset]:
    return [ct_slice(series_uid, level, **{**SENT, **attributes}) for level in levels]


def forget(engine: Engine, series_uid: str = SERIES) -> None:
    """Make the rows of a finished Series those of schema 0004."""
    with Session(engine) as session, session.begin():
        series = session.scalars(
            select(schema.Series).where(schema.Series.series_uid == series_uid)
        ).one()
        row = session.get_one(schema.Curve, series.id)
        members = [m[:3] for m in json.loads(zlib.decompress(row.instances))]
        row.instances = zlib.compress(json.dumps(members).encode())
        series.header = row.sop_classes = None
        session.execute(
            update(schema.Slice)
            .where(schema.Slice.series_id == series.id)
            .values(sop_class_uid=None)
        )


# The header


def test_a_series_has_its_header_as_sent(node):
    node.take(*slices())
    assert node.header() == KEPT
    node.finish()
    known = node.known()
    assert {k: getattr(known.source, f) for f, k in source.COPIED.items()} == {
        k: KEPT[k] for k in source.COPIED.values()
    }
    assert known.source.unknown == ()
    assert known.source.z_mm == tuple(5.0 * k for k in range(12))
    assert (known.revision, known.model_name) == (1, "brightness")
    assert (known.origin.revision, known.origin.model) == ("1", node.bundle.digest)


def test_the_header_is_read_once_a_series(node, reads):
    both = zip(slices(), slices(series_uid="1.2.2"), strict=True)
    node.take(*(ds for pair in both for ds in pair))
    assert len(reads) == 2
    node.restart()  # what it knew, it knew from the database
    node.take(*slices(range(12, 20)))
    assert len(reads) == 2


def test_a_header_is_not_taken_for_stored_before_its_commit(node, reads):
    def fail(_: Session) -> None:
        raise StoreUnavailable("no commit")

    event.listen(Session, "before_commit", fail)
    try:
        with pytest.raises(StoreUnavailable):
            node.take(*slices())
    finally:
        event.remove(Session, "before_commit", fail)
    assert len(reads) == 1
    node.take()
    assert len(reads) == 2 and node.header() == KEPT


def test_slices_without_a_score_do_not_describe_their_series(node, reads):
    kind = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    node.take(*slices(range(2), ImageType=kind, PatientName="WRONG^CANARY"))
    assert node.header() is None and reads == []
    node.take(*slices(range(2, 12)))
    assert node.header() == KEPT


def test_a_corrected_name_is_taken_from_what_is_sent_again(node):
    node.take(*slices())
    node.finish()
    node.take(*slices(PatientName="CANARY^CORRECTED"))
    assert node.header() == {**KEPT, "PatientName": "CANARY^CORRECTED"}
    assert node.finish() == 0 and node.known().revision == 1


def test_a_series_that_moves_to_another_patient_takes_that_header(node):
    node.take(*slices())
    other = {"PatientID": "CANARY-2", "PatientName": "CANARY^SECOND", "StudyID": "S2"}
    node.take(*slices(range(16), **other))  # while it is open
    assert node.header() == {**KEPT, **other}
    node.finish()
    third = {**other, "PatientID": "CANARY-3", "PatientName": "CANARY^THIRD"}
    node.take(*slices(range(3), **third))  # and finished
    assert node.header() == {**KEPT, **other}  # a few may be copies of then
    node.take(*slices(range(3, 9), **third))
    assert node.header() == {**KEPT, **third}
    node.finish()
    assert (node.known().source.patient_name, node.known().revision) == ("CANARY^THIRD", 2)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_peer_that_corrects_nobody_is_known_by_its_title(node):
    node.stage.uncorrected = frozenset({"VNA"})
    node.take(*slices())
    for sender, patient_id in (("VNA", KEPT["PatientID"]), ("PACS", "CANARY-2")):
        again = slices(PatientID="CANARY-2")
        for ds in again:
            ds.file_meta.SourceApplicationEntityTitle = sender
        node.take(*again)
        assert (node.header() or {})["PatientID"] == patient_id


def test_a_slice_that_nobody_describes_leaves_no_header_of_another_patient(engine):
    with store.writing(engine) as session:
        store.record_model(session, MODEL, manifest(), datetime.now(UTC))
        store.record_slices(session, MODEL, scan(SERIES), lambda result: {"PatientName": "A"})
    with store.writing(engine) as session:
        store.record_slices(session, MODEL, scan(SERIES, patient=PatientKey("P2")))
    with store.reading(engine) as session:
        assert session.scalars(select(schema.Series.header)).one() is None


def test_a_series_that_moves_along_with_its_study_takes_the_name_of_that_patient(engine):
    def describe(result: store.SliceResult) -> dict[str, str]:
        name = {"P1": "CANARY^FIRST", "P2": "CANARY^SECOND"}[result.header.patient.patient_id]
        return {"PatientName": name, "StudyID": "S1"}

    def record(series_uid: str, patient_id: str) -> None:
        results = scan(series_uid, patient=PatientKey(patient_id), study_uid="1.2.9")
        with store.writing(engine) as session:
            store.record_slices(session, MODEL, results, describe)

    with store.writing(engine) as session:
        store.record_model(session, MODEL, manifest(), datetime.now(UTC))
    for series_uid, patient_id in (("1.2.9.1", "P1"), ("1.2.9.2", "P1"), ("1.2.9.1", "P2")):
        record(series_uid, patient_id)
    with store.reading(engine) as session:
        query = select(schema.Series.patient_id, schema.Series.header)
        assert [tuple(row) for row in session.execute(query)] == [
            ("P2", {"PatientName": "CANARY^SECOND", "StudyID": "S1"})
        ] * 2


def test_a_series_that_reopens_or_is_scored_anew_keeps_all_of_it(node, tmp_path):
    node.take(*slices())
    node.finish()
    node.take(*slices(range(12, 14)))
    node.finish()
    known = node.known()
    assert known.revision == 2 and len(known.source.instances) == 14
    assert {i.sop_class_uid for i in known.source.instances} == {CT_IMAGE}
    folder = tmp_path / "other"
    weights.save(
        folder, node.bundle.network, name="other", spec=node.bundle.spec,
        heights=node.bundle.heights, training={"other": 1},
    )  # fmt: skip
    other = weights.load(folder)
    plan = rescore.plan(node.engine, other)
    scorer = Scorer(other, torch.device("cpu"), 8)
    assert rescore.run(node.engine, scorer, plan.series).rescored == [SERIES]
    again = node.known()
    assert again.source == known.source and again.origin.model == other.digest
    with store.reading(node.engine) as session:
        assert session.scalars(select(schema.Curve.sop_classes)).one() == [CT_IMAGE]


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_of_two_workers_one_describes_the_series(engine):
    with store.writing(engine) as session:
        store.record_model(session, MODEL, manifest(), datetime.now(UTC))
    described: list[str] = []
    barrier = threading.Barrier(2)

    def work(part: slice) -> None:
        def describe(result: store.SliceResult) -> dict[str, str]:
            described.append(result.header.sop_instance_uid)
            return {"PatientName": "A"}

        barrier.wait(timeout=30)
        with store.writing(engine) as session:
            store.record_slices(session, MODEL, scan(SERIES)[part], describe)

    threads = [threading.Thread(target=work, args=(part,)) for part in (slice(6), slice(6, 12))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(described) == 1
    with store.reading(engine) as session:
        assert session.scalars(select(schema.Series.header)).one() == {"PatientName": "A"}


def test_what_a_person_may_see_of_a_known_series_shows_no_patient(node):
    node.take(*slices())
    node.finish()
    known = node.known()
    assert not leaks(f"{known!r} {known.source!r} {known.origin!r}")


def test_a_header_that_no_json_takes_does_not_stop_the_queue(node):
    odd = ct_slice(SERIES, 0)
    data = part10(odd).replace(b"CANARY^NAME ", b"CAN\0RY^\xff\xfe\0 ")
    assert data != part10(odd)
    node.spool.put(data, A)
    node.take(*slices(range(1, 12), PatientName=None))
    header = node.header()
    assert header is not None and header["PatientID"] == CANARIES["PatientID"]


# SOP Classes


def test_frames_are_instances_of_their_class(node):
    one = enhanced_ct(slices())
    node.take(one)
    node.finish()
    known = node.known()
    (instance,) = known.source.instances
    assert instance.sop_class_uid == EnhancedCTImageStorage
    assert instance.sop_instance_uid == one.SOPInstanceUID
    assert instance.frames == tuple(range(1, 13))


def test_a_series_of_two_classes_has_each_instance_in_its_own(node):
    upper = enhanced_ct(slices(range(12, 20)))
    node.take(*slices(), upper)
    node.finish()
    node.take(*slices(range(20, 21)))
    node.finish()
    found = {i.sop_instance_uid: i.sop_class_uid for i in node.known().source.instances}
    assert found.pop(upper.SOPInstanceUID) == EnhancedCTImageStorage
    assert set(found.values()) == {CT_IMAGE} and len(found) == 13


# What came before schema 0005


def test_a_series_from_before_has_what_was_kept_of_it(node):
    node.take(*slices())
    node.finish()
    forget(node.engine)
    found = node.known().source
    assert {i.sop_class_uid for i in found.instances} == {CT_IMAGE}
    assert (found.patient_id, found.study_date, found.study_time) == (
        "CANARY-ID", "20260105", "081500",
    )  # fmt: skip
    assert found.issuer_of_patient_id == "" and found.body_part_examined == "CHEST"
    assert {"PatientName", "PatientBirthDate", "AccessionNumber"} <= set(found.unknown)


def test_sent_again_a_series_from_before_is_whole_without_a_new_curve(node):
    node.take(*slices())
    node.finish()
    forget(node.engine)
    node.take(*slices())
    assert node.finish() == 0
    known = node.known()
    assert known.revision == 1 and known.source.unknown == ()
    node.take(*slices(range(12, 14)))  # it reopens: half of its Instances have a known class
    node.finish()
    assert {i.sop_class_uid for i in node.known().source.instances} == {CT_IMAGE}


def test_frames_from_before_are_no_source_until_they_are_sent_again(node):
    one = enhanced_ct(slices())
    node.take(one)
    node.finish()
    forget(node.engine)
    with pytest.raises(ObjectError, match=r"SOP Class .* sent or imported again"):
        node.known()
    node.take(one)
    assert node.finish() == 1
    assert node.known().source.instances[0].sop_class_uid == EnhancedCTImageStorage


# Whose it is


def test_a_series_of_a_merged_patient_is_that_patients(node):
    node.take(*slices())
    node.finish()
    values = {"patient_id": "SURVIVOR", "issuer": "OTHER"}
    with Session(node.engine) as session, session.begin():
        session.execute(update(schema.Series).values(values))
    found = node.known().source
    assert (found.patient_id, found.issuer_of_patient_id) == ("SURVIVOR", "OTHER")
    assert found.accession_number == KEPT["AccessionNumber"]


def test_an_issuer_of_the_settings_is_not_written_as_one_of_the_images(node):
    node.stage.default_issuers = {"": "SETTINGS"}
    node.take(*slices(IssuerOfPatientID=None))
    node.finish()
    with store.reading(node.engine) as session:
        (row,) = store.list_series(session, state=SeriesState.CURVE)
    assert row.patient.issuer == "SETTINGS"
    assert node.known().source.issuer_of_patient_id == ""


def test_a_series_without_a_curve_is_no_source(node):
    node.take(*slices(range(3)))
    with store.reading(node.engine) as session:
        assert store.source_of(session, SERIES) is None
        assert store.source_of(session, "9.9") is None
