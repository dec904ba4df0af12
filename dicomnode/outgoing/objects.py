"""How an object of ours becomes something to send."""

import hashlib
import io
from dataclasses import asdict, replace

from pydicom.dataset import Dataset

from dicomnode.model import Offset
from dicomnode.objects import modules
from dicomnode.objects.modules import Origin
from dicomnode.objects.source import Source
from dicomnode.outgoing import Outgoing


def said_once(origin: Origin, *told: Source | Offset) -> Origin:
    """Return an origin that goes with what is told, and with nothing else.

    An archive keeps the first object of a UID, whatever comes later. So a patient that was
    corrected, or an offset that was computed anew by another version of the node, is to give
    another UID, though the revision of the curves is the same.
    """
    digest = hashlib.sha256(repr((modules.VERSION, *map(asdict, told))).encode()).hexdigest()
    return replace(origin, revision=f"{origin.revision}.{digest[:16]}")


def outgoing(ds: Dataset) -> Outgoing:
    """Return an object of ours as it is sent: what is made is encoded at once."""
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return Outgoing(
        str(ds.SOPClassUID),
        str(ds.SOPInstanceUID),
        str(ds.file_meta.TransferSyntaxUID),
        file.getvalue,
    )
