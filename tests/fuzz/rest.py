"""Asks the REST interface whatever its schema allows, and what it does not: never a 5xx.

`python -m tests.fuzz.rest --examples 2000 --seed 1` for long; the tests run a short form of it.
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests import served
from tests.dicom import leaks
from tests.served import FIXED, FIXED_SERIES, MOVING, Page

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
# What is there, so that not every answer is 404.
KNOWN: dict[str, list[str]] = {
    "series_uid": [FIXED_SERIES, served.OPEN_SERIES, served.REFUSED_SERIES],
    "fixed": [FIXED, MOVING],
    "moving": [MOVING, served.OTHER],
    "region": ["liver", "chest", "10200004", "nose"],
    "study": [FIXED],
    "covers": ["liver", "liver,0.9", "chest,2", "nose", ","],
    "q": [
        "covers(liver, 0.9)",
        "prior() or slices > 3 and not overlaps(head)",
        "state = curve and patient_id ~ a",
        "((((",
        "modality = 'CT' or x",
        "height(-1e9, 1e9)",
        "study_date > 2024-02-30",
    ],
}
# The probes answer 503 by design: there is no worker here.
LEFT_OUT = {"/healthz", "/readyz"}


def attack(page: Page, examples: int, start: int, role: str | None = "admin") -> Counter[str]:
    """Ask so many questions of each address; return how many were answered by which status."""
    answers: Counter[str] = Counter()
    session = requests.Session()
    session.trust_env = False
    headers = {"Authorization": f"Bearer {page.tokens[role]}"} if role else {}
    schema = session.get(f"{page.url}/api/v1/openapi.json", timeout=30).json()
    api = schemathesis.openapi.from_dict(schema)
    for found in api.get_all_operations():
        operation = found.ok()
        if operation.path in LEFT_OUT:
            continue
        cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

        @seed(start)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases, data=st.data())
        def ask(case: schemathesis.Case, data: st.DataObject) -> None:
            for place in (case.path_parameters, case.query, case.body):
                if isinstance(place, dict):
                    for name in place.keys() & KNOWN.keys():
                        if data.draw(st.booleans()):
                            place[name] = data.draw(st.sampled_from(KNOWN[name]))
            answer = case.call(base_url=page.url, session=session, headers=headers, timeout=30)
            answers[str(answer.status_code)] += 1
            case.validate_response(answer, checks=CHECKS)

        ask()
    session.close()
    return answers


@click.command()
@click.option("--examples", default=2000, show_default=True, help="Questions of each address.")
@click.option("--seed", "start", default=1, show_default=True)
def main(examples: int, start: int) -> None:
    """Attack a page over SQLite, and print how it answered."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'node.sqlite'}"
        served.make(url)
        with served.page(Path(folder), url) as page:
            for role in ("admin", "read", None):
                click.echo(f"{role}: {dict(sorted(attack(page, examples, start, role).items()))}")
            assert not leaks(page.audit())


if __name__ == "__main__":
    main()
