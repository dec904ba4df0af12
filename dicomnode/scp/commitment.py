"""What a peer reports of a Storage Commitment: N-EVENT-REPORT, taken on either side.

On the association on which it was asked, or on one that the peer requests: it is the SCP of
that too, and says so by role selection (PS3.4 J.3.3, PS3.7 D.3.3.4).
"""

import logging
import re
from collections.abc import Callable
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import build_context, evt
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import StorageCommitmentPushModel

from dicomnode.errors import SpoolFull
from dicomnode.spool.reports import Report

logger = logging.getLogger(__name__)

# PS3.4 J.3.3.1
ALL_COMMITTED, SOME_FAILED = 1, 2
# PS3.7 10.1.1.1.8
SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_EVENT_TYPE = 0x0113
INVALID_ARGUMENT_VALUE = 0x0115
NO_SUCH_SOP_CLASS = 0x0118
RESOURCE_LIMITATION = 0x0213

MAXIMUM_REFERENCES = 10_000  # of one report
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")


def reporting_context(role_selection: dict[Any, Any]) -> list[PresentationContext]:
    """Return the context for reports, where the requestor offers to be the SCP of it.

    Else nobody gets it: as an SCU a requestor would ask for a commitment, which we do not give.
    """
    role = role_selection.get(StorageCommitmentPushModel)
    if role is None or not role.scp_role:
        return []
    context = build_context(StorageCommitmentPushModel)
    context.scu_role, context.scp_role = False, True
    return [context]


def handle_event_report(
    event: evt.Event, peer: str, put: Callable[[Report], None]
) -> tuple[int, Dataset | None]:
    """Return the status of an N-EVENT-REPORT; Success once the report was put."""
    request = event.request
    if request.AffectedSOPClassUID != StorageCommitmentPushModel:
        return NO_SUCH_SOP_CLASS, None
    if request.EventTypeID not in (ALL_COMMITTED, SOME_FAILED):
        return NO_SUCH_EVENT_TYPE, None
    try:
        report = report_of(event.event_information, peer)
    except Exception:  # whatever pydicom makes of what came; its message may quote it
        logger.warning("report not understood", extra={"ae_title": peer})
        return INVALID_ARGUMENT_VALUE, None
    try:
        put(report)
    except SpoolFull as exc:
        logger.warning("report not stored", extra={"ae_title": peer, "reason": str(exc)})
        return RESOURCE_LIMITATION, None
    return SUCCESS, None


def report_of(information: Dataset, peer: str) -> Report:
    """Return what an Event Information (PS3.4 Table J.3-2) says.

    Raises
    ------
    ValueError
        If it names no transaction, or too much.
    """
    committed = list(information.get("ReferencedSOPSequence") or [])
    failed = list(information.get("FailedSOPSequence") or [])
    if len(committed) + len(failed) > MAXIMUM_REFERENCES:
        raise ValueError("more references than were ever asked for")
    return Report(
        peer=peer,
        transaction_uid=_uid(information.TransactionUID),
        committed=tuple(_uid(item.ReferencedSOPInstanceUID) for item in committed),
        failed=tuple(
            (_uid(item.ReferencedSOPInstanceUID), int(item.get("FailureReason") or 0))
            for item in failed
        ),
    )


def _uid(value: Any) -> str:
    text = str(value)
    if len(text) > 64 or not _UID.fullmatch(text):
        raise ValueError("no UID")
    return text
