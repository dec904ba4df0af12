"""The TCP or TLS connection to a peer, as pynetdicom is given it."""

import socket
import ssl
from typing import Any

from pynetdicom import AE, Association, evt
from pynetdicom.transport import AddressInformation, AssociationSocket

from dicomnode.config import Peer, Settings
from dicomnode.errors import PeerUnavailable
from dicomnode.scp import tls
from dicomnode.scp.connection import PromptSocket, PromptTLSSocket

CONNECT_S = 10.0
# How long a read within a PDU, or a write, waits for the peer to move at all.
STALL_S = 30.0

Connection = PromptSocket | PromptTLSSocket


def connect(settings: Settings, peer: Peer) -> Connection:
    """Return a connection to a peer, with TLS where that listens with it.

    Raises
    ------
    PeerUnavailable
        If there is none to be had, or the peer shows another certificate than it may.
    ConfigError
        If a file of `[tls]` cannot be used.
    """
    context = tls.client_context(settings.tls, peer) if peer.tls else None
    where = f"{peer.host}:{peer.port}"
    try:
        # Tries each address of the host in turn.
        plain = socket.create_connection((peer.host, peer.port), CONNECT_S)
    except (OSError, UnicodeError) as exc:
        why = exc.strerror or str(exc) if isinstance(exc, OSError) else "no host name"
        raise PeerUnavailable(f"no connection to {where}: {why}") from exc
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection: Any
    if context is None:
        connection = PromptSocket(plain.family, plain.type, plain.proto, plain.detach())
    else:
        connection = _wrapped(context, plain, peer, where)
    connection.settimeout(STALL_S)
    return connection  # type: ignore[no-any-return]  # one of the two


def _wrapped(context: ssl.SSLContext, plain: socket.socket, peer: Peer, where: str) -> Any:
    try:
        wrapped = context.wrap_socket(plain, server_hostname=peer.certificate_name or peer.host)
    except (OSError, ValueError) as exc:
        plain.close()
        why = tls.reason_of(exc) if isinstance(exc, OSError) else str(exc)
        raise PeerUnavailable(f"no TLS with {where}: {why}") from exc
    # Before anything is said to whoever shows it.
    if not tls.accepts(peer, tls.certificate_of(wrapped)):
        wrapped.close()
        raise PeerUnavailable(f"{where} shows another certificate than node.peers says")
    return wrapped


class RequestorAE(AE):  # type: ignore[misc]  # mypy passes pynetdicom over
    """An application entity that requests one association, on a connection that is there.

    pynetdicom's own way tells its log alone why it could not connect, and sends the request
    before anyone may look at the peer's certificate.
    """

    def __init__(self, ae_title: str, connection: Connection) -> None:
        super().__init__(ae_title)
        self.connection = connection

    def _create_socket(
        self, assoc: Association, address: AddressInformation, tls_args: Any
    ) -> AssociationSocket:
        return _Connected(assoc, self.connection)


class _Connected(AssociationSocket):  # type: ignore[misc]  # mypy passes pynetdicom over
    """A connection that is there, to a requestor that would make one."""

    def __init__(self, assoc: Association, connection: Connection) -> None:
        # As an acceptor's, but for the event that tells of it: we wait for nobody's request.
        self._connection = connection
        super().__init__(assoc, address=AddressInformation("127.0.0.1", 0))

    def _create_socket(self, address: AddressInformation) -> Connection:
        return self._connection

    def connect(self, primitive: Any) -> None:
        """Say that the connection is there."""
        self._is_connected = True
        evt.trigger(self.assoc, evt.EVT_CONN_OPEN, {"address": primitive.address_info.as_tuple})
        primitive.result = "Evt2"  # PS3.8 Table 9-10: transport connection confirmed
        self.provider_queue.put(primitive)
        self._ready.set()
