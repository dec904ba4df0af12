"""The REST interface over real sockets, on both databases: what it answers."""

import contextlib
import csv
import io
from collections.abc import Iterator

import httpx2 as httpx
import pydicom
import pytest
from pyarrow import parquet
from sqlalchemy import Engine, delete

from db import engine as engines
from db import schema
from dicomnode import present, query, store
from dicomnode.model import Method, PatientKey
from tests import served
from tests.conftest import postgres_database
from tests.dicom import PATIENT_ID, leaks
from tests.served import FIXED, FIXED_SERIES, MOVING, MOVING_SERIES, OTHER_SERIES, Page

API = "/api/v1"


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def page(request, tmp_path_factory) -> Iterator[Page]:
    """A page over a database that no test here changes."""
    folder = tmp_path_factory.mktemp("page")
    with contextlib.ExitStack() as stack:
        url = f"sqlite:///{folder / 'node.sqlite'}"
        if request.param == "postgres":
            server = request.getfixturevalue("postgres_url")
            url = stack.enter_context(postgres_database(server))
        served.make(url)
        yield stack.enter_context(served.page(folder, url))


@pytest.fixture
def node(page: Page) -> Iterator[Engine]:
    engine = engines.create(page.settings.database.url)
    yield engine
    engine.dispose()


@pytest.fixture
def http(page: Page) -> Iterator[httpx.Client]:
    with page.http() as client:
        yield client


def get(http: httpx.Client, path: str, **params):
    answer = http.get(API + path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_everything_over_rest_is_what_the_command_line_says(http, page, node):
    (row,) = _rows(node, FIXED_SERIES)
    told = get(http, f"/series/{FIXED_SERIES}")
    key = told.pop("patient_key")
    expected = present.series_json(row)
    assert _plain(told) == _plain(expected)

    found = query.series_curve(node, FIXED_SERIES)
    assert get(http, f"/series/{FIXED_SERIES}/curve") == present.curve_json(
        found.curve, found.regions
    )
    view = query.view(node, FIXED_SERIES, "liver")
    assert get(http, f"/series/{FIXED_SERIES}/view", region="liver") == present.view_json(view)

    for method in (None, *Method):
        pair = query.pair(node, FIXED, MOVING, method)
        params = {"method": method} if method else {}
        told = get(http, f"/studies/{FIXED}/offsets/{MOVING}", **params)
        assert _plain(told) == _plain(present.offset_json(pair.stored))
    told = get(http, f"/studies/{FIXED}/slices/{MOVING}")
    known = present.map_json(query.slice_map(node, FIXED, MOVING))
    assert told["slices"] == known["slices"] and told["line"] == known["line"]

    timeline = get(http, f"/patients/{key}/timeline")
    assert [s["study_uid"] for s in timeline["studies"]] == [MOVING, FIXED]
    assert timeline["complete"] and timeline["patient_key"] == key
    assert [(p["fixed"]["study_uid"], p["moving"]["study_uid"]) for p in timeline["pairs"]] == [
        (FIXED, MOVING)
    ]
    assert timeline["pairs"][0]["offset_mm"] == pytest.approx(served.SHIFT_MM, abs=1.0)


def test_no_member_of_an_answer_gets_lost(http, page, node):
    """What the command line prints and the models do not know would be dropped in silence."""
    (row,) = _rows(node, FIXED_SERIES)
    assert set(get(http, f"/series/{FIXED_SERIES}")) == {*present.series_json(row), "patient_key"}
    (match, *_) = get(http, "/coverage", q="covers(liver, 0.5)")["series"]
    with store.reading(node) as session:
        (known,) = store.matches(session, [store.newest_id(session)])
    assert set(match) == {*present.match_json(known), "patient_key"}
    with page.http("admin") as admin, store.reading(node) as session:
        (delivery,) = get(admin, "/deliveries", limit=1)["deliveries"]
        assert set(delivery) == set(present.delivery_json(store.list_deliveries(session)[0]))


def test_series_are_found_by_what_is_asked_and_page_by_page(http):
    every = get(http, "/series")["series"]
    assert len(every) == 5
    pages, before = [], None
    while True:
        page = get(http, "/series", limit=2, **({"before": before} if before else {}))
        pages.append([s["series_uid"] for s in page["series"]])
        before = page["next"]
        if before is None:
            break
    assert [len(p) for p in pages] == [2, 2, 1]
    assert [uid for p in pages for uid in p] == [s["series_uid"] for s in every]

    def uids(**params):
        return {s["series_uid"] for s in get(http, "/series", **params)["series"]}

    key = next(s["patient_key"] for s in every if s["series_uid"] == FIXED_SERIES)
    assert uids(patient=key) == {FIXED_SERIES, MOVING_SERIES}
    assert uids(study=FIXED) == {FIXED_SERIES}
    assert uids(state="open") == {served.OPEN_SERIES}
    assert uids(state="ignored") == {served.REFUSED_SERIES}
    assert uids(covers="liver,0.9") == {FIXED_SERIES, MOVING_SERIES}
    assert uids(covers="pelvis,0.3") == {FIXED_SERIES, MOVING_SERIES, OTHER_SERIES}
    assert uids(covers=["pelvis,0.3", "chest"]) == {FIXED_SERIES, MOVING_SERIES}
    assert uids(patient=key, covers="liver", state="curve", study=MOVING) == {MOVING_SERIES}


def test_an_expression_is_answered_as_page_count_histogram_and_files(http):
    q = "covers(liver, 0.9)"
    page = get(http, "/coverage", q=q)
    assert {m["series_uid"] for m in page["series"]} == {FIXED_SERIES, MOVING_SERIES}
    assert get(http, "/coverage/count", q=q) == {"series": 2}
    assert get(http, "/coverage/histogram", q=q)["series"] == 2
    text = http.get(f"{API}/coverage", params={"q": q, "format": "csv"})
    assert text.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(text.text)))
    assert {r["SeriesInstanceUID"] for r in rows} == {FIXED_SERIES, MOVING_SERIES}
    binary = http.get(f"{API}/coverage", params={"q": q, "format": "parquet"})
    table = parquet.read_table(io.BytesIO(binary.content))
    assert set(table["SeriesInstanceUID"].to_pylist()) == {FIXED_SERIES, MOVING_SERIES}
    assert set(table.column_names) == set(rows[0])


def test_an_error_of_an_expression_points_at_the_character(http):
    answer = http.get(f"{API}/coverage", params={"q": "covers(livr, 0.9)"})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    told = answer.json()
    assert told["position"] == 7 and "did you mean liver?" in told["detail"]
    assert told["excerpt"].splitlines()[1].index("^") == len("  covers(")


def test_a_patient_is_named_in_a_body_alone(http, page):
    for q in (f"patient_id = '{PATIENT_ID}'", "not issuer ~ hosp"):
        for path in ("/coverage", "/coverage/count", "/coverage/histogram"):
            answer = http.get(API + path, params={"q": q})
            assert answer.status_code == 422 and "POST" in answer.json()["detail"]
    answer = http.post(f"{API}/coverage", json={"q": f"patient_id = '{PATIENT_ID}'"})
    assert {m["series_uid"] for m in answer.json()["series"]} == {FIXED_SERIES, MOVING_SERIES}
    (found,) = http.post(f"{API}/patients/lookup", json={"patient_id": PATIENT_ID}).json()
    assert found["issuer"] == "HOSPITAL" and not leaks(found["patient_key"])
    assert get(http, f"/patients/{found['patient_key']}/timeline")["studies"]
    assert http.post(f"{API}/patients/lookup", json={"patient_id": "nobody"}).json() == []
    assert not leaks(page.audit())


def test_a_pair_is_downloaded_as_transform_and_registration(http):
    offset = get(http, f"/studies/{FIXED}/offsets/{MOVING}")
    text = http.get(f"{API}/studies/{FIXED}/offsets/{MOVING}/transform")
    assert text.headers["content-disposition"] == f'attachment; filename="{FIXED}-{MOVING}.tfm"'
    (line,) = [row for row in text.text.splitlines() if row.startswith("Parameters:")]
    assert float(line.split()[3]) == pytest.approx(-offset["offset_mm"])
    answer = http.get(f"{API}/studies/{FIXED}/offsets/{MOVING}/registration")
    assert answer.headers["content-type"] == "application/dicom"
    ds = pydicom.dcmread(io.BytesIO(answer.content))
    matrix = ds.RegistrationSequence[-1].MatrixRegistrationSequence[0].MatrixSequence[0]
    values = matrix.FrameOfReferenceTransformationMatrix
    assert float(values[11]) == pytest.approx(offset["offset_mm"], abs=1e-4)


@pytest.mark.parametrize(
    "path",
    [
        f"/series/{FIXED_SERIES}",
        f"/series/{FIXED_SERIES}/curve",
        f"/series/{FIXED_SERIES}/view?region=liver",
        f"/studies/{FIXED}/offsets/{MOVING}",
        f"/studies/{FIXED}/slices/{MOVING}",
        f"/studies/{MOVING}/offsets/{FIXED}",  # worked out when asked
    ],
)
def test_what_did_not_change_is_not_sent_again(http, path):
    first = http.get(API + path)
    tag = first.headers["etag"]
    again = http.get(API + path, headers={"If-None-Match": f'"other", {tag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == tag
    assert http.get(API + path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_curve_that_was_revised_has_another_tag(http, node):
    path = f"{API}/series/1.2.50.1/curve"
    served.stack(node, "1.2.50.1", "1.2.50", PatientKey(""), None, 0.0, count=30)
    tag = http.get(path).headers["etag"]
    served.stack(node, "1.2.50.1", "1.2.50", PatientKey(""), None, 0.0, count=31)
    answer = http.get(path, headers={"If-None-Match": tag})
    assert answer.status_code == 200 and len(answer.json()["slices"]) == 31
    with store.writing(node) as session:
        session.execute(delete(schema.Series).where(schema.Series.series_uid == "1.2.50.1"))


def test_what_is_not_there_is_told_as_such(http, page):
    for path, status in {
        "/series/1.9": 404,
        "/series/1.9/curve": 404,
        f"/series/{served.OPEN_SERIES}/curve": 404,
        f"/series/{FIXED_SERIES}/view?region=nose": 422,
        f"/studies/1.9/offsets/{MOVING}": 404,
        f"/studies/{FIXED}/offsets/{MOVING}?method=guess": 422,
        f"/studies/1.9/slices/{MOVING}": 404,
        "/patients/AAAA/timeline": 404,
        "/series?patient=AAAA": 404,
        "/series?state=gone": 422,
        "/series?covers=liver'": 422,
        "/series?covers=nose": 422,
        "/series?limit=1001": 422,
        "/nothing": 404,
    }.items():
        answer = http.get(API + path)
        assert answer.status_code == status, path
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == status and answer.json()["detail"]


def test_deliveries_are_for_admins(page):
    with page.http("read") as http:
        assert http.get(f"{API}/deliveries").status_code == 403
    with page.http("admin") as http:
        first = get(http, "/deliveries", limit=4)
        rest = get(http, "/deliveries", limit=4, before=first["next"])
        assert (len(first["deliveries"]), len(rest["deliveries"]), rest["next"]) == (4, 2, None)
        (pair,) = get(http, "/deliveries", subject=FIXED)["deliveries"]
        assert (pair["kind"], pair["other"], pair["state"]) == ("registration", MOVING, "waiting")
        assert get(http, "/deliveries", state="done")["deliveries"] == []


def test_long_answers_are_compressed(http):
    path = f"{API}/series/{FIXED_SERIES}/curve"
    short = http.get(path, headers={"Accept-Encoding": "gzip"})
    assert short.headers["content-encoding"] == "gzip"
    packed = http.get(f"{API}/coverage?q=slices>1&format=parquet")  # by itself
    assert "content-encoding" not in packed.headers
    whole = http.get(path, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in whole.headers and short.json() == whole.json()


def _rows(engine: Engine, series_uid: str):
    with store.reading(engine) as session:
        return store.list_series(session, series_uid=series_uid)


def _plain(value):
    """Times in one spelling, tuples as lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.replace("+00:00", "Z") if isinstance(value, str) else value
