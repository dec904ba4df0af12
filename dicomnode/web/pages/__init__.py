"""The pages that people look at: rendered here, with a little JavaScript of our own.

Each is read from the database by the same questions as the REST interface.
"""

from dicomnode.web.pages import live, mine, pair, patient, picture, series, sign

_all = (live, series, picture, pair, patient, mine, sign)
pages = tuple(page.router for page in _all)

__all__ = ["pages"]
