"""The report of what a Series covers of the body."""

from collections.abc import Sequence

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.objects import coverage_report
from dicomnode.outgoing import Nothing, Outgoing, objects


def make(engine: Engine, settings: Settings, delivery: store.Delivery) -> Sequence[Outgoing]:
    """Return the report of a Series.

    Raises
    ------
    Nothing
        If it has no curve any more.
    ObjectError
        If the stored curve cannot be said by an object.
    """
    with store.reading(engine) as session:
        known = store.source_of(session, delivery.what.subject)
    if known is None:
        raise Nothing
    source, curve, regions = known.source, known.curve, known.regions
    ds = coverage_report.coverage_report(source, curve, regions, known.origin)
    return [objects.outgoing(ds)]
