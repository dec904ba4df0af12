"""Which presentation contexts are accepted: Verification, and storage in every syntax we know."""

from collections.abc import Iterable

from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AllStoragePresentationContexts, build_context, evt
from pynetdicom.pdu_primitives import SOPClassCommonExtendedNegotiation
from pynetdicom.presentation import PresentationContext
from pynetdicom.service_class import ServiceClass
from pynetdicom.sop_class import Verification, uid_to_service_class

# Cheapest for us to decode first: ms for a 512 x 512 slice of CT, one core, the decoders we
# install, November 2026.
UNCOMPRESSED = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
COMPRESSED = (
    RLELossless,  # 0.8
    JPEGLosslessSV1,  # 2.1
    JPEGLossless,
    HTJ2KLossless,  # 3
    HTJ2KLosslessRPCL,
    HTJ2K,
    JPEGLSLossless,  # 3.7
    JPEGLSNearLossless,
    JPEG2000Lossless,  # 20
    JPEG2000,
    # CT has more than 8 bits, but its secondary captures may come in these.
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
)
TRANSFER_SYNTAXES = UNCOMPRESSED + COMPRESSED


_STORAGE = {context.abstract_syntax for context in AllStoragePresentationContexts}
_STORAGE_ARC = "1.2.840.10008.5.1.4.1.1."  # PS3.6 Table A-1
_STORAGE_SERVICE_CLASS = UID("1.2.840.10008.4.2")


def supported_contexts(proposed: Iterable[PresentationContext]) -> list[PresentationContext]:
    """Return the contexts to accept: Verification, and storage in every syntax we know.

    pynetdicom takes the first syntax of ours that the requestor proposes too. A requestor heads
    its list with the syntax in which it holds the Instances. A compressed one comes first here
    too, lest it has to decompress (many cannot); else what is cheapest for us to decode, since
    any sender can turn one uncompressed syntax into another.
    """
    held: dict[UID, list[UID]] = {}
    for context in proposed:
        if is_storage(context.abstract_syntax):
            syntaxes = held.setdefault(context.abstract_syntax, [])
            first = next((s for s in context.transfer_syntax if s in TRANSFER_SYNTAXES), None)
            if first in COMPRESSED:
                syntaxes.append(first)
    return [build_context(Verification)] + [
        build_context(sop_class_uid, list(dict.fromkeys([*syntaxes, *TRANSFER_SYNTAXES])))
        for sop_class_uid, syntaxes in held.items()
    ]


def is_storage(sop_class_uid: UID) -> bool:
    """Whether objects of this SOP Class are to be stored.

    Those pynetdicom knows, and private, retired and future ones that it does not: a study
    is often sent with a private object beside its CT, and refusing that fails the whole. (Its
    UNRESTRICTED_STORAGE_SERVICE would accept them in whatever syntax is proposed first.)
    """
    return sop_class_uid in _STORAGE or _is_unknown_storage(sop_class_uid)


def handle_sop_common(event: evt.Event) -> dict[UID, SOPClassCommonExtendedNegotiation]:
    """Return the Service Class of those proposed SOP Classes that pynetdicom does not know."""
    items = {}
    for context in event.assoc.requestor.requested_contexts:
        if _is_unknown_storage(context.abstract_syntax):
            item = SOPClassCommonExtendedNegotiation()
            item.sop_class_uid = context.abstract_syntax
            item.service_class_uid = _STORAGE_SERVICE_CLASS
            items[context.abstract_syntax] = item
    return items


def _is_unknown_storage(sop_class_uid: UID) -> bool:
    ours_to_guess = sop_class_uid.is_private or sop_class_uid.startswith(_STORAGE_ARC)
    return ours_to_guess and uid_to_service_class(sop_class_uid) is ServiceClass
