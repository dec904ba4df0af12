"""A short form of `python -m tests.fuzz.rest`, on both databases."""

from tests import served
from tests.conftest import postgres_database
from tests.dicom import leaks
from tests.fuzz.rest import attack


def test_no_question_of_an_admin_brings_the_page_down(postgres_url, tmp_path):
    # Postgres: it takes offence at more than SQLite does.
    with postgres_database(postgres_url) as url:
        served.make(url)
        with served.page(tmp_path, url) as page:
            answers = attack(page, 6, 1)
            assert answers["200"] > 5
            assert not leaks(page.audit())


def test_no_question_of_a_stranger_is_answered(tmp_path):
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    served.make(url)
    with served.page(tmp_path, url) as page:
        assert set(attack(page, 2, 1, None)) <= {"401", "404", "405", "422", "429"}
