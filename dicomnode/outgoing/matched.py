"""What a rule asks for, when it is due: whether it still holds, and what its webhook is told."""

from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from dicomnode import store
from dicomnode.config import Rule, Settings
from dicomnode.model import SeriesState
from dicomnode.outgoing import Nothing, NotYet
from dicomnode.rules import Rules
from dicomnode.store import Delivery, Match


def met(session: Session, settings: Settings, delivery: Delivery) -> tuple[Rule, Match]:
    """Return the rule of a delivery and the Series it is about, which meets it still.

    Raises
    ------
    Nothing
        If the rule is gone or altered, or the Series does not meet it any more.
    NotYet
        If the Series is arriving again: once it is finished, it is asked for anew.
    """
    what = delivery.what
    rules = Rules.of(settings)
    rule = rules.named(what.rule)
    if rule is None or what.destination not in (rule.send_to, rule.webhook):
        raise Nothing(f"no rule {what.rule} asks for it any more")
    state = store.state_of(session, what.subject)
    if state is SeriesState.OPEN:
        raise NotYet("the Series is arriving again")
    found = None if state is None else store.match_of(session, what.subject)
    if found is None or rule not in rules.met(session, found.id):
        raise Nothing(f"the Series does not meet the rule {what.rule} any more")
    return rule, found


def make(engine: Engine, settings: Settings, delivery: Delivery) -> dict[str, Any]:
    """Return what the webhook of a rule is told: UIDs and numbers, nothing of the patient.

    Raises
    ------
    Nothing, NotYet
        See `met`.
    """
    with store.reading(engine) as session:
        rule, found = met(session, settings, delivery)
    return {
        "event": "rule",
        "rule": rule.name,
        "study_uid": found.study_uid,
        "series_uid": found.series_uid,
        "model": found.model,
        "slices": found.slices,
        "spacing_mm": found.spacing_mm,
        "height_mm": found.height_mm,
        "quality": {"pearson_r": found.quality, "slope": found.slope, "flags": found.flags},
        "coverage": [
            {"region": region.name, "code": region.code, "fraction": share}
            for region, share in found.coverage
        ],
    }
