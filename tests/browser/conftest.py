"""A node's database filled with phantoms, its page, and a Chromium, once for all tests here."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser
from sqlalchemy import Engine

from dicomnode import store
from tests import served
from tests.browser import drive, feed
from tests.browser.drive import Watched


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Iterator[served.Page]:
    """A page over phantoms that the node's own stages scored and aligned."""
    folder = tmp_path_factory.mktemp("site")
    feed.fill(folder)
    url = feed.settings(folder).database.url
    with served.page(folder, url) as page:
        yield page


@pytest.fixture(scope="session")
def engine(site) -> Iterator[Engine]:
    """The database that the page shows."""
    with store.opened(site.settings.database.url) as found:
        yield found


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A Chromium without a window."""
    if not drive.is_there():
        reason = f"no {drive.CHROMIUM}"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI=true and {reason}")
        pytest.skip(reason)
    with drive.browser() as found:
        yield found


@pytest.fixture(scope="session")
def signed_in_as(site, chromium) -> list[Any]:
    """What the browser keeps of somebody who signed in."""
    context = chromium.new_context(base_url=site.url)
    drive.sign_in(Watched.of(context), site.tokens["read"])
    cookies = context.cookies()
    context.close()
    return cookies


@pytest.fixture
def tab(site, chromium, signed_in_as) -> Iterator[Callable[..., Watched]]:
    """Open tabs that are signed in, and hold them to the rules at the end."""
    with contextlib.ExitStack() as stack:
        opened: list[Watched] = []

        def open_tab(scheme: str = "light", *, signed_in: bool = True, width: int = 1280,
                     **options: object) -> Watched:  # fmt: skip
            context = chromium.new_context(
                base_url=site.url,
                color_scheme=scheme,
                viewport={"width": width, "height": 900},
                **options,
            )
            stack.callback(context.close)
            watched = Watched.of(context)
            opened.append(watched)
            if signed_in:
                context.add_cookies(signed_in_as)
            return watched

        yield open_tab
        for watched in opened:
            assert watched.complaints == []
            strangers = [a for a in watched.addresses if not a.startswith(site.url)]
            assert strangers == []
            assert [a for a in watched.addresses if "PHANTOM" in a.upper()] == []
