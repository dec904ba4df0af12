"""QIDO-RS and WADO-RS: servers kind and odd, and what they send in our spool."""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pydicom
import pytest
from pydicom.uid import generate_uid

from dicomnode import checks
from dicomnode.config import Settings
from dicomnode.errors import ConfigError, PeerRefused, PeerUnavailable, SpoolFull
from dicomnode.model import PatientKey, SpooledEvent, SpooledInstance
from dicomnode.scu import dicomweb
from dicomnode.scu.archive import archive_of
from dicomnode.scu.move import Retrieved
from dicomnode.spool import Spool
from tests.dicom import ct_dataset, leaks, part10

STUDY, SERIES = generate_uid(None), generate_uid(None)
DATASETS = [
    ct_dataset(StudyInstanceUID=STUDY, SeriesInstanceUID=SERIES, PatientID="CANARY-ID")
    for _ in range(4)
]
FILES = [part10(ds) for ds in DATASETS]
Answer = tuple[int, dict[str, str], list[bytes]]


def dicom_json(**values: tuple[str, Any]) -> dict[str, Any]:
    return {tag: {"vr": vr, "Value": [v]} for tag, (vr, v) in values.items()}


STUDY_JSON = dicom_json(
    **{
        "0020000D": ("UI", STUDY),
        "00100020": ("LO", "CANARY-ID"),
        "00100021": ("LO", "HOSPITAL"),
        "00080020": ("DA", "20260105"),
        "00080061": ("CS", "CT"),
        "00201206": ("IS", 1),
        "00201208": ("IS", 4),
    }
)
SERIES_JSON = dicom_json(
    **{
        "0020000D": ("UI", STUDY),
        "0020000E": ("UI", SERIES),
        "00080060": ("CS", "CT"),
        "00201209": ("IS", 4),
    }
)


def related(files: list[bytes], end: bytes = b"\r\n--mark--") -> Answer:
    head = b"\r\n--mark\r\nContent-Type: application/dicom\r\n\r\n"
    content_type = 'multipart/related; type="application/dicom"; boundary=mark'
    return 200, {"Content-Type": content_type}, [head + file for file in files] + [end]


def as_json(answers: Any) -> Answer:
    return 200, {"Content-Type": "application/dicom+json"}, [json.dumps(answers).encode()]


class Server:
    """A DICOMweb server whose answers are set as it goes; it notes what it is asked."""

    def __init__(self) -> None:
        self.answer: Callable[[str, dict[str, str]], Answer] = self.kind
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.headers: list[dict[str, str]] = []

    def kind(self, path: str, query: dict[str, str]) -> Answer:
        """Answer as the standard has it."""
        if path == "/web/studies":
            return as_json([STUDY_JSON]) if query["offset"] == "0" else (204, {}, [])
        if path == f"/web/studies/{STUDY}/series":
            return as_json([SERIES_JSON]) if query["offset"] == "0" else as_json([])
        if path == f"/web/studies/{STUDY}/series/{SERIES}":
            return related(FILES)
        return 404, {}, []


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = dict(parse_qsl(url.query))
            told.asked.append((url.path, query))
            told.headers.append(dict(self.headers))
            status, headers, chunks = told.answer(url.path, query)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(sum(map(len, chunks))))
            self.end_headers()
            with contextlib.suppress(OSError):
                for chunk in chunks:
                    self.wfile.write(chunk)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield told, f"http://127.0.0.1:{http.server_port}/web"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def make_settings(tmp_path: Path, url: str, **more: Any) -> Settings:
    return Settings(
        spool={"path": tmp_path / "spool", "reserve_bytes": 0, "segment_bytes": 1 << 20},
        priors={"dicomweb": [{"name": "web", "url": url, **more}]},
    )


def opened(settings: Settings) -> Any:
    return archive_of(settings, "web").opened()


def spooled(settings: Settings) -> tuple[list[str], list[str]]:
    """Return SOP Instance UIDs, and kinds of ends, in the spool."""
    spool = Spool.of(settings.spool)
    with contextlib.closing(spool):
        entries = spool.pending(1000)
        instances = [e for e in entries if isinstance(e, SpooledInstance)]
        assert len({e.association_id for e in entries}) <= 1
        read = [pydicom.dcmread(BytesIO(bytes(spool.read(e)))) for e in instances]
        ends = [e.kind for e in entries if isinstance(e, SpooledEvent)]
        return [str(ds.SOPInstanceUID) for ds in read], ends


UIDS = [str(ds.SOPInstanceUID) for ds in DATASETS]


def test_studies_and_series_are_found(server, tmp_path):
    told, url = server
    with opened(make_settings(tmp_path, url)) as web:
        days = (date(2016, 1, 5), date(2026, 1, 5))
        (study,) = web.find_studies(patient_id="A&B/C #1=Ä%41", days=days, most=100)
        (series,) = web.find_series(STUDY, SERIES)
    assert (study.study_uid, study.patient) == (STUDY, PatientKey("CANARY-ID", "HOSPITAL"))
    assert (study.study_date, study.modalities, study.instances) == (days[1], ("CT",), 4)
    assert (series.series_uid, series.modality, series.instances) == (SERIES, "CT", 4)
    path, query = told.asked[0]
    assert path == "/web/studies"
    assert query["PatientID"] == "A&B/C #1=Ä%41"
    assert (query["StudyDate"], query["ModalitiesInStudy"]) == ("20160105-20260105", "CT")
    assert not list(tmp_path.iterdir())  # a question makes no spool


def test_a_series_goes_into_the_spool_whole_and_its_end_with_it(server, tmp_path):
    told, url = server
    settings = make_settings(tmp_path, url)
    with opened(settings) as web:
        assert web.retrieve(STUDY, SERIES) == Retrieved(4, 0, 0)
    assert spooled(settings) == (UIDS, ["released"])
    assert "transfer-syntax=*" in told.headers[-1]["Accept"]


def test_answers_come_page_by_page(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb, "PAGE", 2)
    told, url = server
    many = [dicom_json(**{"0020000D": ("UI", f"1.2.{n}")}) for n in range(1, 6)]

    def pages(path: str, query: dict[str, str]) -> Answer:
        at = int(query["offset"])
        return as_json(many[at : at + int(query["limit"])])

    told.answer = pages
    with opened(make_settings(tmp_path, url)) as web:
        found = web.find_studies(most=100)
    assert [s.study_uid for s in found] == [f"1.2.{n}" for n in range(1, 6)]
    told.answer = lambda path, query: as_json(many)  # knows no pages
    with opened(make_settings(tmp_path, url)) as web:
        assert len(web.find_studies(most=100)) == 5


def test_more_answers_than_can_be_are_refused(server, tmp_path):
    told, url = server
    told.answer = lambda path, query: as_json(
        [dicom_json(**{"0020000D": ("UI", f"1.2.{query['offset']}")})] * 50
    )
    with opened(make_settings(tmp_path, url)) as web:
        with pytest.raises(PeerRefused, match="more than 120 times"):
            web.find_studies(patient_id="CANARY-ID", most=120)


def test_a_token_or_user_and_password_go_with_each_request(server, tmp_path):
    told, url = server
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    with opened(make_settings(tmp_path, url, token_file=secret)) as web:
        web.find_series(STUDY)
    assert told.headers[-1]["Authorization"] == "Bearer s3cret"
    with opened(make_settings(tmp_path, url, user="me", password_file=secret)) as web:
        web.find_series(STUDY)
    assert told.headers[-1]["Authorization"].startswith("Basic ")
    secret.write_text("")
    with pytest.raises(ConfigError, match="token_file"):
        opened(make_settings(tmp_path, url, token_file=secret)).__enter__()


def test_a_redirect_is_not_followed_with_our_token(server, tmp_path):
    told, url = server
    told.answer = lambda path, query: (302, {"Location": "http://127.0.0.1:9/"}, [])
    with opened(make_settings(tmp_path, url)) as web:
        with pytest.raises(PeerRefused, match="redirects are not followed"):
            web.find_series(STUDY)


@pytest.mark.parametrize("status", [401, 403, 404, 406, 500, 503])
def test_a_refusal_is_told(server, tmp_path, status):
    told, url = server
    told.answer = lambda path, query: (status, {}, [b"CANARY-ID is not known"])
    settings = make_settings(tmp_path, url)
    with opened(settings) as web:
        with pytest.raises(PeerRefused, match=f"HTTP {status}") as found:
            web.find_studies(patient_id="CANARY-ID", most=10)
        assert not leaks(str(found.value))
        with pytest.raises(PeerRefused, match=f"HTTP {status}"):
            web.retrieve(STUDY, SERIES)
    assert spooled(settings) == ([], [])


@pytest.mark.parametrize("text", [b"<html>", b'{"a": 1}', b"[1]", b"\xff"])
def test_what_is_no_dicom_json_is_refused(server, tmp_path, text):
    told, url = server
    told.answer = lambda path, query: (200, {}, [text])
    with opened(make_settings(tmp_path, url)) as web, pytest.raises(PeerRefused, match="JSON"):
        web.find_series(STUDY)


def test_damaged_answers_name_no_study(server, tmp_path):
    told, url = server
    bad = [{"0020000D": 5}, {"0020000D": {"vr": "UI", "Value": ["CANARY-ID"]}}, {"x": {}}, {}]
    told.answer = lambda path, query: as_json(bad if query["offset"] == "0" else [])
    with opened(make_settings(tmp_path, url)) as web:
        assert web.find_studies(most=10) == []


def test_what_breaks_off_is_kept_as_far_as_it_came(server, tmp_path):
    told, url = server
    told.answer = lambda path, query: related(FILES, end=b"")
    settings = make_settings(tmp_path, url)
    with opened(settings) as web:
        got = web.retrieve(STUDY, SERIES)
    assert (got.completed, got.failed) == (3, 0)
    assert "breaks off" in got.reason
    assert spooled(settings) == (UIDS[:3], ["aborted"])


def test_what_is_no_dicom_file_is_counted(server, tmp_path):
    told, url = server
    told.answer = lambda path, query: related([FILES[0], b"not DICOM", FILES[1]])
    settings = make_settings(tmp_path, url)
    with opened(settings) as web:
        got = web.retrieve(STUDY, SERIES)
    assert (got.completed, got.failed, got.reason) == (2, 1, "1 of 3 parts are no DICOM file")
    assert spooled(settings) == (UIDS[:2], ["released"])


def test_an_empty_series_is_a_refusal(server, tmp_path):
    told, url = server
    told.answer = lambda path, query: related([])
    with opened(make_settings(tmp_path, url)) as web:
        with pytest.raises(PeerRefused, match="no Instance"):
            web.retrieve(STUDY, SERIES)


def test_a_full_disk_stops_it_and_says_so(server, tmp_path, monkeypatch):
    _, url = server
    settings, put, taken = make_settings(tmp_path, url), Spool.put, []

    def full(self: Spool, data: Any, association_id: str) -> Any:
        if len(taken) == 2:
            raise SpoolFull("no room")
        taken.append(1)
        return put(self, data, association_id)

    monkeypatch.setattr(Spool, "put", full)
    with opened(settings) as web:
        got = web.retrieve(STUDY, SERIES)
    assert (got.completed, got.reason) == (2, "our spool takes no more: no room")
    assert spooled(settings) == (UIDS[:2], ["aborted"])


def test_a_server_that_is_away_or_hangs_is_told_without_the_patient(
    server, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    told, url = server
    monkeypatch.setattr(dicomweb, "READ_S", 0.3)
    over = threading.Event()
    told.answer = lambda path, query: (200 if over.wait(10) else 500, {}, [])
    with opened(make_settings(tmp_path, url)) as web:
        with pytest.raises(PeerUnavailable, match="in time") as found:
            web.find_studies(patient_id="CANARY-ID", most=10)
    over.set()
    reasons = [str(found.value)]
    with pytest.raises(PeerUnavailable, match="no connection") as found:
        opened(make_settings(tmp_path, "http://127.0.0.1:9/web")).__enter__()
    assert not leaks(" ".join([*reasons, str(found.value)]))


def test_check_asks_for_nobody(server, tmp_path):
    told, url = server
    (check,) = [c for c in checks.run(make_settings(tmp_path, url)) if c.name == "priors web"]
    assert check.ok and "WADO-RS was not tried" in check.message
    assert all("PatientID" not in query for _, query in told.asked)
