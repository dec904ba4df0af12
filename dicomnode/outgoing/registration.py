"""The Spatial Registration of a pair of Studies: of the pair of Series that is trusted most."""

from collections.abc import Sequence

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.model import OffsetStatus
from dicomnode.objects import registration
from dicomnode.outgoing import Nothing, Outgoing, objects


def make(engine: Engine, settings: Settings, delivery: store.Delivery) -> Sequence[Outgoing]:
    """Return the registration of the moving Study onto the fixed one.

    Raises
    ------
    Nothing
        If no pair of theirs has an offset, or the best one was refused.
    ObjectError
        If the stored offset cannot be said by an object.
    """
    fixed_study, moving_study = delivery.what.subject, delivery.what.other
    with store.reading(engine) as session:
        offsets = store.offsets_of(session, fixed_study=fixed_study, moving_study=moving_study)
        if not offsets or offsets[0].offset.status is OffsetStatus.REFUSED:
            why = "is refused" if offsets else "is gone"
            stays = "; what was delivered stays there" if delivery.done_at else ""
            raise Nothing(f"the offset {why}{stays}")
        best = offsets[0]
        fixed = store.source_of(session, best.fixed_series)
        moving = store.source_of(session, best.moving_series)
    if fixed is None or moving is None or not fixed.curve.model == moving.curve.model == best.model:
        raise Nothing  # a curve was revised since: its pairs ask anew
    origin = fixed.origin_with(moving)
    ds = registration.registration(fixed.source, moving.source, best.offset, origin)
    return [objects.outgoing(ds)]
