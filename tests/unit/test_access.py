import logging
from pathlib import Path

import pytest

from dicomnode.config import Peer
from dicomnode.scp import access
from dicomnode.scp.access import Directory, origin
from dicomnode.scp.slots import Slots


def peer(ae_title: str = "PACS", host: str = "10.0.0.5", **more) -> Peer:
    return Peer(ae_title=ae_title, host=host, port=104, **more)


@pytest.mark.parametrize(
    ("remote", "own", "here"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", True),
        ("10.0.0.7", "10.0.0.7", True),
        ("fe80::1%eth0", "fe80::1%eth0", True),
        ("10.0.0.7", "10.0.0.8", False),
        ("127.9.9.9", "127.0.0.1", True),
    ],
)
def test_a_connection_from_this_machine_is_known_by_its_ends(remote, own, here):
    assert origin(remote, own).here is here


@pytest.mark.parametrize(
    ("settings", "remote", "may"),
    [
        ({"host": "10.0.0.5"}, "10.0.0.5", True),
        ({"host": "10.0.0.5"}, "::ffff:10.0.0.5", True),
        ({"host": "10.0.0.5"}, "10.0.0.6", False),
        ({"host": "2001:db8::5"}, "2001:0db8::0005", True),
        ({"host": "127.0.0.1"}, "::1", True),
        ({"host": "::1"}, "127.0.1.1", True),
        ({"host": "127.0.0.1"}, "10.0.0.5", False),
        ({"host": "10.0.0.5"}, "127.0.0.1", False),
        ({"addresses": ["10.1.0.0/16", "10.2.0.1"]}, "10.1.2.3", True),
        ({"addresses": ["10.1.0.0/16", "10.2.0.1"]}, "10.2.0.1", True),
        # In place of the host, not beside it; and without equals of it.
        ({"addresses": ["10.1.0.0/16"]}, "10.0.0.5", False),
        ({"host": "127.0.0.1", "addresses": ["127.0.0.1"]}, "127.0.0.2", False),
        ({"addresses": ["*"]}, "192.0.2.1", True),
        ({"addresses": ["*"]}, "2001:db8::1", True),
    ],
)
def test_a_peer_may_call_from_its_own_addresses(settings, remote, may):
    directory = Directory([peer(**settings)])
    came = origin(remote, "10.0.0.1")
    assert directory.matches("PACS", came) is may
    assert directory.admits(came) is may


def test_a_peer_does_not_lend_its_address_to_another():
    directory = Directory([peer("A", "10.0.0.5"), peer("B", "10.0.0.6")])
    came = origin("10.0.0.6", "10.0.0.1")
    assert directory.admits(came)
    assert not directory.matches("A", came)
    assert directory.matches("B ", came)  # trailing spaces carry no meaning
    assert not directory.matches("C", came)


def test_a_peer_that_may_not_call_lends_nothing():
    directory = Directory([peer("A", "10.0.0.5", calling=False)])
    assert directory.peer("A") is None
    assert not directory.admits(origin("10.0.0.5", "10.0.0.1"))


def test_a_name_is_looked_up_again_and_its_last_answer_stands(caplog):
    answers: list[list[str] | OSError] = []

    def look_up(host: str) -> list[str]:
        assert host == "pacs.example"
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    directory = Directory([peer(host="pacs.example")], look_up)

    def may(address: str) -> bool:
        return directory.matches("PACS", origin(address, "10.0.0.1"))

    assert not may("10.0.0.5")
    for answer, allowed, warnings in (
        (["10.0.0.5", "2001:db8::5"], {"10.0.0.5", "2001:db8::5"}, 0),
        (OSError(-2, "Name or service not known"), {"10.0.0.5", "2001:db8::5"}, 1),
        (OSError(-2, "Name or service not known"), {"10.0.0.5", "2001:db8::5"}, 0),
        (["10.0.0.9"], {"10.0.0.9"}, 0),
    ):
        caplog.clear()
        answers.append(answer)
        directory.refresh()
        directory._first.set()
        assert {a for a in ("10.0.0.5", "2001:db8::5", "10.0.0.9") if may(a)} == allowed
        assert [r.levelno for r in caplog.records] == [logging.WARNING] * warnings


def test_a_name_that_cannot_be_looked_up_does_not_keep_others_from_it(caplog):
    def look_up(host: str) -> list[str]:
        if host == "pacs..example":
            raise UnicodeError("label empty or too long")  # what getaddrinfo does
        return ["10.0.0.9"]

    peers = [peer("WRONG", host="pacs..example"), peer("PACS", host="pacs.example")]
    directory = Directory(peers, look_up)
    directory.refresh()
    directory._first.set()
    assert directory.matches("PACS", origin("10.0.0.9", "10.0.0.1"))
    assert [r.ae_title for r in caplog.records] == ["WRONG"]


def test_a_start_waits_for_names_but_not_for_long(monkeypatch):
    directory = Directory([peer(host="pacs.example")], lambda host: ["10.0.0.5"])
    directory.start()
    assert directory.matches("PACS", origin("10.0.0.5", "10.0.0.1"))
    directory.stop()


def test_the_machine_itself_may_be_named_by_any_of_its_addresses():
    directory = Directory([peer(host="node.example")], lambda host: ["127.0.1.1"])
    directory.refresh()
    assert directory.matches("PACS", origin("127.0.0.1", "127.0.0.1"))
    assert directory.matches("PACS", origin("10.0.0.7", "10.0.0.7"))
    assert "this machine" in directory.networks("PACS")


def test_rejections_are_those_of_the_standard():
    # PS3.8 Table 9-21: what each source may give as its reason.
    allowed = {1: {1, 2, 3, 7}, 2: {1, 2}, 3: {1, 2}}
    found = [r for r in vars(access).values() if isinstance(r, access.Rejection)]
    assert len(found) == 8
    for rejection in found:
        assert rejection.result in (1, 2)
        assert rejection.reason in allowed[rejection.source]
        # What waiting may mend is transient, and nothing else.
        assert (rejection.result == 2) == (rejection.source == 3 or rejection.reason == 1)


# Slots


def test_slots_are_so_many_and_come_back(tmp_path):
    ours, theirs = Slots(tmp_path, "x", 2), Slots(tmp_path, "x", 2)
    first, second = ours.take(), theirs.take()
    assert first and second and (first.index, second.index) == (0, 1)
    assert ours.take() is None and theirs.take() is None
    assert Slots(tmp_path, "y", 1).take() is not None
    first.release()
    first.release()
    again = theirs.take()
    assert again and again.index == 0


def test_a_slot_left_behind_is_found_once(tmp_path: Path):
    slots = Slots(tmp_path, "x", 4)
    held, left = slots.take(), slots.take()
    assert held and left
    left.release()  # as the kernel does it for a process that died
    with slots.alone():
        mine = slots.take()
        assert mine and mine.index == 1
        assert [slot.index for slot in slots.left_behind()] == []
    mine.release()
    with slots.alone():
        assert [slot.index for slot in slots.left_behind()] == [1]
        assert [slot.index for slot in slots.left_behind()] == []
