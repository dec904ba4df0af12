"""Pages over real sockets, on both databases: who gets in, what is refused, what is recorded."""

import contextlib
import importlib
import json
import re
import ssl
from collections.abc import Iterator
from datetime import timedelta

import httpx2 as httpx
import numpy as np
import pytest
import trustme

from dicomnode import manifest, mining, store
from dicomnode.core import preview, region
from dicomnode.model import SeriesState
from dicomnode.store import SliceResult
from dicomnode.web.tokens import Holder, Role, line_of
from tests import served
from tests.conftest import postgres_database
from tests.deliveries import eventually
from tests.dicom import PATIENT_ID, leaks
from tests.integration.test_store import MODEL, finish
from tests.served import (
    FIXED,
    FIXED_SERIES,
    MOVING,
    OPEN_SERIES,
    OTHER_SERIES,
    REFUSED_SERIES,
    T0,
    Page,
)

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PAGES = [
    "/",
    "/live.json",
    f"/series/{FIXED_SERIES}",
    f"/series/{OPEN_SERIES}",
    f"/series/{REFUSED_SERIES}",
    f"/studies/{FIXED}/offsets/{MOVING}",
    f"/studies/{MOVING}/offsets/{FIXED}?method=l1",
    "/mine",
]


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


@contextlib.contextmanager
def browser(page: Page, token: str | None = None) -> Iterator[httpx.Client]:
    """Give a client that signed in by the form."""
    with httpx.Client(base_url=page.url, timeout=30.0, trust_env=False) as http:
        answer = sign_in(http, token or page.tokens["read"])
        assert answer.status_code == 303 and answer.headers["location"] == "/"
        yield http


def sign_in(http: httpx.Client, token: str) -> httpx.Response:
    form = form_of(http.get("/sign-in").text)
    return http.post("/sign-in", data={"form": form, "token": token})


def form_of(text: str) -> str:
    """Return what the forms of a page carry."""
    (found,) = {*re.findall(r'name="form" value="([0-9a-f]+)"', text)}
    return found


def lines(page: Page) -> list[dict]:
    return [json.loads(line) for line in page.audit().splitlines()]


@pytest.mark.parametrize("path", PAGES)
def test_pages_answer_who_signed_in_and_lead_others_to_the_form(page, path):
    with browser(page) as http:
        answer = http.get(path)
        assert answer.status_code == 200, answer.text
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert not re.search(r"<style|\bstyle=|\bon\w+=|<script>", answer.text)
    with page.http(None) as http:
        answer = http.get(path)
        assert answer.status_code == 303
        assert answer.headers["location"].startswith("/sign-in")


def test_a_cookie_is_out_of_reach_and_ends_with_the_token(tmp_path):
    # This page asks the database nothing.
    with served.page(tmp_path, f"sqlite:///{tmp_path / 'none.sqlite'}") as page:
        token = page.tokens["read"]
        with page.http(None) as http:
            (kept,) = [v for v in sign_in(http, token).headers.get_list("set-cookie")
                       if v.startswith("dicomnode=")]  # fmt: skip
            assert "HttpOnly" in kept and "samesite=strict" in kept.lower() and token not in kept
            assert http.get("/mine").status_code == 200
            path = page.settings.web.token_file
            path.write_text(line_of(Holder("other", Role.READ), "another"))
            eventually(lambda: http.get("/mine").status_code == 303)


def test_over_tls_the_cookie_is_for_tls_and_this_host_alone(tmp_path):
    authority = trustme.CA()
    pem = tmp_path / "web.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pem))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    url = f"sqlite:///{tmp_path / 'none.sqlite'}"
    with (
        served.page(tmp_path, url, certificate=pem) as page,
        httpx.Client(base_url=page.url, verify=context, trust_env=False) as http,
    ):
        cookies = sign_in(http, page.tokens["read"]).headers.get_list("set-cookie")
        (kept,) = [v for v in cookies if v.startswith("__Host-dicomnode=")]
        assert "Secure" in kept and "Path=/" in kept and "Domain" not in kept
        assert http.get("/mine").status_code == 200


def test_who_signed_in_at_a_proxy_needs_no_session_and_sends_forms(tmp_path):
    web = {"user_header": "X-Remote-User", "proxies": ["127.0.0.1/32"]}
    url = f"sqlite:///{tmp_path / 'none.sqlite'}"
    with (
        served.page(tmp_path, url, tokens=False, **web) as page,
        page.http(None, **{"X-Remote-User": "ada"}) as ada,
        page.http(None, **{"X-Remote-User": "eve"}) as eve,
    ):
        assert "ada (read)" in (shown := ada.get("/mine").text) and "Sign out" not in shown
        theirs = form_of(eve.get("/mine").text)
        assert ada.post("/sign-out", data={"form": theirs}).status_code == 403
        assert ada.post("/sign-out", data={"form": form_of(shown)}).status_code == 303
        assert ada.get("/sign-in").headers["location"] == "/"
        with page.http(None) as nobody:
            assert nobody.get("/").status_code == 401  # there is no form to lead to


def test_a_database_that_is_away_is_told_on_a_page(tmp_path):
    with served.page(tmp_path, f"sqlite:///{tmp_path / 'none.sqlite'}") as page:
        with browser(page) as http:
            answer = http.get("/")
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert "<h1>Not available now</h1>" in answer.text


def test_a_session_reads_the_rest_interface_and_posts_nothing_to_it(page):
    with browser(page) as http:
        assert http.get(f"/api/v1/studies/{FIXED}/offsets/{MOVING}").status_code == 200
        assert http.post("/api/v1/coverage", json={"q": "slices > 1"}).status_code == 401


def test_live_says_in_words_how_parts_and_series_stand(page):
    with browser(page) as http:
        now, shown = http.get("/live.json").json(), http.get("/").text
    tiles = {tile["name"]: tile for tile in now["health"]}
    assert list(tiles) == [
        "Database", "Spool", "Worker", "Device", "Queue", "Deliveries", "Quarantine"
    ]  # fmt: skip
    assert not tiles["Worker"]["fine"] and not tiles["Device"]["fine"]  # there is none
    assert tiles["Deliveries"]["said"].startswith("6 waiting, overdue for ")
    reasons = {s["series_uid"]: (s["stated"], s["reason"]) for s in now["series"]}
    assert reasons[OPEN_SERIES] == ("arriving", "")
    assert reasons[REFUSED_SERIES] == ("ignored", "localizer")
    assert all(tile["said"] in shown for tile in tiles.values())


def test_the_role_is_that_of_the_token(page):
    for role, status in (("read", 403), ("admin", 200)):
        with browser(page, page.tokens[role]) as http:
            assert http.get("/api/v1/deliveries").status_code == status


@pytest.mark.parametrize("path", ["/patients", "/mine", "/mine/export", "/sign-out"])
def test_a_post_takes_a_form_of_this_session(page, path):
    fields = {"patient_id": PATIENT_ID, "q": "slices > 1", "format": "csv"}
    with browser(page) as other, browser(page) as http:
        theirs, ours = form_of(other.get("/mine").text), form_of(http.get("/mine").text)
        assert theirs != ours
        for form in ("", "0" * 64, theirs):
            assert http.post(path, data=fields | {"form": form}).status_code == 403
        for header in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
            answer = http.post(path, data=fields | {"form": ours}, headers=header)
            assert answer.status_code == 403
        assert http.post(path, json=fields | {"form": ours}).status_code == 415
        assert http.post(path, content=b"\xff=%ff", headers=FORM).status_code == 400
        answer = http.post(path, data=fields | {"form": ours})
        assert answer.status_code in (200, 303)


def test_to_sign_in_takes_the_form_and_a_token_that_is_known(page):
    with page.http(None) as http:
        token = page.tokens["read"]
        assert http.post("/sign-in", data={"token": token, "form": "x"}).status_code == 403
        answer = sign_in(http, "wrong")
        assert answer.status_code == 401 and "not known" in answer.text
        assert not any(v.startswith("dicomnode=") for v in answer.headers.get_list("set-cookie"))
        for elsewhere in ("//evil.example", "https://evil.example", "/\\evil.example", "/a b"):
            assert http.get("/sign-in", params={"next": elsewhere}).status_code == 422
    assert any(line["event"] == "sign-in refused" for line in lines(page))


def test_to_sign_out_is_to_be_out(page):
    with browser(page) as http:
        form = form_of(http.get("/mine").text)
        assert http.post("/sign-out", data={"form": form}).status_code == 303
        assert http.get("/mine").status_code == 303
    events = [line["event"] for line in lines(page)]
    assert "signed in" in events and "signed out" in events


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/series/1.2.999", 404),
        ("/series/not-a-uid", 422),
        (f"/series/{FIXED_SERIES}/slices/0.png", 404),  # nothing is kept of it
        (f"/series/{FIXED_SERIES}/slices/x.png", 422),
        (f"/series/{FIXED_SERIES}/strip.png?from=5&to=1", 404),
        (f"/series/{FIXED_SERIES}/strip.png?from=nan", 422),
        (f"/studies/{FIXED}/offsets/1.2.999", 404),
        ("/patients/nobody", 404),
        ("/static/../app.py", 404),
        ("/static/%2e%2e/app.py", 404),
    ],
)
def test_errors_are_pages_that_repeat_nothing(page, path, status):
    with browser(page) as http:
        answer = http.get(path)
    assert answer.status_code == status
    if not path.startswith("/static"):
        assert answer.headers["content-type"].startswith("text/html")
        assert "<main" in answer.text and "not-a-uid" not in answer.text


def test_a_patient_is_found_by_a_form_and_is_in_no_address(page):
    with browser(page) as http:
        form = form_of(http.get("/").text)
        answer = http.post("/patients", data={"form": form, "patient_id": PATIENT_ID})
        where = answer.headers["location"]
        assert answer.status_code == 303 and not leaks(where)
        shown = http.get(where)
        assert PATIENT_ID in shown.text and shown.text.count('class="bar"') == 2
        assert http.post("/patients", data={"form": form, "patient_id": "X"}).status_code == 404
        assert http.post("/patients", data={"form": form, "patient_id": ""}).status_code == 422
    assert not leaks(page.audit())


def test_reads_are_recorded_and_name_no_patient(page):
    with browser(page) as http:
        for path in PAGES:
            http.get(path)
        question = {"form": form_of(http.get("/mine").text), "q": f"patient_id = '{PATIENT_ID}'"}
        found = http.post("/mine", data=question)
        assert "2 Series found" in found.text
        saved = http.post("/mine/export", data=question | {"format": "csv"})
        assert saved.text.count("\n") == 3
    known = lines(page)
    commands = {line.get("command") for line in known if line.get("user") == "reader"}
    assert {"live page", "series page", "pair page", "mine page"} <= commands
    assert any(line["event"] == "export" and line.get("finished") for line in known)
    assert not leaks(page.audit())


def test_questions_are_paged_and_their_errors_shown(page, monkeypatch):
    from dicomnode.web.pages import mine

    monkeypatch.setattr(mine, "ROWS", 1)
    with browser(page) as http:
        form = form_of(http.get("/mine").text)
        ask = {"form": form, "q": "slices > 1"}
        first = http.post("/mine", data=ask).text
        (before,) = re.findall(r'name="before" value="(\d+)"', first)
        second = http.post("/mine", data=ask | {"before": before}).text
        seen = [re.findall(r'href="/series/([0-9.]+)"', text) for text in (first, second)]
        assert [len(s) for s in seen] == [1, 1] and seen[0] != seen[1]
        for wrong in ({"before": "x"}, {"before": "0"}, {"q": "a\x00b"}, {"q": "x" * 5000}):
            assert http.post("/mine", data=ask | wrong).status_code == 422
        said = http.post("/mine", data=ask | {"q": "slices >> 1"}).text
        assert 'data-position="8"' in said and "at character 9" in said
        hostile = http.post("/mine", data=ask | {"q": "<script>alert(1)</script>"}).text
        assert "<script>alert" not in hostile


def test_series_that_arrive_come_first_and_today_is_counted(engine):
    served.fill(engine)
    with store.reading(engine) as session:
        rows = store.newest_series(session, 3)
        assert rows[0].series_uid == OPEN_SERIES and len(rows) == 3
        assert {r.series_uid for r in store.newest_series(session, 50)} >= {
            FIXED_SERIES, OTHER_SERIES, REFUSED_SERIES
        }  # fmt: skip
        today = store.arrivals_since(session, T0 - timedelta(hours=1))
        assert today[SeriesState.CURVE] == (3, 230)
        assert today[SeriesState.OPEN] == (1, 12)
        assert store.arrivals_since(session, T0 + timedelta(days=1)) == {}
        assert store.count_undelivered(session) == {"waiting": 6}
        (pair,) = store.pairs_of_study(session, FIXED)
        assert (pair.fixed_study, pair.moving_study) == (FIXED, MOVING)
        assert store.pairs_of_study(session, MOVING) == [pair]
        assert store.pairs_of_study(session, "1.2.999") == []


def test_a_tally_says_what_counting_one_by_one_does(engine):
    served.fill(engine)
    regions = region.from_manifest(manifest.read_manifest(None))
    for text in ("slices > 1", "covers(abdomen)", "overlaps(chest) and slices < 60"):
        with store.reading(engine) as session:
            asked = mining.parse(text, regions, store.mining_tables(session))
            matches = store.find_page(session, asked).matches
            found = store.tally(session, asked, len(matches))
        assert found.counted == len(matches)
        months = [f"{m.study_datetime:%Y-%m}" if m.study_datetime else "" for m in matches]
        assert found.months == {month: months.count(month) for month in sorted(set(months))}
        assert sum(found.manufacturers.values()) == len(matches)
        assert sum(found.tags.values()) == len(matches)
        for part in found.parts:
            shown = sum(tag.get(part, 0) for tag in found.shown.values())
            # A cell tells ends to 20 mm: who covers near to half may count or not.
            shares = [dict((r.name, s) for r, s in m.coverage)[part] for m in matches]
            sure, perhaps = sum(s > 0.7 for s in shares), sum(s > 0.3 for s in shares)
            assert sure <= shown <= perhaps, part


def test_of_very_many_an_even_sample_is_tallied(engine, monkeypatch):
    served.fill(engine)
    many = importlib.import_module(
        "dicomnode.store.tally"
    )  # the package has a function of its name
    regions = region.from_manifest(manifest.read_manifest(None))
    for text in ("slices > 1", "state != open"):
        with store.reading(engine) as session:
            asked = mining.parse(text, regions, store.mining_tables(session))
            count = store.count_matches(session, asked)
            every = store.tally(session, asked, count)
            monkeypatch.setattr(many, "TALLIED", count - 1)
            some = store.tally(session, asked, count)
            assert 0 < some.counted < every.counted == count
            for way in ("months", "manufacturers", "tags"):
                of_all = getattr(every, way)
                assert all(n <= of_all[name] for name, n in getattr(some, way).items()), way
            # The runs are apart, and each Series is in one of them.
            monkeypatch.setattr(many, "TALLIED", count - 1e-9)
            assert store.tally(session, asked, count) == every
            monkeypatch.undo()


def test_one_kept_slice_is_read_without_the_others(engine):
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (20, 16, 16), np.uint8)
    with store.writing(engine) as session:
        store.record_model(session, MODEL, manifest.read_manifest(None), T0)
        results = [
            SliceResult(
                served.header_of("1.2.9.1", "1.2.9", served.PATIENT, None, k, 5.0 * k),
                "a" * 16, T0, 0.1 * k, preview=preview.pack(x),
            )
            for k, x in enumerate(inputs)
        ]  # fmt: skip
        store.record_slices(session, MODEL, results)
    with store.reading(engine) as session:
        assert not store.has_previews(session, "1.2.9.1")  # it is open
    finish(engine, "1.2.9.1")
    with store.reading(engine) as session:
        assert store.has_previews(session, "1.2.9.1")
        for k in (0, 7, 19):
            assert np.array_equal(
                preview.unpack(store.preview_of(session, "1.2.9.1", k)), inputs[k]
            )
        assert store.preview_of(session, "1.2.9.1", 20) is None
        assert store.preview_of(session, "1.2.8.1", 0) is None
        assert len(store.previews_of(session, "1.2.9.1")) == 20
        assert store.previews_of(session, "1.2.8.1") is None
