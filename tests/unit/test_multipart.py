"""multipart/related in whatever pieces it comes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.errors import PeerRefused
from dicomnode.scu.multipart import boundary_of, parts

B = b"mark"


def body(*contents: bytes, preamble: bytes = b"", end: bytes = b"--\r\n") -> bytes:
    head = b"Content-Type: application/dicom\r\n\r\n"
    return preamble + b"".join(b"\r\n--mark\r\n" + head + c for c in contents) + b"\r\n--mark" + end


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in pairwise(at)]


@given(st.lists(st.binary(max_size=200), max_size=5), st.lists(st.integers(0), max_size=20))
def test_each_part_comes_out_as_it_went_in(contents, cuts):
    contents = [c for c in contents if b"\r\n--mark" not in c + b"\r\n--mar"]
    assert list(parts(pieces(body(*contents), cuts), B)) == contents


def test_what_looks_like_a_mark_is_none():
    contents = [b"\r\n--mar", b"--mark", b"\r\n--\r\n--", b"", b"\r\n\r\n"]
    for size in (1, 2, 7, 1000):
        data = body(*contents, preamble=b"This is a message")
        chunks = [data[i : i + size] for i in range(0, len(data), size)]
        assert list(parts(chunks, B)) == contents


def test_no_line_break_is_needed_before_the_first_mark_nor_headers():
    assert list(parts([b"--mark\r\n\r\nabc\r\n--mark--"], B)) == [b"abc"]
    assert list(parts([b"--mark \t\r\nA: b\r\n\r\nabc\r\n--mark--"], B)) == [b"abc"]


@pytest.mark.parametrize("end", range(1, len(body(b"abcdef")) - 4))
def test_what_breaks_off_is_told(end):
    with pytest.raises(PeerRefused, match="breaks off"):
        list(parts([body(b"abcdef")[:end]], B))


def test_a_part_beyond_the_bound_is_refused_before_it_is_all_here():
    taken = []

    def endless():
        yield b"--mark\r\n\r\n"
        while True:
            taken.append(1)
            yield bytes(1000)

    with pytest.raises(PeerRefused, match="more than 5000 bytes"):
        list(parts(endless(), B, 5000))
    assert len(taken) < 10


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ('multipart/related; type="application/dicom"; boundary=mark', b"mark"),
        ('multipart/related;boundary="a b;c";type=application/dicom', b"a b;c"),
        ("Multipart/Related; BOUNDARY=Ab", b"Ab"),
    ],
)
def test_the_boundary_is_read(content_type, boundary):
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/html",
        "multipart/related",
        "application/dicom",
        f"multipart/related; boundary={'x' * 71}",
    ],
)
def test_another_kind_of_answer_is_refused(content_type):
    with pytest.raises(PeerRefused):
        boundary_of(content_type)
