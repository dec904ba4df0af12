"""Every kind of object that the node writes, of every kind of Series, as validators see it.

`test_objects.py` asks whether a builder keeps to the standard whatever it is told; here real data
sets go through the node, and what comes out lies beside the images it is about.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicomnode import backfill, files, weights
from dicomnode.cli import main
from dicomnode.config import Settings
from dicomnode.core import curve
from dicomnode.core.region import Limit, Region, Support
from dicomnode.model import Method, Offset, OffsetStatus, ScoreCurve, ScoredSlice
from dicomnode.objects import modules
from dicomnode.objects.coverage_report import coverage_report
from dicomnode.objects.registration import registration
from tests import iod
from tests.dicom import enhanced_ct, part10
from tests.integration.test_objects import JAVA, NEWER, TABLE, dcentvfy, dciodvfy
from tests.integration.test_stages import COVARIANCE, brightness_bundle, ct_slice
from tests.unit.test_coverage_report import CONTENT, HEIGHTS
from tests.unit.test_spatial_registration import ORIGIN

SHIFT_MM = 37.0  # the table of the follow-up stands so much higher
LEVELS = {"prior": range(12), "follow-up": range(4, 20)}
DATES = {"prior": "20250301", "follow-up": "20260301"}
# What a CT Image must have and `ct_slice` has not: these sources are themselves valid.
WHOLE = {
    "PatientSex": "O", "StudyID": "1", "PositionReferenceIndicator": "", "KVP": "120",
    "AcquisitionNumber": "1", "PatientBirthDate": "19500101",
}  # fmt: skip
LEAN_DEGREES = 10.0
LEANING = np.array([0.0, np.sin(np.radians(LEAN_DEGREES)), np.cos(np.radians(LEAN_DEGREES))])

# The bytes of the examples of PS3.5 H.3.1, H.3.2, I.2 and J.3, and what they say.
JAPANESE = (
    b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
    "Yamada^Tarou=山田^太郎=やまだ^たろう",
)
KATAKANA = (
    b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J="
    b"\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J",
    "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
)
KOREAN = (
    b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
    "Hong^Gildong=洪^吉洞=홍^길동",
)
CHINESE = (b"Wang^XiaoDong=\xcd\xf5^\xd0\xa1\xb6\xab", "Wang^XiaoDong=王^小东")


@dataclass(frozen=True)
class Kind:
    """A pair of Series, by what sets it apart from a plain one."""

    both: dict[str, Any] = field(default_factory=dict)
    moving: dict[str, Any] = field(default_factory=dict)
    shape: Callable[[list[Dataset]], list[Dataset]] = list
    name: str | None = None  # that the objects are to have, where it is not that of `both`
    raw_name: bytes | None = None


def _name(charset: str | list[str], raw: bytes, text: str) -> Kind:
    return Kind({"SpecificCharacterSet": charset}, raw_name=raw, name=text)


def _leaning(slices: list[Dataset]) -> list[Dataset]:
    """Return slices of one stack that leans forward; what lies on a table, moves with it."""
    for ds in slices:
        z_mm = 5.0 * level_of(ds.pixel_array)
        table_mm = float(ds.ImagePositionPatient[2]) - z_mm
        place = np.array([-110.0, -110.0, table_mm]) + z_mm * LEANING
        ds.ImagePositionPatient = [f"{v:.6f}" for v in place]
        ds.ImageOrientationPatient = [1, 0, 0, 0, f"{LEANING[2]:.9f}", f"{-LEANING[1]:.9f}"]
    return slices


def level_of(stored: np.ndarray) -> int:
    """Return the level of a slice of `ct_slice`, by its brightness."""
    return round((float(stored.max()) - 1024 + 200) / 25)


def _prone(slices: list[Dataset]) -> list[Dataset]:
    for ds in slices:
        ds.PatientPosition, ds.ImageOrientationPatient = "HFP", [-1, 0, 0, 0, -1, 0]
        ds.ImagePositionPatient = [110, 110, ds.ImagePositionPatient[2]]
    return slices


def _frame_of_reference_each(slices: list[Dataset]) -> list[Dataset]:
    for k, ds in enumerate(slices):
        ds.FrameOfReferenceUID = f"{ds.SeriesInstanceUID}.99.{k + 1}"
    return slices


def _enhanced(slices: list[Dataset], legacy: bool = False) -> list[Dataset]:
    made = enhanced_ct(slices, legacy=legacy)
    if "SpecificCharacterSet" in slices[0]:
        made.add(slices[0]["SpecificCharacterSet"])
    return [made]


KINDS = {
    "plain": Kind(),
    "nothing of the patient but the ID": Kind(
        dict.fromkeys(
            ("PatientName", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber",
             "ReferringPhysicianName", "BodyPartExamined", "StudyTime", "StudyDescription"), None
        ), name="",
    ),
    "an empty name": Kind({"PatientName": ""}),
    "a name without a caret": Kind({"PatientName": "Mononym"}),
    "five components": Kind({"PatientName": "Adams^John Robert Quincy^^Rev.^B.A. M.Div."}),
    "as long as a name may be": Kind({"PatientName": "N" * 32 + "^" + "V" * 31}),
    "an accession number as long as it may be": Kind({"AccessionNumber": "A" * 16}),
    "UTF-8": Kind({"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Müller^Jörg=王^小东"}),
    "Latin-1": Kind({"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"}),
    "Latin-2": Kind({"SpecificCharacterSet": "ISO_IR 101", "PatientName": "Wałęsa^Łukasz"}),
    "Greek": Kind({"SpecificCharacterSet": "ISO_IR 126", "PatientName": "Διονυσιος"}),
    "Cyrillic": Kind({"SpecificCharacterSet": "ISO_IR 144", "PatientName": "Люксембург^Роза"}),
    "Arabic": Kind({"SpecificCharacterSet": "ISO_IR 127", "PatientName": "قباني^لنزار"}),
    "Hebrew": Kind({"SpecificCharacterSet": "ISO_IR 138", "PatientName": "שרון^דבורה"}),
    "Thai": Kind({"SpecificCharacterSet": "ISO_IR 166", "PatientName": "นามสกุล"}),
    "Japanese, ISO 2022": _name(["", "ISO 2022 IR 87"], *JAPANESE),
    "Katakana, ISO 2022": _name(["ISO 2022 IR 13", "ISO 2022 IR 87"], *KATAKANA),
    "Korean, ISO 2022": _name(["", "ISO 2022 IR 149"], *KOREAN),
    "Chinese, GB18030": _name("GB18030", *CHINESE),
    # Wrong, and frequent: what PS3.5 6.1.2 allows no bytes for is read as Latin-1.
    "bytes of no declared character set": Kind(raw_name=b"M\xfcller^J\xf6rg", name="Müller^Jörg"),
    "no Frame of Reference": Kind({"FrameOfReferenceUID": None}),
    "no Frame of Reference of the prior": Kind(moving={"FrameOfReferenceUID": None}),
    "one Frame of Reference for both": Kind({"FrameOfReferenceUID": "1.2.99"}),
    "a Frame of Reference a slice": Kind(shape=_frame_of_reference_each),
    "oblique": Kind(shape=_leaning),
    "prone": Kind(shape=_prone),
    "Enhanced CT": Kind(shape=_enhanced),
    "Legacy Converted Enhanced CT": Kind(shape=lambda s: _enhanced(s, legacy=True)),
    "a paired body part": Kind({"BodyPartExamined": "BREAST"}),
    "a body part of its own": Kind({"BodyPartExamined": "OBERBAUCH"}),
    "a timezone": Kind({"TimezoneOffsetFromUTC": "-0330"}),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A pair of Series as files, and what the node wrote of it."""

    name: str
    root: str
    folder: Path
    slices: dict[str, list[Dataset]]

    def series_uid(self, side: str) -> str:
        return f"{self.root}.{1 + list(LEVELS).index(side)}"

    def key(self, side: str) -> tuple[str, str]:
        """Study and Series Instance UID."""
        return f"{self.series_uid(side)}.0", self.series_uid(side)

    def images(self) -> list[Path]:
        return sorted(self.folder.glob("images/*/*.dcm"))

    @property
    def registration(self) -> Path:
        return self.folder / "reg.dcm"

    def report(self, side: str) -> Path:
        return self.folder / f"{side}.dcm"

    def objects(self) -> list[Path]:
        return [self.registration, *(self.report(side) for side in LEVELS)]


def made_pair(folder: Path, number: int, name: str) -> Pair:
    """Write the images of a pair."""
    kind = KINDS[name]
    pair = Pair(name, f"1.2.{100 + number}", folder / str(number), {})
    for side, levels in LEVELS.items():
        more = {**WHOLE, **kind.both, **(kind.moving if side == "prior" else {})}
        more = {"PatientID": f"CANARY-ID-{number}", "StudyDate": DATES[side], **more}
        table_mm = SHIFT_MM if side == "follow-up" else 0.0
        series_uid = pair.series_uid(side)
        slices = [ct_slice(series_uid, k, table_mm=table_mm, **more) for k in levels]
        if kind.raw_name is not None:
            for ds in slices:
                ds["PatientName"] = pydicom.DataElement(0x00100010, "PN", kind.raw_name)
        pair.slices[side] = kind.shape(slices)
        (pair.folder / "images" / side).mkdir(parents=True)
        for k, ds in enumerate(pair.slices[side]):
            (pair.folder / "images" / side / f"{k}.dcm").write_bytes(part10(ds))
    return pair


def call(*arguments: object) -> str:
    """Run a command, and return what it prints; nothing of a patient may stand in messages."""
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, (arguments, result.output)
    assert "CANARY" not in result.stderr
    return result.stdout


def many_regions() -> tuple[Region, ...]:
    """Return every region that the node's own bundle knows, all of them in what is scanned."""
    found = weights.load(None).regions
    ends = np.linspace(0.0, 90.0, len(found))
    return tuple(
        replace(
            region,
            low=Limit(Support.LANDMARK, float(end), 2.0),
            high=Limit(Support.LANDMARK, float(end) + 10.0, 2.0),
        )
        for region, end in zip(found, ends, strict=True)
    )


def write_from_database(pair: Pair, config: Path) -> None:
    """Let the commands that ask a node write the objects of a pair."""
    studies = [f"{pair.series_uid(side)}.0" for side in ("follow-up", "prior")]
    call("offset", *studies, "--config", config, "--registration", pair.registration)
    for side in LEVELS:
        uid = pair.series_uid(side)
        call("curve", uid, "--config", config, "--report", pair.report(side))


def write_from_folders(pair: Pair, bundle: Path) -> None:
    """Let the commands that need no node write the objects of a pair."""
    folders = [pair.folder / "images" / side for side in ("follow-up", "prior")]
    call("align", *folders, "--model", bundle, "--registration", pair.registration)
    call("score", *folders, "--model", bundle, "--report", pair.folder)
    for side in LEVELS:
        (pair.folder / f"{pair.series_uid(side)}.dcm").rename(pair.report(side))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    tables = {"two regions": TABLE, "no region": (), "many regions": many_regions()}
    plain = brightness_bundle(folder / "plain")
    for name, regions in tables.items():
        weights.save(
            folder / name, plain.network, name=name, spec=plain.spec, heights=plain.heights,
            training={}, covariance=COVARIANCE, regions=regions,
        )  # fmt: skip
    return {name: folder / name for name in tables}


@pytest.fixture(scope="module")
def node(tmp_path_factory, bundles) -> tuple[Path, dict[str, Pair]]:
    """The settings of a node that holds every pair."""
    folder = tmp_path_factory.mktemp("node")
    pairs = {name: made_pair(folder, number, name) for number, name in enumerate(KINDS)}
    url = f"sqlite:///{folder / 'node.sqlite'}"
    values = Settings(
        spool={"path": folder / "spool", "reserve_bytes": 0},
        database={"url": url},
        score={"model": bundles["two regions"], "device": "cpu"},
        series={"quiet_seconds": 0},
    )
    assert backfill.run([folder], values).curves == 2 * len(pairs)
    config = folder / "node.toml"
    config.write_text(
        f'[database]\nurl = "{url}"\n[score]\ndevice = "cpu"\n[spool]\npath = "{folder}/spool"\n'
    )
    for pair in pairs.values():
        write_from_database(pair, config)
    return config, pairs


FROM_FOLDERS = (
    "plain", "Latin-1", "Japanese, ISO 2022", "bytes of no declared character set",
    "no Frame of Reference", "oblique", "Enhanced CT",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory, bundles) -> dict[str, Pair]:
    """Pairs that no node has seen."""
    folder = tmp_path_factory.mktemp("folders")
    pairs = {name: made_pair(folder, number, name) for number, name in enumerate(FROM_FOLDERS)}
    for pair in pairs.values():
        write_from_folders(pair, bundles["two regions"])
    return pairs


@pytest.fixture(params=[*KINDS, *(f"{kind}, from folders" for kind in FROM_FOLDERS)])
def pair(request: pytest.FixtureRequest) -> Pair:
    name = request.param.removesuffix(", from folders")
    if name != request.param:
        return request.getfixturevalue("folders")[name]
    return request.getfixturevalue("node")[1][name]


def told_name(pair: Pair) -> str:
    kind = KINDS[pair.name]
    return kind.both.get("PatientName", "CANARY^NAME") if kind.name is None else kind.name


def test_dciodvfy_reports_no_error(pair):
    for file in pair.objects():
        assert dciodvfy(file) == []


def test_every_attribute_is_where_the_standard_wants_it(pair):
    for file in pair.objects():
        ds = pydicom.dcmread(file)
        assert iod.faults(ds, skipped=CONTENT if ds.Modality == "SR" else frozenset()) == []
        assert iod.bad_values(ds) == []


def test_objects_are_part_10_files(pair):
    told = run_tool("dcmftest", *pair.objects())
    assert told.count("yes:") == len(pair.objects())


def test_dcentvfy_finds_objects_and_images_of_one_patient_and_study(pair, tmp_path):
    images = [in_utf8(file, pair, tmp_path / f"{k}") for k, file in enumerate(pair.images())]
    assert dcentvfy([*images, *pair.objects()]) == []


def in_utf8(file: Path, pair: Pair, copy: Path) -> Path:
    """Return an image in the character set of our objects: dcentvfy compares bytes.

    DCMTK turns them, which reads names by itself; of ISO 2022 it cannot read Japanese, whose bytes
    and meaning are those of the examples of the standard.
    """
    charset = KINDS[pair.name].both.get("SpecificCharacterSet", ())
    if "ISO 2022 IR 87" in charset or (KINDS[pair.name].raw_name and not charset):
        ds = pydicom.dcmread(file)
        ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 192", told_name(pair)
        ds.save_as(copy)
        return copy
    if not charset:
        return file
    run_tool("dcmconv", "+U8", file, copy)
    return copy


def run_tool(program: str, *arguments: object, **environment: str) -> str:
    """Return what a program that must succeed prints; skip where it is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed: .ci/run installs it")
    done = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True, text=True, errors="replace", timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_are_said_in_utf_8(pair):
    for file in pair.objects():
        ds = pydicom.dcmread(file)
        assert ds.SpecificCharacterSet == "ISO_IR 192"
        assert str(ds.PatientName) == told_name(pair)


def test_the_matrix_takes_each_moving_slice_to_its_own_level(pair):
    """PS3.3 C.20.2.1.1; slices of one level show the same anatomy."""
    ds = pydicom.dcmread(pair.registration)
    fixed, moving = (places(pair.slices[side]) for side in ("follow-up", "prior"))
    normal = LEANING if pair.name == "oblique" else np.array([0.0, 0.0, 1.0])
    common = sorted(fixed.keys() & moving.keys())
    assert len(common) == 8
    for level in common:
        uid, point = moving[level]
        registered = iod.registered(ds, uid, point)
        assert (registered - fixed[level][1]) @ normal == pytest.approx(0.0, abs=1.5)
        own_uid, own = fixed[level]
        np.testing.assert_array_equal(iod.registered(ds, own_uid, own), own)


def places(slices: Sequence[Dataset]) -> dict[int, tuple[str, np.ndarray]]:
    """Level of each slice -> its SOP Instance UID and its place, mm."""
    found = {}
    for ds in slices:
        if "PerFrameFunctionalGroupsSequence" in ds:
            groups = ds.PerFrameFunctionalGroupsSequence
            images = ds.pixel_array
            positions = [g.PlanePositionSequence[0].ImagePositionPatient for g in groups]
        else:
            images, positions = [ds.pixel_array], [ds.ImagePositionPatient]
        for image, position in zip(images, positions, strict=True):
            found[level_of(image)] = (str(ds.SOPInstanceUID), np.array(position, float))
    return found


def test_every_image_that_an_object_names_is_listed_once(pair):
    """PS3.3 C.12.2, which dciodvfy does not look at, and C.17.2 for the report."""
    sent = {
        pair.key(side): {str(ds.SOPInstanceUID): str(ds.SOPClassUID) for ds in slices}
        for side, slices in pair.slices.items()
    }
    ds = pydicom.dcmread(pair.registration)
    listed = iod.common_instance_reference(ds)
    assert listed.keys() == sent.keys()
    for key, uids in listed.items():
        assert set(uids) == set(sent[key]) and len(uids) == len(set(uids))
    assert iod.referenced(ds) == {uid for uids in sent.values() for uid in uids}
    for side in LEVELS:
        report = pydicom.dcmread(pair.report(side))
        (study,) = report.CurrentRequestedProcedureEvidenceSequence
        (series,) = study.ReferencedSeriesSequence
        assert (study.StudyInstanceUID, series.SeriesInstanceUID) == pair.key(side)
        items = series.ReferencedSOPSequence
        evidence = {i.ReferencedSOPInstanceUID: i.ReferencedSOPClassUID for i in items}
        assert evidence == sent[pair.key(side)] and len(items) == len(evidence)
        assert iod.referenced(report) <= set(evidence)


# After the bundle changed

RESCORED = {"many regions": "Japanese, ISO 2022", "no region": "plain"}


@pytest.fixture(scope="module")
def rescored(node, bundles, tmp_path_factory) -> dict[str, Pair]:
    """Name of a bundle -> a pair that it scored anew, with its new objects."""
    config, pairs = node
    found = {}
    for regions, name in RESCORED.items():
        anew = replace(pairs[name], folder=tmp_path_factory.mktemp("anew"))
        for side in LEVELS:
            uid = anew.series_uid(side)
            call("rescore", "--series", uid, "--model", bundles[regions], "--config", config)
        write_from_database(anew, config)
        found[regions] = anew
    return found


@pytest.mark.parametrize("regions", RESCORED)
def test_objects_of_a_curve_scored_anew_are_new_and_valid(node, rescored, regions, tmp_path):
    anew, before = rescored[regions], node[1][RESCORED[regions]]
    for file in anew.objects():
        assert dciodvfy(file) == []
    images = [in_utf8(file, before, tmp_path / f"{k}") for k, file in enumerate(before.images())]
    assert dcentvfy([*images, *before.objects(), *anew.objects()]) == []
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in (*before.objects(), *anew.objects())]
    assert len(set(uids)) == len(uids)


def test_a_report_has_a_group_for_each_region_however_many(node, rescored, bundles):
    counts = {}
    for regions in bundles:
        pair = rescored.get(regions, node[1]["UTF-8"])
        report = str(pydicom.dcmread(pair.report("follow-up")))
        counts[regions] = report.count("'Finding Site'")
        # One of them for the range of body heights.
        assert report.count("'Measurement Group'") == counts[regions] + 1
    # The lowest slice is at 20 mm: of the many the lowest few do not show.
    assert counts.pop("many regions") >= 15
    assert counts == {"two regions": 2, "no region": 0}


# Structured reports

# DicomSRValidator takes seconds to start and to read its rules: once for all files, this way.
MANY = """
import com.pixelmed.dicom.AttributeList;
import com.pixelmed.validate.DicomSRValidator;

public class Many {
    public static void main(String[] files) throws Exception {
        DicomSRValidator validator = new DicomSRValidator();
        for (String file : files) {
            AttributeList list = new AttributeList();
            list.read(file);
            System.out.println("FILE " + file);
            System.out.print(validator.validate(list));
        }
    }
}
"""
PIXELMED = "/usr/share/java/pixelmed.jar"
TITLE = "Found Root Template TID_1500 (MeasurementReport)"


def sr_validator(reports: Sequence[Path], folder: Path) -> dict[Path, list[str]]:
    """Return what DicomSRValidator finds in each report, what is only newer left out."""
    if shutil.which("DicomSRValidator") is None:
        pytest.skip("DicomSRValidator is not installed: .ci/run installs it")
    if shutil.which("javac"):
        (folder / "Many.java").write_text(MANY)
        told = run_tool("java", *JAVA.split(), "-cp", PIXELMED, folder / "Many.java", *reports)
        texts = {Path(part.split("\n")[0]): part for part in told.split("FILE ")[1:]}
    else:
        texts = {f: run_tool("DicomSRValidator", f, JAVA_TOOL_OPTIONS=JAVA) for f in reports}
    found = {}
    for file, text in texts.items():
        assert TITLE in text and "IOD validation complete" in text, text
        lines = (line for line in text.splitlines() if line.startswith(("Error", "Warning")))
        found[file] = [line for line in lines if not line.endswith(NEWER)]
    return found


@pytest.mark.slow
def test_the_sr_validator_finds_nothing_in_any_kind_of_report(node, folders, rescored, tmp_path):
    kinds = ("plain", "nothing of the patient but the ID", "Enhanced CT", "oblique")
    reports = [node[1][name].report("prior") for name in kinds]
    reports += [pair.report("prior") for pair in rescored.values()]
    reports += [folders[name].report("follow-up") for name in ("Japanese, ISO 2022", "Enhanced CT")]
    assert sr_validator(reports, tmp_path) == {file: [] for file in reports}


# Whatever comes together

NAMES = [k for k, v in KINDS.items() if v.both.keys() & {"SpecificCharacterSet", "PatientName"}]
SHAPES = {name: KINDS[name].shape for name in ("plain", "oblique", "prone", "Enhanced CT")}
FRAMES = ("its own", None, "1.2.99", "each")
words = st.text(st.characters(max_codepoint=126), max_size=20)  # any text: see test_objects.py


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=2),
    shapes=st.lists(st.sampled_from(list(SHAPES)), min_size=2, max_size=2),
    frames=st.lists(st.sampled_from(FRAMES), min_size=2, max_size=2),
    part=st.one_of(words, st.sampled_from(["CHEST", "BREAST", "ABDOMEN"])),
    study=words,
    timezone=st.sampled_from([None, "+0100", "-0330", "rubbish"]),
    shift=st.tuples(*[st.one_of(st.none(), st.floats(-2000, 2000))] * 2, st.floats(-2000, 2000)),
    sigma_mm=st.one_of(st.none(), st.floats(0, 500)),
)
def test_whatever_comes_together_the_objects_are_valid(
    tmp_path, names, shapes, frames, part, study, timezone, shift, sigma_mm
):
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    curves, images = [], []
    for k, (name, shape, frame) in enumerate(zip(names, shapes, frames, strict=True)):
        kind = KINDS[name]
        more = {**WHOLE, **kind.both, "TimezoneOffsetFromUTC": timezone, "PatientID": f"P{k}"}
        if frame != "its own":
            more["FrameOfReferenceUID"] = None if frame == "each" else frame
        slices = [ct_slice(f"1.2.{k}", level, **more) for level in range(8)]
        for ds in slices:
            ds.add(element("StudyDescription", study))
            ds.add(element("BodyPartExamined", part))
            if kind.raw_name is not None:
                ds["PatientName"] = pydicom.DataElement(0x00100010, "PN", kind.raw_name)
        if frame == "each":
            slices = _frame_of_reference_each(slices)
        shaped = SHAPES[shape](slices)
        for ds in shaped:
            images.append(folder / f"{len(images)}.dcm")
            images[-1].write_bytes(part10(ds))
        curves.append(straight_curve(f"1.2.{k}", shaped, len(slices)))
    found = files.sources([folder], curves)
    fixed, moving = (found[c.series_uid] for c in curves)
    dx_mm, dy_mm, z_mm = shift
    offset = Offset(Method.ROBUST, OffsetStatus.OK, z_mm, 10.0, sigma_mm, dx_mm=dx_mm, dy_mm=dy_mm)
    objects = [folder / "reg", *(folder / f"sr{k}" for k in range(2))]
    modules.save(registration(fixed, moving, offset, ORIGIN), objects[0])
    for file, made, side in zip(objects[1:], curves, (fixed, moving), strict=True):
        modules.save(coverage_report(side, made, TABLE, ORIGIN), file)
    for file in objects:
        assert dciodvfy(file) == []
        ds = pydicom.dcmread(file)
        assert iod.faults(ds, skipped=CONTENT if ds.Modality == "SR" else frozenset()) == []
        assert iod.bad_values(ds) == []
    assert dcentvfy(objects) == []


def straight_curve(series_uid: str, datasets: Sequence[Dataset], count: int) -> ScoreCurve:
    """Return a curve of `count` slices, 10 mm of body height apart, in these Instances."""
    uids = [str(ds.SOPInstanceUID) for ds in datasets]
    places = [(uids[k], 1) if len(uids) == count else (uids[0], k + 1) for k in range(count)]
    slices = [
        ScoredSlice(uid, (0, 0, 10.0 * k), (1, 0, 0, 0, 1, 0), score=1.0 * k, frame=frame)
        for k, (uid, frame) in enumerate(places)
    ]
    made = curve.assemble(slices, series_uid=series_uid, model="m", heights=HEIGHTS)
    assert isinstance(made, ScoreCurve)
    return made


def element(keyword: str, value: str) -> pydicom.DataElement:
    """Return an element whose value need not be one of its VR."""
    tag = pydicom.datadict.tag_for_keyword(keyword)
    vr = pydicom.datadict.dictionary_VR(tag)
    return pydicom.DataElement(tag, vr, value, validation_mode=pydicom.config.IGNORE)
