"""What `dicomnode check` tries: each outside thing once, with what to do where it fails."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from urllib.parse import urlsplit

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from dicomnode import store
from dicomnode.audit import AuditLog
from dicomnode.config import Peer, Settings
from dicomnode.errors import ConfigError, NodeError
from dicomnode.rules import Rules
from dicomnode.spool import Disk, Spool

PEER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    ok: bool
    message: str


def run(settings: Settings) -> Iterator[Check]:
    """Yield the outcome of each check, in the order of the way through the node."""
    yield _try("listen", lambda: _listen(settings))
    yield _try("tls", lambda: _tls(settings))
    if any(peer.calling for peer in settings.node.peers):
        yield _try("access", lambda: _access(settings))
    yield _try("audit", lambda: _audit(settings))
    yield _try("spool", lambda: _spool(settings))
    yield _try("database", lambda: _database(settings))
    yield _try("weights", lambda: _weights(settings))
    yield _try("device", lambda: _device(settings))
    if settings.keep.dicom_path is not None:
        yield _try("keep", lambda: _keep(settings))
    yield from _rules(settings)
    if settings.hl7.port is not None:
        yield _try("hl7", lambda: _hl7(settings))
    if settings.web.enabled:
        yield _try("page", lambda: _page(settings))
    if not any(peer.calling for peer in settings.node.peers):
        yield Check("peers", False, "nobody may send: name each sender in node.peers")
    for peer in settings.node.peers:
        yield _try(f"peer {peer.ae_title}", partial(_echo, peer, settings))
    for name in settings.priors.asked:
        yield _try(f"priors {name}", partial(_priors, name, settings))
    for title in _takers(settings):
        yield _try(f"deliver {title}", partial(_takes, title, settings))
    for url in _hooks(settings):
        name = f"webhook {urlsplit(url).netloc}"
        yield _try(name, partial(_reach, url, settings))


def lines(settings: Settings) -> Iterator[str]:
    """Yield the resolved settings, one a line, passwords left out."""
    for section, values in settings.model_dump(mode="json").items():
        if isinstance(values, dict):
            sections = {section: values}
        else:  # [[rule]], each with a name of its own
            sections = {f"{section}.{one['name']}": one for one in values}
        for name, keys in sections.items():
            for key, value in keys.items():
                shown = safe_url(value) if (section, key) == ("database", "url") else value
                yield f"{name}.{key} = {shown!r}"


def safe_url(url: str) -> str:
    """Return a database URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "not a URL"


def _try(name: str, call: Callable[[], str]) -> Check:
    try:
        return Check(name, True, call())
    except (NodeError, OSError) as exc:
        return Check(name, False, str(exc))


def _listen(settings: Settings) -> str:
    from dicomnode.scp.listener import listen

    node = settings.node
    where = f"{node.host}:{node.port}, {settings.receivers} receiver(s)"
    try:
        listen(node.host, node.port).close()
    except ConfigError as exc:
        if not isinstance(exc.__cause__, OSError) or exc.__cause__.errno != errno.EADDRINUSE:
            raise
        return f"{where}; in use, by this node or another program"
    return f"{where}; free"


def _tls(settings: Settings) -> str:
    from dicomnode.scp import tls

    tls.check(settings)
    certificate = settings.tls.certificate
    if certificate is None:
        return "off: what is sent can be read and altered on the way"
    tls.server_context(settings.tls)
    until = tls.expiry(certificate)
    days = (until - datetime.now(UTC)).days
    if days < tls.SOON_DAYS:
        raise NodeError(f"{certificate} expires in {days} days, on {until:%Y-%m-%d}: renew it")
    asked = "peers must show" if settings.tls.require_client_certificate else "peers may show"
    return f"{certificate} until {until:%Y-%m-%d}; {asked} a certificate"


def _access(settings: Settings) -> str:
    from dicomnode.scp.access import Directory

    peers = [peer for peer in settings.node.peers if peer.calling]
    directory = Directory(peers)
    directory.refresh()
    lines = []
    for peer in peers:
        places = directory.networks(peer.ae_title)
        if not places:
            raise NodeError(f"{peer.ae_title}: {peer.host} is not known, so it may not call")
        named = peer.certificate_sha256 or peer.certificate_name
        lines.append(
            f"{peer.ae_title} from {', '.join(places)}" + (" with its certificate" if named else "")
        )
    return "; ".join(lines)


def _audit(settings: Settings) -> str:
    path = settings.audit_log
    if not path.parent.exists() and settings.node.audit_log is None:
        return f"{path}, to be made by the node"
    log = AuditLog(path)
    existed = path.exists()
    try:
        log.check()
    except OSError as exc:
        raise NodeError(f"node.audit_log: {path}: {exc.strerror}") from exc
    finally:
        log.close()
        if not existed:  # asking makes nothing, least of all as root
            path.unlink(missing_ok=True)
    return str(path)


def _spool(settings: Settings) -> str:
    spool = Spool.of(settings.spool)
    free, reserve = spool.free_bytes(), settings.spool.reserve_bytes
    if free <= reserve:
        raise NodeError(f"{spool.path}: {free} bytes free, {reserve} are to stay so: free some")
    if free < (watermark := settings.refuse_below_bytes):
        raise NodeError(
            f"{spool.path}: {free} bytes free, and below {watermark} no association is accepted: "
            "free some"
        )
    return (
        f"{spool.path}, {(free - reserve) / 1e9:.1f} GB to use; associations are accepted while "
        f"{watermark / 1e9:.1f} GB are free"
    )


def _database(settings: Settings) -> str:
    shown = safe_url(settings.database.url)
    try:
        file = store.sqlite_file(settings.database.url)
    except ValueError as exc:
        raise NodeError(f"database.url: {exc}") from exc
    if file is not None and not file.exists():  # asking makes nothing, least of all as root
        folder = next(parent for parent in file.parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise NodeError(f"database.url: {folder} is no folder to write to")
        return f"{shown}, to be made by the node"
    with store.opened(settings.database.url):
        return shown


def _weights(settings: Settings) -> str:
    from dicomnode import weights

    bundle = weights.load(settings.score.model)
    return f"{bundle.name}, {bundle.digest[:16]}"


def _device(settings: Settings) -> str:
    from dicomnode import weights

    return str(weights.pick_device(settings.score.device))


def _hl7(settings: Settings) -> str:
    from dicomnode.scp import tls

    own = settings.hl7
    if own.tls:
        tls.server_context(settings.tls)
    senders = ", ".join(own.senders) or "this machine"
    where = f"{own.host}:{own.port}, {'with' if own.tls else 'without'} TLS, from {senders}"
    family = socket.AF_INET6 if ":" in own.host else socket.AF_INET
    try:
        socket.create_server((own.host, own.port or 0), family=family).close()
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise NodeError(
                f"hl7.host, hl7.port: cannot listen on {where}: {exc.strerror}"
            ) from exc
        return f"{where}; in use, by this node or another program"
    return f"{where}; free"


def _keep(settings: Settings) -> str:
    folder = settings.keep.dicom_path
    assert folder is not None  # the caller looked
    there = next(
        parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists()
    )
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise NodeError(f"keep.dicom_path: {there} is no folder to write to")
    made = "" if there == folder.absolute() else ", to be made by the node"
    return f"{folder}{made}, {Disk().free_bytes(there) / 1e9:.1f} GB free"


def _rules(settings: Settings) -> Iterator[Check]:
    try:
        rules = Rules.of(settings)
    except NodeError as exc:
        yield Check("rules", False, str(exc))
        return
    if not rules.rules:
        return
    try:
        with store.opened(settings.database.url) as engine, store.reading(engine) as session:
            counts = [f"it is met by {n} of the Series stored" for _, n in rules.count(session)]
    except NodeError:  # no database yet, or none that answers: that is told above
        counts = ["it can be read"] * len(rules.rules)
    for rule, count in zip(rules.rules, counts, strict=True):
        # Of a URL the host alone: the rest may hold a key.
        to = rule.send_to or urlsplit(rule.webhook or "").netloc
        yield Check(f"rule {rule.name}", True, f"to {to}; {count}")


def _page(settings: Settings) -> str:
    from dicomnode.web import patients, run, tokens

    web = settings.web
    run.tls(web)
    if (key := settings.patient_key_file).exists():  # else the page makes it
        patients.PatientKeys.of(key)
    who = []
    if web.token_file is not None:
        who.append(f"{len(tokens.read(web.token_file))} tokens")
    if web.user_header is not None:
        who.append(f"users of {', '.join(web.proxies)}")
    try:
        run.bind(web).close()
        state = "free"
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise NodeError(f"web.host, web.port: {exc}") from exc
        state = "in use, by this node or another program"
    kind = "HTTPS" if web.certificate else "HTTP"
    asks = " and ".join(who) or "anybody on this machine"
    return f"{web.host}:{web.port}, {kind}, for {asks}; {state}"


def _echo(peer: Peer, settings: Settings) -> str:
    from dicomnode.scu.association import echo

    echo(settings, peer, PEER_TIMEOUT_S)
    return f"{peer.host}:{peer.port} answers C-ECHO"


def _priors(name: str, settings: Settings) -> str:
    from dicomnode.scu.archive import archive_of

    message = archive_of(settings, name).check()
    hours = f", from {settings.priors.hours}" if settings.priors.hours else ""
    return f"{message}; {settings.priors.per_minute:g} requests a minute at most{hours}"


def _takers(settings: Settings) -> list[str]:
    """Return the peers that get objects of ours."""
    return list(dict.fromkeys((*settings.deliver.registration, *settings.deliver.report)))


def _takes(ae_title: str, settings: Settings) -> str:
    """Tell what of ours a peer accepts, by proposing it."""
    from pydicom.uid import Comprehensive3DSRStorage, SpatialRegistrationStorage
    from pynetdicom import build_context
    from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

    from dicomnode.scu.association import associated
    from dicomnode.scu.storage import UNCOMPRESSED

    deliver = settings.deliver
    wanted = []
    if ae_title in deliver.registration:
        wanted.append(("Spatial Registration", SpatialRegistrationStorage))
    if ae_title in deliver.report:
        wanted.append(("Comprehensive 3D SR", Comprehensive3DSRStorage))
    contexts = [build_context(uid, list(UNCOMPRESSED)) for _, uid in wanted]
    contexts += [build_context(StorageCommitmentPushModel), build_context(Verification)]
    peer = settings.peer(ae_title)
    assert peer is not None  # the settings saw to it
    with associated(settings, peer, contexts, acse_s=PEER_TIMEOUT_S) as link:
        refused = [name for name, uid in wanted if not link.accepted(uid)]
        commits = bool(link.accepted(StorageCommitmentPushModel))
    if refused:
        raise NodeError(f"does not take {', '.join(refused)}: allow it at the peer")
    told = f"takes {', '.join(name for name, _ in wanted)}"
    if not deliver.commitment:
        return told
    if commits and not peer.calling:
        raise NodeError(
            f"{told}; its answers to Storage Commitment come as associations, and "
            "node.peers says that it does not call"
        )
    return f"{told}; {'offers' if commits else 'does not offer'} Storage Commitment"


def _hooks(settings: Settings) -> list[str]:
    """Return the URLs of all webhooks."""
    urls = [*settings.deliver.webhooks, *(r.webhook for r in settings.rule if r.webhook)]
    return list(dict.fromkeys(urls))


def _reach(url: str, settings: Settings) -> str:
    from dicomnode.outgoing import webhook

    secret = webhook.read_secret(settings.deliver.webhook_secret_file)
    webhook.reach(url)
    return "can be reached" + ("" if secret else "; what it gets is not signed")
