"""What a webhook is told: JSON of UIDs and numbers, nothing of the patient."""

from typing import Any

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.outgoing import Nothing


def make(engine: Engine, settings: Settings, delivery: store.Delivery) -> dict[str, Any]:
    """Return the offset of a pair of Studies: of the pair of Series that is trusted most.

    A refusal is told as well: who was told of an offset before is to hear that it is gone.

    Who was told before, and of whose pairs none is left, is told that: a note rejected one, or
    they are not one patient any more.

    Raises
    ------
    Nothing
        If no pair of theirs has an offset, and nobody was told of one.
    """
    fixed_study, moving_study = delivery.what.subject, delivery.what.other
    with store.reading(engine) as session:
        offsets = store.offsets_of(session, fixed_study=fixed_study, moving_study=moving_study)
    if not offsets and delivery.done_at is not None:
        return {
            "event": "gone",
            "fixed": {"study_uid": fixed_study},
            "moving": {"study_uid": moving_study},
        }
    if not offsets:
        raise Nothing("no pair of theirs has an offset any more")
    best, offset = offsets[0], offsets[0].offset
    return {
        "event": "offset",
        "fixed": {"study_uid": fixed_study, "series_uid": best.fixed_series},
        "moving": {"study_uid": moving_study, "series_uid": best.moving_series},
        "method": offset.method,
        "offset_mm": offset.offset_mm,
        "sigma_mm": offset.sigma_mm,
        "overlap_mm": offset.overlap_mm,
        "status": offset.status,
        "reason": offset.reason,
        "dx_mm": offset.dx_mm,
        "dy_mm": offset.dy_mm,
        "model": best.model,
        "computed_at": best.computed_at.isoformat(),
    }
