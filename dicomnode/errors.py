"""What can go wrong, and what the caller is to do then.

NodeError
+ DicomError            the object cannot be used, now or later     -> quarantine
  - UnsupportedObject   SOP Class or transfer syntax not handled
  - CorruptObject       cannot be parsed, pixel data short
  - GeometryError       slices are not one stack
+ TransientError        the same call may work later                -> retry with backoff
  - StoreUnavailable
  - DeviceUnavailable
  - PeerUnavailable
+ SpoolFull             refuse with 0xA700, sender keeps the object
+ ConfigError           stop at start-up, say which key
  - SpoolBusy           another worker takes from this spool        -> wait, or let it work
+ WeightsError          bundle missing, digest or spec mismatch
+ ObjectError           no sound object can say this                -> there is nothing to deliver
+ RegionError           the bundle of a curve knows no such region  -> show it to who asked
+ ExpressionError       a question for Series that cannot be read   -> show it to who asked

Messages name the thing and the value, never a patient attribute.
"""

from dicomnode.model import Reason

EXCERPT = 60  # characters shown of a question on each side of what is wrong with it


class NodeError(Exception):
    """Root of every error this package raises on purpose."""


class DicomError(NodeError):
    """The object cannot be used, now or later; `reason` is what the database stores."""

    reason: Reason = Reason.CORRUPT

    def __init__(self, message: str, reason: Reason | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class UnsupportedObject(DicomError):
    """SOP Class or transfer syntax not handled."""

    reason = Reason.UNSUPPORTED_TRANSFER_SYNTAX


class CorruptObject(DicomError):
    """The data set cannot be parsed, or its pixel data is short."""

    reason = Reason.CORRUPT


class GeometryError(DicomError):
    """The slices have no usable position, or are not one stack."""

    reason = Reason.NO_GEOMETRY


class TransientError(NodeError):
    """The same call may work later."""


class StoreUnavailable(TransientError):
    """The database does not answer."""


class DeviceUnavailable(TransientError):
    """The scoring device does not answer."""


class PeerUnavailable(TransientError):
    """A peer cannot be reached, refuses the association, breaks off, or does not answer."""


class SpoolFull(NodeError):
    """The spool has no room: the sender is to keep the object and try again."""


class ConfigError(NodeError):
    """A setting is wrong; the message names its key."""


class SpoolBusy(ConfigError):
    """Another worker takes from this spool."""


class WeightsError(NodeError):
    """The weight bundle is missing, altered, or made for another input."""


class ObjectError(NodeError):
    """No sound DICOM object can say this; the message tells what is in its way."""


class RegionError(NodeError):
    """The bundle that made a curve knows no region of that name or code."""


class ExpressionError(NodeError):
    """A question for Series cannot be read; `position` is where, counted in characters from 0."""

    def __init__(self, message: str, text: str, position: int) -> None:
        start = text.rfind("\n", 0, position) + 1
        line = text[start:].partition("\n")[0]
        lead = f"  line {text.count(chr(10), 0, position) + 1}: " if "\n" in text else "  "
        cut = max(0, position - start - EXCERPT)
        # One column a character: what is wider, or is not seen, would move the caret.
        shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in line)
        excerpt = ("..." if cut else "") + shown[cut : cut + 2 * EXCERPT]
        column = len(lead) + position - start - cut + (3 if cut else 0)
        super().__init__(f"{message}\n{lead}{excerpt}\n{' ' * column}^")
        self.message = message
        self.position = position
