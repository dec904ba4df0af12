"""The report of what a Series covers of the body."""

from collections.abc import Sequence

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.model import SeriesState
from dicomnode.objects import coverage_report
from dicomnode.outgoing import Nothing, NotYet, Outgoing, objects


def make(engine: Engine, settings: Settings, delivery: store.Delivery) -> Sequence[Outgoing]:
    """Return the report of a Series.

    Raises
    ------
    Nothing
        If it has no curve any more.
    NotYet
        If it is arriving again: once it is finished, it is asked for anew.
    ObjectError
        If the stored curve cannot be said by an object.
    """
    with store.reading(engine) as session:
        # Its curve is still that of before, and its patient may be another one already.
        if store.state_of(session, delivery.what.subject) is SeriesState.OPEN:
            raise NotYet("the Series is arriving again")
        known = store.source_of(session, delivery.what.subject)
    if known is None:
        raise Nothing("the Series has no curve any more")
    source, curve, regions = known.source, known.curve, known.regions
    ds = coverage_report.coverage_report(source, curve, regions, known.origin)
    return [objects.outgoing(ds)]
