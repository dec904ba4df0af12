"""What came from a destination does not go there again: an analysis that sends back what it made.

It may meet the rule that had its images sent, and would be sent what it makes of that, and so on.
"""

from collections.abc import Iterable, Mapping

from sqlalchemy.orm import Session

from dicomnode import store
from dicomnode.dicomio import Identity
from dicomnode.outgoing import Nothing

# Derived Series of one Study are not sent to a destination that got so many of it: whatever the
# derived ones say of themselves, a circle ends. Scanners make a handful.
MOST = 16


def of_others(told: Mapping[str, Identity], destination: str) -> dict[str, Identity]:
    """Return what did not come from a destination itself.

    Raises
    ------
    Nothing
        If all of it did.
    """
    found = {uid: one for uid, one in told.items() if one.sender != destination}
    if not found:
        raise Nothing(f"it came from {destination} itself")
    return found


def check(session: Session, told: Iterable[Identity], found: store.Match, destination: str) -> None:
    """Return where a Series is not what a destination made of what it was sent.

    That comes back from the archive, perhaps, under the AE title of that.

    Raises
    ------
    Nothing
        If it is.
    """
    derived = [one.derived_from for one in told if one.derived_from is not None]
    if not derived:
        return
    got = store.delivered_of_study(session, found.study_uid, destination)
    got.pop(found.series_uid, None)
    if store.have_any(session, got.values(), frozenset().union(*derived)):
        raise Nothing(f"it was derived from images that {destination} got")
    if len(got) >= MOST:
        raise Nothing(f"{destination} got {len(got)} Series of its Study, and it is a derived one")
