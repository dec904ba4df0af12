"""What goes out: each kind of delivery has a maker here, which makes it when it is due.

`to_peer` and `to_webhook` bring it there; `work` settles how that went.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An object to be stored at a peer."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str  # of the bytes
    read: Callable[[], bytes]  # a whole DICOM Part 10 file; called when it is its turn


class Nothing(Exception):
    """There is nothing to say any more: a curve or an offset is gone, or refused."""


class NotYet(Exception):
    """It cannot be made now, and nobody is to blame: later, and this was no attempt."""
