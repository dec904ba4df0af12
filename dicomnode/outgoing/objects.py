"""How an object of ours becomes something to send."""

import io

from pydicom.dataset import Dataset

from dicomnode.outgoing import Outgoing


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
