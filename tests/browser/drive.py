"""Chromium before a page of a node: what it shows, asks for and complains of."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, Request, sync_playwright

CHROMIUM = "/usr/bin/chromium"
LOOK_MS = 10_000


def is_there() -> bool:
    """Whether there is a Chromium to drive."""
    return shutil.which(CHROMIUM) is not None


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Give a Chromium without a window."""
    arguments = ["--force-color-profile=srgb", "--disable-gpu"]
    if os.getuid() == 0:
        arguments.append("--no-sandbox")  # it refuses root otherwise
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield found
        finally:
            found.close()


@dataclass
class Watched:
    """A tab, and all that it asked for and complained of."""

    page: Page
    addresses: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, context: BrowserContext) -> "Watched":
        """Open a tab and watch it."""
        page = context.new_page()
        page.set_default_timeout(LOOK_MS)
        found = cls(page)
        page.on("request", lambda request: found.addresses.append(request.url))
        page.on("console", lambda m: m.type in ("error", "warning") and found.complain(m.text))
        page.on("pageerror", lambda error: found.complain(str(error)))
        page.on("requestfailed", found._failed)
        return found

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # which is to have gone to another page
            self.complain(f"failed: {request.url} {request.failure}")

    def complain(self, text: str) -> None:
        """Note what was wrong."""
        self.complaints.append(text)

    def ready(self) -> None:
        """Wait until a figure was drawn and its slices are there."""
        self.page.wait_for_selector("body[data-ready]")
        self.page.evaluate(
            "Promise.all([...document.images].filter(i => !i.hidden).map(i => i.decode()))"
        )

    def save(self, path: Path, *, full: bool = True) -> None:
        """Write what it shows as a PNG."""
        self.page.screenshot(path=path, full_page=full, animations="disabled")


def sign_in(tab: Watched, token: str) -> None:
    """Sign in by the form."""
    tab.page.goto("/sign-in")
    tab.page.fill("#token", token)
    tab.page.click("main button")
    tab.page.wait_for_selector("#series")
