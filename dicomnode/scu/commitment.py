"""Storage Commitment: asking a peer to commit itself to keep what it was sent (PS3.4 Annex J)."""

import threading
from collections.abc import Callable, Sequence

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pynetdicom import build_context, evt
from pynetdicom.sop_class import (
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)

from dicomnode.config import Peer, Settings
from dicomnode.errors import PeerUnavailable
from dicomnode.scp.commitment import handle_event_report
from dicomnode.scu.association import ANSWER_S, associated
from dicomnode.spool.reports import Report

REQUEST = 1  # PS3.4 Table J.3-1, Action Type ID
# How long the association stays open for the answer; peers of one kind give it on it.
STAY_S = 5.0

# PS3.3 C.14.1.1
FAILURES = {
    0x0110: "processing failure",
    0x0112: "no such object instance",
    0x0119: "class/instance conflict",
    0x0122: "referenced SOP Class not supported",
    0x0131: "duplicate transaction UID",
    0x0213: "resource limitation",
}


def ask(
    settings: Settings,
    peer: Peer,
    references: Sequence[tuple[str, str]],
    transaction_uid: str,
    accepted: Callable[[], None],
    put: Callable[[Report], None],
) -> None:
    """Ask a peer to commit itself, and stay for an answer on the same association for a while.

    Parameters
    ----------
    references
        SOP Class UID and SOP Instance UID of each object.
    transaction_uid
        Which the answer names.
    accepted
        Called when the peer takes the question, before it is put: the answer may come at once,
        on an association that another process accepts.
    put
        Takes the answer, in another thread; returns once it is on stable storage.

    Raises
    ------
    NothingAccepted
        If the peer does not offer Storage Commitment.
    PeerUnavailable
        If it cannot be asked, or refuses.
    """
    answered = threading.Event()

    def handle(event: evt.Event) -> tuple[int, Dataset | None]:
        def put_and_tell(report: Report) -> None:
            put(report)
            if report.transaction_uid == transaction_uid:
                answered.set()

        return handle_event_report(event, peer.ae_title, put_and_tell)

    information = Dataset()
    information.TransactionUID = transaction_uid
    items = []
    for sop_class_uid, sop_instance_uid in references:
        item = Dataset()
        item.ReferencedSOPClassUID = sop_class_uid
        item.ReferencedSOPInstanceUID = sop_instance_uid
        items.append(item)
    information.ReferencedSOPSequence = Items(items)

    contexts = [build_context(StorageCommitmentPushModel)]
    handlers = [(evt.EVT_N_EVENT_REPORT, handle)]
    with associated(settings, peer, contexts, handlers=handlers) as link:
        accepted()
        with link.bounded(ANSWER_S):
            status, _ = link.assoc.send_n_action(
                information,
                REQUEST,
                StorageCommitmentPushModel,
                StorageCommitmentPushModelInstance,
                msg_id=link.next_message_id(),
            )
        if "Status" not in status:
            raise link.broken("N-ACTION")
        if status.Status != 0x0000:
            raise PeerUnavailable(f"{peer.ae_title} answers N-ACTION {status.Status:04X}")
        with link.bounded(STAY_S):
            answered.wait(STAY_S)


def reason_of(failure: int) -> str:
    """Return what a Failure Reason (0008,1197) means."""
    return f"{failure:04X} {FAILURES.get(failure, 'failure')}"
