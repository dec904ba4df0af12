"""HL7 messages: what is read of them, what is answered, and that nothing stops the reading."""

from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise

import hl7
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dicomnode.core import placeholder
from dicomnode.errors import MessageError
from dicomnode.hl7 import message as messages
from dicomnode.hl7 import mllp
from dicomnode.hl7.message import Identities, Kind, Said
from dicomnode.hl7.mllp import FS, MAX_BYTES, VT, Blocks, NotMLLP, TooLong
from dicomnode.model import PatientKey

NOW = datetime(2026, 5, 1, 12, 30, tzinfo=UTC)
RULES = Identities(
    {"ADT1": "HOSPITAL", "1.2.9": "LAB"},
    "HOME",
    frozenset({"", "MR", "PI"}),
    placeholder.COMMON,
)
HEAD = "MSH|^~\\&|ADT|KIS|NODE|RAD|20260501123000||ADT^A40^ADT_A39|M1|P|2.5.1"
A, B = PatientKey("A", "HOSPITAL"), PatientKey("B", "HOSPITAL")


def a40(mrg: str = "A^^^ADT1", pid: str = "B^^^ADT1", head: str = HEAD) -> bytes:
    return f"{head}\rEVN|A40|20260501\rPID|||{pid}||DOE^JANE\rMRG|{mrg}\r".encode()


def read(data: bytes, rules: Identities = RULES) -> Said | None:
    return messages.said(messages.parse(data), rules)


def pairs(data: bytes) -> tuple[tuple[PatientKey, PatientKey], ...]:
    found = read(data)
    assert found is not None
    return found.pairs


def test_a_merge_names_who_was_merged_into_whom():
    assert read(a40()) == Said(Kind.LINK, ((A, B),))


@pytest.mark.parametrize("event", ["A18", "A34", "A36", "A40"])
def test_each_event_that_merges_by_mrg_is_read(event):
    assert pairs(a40(head=HEAD.replace("A40^ADT_A39", event))) == ((A, B),)


@pytest.mark.parametrize("event", ["A08", "A31", "A39", "A43", "A46", "A47", "A01", ""])
def test_other_events_say_nothing(event):
    data = a40(head=HEAD.replace("^A40^ADT_A39", f"^{event}")).replace(b"EVN|A40", b"EVN|")
    assert read(data) is None


def test_an_identifier_that_was_changed_links_where_that_was_asked_for():
    """Two patients whose numbers were exchanged: three A47 would make them one."""
    data = a40(head=HEAD.replace("A40^ADT_A39", "A47"))
    assert read(data) is None
    found = read(data, replace(RULES, changes=True))
    assert found is not None and found.pairs == ((A, B),)


@pytest.mark.parametrize(
    "id_", ["UNKNOWN", "unknown", "0", "000000", "N/A", "n.a.", "No ID", "---", "?", "_", "Unk."]
)
def test_a_placeholder_is_never_linked(id_):
    """One link would make all who ever had it one patient."""
    for name, data in (("MRG-1", a40(mrg=f"{id_}^^^ADT1")), ("PID-3", a40(pid=f"{id_}^^^ADT1"))):
        with pytest.raises(MessageError, match=f"{name} names a placeholder"):
            read(data)
    # In a list it says nothing against the others.
    assert pairs(a40(mrg=f"{id_}^^^LAB~A^^^ADT1", pid=f"B^^^ADT1~{id_}^^^LAB")) == ((A, B),)
    # What was linked before may be taken back.
    head = HEAD.replace("A40^ADT_A39", "A37")
    back = read(f"{head}\rEVN|A37\rPID|||{id_}^^^ADT1\rPID|||B^^^ADT1\r".encode())
    assert back is not None and back.pairs == ((B, PatientKey(id_, "HOSPITAL")),)


@pytest.mark.parametrize("id_", ["10", "00A", "UNKNOWN1", "TEST-7", "NA2", "9"])
def test_a_number_of_somebody_is_no_placeholder(id_):
    assert pairs(a40(mrg=f"{id_}^^^ADT1")) == ((PatientKey(id_, "HOSPITAL"), B),)


def test_a_house_names_its_own_placeholders():
    rules = replace(RULES, placeholders=("Zufalls-ID",))
    with pytest.raises(MessageError, match="placeholder"):
        read(a40(mrg="ZUFALLSID^^^ADT1"), rules)


@pytest.mark.parametrize("event", ["A40", "A08"])
def test_two_messages_in_one_block_are_refused(event):
    """One answer cannot tell of both, and whoever sent them takes the second for done."""
    first = a40(head=HEAD.replace("A40^ADT_A39", event))
    with pytest.raises(MessageError, match="several messages"):
        read(first + a40("C^^^ADT1", "D^^^ADT1", HEAD.replace("M1", "M2")))


def test_other_messages_say_nothing():
    assert read(a40(head=HEAD.replace("ADT^A40", "ORU^A40"))) is None


def test_the_event_stands_in_evn_where_msh_does_not_name_it():
    assert pairs(a40(head=HEAD.replace("ADT^A40^ADT_A39", "ADT"))) == ((A, B),)


@pytest.mark.parametrize(("event", "kind"), [("A24", Kind.LINK), ("A37", Kind.UNLINK)])
def test_two_patients_are_linked_and_unlinked(event, kind):
    head = HEAD.replace("A40^ADT_A39", event)
    data = f"{head}\rEVN|{event}\rPID|||B^^^ADT1\rPD1|\rPID|||A^^^ADT1\r".encode()
    assert read(data) == Said(kind, ((A, B),))
    with pytest.raises(MessageError, match="two PID"):
        read(data + b"PID|||C\r")


def test_one_message_may_merge_several_patients():
    more = b"PID|||D^^^ADT1\rPD1|\rMRG|C^^^ADT1\r"
    assert pairs(a40() + more) == (
        (A, B),
        (PatientKey("C", "HOSPITAL"), PatientKey("D", "HOSPITAL")),
    )


@pytest.mark.parametrize(
    ("authority", "issuer"),
    [
        ("ADT1", "HOSPITAL"),  # by the namespace
        ("X&1.2.9&ISO", "LAB"),  # by the universal ID, which goes first
        ("ADT1&1.2.9&ISO", "LAB"),
        ("ADT1&1.2.3&ISO", "HOSPITAL"),
        ("NEW&1.2.3&ISO", "NEW"),  # not named in the settings
        ("&1.2.3&ISO", "1.2.3"),
        ("", "HOME"),
        ('""', "HOME"),
    ],
)
def test_an_assigning_authority_becomes_an_issuer(authority, issuer):
    ((merged, _),) = pairs(a40(mrg=f"A^^^{authority}", pid=f"B^^^{authority}"))
    assert merged == PatientKey("A", issuer)


def test_the_whole_authority_may_be_named():
    rules = Identities({"X&1.2.3&ISO": "ALL", "X": "PART"}, "", frozenset({""}))
    found = read(a40(mrg="A^^^X&1.2.3&ISO", pid="B^^^X"), rules)
    assert found is not None
    assert found.pairs == ((PatientKey("A", "ALL"), PatientKey("B", "PART")),)


def test_each_identifier_goes_with_that_of_its_issuer():
    """Numbers that a family shares are no patients, and what one message lists is not one key."""
    data = a40(
        mrg="A^^^ADT1^MR~X^^^LAB^PI~POLICY^^^AOK^NIIP", pid="B^^^ADT1^MR~Y^^^LAB^PI~P2^^^AOK^NIIP"
    )
    assert pairs(data) == ((A, B), (PatientKey("X", "LAB"), PatientKey("Y", "LAB")))


def test_an_identifier_of_another_issuer_goes_with_the_first():
    data = a40(mrg="OLD^^^CLINIC", pid="B^^^ADT1~Y^^^LAB")
    assert pairs(data) == ((PatientKey("OLD", "CLINIC"), B),)


def test_a_patient_merged_into_itself_is_nothing():
    assert pairs(a40(mrg="B^^^ADT1")) == ()


def test_spaces_and_escapes_are_no_part_of_an_identifier():
    data = a40(mrg=" A\\T\\1\\S\\\\X2F\\ ^^^ ADT1 ")
    assert pairs(data) == ((PatientKey("A&1^/", "HOSPITAL"), B),)


@pytest.mark.parametrize(
    ("mrg", "pid"),
    [
        ("", "B"),
        ("A", ""),
        ('""', "B"),
        ("A^^^ADT1^AN", "B"),  # of an account
        ("A" * 65, "B"),
        ("A\\E\\B", "B"),
        ("A\\H\\B", "B"),
        ("A\\X0D\\B", "B"),
        ("A\x07", "B"),
        ("Ä", "B"),  # MSH-18 does not say what that is
    ],
)
def test_what_no_data_set_can_have_names_nobody(mrg, pid):
    with pytest.raises(MessageError, match="names no patient"):
        read(a40(mrg, pid))


@pytest.mark.parametrize(
    ("named", "codec"),
    [
        ("8859/1", "iso8859-1"),
        ("UNICODE UTF-8", "utf-8"),
        ("8859/15", "iso8859-15"),
        ("ASCII~8859/1", "ascii"),
    ],
)
def test_identifiers_are_read_in_the_character_set_of_the_message(named, codec):
    data = a40(mrg="Ä1", head=f"{HEAD}||||||{named}").decode().encode(codec, errors="replace")
    expected = "?1" if codec == "ascii" else "Ä1"
    ((merged, _),) = pairs(data)
    assert merged.patient_id == expected


def test_separators_within_a_character_of_several_bytes_are_none():
    """In ISO IR87, half of a Kanji may be the byte of `|`."""
    name = next(c for c in map(chr, range(0x4E00, 0x9FFF)) if b"|" in _jis(c))
    data = a40(head=f"{HEAD}||||||ASCII~ISO IR87").replace(b"DOE^JANE", name.encode("iso2022_jp"))
    assert pairs(data) == ((A, B),)
    assert messages.parse(data).segments[2][5] == name


def _jis(text: str) -> bytes:
    return text.encode("iso2022_jp", errors="ignore")


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_segments_may_end_as_senders_end_them(end):
    assert pairs(a40().replace(b"\r", end.encode())) == ((A, B),)


def test_a_byte_order_mark_is_no_part_of_a_message():
    assert pairs(b"\xef\xbb\xbf" + a40()) == ((A, B),)


def test_a_line_feed_within_a_text_ends_no_segment():
    data = a40().replace(b"DOE^JANE", b"DOE\nMRG|EVIL")
    assert pairs(data) == ((A, B),)


def test_a_message_says_what_its_separators_are():
    data = a40().replace(b"^~\\&", b"!*?%").replace(b"A^^^ADT1", b"A!!!ADT1%1.2.9%ISO*C!!!LAB")
    data = data.replace(b"B^^^ADT1", b"B!!!LAB").replace(b"ADT^A40^", b"ADT!A40!")
    data = data.replace(b"|", b"#")
    lab = PatientKey("B", "LAB")
    assert pairs(data) == ((PatientKey("A", "LAB"), lab), (PatientKey("C", "LAB"), lab))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MSH",
        b"PID|||1",
        b"MSH|^~\\",
        b"MSH||||||||||",
        b"MSHA^~\\&A",
        b"MSH|^^\\&|A",
        "MSH|^~\\&|".encode("utf-16"),
    ],
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(MessageError):
        messages.parse(data)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ((b"MRG|A^^^ADT1\r", b""), "PID without MRG"),
        ((b"PID|||", b"ZID|||"), "MRG without PID"),
        ((b"|M1|", b"||"), "MSH-10"),
        ((b"|M1|", b"|" + b"1" * 200 + b"|"), "MSH-10"),
    ],
)
def test_a_merge_that_cannot_be_understood_is_refused(change, why):
    with pytest.raises(MessageError, match=why):
        read(a40().replace(*change))


# The answer, as python-hl7 reads it


@pytest.mark.parametrize(
    "head", [HEAD, HEAD.replace("ADT^A40^ADT_A39", "ADT^A40"), HEAD + "||||||8859/1"]
)
def test_an_answer_goes_back_to_who_sent_the_message(head):
    message = messages.parse(a40(head=head))
    data = messages.answer(message, "AR", "PID-3 names no patient", NOW, "0123456789")
    ack = hl7.parse(data.decode("latin-1"))
    assert [str(ack["MSH"][0][n]) for n in (3, 4, 5, 6)] == ["NODE", "RAD", "ADT", "KIS"]
    assert str(ack["MSH"][0][9]) == "ACK^A40^ACK"
    assert str(ack["MSH"][0][10]) == "0123456789"
    assert [str(ack["MSH"][0][n]) for n in (7, 11, 12)] == ["20260501123000", "P", "2.5.1"]
    assert [str(f) for f in ack["MSA"][0]] == ["MSA", "AR", "M1", "PID-3 names no patient"]
    assert ("8859/1" in head) == (b"8859/1" in data)


def test_an_answer_is_written_with_the_separators_of_the_message():
    data = a40().replace(b"|", b"#").replace(b"^~\\&", b"!*?%").replace(b"ADT^A40^", b"ADT!A40!")
    answer = messages.answer(messages.parse(data), "AA", "", NOW, "1")
    assert answer.startswith(b"MSH#!*?%#NODE#RAD#ADT#KIS#") and b"\rMSA#AA#M1\r" in answer


def test_what_cannot_be_read_is_answered_too():
    ack = hl7.parse(messages.answer(None, "AR", "no MSH segment", NOW, "1").decode())
    assert str(ack["MSA"][0][1]) == "AR"


# A stream of bytes


def blocks(chunks: list[bytes]) -> list[bytes]:
    stream = Blocks()
    return [block for chunk in chunks for block in stream.take(chunk)]


@given(
    texts=st.lists(st.binary(max_size=40).map(lambda b: b.translate(None, VT + FS)), max_size=6),
    cuts=st.lists(st.integers(0, 300), max_size=12),
    between=st.sampled_from([b"\r", b"", b"\r\n", b"\r\r\n"]),
)
@settings(max_examples=200, derandomize=True, deadline=None)
def test_messages_come_out_of_a_stream_however_it_is_cut(texts, cuts, between):
    stream = b"".join(VT + text + FS + between for text in texts)
    places = sorted({0, len(stream), *(min(c, len(stream)) for c in cuts)})
    chunks = [stream[a:b] for a, b in pairwise(places)]
    assert blocks(chunks) == texts


def test_a_message_given_up_and_begun_anew_is_the_new_one():
    assert blocks([VT + b"MSH|half", VT + b"MSH|whole" + FS + b"\r"]) == [b"MSH|whole"]


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\r\nMSH|", VT + FS + b"x"])
def test_what_is_in_no_message_is_refused(data):
    with pytest.raises(NotMLLP):
        blocks([data])


@pytest.mark.parametrize("end", [b"", FS])
def test_a_message_has_a_bound(end):
    with pytest.raises(TooLong) as caught:
        blocks([VT + a40() + b"Z" * MAX_BYTES + end])
    assert caught.value.head.startswith(HEAD.encode())
    assert len(caught.value.head) <= mllp.CHUNK


# Whatever comes

PIECES = st.sampled_from(
    [
        *(b"MSH", b"PID", b"MRG", b"EVN", b"|", b"^", b"~", b"\\", b"&", b"\r", b"\n", b"A40"),
        *(b"ADT^A40", b"ADT^A24", b"ADT^A37", b'""', b"\\X41\\", b"\\.sp99999999\\", b"8859/1"),
        *(b"ISO IR87", b"\x1b$B", b"\xff", b"\x00", b"A^^^ADT1&1.2&ISO^MR", b"P", b"|||", b"ACK"),
    ]
)
STARTS = st.sampled_from([b"", HEAD.encode() + b"\r", a40(), a40()[:90], b"MSH|^~\\&|"])


@given(
    start=STARTS, rest=st.lists(PIECES | st.binary(max_size=8), max_size=25), at=st.integers(0, 200)
)
@settings(max_examples=600, derandomize=True, deadline=None)
@example(start=b"MSH|^~\\&|", rest=[b"|"] * 25, at=9)
def test_whatever_a_message_holds_it_is_read_or_refused_and_answered(start, rest, at):
    data = start[:at] + b"".join(rest) + start[at:]
    message = None
    try:
        message = messages.parse(data)
        found = messages.said(message, RULES)
        if found is not None:
            for key in (k for pair in found.pairs for k in pair):
                assert key.patient_id and len(key.patient_id) <= 64 >= len(key.issuer)
                assert key.patient_id.isprintable() and "\\" not in key.patient_id
    except MessageError as exc:
        assert str(exc).isascii()
    answer = messages.answer(message, "AR", "x", NOW, "1")
    lines = answer.split(b"\r")
    assert [line[:3] for line in lines] == [b"MSH", b"MSA", b""]
    assert not {VT, FS, b"\n"} & {bytes([b]) for b in answer}
