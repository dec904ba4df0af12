"""The typed client, asked of a page that runs."""

import csv
from collections.abc import Iterator
from io import BytesIO

import pydicom
import pytest
from pyarrow import parquet

from dicomnode.client import Client, NodeUnavailable, RequestRefused
from dicomnode.errors import NodeError, TransientError
from dicomnode.model import DeliveryState, Method, OffsetStatus, SeriesState
from tests import served
from tests.dicom import PATIENT_ID
from tests.served import FIXED, FIXED_SERIES, MOVING, MOVING_SERIES, Page


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    url = f"sqlite:///{folder / 'node.sqlite'}"
    served.make(url)
    with served.page(folder, url) as found:
        yield found


@pytest.fixture
def node(page: Page) -> Iterator[Client]:
    with Client(page.url, page.tokens["admin"]) as found:
        yield found


def test_a_pair_is_asked_for_in_every_way(node):
    offset = node.offset(FIXED, MOVING)
    assert (offset.method, offset.status) == (Method.ROBUST, OffsetStatus.OK)
    assert offset.offset_mm == pytest.approx(served.SHIFT_MM, abs=1.0)
    assert node.offset(FIXED, MOVING, Method.L1).method is Method.L1
    matched = [m for m in node.slices(FIXED, MOVING).slices if m.moving]
    assert len(matched) > 90
    assert all(m.fixed.height_mm == pytest.approx(m.moving.height_mm, abs=5) for m in matched)
    assert node.transform(FIXED, MOVING).startswith(b"#Insight Transform File")
    ds = pydicom.dcmread(BytesIO(node.registration(FIXED, MOVING)))
    assert ds.StudyInstanceUID == FIXED


def test_series_are_asked_for(node):
    assert {s.series_uid for s in node.series(study_uid=FIXED)} == {FIXED_SERIES}
    (opened,) = node.series(state=SeriesState.OPEN)
    assert opened.state is SeriesState.OPEN and opened.scored == 12
    assert {s.series_uid for s in node.series(covers=["liver,0.9"])} == {
        FIXED_SERIES,
        MOVING_SERIES,
    }
    curve = node.curve(FIXED_SERIES)
    assert len(curve.slices) == 100 and curve.series_uid == FIXED_SERIES
    view = node.view(FIXED_SERIES, "liver")
    assert view.slice and view.code == "10200004"
    assert node.one_series(FIXED_SERIES).patient_id == PATIENT_ID
    assert "liver" in {r.region for r in node.regions()}


def test_a_patient_is_found_by_a_key(node):
    (found,) = node.patient_keys(PATIENT_ID)
    timeline = node.timeline(found.patient_key)
    assert [s.study_uid for s in timeline.studies] == [MOVING, FIXED]
    assert {s.series_uid for s in node.series(patient_key=found.patient_key)} == {
        FIXED_SERIES,
        MOVING_SERIES,
    }
    assert node.patient_keys(PATIENT_ID, "ELSEWHERE") == []


def test_expressions_are_asked(node, tmp_path):
    q = f"covers(liver, 0.9) and patient_id = '{PATIENT_ID}'"
    assert {m.series_uid for m in node.find(q)} == {FIXED_SERIES, MOVING_SERIES}
    assert node.count("covers(liver, 0.9)") == 2
    assert node.histogram("covers(liver, 0.9)").series == 2
    node.export(q, tmp_path / "found.csv")
    with open(tmp_path / "found.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    node.export(q, tmp_path / "found.parquet")
    assert parquet.read_table(tmp_path / "found.parquet").num_rows == 2
    with pytest.raises(RequestRefused, match="did you mean liver") as caught:
        node.count("covers(livr)")
    assert (caught.value.status, caught.value.position) == (422, 7)
    with pytest.raises(RequestRefused):
        node.export("covers(livr)", tmp_path / "none.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.csv", "found.parquet"]


def test_pages_are_one_iteration(node, monkeypatch):
    every = [s.series_uid for s in node.series()]
    matches = [m.series_uid for m in node.find("state in (open, curve, ignored)")]
    asked = []

    def counted(request):
        asked.append(request)

    node._http.event_hooks["request"].append(counted)
    send = node._send

    def in_pages_of_two(method, path, params=None, body=None):
        if body:
            body = {**body, "limit": 2}
        else:
            params = {**params, "limit": 2}
        return send(method, path, params, body)

    monkeypatch.setattr(node, "_send", in_pages_of_two)
    assert [s.series_uid for s in node.series()] == every and len(asked) == 3
    assert [m.series_uid for m in node.find("state in (open, curve, ignored)")] == matches
    assert [d.id for d in node.deliveries()] == sorted(range(1, 7), reverse=True)
    assert len(asked) == 9
    assert not list(node.deliveries(state=DeliveryState.DONE))


def test_what_goes_wrong_is_told_apart(page, node):
    with pytest.raises(RequestRefused) as caught:
        node.curve("1.9")
    assert caught.value.status == 404 and isinstance(caught.value, NodeError)
    with Client(page.url) as nobody, pytest.raises(RequestRefused) as caught:
        nobody.curve(FIXED_SERIES)
    assert caught.value.status == 401
    with Client("http://127.0.0.1:9") as nowhere, pytest.raises(NodeUnavailable) as away:
        nowhere.curve(FIXED_SERIES)
    assert isinstance(away.value, TransientError)
    assert node.readiness().checks["database"] is True
