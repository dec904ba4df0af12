"""C-STORE: objects to a peer, as they are stored, one after the other on one association."""

import io
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pydicom import dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.presentation import PresentationContext
from pynetdicom.status import STORAGE_SERVICE_CLASS_STATUS

from dicomnode.config import Peer, Settings
from dicomnode.errors import DicomError, PeerUnavailable, TransientError
from dicomnode.outgoing import Outgoing
from dicomnode.scu.association import ANSWER_S, Link, associated, wait_paused
from dicomnode.scu.transport import STALL_S

logger = logging.getLogger(__name__)

# PS3.5 section 10.1: whoever takes a SOP Class takes it in Implicit VR Little Endian.
UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
MAXIMUM_CONTEXTS = 128  # PS3.8 9.3.2.2: odd numbers of one byte
FRAGMENT_BYTES = 1 << 17  # of a data set, a PDU; a peer may say that it takes any length
QUEUED = 8  # PDUs at a time: the object does not lie in memory twice
SLOWEST_BYTES_S = 20_000  # below, a peer counts as hanging


@dataclass(frozen=True, slots=True)
class Stored:
    """What a peer said to one object."""

    sop_class_uid: str
    sop_instance_uid: str
    status: int | None  # PS3.4 Table B.2-1; None: it was not sent
    reason: str = ""  # why the peer does not have it; nothing of the patient

    @property
    def ok(self) -> bool:
        """Whether the peer has it; a warning says so, and how it altered it (PS3.4 B.2.3).

        As does 0111, duplicate SOP Instance (PS3.7 Annex C): some answer so to what they have.
        """
        return self.status is not None and (
            self.status in (0x0000, 0x0001, 0x0107, 0x0111, 0x0116)
            or 0xB000 <= self.status <= 0xBFFF
        )

    @property
    def takes_nothing(self) -> bool:
        """Whether the peer says that it takes nothing now, or nothing from us: PS3.4 B.2.3.

        Refused: Out of Resources, and Refused: Not Authorized.
        """
        return self.status is not None and (self.status >> 8 == 0xA7 or self.status == 0x0124)


def store(settings: Settings, peer: Peer, objects: Sequence[Outgoing]) -> list[Stored]:
    """Store objects at a peer, and return what it said to each, in their order.

    Raises
    ------
    PeerUnavailable
        If there is no association, or it broke: which objects the peer has is not known.
    ConfigError
        If a file of `[tls]` cannot be used.
    """
    held = [(o.sop_class_uid, o.transfer_syntax_uid) for o in objects]
    with associated(settings, peer, storage_contexts(held)) as link:
        return list(store_on(link, objects))


def storage_contexts(pairs: Iterable[tuple[str, str]]) -> list[PresentationContext]:
    """Return what to propose for these SOP Classes and the transfer syntaxes they are held in.

    Each SOP Class in each syntax it is held in, then uncompressed. A context of its own for each
    syntax held: of several in one, the peer chooses.
    """
    held = dict.fromkeys(pairs)
    classes = dict.fromkeys(sop_class_uid for sop_class_uid, _ in held)
    contexts = [build_context(*pair) for pair in held]
    contexts += [build_context(uid, list(UNCOMPRESSED)) for uid in classes]
    return contexts[:MAXIMUM_CONTEXTS]


def store_on(link: Link, objects: Iterable[Outgoing]) -> Iterator[Stored]:
    """Store objects on an association that is there, one after the other.

    Raises
    ------
    PeerUnavailable
        If the association broke.
    """
    for outgoing in objects:
        accepted = link.accepted(outgoing.sop_class_uid)
        uids = outgoing.sop_class_uid, outgoing.sop_instance_uid
        try:
            syntax, data = _as_accepted(outgoing, accepted)
        except DicomError as exc:
            yield Stored(*uids, None, str(exc))
            continue
        yield _send(link, uids, accepted[syntax], data)


def data_set_of(part10: bytes) -> memoryview:
    """Return the data set of a DICOM Part 10 file: what follows its file meta information.

    Raises
    ------
    DicomError
        If it is none.
    """
    # PS3.10 Table 7.1-1: (0002,0000) UL comes first, and says how long the rest is.
    if part10[128:132] != b"DICM" or part10[132:140] != b"\x02\x00\x00\x00UL\x04\x00":
        raise DicomError("not a DICOM Part 10 file with a group length")
    start = 144 + int.from_bytes(part10[140:144], "little")
    if start >= len(part10):
        raise DicomError("a DICOM Part 10 file without a data set")
    return memoryview(part10)[start:]


def _as_accepted(outgoing: Outgoing, accepted: dict[str, int]) -> tuple[str, bytes | memoryview]:
    """Return the data set in a transfer syntax that the peer accepted: its own, if that is."""
    if not accepted:
        raise DicomError(f"the peer does not take SOP Class {UID(outgoing.sop_class_uid).name}")
    if outgoing.transfer_syntax_uid in accepted:
        return outgoing.transfer_syntax_uid, data_set_of(_read(outgoing))
    own = UID(outgoing.transfer_syntax_uid)
    syntax = next((s for s in UNCOMPRESSED if s in accepted), None)
    if syntax is None:
        raise DicomError(f"the peer does not take it in {own.name}, nor uncompressed")
    return syntax, _converted(_read(outgoing), own, syntax)


def _read(outgoing: Outgoing) -> bytes:
    try:
        return outgoing.read()
    except (DicomError, TransientError):  # the database is away: nothing is wrong with the object
        raise
    except OSError as exc:  # a disk that fails, a file that may not be read
        raise DicomError(f"cannot be read: {exc.strerror or type(exc).__name__}") from exc
    except Exception as exc:  # one object must not stop those behind it
        logger.exception("object not read", extra={"sop_instance_uid": outgoing.sop_instance_uid})
        raise DicomError(f"cannot be read: {type(exc).__name__}") from exc


def _converted(part10: bytes, own: UID, syntax: UID) -> bytes:
    try:
        ds = dcmread(io.BytesIO(part10))
        if own.is_compressed and own.is_encapsulated:
            ds.decompress(generate_instance_uid=False)
        ds.file_meta.TransferSyntaxUID = syntax
        written = io.BytesIO()
        ds.save_as(
            written,
            implicit_vr=syntax.is_implicit_VR,
            little_endian=True,
            enforce_file_format=True,
        )
    except Exception as exc:  # whatever a decoder makes of what it is given
        raise DicomError(
            f"the peer does not take it in {own.name}, and it cannot be made uncompressed: "
            f"{type(exc).__name__}"
        ) from exc
    return bytes(data_set_of(written.getvalue()))


def _send(link: Link, uids: tuple[str, str], context_id: int, data: bytes | memoryview) -> Stored:
    request = C_STORE()
    request.MessageID = link.next_message_id()
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = uids
    request.Priority = 0x0000  # medium
    request.DataSet = io.BytesIO(data)
    answer = _ask(link, request, context_id, ANSWER_S + len(data) / SLOWEST_BYTES_S)
    if not isinstance(answer, C_STORE) or not answer.is_valid_response:
        raise link.broken("C-STORE")
    if answer.MessageIDBeingRespondedTo != request.MessageID:
        raise PeerUnavailable(f"{link.peer.ae_title} answers a C-STORE that was not sent")
    status = int(answer.Status)
    stored = Stored(*uids, status)
    return stored if stored.ok else Stored(*uids, status, reason_of(status))


def reason_of(status: int) -> str:
    """Return what a status of C-STORE means.

    The peer's own Error Comment is left out: it may well tell of the patient.
    """
    _, meaning = STORAGE_SERVICE_CLASS_STATUS.get(status, ("", ""))
    if not meaning:
        first = {0xA7: "Out of Resources", 0xA9: "Data Set Does Not Match SOP Class"}
        meaning = first.get(status >> 8, "Cannot Understand" if status >> 12 == 0xC else "Failure")
    return f"{status:04X} {meaning}"


def _ask(link: Link, request: C_STORE, context_id: int, seconds: float) -> object:
    """Send a request and return its answer, None where there is none.

    What `Association.send_c_store` does, less its encoding of a data set that is encoded, and
    with the time-out that of the answer: pynetdicom's runs from before the first byte is sent.
    """
    assoc = link.assoc
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    length = min(assoc.acceptor.maximum_length or FRAGMENT_BYTES, FRAGMENT_BYTES)
    with link.bounded(seconds):
        try:
            if not wait_paused(assoc):
                return None
            for pdata in message.encode_msg(context_id, length):
                if not _drained(link, QUEUED):
                    return None
                assoc.dul.send_pdu(pdata)
            if not _drained(link, 1):
                return None
            assoc.dimse_timeout = ANSWER_S
            _, answer = assoc.dimse.get_msg(block=True)
        finally:
            assoc._reactor_checkpoint.set()
    return answer


def _drained(link: Link, queued: int) -> bool:
    """Wait until fewer PDUs than this wait to be sent; False where the peer takes none."""
    queue = link.assoc.dul.to_provider_queue
    length, deadline = queue.qsize(), time.monotonic() + STALL_S
    while queue.qsize() >= queued:
        if not link.is_established or not link.assoc.dul.is_alive():
            return False
        if queue.qsize() < length:
            length, deadline = queue.qsize(), time.monotonic() + STALL_S
        elif time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True
