"""`dicomnode deliveries`, and what `dicomnode check` says of destinations."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from pydicom.uid import SpatialRegistrationStorage

from dicomnode import checks, store
from dicomnode import config as configuration
from dicomnode.cli import main
from dicomnode.config import Settings
from dicomnode.errors import ConfigError
from dicomnode.model import DeliveryKind, DeliveryState
from dicomnode.store import Ask
from tests.dicom import leaks
from tests.peers import archive, listening

NOW = datetime(2026, 1, 5, 9, tzinfo=UTC)
PAIR = Ask(DeliveryKind.REGISTRATION, "PACS", "1.2.2.0", "1.2.1.0")
REPORT = Ask(DeliveryKind.REPORT, "PACS", "1.2.2")


@pytest.fixture
def config(tmp_path) -> Path:
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    path = tmp_path / "node.toml"
    path.write_text(f'[database]\nurl = "{url}"\n[spool]\npath = "{tmp_path / "spool"}"\n')
    with store.opened(url, create=True) as engine, store.writing(engine) as session:
        store.ask_deliveries(session, [PAIR, REPORT], NOW, NOW)
        for delivery in store.list_deliveries(session):
            if delivery.what == PAIR:
                reason = "A700 Refused: Out of Resources"
                store.settle_delivery(session, delivery, DeliveryState.FAILED, NOW, reason=reason)
    return path


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["deliveries", *arguments, "--config", str(config)])


def listed(config: Path, *arguments: str) -> list[dict[str, Any]]:
    done = run(config, "--json", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_dead_letters_are_listed_with_their_reason(config):
    (failed,) = listed(config, "--state", "failed")
    assert (failed["kind"], failed["subject"], failed["other"]) == (
        "registration",
        "1.2.2.0",
        "1.2.1.0",
    )
    assert failed["reason"] == "A700 Refused: Out of Resources"
    shown = run(config)
    assert "A700 Refused: Out of Resources" in shown.stdout and "1.2.1.0" in shown.stdout
    assert "1 waiting, 1 failed" in shown.stderr
    assert not leaks(shown.output)
    assert len(listed(config, "--of", "1.2.2")) == 1
    assert len(listed(config, "--limit", "1")) == 1
    assert run(config, "--destination", "NOBODY").exit_code == 1


def test_what_was_given_up_is_queued_again_by_hand(config):
    (failed,) = listed(config, "--state", "failed")
    done = run(config, "requeue", str(failed["id"]))
    assert done.exit_code == 0 and str(failed["id"]) in done.stderr
    assert listed(config, "--state", "waiting")[0]["attempts"] == 0
    before = ["deliveries", "--config", str(config), "requeue", "4711"]
    assert CliRunner().invoke(main, before).exit_code == 1
    assert run(config, "requeue").exit_code == 2
    assert run(config, "requeue", "1", "--all-failed").exit_code == 2
    assert run(config, "requeue", "--all-failed").exit_code == 1  # none is
    audited = (config.parent / "audit.jsonl").read_text()
    assert '"deliveries requeued"' in audited


def settings(tmp_path: Path, port: int, **deliver: Any) -> Settings:
    peer = {"ae_title": "PACS", "host": "127.0.0.1", "port": port}
    return Settings(
        node={"peers": [{**peer, **deliver.pop("peer", {})}]},
        spool={"path": tmp_path / "spool"},
        deliver={"registration": ["PACS"], **deliver},
    )


def checked(settings: Settings, name: str) -> checks.Check:
    (found,) = (c for c in checks.run(settings) if c.name == name)
    return found


def test_check_proposes_to_each_destination_what_it_is_to_take(tmp_path):
    with archive(SpatialRegistrationStorage) as pacs:
        found = checked(settings(tmp_path, pacs.port), "deliver PACS")
        assert found.ok
        assert found.message == "takes Spatial Registration; does not offer Storage Commitment"
        found = checked(settings(tmp_path, pacs.port, report=["PACS"]), "deliver PACS")
        assert not found.ok and "does not take Comprehensive 3D SR" in found.message
    with archive(SpatialRegistrationStorage, commitment=True) as pacs:
        found = checked(settings(tmp_path, pacs.port), "deliver PACS")
        assert found.ok and found.message.endswith("; offers Storage Commitment")
        deaf = settings(tmp_path, pacs.port, peer={"calling": False})
        assert not checked(deaf, "deliver PACS").ok
    assert not checked(settings(tmp_path, pacs.port), "deliver PACS").ok


def test_check_reaches_each_webhook(tmp_path):
    with listening(lambda connection: None) as port:
        url = f"http://127.0.0.1:{port}/a?token=t0ps3cret"
        found = checked(settings(tmp_path, 104, webhooks=[url]), f"webhook 127.0.0.1:{port}")
        assert found.ok and "not signed" in found.message
    found = checked(settings(tmp_path, 104, webhooks=[url]), f"webhook 127.0.0.1:{port}")
    assert not found.ok and "Connection refused" in found.message
    assert "t0ps3cret" not in found.message + found.name
    short = tmp_path / "key"
    short.write_text("short")
    signed = settings(tmp_path, 104, webhooks=[url], webhook_secret_file=short)
    assert "are the least" in checked(signed, f"webhook 127.0.0.1:{port}").message


def test_a_url_is_no_longer_than_the_database_keeps(tmp_path):
    with pytest.raises(ConfigError, match=r"deliver.webhooks.0: a URL has 255 characters"):
        path = tmp_path / "node.toml"
        path.write_text(f'[deliver]\nwebhooks = ["http://h/{"x" * 255}"]')
        configuration.load(path)
