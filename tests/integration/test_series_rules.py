"""Which slices of a Series make its curve: a small made Series for each rule, through the stages.

`ct_slice` draws a disc at body height 5 mm times its level, which lies at z = 5 mm times it: what
curve comes out is known beforehand.
"""

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset
from pydicom.uid import (
    EnhancedSRStorage,
    SecondaryCaptureImageStorage,
    XRayRadiationDoseSRStorage,
)
from sqlalchemy import Engine, select, update

from db import engine as engines
from db import migrate, schema
from dicomnode import dicomio, files, store, weights
from dicomnode.core import phantom
from dicomnode.model import Flag, Method, PatientKey, Reason, ScoreCurve, SeriesState
from dicomnode.node.align import AlignStage
from dicomnode.node.assemble import AssembleStage
from dicomnode.node.score import Scorer, ScoreStage
from dicomnode.spool import Spool
from dicomnode.weights import Bundle
from tests.dicom import ct_dataset, enhanced_ct, part10
from tests.e2e.conftest import REAL_CT
from tests.integration.test_stages import brightness_bundle, ct_slice

SERIES = "1.2.7"
LEVELS = range(12)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class Node:
    """A spool, a database, and the stages between them."""

    def __init__(self, folder: Path, bundle: Bundle, database: Path) -> None:
        self.spool = Spool(folder / "spool")
        shutil.copyfile(database, folder / "node.sqlite")
        self.engine: Engine = engines.create(f"sqlite:///{folder / 'node.sqlite'}")
        scorer = Scorer(bundle, torch.device("cpu"), 16)
        self.stage = ScoreStage(self.spool, self.engine, scorer, threads=2)
        self._sent = 0

    def close(self) -> None:
        """Let go of threads and connections."""
        self.stage.close()
        self.engine.dispose()

    def send(self, *datasets: Dataset) -> None:
        """Store Instances in this order over an association, and finish what it brought."""
        self.send_files([part10(ds) for ds in datasets])

    def send_files(self, contents: list[bytes]) -> None:
        """Store the bytes of Instances likewise."""
        self._sent += 1
        association = f"{self._sent:016x}"
        for content in contents:
            self.spool.put(content, association)
        self.spool.put_event(association, "released")
        while self.stage.step().until is not None:
            pass
        later = datetime.now(UTC) + timedelta(days=1)
        AssembleStage(self.engine, 5.0, 600.0).step(later, later)

    def row(self, series_uid: str = SERIES) -> store.SeriesRow:
        """Return the Series as `dicomnode series` shows it."""
        with store.reading(self.engine) as session:
            (row,) = store.list_series(session, series_uid=series_uid)
        return row

    def curve(self, series_uid: str = SERIES) -> ScoreCurve:
        """Return the curve of a Series that has one."""
        with store.reading(self.engine) as session:
            found = store.curve_of(session, series_uid)
        assert found is not None, self.row(series_uid)
        return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return brightness_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def database(tmp_path_factory, bundle) -> Path:
    """A database that knows the bundle, migrated once: each test has a copy of it."""
    path: Path = tmp_path_factory.mktemp("database") / "node.sqlite"
    engine = engines.create(f"sqlite:///{path}")
    migrate.upgrade(engine)
    with store.writing(engine) as session:
        store.record_model(session, bundle.digest, bundle.manifest, datetime.now(UTC))
    engine.dispose()
    assert not path.with_name("node.sqlite-wal").exists()  # all of it is in the one file
    return path


@pytest.fixture
def node(tmp_path, bundle, database) -> Iterator[Node]:
    node = Node(tmp_path, bundle, database)
    yield node
    node.close()


def scan(levels: range = LEVELS, **attributes: Any) -> list[Dataset]:
    return [ct_slice(SERIES, level, **attributes) for level in levels]


def assert_true(curve: ScoreCurve, levels: range = LEVELS) -> None:
    """Each of these levels once, at its place and its height."""
    np.testing.assert_allclose(curve.z_mm, [5.0 * k for k in levels], atol=1e-6)
    np.testing.assert_allclose(curve.height_mm, [5.0 * k for k in levels], atol=1e-2)


def assert_refused(node: Node, reason: Reason, slices: int, state: str = "ignored") -> None:
    """The Series ended without a curve, for this reason of each of its slices."""
    row = node.row()
    assert (row.state, row.reason, row.scored) == (SeriesState(state), reason, 0)
    assert row.set_aside == {reason: slices}
    assert row.reason.state is SeriesState(state)


# What is no axial CT of the body


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, Reason.LOCALIZER),
        ({"ImageType": ["DERIVED", "SECONDARY", "LOCALIZER", "CT_SOM5 TOP"]}, Reason.LOCALIZER),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MPR"]}, Reason.REFORMAT),
        ({"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]}, Reason.REFORMAT),
        ({"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]}, Reason.REFORMAT),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "MIP"]}, Reason.REFORMAT),
        ({"ImageType": ["DERIVED", "SECONDARY", "MINIP"]}, Reason.REFORMAT),
        ({"ImageType": ["DERIVED", "SECONDARY", "VRT"]}, Reason.REFORMAT),
        ({"ImageType": ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]}, Reason.REFORMAT),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, Reason.NOT_CT),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]}, Reason.NOT_CT),
        ({"ImageType": ["DERIVED", "SECONDARY", "DOSE_INFO"]}, Reason.NOT_CT),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, Reason.NOT_CT),
        ({"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "OT"}, Reason.NOT_CT),
        ({"SOPClassUID": XRayRadiationDoseSRStorage, "Modality": "SR"}, Reason.NOT_CT),
        ({"SOPClassUID": EnhancedSRStorage, "Modality": "SR"}, Reason.NOT_CT),
        ({"Modality": "PR"}, Reason.NOT_CT),
        ({"ImageOrientationPatient": ["1", "0", "0", "0", "0", "-1"]}, Reason.NON_AXIAL),
        ({"ImageOrientationPatient": ["0", "1", "0", "0", "0", "-1"]}, Reason.NON_AXIAL),
    ],
    ids=lambda value: "-".join(map(str, *value.values())) if len(value) == 1 else "",
)
def test_a_series_of_something_else_says_what(node, attributes, reason):
    node.send(*scan(**attributes))
    assert_refused(node, reason, len(LEVELS))


def test_a_picture_in_colour_is_no_ct_whatever_its_sop_class(node):
    picture = bytes(64 * 64 * 3)
    colour = {
        "SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0,
        "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0,
        "PixelData": picture, "ImageType": ["DERIVED", "SECONDARY"],
    }  # fmt: skip
    node.send(*scan(**colour))
    assert_refused(node, Reason.NOT_CT, len(LEVELS))


def test_a_derived_axial_image_is_scored(node):
    node.send(*scan(ImageType=["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 SPI"]))
    assert_true(node.curve())


def test_scouts_beside_the_slices_leave_the_curve_as_it_is(node):
    node.send(ct_slice(SERIES, 20, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), *scan())
    assert_true(node.curve())
    assert node.row().set_aside == {Reason.LOCALIZER: 1}
    assert node.curve().quality.flags == (Flag.SLICES_REFUSED,)


# How slices lie


def leaning(degrees: float) -> list[str]:
    """Direction cosines of a slice that leans about the patient's left-right axis."""
    angle = np.radians(degrees)
    return [f"{v:.8f}" for v in (1, 0, 0, 0, np.cos(angle), np.sin(angle))]


def tilted_gantry(degrees: float, body_mm: tuple[float, float] = (0, 0)) -> list[Dataset]:
    """A gantry that leans while the table moves along z, from -900 mm on.

    The body lies at `body_mm`, x and y: where a scanner has its origin is its own affair.
    """
    angle = np.radians(degrees)
    slices = scan(ImageOrientationPatient=leaning(degrees))
    for level, ds in enumerate(slices):
        # The middle of the disc is on the axis: 31.5 pixels along each direction from the corner.
        corner = np.array([*body_mm, -900 + 5 * level]) - 110.25 * np.array(
            [1, np.cos(angle), np.sin(angle)]
        )
        ds.ImagePositionPatient = [f"{v:.6f}" for v in corner]
    return slices


@pytest.mark.parametrize(
    ("degrees", "body_mm"), [(5, (0, 0)), (-12, (0, 0)), (14.5, (0, 0)), (12, (30, -170))]
)
def test_a_little_tilt_is_accepted_and_the_curve_is_where_the_body_is(node, degrees, body_mm):
    node.send(*tilted_gantry(degrees, body_mm))
    curve = node.curve()
    np.testing.assert_allclose(curve.z_mm, [-900 + 5.0 * k for k in LEVELS], atol=1e-4)
    np.testing.assert_allclose(curve.height_mm, [5.0 * k for k in LEVELS], atol=1e-2)
    assert curve.quality.flags == ()
    assert curve.quality.slope == pytest.approx(1.0, abs=1e-3)


def test_the_offset_of_a_tilted_scan_is_that_of_an_upright_one(node):
    prior = [ct_slice("1.2.8", k, table_mm=100.0, StudyDate="20250101") for k in LEVELS]
    node.send(*prior, *tilted_gantry(12, (0, -170)))
    assert AlignStage(node.engine).step() == len(Method)
    with store.reading(node.engine) as session:
        found = store.offsets_of(session, fixed_study=f"{SERIES}.0", moving_study="1.2.8.0")
    for stored in found:
        within = 1.5 if stored.offset.method is Method.ROBUST else 0.01
        assert stored.offset.offset_mm == pytest.approx(-1000.0, abs=within)


@pytest.mark.parametrize("degrees", [18.5, -25, 44])
def test_a_large_tilt_is_refused(node, degrees):
    node.send(*tilted_gantry(degrees))
    assert_refused(node, Reason.TILT, len(LEVELS))


@pytest.mark.parametrize(
    ("degrees", "reason"),
    [(10, None), (16, Reason.TILT), (24, Reason.TILT), (50, Reason.NON_AXIAL)],
)
def test_an_oblique_stack_is_as_good_as_its_angle(node, degrees, reason):
    """Slices that follow each other along their normal, as a reformat's do."""
    angle = np.radians(degrees)
    slices = scan(ImageOrientationPatient=leaning(degrees))
    for level, ds in enumerate(slices):
        middle = 5 * level * np.array([0, -np.sin(angle), np.cos(angle)])
        corner = middle - 110 * np.array([1, np.cos(angle), np.sin(angle)])
        ds.ImagePositionPatient = [f"{v:.6f}" for v in corner]
    node.send(*slices)
    if reason is not None:
        assert_refused(node, reason, len(LEVELS))
    else:
        # 5 mm apart along the normal, and so a little more along the axis.
        np.testing.assert_allclose(np.diff(node.curve().z_mm), 5.0 / np.cos(angle), atol=1e-4)


def test_rounding_of_direction_cosines_is_no_other_stack(node):
    slices = scan()
    for k, ds in enumerate(slices):
        ds.ImageOrientationPatient = ["1", f"{0.0009 * (k % 2):.4f}", "0", "0", "1", "0"]
    node.send(*slices)
    curve = node.curve()
    assert_true(curve)
    assert curve.quality.flags == ()


def test_slices_of_two_orientations_are_not_one_stack(node):
    slices = scan()
    slices[3].ImageOrientationPatient = leaning(3)
    node.send(*slices)
    row = node.row()
    assert (row.state, row.reason) == (SeriesState.QUARANTINED, Reason.NOT_ONE_STACK)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_neither_instance_number_nor_arrival_orders_slices(node, order):
    slices = scan()
    for k, ds in enumerate(slices):
        ds.InstanceNumber, ds.SliceLocation = str(len(slices) - k), str(5.0 * (len(slices) - k))
    shuffled = np.random.default_rng(1).permutation(len(slices)).tolist()
    node.send(*([slices[k] for k in shuffled] if order == "shuffled" else slices[::-1]))
    curve = node.curve()
    assert_true(curve)
    assert curve.quality.flags == ()


# Gaps


def test_missing_slices_are_told_and_the_rest_is_where_it_is(node):
    slices = scan()
    del slices[5:7]
    node.send(*slices)
    curve = node.curve()
    there = [k for k in LEVELS if k not in (5, 6)]
    np.testing.assert_allclose(curve.z_mm, [5.0 * k for k in there])
    np.testing.assert_allclose(curve.height_mm, [5.0 * k for k in there], atol=1e-2)
    assert curve.quality.flags == (Flag.GAP, Flag.UNEVEN_SPACING)


def test_a_spacing_that_changes_is_told_and_heights_stay_true(node):
    """Every level below, every second above: 5 and 10 mm."""
    levels = [*range(8), *range(8, 21, 2)]
    node.send(*(ct_slice(SERIES, level) for level in levels))
    curve = node.curve()
    np.testing.assert_allclose(curve.z_mm, [5.0 * k for k in levels])
    np.testing.assert_allclose(curve.height_mm, [5.0 * k for k in levels], atol=1e-2)
    assert Flag.UNEVEN_SPACING in curve.quality.flags
    assert curve.quality.slope == pytest.approx(1.0, abs=1e-3)


# The same place more than once


def phase(number: int, levels: range, brighter: int = 0, **attributes: Any) -> list[Dataset]:
    """Slices of one phase; `brighter` levels, so that a curve tells of which phases it is."""
    found = []
    for level in levels:
        ds = ct_slice(SERIES, level + brighter, **attributes)
        ds.ImagePositionPatient = ["-110", "-110", f"{5 * level}"]
        ds.SOPInstanceUID = f"{SERIES}.{number}.{level + 1}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        found.append(ds)
    return found


def timed(slices: list[Dataset], start_s: float, step_s: float = 0.5) -> list[Dataset]:
    for k, ds in enumerate(slices):
        ds.ContentTime = f"0815{start_s + k * step_s:09.6f}"
    return slices


def test_a_slice_that_is_there_twice_counts_once(node):
    node.send(*phase(1, LEVELS), *phase(2, LEVELS))
    curve, row = node.curve(), node.row()
    assert_true(curve)
    assert curve.quality.flags == (Flag.DUPLICATE_POSITION,)
    assert set(curve.sop_instance_uids) == {f"{SERIES}.1.{k + 1}" for k in LEVELS}
    assert (row.received, row.scored) == (24, 12)
    assert row.set_aside == {Reason.DUPLICATE_POSITION: 12}


Attributes = dict[str, str]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"AcquisitionNumber": "1"}, {"AcquisitionNumber": "2"}),
        ({"TemporalPositionIdentifier": "1"}, {"TemporalPositionIdentifier": "2"}),
        ({"TriggerTime": "0"}, {"TriggerTime": "412.5"}),
        (
            {"AcquisitionNumber": "1", "ContentTime": "081500"},
            {"AcquisitionNumber": "2", "ContentTime": "081500"},
        ),
    ],
    ids=["acquisition", "temporal position", "trigger", "acquisition, one time"],
)
@pytest.mark.parametrize("larger", [1, 2])
def test_of_two_phases_the_more_complete_one_makes_the_curve(node, first, second, larger):
    """One phase shows levels 0 to 9, the other 0 to 13; the second is 20 mm of height brighter."""
    ends = {1: 14 if larger == 1 else 10, 2: 14 if larger == 2 else 10}
    early = phase(1, range(ends[1]), **first)
    late = phase(2, range(ends[2]), brighter=4, **second)
    mixed = [ds for pair in zip(early, late, strict=False) for ds in pair]
    rest = [ds for ds in (*early, *late) if ds not in mixed]
    node.send(*mixed, *rest)
    curve, row = node.curve(), node.row()
    assert {uid.split(".")[3] for uid in curve.sop_instance_uids} == {str(larger)}
    np.testing.assert_allclose(curve.z_mm, [5.0 * k for k in range(14)])
    raised = 20.0 * (larger - 1)
    np.testing.assert_allclose(curve.height_mm, [5.0 * k + raised for k in range(14)], atol=1e-2)
    assert curve.quality.flags == (Flag.DUPLICATE_POSITION,)
    assert row.set_aside == {Reason.DUPLICATE_POSITION: 10}


def test_stations_that_overlap_are_one_curve_in_whatever_order_they_come(node):
    """Three of eight levels, two of each shown by the next station too."""
    stations = [
        ds
        for number, start in enumerate((12, 0, 6))
        for ds in phase(number, range(start, start + 8), AcquisitionNumber=str(number + 1))
    ]
    node.send(*stations)
    assert_true(node.curve(), range(20))
    assert node.curve().quality.flags == (Flag.DUPLICATE_POSITION,)
    assert node.row().set_aside == {Reason.DUPLICATE_POSITION: 4}


def test_phases_one_after_the_other_are_told_by_the_time_alone(node):
    early = timed(phase(1, range(10)), 0)
    late = timed(phase(2, range(12), brighter=4), 20)
    node.send(*late, *early)
    curve = node.curve()
    assert {uid.split(".")[3] for uid in curve.sop_instance_uids} == {"2"}
    np.testing.assert_allclose(curve.height_mm, [5.0 * k + 20 for k in range(12)], atol=1e-2)


def test_phases_taken_place_by_place_are_told_by_the_time_alone(node):
    """At each place two slices, then the table moves on."""
    early, late = phase(1, LEVELS), phase(2, LEVELS, brighter=4)
    for k, pair in enumerate(zip(early, late, strict=True)):
        timed(list(pair), 2.0 * k)
    node.send(*late, *early)
    curve = node.curve()
    assert {uid.split(".")[3] for uid in curve.sop_instance_uids} == {"1"}
    assert_true(curve)


def test_heart_phases_of_trigger_times_that_vary_are_told_apart(node):
    """Retrospective gating: about 0 and about 400 ms into the beat, never twice the same."""
    early, late = phase(1, LEVELS), phase(2, LEVELS, brighter=4)
    for k, (one, other) in enumerate(zip(early, late, strict=True)):
        one.TriggerTime, other.TriggerTime = f"{3 * k}", f"{400 + 2 * k}"
        one.ContentTime = other.ContentTime = "081500"
    node.send(*early, *late)
    curve = node.curve()
    assert {uid.split(".")[3] for uid in curve.sop_instance_uids} == {"1"}
    assert_true(curve)


def test_an_acquisition_number_for_each_place_does_not_take_the_series_apart(node):
    """Step and shoot: each turn of the gantry has a number of its own, in both phases."""
    early, late = timed(phase(1, LEVELS), 0), timed(phase(2, LEVELS, brighter=4), 20)
    for k, ds in enumerate([*early, *late]):
        ds.AcquisitionNumber = str(k + 1)
    node.send(*early, *late)
    assert_true(node.curve())


def test_a_phase_that_becomes_the_more_complete_one_makes_the_next_curve(node):
    """What tells phases apart is not lost while a Series is finished."""
    early = phase(1, range(12), AcquisitionNumber="1")
    late = phase(2, range(14), brighter=4, AcquisitionNumber="2")
    node.send(*early, *late[:11])
    assert {uid.split(".")[3] for uid in node.curve().sop_instance_uids} == {"1"}
    node.send(*late[11:])
    curve, row = node.curve(), node.row()
    assert {uid.split(".")[3] for uid in curve.sop_instance_uids} == {"2"}
    np.testing.assert_allclose(curve.height_mm, [5.0 * k + 20 for k in range(14)], atol=1e-2)
    assert (row.revision, row.set_aside) == (2, {Reason.DUPLICATE_POSITION: 12})
    node.send(*late, *early)  # a repeat changes nothing
    assert node.row().revision == 2


def test_a_curve_that_was_stored_before_phases_were_told_apart_may_be_reopened(node):
    node.send(*phase(1, LEVELS, AcquisitionNumber="1"))
    with store.writing(node.engine) as session:  # as schema 0004 had it
        session.execute(update(schema.Curve).values(acquisitions=None))
    node.send(*phase(1, range(12, 14), AcquisitionNumber="1"))
    assert_true(node.curve(), range(14))
    assert node.row().revision == 2
    node.send(*phase(2, range(16), brighter=4, AcquisitionNumber="2"))
    assert {uid.split(".")[3] for uid in node.curve().sop_instance_uids} == {"2"}


@pytest.mark.parametrize("again", [True, False])
def test_a_tilted_series_of_an_earlier_release_is_placed_anew_when_it_is_sent_again(node, again):
    slices = tilted_gantry(12, (0, -170))
    node.send(*slices)
    true = node.curve().z_mm
    with store.writing(node.engine) as session:  # as schema 0002 had it
        row = session.scalars(select(schema.Curve)).one()
        row.z_mm = (true - 36.1).astype("<f8").tobytes()
        row.acquisitions = None if again else row.acquisitions
    node.send(*slices)
    np.testing.assert_allclose(node.curve().z_mm, true if again else true - 36.1)
    node.send(*slices)
    assert node.row().revision == (2 if again else 1)


@pytest.mark.parametrize(("places", "times"), [(1, 20), (2, 15), (4, 12), (7, 5)])
def test_bolus_tracking_perfusion_and_cine_are_too_few_positions(node, places, times):
    slices = [
        ds
        for t in range(times)
        for ds in timed(phase(t, range(0, 2 * places, 2), TemporalPositionIdentifier=str(t)), t)
    ]
    node.send(*slices)
    row = node.row()
    assert (row.state, row.reason) == (SeriesState.IGNORED, Reason.TOO_FEW_POSITIONS)


# How the patient lay


def as_seen(ds: Dataset, orientation: tuple[float, ...]) -> Dataset:
    """Return the same slice of the same anatomy as another scanner position stores it.

    Rows and columns of the image run along `orientation`; ours run along x and y.
    """
    image = np.frombuffer(ds.PixelData, "<i2").reshape(ds.Rows, ds.Columns)
    row, column = np.array(orientation).reshape(2, 3)
    step = float(ds.PixelSpacing[0])
    corner = np.array([float(v) for v in ds.ImagePositionPatient])
    far = (np.array([image.shape[1], image.shape[0]]) - 1) * step
    if abs(row[1]) == 1:  # rows of the new image run along y
        image = image.T
    if row[0] + row[1] < 0:
        image = image[:, ::-1]
    if column[0] + column[1] < 0:
        image = image[::-1]
    # The corner lies at the far end of each direction that runs backwards.
    along = row + column
    corner[:2] += np.where(along[:2] < 0, far, 0.0)
    ds.PixelData = np.ascontiguousarray(image).tobytes()
    ds.Rows, ds.Columns = image.shape
    ds.ImageOrientationPatient = [str(v) for v in orientation]
    ds.ImagePositionPatient = [f"{v:.6f}" for v in corner]
    return ds


POSITIONS = {
    "HFP": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "FFS": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "FFP": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "HFDR": (0.0, 1.0, 0.0, -1.0, 0.0, 0.0),
    "HFDL": (0.0, -1.0, 0.0, 1.0, 0.0, 0.0),
    "FFDR": (0.0, -1.0, 0.0, -1.0, 0.0, 0.0),
    "FFDL": (0.0, 1.0, 0.0, 1.0, 0.0, 0.0),
}


@pytest.fixture(scope="module")
def shipped() -> Scorer:
    return Scorer(weights.load(None), torch.device("cpu"), 16)


def drawn() -> list[Dataset]:
    """A drawn trunk, whose left is not its right nor its front its back."""
    body = phantom.patient(3)
    marks = phantom.landmarks(body)
    z_mm = np.linspace(marks["iliac_crest"], marks["lung_apex"], 10)
    images = phantom.volume(body, z_mm, pixel_mm=3.5, matrix=128, noise_hu=0, center_mm=(9, -14))
    return [
        dicomio.ct_dataset(
            image,
            patient=PatientKey("P"),
            study_uid=f"{SERIES}.0",
            series_uid=SERIES,
            sop_instance_uid=f"{SERIES}.{k + 1}",
            instance_number=k + 1,
            image_position=(9 - 3.5 * 63.5, -14 - 3.5 * 63.5, z),
            pixel_mm=3.5,
            spacing_mm=20.0,
            study_datetime=datetime(2026, 1, 5),
            frame_of_reference_uid=f"{SERIES}.99",
        )
        for k, (z, image) in enumerate(zip(z_mm.tolist(), images, strict=True))
    ]


def scored(folder: Path, scorer: Scorer, slices: list[Dataset]) -> ScoreCurve:
    folder.mkdir()
    for k, ds in enumerate(slices):
        (folder / f"{k}").write_bytes(part10(ds))
    (series,) = files.score([folder], scorer).series
    assert isinstance(series.outcome, ScoreCurve), series
    return series.outcome


@pytest.fixture(scope="module")
def supine(shipped, tmp_path_factory) -> ScoreCurve:
    return scored(tmp_path_factory.mktemp("supine") / "1", shipped, drawn())


@pytest.mark.parametrize("position", POSITIONS)
def test_however_the_patient_lay_the_scores_are_those_of_head_first_supine(
    shipped, supine, tmp_path, position
):
    slices = [as_seen(ds, POSITIONS[position]) for ds in drawn()]
    for ds in slices:
        ds.PatientPosition = position
    got = scored(tmp_path / "ct", shipped, slices)
    np.testing.assert_allclose(got.z_mm, supine.z_mm, atol=1e-4)
    np.testing.assert_allclose(got.height_mm, supine.height_mm, atol=0.5)
    np.testing.assert_allclose(got.body_centre_mm, supine.body_centre_mm, atol=0.1)
    assert got.quality.flags == supine.quality.flags


def test_a_prone_body_that_is_not_turned_would_score_otherwise(shipped, supine, tmp_path):
    """The comparison above can fail: the same pixels under another header."""
    slices = [as_seen(ds, POSITIONS["HFP"]) for ds in drawn()]
    for ds in slices:
        ds.ImageOrientationPatient = [str(v) for v in AXIAL]
    got = scored(tmp_path / "ct", shipped, slices)
    assert np.abs(got.height_mm - supine.height_mm).max() > 5.0


@pytest.mark.parametrize("position", ["FFS", "HFP", "HFDL"])
def test_real_ct_scores_the_same_however_it_was_stored(shipped, tmp_path, position):
    folder = REAL_CT / "ACRIN-NSCLC-042" / "A"
    found = sorted((REAL_CT / "ACRIN-NSCLC-042").glob("A*"))
    if not found:
        pytest.skip(f"no real CT at {folder}")
    slices = []
    for file in sorted(dicomio.find(found))[::8]:
        ds = dicomio.read(file)
        image, _ = dicomio.dataset.stored(ds)
        ds.decompress()
        assert ds.pixel_array.shape == image.shape
        slices.append(ds)
    plain = scored(tmp_path / "1", shipped, slices)
    turned = scored(tmp_path / "2", shipped, [as_seen(ds, POSITIONS[position]) for ds in slices])
    np.testing.assert_allclose(turned.z_mm, plain.z_mm, atol=1e-4)
    np.testing.assert_allclose(turned.height_mm, plain.height_mm, atol=1.0)


@pytest.mark.parametrize(
    ("position", "orientation", "flagged"),
    [
        # Every position and orientation: test_geometry.
        ("FFS", AXIAL, False),  # turned by the scanner: what most of them write
        ("HFDL", POSITIONS["HFDL"], False),
        (None, POSITIONS["HFP"], False),
        ("HFS", POSITIONS["HFP"], True),  # upside down
    ],
)
def test_a_patient_position_that_the_orientation_contradicts_is_told(
    node, position, orientation, flagged
):
    node.send(*(as_seen(ds, orientation) for ds in scan(PatientPosition=position)))
    curve = node.curve()
    assert_true(curve)
    assert curve.quality.flags == ((Flag.PATIENT_POSITION,) if flagged else ())
    with store.reading(node.engine) as session:
        found = store.curve_of(session, SERIES)
    assert found is not None and found.quality.flags == curve.quality.flags


# Enhanced CT

Change = Callable[[int, Dataset], None]


def enhanced(slices: list[Dataset], change: Change, number: int = 1) -> Dataset:
    """An Enhanced CT of these slices, each Frame's functional groups changed."""
    ds = enhanced_ct(slices)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{SERIES}.7{number}"
    for k, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        change(k, group)
    return ds


def orientation_of(group: Dataset, orientation: list[str]) -> None:
    plane = Dataset()
    plane.ImageOrientationPatient = orientation
    group.PlaneOrientationSequence = [plane]


def test_temporal_positions_of_an_enhanced_ct_are_volumes(node):
    slices = [*phase(1, range(10)), *phase(2, range(12), brighter=4)]

    def change(k: int, group: Dataset) -> None:
        group.FrameContentSequence[0].TemporalPositionIndex = 1 if k < 10 else 2

    node.send(enhanced(slices, change))
    curve, row = node.curve(), node.row()
    assert curve.frames == tuple(range(11, 23))
    np.testing.assert_allclose(curve.height_mm, [5.0 * k + 20 for k in range(12)], atol=1e-2)
    assert (row.received, row.scored) == (1, 12)
    assert row.set_aside == {Reason.DUPLICATE_POSITION: 10}


def test_heart_phases_of_an_enhanced_ct_are_volumes(node):
    slices = [*phase(1, LEVELS), *phase(2, LEVELS, brighter=4)]

    def change(k: int, group: Dataset) -> None:
        cardiac = Dataset()
        cardiac.NominalCardiacTriggerDelayTime = 0.0 if k < len(LEVELS) else 400.0
        group.CardiacSynchronizationSequence = [cardiac]

    node.send(enhanced(slices, change))
    assert_true(node.curve())
    assert node.row().set_aside == {Reason.DUPLICATE_POSITION: 12}


def test_of_stacks_that_lean_otherwise_the_largest_makes_the_curve(node):
    """A head: five slices that lean by 8 degrees, then twelve upright ones."""
    slices = [*phase(1, range(5)), *phase(2, LEVELS)]

    def change(k: int, group: Dataset) -> None:
        group.FrameContentSequence[0].StackID = "1" if k < 5 else "2"
        orientation_of(group, leaning(8) if k < 5 else leaning(0))

    node.send(enhanced(slices, change))
    curve, row = node.curve(), node.row()
    assert_true(curve)
    assert curve.frames == tuple(range(6, 18))
    assert row.set_aside == {Reason.NOT_ONE_STACK: 5}
    assert curve.quality.flags == (Flag.SLICES_REFUSED,)


def test_stacks_of_one_orientation_make_one_curve(node):
    slices = phase(1, range(14))

    def change(k: int, group: Dataset) -> None:
        group.FrameContentSequence[0].StackID = "1" if k < 7 else "2"

    node.send(enhanced(slices, change))
    assert_true(node.curve(), range(14))
    assert node.curve().quality.flags == ()


def test_coronal_frames_of_an_enhanced_ct_are_set_aside_one_by_one(node):
    slices = [*phase(1, range(5)), *phase(2, LEVELS)]

    def change(k: int, group: Dataset) -> None:
        coronal = ["1", "0", "0", "0", "0", "-1"]
        orientation_of(group, coronal if k < 5 else leaning(0))

    node.send(enhanced(slices, change))
    assert_true(node.curve())
    assert node.row().set_aside == {Reason.NON_AXIAL: 5}


def test_a_volume_of_reversed_frames_in_two_instances_is_one_curve(node):
    first, second = phase(1, range(6))[::-1], phase(2, range(6, 12))[::-1]
    node.send(enhanced(second, lambda k, group: None, 2), enhanced(first, lambda k, group: None, 1))
    assert_true(node.curve())
    assert node.row().received == 2


def test_what_tells_slices_apart_may_be_anything_and_stops_nothing(node):
    """Damaged values of what no slice needs, each in a slice of its own."""
    told = ["AcquisitionNumber", "TemporalPositionIdentifier", "TriggerTime", "ContentTime"]
    damaged = [b"\xff\xfe\x00?ab", b"1\\2\\3 ", b"1e9999", b"nan   "]
    contents = []
    for k, ds in enumerate(scan(range(16))):
        setattr(ds, told[k % 4], "123456")
        contents.append(part10(ds).replace(b"123456", damaged[k // 4]))
    node.send_files(contents)
    assert_true(node.curve(), range(16))


def test_a_slice_is_read_alike_by_scanner_and_pydicom():
    ds = ct_dataset(
        AcquisitionNumber="3", TemporalPositionIdentifier=" 2", TriggerTime="412.50",
        ContentTime="081500.25", PatientPosition="FFP",
    )  # fmt: skip
    scanned = dicomio.scan.scan(memoryview(part10(ds)), {})
    assert scanned is not None
    assert scanned.header.acquisition == dicomio.header_of(ds).acquisition
    assert scanned.header.acquisition.acquisition_number == 3
    assert scanned.header.acquisition.temporal_position == 2
    assert scanned.header.acquisition.trigger_time_ms == 412.5
    assert scanned.header.acquisition.content_time == "081500.25"
    assert scanned.header.acquisition.patient_position == "FFP"
