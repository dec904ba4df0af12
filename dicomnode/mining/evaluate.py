"""An expression asked of one Series, in plain Python: what the SQL has to agree with."""

import operator
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

from dicomnode.core import region
from dicomnode.mining.tree import (
    And,
    Bundle,
    Day,
    Expression,
    Filled,
    Flagged,
    Node,
    Not,
    Number,
    Or,
    Prior,
    Text,
)

ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    ">=": operator.ge,
    ">": operator.gt,
}
# A to Z alone: what an upper case is beyond them, each database and each locale sees otherwise.
LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


@dataclass(frozen=True, slots=True)
class Record:
    """What an expression may ask of a Series; names are those of the language.

    Lengths are micrometres. What a Series without a curve has not is None.
    """

    texts: Mapping[str, str | None]
    times: Mapping[str, datetime | None]
    bundle: str | None = None  # digest; None: no curve
    stretches: tuple[tuple[int, int], ...] = ()
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()
    # Times of the patient's other Studies that have a curve, None where unknown.
    others: tuple[datetime | None, ...] = ()


def evaluate(expression: Expression, record: Record) -> bool:
    """Whether a Series is one of those that an expression asks for."""
    if record.bundle is None and not expression.every_series:
        return False
    return _holds(expression.node, record)


def _holds(node: Node, record: Record) -> bool:
    match node:
        case And(parts):
            return all(_holds(part, record) for part in parts)
        case Or(parts):
            return any(_holds(part, record) for part in parts)
        case Not(part):
            return not _holds(part, record)
        case Filled(span, by_bundle):
            span = dict(by_bundle).get(record.bundle or "") if span is None else span
            if span is None or record.bundle is None:
                return False
            filled = region.filled_um(record.stretches, span.low_um, span.high_um)
            return filled >= span.need_um
        case Number(name, order, value):
            known = record.numbers.get(name)
            return known is not None and ORDERS[order](known, value)
        case Text(name, values, part):
            text = record.texts[name]
            if text is None:
                return False
            return text in values if part is None else part in text.translate(LOWER)
        case Flagged(flags):
            return not record.flags.isdisjoint(flags)
        case Bundle(prefixes):
            return record.bundle is not None and record.bundle.startswith(prefixes)
        case Day(name, first, end):
            time = record.times[name]
            return time is not None and _within(time.date(), first, end)
        case Prior(days):
            own = record.times["study_date"]
            return own is not None and any(
                other is not None
                and other < own
                and (days is None or (own.date() - other.date()).days <= days)
                for other in record.others
            )


def _within(day: date, first: date | None, end: date | None) -> bool:
    return (first is None or day >= first) and (end is None or day < end)
