"""What browsers keep, and proof of forms: without a server."""

import time

from hypothesis import given
from hypothesis import strategies as st

from dicomnode.web import session, vendor
from dicomnode.web.patients import SECRET_BYTES
from dicomnode.web.session import SESSION_S, Sessions

SESSIONS = Sessions(bytes(range(SECRET_BYTES)))
DIGEST = bytes(range(32))


def test_a_session_gives_back_the_digest_and_differs_each_time():
    first, second = SESSIONS.begin(DIGEST), SESSIONS.begin(DIGEST)
    assert first != second
    found = [SESSIONS.session(kept) for kept in (first, second)]
    assert [f.digest for f in found] == [DIGEST] * 2
    assert found[0].nonce != found[1].nonce
    assert Sessions(bytes(SECRET_BYTES)).session(first) is None


def test_a_session_ends(monkeypatch):
    kept = SESSIONS.begin(DIGEST)
    now = time.time()
    monkeypatch.setattr(session.time, "time", lambda: now + SESSION_S - 5)
    assert SESSIONS.session(kept) is not None
    monkeypatch.setattr(session.time, "time", lambda: now + SESSION_S + 5)
    assert SESSIONS.session(kept) is None


@given(st.text(max_size=300))
def test_what_is_no_session_is_none(text):
    assert SESSIONS.session(text) is None


def test_an_altered_session_is_none():
    kept = SESSIONS.begin(DIGEST)
    for k in range(len(kept) - 1):
        other = "A" if kept[k] != "A" else "B"
        assert SESSIONS.session(kept[:k] + other + kept[k + 1 :]) is None


@given(st.text(max_size=100), st.binary(max_size=50))
def test_a_form_is_bound_to_whom_it_was_made_for(text, whose):
    form = SESSIONS.form(whose)
    assert SESSIONS.is_form(form, whose)
    assert not SESSIONS.is_form(form, whose + b"x")
    assert not SESSIONS.is_form(text, whose)


def test_vendored_files_are_those_of_the_manifest():
    assert vendor.digests() == vendor.expected()
    found = {p.name for p in vendor.FOLDER.iterdir()}
    assert found == {*vendor.FILES, vendor.MANIFEST.name}
