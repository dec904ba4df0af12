"""Peers made by others, and CT made by scanners: an Orthanc that forwards, and real series."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime

import pytest
from pydicom.sr.codedict import codes

from dicomnode import store
from dicomnode.model import Evidence, Reason, SeriesState
from dicomnode.store import SeriesRow
from tests.e2e import everything, pacs
from tests.e2e.conftest import (
    REAL_CT,
    Node,
    cli,
    dcmsend,
    localizer,
    need,
    network_namespace,
    run,
    running_node,
    scan,
    skip,
)
from tests.integration.test_rejection import note

# Orthanc


def test_orthanc_forwards_two_timepoints_and_a_localizer(tmp_path):
    need("Orthanc", "dcmsend", "unshare", "nsenter", "ip")
    # At 64 x 64 each slice waits 40 ms for an acknowledgement that TCP delays.
    prior = scan(matrix=256, when=datetime(2023, 3, 4))
    follow_up = scan(matrix=256, table_mm=90.0)
    scout = localizer(follow_up)
    with ExitStack() as stack:
        try:
            prefix = stack.enter_context(network_namespace())
        except RuntimeError as exc:
            skip(f"no network namespace: {exc}")
        node = stack.enter_context(running_node(tmp_path / "node", prefix=prefix))
        orthanc = stack.enter_context(
            pacs.orthanc(tmp_path / "orthanc", prefix, node_port=node.port)
        )
        for part in (prior, follow_up, scout):
            orthanc.send(part.slices)
        for part in (prior, follow_up):
            row = node.finished(part.series_uid, len(part.slices))
            assert (row.state, row.evidence) == (SeriesState.CURVE, Evidence.RELEASED_AND_QUIET)
            assert node.curve_uids(part.series_uid) == part.uids
        row = node.finished(scout.series_uid, len(scout.slices))
        assert (row.state, row.reason) == (SeriesState.IGNORED, Reason.LOCALIZER)
        node.idle()
        answer = node.json("offset", follow_up.study_uid, prior.study_uid)
        assert abs(answer["offset_mm"] - 90.0) <= 10.0
        # The archive takes the two lowest slices of the prior back, then the whole follow-up.
        for taken, left in ((prior.slices[:2], prior), (follow_up.slices, follow_up)):
            ko = note(codes.DCM.RejectedForQualityReasons, *taken)
            orthanc.send([ko])
            node.finished(ko.SeriesInstanceUID, 1)
            node.idle()
            uids = {ds.SOPInstanceUID for ds in taken}
            assert node.curve_uids(left.series_uid) == left.uids - uids
        row = node.finished(follow_up.series_uid)
        assert (row.state, row.reason) == (SeriesState.IGNORED, Reason.REJECTED)
        with store.reading(node.engine) as session:
            assert store.offsets_of(session) == []


# Real CT

SERIES = (
    "DCM-QA-GE/A_head-tilted",
    "TotalSegmentator-j2k/A_trunk",
    "LIDC-IDRI-0314/A_thorax",
    "ACRIN-FLT-Breast_001/A_thorax",
    "ACRIN-FLT-Breast_001/C_vertex-to-thorax",
    "Lung_Dx-A0001/A_thorax-kernel-B",
    "Lung_Dx-A0001/A_thorax-kernel-L",
    "Lung_Dx-A0002/A_thorax-B40f",
    "Lung_Dx-A0002/A_thorax-B70f",
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, dict[str, SeriesRow]]]:
    """A node that was sent these series, and what became of each."""
    missing = [name for name in SERIES if not (REAL_CT / name).is_dir()]
    if missing:  # on CI as well: it is not part of the project
        pytest.skip(f"no real CT: {REAL_CT / missing[0]} is not there")
    need("dcmsend")
    sent = [folder for name in SERIES for folder in everything.folders(REAL_CT / name)]
    with running_node(tmp_path_factory.mktemp("real")) as node:
        run(dcmsend(node.port, *(folder.path for folder in sent)))
        yield node, everything.wait(node, sent, 300.0)


def test_every_real_series_ends(real):
    node, rows = real
    assert rows.keys() == set(SERIES)
    assert {name for name, row in rows.items() if row.state is SeriesState.OPEN} == set()
    files = {name: len(list((REAL_CT / name).glob("*.dcm"))) for name in SERIES}
    assert {name: row.received for name, row in rows.items()} == files
    assert node.quarantined() == {}


def test_a_tilted_head_is_ignored(real):
    _, rows = real
    row = rows["DCM-QA-GE/A_head-tilted"]
    assert (row.state, row.reason) == (SeriesState.IGNORED, Reason.TILT)


def test_a_stub_of_38_mm_in_jpeg_2000_is_too_short(real):
    _, rows = real
    row = rows["TotalSegmentator-j2k/A_trunk"]
    assert (row.state, row.reason) == (SeriesState.IGNORED, Reason.TOO_SHORT)


def test_a_frame_of_reference_for_every_slice_is_a_flag(real):
    _, rows = real
    row = rows["LIDC-IDRI-0314/A_thorax"]
    assert (row.state, row.scored) == (SeriesState.CURVE, row.received)
    assert row.quality is not None
    assert "frame_of_reference_varies" in row.quality.flags


@pytest.mark.parametrize("name", [n for n in SERIES if n.startswith(("ACRIN", "Lung_Dx"))])
def test_a_sound_series_is_a_curve_of_all_its_slices(real, name):
    _, rows = real
    assert (rows[name].state, rows[name].scored) == (SeriesState.CURVE, rows[name].received)


def test_two_timepoints_of_a_patient_are_aligned(real):
    node, rows = real
    fixed = rows["ACRIN-FLT-Breast_001/C_vertex-to-thorax"]
    moving = rows["ACRIN-FLT-Breast_001/A_thorax"]
    answer = node.json("offset", fixed.study_uid, moving.study_uid, "--method", "l1")
    # By eye: carina and five levels, +-10 mm; arms up against arms down.
    assert abs(answer["offset_mm"] + 215.0) <= 60.0


@pytest.mark.parametrize("patient", ["Lung_Dx-A0001", "Lung_Dx-A0002"])
def test_two_kernels_of_one_scan_lie_on_each_other(patient, tmp_path):
    if not (REAL_CT / patient).is_dir():
        pytest.skip(f"no real CT: {REAL_CT / patient} is not there")
    fixed, moving = sorted((REAL_CT / patient).iterdir())
    result = cli("align", fixed, moving, "--method", "l1", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert abs(json.loads(result.stdout)["offset_mm"]) <= 5.0
