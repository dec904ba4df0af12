"""What entries of the spool are called: names of our own making, which sort by arrival."""

import re
from datetime import UTC, datetime

from dicomnode.model import SpooledEvent, SpooledInstance

Entry = SpooledInstance | SpooledEvent

EVENT_KINDS = ("released", "aborted", "started")

# Nanoseconds since 1970; what tells equal times apart; the association; the kind.
NAME = re.compile(rf"(\d{{20}})-\d{{6}}-([0-9a-f]{{16}})\.(dcm|{'|'.join(EVENT_KINDS)})")


def make(time_ns: int, count: int, association_id: str, kind: str) -> str:
    """Return a name.

    Raises
    ------
    ValueError
        If that is no association id: nothing else may become part of a path.
    """
    name = f"{time_ns:020d}-{count:06d}-{association_id}.{kind}"
    if not NAME.fullmatch(name):
        raise ValueError(f"no association id: {association_id!r}")
    return name


def entry(name: str, place: object = None) -> Entry:
    """Return the entry of that name."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"no name of an entry: {name!r}")
    arrived_at = datetime.fromtimestamp(int(match[1]) / 1e9, UTC)
    if match[3] == "dcm":
        return SpooledInstance(name, match[2], arrived_at, place)
    return SpooledEvent(name, match[2], match[3], arrived_at, place)
