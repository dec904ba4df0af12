"""The whole circle with an Orthanc: what it forwards, what it is asked for, and what it gets back.

One Orthanc, with its DICOMweb plugin, and one node for all of it; each test has a patient of its
own. DICOMNODE_TEST_DOWN_SECONDS=300 keeps the node down for five minutes in earnest.
"""

import copy
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from highdicom import ko
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from dicomnode import store
from dicomnode.model import (
    Commitment,
    DeliveryKind,
    DeliveryState,
    FetchCause,
    FetchState,
    Method,
    SeriesState,
)
from tests import iod
from tests.e2e import pacs
from tests.e2e.conftest import (
    Node,
    Scan,
    dcmsend,
    eventually,
    free_port,
    need,
    network_namespace,
    run,
    running_node,
    save,
    scan,
    skip,
)
from tests.integration.test_objects import dcentvfy, dciodvfy

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

TOLERANCE_MM = 10.0
DOWN_S = float(os.environ.get("DICOMNODE_TEST_DOWN_SECONDS", 0))
AI = "LIVERAI"
REGISTRATION, REPORT = "REG", "SR"
# PS3.6 tags, as DICOM JSON writes them.
PATIENT_ID, STUDY_UID, SERIES_UID = "00100020", "0020000D", "0020000E"
SOP_INSTANCE_UID = "00080018"

SETTINGS = f"""\
[deliver]
registration = ["{pacs.AE_TITLE}"]
report = ["{pacs.AE_TITLE}"]
settle_seconds = 1
recent_days = 0
[priors]
recent_days = 0  # phantoms were scanned long ago
years = 100
settle_seconds = 2
per_minute = 6000
catch_up_minutes = 0.05
catch_up = ["{pacs.AE_TITLE}"]
"""
BY_MOVE = f'peers = ["{pacs.AE_TITLE}", "{pacs.DCMQRSCP}"]\n'
BY_WEB = f'dicomweb = [{{ name = "web", url = "{pacs.DICOMWEB}" }}]\n'
RULE = f"""\
[[rule]]
name = "chest to AI"
when = "covers(chest, 0.5) and slices >= 40"
send_to = "{AI}"
region = "chest"
"""


@dataclass
class Hospital:
    """A PACS, a node, and an AE that analyses what it is sent."""

    pacs: pacs.Orthanc
    node: Node
    ai: pacs.Destination
    archive_port: int  # of a dcmqrscp

    def series(self, study_uid: str, modality: str) -> list[dict[str, Any]]:
        """Return what QIDO-RS finds of one modality in a Study."""
        return self.pacs.qido(f"studies/{study_uid}/series", Modality=modality)

    def one(self, study_uid: str, modality: str) -> Dataset:
        """Return the one object of a modality that a Study has, once it has one."""
        found = eventually(
            lambda: self.series(study_uid, modality), f"{modality} in Study {study_uid}"
        )
        (series_uid,) = (series[SERIES_UID]["Value"][0] for series in found)
        (instance,) = self.pacs.qido(f"studies/{study_uid}/series/{series_uid}/instances")
        return self.pacs.wado(study_uid, series_uid, instance[SOP_INSTANCE_UID]["Value"][0])

    def delivered(self, subject: str, kind: DeliveryKind) -> list[store.Delivery]:
        """Return how deliveries about a Study or Series stand, in the node's own words."""
        with store.reading(self.node.engine) as session:
            return [
                d for d in store.list_deliveries(session, subject=subject) if d.what.kind is kind
            ]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    need("Orthanc", "dcmsend", "unshare", "nsenter", "ip")
    if not Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so").exists():
        skip("not installed: orthanc-dicomweb")
    folder = tmp_path_factory.mktemp("circle")
    with ExitStack() as stack:
        try:
            prefix = stack.enter_context(network_namespace())
        except RuntimeError as exc:
            skip(f"no network namespace: {exc}")
        ai_port, archive_port, node_port = free_port(), free_port(), free_port()
        ai = stack.enter_context(pacs.destination(folder / "ai", prefix, AI, ai_port))
        # First the PACS: a peer that was not there is asked again after a pause only.
        others = {AI: ai_port}
        orthanc = pacs.orthanc(folder / "orthanc", prefix, node_port=node_port, others=others)
        served = stack.enter_context(orthanc)
        archive = folder / "archive"
        stack.enter_context(pacs.dcmqrscp(archive, prefix, port=archive_port, node_port=node_port))
        peers = {pacs.AE_TITLE: pacs.DICOM_PORT, pacs.DCMQRSCP: archive_port, AI: ai_port}
        node = running_node(
            folder / "node",
            port=node_port,
            prefix=prefix,
            peers=peers,
            more_settings=SETTINGS + BY_MOVE + RULE,
        )
        yield Hospital(served, stack.enter_context(node), ai, archive_port)


def timepoints(seed: int, **options: Any) -> tuple[Scan, Scan]:
    """Return a prior and a follow-up of a phantom, 150 mm apart."""
    prior = scan(seed, matrix=256, table_mm=-60.0, when=datetime(2023, 3, 4, 9, 30), **options)
    current = scan(seed, matrix=256, table_mm=90.0, when=datetime(2024, 5, 2, 14, 5), **options)
    return prior, current


TRUTH_MM = 150.0


def offset_of(node: Node, fixed: Scan, moving: Scan) -> float | None:
    """Return the stored offset of a pair, None where none is stored."""
    with store.reading(node.engine) as session:
        found = store.offsets_of(
            session, fixed_study=fixed.study_uid, moving_study=moving.study_uid
        )
    return found[0].offset.offset_mm if found else None


def complete(hospital: Hospital, *scans: Scan) -> None:
    """Wait until the node has the curve of each Series, of all its Instances."""
    for made in scans:
        row = hospital.node.finished(made.series_uid, len(made.slices))
        assert row.state is SeriesState.CURVE
        assert hospital.node.curve_uids(made.series_uid) == made.uids


def assert_registers(ds: Dataset, fixed: Scan, moving: Scan) -> None:
    """PS3.3 C.20.2.1.1: points of the prior, taken to the follow-up."""
    for before, after in zip(moving.slices, fixed.slices, strict=True):
        point = np.array(before.ImagePositionPatient, float)
        found = iod.registered(ds, before.SOPInstanceUID, point)
        assert abs(found[2] - float(after.ImagePositionPatient[2])) <= TOLERANCE_MM
        own = np.array(after.ImagePositionPatient, float)
        np.testing.assert_array_equal(iod.registered(ds, after.SOPInstanceUID, own), own)


# The circle


def test_a_study_is_forwarded_its_prior_pulled_and_results_are_in_the_pacs(hospital, tmp_path):
    prior, current = timepoints(9201)
    hospital.pacs.send(prior.slices, pacs.ARCHIVE)
    hospital.pacs.send(current.slices)
    complete(hospital, current, prior)
    assert_moved(hospital, prior)

    registration = hospital.one(current.study_uid, REGISTRATION)
    assert_registers(registration, current, prior)
    answer = hospital.node.json("offset", current.study_uid, prior.study_uid)
    assert abs(answer["offset_mm"] - TRUTH_MM) <= TOLERANCE_MM
    moved = iod.registered(registration, prior.slices[0].SOPInstanceUID, (0.0, 0.0, 0.0))
    assert moved[2] == pytest.approx(answer["offset_mm"], abs=1e-3)
    reports = {made.study_uid: hospital.one(made.study_uid, REPORT) for made in (current, prior)}
    for made in (current, prior):
        assert iod.referenced(reports[made.study_uid]) <= made.uids
    assert hospital.series(prior.study_uid, REGISTRATION) == []

    # The PACS holds them under the patient and Study of the images, and has committed itself.
    for ds in (registration, *reports.values()):
        (study,) = hospital.pacs.qido("studies", StudyInstanceUID=ds.StudyInstanceUID)
        assert study[PATIENT_ID]["Value"] == [current.slices[0].PatientID] == [ds.PatientID]
        assert ds.PatientName == current.slices[0].PatientName
    (delivery,) = eventually(
        lambda: [
            d
            for d in hospital.delivered(current.study_uid, DeliveryKind.REGISTRATION)
            if d.commitment == Commitment.COMMITTED
        ],
        "the registration committed",
    )
    assert (delivery.state, delivery.what.destination) == (DeliveryState.DONE, pacs.AE_TITLE)
    assert delivery.sop_instance_uid == registration.SOPInstanceUID
    for made in (current, prior):
        (delivery,) = hospital.delivered(made.series_uid, DeliveryKind.REPORT)
        assert delivery.state is DeliveryState.DONE

    # A second opinion: DCMTK finds it, and dicom3tools sees one patient and two Studies.
    found = run(
        [
            *hospital.pacs.prefix, "/usr/bin/findscu", "-S", "-aec", pacs.AE_TITLE, "-aet", AI,
            "127.0.0.1", str(pacs.DICOM_PORT), "-k", "QueryRetrieveLevel=SERIES",
            "-k", f"StudyInstanceUID={current.study_uid}", "-k", "Modality=REG",
            "-k", "SeriesInstanceUID",
        ]
    )  # fmt: skip
    assert registration.SeriesInstanceUID in found.stdout + found.stderr
    files = [*save(current.slices, tmp_path / "current").iterdir()]
    files += save(prior.slices, tmp_path / "prior").iterdir()
    objects = list(save([registration, *reports.values()], tmp_path / "objects").iterdir())
    for file in objects:
        assert dciodvfy(file) == []
    assert dcentvfy([*files, *objects]) == []


def fetched(hospital: Hospital, made: Scan) -> store.Fetch:
    """Return how the node asked for a Series, all of which came at once."""

    def done() -> store.Fetch | None:
        with store.reading(hospital.node.engine) as session:
            for fetch in store.list_fetches(session):
                if fetch.what.series_uid == made.series_uid and fetch.state is FetchState.DONE:
                    return fetch
        return None

    fetch = eventually(done, "fetched")
    assert (fetch.what.cause, fetch.attempts) == (FetchCause.PRIOR, 1)
    assert fetch.completed == len(made.slices)
    return fetch


def assert_moved(hospital: Hospital, made: Scan) -> None:
    """Check that a Series came because the node asked Orthanc for it."""
    assert fetched(hospital, made).what.peer == pacs.AE_TITLE
    # Nothing else could have brought it: Orthanc forwards what the scanner sends, and no more.
    stored = hospital.pacs.jobs("DicomModalityStore")
    mine = {s["ID"] for s in hospital.pacs.find("Series", SeriesInstanceUID=made.series_uid)}
    assert not [j for j in stored if mine & set(j["Content"].get("ParentResources", ()))]


def test_a_prior_is_pulled_from_another_make_of_archive(hospital, tmp_path):
    prior, current = timepoints(9206)
    folder = save(prior.slices, tmp_path / "prior")
    titles = ["-aet", pacs.ARCHIVE, "-aec", pacs.DCMQRSCP]
    run([*hospital.pacs.prefix, *dcmsend(hospital.archive_port, folder, options=titles)])
    hospital.pacs.send(current.slices)
    complete(hospital, current, prior)
    assert fetched(hospital, prior).what.peer == pacs.DCMQRSCP
    assert_registers(hospital.one(current.study_uid, REGISTRATION), current, prior)


def test_a_region_is_sent_on_to_where_a_rule_says_and_only_what_meets_it(hospital):
    # Below the least number of slices that the rule asks for, and above.
    few, many = (scan(9202, matrix=256, spacing_mm=mm) for mm in (8.0, 5.0))
    assert len(few.slices) < 40 <= len(many.slices)
    for made in (few, many):
        hospital.pacs.send(made.slices)
    complete(hospital, few, many)
    (delivery,) = eventually(
        lambda: [
            d
            for d in hospital.delivered(many.series_uid, DeliveryKind.FORWARD)
            if d.state is DeliveryState.DONE
        ],
        "forwarded",
    )
    assert (delivery.what.destination, delivery.what.rule) == (AI, "chest to AI")
    sent = {str(ds.SOPInstanceUID): ds for ds in hospital.ai.received()}
    ours = {uid: ds for uid, ds in sent.items() if ds.SeriesInstanceUID == many.series_uid}
    by_uid = {str(ds.SOPInstanceUID): ds for ds in many.slices}
    z_mm = sorted(float(by_uid[uid].ImagePositionPatient[2]) for uid in ours)
    # One stretch of slices, as they were sent to the node.
    assert len(z_mm) >= 20
    np.testing.assert_allclose(np.diff(z_mm), 5.0)
    for uid, ds in ours.items():
        assert ds.PixelData == by_uid[uid].PixelData
        assert (ds.PatientID, ds.PatientName) == (by_uid[uid].PatientID, by_uid[uid].PatientName)
    assert few.series_uid not in {ds.SeriesInstanceUID for ds in sent.values()}
    assert hospital.delivered(few.series_uid, DeliveryKind.FORWARD) == []


def test_two_ids_are_one_patient_after_a_merge_and_two_after_its_end(hospital):
    prior, current = timepoints(9203)
    for made, patient_id in ((prior, "CANARY-ID-A"), (current, "CANARY-ID-B")):
        for ds in made.slices:
            ds.PatientID = patient_id
        hospital.pacs.send(made.slices)
    complete(hospital, prior, current)
    hospital.node.idle()
    assert offset_of(hospital.node, current, prior) is None
    assert hospital.series(current.study_uid, REGISTRATION) == []

    merged = hospital.node.json("patient", "merge", "CANARY-ID-A", "CANARY-ID-B")
    found = eventually(lambda: offset_of(hospital.node, current, prior), "an offset of the pair")
    assert abs(found - TRUTH_MM) <= TOLERANCE_MM
    registration = hospital.one(current.study_uid, REGISTRATION)
    assert_registers(registration, current, prior)
    assert registration.PatientID == "CANARY-ID-B"

    result = hospital.node.cli("patient", "unmerge", merged["id"])
    assert result.returncode == 0, result.stderr
    eventually(lambda: offset_of(hospital.node, current, prior) is None, "no offset any more")
    (line,) = hospital.node.audited("patients linked")
    assert line["outcome"] == 0


def test_a_rejection_note_hides_a_series_and_its_offsets(hospital):
    prior, current = timepoints(9204)
    for made in (prior, current):  # one by one: what is here is not asked for as a prior
        hospital.pacs.send(made.slices)
        complete(hospital, made)
    eventually(lambda: offset_of(hospital.node, current, prior), "an offset of the pair")
    registration = hospital.one(current.study_uid, REGISTRATION)
    assert_registers(registration, current, prior)

    hospital.pacs.send([rejection_note(prior)])
    eventually(lambda: offset_of(hospital.node, current, prior) is None, "no offset any more")
    assert hospital.node.curve_uids(prior.series_uid) == set()
    listed = hospital.node.cli("series", "--study", prior.study_uid, "--state", "curve")
    assert prior.series_uid not in listed.stdout
    # What is left of the patient is as it was.
    assert hospital.node.curve_uids(current.series_uid) == current.uids
    # The archive still has what it rejected: it is not fetched, again and again, when asked for.
    later = scan(9204, matrix=256, table_mm=20.0, when=datetime(2025, 6, 1))
    hospital.pacs.send(later.slices)
    complete(hospital, later)
    answered(hospital, later)
    assert offset_of(hospital.node, later, current) is not None
    assert offset_of(hospital.node, later, prior) is None
    with store.reading(hospital.node.engine) as session:
        asked = [f.what.series_uid for f in store.list_fetches(session)]
    assert prior.series_uid not in asked


def answered(hospital: Hospital, made: Scan) -> None:
    """Wait until each archive has answered for the priors of a Study, and nothing is on its way."""

    def done() -> bool:
        with store.reading(hospital.node.engine) as session:
            asked = [i for i in store.list_inquiries(session) if i.subject == made.study_uid]
            states = [i.state for i in asked] + [f.state for f in store.list_fetches(session)]
        return len(asked) == 2 and FetchState.WAITING not in states

    eventually(done, "both archives answered")
    hospital.node.idle()


def rejection_note(of: Scan) -> Dataset:
    """Return a note that takes a Series back, as IHE RAD TF-3 4.66.4.1.3.1.2 has it."""
    slices = [copy.deepcopy(ds) for ds in of.slices]
    for ds in slices:
        for keyword in ("PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"):
            if keyword not in ds:
                setattr(ds, keyword, "")
    content = ko.KeyObjectSelection(
        document_title=codes.DCM.RejectedForQualityReasons, referenced_objects=slices
    )
    return ko.KeyObjectSelectionDocument(
        evidence=slices,
        content=content,
        series_instance_uid=generate_uid(),
        series_number=700,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="made",
    )


# What the node is not there for


def test_what_the_pacs_sends_while_the_node_is_down_arrives_afterwards_once(hospital):
    today = datetime.now()
    scans = []
    for seed in range(9210, 9215):
        for table_mm, when in ((-60.0, today - timedelta(hours=1)), (90.0, today)):
            made = scan(seed, spacing_mm=10.0, matrix=256, table_mm=table_mm, when=when)
            scans.append(made)
    node = hospital.node
    assert node.stop() == 0
    for made in scans:
        hospital.pacs.send(made.slices)
    node.more_settings = SETTINGS + BY_WEB  # for the test that follows
    node.write_config(node.config)

    def failed() -> int:
        """How many of the Series Orthanc tried to forward, and gave up."""
        jobs = [j for j in hospital.pacs.jobs("DicomModalityStore") if j["State"] == "Failure"]
        return len({uid for j in jobs for uid in j["Content"]["ParentResources"]})

    eventually(lambda: failed() == len(scans), "ten failed forwards")
    time.sleep(DOWN_S)  # in earnest, where it is asked for; a PACS does not try again
    node.start()
    complete(hospital, *scans)
    eventually(
        lambda: all(offset_of(node, scans[k + 1], scans[k]) for k in range(0, len(scans), 2)),
        "five offsets",
    )
    node.idle()
    assert failed() == len(scans)
    for k in range(0, len(scans), 2):
        prior, current = scans[k : k + 2]
        assert abs(offset_of(node, current, prior) - TRUTH_MM) <= TOLERANCE_MM
        assert_registers(hospital.one(current.study_uid, REGISTRATION), current, prior)
    # Each Series once, each curve made once, of each Instance once, each pair once a method.
    for made in scans:
        (row,) = node.series(series_uid=made.series_uid)
        assert (row.received, row.scored, row.revision) == (*[len(made.slices)] * 2, 1)
        (delivery,) = hospital.delivered(made.series_uid, DeliveryKind.REPORT)
        assert delivery.version == 1
    ours = {made.series_uid for made in scans}

    def asked() -> list[store.Fetch]:
        with store.reading(node.engine) as session:
            return [f for f in store.list_fetches(session) if f.what.series_uid in ours]

    # That they are here shows a little after they were sent.
    eventually(lambda: FetchState.SENT not in {f.state for f in asked()}, "all looked at")
    with store.reading(node.engine) as session:
        stored = [
            (o.fixed_series, o.moving_series, o.offset.method)
            for made in scans
            for o in store.offsets_of(session, fixed_study=made.study_uid)
        ]
    assert len(stored) == len(set(stored)) == len(scans) // 2 * len(Method)
    fetches = asked()
    assert {f.what.series_uid for f in fetches} == ours and len(fetches) == len(ours)
    assert {(f.what.cause, f.state, f.attempts) for f in fetches} == {
        (FetchCause.CATCH_UP, FetchState.DONE, 1)
    }


# Without C-MOVE of priors


def test_a_prior_is_fetched_by_dicomweb(hospital):
    prior, current = timepoints(9205)
    node = hospital.node
    if BY_WEB not in node.more_settings:
        assert node.stop() == 0
        node.more_settings = SETTINGS + BY_WEB
        node.write_config(node.config)
        node.start()
    hospital.pacs.send(prior.slices, pacs.ARCHIVE)
    moves = hospital.pacs.log().count("Move-SCU")
    hospital.pacs.send(current.slices)
    complete(hospital, current, prior)
    assert fetched(hospital, prior).what.peer == "web"
    assert hospital.pacs.log().count("Move-SCU") == moves
    assert_registers(hospital.one(current.study_uid, REGISTRATION), current, prior)
