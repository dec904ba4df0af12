"""C-MOVE, Study Root (PS3.4 C.4.2): a peer is asked to send a Series to us."""

import time
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pynetdicom import build_context
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelMove as StudyRootMove

from dicomnode.errors import PeerRefused
from dicomnode.scu.association import Link
from dicomnode.scu.find import PENDING, status_of

# Until the next response: a peer need not tell how it goes on, and may fetch from tape first.
RESPONSE_S = 1800.0
# Without a further Instance: a peer that says "pending" for ever sends nothing.
STALL_S = 1800.0
MOVE_S = 6 * 3600.0  # until it is over
MOVE_BYTES = 64 << 20
KINDS = ("Completed", "Failed", "Warning")  # NumberOf...Suboperations (0000,1021) to (0000,1023)
WARNING = 0xB000  # sub-operations complete, one or more failures

Counts = tuple[int | None, int | None, int | None]  # of KINDS


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What became of the Instances that were asked for; None: it was not told."""

    completed: int | None
    failed: int | None
    warning: int | None
    reason: str = ""  # why not all are here; nothing of the patient

    @property
    def arrived(self) -> int | None:
        """Instances that were sent and taken, with a warning or without."""
        if self.completed is None and self.warning is None:
            return None
        return (self.completed or 0) + (self.warning or 0)


def move_context() -> PresentationContext:
    """Return what to propose."""
    return build_context(StudyRootMove)


def move_series(link: Link, destination: str, study_uid: str, series_uid: str) -> Retrieved:
    """Ask a peer to send a Series, and return what became of it.

    Parameters
    ----------
    destination
        AE title that the peer knows, and sends to.

    Raises
    ------
    PeerRefused
        If the peer refuses, or sends nothing for `STALL_S`.
    PeerUnavailable
        If the association broke: what came, came.
    """
    ds = Dataset()
    ds.QueryRetrieveLevel = "SERIES"
    ds.StudyInstanceUID = study_uid
    ds.SeriesInstanceUID = series_uid
    assoc, name = link.assoc, link.peer.ae_title
    counts: Counts = (None, None, None)
    moved_at = time.monotonic()
    with link.bounded(MOVE_S, MOVE_BYTES):
        assoc.dimse_timeout = RESPONSE_S
        try:
            responses = assoc.send_c_move(
                ds, destination, StudyRootMove, msg_id=link.next_message_id()
            )
        except RuntimeError as exc:  # it is not established any more
            raise link.broken("C-MOVE") from exc
        except ValueError as exc:
            raise PeerRefused(f"{name} does not offer C-MOVE, Study Root") from exc
        for answer, _ in responses:
            if "Status" not in answer:
                raise link.broken("C-MOVE")
            status = int(answer.Status)
            told = _counts(answer)
            # Those of the last response that has any: the final one need not.
            if told not in (counts, (None, None, None)):
                counts, moved_at = told, time.monotonic()
            if status not in PENDING:
                return _outcome(status, counts, name)
            if time.monotonic() - moved_at > STALL_S:
                assoc.abort()
                raise PeerRefused(f"{name} sent nothing for {STALL_S:.0f} s: C-MOVE given up")
    raise link.broken("C-MOVE")


def _outcome(status: int, counts: Counts, name: str) -> Retrieved:
    completed, failed, warning = counts
    if status == 0x0000 and not failed:
        return Retrieved(completed, failed, warning)
    if status in (0x0000, WARNING):
        of = (completed or 0) + (failed or 0) + (warning or 0)
        reason = f"{failed} of {of} were not sent" if failed else "not all were sent"
        return Retrieved(completed, failed, warning, reason)
    if completed or warning:
        why = f"C-MOVE ended with {status_of(status)}"
        return Retrieved(completed, failed, warning, why)
    # Orthanc 1.10 answers so to a Move Destination that it does not know.
    unsaid = "; if it does not know us, register our AE title, with host and port, at the peer"
    hint = unsaid if status >> 12 == 0xC else ""
    raise PeerRefused(f"{name} refuses C-MOVE: {status_of(status)}{hint}")


def _counts(answer: Dataset) -> Counts:
    values = [answer.get(f"NumberOf{kind}Suboperations") for kind in KINDS]
    completed, failed, warning = (None if v is None else int(v) for v in values)
    return completed, failed, warning
