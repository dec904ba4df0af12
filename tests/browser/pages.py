"""Every page of a node that phantoms were fed to, and how a person gets there."""

from collections.abc import Callable

from tests.browser import feed
from tests.browser.drive import Watched


def live(tab: Watched) -> None:
    """What arrives."""
    tab.page.goto("/")
    tab.page.wait_for_selector("#series tbody tr")


def series(tab: Watched) -> None:
    """A Series."""
    tab.page.goto(f"/series/{feed.FIXED.series_uid}")
    tab.ready()


def pair(tab: Watched) -> None:
    """Two Studies."""
    tab.page.goto(f"/studies/{feed.FIXED.study_uid}/offsets/{feed.PRIOR.study_uid}")
    tab.ready()


def patient(tab: Watched) -> None:
    """A patient, looked up by the Patient ID."""
    tab.page.goto("/")
    tab.page.fill("#patient", feed.patient_id(feed.FIXED.patient))
    tab.page.click("text=Timeline")
    tab.page.wait_for_selector("svg.timeline")


def question(tab: Watched) -> None:
    """The form for questions."""
    tab.page.goto("/mine")
    tab.page.wait_for_selector("#q[role=combobox]")


def found(tab: Watched) -> None:
    """What a question found."""
    question(tab)
    tab.page.fill("#q", "overlaps(chest) and quality > 0.9")
    tab.page.click("text=Find")
    tab.page.wait_for_selector("#found-heading")


def reference(tab: Watched) -> None:
    """The reference of the REST interface."""
    tab.page.goto("/docs")


PAGES: dict[str, Callable[[Watched], None]] = {
    "live": live,
    "series": series,
    "pair": pair,
    "patient": patient,
    "question": question,
    "mining": found,
    "reference": reference,
}
