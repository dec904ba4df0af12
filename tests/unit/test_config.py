import os
import re
from pathlib import Path

import pytest

from dicomnode import config
from dicomnode.errors import ConfigError

SAMPLE = Path(__file__).parents[2] / "docs" / "node.toml"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.upper().startswith("DICOMNODE_")]:
        monkeypatch.delenv(name)


def write(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def settings_keys() -> list[tuple[str, str]]:
    return [
        (section, key)
        for section, field in config.Settings.model_fields.items()
        if section != "rule"  # a list, of which a file may have none
        for key in type(field.default).model_fields
    ]


def test_what_two_settings_do_wrong_together_shows_no_password(tmp_path):
    text = '[database]\nurl = "postgresql://u:secret@h/d"\n[deliver]\nreport = ["X"]\n'
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, text))
    assert str(caught.value) == "deliver.report: X is none of node.peers"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('issuers = { A = "x\\\\y" }', "hl7.issuers.A"),
        ('senders = ["10.0.0"]', "hl7.senders.0"),
        ("tls = true", "hl7.tls"),
        ("port = 70000", "hl7.port"),
    ],
)
def test_a_wrong_setting_of_the_listener_is_named(tmp_path, text, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        config.load(write(tmp_path, f"[hl7]\n{text}\n"))


def test_issuers_come_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("DICOMNODE_HL7__ISSUERS", '{"ADT1": "HOSPITAL"}')
    assert config.load(None).hl7.issuers == {"ADT1": "HOSPITAL"}


def test_the_sample_is_the_defaults():
    assert config.load(SAMPLE) == config.load(None)


@pytest.mark.parametrize(("section", "key"), settings_keys())
def test_every_setting_is_in_the_sample_with_a_comment_beneath(section, key):
    text = SAMPLE.read_text().partition(f"[{section}]\n")[2].partition("\n[")[0]
    # What is unset by default is shown as a comment, since TOML has no null.
    assert re.search(rf"^(# )?{key} = .*\n# ", text, re.MULTILINE)


@pytest.mark.parametrize("model", [config.Peer, config.Rule, config.DICOMwebServer])
def test_every_key_of_what_there_may_be_many_of_is_in_the_sample(model):
    text = SAMPLE.read_text()
    assert all(re.search(rf"^# .*\b{key}\b", text, re.MULTILINE) for key in model.model_fields)


@pytest.mark.parametrize(
    "model",
    [
        config.Peer,
        config.Rule,
        config.DICOMwebServer,
        *(
            type(field.default)
            for section, field in config.Settings.model_fields.items()
            if section != "rule"
        ),
    ],
)
def test_every_setting_is_described(model):
    assert all(field.description for field in model.model_fields.values())


def test_the_file_overrides_the_defaults(tmp_path):
    path = write(
        tmp_path,
        """
        [node]
        port = 104
        peers = [{ ae_title = " PACS ", host = "pacs", port = 4242, default_issuer = "WARD" }]
        [spool]
        path = "/var/spool/dicomnode"
        """,
    )
    settings = config.load(path)
    assert settings.node.port == 104
    assert settings.node.peers == (
        config.Peer(ae_title="PACS", host="pacs", port=4242, calling=True, default_issuer="WARD"),
    )
    assert settings.spool.path == Path("/var/spool/dicomnode")
    assert settings.node.ae_title == "DICOMNODE"


def test_the_environment_overrides_the_file_key_by_key(tmp_path, monkeypatch):
    path = write(tmp_path, '[node]\nport = 104\nae_title = "FILE"')
    monkeypatch.setenv("DICOMNODE_NODE__PORT", "105")
    monkeypatch.setenv(
        "DICOMNODE_NODE__PEERS", '[{"ae_title": "PACS", "host": "h", "port": 1, "calling": false}]'
    )
    settings = config.load(path)
    assert (settings.node.port, settings.node.ae_title) == (105, "FILE")
    assert [peer.calling for peer in settings.node.peers] == [False]


@pytest.mark.parametrize(
    ("cores", "set_", "receivers"), [(1, 0, 1), (2, 0, 1), (4, 0, 2), (64, 0, 2), (2, 3, 3)]
)
def test_there_are_two_receivers_where_there_are_cores(monkeypatch, cores, set_, receivers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert config.Settings(node={"receivers": set_}).receivers == receivers


def test_a_fingerprint_may_be_written_as_openssl_does():
    written = ":".join(["AB"] * 32)
    peer = config.Peer(ae_title="A", host="a", port=1, certificate_sha256=[written])
    assert peer.certificate_sha256 == ("ab" * 32,)


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        config.load(None).node.port = 1


PEER = '[node]\npeers = [{ ae_title = "PACS", host = "pacs", port = 104, %s }]'


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[node]\nport = 70000", "node.port"),
        ("[node]\nprot = 104", "node.prot"),
        ("[nodes]\nport = 104", "nodes"),
        ('[node]\nae_title = "SEVENTEEN_LETTERS"', "node.ae_title"),
        ('[node]\nae_title = "   "', "node.ae_title"),
        ('[node]\nae_title = "BACK\\\\SLASH"', "node.ae_title"),
        ('[node]\nae_title = "TAB\\tTAB"', "node.ae_title"),
        ('[node]\nae_title = "ÄRZTE"', "node.ae_title"),
        ('[node]\nhost = ""', "node.host"),
        ('[node]\npeers = [{ ae_title = "PACS", host = "pacs" }]', "node.peers.0.port"),
        (
            '[node]\npeers = [{ ae_title = "A", host = "a", port = 1 }, '
            '{ ae_title = "A", host = "b", port = 2 }]',
            "node.peers: two peers have the AE title A",
        ),
        (
            PEER % 'addresses = ["10.0.0.1/24"]',
            "node.peers.0.addresses.0: 10.0.0.1/24 has host bits",
        ),
        (PEER % 'addresses = ["pacs"]', "node.peers.0.addresses.0"),
        (PEER % 'certificate_sha256 = ["ab"]', "node.peers.0.certificate_sha256.0"),
        (PEER % "maximum_associations = 0", "node.peers.0.maximum_associations"),
        ("[node]\nreceivers = 17", "node.receivers"),
        ("[node]\nhandshake_seconds = 0", "node.handshake_seconds"),
        ("[tls]\ncert = 1", "tls.cert: no such setting"),
        ("[spool]\nreserve_bytes = -1", "spool.reserve_bytes"),
        ('[score]\ndevice = "tpu"', "score.device"),
        ("[score]\nbatch = 0", "score.batch"),
        ("[series]\nquiet_seconds = nan", "series.quiet_seconds"),
        ("[series]\nlost_seconds = 0", "series.lost_seconds"),
        ("node = 1", "node"),
        ("[node", "node.toml"),
    ],
)
def test_a_problem_names_its_key(tmp_path, text, key):
    with pytest.raises(ConfigError, match=re.escape(key)):
        config.load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("DICOMNODE_NODE__PORT", "x", "node.port"),
        ("DICOMNODE_NODE__PEERS", "[{", "node.peers"),
        ("DICOMNODE_NODE__PROT", "104", "DICOMNODE_NODE__PROT"),
        ("DICOMNODE_PORT", "104", "DICOMNODE_PORT"),
        ("DICOMNODE_NODE", "{}", "DICOMNODE_NODE"),
    ],
)
def test_a_problem_in_the_environment_names_its_key(monkeypatch, name, value, key):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(key)):
        config.load(None)


def test_every_problem_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, "[node]\nport = -1\n[score]\nbatch = 0"))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "node.port",
        "score.batch",
    ]


def test_variables_of_the_test_suite_are_no_settings(monkeypatch):
    monkeypatch.setenv("DICOMNODE_TEST_POSTGRES", "postgresql://")
    assert config.load(None).database.url == config.Settings().database.url


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.toml: No such file"):
        config.load(tmp_path / "missing.toml")


def test_a_password_does_not_show(tmp_path):
    settings = config.load(write(tmp_path, '[database]\nurl = "postgresql://u:hunter2@h/db"'))
    assert settings.database.url.endswith("@h/db")
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize("issuer", ["x" * 65, "a\\b"])
def test_an_issuer_is_a_long_string_of_dicom(tmp_path, issuer):
    path = write(tmp_path, f"[node]\ndefault_issuer = '{issuer}'")
    with pytest.raises(ConfigError, match=r"node\.default_issuer"):
        config.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[priors]\npeers = ["PACS"]', "PACS is none of node.peers"),
        ('[priors]\ncatch_up = ["web"]', "web is none of node.peers, and no name"),
        ('[priors]\npeers = ["SILENT"]\n' + "SILENT", "SILENT has calling = false"),
        ('[priors]\nhours = "6-18"', "priors.hours"),
        ('[priors]\nhours = "25:00-06:00"', "priors.hours"),
        ('[priors]\nhours = "06:00-06:00"', "priors.hours"),
        ('[priors]\nissuer = "never"', "priors.issuer"),
        ('[[priors.dicomweb]]\nname = "w"\nurl = "ftp://a"', "priors.dicomweb.0.url"),
        ('[[priors.dicomweb]]\nname = "w"\nurl = "http://u:p@a"', "no user name and password"),
        ('[[priors.dicomweb]]\nname = "w"\nurl = "http://a"\nuser = "me"', "go together"),
    ],
)
def test_settings_of_priors_that_cannot_work_are_refused(tmp_path, text, message):
    silent = '[node]\npeers = [{ ae_title = "SILENT", host = "h", port = 1, calling = false }]\n'
    if text.endswith("SILENT"):
        text = silent + text.removesuffix("SILENT")
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.load(write(tmp_path, text))


def test_the_exchange_runs_where_a_peer_is_asked_for_priors(tmp_path):
    node = '[node]\npeers = [{ ae_title = "PACS", host = "h", port = 1 }]\n'
    assert not config.load(write(tmp_path, node)).exchanges
    for priors in ('peers = ["PACS"]', 'catch_up = ["PACS"]'):
        settings = config.load(write(tmp_path, f"{node}[priors]\n{priors}"))
        assert settings.exchanges and settings.priors.asked == ("PACS",)
    web = '[[priors.dicomweb]]\nname = "w"\nurl = "http://a"'
    assert config.load(write(tmp_path, web)).priors.names == ("w",)
