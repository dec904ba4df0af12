"""What goes out, and how that went: for those who look after the node."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from dicomnode import present, store
from dicomnode.model import DeliveryState
from dicomnode.web.access import Admin
from dicomnode.web.answer import API, UID, Before, Limit, plain, problems
from dicomnode.web.models import Delivery, DeliveryPage

router = APIRouter(prefix=API, tags=["deliveries"])


@router.get("/deliveries", response_model=DeliveryPage, responses=problems())
def deliveries(
    caller: Admin,
    state: DeliveryState | None = None,
    destination: Annotated[
        str | None,
        Query(max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$", description="AE title, or URL."),
    ] = None,
    subject: Annotated[
        str | None,
        Query(max_length=64, pattern=UID, description="UID of a Series, or of the fixed Study."),
    ] = None,
    before: Before = None,
    limit: Limit = 100,
) -> Response:
    """Return deliveries, the newest first. For the role admin."""
    caller.saw(command="deliveries", subject=subject, state=state)
    with store.reading(caller.part.engine) as session:
        rows = store.list_deliveries(
            session,
            state=state,
            destination=destination,
            subject=subject,
            before=before,
            limit=limit + 1,
        )
    found = [Delivery.model_validate(present.delivery_json(row)) for row in rows[:limit]]
    return plain(DeliveryPage(deliveries=found, next=rows[limit - 1].id if rows[limit:] else None))
