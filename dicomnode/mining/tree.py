"""What an expression means, its words resolved: regions are spans, lengths are micrometres."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Literal

Order = Literal["<", "<=", "=", ">=", ">"]


@dataclass(frozen=True, slots=True)
class Span:
    """At least `need_um` of the body heights from `low_um` to `high_um`, all micrometres."""

    low_um: int
    high_um: int
    need_um: int


@dataclass(frozen=True, slots=True)
class Filled:
    """The slices fill enough of a span.

    A region lies at heights of the bundle that made the curve: `by_bundle` holds a span for
    each digest that has the region, and a curve of another bundle fills nothing of it.
    `span` is one that holds for curves of any bundle.
    """

    span: Span | None = None
    by_bundle: tuple[tuple[str, Span], ...] = ()


@dataclass(frozen=True, slots=True)
class Number:
    """A whole number (count, micrometres) or a real one compares as given; unknown does not."""

    field: str
    order: Order
    value: int | float


@dataclass(frozen=True, slots=True)
class Text:
    """A text is one of the values, or has `part` within, in any case of A to Z."""

    field: str
    values: tuple[str, ...] = ()
    part: str | None = None


@dataclass(frozen=True, slots=True)
class Flagged:
    """The curve has one of these flags."""

    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """The curve was made by a bundle whose digest begins with one of these."""

    prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Day:
    """The day of a time is from `first` on and before `end`; None: open."""

    field: str
    first: date | None
    end: date | None


@dataclass(frozen=True, slots=True)
class Prior:
    """An earlier Study of the patient, with a curve, at most so many days before; None: ever."""

    days: int | None


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not hold."""

    part: "Node"


@dataclass(frozen=True, slots=True)
class And:
    """All parts hold."""

    parts: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Or:
    """One part holds, or more."""

    parts: "tuple[Node, ...]"


Atom = Filled | Number | Text | Flagged | Bundle | Day | Prior
Node = Atom | Not | And | Or


@dataclass(frozen=True, slots=True)
class Expression:
    """A question that was understood.

    `every_series` says whether Series without a curve are looked at as well: only where the
    question names something that they have and that says why (state, reason).
    """

    text: str
    node: Node
    every_series: bool


def atoms(node: Node) -> Iterator[Atom]:
    """Yield what a tree is made of."""
    if isinstance(node, And | Or):
        for part in node.parts:
            yield from atoms(part)
    elif isinstance(node, Not):
        yield from atoms(node.part)
    else:
        yield node
