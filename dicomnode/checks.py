"""What `dicomnode check` tries: each outside thing once, with what to do where it fails."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from dicomnode import store
from dicomnode.config import Peer, Settings
from dicomnode.errors import NodeError
from dicomnode.spool import Spool

PEER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    ok: bool
    message: str


def run(settings: Settings) -> Iterator[Check]:
    """Yield the outcome of each check, in the order of the way through the node."""
    yield _try("spool", lambda: _spool(settings))
    yield _try("database", lambda: _database(settings))
    yield _try("weights", lambda: _weights(settings))
    yield _try("device", lambda: _device(settings))
    if not any(peer.calling for peer in settings.node.peers):
        yield Check("peers", False, "nobody may send: name each sender in node.peers")
    for peer in settings.node.peers:
        yield _try(f"peer {peer.ae_title}", lambda p=peer: _echo(p, settings))  # type: ignore[misc]


def lines(settings: Settings) -> Iterator[str]:
    """Yield the resolved settings, one a line, passwords left out."""
    for section, values in settings.model_dump(mode="json").items():
        for key, value in values.items():
            shown = safe_url(value) if (section, key) == ("database", "url") else value
            yield f"{section}.{key} = {shown!r}"


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


def _spool(settings: Settings) -> str:
    spool = Spool.of(settings.spool)
    free, reserve = spool.free_bytes(), settings.spool.reserve_bytes
    if free <= reserve:
        raise NodeError(f"{spool.path}: {free} bytes free, {reserve} are to stay so: free some")
    return f"{spool.path}, {(free - reserve) / 1e9:.1f} GB to use"


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


def _echo(peer: Peer, settings: Settings) -> str:
    from pynetdicom import AE, build_context
    from pynetdicom.sop_class import Verification

    ae = AE(settings.node.ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = PEER_TIMEOUT_S
    where = f"{peer.host}:{peer.port}"
    contexts = [build_context(Verification)]
    assoc = ae.associate(peer.host, peer.port, contexts, ae_title=peer.ae_title)
    if not assoc.is_established:
        raise NodeError(f"no association with {where}")
    try:
        status = assoc.send_c_echo()
        if status.get("Status") != 0x0000:
            raise NodeError(f"{where} does not answer C-ECHO")
    finally:
        assoc.release()
    return f"{where} answers C-ECHO"
