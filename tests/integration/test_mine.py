"""`dicomnode mine` and its files, as docs/mining.md has them, and bpreg's JSON."""

import csv
import json
import re
import subprocess
import sys
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from click.testing import CliRunner
from pyarrow import parquet
from sqlalchemy import Engine, delete

from db import engine as engines
from db import migrate, schema
from dicomnode import bpreg, export, mining, store, weights
from dicomnode.cli import main
from dicomnode.core import region
from dicomnode.errors import ConfigError, WeightsError
from dicomnode.manifest import read_manifest
from dicomnode.mining import FIELDS, FUNCTIONS
from dicomnode.model import Flag, Method, Offset, OffsetStatus, PatientKey, Quality, ScoreCurve
from tests.integration.test_store import MODEL, T0, add_curve, manifest, record, refused

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "mining.md").read_text()
REGIONS = region.from_manifest(read_manifest())
KEY = "0123456789abcdef0123456789abcdef"
DAY = datetime(2024, 3, 1, 9, 30)
# Heights are 5 mm a slice from 0 up: 60 slices reach over the liver.
WIDE, LATER, SHORT, OTHER = "1.2.10", "1.2.11", "1.2.12", "1.2.13"


def examples(kind: str) -> list[str]:
    return [e.strip() for e in re.findall(rf"```{kind}\n(.*?)```", DOCUMENT, re.DOTALL)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a node.toml, whose database has some Series."""
    folder: Path = tmp_path_factory.mktemp("node")
    url = f"sqlite:///{folder}/node.sqlite"
    (folder / "node.toml").write_text(
        f'[spool]\npath = "{folder}/spool"\n[database]\nurl = "{url}"\n'
    )
    engine = engines.create(url)
    migrate.upgrade(engine)
    with store.writing(engine) as session:
        values = {**manifest(), "regions": [r.to_dict() for r in REGIONS]}
        store.record_model(session, MODEL, values, T0)
    tags = {"manufacturer": "SIEMENS", "body_part_examined": "CHEST"}
    add_curve(engine, WIDE, count=60, study_datetime=DAY, **tags)
    add_curve(engine, LATER, count=90, study_datetime=DAY + timedelta(days=40))
    add_curve(engine, SHORT, count=12, patient=PatientKey("P2"), study_datetime=None)
    record(engine, [refused(OTHER, 0)])
    with store.writing(engine) as session:
        found = session.query(schema.Series).filter_by(series_uid=OTHER).one()
        found.state, found.reason = "ignored", "localizer"
    with store.reading(engine) as session:
        pending = store.pending_offsets(session, 10)
    with store.writing(engine) as session:
        for p in pending:
            status = OffsetStatus.OK if p.method is Method.L1 else OffsetStatus.REFUSED
            offset = Offset(p.method, status, offset_mm=-12.5 if status == "ok" else None)
            store.store_offsets(session, [(p, offset, 0.1)], T0)
    engine.dispose()
    return folder


@pytest.fixture
def engine(folder):
    engine = engines.create(f"sqlite:///{folder}/node.sqlite")
    yield engine
    engine.dispose()


def call(folder: Path, *arguments: object, code: int = 0) -> Any:
    command = ["mine", *map(str, arguments), "--config", str(folder / "node.toml")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == code, result.output
    return result


def found(folder: Path, *arguments: object) -> list[str]:
    answer = json.loads(call(folder, *arguments, "--json").stdout)
    return [s["series_uid"] for s in answer["series"]]


def test_series_are_found_newest_first_and_page_by_page(folder):
    assert found(folder, "covers(liver, 0.9)") == [LATER, WIDE]
    assert found(folder, "slices > 0") == [SHORT, LATER, WIDE]
    first = json.loads(call(folder, "slices > 0", "--limit", 2, "--json").stdout)
    assert len(first["series"]) == 2 and first["next"] is not None
    rest = json.loads(call(folder, "slices > 0", "--before", first["next"], "--json").stdout)
    assert [s["series_uid"] for s in rest["series"]] == [WIDE] and rest["next"] is None
    assert f"--before {first['next']}" in call(folder, "slices > 0", "--limit", 2).stderr


def test_a_found_series_tells_what_it_covers(folder):
    (match,) = json.loads(call(folder, f"series_uid = {WIDE}", "--json").stdout)["series"]
    assert (match["slices"], match["spacing_mm"], match["state"]) == (60, 5.0, "curve")
    assert match["height_mm"] == [-2.5, 297.5]
    shares = {c["region"]: c["fraction"] for c in match["coverage"]}
    assert shares["liver"] == 1 and shares["thyroid"] == 0
    text = call(folder, f"series_uid = {WIDE}").stdout
    assert "liver" not in text.splitlines()[0] and "abdomen" in text and "2024-03-01" in text


def test_count_histogram_and_sql(folder):
    assert call(folder, "slices > 0", "--count").stdout == "3\n"
    assert json.loads(call(folder, "slices > 0", "--count", "--json").stdout) == {"series": 3}
    histogram = json.loads(call(folder, "slices > 0", "--histogram", "--json").stdout)
    assert histogram["series"] == 3
    # The three of them reach to 57.5, 297.5 and 447.5 mm.
    steps = {s["from_mm"]: s["series"] for s in histogram["steps"]}
    assert (steps[-20], steps[40], steps[60], steps[280], steps[300], steps[440]) == (
        3,
        3,
        2,
        2,
        1,
        1,
    )
    assert "█" in call(folder, "slices > 0", "--histogram").stdout
    sql = json.loads(call(folder, "manufacturer = 'x;y' and slices > 77", "--sql", "--json").stdout)
    assert "x;y" not in sql["sql"] and "77" not in sql["sql"]
    assert "x;y" in sql["parameters"].values() and 77 in sql["parameters"].values()
    assert "SELECT coverage.series_id" in call(folder, "slices > 77", "--sql").stdout


def test_what_is_not_found_or_not_understood_has_its_exit_status(folder):
    assert "no such Series" in call(folder, "slices > 1000", code=1).stderr
    assert call(folder, "slices > 1000", "--count", code=1).stdout == "0\n"
    wrong = call(folder, "covers(livr, 0.9)", code=2)
    assert wrong.stderr.splitlines()[-1] == "         ^"
    for options in (["--count", "--sql"], ["--pseudonyms", str(folder / "node.toml")]):
        assert "Usage" in call(folder, "slices > 0", *options, code=2).output
    call(folder, "slices > 0", "--out", folder / "x.xlsx", code=2)
    call(folder, "slices > 0", "--out", folder / "missing" / "x.csv", code=2)


# The document


@pytest.mark.parametrize("text", [line for e in examples("expression") for line in e.splitlines()])
def test_each_expression_of_the_document_is_one(folder, text):
    call(folder, text, "--sql")


def test_the_error_of_the_document_is_the_one_that_is_printed(folder):
    (shown,) = examples("error")
    text = shown.splitlines()[1].strip()
    printed = call(folder, text, code=2).stderr
    assert printed == f"Error: {shown}\n"


@pytest.mark.parametrize("word", [*FIELDS, *(f.usage for f in FUNCTIONS.values())])
def test_the_document_names_each_field_and_function(word):
    assert f"`{word}`" in DOCUMENT


def test_the_document_names_each_column():
    section = DOCUMENT.partition("## Export")[2]
    section = section.replace("Fixed- and\n  MovingStudy", "FixedStudyInstanceUID, MovingStudy")
    section = section.replace("Fixed- and MovingSeries", "FixedSeriesInstanceUID, MovingSeries")
    for column in (*export.SERIES, *export.SLICES, *export.PAIRS):
        assert re.search(rf"\b{column}\b", section), column


def test_the_queries_of_the_document_run_in_duckdb(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = (e for e in examples("sh") if "--slices" in e)
    arguments = re.findall(r"'[^']*'|\S+", command)[2:]
    call(folder, *(a.strip("'") for a in arguments))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "liver.parquet", "pairs.parquet", "slices.parquet"
    ]  # fmt: skip
    tags, pairs, nearest = (duckdb.sql(query).fetchall() for query in examples("sql"))
    # The chest, 192.1 to 428.1 mm, is reached to 297.5 by one and filled by the other.
    assert sorted(tags) == [("", 1, 1.0), ("CHEST", 1, 0.45)]
    assert pairs == [("P1", date(2024, 4, 10), "l1", -12.5)]
    # Slice 40 lies at 200 mm.
    assert nearest == [(WIDE, f"{WIDE}.41"), (LATER, f"{LATER}.41")]


def test_the_program_of_the_document_runs(folder, capsys):
    (program,) = examples("python")
    exec(program, {"url": f"sqlite:///{folder}/node.sqlite"})
    assert capsys.readouterr().out == f"2 ['{LATER}', '{WIDE}']\n"


# Files


def test_a_series_is_a_row_with_the_columns_of_idc(folder, tmp_path):
    out = tmp_path / "all.parquet"
    result = call(folder, "state in (curve, ignored)", "--out", out)
    assert f"4 rows in {out}" in result.stderr
    rows = {r["SeriesInstanceUID"]: r for r in parquet.read_table(out).to_pylist()}
    assert set(rows) == {WIDE, LATER, SHORT, OTHER}
    wide = rows[WIDE]
    assert list(wide)[: len(export.SERIES)] == list(export.SERIES)
    assert wide["PatientID"] == "P1" and wide["StudyDate"] == date(2024, 3, 1)
    assert wide["Modality"] == "CT" and wide["Manufacturer"] == "SIEMENS"
    assert wide["instanceCount"] == wide["slices"] == 60 and wide["bundle"] == MODEL
    assert wide["covers_liver"] == 1.0 and wide["covers_head"] is None
    assert wide["covers_lumbar_spine"] == 1.0 and wide["flags"] == []
    assert rows[SHORT]["StudyDate"] is None
    assert rows[OTHER]["reason"] == "localizer" and rows[OTHER]["slices"] is None


def test_csv_holds_what_parquet_holds(folder, tmp_path):
    for kind in ("csv", "parquet"):
        options = [
            x for k in ("out", "slices", "pairs") for x in (f"--{k}", tmp_path / f"{k}.{kind}")
        ]
        call(folder, "slices > 0", *options)
    for name in ("out", "slices", "pairs"):
        table = parquet.read_table(tmp_path / f"{name}.parquet")
        with open(tmp_path / f"{name}.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == table.num_rows > 0
        assert list(lines[0]) == table.column_names
        for line, row in zip(lines, table.to_pylist(), strict=True):
            for column, value in row.items():
                if isinstance(value, float):
                    assert float(line[column]) == pytest.approx(value, rel=1e-6)
                elif isinstance(value, list):
                    assert line[column] == ";".join(value)
                else:
                    assert line[column] == ("" if value is None else str(value))


def test_slices_and_pairs_are_those_of_the_store(folder, engine, tmp_path):
    call(folder, f"series_uid in ({WIDE}, {LATER})", "--slices", tmp_path / "s.parquet", "--pairs",
         tmp_path / "p.parquet")  # fmt: skip
    with store.reading(engine) as session:
        curves = store.curves_of(session, [WIDE, LATER])
    slices = parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert len(slices) == 150
    of_wide = [s for s in slices if s["SeriesInstanceUID"] == WIDE]
    assert [s["SOPInstanceUID"] for s in of_wide] == list(curves[WIDE].sop_instance_uids)
    assert [s["z_mm"] for s in of_wide] == curves[WIDE].z_mm.tolist()
    assert [s["height_mm"] for s in of_wide] == curves[WIDE].height_mm.tolist()
    pairs = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert {p["method"] for p in pairs} == set(Method) and len(pairs) == 3
    for p in pairs:
        assert (p["FixedSeriesInstanceUID"], p["MovingSeriesInstanceUID"]) == (LATER, WIDE)
        assert p["offset_mm"] == (-12.5 if p["method"] == "l1" else None)


def test_a_file_that_is_not_finished_does_not_appear(folder, engine, tmp_path, monkeypatch):
    out = tmp_path / "x.parquet"
    out.write_text("of before")

    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(export, "_series", fail)
    with pytest.raises(RuntimeError):
        export.write(engine, mining.parse("slices > 0", REGIONS, {}), REGIONS, series=out)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.parquet", "of before")]


def test_row_groups_are_gathered_over_windows(folder, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "GROUP", 100)
    monkeypatch.setattr(export, "CURVES", 1)
    out = tmp_path / "s.parquet"
    export.write(engine, mining.parse("slices > 0", REGIONS, {}), REGIONS, slices=out)
    file = parquet.ParquetFile(out)
    # 60 and 90 slices make a group, 12 are left.
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [150, 12]


# Pseudonyms


@pytest.fixture
def key(tmp_path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    return path


def test_no_name_is_left_under_pseudonyms_and_files_still_meet(folder, key, tmp_path):
    paths = {k: tmp_path / f"{k}.csv" for k in ("out", "slices", "pairs")}
    options = [x for k, path in paths.items() for x in (f"--{k}", path)]
    call(folder, "slices > 0", *options, "--pseudonyms", key)
    texts = {k: path.read_text() for k, path in paths.items()}
    for text in texts.values():
        assert not re.search(r"\bP1\b|\bP2\b|HOSPITAL|1\.2\.1[0-3]|2024-0[34]", text)
    rows = {k: list(csv.DictReader(text.splitlines())) for k, text in texts.items()}
    series = {r["SeriesInstanceUID"]: r for r in rows["out"]}
    assert set(series) == {r["SeriesInstanceUID"] for r in rows["slices"]}
    fixed, moving = (
        series[rows["pairs"][0][f"{end}SeriesInstanceUID"]] for end in ("Fixed", "Moving")
    )
    assert fixed["PatientID"] == moving["PatientID"] == rows["pairs"][0]["PatientID"]
    days = [date.fromisoformat(r["StudyDate"]) for r in (moving, fixed)]
    assert days[1] - days[0] == timedelta(days=40)
    assert days[1] < DAY.date()
    for uid in series:
        assert re.fullmatch(r"2\.25\.[1-9][0-9]*", uid) and len(uid) <= 64


def test_pseudonyms_are_those_of_their_key_alone(key):
    ours = export.Pseudonyms.of(key)
    other = export.Pseudonyms(b"another key of enough bytes")
    same = export.Pseudonyms(KEY.encode())
    p = PatientKey("P1", "A")
    assert ours.patient(p) == same.patient(p) != other.patient(p)
    assert ours.uid("1.2") == same.uid("1.2") != other.uid("1.2")
    assert len({ours.patient(PatientKey(*x)) for x in (("P1", "A"), ("P1A", ""), ("P", "1A"))}) == 3
    assert ours.patient(PatientKey("")) == "" and ours.uid("") == ""
    assert KEY not in repr(ours)


def test_a_key_that_can_be_guessed_is_refused(folder, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    wrong = call(
        folder, "slices > 0", "--out", tmp_path / "x.csv", "--pseudonyms", tmp_path / "key", code=2
    )
    assert "6 bytes" in wrong.stderr and not (tmp_path / "x.csv").exists()
    with pytest.raises(ConfigError, match="key of pseudonyms"):
        export.Pseudonyms.of(tmp_path)


# What `db upgrade` does with curves of before


def test_upgrade_covers_curves_of_before(tmp_path):
    url = f"sqlite:///{tmp_path}/node.sqlite"
    config = tmp_path / "node.toml"
    config.write_text(f'[spool]\npath = "{tmp_path}/spool"\n[database]\nurl = "{url}"\n')
    engine: Engine = engines.create(url)
    migrate.upgrade(engine)
    with store.writing(engine) as session:
        store.record_model(session, MODEL, manifest(), T0)
    add_curve(engine, WIDE)
    with store.writing(engine) as session:
        session.execute(delete(schema.Coverage))
    assert call(tmp_path, "slices > 0", "--count", code=1).stdout == "0\n"
    done = CliRunner().invoke(main, ["db", "upgrade", "--config", str(config)])
    assert done.exit_code == 0 and "what 1 curves cover was stored" in done.stderr
    assert call(tmp_path, "slices > 0", "--count").stdout == "1\n"
    again = CliRunner().invoke(main, ["db", "upgrade", "--config", str(config)])
    assert again.exit_code == 0 and "curves cover" not in again.stderr
    engine.dispose()


# bpreg


def curve(low_mm: float, high_mm: float, slope: float = 1.0, spacing: float = 2.5) -> ScoreCurve:
    """A curve from one body height to another, feet first."""
    n = int(abs(high_mm - low_mm) / spacing / abs(slope))
    z = 1000.0 + spacing * np.arange(n)
    height = low_mm + np.sign(high_mm - low_mm) * abs(slope) * spacing * np.arange(n)
    flags = (Flag.REVERSED,) if high_mm < low_mm else ()
    uids = tuple(f"1.2.{k}" for k in range(n))
    return ScoreCurve(
        "1.2", MODEL, z, (height / 10).astype(np.float32), height, uids, (1,) * n,
        Quality(1.0, slope, flags),
    )  # fmt: skip


# bpreg/settings/body-part-metadata.md, and VolumeStorage.json of bpreg/inference/inference_model.py
BPREG = {
    "cleaned slice scores", "z", "unprocessed slice scores", "body part examined",
    "body part examined tag", "look-up table", "reverse z-ordering", "valid z-spacing",
    "expected slope", "observed slope", "slope ratio", "expected z-spacing", "z-spacing",
    "settings",
}  # fmt: skip


def test_bpreg_has_its_names_and_its_scale():
    values = bpreg.metadata(curve(-120, 700), REGIONS)
    assert set(values) == BPREG
    n = len(values["z"])
    assert values["z"][:2] == [0.0, 2.5]
    assert len(values["cleaned slice scores"]) == len(values["unprocessed slice scores"]) == n
    assert values["z-spacing"] == 2.5 and values["valid z-spacing"] == 1.0
    assert values["observed slope"] == pytest.approx(values["expected slope"], rel=0.01)
    assert values["expected z-spacing"] == pytest.approx(2.5, rel=0.01)
    # Where the regions' ends are, bpreg's own scores are near.
    for name, score in (("pelvis_end", 28.8), ("lung_start", 44.1), ("lung_end", 75.4)):
        assert values["look-up table"][name]["mean"] == pytest.approx(score, abs=4)
    json.dumps(values, allow_nan=False)


def test_bpreg_says_which_slices_show_a_part():
    values = bpreg.metadata(curve(-120, 700), REGIONS)
    examined = values["body part examined"]
    assert set(examined) == {"legs", "pelvis", "abdomen", "chest", "shoulder-neck", "head"}
    assert examined["legs"] == [] and all(type(i) is float for i in examined["chest"])
    parts = [i for name in ("pelvis", "abdomen") for i in examined[name]]
    assert parts == sorted(parts) and len(parts) == len(set(parts))


@pytest.mark.parametrize(
    ("low", "high", "tag"),
    [
        (-126, 428, "CHEST-ABDOMEN-PELVIS"),
        (195, 425, "CHEST"),
        (-120, 255, "ABDOMEN-PELVIS"),
        (430, 760, "HEAD-NECK"),
        (250, 300, "CHEST"),  # no part's half is shown: the commonest
        (-600, -400, "NONE"),
    ],
)
def test_bpreg_tags_the_parts_from_the_head_down(low, high, tag):
    assert bpreg.metadata(curve(low, high), REGIONS)["body part examined tag"] == tag


def test_bpreg_knows_what_is_upside_down_or_badly_spaced():
    assert bpreg.metadata(curve(400, 0), REGIONS)["reverse z-ordering"] == 1.0
    stretched = bpreg.metadata(curve(0, 400, slope=2.0), REGIONS)
    assert stretched["slope ratio"] == pytest.approx(2.0, rel=0.02)
    assert stretched["valid z-spacing"] == 0.0
    assert stretched["body part examined tag"] == "NONE"


def test_bpreg_needs_regions():
    with pytest.raises(WeightsError, match="no regions"):
        bpreg.metadata(curve(0, 400), REGIONS[:1])


def test_score_writes_bpregs_files(tmp_path):
    from tests.integration.test_files import FOLLOW_UP, PRIOR, follow_up, prior, write
    from tests.integration.test_stages import brightness_bundle

    write(tmp_path / "CT" / "prior", *prior())
    write(tmp_path / "CT" / "follow-up", *follow_up())
    plain = brightness_bundle(tmp_path / "plain")
    made = tmp_path / "bundle"
    weights.save(
        made, plain.network, name="tabled", spec=plain.spec, heights=plain.heights, training={},
        regions=REGIONS,
    )  # fmt: skip
    command = ["score", str(tmp_path / "CT"), "--format", "bpreg", "--model", str(made)]
    printed = CliRunner().invoke(main, command)
    assert printed.exit_code == 0, printed.output
    values = json.loads(printed.stdout)
    assert set(values) == {PRIOR, FOLLOW_UP} and set(values[PRIOR]) == BPREG
    written = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "scores")])
    assert written.exit_code == 0, written.output
    for uid, expected in values.items():
        assert json.loads((tmp_path / "scores" / f"{uid}.json").read_text()) == expected
    for options in (["--out", "x"], ["--format", "bpreg", "--json"]):
        wrong = CliRunner().invoke(main, ["score", str(tmp_path / "CT"), *options])
        assert wrong.exit_code == 2


# Size

FLAT = """
import re, sys
from pathlib import Path
from db import engine as engines
from dicomnode import export, mining

engine = engines.create(sys.argv[1])
asked = mining.parse("slices > 0", (), {})
export.GROUP = export.CURVES = 2000
export.write(engine, asked, (), series=Path(sys.argv[2]))
# Not getrusage: its peak begins with that of the process that started this one.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: peaks are not told")
def test_memory_does_not_grow_with_what_is_exported(tmp_path):
    from benchmarks import archive

    peaks = []
    for count in (20_000, 80_000):
        url = f"sqlite:///{tmp_path}/{count}.sqlite"
        engine = engines.create(url)
        migrate.upgrade(engine)
        archive.fill(engine, count)
        engine.dispose()
        out = tmp_path / f"{count}.parquet"
        done = subprocess.run(
            [sys.executable, "-c", FLAT, url, out],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert parquet.ParquetFile(out).metadata.num_rows == count
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.15 * peaks[0], peaks
