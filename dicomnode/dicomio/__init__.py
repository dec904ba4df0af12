"""The door to DICOM bytes: headers, pixels in HU, and CT series written by our own hand."""

from dicomnode.dicomio.dataset import (
    Identity,
    header_of,
    identity,
    image_hu,
    read,
    with_group_length,
)
from dicomnode.dicomio.instance import Decoded, decode, find
from dicomnode.dicomio.write import ct_dataset

__all__ = [
    "Decoded",
    "Identity",
    "ct_dataset",
    "decode",
    "find",
    "header_of",
    "identity",
    "image_hu",
    "read",
    "with_group_length",
]
