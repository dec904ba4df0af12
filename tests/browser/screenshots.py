"""Writes the pictures of docs/page.md, of phantoms alone.

python -m tests.browser.screenshots
"""

import tempfile
from pathlib import Path

from PIL import Image

from tests import served
from tests.browser import drive, feed
from tests.browser.drive import Watched
from tests.browser.pages import PAGES

OUT = Path(__file__).parents[2] / "docs" / "pictures"
# What is shown of each page, in which colours.
SHOTS = {
    "live": "light",
    "series": "light",
    "pair": "dark",
    "patient": "light",
    "mining": "light",
}
SHADE = 5
SIZE = {"width": 1280, "height": 900}


def main() -> None:
    """Write them."""
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        feed.fill(folder)
        url = feed.settings(folder).database.url
        with (
            feed.at_work(folder),
            served.page(folder, url) as site,
            drive.browser() as browser,
        ):
            for page, scheme in SHOTS.items():
                context = browser.new_context(base_url=site.url, color_scheme=scheme, viewport=SIZE)
                tab = Watched.of(context)
                drive.sign_in(tab, site.tokens["read"])
                PAGES[page](tab)
                tab.page.mouse.move(0, 0)
                tab.save(OUT / f"{page}.png", full=page != "series")
                _shrink(OUT / f"{page}.png")
                context.close()
                print(OUT / f"{page}.png", (OUT / f"{page}.png").stat().st_size)


def _shrink(path: Path) -> None:
    """Write a picture anew with fewer shades, all colours alike: greys stay grey."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").point(lambda value: round(value / SHADE) * SHADE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main()
