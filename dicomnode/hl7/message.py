"""HL7 version 2 messages: as much of them as says that patients are one, and the answer.

A parser of our own, of three segments: python-hl7 0.4.5 logs the values it cannot read, and
reserves memory by a number in the message (`.sp` with a count); hl7apy 1.3.5 makes objects of all
segments by 8 MB of tables. Neither is typed or was released since 2024. python-hl7 writes and reads
messages in the tests.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from dicomnode.core import placeholder
from dicomnode.errors import MessageError
from dicomnode.model import PatientKey

# HL7 Table 0211 and what senders write in its stead -> codec. Identifiers are nearly always ASCII:
# in a character set that is not here, or not named, what is not ASCII names nobody.
CHARACTER_SETS = {
    "ASCII": "ascii",
    "8859/1": "iso8859-1",
    "8859/2": "iso8859-2",
    "8859/3": "iso8859-3",
    "8859/4": "iso8859-4",
    "8859/5": "iso8859-5",
    "8859/6": "iso8859-6",
    "8859/7": "iso8859-7",
    "8859/8": "iso8859-8",
    "8859/9": "iso8859-9",
    "8859/15": "iso8859-15",
    "UNICODE": "utf-8",
    "UNICODE UTF-8": "utf-8",
    "UTF-8": "utf-8",
    "ISO IR14": "shift_jis",
    "ISO IR87": "iso2022_jp",
    "ISO IR159": "iso2022_jp_1",
    "GB 18030-2000": "gb18030",
    "KS X 1001": "euc_kr",
    "BIG-5": "big5",
}
MAX_LO = 64  # characters of Patient ID and its issuer, PS3.5 Table 6.2-1
MAX_CONTROL_ID = 199  # MSH-10, of version 2.7 on; 20 before
# Events whose MRG-1 names who became one with PID-3. A39 and A46 are about PID-2 and MRG-4, A35,
# A41, A42 about accounts and visits, A43 to A45 move one from patient to patient.
MERGES = frozenset({"A18", "A34", "A36", "A40"})
# Puts one identifier right, and may be asked for: numbers of two patients that were exchanged are
# put right by three of them, by way of a third number, and links would make both one patient.
CHANGES = "A47"
LINK, UNLINK = "A24", "A37"  # of two PID segments
CONTROL = re.compile("[\x00-\x1f]")
NULL = '""'  # HL7's "delete what is there"


class Kind(StrEnum):
    """What a message says about patients."""

    LINK = "link"
    UNLINK = "unlink"


@dataclass(frozen=True, slots=True)
class Said:
    """Patient keys that are, or are no more, one patient: merged and into whom."""

    kind: Kind
    pairs: tuple[tuple[PatientKey, PatientKey], ...]


@dataclass(frozen=True, slots=True)
class Identities:
    """How identifiers of messages become patient keys."""

    issuers: Mapping[str, str]  # assigning authority -> Issuer of Patient ID
    default_issuer: str  # where a message names no authority
    types: frozenset[str]  # CX.5 that are taken; "" where none is given
    placeholders: Collection[str] = ()  # Patient IDs that stand for nobody
    changes: bool = False  # whether A47 links


@dataclass(frozen=True, slots=True)
class Message:
    """A message, segment by segment: fields by their numbers, MSH-1 included."""

    segments: tuple[tuple[str, ...], ...]
    separators: str  # field, component, repetition, escape, subcomponent

    def header(self, number: int) -> str:
        """Return a field of MSH, empty where it is not there."""
        return _at(self.segments[0], number)

    @property
    def type(self) -> str:
        """MSH-9.1, as ADT."""
        return _at(self.header(9).split(self.separators[1]), 0).strip()

    @property
    def event(self) -> str:
        """MSH-9.2, or EVN-1 in its stead, as A40."""
        event = _at(self.header(9).split(self.separators[1]), 1).strip()
        found = (_at(s, 1) for s in self.segments if s[0] == "EVN")
        return event or next(found, "").strip()

    @property
    def control_id(self) -> str:
        """MSH-10."""
        return self.header(10).strip()

    @property
    def processing_id(self) -> str:
        """MSH-11.1: P production, T training, D debugging."""
        return _at(self.header(11).split(self.separators[1]), 0).strip()


def parse(data: bytes) -> Message:
    """Return a message of its bytes.

    Raises
    ------
    MessageError
        If it is none.
    """
    data = data.removeprefix(BOM_UTF8).strip(b"\r\n \t")  # some engines begin each with one
    if data[:3] != b"MSH" or len(data) < 9:
        raise MessageError("no MSH segment")
    head = re.split(rb"[\r\n]", data, maxsplit=1)[0].decode("latin-1")
    separators = _separators(head)
    named = _at(head.split(separators[0]), 17)  # MSH-18
    text = data.decode(_codec(named.split(separators[2])), errors="replace")
    # Segments end with CR. Some senders write LF instead, others LF after it, or within a text.
    lines = text.split("\r") if "\r" in text else text.split("\n")
    segments = [line.strip("\n").split(separators[0]) for line in lines if line.strip()]
    segments[0].insert(1, separators[0])
    return Message(tuple(tuple(fields) for fields in segments), separators)


def said(message: Message, identities: Identities) -> Said | None:
    """Return what a message says about who is one patient, None where that is nothing.

    Raises
    ------
    MessageError
        If it should, and cannot be understood.
    """
    if any(segment[0] == "MSH" for segment in message.segments[1:]):
        # One answer cannot tell of both, and what the second merges is not the first one's event.
        raise MessageError("several messages in one block")
    events = MERGES | {LINK, UNLINK} | ({CHANGES} if identities.changes else set())
    if message.type != "ADT" or message.event not in events:
        return None
    number = message.control_id
    if not number.isprintable() or not 0 < len(number) <= MAX_CONTROL_ID:
        raise MessageError("no usable MSH-10")
    kind = Kind.UNLINK if message.event == UNLINK else Kind.LINK
    # What was once linked may be taken back, whatever it is called.
    reader = _Reader(message.separators, identities, kind is Kind.LINK)
    groups = _two_pid(message) if message.event in (LINK, UNLINK) else _pid_mrg(message)
    pairs: list[tuple[PatientKey, PatientKey]] = []
    for merged, into in groups:
        pairs += _pairs(reader.keys(*merged), reader.keys(*into))
    return Said(kind, tuple(dict.fromkeys(pairs)))


def answer(message: Message | None, code: str, text: str, now: datetime, control_id: str) -> bytes:
    """Return the acknowledgment of a message, in original mode (HL7 2.5.1, 2.9.2).

    Parameters
    ----------
    message
        None where it could not be read: whose it was is not known then.
    code
        MSA-1: AA, AE or AR.
    text
        MSA-3; ASCII, and nothing of the message.
    control_id
        MSH-10 of the acknowledgment.
    """
    field, component = "|", "^"
    head = ["MSH", "^~\\&", "", "", "", ""]
    event, acknowledged, processing, version, character_set = "", "", "P", "2.5.1", ""
    if message is not None:
        field, component = message.separators[0], message.separators[1]
        # Who sent it and who was to get it, the other way round, as they were written.
        head = ["MSH", message.header(2), *(message.header(n) for n in (5, 6, 3, 4))]
        event = message.event if re.fullmatch(r"\w{1,4}", message.event) else ""
        acknowledged, version = message.header(10), message.header(12) or version
        processing, character_set = message.header(11) or processing, message.header(18)
    kind = component.join(["ACK", event, "ACK"] if event else ["ACK"])
    head += [now.strftime("%Y%m%d%H%M%S"), "", kind, control_id, processing, version]
    if character_set:
        head += ["", "", "", "", "", character_set]
    lines = [field.join(head), field.join(["MSA", code, acknowledged, *([text] if text else [])])]
    encoding = _codec(character_set.split(message.separators[2])) if message else "ascii"
    # What a sender wrote into its header must not end the answer, or a segment of it.
    text = "".join(CONTROL.sub("", line) + "\r" for line in lines)
    return text.encode(encoding, errors="replace")


def _separators(head: str) -> str:
    field = head[3:4]
    end = head.find(field, 4) if field else -1
    found = field + head[4 : end if end >= 0 else len(head)]
    if len(found) in (2, 3, 4):  # MSH-2 may leave out what a message does without
        found += "^~\\&"[len(found) - 1 :]
    found = found[:5]  # a fifth, of version 2.7 on, says what was cut short
    plain = all(c.isascii() and c.isprintable() and not c.isalnum() and c != " " for c in found)
    if len(found) != 5 or len(set(found)) != 5 or not plain:
        raise MessageError("no usable MSH-1 and MSH-2")
    return found


def _codec(named: Sequence[str]) -> str:
    sets = [CHARACTER_SETS.get(name.strip().upper(), "ascii") for name in named if name.strip()]
    # The first holds at the start; others are switched to by escapes, as Japanese ones are.
    escaped = (codec for codec in sets[1:] if codec.startswith("iso2022"))
    return next(escaped, sets[0] if sets else "ascii")


def _pid_mrg(message: Message) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Yield (MRG-1, PID-3), each after its name, of each group of an event that merges."""
    pid: tuple[str, ...] | None = None
    merged = 0
    for segment in message.segments:
        if segment[0] == "PID":
            if pid is not None and not merged:
                raise MessageError("PID without MRG")
            pid, merged = segment, 0
        elif segment[0] == "MRG":
            if pid is None:
                raise MessageError("MRG without PID")
            merged += 1
            yield ("MRG-1", _at(segment, 1)), ("PID-3", _at(pid, 3))
    if not merged:
        raise MessageError("PID without MRG" if pid else "no PID segment")


def _two_pid(message: Message) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    found = [segment for segment in message.segments if segment[0] == "PID"]
    if len(found) != 2:
        raise MessageError("not two PID segments")
    yield ("PID-3", _at(found[1], 3)), ("PID-3", _at(found[0], 3))


def _pairs(
    merged: Sequence[PatientKey], into: Sequence[PatientKey]
) -> Iterator[tuple[PatientKey, PatientKey]]:
    """Yield whom each identifier was merged into: that of the same issuer, else the first."""
    for key in merged:
        for other in [k for k in into if k.issuer == key.issuer] or into[:1]:
            if other != key:
                yield key, other


@dataclass(frozen=True, slots=True)
class _Reader:
    separators: str
    identities: Identities
    passes_over: bool  # placeholders

    def keys(self, name: str, field: str) -> list[PatientKey]:
        """Return the patient keys of a field of type CX, those of types not taken left out.

        So are placeholders: "0" of one issuer says nothing against the others of a list.
        """
        component, repetition = self.separators[1], self.separators[2]
        found = (self._key(text.split(component)) for text in field.split(repetition))
        named = list(dict.fromkeys(key for key in found if key is not None))
        keys = [key for key in named if not self._is_nobody(key)]
        if not keys:
            what = "a placeholder, and no patient" if named else "no patient"
            raise MessageError(f"{name} names {what}")
        return keys

    def _is_nobody(self, key: PatientKey) -> bool:
        placeholders = self.identities.placeholders
        return self.passes_over and placeholder.is_placeholder(key.patient_id, placeholders)

    def _key(self, cx: Sequence[str]) -> PatientKey | None:
        id_, type_ = self._text(_at(cx, 0)), self._text(_at(cx, 4))
        if not id_ or type_ not in self.identities.types:
            return None
        issuer = self._issuer(_at(cx, 3))
        # What no data set can have (PS3.5 Table 6.2-1, LO), or was not decoded, is nobody's.
        for value in (id_, issuer):
            if len(value) > MAX_LO or not value.isprintable() or {"\\", "\ufffd"} & set(value):
                return None
        return PatientKey(id_, issuer)

    def _issuer(self, authority: str) -> str:
        """Return the issuer of an assigning authority, CX.4: namespace & universal ID & type."""
        parts = [self._text(part) for part in authority.split(self.separators[4])]
        namespace, universal = _at(parts, 0), _at(parts, 1)
        if not (namespace or universal):
            return self.identities.default_issuer
        for name in ("&".join(parts), universal, namespace):
            if name and name in self.identities.issuers:
                return self.identities.issuers[name]
        return namespace or universal

    def _text(self, value: str) -> str:
        plain = dict(zip("FSRET", self.separators, strict=True))

        def of(match: re.Match[str]) -> str:
            name = match[1]
            if name in plain:
                return plain[name]
            if re.fullmatch(r"X([2-6][0-9A-Fa-f]|7[0-9A-Ea-e])+", name):
                return bytes.fromhex(name[1:]).decode("ascii")
            return "\ufffd"

        mark = re.escape(self.separators[3])
        text = re.sub(f"{mark}([^{mark}]*){mark}", of, value).strip(" ")
        return "" if text == NULL else text


def _at(values: Sequence[str], place: int) -> str:
    return values[place] if place < len(values) else ""
