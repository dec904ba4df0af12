"""Files are replaced whole, and a journal loses a broken last line only."""

import pytest

from training.durable import Journal, replacing, write_json


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before


def test_a_journal_gives_back_what_was_appended(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.read() == []
    journal.append({"a": 1}, [2, None])
    journal.append("é", sync=True)
    assert journal.read() == [{"a": 1}, [2, None], "é"]


def test_a_broken_last_line_is_cut_off_for_good(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append(1, 2)
    with open(journal.path, "a") as file:
        file.write('{"half": ')
    assert journal.read() == [1, 2]
    journal.append(3)
    assert journal.read() == [1, 2, 3]


def test_a_journal_can_be_replaced(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append(1, 2)
    journal.replace([5])
    assert journal.read() == [5]
