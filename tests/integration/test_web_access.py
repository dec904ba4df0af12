"""Who may ask the page, how much, and what the audit log says of it; over real sockets."""

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx2 as httpx
import psycopg
import pytest
import trustme
from psycopg import sql
from sqlalchemy import make_url

from db import engine as engines
from dicomnode import checks, config, export
from dicomnode.client import Client, NodeUnavailable
from dicomnode.errors import ConfigError, StoreUnavailable
from dicomnode.spool import Spool
from dicomnode.web import access, bounds, database, look, protocol, run
from dicomnode.web.tokens import Holder, Role, add, line_of
from tests import served
from tests.conftest import postgres_database
from tests.dicom import PATIENT_ID, leaks
from tests.served import FIXED_SERIES, Page

API = "/api/v1"
ADMIN_PAGE = f"{API}/deliveries"
SERIES_PAGE = f"{API}/series/{FIXED_SERIES}"


@pytest.fixture(scope="module")
def database_url(tmp_path_factory) -> str:
    """SQLite: who may ask has nothing to do with the database."""
    url = f"sqlite:///{tmp_path_factory.mktemp('node') / 'node.sqlite'}"
    served.make(url)
    return url


@pytest.fixture(scope="module")
def shared(database_url, tmp_path_factory) -> Iterator[Page]:
    """A page of which nobody reads the audit log."""
    with served.page(tmp_path_factory.mktemp("page"), database_url) as found:
        yield found


@pytest.fixture
def page(database_url, tmp_path) -> Iterator[Page]:
    with served.page(tmp_path, database_url) as found:
        yield found


def lines(page: Page, event: str | None = None) -> list[dict]:
    found = [json.loads(line) for line in page.audit().splitlines()]
    return [line for line in found if event in (None, line["event"])]


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nobody_is_let_in_without_a_token_or_with_a_wrong_one(page):
    with page.http(None) as http:
        for path in ("/series", "/regions", "/deliveries", "/coverage?q=x", "/patients/A/timeline"):
            answer = http.get(API + path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.headers["content-type"] == "application/problem+json"
        for wrong in ("Bearer nonsense", "Basic YTpi", "Bearer", "", "Bearer \xe9"):
            answer = http.get(SERIES_PAGE, headers={"Authorization": wrong.encode("latin-1")})
            assert answer.status_code in (401, 429)
    refused = lines(page, "sign-in refused")
    assert len(refused) >= 10
    assert {(r["status"], r["outcome"], r["address"]) for r in refused} <= {
        (401, 4, "127.0.0.1"),
        (429, 4, "127.0.0.1"),
    }
    assert refused[0]["route"] == "/api/v1/series" and "user" not in refused[0]


def test_the_other_role_is_refused_and_that_is_audited(page):
    with page.http("read") as http:
        assert http.get(ADMIN_PAGE).status_code == 403
    with page.http("admin") as http:
        assert http.get(ADMIN_PAGE).status_code == 200
        assert http.get(SERIES_PAGE).status_code == 200
    (line,) = lines(page, "request refused")
    assert (line["status"], line["user"], line["route"]) == (403, "reader", ADMIN_PAGE)


def test_reads_are_audited_with_who_when_and_which(page):
    with page.http() as http:
        http.get(f"{API}/series/{FIXED_SERIES}/curve")
        http.get(f"{API}/studies/{served.FIXED}/offsets/{served.MOVING}")
        http.get(f"{API}/coverage", params={"q": "slices > 1", "format": "csv"})
    reads = lines(page, "query")
    assert [(r["user"], r["command"]) for r in reads] == [("reader", "curve"), ("reader", "offset")]
    assert reads[0]["series_uid"] == FIXED_SERIES
    assert reads[1]["study_uid"] == [served.FIXED, served.MOVING]
    begun, ended = lines(page, "export")
    assert begun["format"] == "csv" and ended["finished"] and ended["bytes"] > 0


def test_attempts_are_bounded_but_lock_nobody_else_out(page):
    with page.http(None) as http:
        wrong = {"Authorization": "Bearer wrong"}
        statuses = [http.get(SERIES_PAGE, headers=wrong).status_code for _ in range(30)]
    assert statuses[: access.FAILURES] == [401] * access.FAILURES
    assert statuses[-1] == 429
    with page.http() as http:
        assert http.get(SERIES_PAGE).status_code == 200
    assert len(lines(page, "sign-in refused")) <= access.FAILURES + 5


def test_tokens_are_read_again_when_their_file_changes(page):
    path = page.settings.web.token_file
    with page.http("read") as http:
        assert http.get(SERIES_PAGE).status_code == 200
        new = add(path, Holder("new", Role.ADMIN))
        signed = {"Authorization": f"Bearer {new}"}
        eventually(lambda: http.get(ADMIN_PAGE, headers=signed).status_code == 200)
        path.write_text(line_of(Holder("new", Role.READ), new))
        eventually(lambda: http.get(SERIES_PAGE).status_code in (401, 429))
        assert http.get(ADMIN_PAGE, headers=signed).status_code == 403
        path.write_text("read new " + new + "\n")  # the token itself, by mistake
        eventually(lambda: http.get(SERIES_PAGE, headers=signed).status_code in (401, 429))
        path.write_text(line_of(Holder("new", Role.READ), new))
        eventually(lambda: http.get(SERIES_PAGE, headers=signed).status_code == 200)


def test_a_proxy_names_the_user_and_nobody_else_does(database_url, tmp_path):
    web = {"user_header": "X-Remote-User", "admins": ["ada"]}
    with served.page(
        tmp_path, database_url, tokens=False, proxies=["127.0.0.1/32"], **web
    ) as proxied, proxied.http(None) as http:  # fmt: skip

        def status(path: str, *users: str) -> int:
            return http.get(path, headers=[("X-Remote-User", user) for user in users]).status_code

        assert status(SERIES_PAGE, "bob") == 200
        assert status(ADMIN_PAGE, "bob") == 403
        assert status(ADMIN_PAGE, "ada") == 200
        assert status(ADMIN_PAGE, "bob", "ada") == 401
        assert status(SERIES_PAGE, "") == 401
        assert status(SERIES_PAGE) == 401
        passed_on = {"X-Remote-User": "bob", "Authorization": "Bearer of-the-proxy"}
        assert http.get(SERIES_PAGE, headers=passed_on).status_code == 200
        assert {r["user"] for r in lines(proxied, "query")} == {"bob", "ada"}
    with served.page(
        tmp_path, database_url, tokens=False, proxies=["10.0.0.0/8"], **web
    ) as direct, direct.http(None) as http:  # fmt: skip
        answer = http.get(ADMIN_PAGE, headers={"X-Remote-User": "ada"})
        assert answer.status_code == 401


def test_without_tokens_this_machine_reads_and_what_comes_through_others_does_not(
    database_url, tmp_path
):
    with (
        served.page(tmp_path, database_url, tokens=False) as page,
        page.http(None) as http,
    ):
        assert http.get(SERIES_PAGE).status_code == 200
        assert http.get(ADMIN_PAGE).status_code == 403
        for header in (
            {"X-Forwarded-For": "10.0.0.1"},
            {"Forwarded": "for=10.0.0.1"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ):
            assert http.get(SERIES_PAGE, headers=header).status_code == 403
        assert http.get(SERIES_PAGE, headers={"Host": "evil.example"}).status_code == 421
        assert http.get(SERIES_PAGE, headers={"Host": f"localhost:{page.port}"}).status_code == 200
        assert http.get(SERIES_PAGE, headers={"Authorization": "Bearer x"}).status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        "/api/v1/series/../../../etc/passwd",
        "/api/v1/series/..%2f..%2f..%2fetc%2fpasswd",
        "/api/v1/series/%2e%2e/%2e%2e/secret",
        "/api/v1/series/1.2%00.3",
        "/api/v1/series/" + "1." * 40,
        "/api/v1/series/" + "1" * 65 + "/curve",
        "/api/v1/series/1.2%0d%0aX-Injected:%20yes",
        "/api/v1/studies/1.2/offsets/..%5c..%5c",
        "/api/v1/patients/%2e%2e/timeline",
        "/api/v1/patients/" + "A" * 2000 + "/timeline",
        "/static/..%2fdocs.py",
        "/static/../docs.py",
        "/static/%2e%2e/docs.py",
        "//api/v1/series",
        "/api/v1/series/",
        "/api/v1/series?study=1.2%00",
        "/api/v1/coverage?q=%00",
        f"/api/v1/coverage?q={'x' * 5000}",
        "/%ff%fe",
    ],
)
def test_paths_that_play_games_are_refused(shared, target):
    status, head, body = raw(shared, f"GET {target} HTTP/1.1")
    assert status in (404, 422), (status, body)
    assert b"problem+json" in head and b"X-Injected" not in head
    assert b"root:" not in body


def test_what_is_refused_is_audited_without_what_was_asked(page):
    for target in (f"/api/v1/series/{PATIENT_ID}", f"/{PATIENT_ID}", f"/docs/{PATIENT_ID}"):
        assert raw(page, f"GET {target}?patient={PATIENT_ID} HTTP/1.1", signed=False)[0] in (
            401,
            404,
        )
    assert {line["status"] for line in lines(page)[1:]} == {401, 404}
    assert not leaks(page.audit())


def test_a_patient_id_in_the_place_of_a_key_or_uid_is_not_written_down(page):
    with page.http() as http:
        for path in (
            "/series?patient=CANARY-ID",
            "/patients/CANARY-ID/timeline",
            "/series?covers=CANARY-ID",
            "/series/18991130",
            "/series?study=18991130",
            "/studies/18991130/offsets/18991130",
            "/coverage?q=patient_id='CANARY-ID'",
            "/coverage?q=CANARY-ID",
        ):
            assert http.get(API + path).status_code in (404, 422), path
    assert not leaks(page.audit())


def test_a_file_that_breaks_off_is_noticed(page, tmp_path, monkeypatch):
    def broken(*args):
        yield b"PatientID\n" * 5000
        raise StoreUnavailable("database: gone")

    monkeypatch.setattr(export, "stream", broken)
    with Client(page.url, page.tokens["read"]) as node, pytest.raises(NodeUnavailable):
        node.export("slices > 1", tmp_path / "found.csv")
    assert not list(tmp_path.glob("*found*"))
    with page.http() as http:
        assert http.get("/healthz").status_code == 200
    assert [line.get("finished") for line in lines(page, "export")] == [None]


def test_what_is_too_long_is_refused_and_audited(page):
    padding = "x" * bounds.MAX_TARGET
    assert raw(page, f"GET /api/v1/series?study={padding} HTTP/1.1")[0] == 414
    long = "\r\nContent-Type: application/json\r\nContent-Length: 100000"
    assert raw(page, f"POST /api/v1/coverage HTTP/1.1{long}")[0] == 413
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    chunked = "\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    status, *_ = raw(page, f"POST /api/v1/coverage HTTP/1.1{chunked}", chunk * 20 + b"0\r\n\r\n")
    assert status == 413
    header = "\r\nX-Long: " + "x" * bounds.MAX_HEADERS
    assert raw(page, f"GET {SERIES_PAGE} HTTP/1.1{header}")[0] == 431
    endless = connect(page)
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            endless.sendall(b"GET /" + b"x" * protocol.MAX_HEAD)
    assert until_closed(endless)[:12] in (b"HTTP/1.1 400", b"")
    assert {413, 414, 431, 400} <= {line["status"] for line in lines(page, "request refused")}


def test_requests_that_never_come_to_an_end_are_cut_off(database_url, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 0.5)
    monkeypatch.setattr(run, "protocol", lambda told: protocol.protocol(told, head_s=0.5))
    monkeypatch.setattr(bounds, "BODY_S", 0.5)
    with served.page(tmp_path, database_url) as page:
        silent = connect(page)
        slow = connect(page)
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        again = connect(page)
        again.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert again.recv(1000).startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /hea")  # the next request of the same connection
        body = connect(page)
        body.sendall(
            b"POST /api/v1/coverage HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
            b"\r\nContent-Length: 50\r\nAuthorization: Bearer "
            + page.tokens["read"].encode()
            + b'\r\n\r\n{"q":'
        )
        begun = time.monotonic()
        for each in (silent, slow, again):
            assert until_closed(each) == b""
        assert b" 408 " in until_closed(body)
        assert time.monotonic() - begun < 5
        assert len([r for r in lines(page) if r.get("status") == 408]) == 4


def test_connections_of_one_address_are_bounded(database_url, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "protocol", lambda told: protocol.protocol(told, per_address=4))
    with served.page(tmp_path, database_url) as page:
        held = [connect(page) for _ in range(4)]
        for one in held:
            one.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert b" 200 " in one.recv(1000)
        assert until_closed(connect(page)) == b""
        for one in held:
            one.close()

        def lets_in() -> bool:
            try:
                with page.http() as http:
                    return http.get("/healthz").is_success
            except httpx.TransportError:
                return False

        eventually(lets_in)


def test_every_answer_carries_what_keeps_browsers_safe(shared):
    with shared.http() as http:
        for path in ("/docs", SERIES_PAGE, "/nothing", "/healthz", "/static/style.css"):
            headers = http.get(path).headers
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["x-frame-options"] == "DENY"
            assert "server" not in headers
        assert http.get(f"{API}/series").headers["cache-control"] == "no-store"


def test_the_reference_names_every_address_and_loads_nothing_from_elsewhere(shared):
    with shared.http(None) as http:
        text = http.get("/docs").text
        schema = http.get(f"{API}/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in text
    assert "<script" not in text and "style=" not in text
    assert "//" not in text.replace("<!doctype html>", "")


def test_with_a_certificate_there_is_https_and_nothing_else(database_url, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "web.pem"))
    with served.page(tmp_path, database_url, certificate=tmp_path / "web.pem") as page:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        with httpx.Client(base_url=page.url, verify=context, trust_env=False) as http:
            assert http.get("/healthz").status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{page.port}/healthz", trust_env=False)


def test_a_database_that_is_away_is_told_and_comes_back(tmp_path):
    path = tmp_path / "node.sqlite"
    with served.page(tmp_path, f"sqlite:///{path}") as page, page.http() as http:
        for target in (SERIES_PAGE, f"{API}/series", f"{API}/coverage?q=slices>1"):
            answer = http.get(target)
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
            assert int(answer.headers["retry-after"]) > 0
        assert http.get("/healthz").status_code == 200
        assert http.get("/readyz").json()["checks"]["database"] is False
        served.make(f"sqlite:///{path}")
        eventually(lambda: http.get(SERIES_PAGE).status_code == 200)
        eventually(lambda: http.get("/readyz").json()["checks"]["database"] is True)


def test_postgres_goes_away_and_comes_back(postgres_url, tmp_path):
    with postgres_database(postgres_url) as url:
        served.make(url)
        name = make_url(url).database
        with served.page(tmp_path, url) as page, page.http() as http:
            assert http.get(SERIES_PAGE).status_code == 200
            with psycopg.connect(postgres_url, autocommit=True) as server:
                allowed = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
                named = sql.Identifier(name)
                server.execute(allowed.format(named, sql.SQL("false")))
                server.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                    [name],
                )
                for path in (SERIES_PAGE, f"{API}/coverage?q=slices>1&format=csv"):
                    answer = http.get(path)
                    assert answer.status_code == 503
                    assert answer.json()["detail"] == "the database does not answer"
                eventually(lambda: not http.get("/readyz").json()["checks"]["database"])
                server.execute(allowed.format(named, sql.SQL("true")))
            eventually(lambda: http.get(SERIES_PAGE).status_code == 200)


def test_readiness_is_that_of_database_spool_and_worker(database_url, tmp_path):
    with served.page(tmp_path, database_url) as page, page.http(None) as http:

        def checks() -> dict[str, bool]:
            return http.get("/readyz").json()["checks"]

        assert checks() == {"database": True, "spool": True, "worker": False}
        assert http.get("/readyz").status_code == 503
        with Spool.of(page.settings.spool).lease():
            eventually(lambda: checks()["worker"])
            assert http.get("/readyz").status_code == 200
        eventually(lambda: not checks()["worker"])
        page.settings.spool.path.rename(tmp_path / "gone")
        eventually(lambda: not checks()["spool"])


def test_a_question_that_takes_too_long_is_stopped(database_url, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "PROGRESS_STEPS", 1)
    monkeypatch.setattr(database.Database.__init__, "__defaults__", (-1.0,))
    with served.page(tmp_path, database_url) as page, page.http() as http:
        answer = http.get(f"{API}/coverage/count", params={"q": "slices > 1"})
        assert answer.status_code == 503 and "too long" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[web]\nhost = "0.0.0.0"', "token_file or user_header"),
        ('[web]\nhost = "192.168.1.5"', "token_file or user_header"),
        ('[web]\nhost = "::"', "token_file or user_header"),
        ('[web]\nhost = "pacs.example"', "token_file or user_header"),
        ('[web]\nuser_header = "X-User"', "user_header and proxies"),
        ('[web]\nproxies = ["10.0.0.1"]', "user_header and proxies"),
        ('[web]\nadmins = ["ada"]', "admins"),
        ('[web]\nproxies = ["10.0.0.1/8"]\nuser_header = "X-User"', "host bits"),
        ('[web]\nproxies = ["0.0.0.0/0"]\nuser_header = "X-User"', "everybody is no"),
        ('[web]\nuser_header = "X User"\nproxies = ["10.0.0.1"]', "user_header"),
        ('[web]\nnames = ["http://x"]', "names"),
        ('[web]\nkey = "x.pem"', "key is that of certificate"),
    ],
)
def test_a_page_that_others_reach_needs_to_know_who_may(tmp_path, text, key):
    path = tmp_path / "node.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=key):
        config.load(path)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.5.5.5"])
def test_this_machine_alone_needs_no_token(host):
    assert config.Settings(web={"host": host}).web.is_local


def test_the_page_runs_as_a_part_and_stops_in_order(database_url, tmp_path):
    """`dicomnode serve --only web`: starts, answers, says so, stops; names no patient."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tokens = tmp_path / "tokens"
    (tmp_path / "node.toml").write_text(
        f'[spool]\npath = "{tmp_path / "spool"}"\n[database]\nurl = "{database_url}"\n'
        f'[web]\nport = {port}\ntoken_file = "{tokens}"\n'
    )
    command = [sys.executable, "-m", "dicomnode"]
    made = subprocess.run(
        [*command, "token", "read", "viewer"], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == 0 and oct(tokens.stat().st_mode)[-3:] == "600"
    token = made.stdout.strip()
    assert token not in tokens.read_text()
    log = tmp_path / "log"
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            [*command, "serve", "--only", "web", "--log-json"], cwd=tmp_path, stderr=stderr
        )
    try:
        headers = {"Authorization": f"Bearer {token}"}
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return httpx.get(f"{url}/healthz", trust_env=False).is_success
            except httpx.TransportError:
                return False

        eventually(answers, 30.0)
        key = httpx.get(f"{url}{SERIES_PAGE}", headers=headers, trust_env=False).json()
        path = f"{url}{API}/patients/{key['patient_key']}/timeline"
        assert httpx.get(path, headers=headers, trust_env=False).status_code == 200
    finally:
        process.terminate()
        status = process.wait(30)
    assert status == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["event"] for e in events] == ["page started"]
    audit = (tmp_path / "audit.jsonl").read_text()
    assert [json.loads(line)["event"] for line in audit.splitlines()] == [
        "started",
        "query",
        "query",
        "stopped",
    ]
    assert not leaks(log.read_text() + audit)


def test_a_port_that_is_taken_is_told_with_its_key(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PORT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = served.settings_of(
            tmp_path,
            "sqlite:///x",
        )
        web = settings.web.model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(ConfigError, match=r"web\.host, web\.port"):
            run.run(settings.model_copy(update={"web": web}), threading.Event())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("read viewer secret-token\n", "SHA-256"),
        ("root viewer " + "0" * 64, "ROLE NAME SHA-256"),
        ("read " + "0" * 64, "ROLE NAME SHA-256"),
        ("\xff", "line 1"),
    ],
)
def test_a_token_file_that_is_none_stops_the_start_and_is_not_quoted(tmp_path, text, message):
    path = tmp_path / "tokens"
    path.write_text(text)
    settings = served.settings_of(tmp_path, "sqlite:///x", token_file=path)
    with pytest.raises(ConfigError, match=message) as caught:
        run.run(settings, threading.Event())
    assert "secret" not in str(caught.value)


def test_a_token_file_that_others_may_write_to_is_refused(tmp_path):
    path = tmp_path / "tokens"
    add(path, Holder("a", Role.READ))
    os.chmod(path, 0o620)
    with pytest.raises(ConfigError, match="chmod 600"):
        run.run(served.settings_of(tmp_path, "sqlite:///x", token_file=path), threading.Event())
    with pytest.raises(ConfigError, match="chmod 600"):
        add(path, Holder("b", Role.READ))
    os.chmod(path, 0o600)
    with pytest.raises(ConfigError, match="a has a token"):
        add(path, Holder("a", Role.ADMIN))


def connect(page: Page) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", page.port), timeout=10)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def until_closed(connection: socket.socket) -> bytes:
    found = b""
    with connection:
        while True:
            try:
                part = connection.recv(65536)
            except ConnectionResetError:
                return found
            if not part:
                return found
            found += part


def raw(
    page: Page, request: str, body: bytes = b"", signed: bool = True
) -> tuple[int, bytes, bytes]:
    """Send a request as it stands, which no client would, and return status, head and body."""
    lines = [request, f"Host: 127.0.0.1:{page.port}", "Connection: close"]
    if signed:
        lines.append(f"Authorization: Bearer {page.tokens['read']}")
    connection = connect(page)
    connection.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        connection.sendall(body)
    head, _, rest = until_closed(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), head, rest


def test_check_tells_how_the_page_stands(tmp_path):
    def told(**web) -> checks.Check:
        settings = served.settings_of(tmp_path, "sqlite:///x", enabled=True, **web)
        return checks._try("page", lambda: checks._page(settings))

    assert told().ok and "anybody on this machine; free" in told().message
    add(tmp_path / "tokens", Holder("a", Role.READ))
    assert "for 1 tokens" in told(token_file=tmp_path / "tokens").message
    assert not told(token_file=tmp_path / "none").ok
    assert not told(certificate=tmp_path / "none.pem").ok
    assert not told(host="192.0.2.1", token_file=tmp_path / "tokens").ok
    (tmp_path / "web.key").write_text("x")
    assert not told().ok
    (tmp_path / "web.key").unlink()
    assert told().ok and not (tmp_path / "web.key").exists()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        web = {"enabled": True, "port": taken.getsockname()[1]}
        settings = served.settings_of(tmp_path, "sqlite:///x").model_copy(
            update={"web": config.WebSettings(**web)}
        )
        assert "in use" in checks._page(settings)


def test_files_of_the_page_are_where_they_are_looked_for():
    assert {"style.css", "figure.js", "vendor/uPlot.iife.min.js"} <= set(look.files())
    assert (look.HERE / "templates" / "docs.html").is_file()
