"""Every page in a real Chromium: what it shows, what it does, and what it leaves be."""

import io
import json

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from matplotlib import image as reader
from playwright.sync_api import expect

from dicomnode import query, store
from dicomnode.core import preview
from dicomnode.model import Method
from tests.browser import feed
from tests.browser.feed import FIXED, PRIOR
from tests.browser.pages import PAGES

SERIOUS = {"serious", "critical"}


def places(tab) -> dict[str, str]:
    """Return the slices that a pair of images shows, and what is said of them."""
    return {
        f"{what}-{k}": tab.page.locator(f"#preview-{k}").get_attribute(f"data-{what}")
        for what in ("slice", "matched")
        for k in (0, 1)
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious(tab, name, scheme):
    shown = tab(scheme)
    PAGES[name](shown)
    found = Axe().run(shown.page).response["violations"]
    serious = [(v["id"], [n["target"] for n in v["nodes"]]) for v in found
               if v["impact"] in SERIOUS]  # fmt: skip
    assert serious == []


@pytest.mark.parametrize("name", PAGES)
def test_a_narrow_window_scrolls_tables_and_not_the_page(tab, name):
    shown = tab(width=360)
    PAGES[name](shown)
    wide = shown.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360


def test_in_a_narrow_window_the_strip_stays_beside_its_curve(tab):
    shown = tab(width=360)
    PAGES["series"](shown)
    strip, plot = (shown.page.locator(where).bounding_box() for where in (".strip img", ".u-over"))
    assert strip["y"] == pytest.approx(plot["y"], abs=1)
    assert strip["height"] == pytest.approx(plot["height"], abs=1)
    assert strip["x"] + strip["width"] <= plot["x"]


def test_who_is_not_signed_in_is_asked_to(tab, site):
    shown = tab(signed_in=False)
    shown.page.goto(f"/series/{FIXED.series_uid}")
    shown.page.fill("#token", site.tokens["read"])
    shown.page.keyboard.press("Enter")
    shown.page.wait_for_url(f"**/series/{FIXED.series_uid}")
    (cookie,) = shown.page.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    assert site.tokens["read"] not in cookie["value"]
    shown.page.click("text=Sign out")
    shown.page.wait_for_selector("#token")
    shown.page.goto("/")
    shown.page.wait_for_selector("#token")


def test_live_shows_what_arrived_and_looks_again_by_itself(tab):
    shown = tab()
    PAGES["live"](shown)
    rows = shown.page.locator("#series tbody tr")
    assert rows.count() == len(feed.SCANS)
    link = shown.page.locator(f"tr[data-uid='{FIXED.series_uid}'] a.uid")
    link.focus()
    with shown.page.expect_response("**/live.json") as answer:
        pass
    assert answer.value.ok
    assert rows.count() == len(feed.SCANS)
    assert shown.page.evaluate("document.activeElement.href").endswith(FIXED.series_uid)


def test_live_is_the_same_without_scripts(tab):
    with_scripts, without = tab(), tab(java_script_enabled=False)
    for shown in (with_scripts, without):
        shown.page.goto("/")
        assert shown.page.locator("#series tbody tr").count() == len(feed.SCANS)


def test_the_slice_follows_keys_pointer_and_regions(tab, site, engine):
    shown = tab()
    PAGES["series"](shown)
    page = shown.page
    slider, image = page.locator("#slice"), page.locator("#preview-0")
    start = int(slider.input_value())
    slider.focus()
    for key, at in (("ArrowRight", start + 1), ("PageDown", start - 9), ("End", 88), ("Home", 0)):
        page.keyboard.press(key)
        assert int(slider.input_value()) == at
    page.wait_for_selector("#preview-0[data-slice='0']")
    # Near the head, then at the liver: the strip, the plot and the table lead to slices alike.
    box = page.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 2)
    assert int(slider.input_value()) == 88
    strip = page.locator(".strip img").bounding_box()
    assert strip["y"] == pytest.approx(box["y"], abs=1)
    assert strip["height"] == pytest.approx(box["height"], abs=1)
    page.mouse.move(strip["x"] + 50, strip["y"] + strip["height"] - 2)
    assert int(slider.input_value()) == 0
    page.click("button:has-text('liver')")
    opened = query.view(engine, FIXED.series_uid, "liver")
    assert abs(int(slider.input_value()) - opened.place.index) <= 1
    assert "body height" in slider.get_attribute("aria-valuetext")
    assert image.is_visible()


def test_a_slice_is_the_very_input_of_the_network(tab, site, engine):
    shown = tab()
    address = f"{site.url}/series/{FIXED.series_uid}/slices/40.png"
    answer = shown.page.request.get(address)
    picture = reader.imread(io.BytesIO(answer.body()), format="png")
    with store.reading(engine) as session:
        kept = store.previews_of(session, FIXED.series_uid)
    assert np.array_equal(np.rint(picture * 255).astype(np.uint8), preview.unpack(kept[40]))


def test_the_prior_scrolls_with_the_current_study_as_the_offset_says(tab, site, engine):
    shown = tab()
    PAGES["pair"](shown)
    page = shown.page
    slider = page.locator("#slice")
    slices = query.slice_map(engine, FIXED.study_uid, PRIOR.study_uid).slices
    slider.focus()
    seen = set()
    for key in ("PageUp", "PageUp", "ArrowRight", "Home", "PageUp", "PageUp", "End"):
        page.keyboard.press(key)
        at = int(slider.input_value())
        wanted = slices[at].moving
        matched = -1 if wanted is None else wanted.index
        assert places(shown)["matched-1"] == str(matched)
        page.wait_for_selector(f"#preview-0[data-slice='{at}']")
        if matched >= 0:
            page.wait_for_selector(f"#preview-1[data-slice='{matched}']")
        else:
            assert "does not reach" in page.locator("#said-1").inner_text()
        seen.add(matched >= 0)
    assert seen == {True, False}
    page.locator("#preview-1").hover()
    at = int(slider.input_value())
    page.mouse.wheel(0, 100)
    expect(slider).to_have_value(str(at - 1))


def test_a_pair_is_shown_by_each_method_and_can_be_taken_along(tab, site, engine):
    shown = tab()
    PAGES["pair"](shown)
    page = shown.page
    api = f"/api/v1/studies/{FIXED.study_uid}/offsets/{PRIOR.study_uid}"
    best = query.pair(engine, FIXED.study_uid, PRIOR.study_uid).stored.offset
    truth = FIXED.table_mm - PRIOR.table_mm
    assert best.offset_mm == pytest.approx(truth, abs=10)
    assert f"{abs(best.offset_mm):.1f} mm" in page.locator("dl.facts").inner_text()
    assert page.locator("#methods-heading ~ div tbody tr").count() == len(Method)
    for link in page.locator(".files a").all():
        answer = page.request.get(site.url + link.get_attribute("href"))
        assert answer.ok, link.inner_text()
    assert json.loads(page.request.get(site.url + api).text())["offset_mm"] == best.offset_mm
    page.click("table >> text=l1")
    shown.ready()
    assert "method=l1" in page.url
    assert "l1" in page.locator("tr.chosen").inner_text()


def test_the_timeline_leads_to_pairs_and_series(tab):
    shown = tab()
    PAGES["patient"](shown)
    page = shown.page
    assert feed.patient_id(FIXED.patient) in page.locator("h1").inner_text()
    own = [s for s in feed.SCANS if s.patient == FIXED.patient]
    assert page.locator("svg .bar").count() == len(own)
    assert page.locator("svg .link").count() == 3  # of three Studies, each with each
    page.locator("svg a[href^='/studies/']").first.focus()
    page.keyboard.press("Enter")
    shown.ready()
    assert "/offsets/" in page.url


def test_words_are_completed_and_errors_point_at_the_character(tab):
    shown = tab()
    PAGES["question"](shown)
    page = shown.page
    box = page.locator("#q")
    box.press_sequentially("cov")
    page.keyboard.press("Tab")
    assert box.input_value() == "covers(REGION, FRACTION)"
    page.keyboard.type("live")  # over REGION, which is selected
    page.keyboard.press("Enter")
    assert box.input_value() == "covers(liver, FRACTION)"
    box.fill("covers(liver, 0.9) andd slices > 3")
    page.click("text=Find")
    page.wait_for_selector("#error")
    start = page.evaluate("document.getElementById('q').selectionStart")
    assert start == len("covers(liver, 0.9) ")


def test_what_a_question_finds_is_counted_listed_and_saved(tab):
    shown = tab()
    PAGES["mining"](shown)
    page = shown.page
    patient = feed.patient_id(9002)
    page.fill("#q", f"patient_id = '{patient}' and overlaps(chest)")
    page.click("text=Find")
    expect(page.locator("#found-heading")).to_have_text("2 Series found")
    assert page.locator("#found-heading ~ div tbody tr").count() == 2
    for heading in ("height", "month", "manufacturer", "tags"):
        assert page.locator(f"#{heading}-heading").is_visible()
    assert "HEAD" in page.locator("table.matrix").inner_text()
    with page.expect_download() as download:
        page.click("text=All as CSV")
    text = download.value.path().read_text()
    assert text.count("\n") == 3 and patient in text


def test_each_example_is_a_question(tab):
    shown = tab()
    PAGES["question"](shown)
    count = shown.page.locator(".examples button").count()
    assert count > 0
    for k in range(count):
        PAGES["question"](shown)
        shown.page.locator(".examples button").nth(k).click()
        shown.page.wait_for_selector("#found-heading")


def test_of_a_series_whose_slices_went_the_numbers_stay(tab, site, monkeypatch):
    monkeypatch.setattr(store, "has_previews", lambda session, series_uid: False)
    for name in ("series", "pair"):
        shown = tab()
        PAGES[name](shown)
        assert "not kept" in shown.page.locator(".note").first.inner_text()
        assert shown.page.locator(".strip").count() == 0
        assert shown.page.locator(".u-over").is_visible()
        shown.page.locator("#slice").focus()
        shown.page.keyboard.press("Home")
        assert "slice 1 of" in shown.page.locator("#said-0").inner_text()
