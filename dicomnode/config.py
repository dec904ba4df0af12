"""The settings: a TOML file, then `DICOMNODE_SECTION__KEY` in the environment, which wins.

Read once, by `load`, and handed down as an argument. `docs/node.toml` shows every setting at
its default.
"""

import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Mapping
from datetime import time
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from dicomnode.core import placeholder
from dicomnode.errors import ConfigError

_PREFIX = "DICOMNODE_"
_TEST_PREFIX = "DICOMNODE_TEST_"  # what the test suite reads; no settings


def _ae_title(value: str) -> str:
    # PS3.5 Table 6.2-1, AE: 16 bytes at most, default repertoire without backslash and control
    # characters; leading and trailing spaces carry no meaning, and spaces alone are no title.
    title = value.strip(" ")
    if not 1 <= len(title) <= 16:
        raise ValueError("an AE title has 1 to 16 characters")
    if "\\" in title or not (title.isascii() and title.isprintable()):
        raise ValueError("an AE title is ASCII without backslash and control characters")
    return title


AETitle = Annotated[str, AfterValidator(_ae_title)]


def _web_address(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a URL begins with http:// or https:// and a host")
    if parts.username or parts.password:
        raise ValueError("no user name and password in a URL: it is shown and logged")
    if len(value) > 255:
        raise ValueError("a URL has 255 characters at most")
    return value


WebAddress = Annotated[str, AfterValidator(_web_address)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _address(value: str) -> str:
    if value != "*":
        ipaddress.ip_network(value)
    return value


def _network(value: str) -> str:
    if ipaddress.ip_network(value).prefixlen == 0:
        raise ValueError("everybody is no reverse proxy")
    return value


def _host_name(value: str) -> str:
    name = value.lower().rstrip(".")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", name):
        raise ValueError("a host name has letters, digits, '-' and '.', and no port")
    return name


def _fingerprint(value: str) -> str:
    digits = value.replace(":", "").lower()
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise ValueError("a SHA-256 fingerprint has 64 hexadecimal digits")
    return digits


def _issuer(value: str) -> str:
    if len(value) > 64 or "\\" in value or not value.isprintable():
        raise ValueError("an issuer has 64 characters at most, and no backslash")
    return value


class Peer(_Section):
    """A DICOM node we know: who may send to us, and whom we may send to."""

    ae_title: AETitle = Field(description="AE title of the peer.")
    host: str = Field(min_length=1, description="Host name or address of the peer.")
    port: int = Field(ge=1, le=65535, description="TCP port the peer listens on.")
    calling: bool = Field(default=True, description="Whether this peer may send objects to us.")
    addresses: tuple[Annotated[str, AfterValidator(_address)], ...] = Field(
        default=(),
        description="Addresses and networks it calls from, where they are not those of its host: "
        'a cluster, or behind NAT. "*" is any address.',
    )
    maximum_associations: int | None = Field(
        default=None,
        ge=1,
        description="Associations served at a time for this peer; unset, "
        "maximum_associations_per_peer.",
    )
    certificate_sha256: tuple[Annotated[str, AfterValidator(_fingerprint)], ...] = Field(
        default=(),
        description="SHA-256 fingerprints of the certificates it may show; none: any certificate "
        "that client_ca issued.",
    )
    certificate_name: str = Field(
        default="",
        description="DNS name that its certificate must carry; empty: any.",
    )
    tls: bool = Field(default=False, description="Whether it listens with TLS.")
    default_issuer: str = Field(
        default="",
        max_length=64,  # PS3.5 Table 6.2-1, LO
        pattern=r"^[^\\]*$",
        description="Issuer of Patient ID (0010,0021) taken for objects of this peer without one.",
    )
    corrects: bool = Field(
        default=True,
        description="Whether a Series may move to another patient or Study by what this peer "
        "sends. False for an archive in which patients are not corrected.",
    )


class NodeSettings(_Section):
    """Who we are on the DICOM network, and whom we know."""

    ae_title: AETitle = Field(
        default="DICOMNODE", description="Our AE title, which callers must use."
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. The default reaches this machine only; "
        '"0.0.0.0" listens on every address, which a PACS on another machine needs.',
    )
    port: int = Field(
        default=11112, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one."
    )
    # NoDecode: a malformed list in the environment is then reported under `node.peers`.
    peers: Annotated[tuple[Peer, ...], NoDecode] = Field(
        default=(), description="The DICOM nodes we know. Nobody else may send."
    )
    default_issuer: str = Field(
        default="",
        max_length=64,  # PS3.5 Table 6.2-1, LO
        pattern=r"^[^\\]*$",
        description="Issuer of Patient ID (0010,0021) taken for objects without one whose sender "
        "has no default_issuer of its own, imported files among them.",
    )
    placeholder_ids: tuple[str, ...] = Field(
        default=placeholder.COMMON,
        description="Patient IDs that stand for nobody, whatever their case, marks and leading "
        "zeros, and those without letter and digit: images that have one are paired with nothing.",
    )
    receivers: int = Field(
        default=0,
        ge=0,
        le=16,
        description="Receiver processes, which share the port. 0: two where there are four cores "
        "or more, else one.",
    )
    maximum_associations: int = Field(
        default=32,
        ge=1,
        le=1024,
        description="Associations served at a time by all receivers together; more are refused "
        "for now.",
    )
    maximum_associations_per_peer: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="The same for any one peer, so that it leaves room for the others.",
    )
    maximum_connecting: int = Field(
        default=64,
        ge=1,
        le=1024,
        description="Connections of one address that have not become an association yet; one "
        "more closes the oldest of them.",
    )
    handshake_seconds: float = Field(
        default=15.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds from connection to association, TLS handshake included.",
    )
    idle_seconds: float = Field(
        default=120.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without a byte after which an association is aborted.",
    )
    audit_log: Path | None = Field(
        default=None,
        description="File of the audit log; unset, audit.jsonl beside the folder of the spool.",
    )
    fast_lane: bool = Field(
        default=True,
        description="Whether regular C-STOREs are read and answered by code of our own, at a "
        "tenth of the CPU time, rather than by pynetdicom.",
    )

    @field_validator("peers", mode="before")
    @classmethod
    def _from_environment(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("peers")
    @classmethod
    def _titles_differ(cls, peers: tuple[Peer, ...]) -> tuple[Peer, ...]:
        titles = [peer.ae_title for peer in peers]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"two peers have the AE title {title}")
        return peers


class SpoolSettings(_Section):
    """Where received objects wait for the worker."""

    path: Path = Field(
        default=Path("dicomnode-data/spool"),
        description="Folder on a disk that survives a power cut; one for each node.",
    )
    reserve_bytes: int = Field(
        default=1 << 30,
        ge=0,
        description="Free bytes to leave on that disk: below, objects are refused with 0xA700.",
    )
    durability: Literal["journal", "file"] = Field(
        default="journal",
        description='How an object is written: "journal" appends it to a preallocated file, '
        '"file" makes a file of it. Both survive a power cut; what either wrote is read.',
    )
    segment_bytes: int = Field(
        default=64 << 20,
        ge=1 << 20,
        le=1 << 30,
        description="Size of a file of the journal; each receiver keeps up to 6 of them.",
    )
    refuse_below_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Free bytes below which new associations are refused for now; unset, twice "
        "reserve_bytes.",
    )


class TLSSettings(_Section):
    """TLS of the DICOM port: off without a certificate."""

    certificate: Path | None = Field(
        default=None, description="PEM file of our certificate, then its chain."
    )
    key: Path | None = Field(default=None, description="PEM file of its private key.")
    client_ca: Path | None = Field(
        default=None, description="PEM file of the authorities that issue certificates to peers."
    )
    require_client_certificate: bool = Field(
        default=True, description="Whether a peer must show a certificate of theirs."
    )


class DatabaseSettings(_Section):
    """Where results are kept."""

    url: str = Field(
        default="sqlite:///dicomnode-data/dicomnode.sqlite",
        min_length=1,
        repr=False,  # may hold a password
        description="SQLAlchemy URL, of SQLite or PostgreSQL.",
    )


class ScoreSettings(_Section):
    """How slices are scored."""

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description='"auto" takes CUDA, else MPS, else the CPU; or "cpu", "mps", "cuda", "cuda:N".',
    )
    model: Path | None = Field(
        default=None,
        description="Folder of a weight bundle; unset, the one that came with the node.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description='Numbers the network works in. "auto" takes bfloat16 where the device is '
        "made for it and gives the same scores, which is tried when the node starts.",
    )
    batch: int = Field(default=64, ge=1, le=1024, description="Slices scored at a time, at most.")


class SeriesSettings(_Section):
    """When a Series is taken to be complete."""

    quiet_seconds: float = Field(
        default=5.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds without a new slice after its association ended.",
    )
    lost_seconds: float = Field(
        default=600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which an association whose end was never seen counts as over.",
    )


class KeepSettings(_Section):
    """What is kept of scored Series, beside their curves."""

    previews_days: int = Field(
        default=30,
        ge=0,
        le=36_500,
        description="Days for which the 128 x 128 input of each scored slice is kept in the "
        "database, from the last slice of its Series on; `dicomnode rescore` needs it. 0 keeps "
        "none, and drops what was kept.",
    )
    dicom_path: Path | None = Field(
        default=None,
        description="Folder in which every CT Instance that could be read is kept for good, as "
        "STUDY/SERIES/INSTANCE.dcm by their UIDs. Unset, pixels go once they are scored and every "
        "rule is served.",
    )
    late_seconds: float = Field(
        default=300.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds from its last slice for which the pixels of a Series stay though no "
        "rule wants them: with what comes late it may meet one.",
    )
    rule_days: int = Field(
        default=7,
        ge=0,
        le=36_500,
        description="Days for which the pixels of a Series stay after a delivery that a rule "
        "asked for was given up; `dicomnode deliveries requeue` needs them.",
    )


class DeliverSettings(_Section):
    """Which results go out by themselves, and to whom."""

    registration: tuple[AETitle, ...] = Field(
        default=(),
        description="Peers that get a Spatial Registration of each pair of Studies.",
    )
    report: tuple[AETitle, ...] = Field(
        default=(), description="Peers that get a report of what each Series covers."
    )
    registration_pairs: Literal["newest", "all"] = Field(
        default="newest",
        description="Of which pairs a registration is made: of those of a patient's latest day "
        'with each earlier Study ("newest"), or of every two Studies ("all").',
    )
    recent_days: int = Field(
        default=30,
        ge=0,
        le=36_500,
        description="Days after its Study Date for which something goes out about a Study that it "
        "was not told of before, of a pair the newer one; 0: whatever its age.",
    )
    webhooks: tuple[WebAddress, ...] = Field(
        default=(), description="URLs that get the offset of each pair of Studies, as JSON."
    )
    webhook_secret_file: Path | None = Field(
        default=None,
        description="File of the key that signs what webhooks get, HMAC-SHA256.",
    )
    settle_seconds: float = Field(
        default=60.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds without a change after which a result goes out, so that of a Study "
        "that arrives Series by Series one object is made, not many.",
    )
    give_up_hours: float = Field(
        default=72.0,
        gt=0,
        allow_inf_nan=False,
        description="Hours after its first failure after which a delivery is set aside.",
    )
    commitment: bool = Field(
        default=True,
        description="Whether peers are asked to commit themselves to keep what they got "
        "(Storage Commitment), where they offer it.",
    )


class HL7Settings(_Section):
    """Where messages that merge patients are listened for: nowhere without a port."""

    port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="TCP port to listen on for HL7 version 2 messages over MLLP; unset, none.",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. The default reaches this machine only.",
    )
    senders: tuple[Annotated[str, AfterValidator(_address)], ...] = Field(
        default=(),
        description="Addresses and networks that messages may come from; none: this machine alone.",
    )
    tls: bool = Field(
        default=False, description="Whether it listens with TLS, with the certificate of [tls]."
    )
    issuers: Annotated[dict[str, Annotated[str, AfterValidator(_issuer)]], NoDecode] = Field(
        default={},
        description="Issuer of Patient ID (0010,0021) of an assigning authority (CX.4), by its "
        "namespace, its universal ID, or both and the type as they are written. One that is not "
        "here is taken by its namespace.",
    )
    default_issuer: str | None = Field(
        default=None,
        max_length=64,  # PS3.5 Table 6.2-1, LO
        pattern=r"^[^\\]*$",
        description="Issuer of identifiers without an assigning authority; unset, that of [node].",
    )
    identifier_types: tuple[str, ...] = Field(
        default=("", "MR", "PI", "PT"),
        description='Types of identifiers (CX.5) that are Patient IDs; "" where none is given.',
    )
    changed_identifiers: bool = Field(
        default=False,
        description="Whether A47, which puts one identifier of a patient right, links both.",
    )
    processing_ids: tuple[str, ...] = Field(
        default=("P",), description="Processing IDs (MSH-11) of messages that are acted on."
    )
    idle_seconds: float = Field(
        default=3600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without a byte after which a connection is closed.",
    )

    @field_validator("issuers", mode="before")
    @classmethod
    def _from_environment(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value


class WebSettings(_Section):
    """The page and its REST interface."""

    enabled: bool = Field(default=False, description="Whether `dicomnode serve` starts it.")
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. Beyond this machine it needs token_file or user_header.",
    )
    port: int = Field(
        default=8080, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one."
    )
    names: tuple[Annotated[str, AfterValidator(_host_name)], ...] = Field(
        default=(),
        description="Host names under which it is asked for, beside localhost, this machine's "
        "name and every IP address. A request for another host is refused.",
    )
    token_file: Path | None = Field(
        default=None,
        description="File of the tokens that may sign in, a line each: ROLE NAME SHA-256. "
        "`dicomnode token` makes them. Read again when it changes.",
    )
    user_header: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z][A-Za-z0-9-]{0,63}$",
        description="Header in which a reverse proxy, one of proxies, names who has signed in.",
    )
    proxies: tuple[Annotated[str, AfterValidator(_network)], ...] = Field(
        default=(),
        description="Addresses and networks of the reverse proxies whose user_header is believed.",
    )
    admins: tuple[str, ...] = Field(
        default=(), description="Users of user_header with the role admin; the others read."
    )
    key_file: Path | None = Field(
        default=None,
        description="File of the secret behind the keys that stand for patients in addresses; "
        "unset, web.key beside the folder of the spool, made at the first start.",
    )
    certificate: Path | None = Field(
        default=None, description="PEM file of the page's certificate, then its chain: HTTPS."
    )
    key: Path | None = Field(
        default=None, description="PEM file of its private key; unset, it is in certificate."
    )

    @model_validator(mode="after")
    def _says_who_may_sign_in(self) -> Self:
        if (self.user_header is None) != (not self.proxies):
            raise ValueError("user_header and proxies go together")
        if self.admins and self.user_header is None:
            raise ValueError("admins are users of user_header")
        if self.key is not None and self.certificate is None:
            raise ValueError("key is that of certificate")
        if not (self.is_local or self.token_file or self.user_header):
            raise ValueError(
                f"host {self.host} is reached by others, so token_file or user_header must say "
                "who may sign in; 127.0.0.1 needs neither"
            )
        return self

    @property
    def is_local(self) -> bool:
        """Whether it listens for this machine alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Rule(_Section):
    """What happens to a Series that an expression finds."""

    name: str = Field(
        min_length=1, max_length=64, description="Name of the rule, under which it is listed."
    )
    when: str = Field(min_length=1, description="Expression, in the language of `mine`.")
    send_to: AETitle | None = Field(default=None, description="Peer that gets the Series.")
    webhook: WebAddress | None = Field(default=None, description="URL that is told of it.")
    region: str | None = Field(
        default=None, description="Send those slices alone that show this region."
    )
    margin_mm: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="With region: slices so far beyond its ends go as well.",
    )

    @model_validator(mode="after")
    def _has_one_target(self) -> Self:
        if (self.send_to is None) == (self.webhook is None):
            raise ValueError("a rule has either send_to or webhook")
        if self.region is not None and self.send_to is None:
            raise ValueError("region says which slices send_to gets")
        return self


def hours_of_day(text: str) -> tuple[time, time] | None:
    """Return beginning and end of hours of the day, as "18:00-06:00"; None of an empty text.

    Raises
    ------
    ValueError
        If the text is anything else, or both are the same.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d\d):(\d\d)-(\d\d):(\d\d)", text)
    if found is None:
        raise ValueError('hours are written as "18:00-06:00"')
    h1, m1, h2, m2 = map(int, found.groups())
    begin, end = time(h1, m1), time(h2, m2)  # ValueError: no such time
    if begin == end:
        raise ValueError("hours begin and end at different times; empty: always")
    return begin, end


def _hours(value: str) -> str:
    hours_of_day(value)
    return value


class DICOMwebServer(_Section):
    """A DICOMweb server that is asked for earlier CT (PS3.18)."""

    name: str = Field(
        min_length=1,
        max_length=64,
        pattern=r"^[\x21-\x7e]+$",
        description="Name of the server, under which what it is asked for is listed.",
    )
    url: WebAddress = Field(description="Base URL: what comes before /studies.")
    token_file: Path | None = Field(default=None, description="File of a bearer token.")
    user: str | None = Field(default=None, description="User name, of HTTP Basic.")
    password_file: Path | None = Field(default=None, description="File of that user's password.")
    ca_file: Path | None = Field(
        default=None,
        description="PEM file of the authorities that issued the server's certificate, where they "
        "are not those of this machine.",
    )

    @model_validator(mode="after")
    def _identifies_one_way(self) -> Self:
        if (self.user is None) != (self.password_file is None):
            raise ValueError("user and password_file go together")
        if self.user is not None and self.token_file is not None:
            raise ValueError("either token_file, or user and password_file")
        return self


class PriorsSettings(_Section):
    """Earlier CT, and what a forward missed, that is asked of others; off unless one is named."""

    peers: tuple[AETitle, ...] = Field(
        default=(), description="Peers that are asked for earlier CT of the patient of a new Study."
    )
    # NoDecode: a malformed list in the environment is then reported under `priors.dicomweb`.
    dicomweb: Annotated[tuple[DICOMwebServer, ...], NoDecode] = Field(
        default=(), description="DICOMweb servers that are asked likewise."
    )
    catch_up: tuple[str, ...] = Field(
        default=(),
        description="Those of both kinds, by AE title or name, that are asked for all CT of the "
        "days in which the node was down, and of today and yesterday. For a PACS that forwards "
        "every CT to the node: what it keeps to itself on purpose would come as well.",
    )
    count: int = Field(
        default=3, ge=1, le=1000, description="Earlier Studies of a patient, the newest ones."
    )
    years: float = Field(
        default=10.0,
        gt=0,
        le=200,
        description="Years before the new Study, beyond which none is asked for.",
    )
    recent_days: int = Field(
        default=30,
        ge=0,
        le=36_500,
        description="Days after its Study Date for which a Study that arrives counts as new, and "
        "asks for earlier ones; 0: whatever its age.",
    )
    hours: Annotated[str, AfterValidator(_hours)] = Field(
        default="",
        description='Hours of the day, local time, in which priors are asked for, as "18:00-06:00";'
        " empty: always. Catching up does not wait for them.",
    )
    per_minute: float = Field(
        default=20.0,
        gt=0,
        le=6000,
        description="Requests a minute to each of them at most: a question about a patient or a "
        "day is one, and so is each Study that is looked into for it, and each Series.",
    )
    minimum_instances: int = Field(
        default=10,
        ge=1,
        description="A Series of fewer Instances is not asked for: localizers; but in a Study with "
        "Enhanced CT all are.",
    )
    issuer: Literal["when_given", "required"] = Field(
        default="when_given",
        description="Whether a Study that is answered without Issuer of Patient ID is taken for "
        'the patient\'s ("when_given") or not ("required"). One with another issuer never is.',
    )
    settle_seconds: float = Field(
        default=120.0,
        ge=0,
        le=86_400,
        description="Seconds for which a Series must be missing here, and unchanged there, before "
        "catching up asks for it; and without a new Instance, before any Series counts as left "
        "incomplete.",
    )
    catch_up_hours: float = Field(
        default=72.0,
        gt=0,
        le=24 * 366,
        description="Hours of down time that are caught up with at most.",
    )
    catch_up_minutes: float = Field(
        default=15.0,
        gt=0,
        le=24 * 60,
        description="Minutes between questions for what was missed today and yesterday.",
    )
    give_up_hours: float = Field(
        default=72.0,
        gt=0,
        le=24 * 366,
        description="Hours after which what never succeeded is given up.",
    )

    @field_validator("dicomweb", mode="before")
    @classmethod
    def _from_environment(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @property
    def names(self) -> tuple[str, ...]:
        """Whom a new Study is asked of."""
        return self.peers + tuple(server.name for server in self.dicomweb)

    @property
    def asked(self) -> tuple[str, ...]:
        """Everybody who is asked for anything, each once."""
        return tuple(dict.fromkeys(self.names + self.catch_up))


class Settings(BaseSettings):
    """Every setting of the node. Build it with `load`."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=_PREFIX, env_nested_delimiter="__"
    )

    node: NodeSettings = NodeSettings()
    tls: TLSSettings = TLSSettings()
    spool: SpoolSettings = SpoolSettings()
    database: DatabaseSettings = DatabaseSettings()
    score: ScoreSettings = ScoreSettings()
    series: SeriesSettings = SeriesSettings()
    keep: KeepSettings = KeepSettings()
    deliver: DeliverSettings = DeliverSettings()
    priors: PriorsSettings = PriorsSettings()
    hl7: HL7Settings = HL7Settings()
    web: WebSettings = WebSettings()
    rule: Annotated[tuple[Rule, ...], NoDecode] = ()

    @field_validator("rule", mode="before")
    @classmethod
    def _from_environment(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("rule")
    @classmethod
    def _names_differ(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        names = [rule.name for rule in rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules have the name {name}")
        return rules

    @model_validator(mode="after")
    def _peers_are_known(self) -> Self:
        known = {peer.ae_title for peer in self.node.peers}
        named = [("deliver.registration", title) for title in self.deliver.registration]
        named += [("deliver.report", title) for title in self.deliver.report]
        named += [(f"rule.{r.name}.send_to", r.send_to) for r in self.rule if r.send_to]
        for key, title in named:
            if title not in known:
                raise ValueError(f"{key}: {title} is none of node.peers")
        return self

    @model_validator(mode="after")
    def _priors_can_come(self) -> Self:
        names = self.priors.names
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"priors: {name} is named twice")
        servers = {server.name for server in self.priors.dicomweb}
        if both := servers & {peer.ae_title for peer in self.node.peers}:
            raise ValueError(f"priors.dicomweb: {min(both)} is an AE title of node.peers already")
        for key, titles in (("peers", self.priors.peers), ("catch_up", self.priors.catch_up)):
            for title in titles:
                if title in servers:
                    continue
                peer = self.peer(title)
                if peer is None:
                    also = ", and no name of priors.dicomweb" if key == "catch_up" else ""
                    raise ValueError(f"priors.{key}: {title} is none of node.peers{also}")
                if not peer.calling:
                    raise ValueError(
                        f"priors.{key}: {title} has calling = false in node.peers, and could not "
                        "send what it is asked for"
                    )
        return self

    @model_validator(mode="after")
    def _hl7_has_a_certificate(self) -> Self:
        if self.hl7.tls and self.tls.certificate is None:
            raise ValueError("hl7.tls: needs tls.certificate")
        return self

    @model_validator(mode="after")
    def _pixels_for_good_lie_elsewhere(self) -> Self:
        folder = self.keep.dicom_path
        if folder is not None and folder.resolve().is_relative_to(self.spool.path.resolve()):
            raise ValueError("keep.dicom_path: what lies within spool.path is not kept for good")
        return self

    @property
    def exchanges(self) -> bool:
        """Whether there is anything for the part that talks to peers by itself."""
        deliver = self.deliver
        results = deliver.registration or deliver.report or deliver.webhooks or self.rule
        return bool(results or self.priors.asked or self.hl7.port is not None)

    def peer(self, ae_title: str) -> Peer | None:
        """Return the peer of an AE title, None where there is none any more."""
        return next((peer for peer in self.node.peers if peer.ae_title == ae_title), None)

    @property
    def receivers(self) -> int:
        """How many receiver processes the node runs."""
        if self.node.receivers:
            return self.node.receivers
        # On two cores a second receiver gained nothing: sender, worker and kernel have the other.
        return 2 if _cores() >= 4 else 1

    @property
    def audit_log(self) -> Path:
        """Where the audit log is written."""
        return self.node.audit_log or self.spool.path.absolute().parent / "audit.jsonl"

    @property
    def held_path(self) -> Path:
        """Where pixels are held until every rule is served: on the disk of the spool."""
        return self.spool.path / "held"

    @property
    def holds(self) -> bool:
        """Whether pixels are needed once they are scored."""
        return self.keep.dicom_path is not None or any(rule.send_to for rule in self.rule)

    @property
    def patient_key_file(self) -> Path:
        """Where the secret behind the keys of patients is."""
        return self.web.key_file or self.spool.path.absolute().parent / "web.key"

    @property
    def refuse_below_bytes(self) -> int:
        """Free bytes below which new associations are refused."""
        if self.spool.refuse_below_bytes is None:
            return 2 * self.spool.reserve_bytes
        return self.spool.refuse_below_bytes

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load` passes the TOML file as the initial values; the first source wins.
        return env_settings, init_settings


def load(path: Path | None) -> Settings:
    """Return the settings of a TOML file and the environment, or of the environment alone.

    Raises
    ------
    ConfigError
        If the file cannot be read, a key is unknown, or a value is not allowed. The message
        has a line for each problem, beginning with the key.
    """
    _refuse_unknown_variables()
    try:
        return Settings(**_parse(path) if path else {})
    except ValidationError as exc:
        raise ConfigError("\n".join(_problem(error) for error in exc.errors())) from exc


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # those we may use; not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _refuse_unknown_variables() -> None:
    # pydantic-settings passes over a variable that is no field: a misspelt one would go unseen.
    unknown = []
    for name in sorted(os.environ):
        if name.upper().startswith(_PREFIX) and not name.upper().startswith(_TEST_PREFIX):
            section, _, key = name[len(_PREFIX) :].lower().partition("__")
            field = Settings.model_fields.get(section)
            is_list = not key and name.upper() == f"{_PREFIX}RULE"
            if not is_list and (field is None or key not in _keys(field.default)):
                unknown.append(f"{name}: no such setting")
    if unknown:
        raise ConfigError("\n".join(unknown))


def _keys(section: object) -> Mapping[str, object]:
    return type(section).model_fields if isinstance(section, BaseModel) else {}


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:  # not TOML, or not UTF-8
        raise ConfigError(f"{path}: {exc}") from exc


def _problem(error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: no such setting"
    message = error["msg"].removeprefix("Value error, ")
    if not key:  # of several settings together: it names them, and all there is would be the input
        return message
    if error["type"] == "missing" or key.startswith("database"):  # a URL may hold a password
        return f"{key}: {message}"
    return f"{key}: {message}, got {error['input']!r}"
