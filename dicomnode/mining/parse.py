"""Text -> Expression, or an ExpressionError that points at the character.

Lark: pure Python without dependencies of its own, LALR(1) in linear time, and where it stops it
tells which words it would have taken there, of which the messages are made.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from difflib import get_close_matches
from fractions import Fraction
from functools import cache
from math import ceil
from typing import Any, NoReturn, cast

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from dicomnode.core import region
from dicomnode.core.region import Region
from dicomnode.errors import ExpressionError
from dicomnode.mining.evaluate import LOWER
from dicomnode.mining.fields import FIELDS, FUNCTIONS, Field, Kind, spelled
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
    Order,
    Prior,
    Span,
    Text,
    atoms,
)

MAX_LENGTH = 4000  # characters
MAX_DEPTH = 20  # of parentheses within each other
MAX_REAL = 1e300  # what is beyond compares the same
MIN_DIGEST = 8
DAYS = {"d": 1, "w": 7, "y": 365}

GRAMMAR = r"""
start: either
?either: both (OR both)*
?both: single (AND single)*
?single: NOT single -> negated
    | "(" either ")"
    | NAME "(" [argument ("," argument)*] ")" -> call
    | NAME COMPARISON value -> compare
    | NAME [NOT] IN "(" value ("," value)* ")" -> member
argument: [NAME EQUALS] value
?value: NAME | STRING | NUMBER | DATE | DURATION | UID

AND.2: /[aA][nN][dD]\b/
OR.2: /[oO][rR]\b/
NOT.2: /[nN][oO][tT]\b/
IN.2: /[iI][nN]\b/
NAME: /[A-Za-z_][A-Za-z0-9_]*/
STRING: /"[^"\n]*"|'[^'\n]*'/
DATE.3: /[0-9]{4}-[0-9]{2}-[0-9]{2}/
DURATION.2: /[0-9]+[dwy]\b/
UID.2: /[0-9]+(\.[0-9]+){2,}/
NUMBER: /[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)/
EQUALS.1: "="
COMPARISON: "<=" | ">=" | "!=" | "==" | "<" | ">" | "~" | EQUALS
%ignore /[ \t\r\n]+/
"""

_VALUES = {"STRING", "NUMBER", "DATE", "DURATION", "UID"}


@dataclass(frozen=True, slots=True)
class _Joined:
    all: bool  # and, or
    parts: tuple["_Part", ...]


@dataclass(frozen=True, slots=True)
class _Negated:
    part: "_Part"


@dataclass(frozen=True, slots=True)
class _Call:
    name: Token
    arguments: tuple[tuple[Token | None, Token], ...]  # keyword, value


@dataclass(frozen=True, slots=True)
class _Compare:
    name: Token
    order: Token
    values: tuple[Token, ...]
    negated: bool = False


_Part = _Joined | _Negated | _Call | _Compare


class _Build(Transformer[Token, Any]):
    """What the parser calls as it goes, so that deep nesting needs no recursion here."""

    def start(self, items: list[Any]) -> Any:
        return items[0]

    def either(self, items: list[Any]) -> Any:
        return _Joined(False, tuple(items[::2]))

    def both(self, items: list[Any]) -> Any:
        return _Joined(True, tuple(items[::2]))

    def negated(self, items: list[Any]) -> Any:
        return _Negated(items[1])

    def argument(self, items: list[Any]) -> Any:
        return items[0], items[-1]

    def call(self, items: list[Any]) -> Any:
        return _Call(items[0], tuple(i for i in items[1:] if i is not None))

    def compare(self, items: list[Any]) -> Any:
        return _Compare(items[0], items[1], (items[2],))

    def member(self, items: list[Any]) -> Any:
        name, negated, order, *values = items
        return _Compare(name, order, tuple(values), negated is not None)


def parse(
    text: str,
    regions: Sequence[Region],
    tables: Mapping[str, Sequence[Region]] | None = None,
) -> Expression:
    """Return what a text asks for.

    Parameters
    ----------
    text : str
        An expression, see docs/mining.md.
    regions : sequence of Region
        Those that may be named, with the current bundle's limits.
    tables : mapping
        Digest -> regions of each bundle that made curves: each curve is asked by its own.

    Raises
    ------
    ExpressionError
        If it is none; the message shows where.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters", text[:60], 60)
    _refuse_deep(text)
    try:
        tree = cast(_Part, _parser().parse(text))
    except UnexpectedInput as exc:
        _explain(text, exc, regions)
    node = _Binder(text, regions, tables or {}).bind(tree)
    named = {getattr(atom, "field", "") for atom in atoms(node)}
    every = any(FIELDS[name].every_series for name in named if name in FIELDS)
    return Expression(text, node, every)


@cache
def _parser() -> Lark:
    return Lark(
        GRAMMAR, parser="lalr", lexer="contextual", transformer=_Build(), maybe_placeholders=True
    )


def _refuse_deep(text: str) -> None:
    """Refuse what would nest beyond what a tree is walked to, before it is one."""
    depth, quote = 0, ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character in (quote, "\n") else quote
        elif character in "\"'":
            quote = character
        elif character in "()":
            depth += 1 if character == "(" else -1
            if depth > MAX_DEPTH:
                message = f"parentheses within each other, more than {MAX_DEPTH}"
                raise ExpressionError(message, text, position)


def _explain(text: str, exc: UnexpectedInput, regions: Sequence[Region]) -> NoReturn:
    """Say what was expected where the parser stopped."""
    position, taken = len(text.rstrip()), set[str]()
    if isinstance(exc, UnexpectedToken):
        taken = set(exc.accepts or exc.expected)
        if exc.token.type != "$END":
            position = exc.token.start_pos or 0
    elif isinstance(exc, UnexpectedCharacters):
        taken, position = set(exc.allowed or ()), exc.pos_in_stream or 0
    if position < len(text) and text[position] in "\"'" and isinstance(exc, UnexpectedCharacters):
        raise ExpressionError("this quote is not closed", text, position) from None
    expected = _expected(taken)
    found = "the end" if position >= len(text.rstrip()) else _word_at(text, position)
    message = f"expected {expected}, found {found}"
    before = text[:position].split()[-1:] or [""]
    if "COMPARISON" in taken and region.lookup(regions, before[0].replace("_", " ")):
        message += f": did you mean overlaps({before[0]})?"
    raise ExpressionError(message, text, position) from None


def _expected(taken: set[str]) -> str:
    labels: list[str] = []
    if "NOT" in taken and "NAME" in taken:
        labels.append("a field, covers(...), overlaps(...), height(...), prior(...), not")
    elif "NAME" in taken:
        labels.append("a value")
    elif "COMPARISON" in taken:
        labels.append("a comparison (= != < <= >= > ~ in)")
    elif "IN" in taken:
        labels.append("'in'")
    elif taken & _VALUES:
        labels.append("a value")
    for terminal, label in (
        ("LPAR", "'('"),
        ("COMMA", "','"),
        ("EQUALS", "'='"),
        ("AND", "'and'"),
        ("OR", "'or'"),
        ("RPAR", "')'"),
        ("$END", "the end"),
    ):
        if terminal in taken:
            labels.append(label)
    return " or ".join([", ".join(labels[:-1]), labels[-1]] if labels[1:] else labels or ["less"])


def _word_at(text: str, position: int) -> str:
    word = text[position:].split(maxsplit=1)[0]
    short = "".join(c for c in word[:20] if c.isprintable())
    return f"'{short}'" if short else "a character that cannot be shown"


class _Binder:
    """Gives the words of one text their meaning."""

    def __init__(
        self, text: str, regions: Sequence[Region], tables: Mapping[str, Sequence[Region]]
    ) -> None:
        self.text = text
        self.regions = regions
        self.tables = tables

    def bind(self, part: _Part) -> Node:
        """Return the node of a part, and of all within it."""
        negated = False
        while isinstance(part, _Negated):
            part, negated = part.part, not negated
        if isinstance(part, _Joined):
            bound = tuple(self.bind(p) for p in part.parts)
            node: Node = And(bound) if part.all else Or(bound)
        elif isinstance(part, _Call):
            node = self._call(part)
        else:
            node = self._compare(part)
        if negated:
            return node.part if isinstance(node, Not) else Not(node)
        return node

    def _refuse(self, message: str, token: Token) -> NoReturn:
        raise ExpressionError(message, self.text, token.start_pos or 0)

    # Functions

    def _call(self, call: _Call) -> Node:
        name = call.name.lower()
        if name in FIELDS:
            self._refuse(f"{name} is a field, to be compared: {name} = ...", call.name)
        if name not in FUNCTIONS:
            self._refuse(f"no function '{call.name}'{self._like(name, FUNCTIONS)}", call.name)
        usage = FUNCTIONS[name].usage
        for keyword, _ in call.arguments:
            if keyword is not None and (name, keyword.lower()) != ("prior", "within"):
                self._refuse(f"{usage} takes no '{keyword}'", keyword)
        fewest, most = {"covers": (1, 2), "overlaps": (1, 1), "height": (2, 2)}.get(name, (0, 1))
        if len(call.arguments) > most:
            self._refuse(f"too much for {usage}", call.arguments[most][1])
        if len(call.arguments) < fewest:
            self._refuse(f"too little for {usage}", call.name)
        values = [value for _, value in call.arguments]
        if name == "prior":
            return self._prior(call)
        if name == "height":
            return self._height(*values)
        return self._region(name, values)

    def _prior(self, call: _Call) -> Node:
        if not call.arguments:
            return Prior(None)
        _, value = call.arguments[0]
        if value.type != "DURATION":
            self._refuse("expected days, weeks or years: 90d, 12w, 2y", value)
        days = int(value[:-1]) * DAYS[value[-1]]
        return Prior(min(days, 1_000_000))  # longer than the calendar

    def _height(self, first: Token, last: Token) -> Node:
        low_um, high_um = self._length(first), self._length(last)
        for token, value in ((first, low_um), (last, high_um)):
            if abs(value) > region.LIMIT_UM:
                self._refuse("no body is that high", token)
        if low_um >= high_um:
            self._refuse("expected a height above the first: height(FROM, TO), in mm", last)
        return Filled(span=Span(low_um, high_um, high_um - low_um))

    def _region(self, function: str, values: list[Token]) -> Node:
        token = values[0]
        name = token[1:-1] if token.type == "STRING" else str(token).replace("_", " ")
        known = region.lookup(self.regions, name)
        if known is None:
            if not self.regions:
                self._refuse("the weight bundle has no regions: height(FROM, TO) needs none", token)
            names = [spelled(r.name) for r in self.regions]
            self._refuse(f"no region '{token}'{self._like(spelled(name.lower()), names)}", token)
        share = self._fraction(values[1]) if values[1:] else Fraction(region.COVERED)
        spans = {}
        for digest, table in self.tables.items():
            found = region.lookup(table, known.name)
            span = found and _span(found, share if function == "covers" else None)
            if span:
                spans[digest] = span
        if function == "covers" and known.span_um is None:
            end = "lower" if known.low_mm is None else "upper"
            self._refuse(
                f"{known.name} has no known {end} end, so no share of it: "
                f"overlaps({spelled(known.name)}), or height(FROM, TO)",
                token,
            )
        if function == "overlaps" and known.low_mm is None and known.high_mm is None:
            self._refuse(f"where {known.name} lies is not known", token)
        return Filled(by_bundle=tuple(sorted(spans.items())))

    def _fraction(self, token: Token) -> Fraction:
        share = self._number(token)
        if not 0 < share <= 1:
            self._refuse("expected a share above 0, to 1", token)
        return share

    # Comparisons

    def _compare(self, part: _Compare) -> Node:
        name = part.name.lower()
        if name in FUNCTIONS:
            self._refuse(f"{name} is a function: {FUNCTIONS[name].usage}", part.name)
        if name not in FIELDS:
            self._refuse(f"no field '{part.name}'{self._like(name, FIELDS)}", part.name)
        field, order = FIELDS[name], str(part.order)
        if order == "~" and field.kind is not Kind.TEXT:
            self._refuse(f"{name} is {field.kind}: ~ looks within texts", part.order)
        if order in ("<", "<=", ">=", ">") and not field.kind.ordered:
            self._refuse(f"{name} is {field.kind}, without an order: = != in", part.order)
        order = "=" if order not in ("<", "<=", ">=", ">", "~", "!=") else order
        negated = part.negated or order == "!="
        node = self._meaning(field, "=" if order == "!=" else order, part.values)
        return Not(node) if negated else node

    def _meaning(self, field: Field, order: str, values: tuple[Token, ...]) -> Node:
        match field.kind:
            case Kind.TEXT | Kind.CHOICE:
                texts = tuple(self._text(field, v) for v in values)
                if order == "~":
                    if not texts[0]:
                        self._refuse("every text has an empty one within", values[0])
                    return Text(field.name, part=texts[0].translate(LOWER))
                return Text(field.name, tuple(dict.fromkeys(texts)))
            case Kind.FLAG:
                return Flagged(tuple(dict.fromkeys(self._text(field, v) for v in values)))
            case Kind.BUNDLE:
                return Bundle(tuple(dict.fromkeys(self._digest(v) for v in values)))
        parts = tuple(self._one(field, cast(Order, order), v) for v in values)
        return parts[0] if len(parts) == 1 else Or(parts)

    def _one(self, field: Field, order: Order, token: Token) -> Node:
        match field.kind:
            case Kind.DAY:
                return self._day(field, order, token)
            case Kind.REAL:
                real = float(self._number(token, field))
                return Number(field.name, order, min(max(real, -MAX_REAL), MAX_REAL))
            case Kind.LENGTH:
                value = self._length(token, field)
            case _:
                count = self._number(token, field)
                if count.denominator != 1:
                    self._refuse(f"{field.name} is {field.kind}", token)
                value = int(count)
        beyond = region.LIMIT_UM + 1  # nothing stored is: what lies beyond compares the same
        return Number(field.name, order, min(max(value, -beyond), beyond))

    def _day(self, field: Field, order: Order, token: Token) -> Node:
        if token.type != "DATE":
            self._refuse(f"{field.name} is {field.kind}: 2024-05-17", token)
        try:
            first = date.fromisoformat(token)
            end = first + timedelta(days=1)
        except (ValueError, OverflowError):
            self._refuse(f"no day '{token}'", token)
        match order:
            case "=":
                return Day(field.name, first, end)
            case "<":
                return Day(field.name, None, first)
            case "<=":
                return Day(field.name, None, end)
            case ">=":
                return Day(field.name, first, None)
            case ">":
                return Day(field.name, end, None)

    # Values

    def _number(self, token: Token, field: Field | None = None) -> Fraction:
        if token.type != "NUMBER":
            what = f"{field.name} is {field.kind}" if field else "expected a number"
            self._refuse(what, token)
        return Fraction(str(token).removesuffix("."))

    def _length(self, token: Token, field: Field | None = None) -> int:
        um = self._number(token, field) * region.UM_PER_MM
        if um.denominator != 1:
            self._refuse("lengths are known to three decimals of a mm", token)
        return int(um)

    def _text(self, field: Field, token: Token) -> str:
        text = token[1:-1] if token.type == "STRING" else str(token)
        for i, character in enumerate(text):
            if ord(character) < 32 or 0xD800 <= ord(character) <= 0xDFFF:
                at = (token.start_pos or 0) + i + (token.type == "STRING")
                raise ExpressionError("a character that no attribute has", self.text, at)
        if field.choices:
            text = text.lower()
            if text not in field.choices:
                like = self._like(text, field.choices)
                self._refuse(f"no {field.name} '{token}'{like}", token)
        return text

    def _digest(self, token: Token) -> str:
        text = (token[1:-1] if token.type == "STRING" else str(token)).lower()
        if len(text) < MIN_DIGEST or not set(text) <= set("0123456789abcdef"):
            self._refuse(f"a digest is {MIN_DIGEST} or more of 0-9 and a-f, in quotes", token)
        return text

    def _like(self, word: str, known: Iterable[str]) -> str:
        known = list(known)
        near = get_close_matches(word, known, n=1, cutoff=0.6)
        if near:
            return f": did you mean {near[0]}?"
        return f": there are {', '.join(known)}"


def _span(found: Region, share: Fraction | None) -> Span | None:
    """Return what of a region is to be filled: a share, or with None some of it.

    A region with one known end is taken to go on without end: of the head, that is right.
    """
    if share is not None:
        if found.span_um is None:
            return None
        low, high = found.span_um
        return Span(low, high, ceil(share * (high - low)))
    if found.low_mm is None and found.high_mm is None:
        return None
    low = -region.LIMIT_UM if found.low_mm is None else region.to_um(found.low_mm)
    high = region.LIMIT_UM if found.high_mm is None else region.to_um(found.high_mm)
    return Span(low, high, 1)
