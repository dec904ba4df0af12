"""Merged patients and rejected Series, in pages, REST and files: what is one is shown as one."""

import csv
import re
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

import httpx2 as httpx
import pytest
from sqlalchemy import Engine

from dicomnode import export, manifest, mining, store
from dicomnode.audit import AuditLog
from dicomnode.core import region
from dicomnode.model import PatientKey, Rejection
from dicomnode.node.align import AlignStage
from dicomnode.node.assemble import AssembleStage
from dicomnode.store import LinkSource
from dicomnode.web.patients import PatientKeys
from tests import served
from tests.integration.test_store import sop_uid
from tests.served import FIXED, FIXED_SERIES, MOVING, MOVING_SERIES, OTHER_PATIENT, PATIENT, T0

# A key that a merge alone names: nothing came under it.
EMPTY = PatientKey("CANARY-3", "HOSPITAL")
ELSEWHERE = PatientKey(PATIENT.patient_id, "CLINIC")
THIRD = "1.2.50"
THIRD_SERIES = f"{THIRD}.1"
REGIONS = region.from_manifest(manifest.read_manifest(None))


def link(engine: Engine, merged: PatientKey, into: PatientKey) -> None:
    with store.writing(engine) as session:
        store.link_patients(session, merged, into, LinkSource.CLI, T0)
    align(engine)


def align(engine: Engine) -> None:
    while AlignStage(engine).step():
        pass


def reject(engine: Engine, series_uid: str, study_uid: str, count: int) -> None:
    """Let a note take a Series back, and finish it without."""
    uids = frozenset(sop_uid(series_uid, k) for k in range(count))
    note = Rejection(
        "1.9.1", study_uid, "113001", uids, frozenset({study_uid}), frozenset({series_uid})
    )
    with store.writing(engine) as session:
        assert store.record_rejection(session, note, "b" * 16, T0).instances == count
    later = datetime.now(UTC) + timedelta(days=1)
    AssembleStage(engine, 5.0, 600.0, AuditLog(None)).step(later, later)
    align(engine)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A page over three Studies of a patient of two keys, of which one is nobody's Series'."""
    folder = tmp_path_factory.mktemp("merged")
    url = f"sqlite:///{folder / 'node.sqlite'}"
    served.make(url)
    with store.opened(url) as engine:
        served.stack(engine, THIRD_SERIES, THIRD, ELSEWHERE, datetime(2024, 7, 1, 8, 0), 15.0)
        link(engine, EMPTY, ELSEWHERE)
        link(engine, ELSEWHERE, PATIENT)
        with served.page(folder, url) as page:
            yield page, engine


@pytest.fixture
def reader(merged):
    page, _ = merged
    with page.http() as http:
        yield http


def key_of(page: served.Page, patient: PatientKey) -> str:
    key = PatientKeys.of(page.settings.patient_key_file).key(patient)
    assert key is not None
    return key


def found_by(http: httpx.Client, patient_id: str) -> httpx.Response:
    form = re.search(r'name="form" value="([0-9a-f]+)"', http.get("/mine").text)
    assert form is not None
    return http.post("/patients", data={"form": form[1], "patient_id": patient_id})


@pytest.mark.parametrize("patient", [PATIENT, ELSEWHERE, EMPTY], ids=["own", "issuer", "empty"])
def test_every_key_of_a_merged_patient_leads_to_all_of_it(merged, reader, patient):
    key = key_of(merged[0], patient)
    page = reader.get(f"/patients/{key}").text
    assert {FIXED_SERIES, MOVING_SERIES, THIRD_SERIES} <= set(
        re.findall(r"/series/([0-9.]+)", page)
    )
    assert page.count('class="bar"') == 3 and page.count('class="link"') == 3
    assert "Merged with" in page and EMPTY.patient_id in page and PATIENT.patient_id in page
    timeline = reader.get(f"/api/v1/patients/{key}/timeline").json()
    assert [s["study_uid"] for s in timeline["studies"]] == [THIRD, MOVING, FIXED]
    assert len(timeline["pairs"]) == 3
    listed = reader.get("/api/v1/series", params={"patient": key}).json()["series"]
    assert {s["series_uid"] for s in listed} == {FIXED_SERIES, MOVING_SERIES, THIRD_SERIES}


def test_a_patient_id_of_merged_keys_leads_to_the_one_patient(merged, reader):
    for patient_id in (PATIENT.patient_id, EMPTY.patient_id):
        answer = found_by(reader, patient_id)
        assert answer.status_code == 303, patient_id  # and no list of issuers
        assert reader.get(answer.headers["location"]).text.count('class="bar"') == 3


def test_a_page_of_a_patient_who_was_not_merged_says_nothing_of_it(merged, reader):
    page = reader.get(f"/patients/{key_of(merged[0], OTHER_PATIENT)}").text
    assert "Merged with" not in page and FIXED_SERIES not in page


def test_merged_keys_have_one_pseudonym_and_move_by_one_time(merged, tmp_path):
    _, engine = merged
    with store.reading(engine) as session:
        asked = mining.parse("slices > 50", REGIONS, store.mining_tables(session))
    paths = {"series": tmp_path / "series.csv", "pairs": tmp_path / "pairs.csv"}
    export.write(engine, asked, REGIONS, **paths, pseudonyms=export.Pseudonyms(b"k" * 32))
    series, pairs = (list(csv.DictReader(path.read_text().splitlines())) for path in paths.values())
    (name,) = {row["PatientID"] for row in (*series, *pairs)}
    assert len(series) == 3 and len(pairs) == 9
    days = sorted(date.fromisoformat(row["StudyDate"]) for row in series)
    assert [b - a for a, b in pairwise(days)] == [
        timedelta(days=243), timedelta(days=310)
    ]  # fmt: skip
    assert name and not {PATIENT.patient_id, ELSEWHERE.patient_id} & {name}


def test_one_key_stands_for_all_of_a_patient(engine):
    a, b, c, alone = (PatientKey(name, "H") for name in ("A", "B", "C", "D"))
    link(engine, c, b)
    link(engine, b, a)
    nobody = PatientKey("")
    with store.reading(engine) as session:
        found = store.first_keys(session, [c, b, alone, nobody])
        assert found == {c: a, b: a, alone: alone, nobody: nobody}
        assert store.first_keys(session, []) == {}


def test_a_series_that_was_taken_back_shows_neither_curve_nor_pair(tmp_path):
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    served.make(url)
    with store.opened(url) as engine, served.page(tmp_path, url) as page, page.http() as http:
        pair = f"/studies/{FIXED}/offsets/{MOVING}"
        key = key_of(page, PATIENT)
        assert http.get(pair).status_code == 200
        reject(engine, MOVING_SERIES, MOVING, 100)
        for path in (pair, f"/api/v1{pair}", f"/api/v1{pair}/registration",
                     f"/api/v1/series/{MOVING_SERIES}/curve",
                     f"/api/v1/series/{MOVING_SERIES}/view?region=liver",
                     f"/series/{MOVING_SERIES}/strip.png",
                     f"/series/{MOVING_SERIES}/slices/0.png"):  # fmt: skip
            assert http.get(path).status_code == 404, path
        shown = http.get(f"/series/{MOVING_SERIES}").text
        assert "No curve" in shown and "rejected" in shown and "chart-data" not in shown
        patient = http.get(f"/patients/{key}").text
        assert patient.count('class="bar"') == 1 and 'class="link"' not in patient
        timeline = http.get(f"/api/v1/patients/{key}/timeline").json()
        assert timeline["pairs"] == []
        states = {s["series_uid"]: s["height_mm"] for study in timeline["studies"]
                  for s in study["series"]}  # fmt: skip
        assert states[MOVING_SERIES] is None and states[FIXED_SERIES] is not None
        for q, found in (("slices > 50", 1), ("prior()", 0), ("state = curve", 3),
                         ("reason = rejected", 1)):  # fmt: skip
            assert http.get("/api/v1/coverage/count", params={"q": q}).json() == {"series": found}
        assert MOVING_SERIES not in http.get(
            "/api/v1/coverage", params={"q": "slices > 50", "format": "csv"}
        ).text  # fmt: skip
