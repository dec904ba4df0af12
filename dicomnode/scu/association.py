"""An association that we request of a peer, bounded in time whatever the peer does."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pynetdicom import Association, _config, build_context
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification

from dicomnode.config import Peer, Settings
from dicomnode.errors import PeerUnavailable
from dicomnode.scp.connection import shut_down
from dicomnode.scu.reactor import hold
from dicomnode.scu.transport import STALL_S, Connection, RequestorAE, connect

logger = logging.getLogger(__name__)

ACSE_S = 30.0  # for the answer to the request, and to the release
ANSWER_S = 120.0  # for the answer to a message, once all of it is sent
# What a peer may send for one message of ours: pynetdicom reads a PDU of whatever length its
# header says.
ANSWER_BYTES = 16 << 20
GRACE_S = 5.0  # how long pynetdicom's own time-outs have before the connection is cut


class NothingAccepted(PeerUnavailable):
    """A peer takes the association, and nothing of what was proposed."""


class Link:
    """An established association, and what is asked on it.

    What else is to be asked goes by `assoc`, within `bounded`.
    """

    def __init__(self, assoc: Association, connection: Connection, peer: Peer) -> None:
        self.assoc = assoc
        self.peer = peer
        self._connection = connection
        self._messages = 0

    @property
    def is_established(self) -> bool:
        """Whether the association still stands, as far as is known."""
        return bool(self.assoc.is_established) and not self.assoc.acse.is_aborted()

    def accepted(self, abstract_syntax: str) -> dict[str, int]:
        """Return transfer syntax UID -> presentation context ID, of those the peer accepted."""
        return {
            str(context.transfer_syntax[0]): int(context.context_id)
            for context in self.assoc.accepted_contexts
            if context.abstract_syntax == abstract_syntax
        }

    def next_message_id(self) -> int:
        """Return a Message ID (0000,0110) that no message on the way has."""
        self._messages = self._messages % 0xFFFF + 1
        return self._messages

    @contextlib.contextmanager
    def bounded(self, seconds: float, answer_bytes: int = ANSWER_BYTES) -> Iterator[None]:
        """Let a message take so long, its answers included, and cut the connection then.

        pynetdicom bounds the wait for an answer; not that of a peer that stops within a PDU.
        """
        self.assoc.dimse_timeout = seconds
        with _bounded(self._connection, seconds + GRACE_S, answer_bytes):
            yield

    def broken(self, what: str) -> PeerUnavailable:
        """Return the error that says that the peer did not answer."""
        if self.assoc.acse.is_aborted("a-abort"):
            return PeerUnavailable(f"{self.peer.ae_title} aborted during {what}")
        if not self.is_established:
            return PeerUnavailable(f"{self.peer.ae_title} broke off during {what}")
        return PeerUnavailable(f"{self.peer.ae_title} did not answer {what}")

    def echo(self, seconds: float = ANSWER_S) -> None:
        """Ask for an answer, by C-ECHO.

        Raises
        ------
        PeerUnavailable
            If there is none, or another than Success.
        """
        with self.bounded(seconds):
            status = self.assoc.send_c_echo(msg_id=self.next_message_id())
        if "Status" not in status:
            raise self.broken("C-ECHO")
        if status.Status != 0x0000:
            raise PeerUnavailable(f"{self.peer.ae_title} answers C-ECHO {status.Status:04X}")


@contextlib.contextmanager
def associated(
    settings: Settings,
    peer: Peer,
    contexts: Sequence[PresentationContext],
    *,
    handlers: Sequence[tuple[Any, ...]] = (),
    acse_s: float | None = None,
) -> Iterator[Link]:
    """Give an association to a peer; released at the end, aborted after an error.

    Parameters
    ----------
    settings : Settings
        Our AE title, which calls, and `[tls]`.
    peer : Peer
        Its AE title is called.
    contexts : sequence of PresentationContext
        What is proposed, 128 at most.
    handlers : sequence of tuple
        Event and handler, as pynetdicom takes them; they run in another thread.
    acse_s : float
        Seconds for the answer to the request, `ACSE_S` unless told.

    Raises
    ------
    PeerUnavailable
        If there is no connection, or the peer rejects, aborts or does not answer.
    ConfigError
        If a file of `[tls]` cannot be used.
    """
    # Else pynetdicom formats every PDU and message for its log.
    _config.LOG_HANDLER_LEVEL = "none"
    acse_s = ACSE_S if acse_s is None else acse_s
    connection = connect(settings, peer)
    try:
        address, port = connection.getpeername()[:2]
    except OSError as exc:
        connection.close()
        raise PeerUnavailable(f"{peer.ae_title} closed the connection") from exc
    ae = RequestorAE(settings.node.ae_title, connection)
    ae.acse_timeout = acse_s
    ae.dimse_timeout = ANSWER_S
    ae.network_timeout = None  # each wait of ours is bounded
    assoc = None
    try:
        asked_at = time.monotonic()
        with _bounded(connection, acse_s + GRACE_S, ANSWER_BYTES):
            assoc = ae.associate(
                address,
                port,
                list(contexts),
                ae_title=peer.ae_title,
                evt_handlers=list(handlers),
            )
        if not assoc.is_established:
            raise _refused(assoc, peer, time.monotonic() - asked_at >= acse_s)
        hold(assoc)
        link = Link(assoc, connection, peer)
        yield link
        if link.is_established:
            with _bounded(connection, acse_s + GRACE_S, ANSWER_BYTES):
                assoc.release()
    finally:
        if assoc is not None and assoc.is_established:
            with _bounded(connection, GRACE_S, ANSWER_BYTES):
                assoc.abort()
        shut_down(connection)
        connection.close()


def echo(settings: Settings, peer: Peer, seconds: float = ANSWER_S) -> None:
    """Ask a peer for an answer, by C-ECHO on an association of its own.

    Raises
    ------
    PeerUnavailable, ConfigError
        If there is none.
    """
    contexts = [build_context(Verification)]
    with associated(settings, peer, contexts, acse_s=min(seconds, ACSE_S)) as link:
        link.echo(seconds)


def _refused(assoc: Association, peer: Peer, waited: bool) -> PeerUnavailable:
    where = f"{peer.ae_title} at {peer.host}:{peer.port}"
    answer = assoc.acceptor.primitive
    if assoc.is_rejected and answer is not None:
        # PS3.8 Table 9-21
        return PeerUnavailable(f"{where} rejects the association: {answer.reason_str}")
    if answer is not None and answer.result == 0x00:
        return NothingAccepted(f"{where} accepts no presentation context")
    if waited:
        return PeerUnavailable(f"{where} does not answer the association request")
    return PeerUnavailable(f"{where} aborts or closes instead of answering")


@contextlib.contextmanager
def _bounded(connection: Connection, seconds: float, answer_bytes: int) -> Iterator[None]:
    connection.allowance = answer_bytes
    timer = threading.Timer(seconds, shut_down, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_paused(assoc: Association, seconds: float = STALL_S) -> bool:
    """Keep pynetdicom's thread from taking messages for us; False where it does not let go."""
    assoc._reactor_checkpoint.clear()  # which waits for it, see `reactor`
    deadline = time.monotonic() + seconds
    while not assoc._is_paused and time.monotonic() < deadline:
        time.sleep(0.0002)
    return bool(assoc._is_paused)
