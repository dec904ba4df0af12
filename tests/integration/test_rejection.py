"""Rejection notes (IHE IOCM): what an archive takes back is hidden, its curve and offsets with it.

Notes are Key Object Selections made by highdicom, sent over real C-STORE.
"""

import itertools
import json
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pydicom
import pytest
import torch
from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from rich.console import Console
from sqlalchemy import Engine, func, select, text

from db import schema
from dicomnode import dicomio, files, store
from dicomnode.audit import AuditLog
from dicomnode.config import Settings
from dicomnode.core.admission import REJECTIONS
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import StoreUnavailable
from dicomnode.model import (
    Evidence,
    Method,
    PatientKey,
    Reason,
    Rejection,
    ScoreCurve,
    SeriesState,
)
from dicomnode.node.align import AlignStage
from dicomnode.node.assemble import AssembleStage
from dicomnode.node.receive import Receiver
from dicomnode.node.score import Scorer, ScoreStage
from dicomnode.present import series_table
from dicomnode.spool import Spool
from dicomnode.weights import Bundle
from tests.dicom import PATIENT_ID, enhanced_ct, leaks, part10
from tests.e2e.conftest import association, dcmsend, need, run, storescu
from tests.integration.test_stages import brightness_bundle, ct_slice
from tests.integration.test_store import (
    EARLIER,
    LATER,
    MODEL,
    add_curve,
    finish,
    manifest,
    record,
    series_of,
    sop_uid,
)
from tests.integration.test_store import scan as stack

SERIES, PRIOR = "1.2.7", "1.2.8"
LEVELS = range(18)
QUALITY, SAFETY, WORKLIST, EXPIRED = (
    codes.DCM.RejectedForQualityReasons,
    codes.DCM.RejectedForPatientSafetyReasons,
    codes.DCM.IncorrectModalityWorklistEntry,
    codes.DCM.DataRetentionPolicyExpired,
)
TITLES = {title.value: title for title in (QUALITY, SAFETY, WORKLIST, EXPIRED)}
# pynetdicom leaves a socket to the garbage collector when the peer closed it first.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


class Node:
    """A receiver, a database, and the stages between them."""

    def __init__(self, folder: Path, engine: Engine, bundle: Bundle) -> None:
        self.engine = engine
        peers = [
            {"ae_title": title, "host": "127.0.0.1", "port": 104}
            for title in ("PACS", "STORESCU", "DCMSEND")
        ]
        self.settings = Settings(
            node={"port": 0, "peers": peers},
            spool={"path": folder / "spool", "reserve_bytes": 0},
        )
        with store.writing(engine) as session:
            store.record_model(session, bundle.digest, bundle.manifest, datetime.now(UTC))
        self.receiver = Receiver(self.settings)
        self.receiver.start()
        self.audit = AuditLog(folder / "audit.jsonl")
        scorer = Scorer(bundle, torch.device("cpu"), 16)
        self.spool = Spool(self.settings.spool.path)
        self.stage = ScoreStage(self.spool, engine, scorer, threads=2, audit=self.audit)

    def close(self) -> None:
        """Stop."""
        self.receiver.stop()
        self.stage.close()
        self.audit.close()

    def push(self, *datasets: Dataset) -> None:
        """Store Instances over one association, in this order."""
        contexts = {(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID) for ds in datasets}
        offered = [(sop_class_uid, [syntax]) for sop_class_uid, syntax in sorted(contexts)]
        titles = {"calling_ae_title": "PACS", "called_ae_title": "DICOMNODE"}
        with association(self.receiver.port, *offered, **titles) as assoc:
            assert assoc.is_established
            for ds in datasets:
                assert assoc.send_c_store(ds).Status == 0x0000

    def score(self) -> None:
        """Work off the spool, and finish nothing."""
        while self.stage.step().until is not None:
            pass

    def finish(self) -> None:
        """Work off the spool, finish what is complete, and align the pairs that wait."""
        self.score()
        later = datetime.now(UTC) + timedelta(days=1)
        AssembleStage(self.engine, 5.0, 600.0, self.audit).step(later, later)
        while AlignStage(self.engine).step():
            pass

    def send(self, *datasets: Dataset) -> None:
        """Store, and finish what came."""
        self.push(*datasets)
        self.finish()

    def row(self, series_uid: str = SERIES) -> store.SeriesRow:
        with store.reading(self.engine) as session:
            (row,) = store.list_series(session, series_uid=series_uid)
        return row

    def curve(self, series_uid: str = SERIES) -> ScoreCurve | None:
        with store.reading(self.engine) as session:
            return store.curve_of(session, series_uid)

    def levels(self, series_uid: str = SERIES) -> list[int]:
        """Return the levels that the curve of a Series shows, none without."""
        curve = self.curve(series_uid)
        return [] if curve is None else [round(h / 5) for h in curve.height_mm]

    def offsets(self) -> list[store.StoredOffset]:
        with store.reading(self.engine) as session:
            return store.offsets_of(session)

    def counts(self) -> dict[str, int]:
        """Return how many rows there are of what follows from curves."""
        tables = (schema.Curve, schema.Offset, schema.Coverage, schema.Preview, schema.Slice)
        with store.reading(self.engine) as session:
            return {
                t.__tablename__: session.scalar(select(func.count()).select_from(t)) or 0
                for t in tables
            }

    def audited(self, event: str = "instances rejected") -> list[dict]:
        assert self.audit.path is not None
        if not self.audit.path.exists():
            return []
        lines = self.audit.path.read_text()
        assert leaks(lines) == set()
        return [line for line in map(json.loads, lines.splitlines()) if line["event"] == event]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return brightness_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def node(tmp_path, engine, bundle) -> Iterator[Node]:
    node = Node(tmp_path, engine, bundle)
    yield node
    node.close()


def scan(series_uid: str = SERIES, levels: range = LEVELS) -> list[Dataset]:
    date = "20260105" if series_uid == SERIES else "20250105"
    told = {"StudyDate": date, "PatientSex": "O", "StudyID": "1"}
    return [ct_slice(series_uid, level, **told) for level in levels]


def note(title, *slices: Dataset, syntax: str = ExplicitVRLittleEndian, **changes) -> Dataset:
    """Return a Key Object Selection of these Instances, of one Study, under a title."""
    ds = KeyObjectSelectionDocument(
        evidence=list(slices),
        content=KeyObjectSelection(document_title=title, referenced_objects=list(slices)),
        series_instance_uid=generate_uid(None),
        series_number=99,
        sop_instance_uid=generate_uid(None),
        instance_number=1,
        manufacturer="made",
        transfer_syntax_uid=syntax,
    )
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    return ds


def rejected(row: store.SeriesRow) -> int:
    return row.set_aside.get(Reason.REJECTED, 0)


# What a note does


def test_what_a_note_names_is_taken_out_of_its_curve(node):
    slices = scan()
    node.send(*scan(PRIOR), *slices)
    assert (node.row().revision, len(node.offsets())) == (1, len(Method))
    node.send(note(QUALITY, *slices[:3]))
    row = node.row()
    assert node.levels() == list(LEVELS)[3:]
    assert (row.state, row.revision, row.received) == (SeriesState.CURVE, 2, 18)
    assert (row.scored, row.set_aside) == (15, {Reason.REJECTED: 3})
    assert row.quality is not None and row.quality.flags == ()
    # The prior was not touched; both curves, their pair and their inputs are of what is left.
    assert node.row(PRIOR).revision == 1
    assert node.counts() == {"curve": 2, "offset": 3, "coverage": 2, "preview": 2, "slice": 0}
    found = {s.offset.method: s.offset for s in node.offsets()}
    assert found[Method.L1].offset_mm == pytest.approx(0.0, abs=0.01)
    assert found[Method.L1].overlap_mm == pytest.approx(70.0, abs=0.01)
    with store.reading(node.engine) as session:
        counts = session.scalars(select(schema.Preview.count)).all()
        assert store.count_rejected(session) == {"113001": 3}
        assert store.rejected_of(session, [ds.SOPInstanceUID for ds in slices]) == {
            ds.SOPInstanceUID for ds in slices[:3]
        }
    assert sorted(counts) == [15, 18]


def test_curve_and_offsets_go_with_the_note_before_the_series_is_finished_anew(node):
    node.send(*scan(PRIOR), *scan())
    node.push(note(SAFETY, *scan()[:3]))
    node.score()
    assert node.row().state is SeriesState.OPEN
    assert node.curve() is None and node.offsets() == []
    with store.reading(node.engine) as session:
        opened = store.open_slices(session, SERIES)
        assert opened is not None and len(opened.slices) == 15
        hidden = schema.Slice.reason == Reason.REJECTED
        previews = session.scalars(select(schema.Slice.preview).where(hidden))
        assert list(previews) == [None] * 3


@on_sqlite
def test_a_series_of_which_nothing_is_left_is_ignored(node):
    slices = scan()
    node.send(*scan(PRIOR), *slices)
    node.send(note(WORKLIST, *slices))
    row = node.row()
    assert (row.state, row.reason) == (SeriesState.IGNORED, Reason.REJECTED)
    assert (row.set_aside, row.scored) == ({Reason.REJECTED: 18}, 0)
    assert node.counts() == {"curve": 1, "offset": 0, "coverage": 1, "preview": 1, "slice": 0}
    shown = Console(width=200, record=True, file=StringIO())
    shown.print(series_table([row]))
    told = shown.export_text()
    assert "ignored:rejected" in told and "rejected 18" in told


@on_sqlite
def test_too_few_slices_left_make_no_curve(node):
    node.send(*scan())
    node.send(note(QUALITY, *scan()[9:]))
    row = node.row()
    assert (row.state, row.reason) == (SeriesState.IGNORED, Reason.TOO_SHORT)
    assert node.curve() is None


@on_sqlite
def test_the_audit_log_tells_of_each_note(node):
    slices = scan()
    node.send(*slices)
    ko = note(QUALITY, *slices[:3])
    node.send(ko)
    (line,) = node.audited()
    assert line | {"time": 0, "pid": 0, "association_id": 0} == {
        "time": 0, "pid": 0, "association_id": 0, "event": "instances rejected", "code": "110103",
        "action": "D", "outcome": 0, "note": ko.SOPInstanceUID, "title": "113001", "instances": 3,
        "hidden": 3, "series": [SERIES], "study_uids": [f"{SERIES}.0"],
    }  # fmt: skip
    received = node.audited("series received")
    assert line["association_id"] in received[-1]["associations"]


@on_sqlite
def test_the_note_itself_is_a_series_that_is_no_ct(node):
    ko = note(QUALITY, *scan())
    node.send(ko)
    row = node.row(ko.SeriesInstanceUID)
    assert (row.state, row.reason, row.modality) == (SeriesState.IGNORED, Reason.NOT_CT, "KO")


@on_sqlite
@pytest.mark.parametrize("title", [codes.DCM.OfInterest, codes.DCM.ForTeaching])
def test_key_objects_of_another_title_hide_nothing(node, title):
    slices = scan()
    node.send(*slices)
    node.send(note(title, *slices[:3]))
    assert (node.row().revision, node.levels()) == (1, list(LEVELS))
    assert node.audited() == []


@on_sqlite
def test_a_title_of_another_scheme_hides_nothing(node):
    slices = scan()
    ko = note(QUALITY, *slices)
    ko.ConceptNameCodeSequence[0].CodingSchemeDesignator = "99DCM"
    node.send(*slices, ko)
    assert node.levels() == list(LEVELS)


@on_sqlite
def test_every_frame_of_a_rejected_instance_is_hidden(node):
    many = enhanced_ct(scan(levels=range(7)))
    more = enhanced_ct(scan(levels=range(7, 21)))
    for ds in (many, more):
        ds.PatientBirthDate, ds.PatientSex, ds.StudyID, ds.AccessionNumber = "", "O", "1", ""
    node.send(many, more)
    assert node.levels() == list(range(21))
    node.send(note(QUALITY, many))
    assert node.levels() == list(range(7, 21))
    assert node.row().set_aside == {Reason.REJECTED: 7}


@on_sqlite
def test_a_copy_that_was_set_aside_takes_the_place_of_what_was_rejected(node):
    first, second = scan(), scan()
    for ds in second:
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ds.SOPInstanceUID}.2"
    node.send(*first, *second)
    assert node.row().set_aside == {Reason.DUPLICATE_POSITION: 18}
    node.send(note(QUALITY, *first))
    curve, row = node.curve(), node.row()
    assert curve is not None
    assert set(curve.sop_instance_uids) == {ds.SOPInstanceUID for ds in second}
    assert row.set_aside == {Reason.REJECTED: 18}
    node.send(note(QUALITY, *second))
    assert node.row().reason is Reason.REJECTED
    assert node.counts()["slice"] == 0


# What a note names


def uids_named(ko: Dataset) -> set[str]:
    (decoded,) = dicomio.decode(part10(ko), PreprocessSpec())
    assert decoded.rejection is not None
    return set(decoded.rejection.instances)


@on_sqlite
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_instances_are_named_by_evidence_or_by_content(node, syntax):
    slices = scan()
    both = note(QUALITY, *slices[:1], syntax=syntax)
    evidence = note(QUALITY, *slices[1:2], syntax=syntax)
    del evidence.ContentSequence
    content = note(QUALITY, *slices[2:3], syntax=syntax)
    del content.CurrentRequestedProcedureEvidenceSequence
    nested = note(QUALITY, *slices[3:5], syntax=syntax)
    del nested.CurrentRequestedProcedureEvidenceSequence
    # One image by a content item within another, which within a container.
    items = nested.ContentSequence
    images = [item for item in items if item.ValueType == "IMAGE"]
    container = Dataset()
    container.RelationshipType, container.ValueType = "CONTAINS", "CONTAINER"
    container.ContinuityOfContent = "SEPARATE"
    images[0].ContentSequence = [images[1]]
    container.ContentSequence = [images[0]]
    nested.ContentSequence = [container]
    node.send(*slices, both, evidence, content, nested)
    assert node.levels() == list(LEVELS)[5:]
    assert rejected(node.row()) == 5


def test_a_note_may_name_instances_of_several_studies(node):
    ko = note(QUALITY, *scan()[:3])
    other = note(QUALITY, *scan(PRIOR)[:4])
    ko.CurrentRequestedProcedureEvidenceSequence += other.CurrentRequestedProcedureEvidenceSequence
    ko.ContentSequence += other.ContentSequence
    assert len(uids_named(ko)) == 7
    node.send(*scan(), *scan(PRIOR))
    node.send(ko)
    assert (node.levels(), node.levels(PRIOR)) == (list(LEVELS)[3:], list(LEVELS)[4:])
    assert node.row().revision == node.row(PRIOR).revision == 2
    assert len(node.offsets()) == len(Method)


@on_sqlite
def test_an_instance_is_found_in_whichever_series_of_the_study_it_is(node):
    """The archive has moved it to another Series since it was sent here."""
    slices = scan()
    moved = [pydicom.dcmread(pydicom.filebase.DicomBytesIO(part10(ds))) for ds in slices]
    for ds in moved:
        ds.SeriesInstanceUID = "1.2.99"
    node.send(*slices)
    node.send(note(WORKLIST, *moved))
    assert node.row().reason is Reason.REJECTED


@on_sqlite
def test_what_is_no_uid_is_not_remembered(node):
    ko = note(QUALITY, *scan()[:2])
    (study,) = ko.CurrentRequestedProcedureEvidenceSequence
    for reference in study.ReferencedSeriesSequence[0].ReferencedSOPSequence:
        reference.ReferencedSOPInstanceUID = ""
    del ko.ContentSequence
    node.send(ko)
    assert node.audited()[0]["instances"] == 0
    with store.reading(node.engine) as session:
        assert store.count_rejected(session) == {}


def deep(levels: int) -> Dataset:
    ko = note(QUALITY, *scan()[:1])
    item = ko.ContentSequence[0]
    for _ in range(levels):
        inner = Dataset()
        inner.ContentSequence = [item]
        item = inner
    ko.ContentSequence = [item]
    return ko


@on_sqlite
def test_a_note_that_cannot_be_read_is_kept_for_a_person_to_look_at(node, monkeypatch):
    large = note(QUALITY, *scan()[:1])
    large.ContentSequence[0].TextValue = "x" * 5000
    monkeypatch.setattr(dicomio.rejection, "MAX_BYTES", 5000)
    small = deep(40)
    assert len(part10(small)) < 5000
    node.send(large, small)
    with store.reading(node.engine) as session:
        assert store.count_quarantined(session) == {Reason.CORRUPT: 2}
        assert store.count_rejected(session) == {}
    for ds in (large, small):
        assert node.row(ds.SeriesInstanceUID).reason is Reason.CORRUPT


# In whatever order


@on_sqlite
@pytest.mark.parametrize("code", REJECTIONS)
def test_a_note_before_its_images_hides_them_when_they_come(node, code):
    """But for data whose time was over: what comes after that note is new."""
    slices = scan()
    node.send(note(TITLES[code], *slices[:3]))
    node.send(*slices)
    hidden = 0 if code == "113039" else 3
    assert node.levels() == list(LEVELS)[hidden:]
    assert rejected(node.row()) == hidden
    assert node.row().revision == 1


@on_sqlite
@pytest.mark.parametrize("code", REJECTIONS)
def test_what_was_rejected_stays_so_when_it_is_sent_again_unless_it_had_expired(node, code):
    slices = scan()
    ko = note(TITLES[code], *slices[:3])
    node.send(*slices)
    node.send(ko)
    node.send(*slices)
    if code == "113039":
        assert (node.levels(), node.row().revision) == (list(LEVELS), 3)
        node.send(ko)  # the same note again says nothing new
        assert (node.levels(), node.row().revision) == (list(LEVELS), 3)
        node.send(note(EXPIRED, *slices[:3]))  # another one does
        assert (node.levels(), node.row().revision) == (list(LEVELS)[3:], 4)
    else:
        assert (node.levels(), node.row().revision) == (list(LEVELS)[3:], 2)


@on_sqlite
def test_of_two_notes_the_stricter_one_stays_in_force(node):
    slices = scan()
    node.send(*slices)
    node.send(note(EXPIRED, *slices), note(SAFETY, *slices[:3]))
    node.send(*slices)
    assert node.levels() == list(LEVELS)[3:]


@on_sqlite
def test_a_late_slice_does_not_bring_back_what_was_rejected(node):
    slices = scan()
    node.send(*slices[:-1])
    node.send(note(QUALITY, *slices[:3]))
    node.send(slices[-1])
    row = node.row()
    assert (node.levels(), row.revision, rejected(row)) == (list(LEVELS)[3:], 3, 3)


@on_sqlite
def test_a_slice_that_was_set_aside_may_be_rejected_as_well(node):
    slices = scan()
    slices[0].ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    node.send(*slices)
    assert node.row().set_aside == {Reason.LOCALIZER: 1}
    node.send(note(QUALITY, *slices))
    row = node.row()
    assert (row.reason, row.set_aside) == (Reason.REJECTED, {Reason.REJECTED: 18})


@on_sqlite
@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_images_and_notes_makes_no_difference(node, seed):
    """Some at once, some after a Series was finished, some twice."""
    rng = random.Random(seed)
    slices = scan(levels=range(18))
    things = [*slices, note(QUALITY, *slices[:3]), note(SAFETY, *slices[2:5]),
              note(WORKLIST, slices[9]), *rng.sample(slices, 6)]  # fmt: skip
    rng.shuffle(things)
    cuts = sorted(rng.sample(range(1, len(things)), 3))
    for start, end in itertools.pairwise([0, *cuts, len(things)]):
        node.send(*things[start:end])
    assert node.levels() == [k for k in range(5, 18) if k != 9]
    row = node.row()
    assert (rejected(row), row.received) == (6, 18)


@on_sqlite
def test_a_note_that_is_worked_off_twice_changes_nothing(node):
    """As after a crash between the commit and the spool."""
    slices = scan()
    node.send(*slices)
    ko = note(QUALITY, *slices[:3])
    node.send(ko)
    node.send(ko)
    assert (node.levels(), node.row().revision) == (list(LEVELS)[3:], 2)
    assert [line["hidden"] for line in node.audited()] == [3, 0]


@on_sqlite
def test_images_that_arrived_before_an_expiry_but_are_read_after_it_are_hidden(node):
    """Two receivers: what one of them took first may be worked off last."""
    slices = scan()
    before = datetime.now(UTC) - timedelta(minutes=1)
    (decoded,) = dicomio.decode(part10(slices[0]), PreprocessSpec())
    with store.writing(node.engine) as session:
        rejection = Rejection(
            "1.9", f"{SERIES}.0", "113039", frozenset({slices[0].SOPInstanceUID}),
            frozenset(), frozenset(),
        )  # fmt: skip
        store.record_rejection(session, rejection, "0" * 16, datetime.now(UTC))
        result = store.SliceResult(decoded.header, "1" * 16, before, score=1.0)
        store.record_slices(session, node.stage.scorer.bundle.digest, [result])
        opened = store.claim_series(session, 1)
    assert opened is not None and opened.slices == ()
    assert list(opened.set_aside.values()) == [Reason.REJECTED]


# Two workers


@on_postgres
@pytest.mark.parametrize("first", ["slices", "note"])
def test_a_slice_and_its_note_in_two_workers_at_once_do_not_miss_each_other(node, first):
    """The Series is new: neither of them can see what the other has not committed yet."""
    slices = scan()
    rejection = Rejection(
        "1.9", f"{SERIES}.0", "113001", frozenset({slices[0].SOPInstanceUID}),
        frozenset({f"{SERIES}.0"}), frozenset({SERIES}),
    )  # fmt: skip
    decoded = [dicomio.decode(part10(ds), PreprocessSpec())[0] for ds in slices]
    now = datetime.now(UTC)
    results = [store.SliceResult(d.header, "1" * 16, now, score=1.0) for d in decoded]
    digest = node.stage.scorer.bundle.digest

    def record(session, what: str) -> None:
        if what == "note":
            store.record_rejection(session, rejection, "2" * 16, now)
        else:
            store.record_slices(session, digest, results)

    def beside() -> None:
        with store.writing(node.engine) as session:
            record(session, "note" if first == "slices" else "slices")

    other = threading.Thread(target=beside)
    with store.writing(node.engine) as session:
        record(session, first)
        other.start()
        wait_for_one_that_waits(node.engine)
    other.join(30)
    assert not other.is_alive()
    with store.reading(node.engine) as session:
        opened = store.open_slices(session, SERIES)
    assert opened is not None
    assert len(opened.slices) == 17
    assert list(opened.set_aside.items()) == [((slices[0].SOPInstanceUID, 1), Reason.REJECTED)]


@on_postgres
def test_a_note_and_a_correction_of_one_batch_beside_a_series_that_is_finished(engine):
    """The batch has the rows of the note before it wants to be alone with who is one patient."""
    with store.writing(engine) as session:
        store.record_model(session, MODEL, manifest(), datetime.now(UTC))
    add_curve(engine, "1.3.1", study_datetime=EARLIER)
    add_curve(engine, "1.5.1", patient=PatientKey("Y", "HOSPITAL"))
    record(engine, stack("1.4.1", study_datetime=LATER))
    rejection = Rejection(
        "1.9", "1.3.1.0", "113001", frozenset({sop_uid("1.3.1", 0)}),
        frozenset({"1.3.1.0"}), frozenset({"1.3.1"}),
    )  # fmt: skip
    failed: list[Exception] = []

    def beside() -> None:
        try:
            finish(engine, "1.4.1")
        except StoreUnavailable as exc:
            failed.append(exc)

    other = threading.Thread(target=beside)
    with store.writing(engine) as session:
        store.record_rejection(session, rejection, "2" * 16, datetime.now(UTC))
        other.start()
        wait_for_one_that_waits(engine)
        store.record_slices(session, MODEL, stack("1.5.1", patient=PatientKey("Z", "HOSPITAL")))
    other.join(30)
    assert not other.is_alive()
    assert not failed
    assert series_of(engine, "1.5.1").patient.patient_id == "Z"


def wait_for_one_that_waits(engine: Engine) -> None:
    """Return once a transaction waits for a lock."""
    waits = text("select count(*) from pg_locks where not granted")
    deadline = time.monotonic() + 30
    with engine.connect() as connection:
        while not connection.scalar(waits):
            assert time.monotonic() < deadline, "it does not wait"
            connection.rollback()


# Who may send


@on_sqlite
def test_a_stranger_cannot_reject_anything(node):
    ko = note(QUALITY, *scan())
    offered = (ko.SOPClassUID, [ExplicitVRLittleEndian])
    titles = {"calling_ae_title": "STRANGER", "called_ae_title": "DICOMNODE"}
    with association(node.receiver.port, offered, **titles) as assoc:
        assert not assoc.is_established


@on_sqlite
@pytest.mark.parametrize("program", ["storescu", "dcmsend"])
def test_notes_of_other_senders_count_as_well(node, tmp_path, program):
    need(program)
    slices = scan()
    folder = tmp_path / "ct"
    folder.mkdir()
    for k, ds in enumerate([*slices, note(QUALITY, *slices[:3], syntax=ImplicitVRLittleEndian)]):
        (folder / f"{k:02}.dcm").write_bytes(part10(ds))
    command = {"storescu": storescu, "dcmsend": dcmsend}[program]
    run(command(node.receiver.port, folder))
    node.finish()
    assert node.levels() == list(LEVELS)[3:]
    assert node.row().evidence is Evidence.RELEASED_AND_QUIET


# Files


def test_notes_among_files_count_as_well(bundle, tmp_path):
    slices = scan()
    for k, ds in enumerate([note(QUALITY, *slices[:3]), *slices]):
        (tmp_path / f"{k:02}").write_bytes(part10(ds))
    found = files.score([tmp_path], Scorer(bundle, torch.device("cpu"), 16)).series
    (ct,) = (s for s in found if s.header.modality == "CT")
    assert isinstance(ct.outcome, ScoreCurve)
    assert [round(h / 5) for h in ct.outcome.height_mm] == list(LEVELS)[3:]
    assert ct.set_aside == {Reason.REJECTED: 3}
    assert ct.outcome.quality.flags == ()


# The notes are sound themselves


@pytest.mark.parametrize("code", REJECTIONS)
def test_a_note_of_these_tests_is_a_valid_object(tmp_path, code):
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed: .ci/run installs it")
    file = tmp_path / "note.dcm"
    slices = scan()
    for ds in slices:  # canaries are no dates and codes
        ds.PatientName, ds.PatientBirthDate, ds.ReferringPhysicianName = "A^B", "", ""
        ds.AccessionNumber = ""
    file.write_bytes(part10(note(TITLES[code], *slices)))
    done = subprocess.run(["dciodvfy", file], capture_output=True, text=True, timeout=60)
    told = (done.stdout + done.stderr).splitlines()
    assert any("KeyObjectSelectionDocument" in line for line in told), told
    assert [line for line in told if line.startswith("Error")] == []
    assert pydicom.dcmread(file).PatientID == PATIENT_ID
    meaning = pydicom.dcmread(file).ConceptNameCodeSequence[0]
    assert (meaning.CodeValue, meaning.CodeMeaning) == (code, REJECTIONS[code])
