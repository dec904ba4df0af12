"""Documentation is tested: what the code offers must be named where a reader looks for it."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from dicomnode.cli import main
from dicomnode.model import Flag, Reason, SeriesState

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


def commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


COMMANDS = dict(commands(main, "dicomnode"))


@pytest.mark.parametrize("name", COMMANDS)
def test_readme_names_each_command(name):
    assert f"`{name}`" in README


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(name):
    command = COMMANDS[name]
    assert command.help and "Example:" in command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            described = parameter.help or parameter.type.__class__ is click.Choice
            assert described or parameter.show_default, (name, parameter.name)


@pytest.mark.parametrize("word", [*Reason, *Flag, *SeriesState])
def test_operations_explains_each_state_reason_and_flag(word):
    assert f"`{word}`" in OPERATIONS


def test_operations_lists_each_event_that_an_operator_is_to_see():
    events = set()
    for path in (ROOT / "dicomnode").rglob("*.py"):
        calls = re.findall(
            r'logger\.(?:warning|error|exception)\(\s*"([^"]+)"', path.read_text(), re.MULTILINE
        )
        events.update(calls)
    assert events
    assert {event for event in events if f"`{event}`" not in OPERATIONS} == set()


def test_the_tests_that_the_conformance_statement_names_are_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "conformance.md").read_text()))
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    assert named and named <= defined, named - defined


@pytest.mark.parametrize("document", ["README.md", *sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")
)])  # fmt: skip
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or ((ROOT / document).parent / target).exists(), target
