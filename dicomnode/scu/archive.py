"""Whom earlier CT is asked of: a peer by C-FIND and C-MOVE, or a DICOMweb server."""

import contextlib
import socket
from collections.abc import Iterator
from datetime import date
from typing import Protocol

from dicomnode.config import Peer, Settings
from dicomnode.core.retrieval import SeriesAnswer, StudyAnswer
from dicomnode.errors import PeerRefused, PeerUnavailable
from dicomnode.scu import find, move
from dicomnode.scu.association import Link, associated
from dicomnode.scu.dicomweb import opened
from dicomnode.scu.move import Retrieved
from dicomnode.scu.reactor import hold

OWN_S = 5.0  # to connect to ourselves


class Conversation(Protocol):
    """What is asked in one go; every call may raise `PeerRefused` or `PeerUnavailable`."""

    def find_studies(
        self, *, patient_id: str = "", days: tuple[date, date] | None = None, most: int
    ) -> list[StudyAnswer]:
        """Return the Studies with CT, of a patient, of some days, or of both."""

    def find_series(self, study_uid: str, series_uid: str = "") -> list[SeriesAnswer]:
        """Return the CT Series of a Study, or one of them."""

    def retrieve(self, study_uid: str, series_uid: str) -> Retrieved:
        """Bring a Series into our spool, or have it brought."""


class Archive(Protocol):
    """Somebody who may be asked."""

    name: str
    default_issuer: str  # taken for what it sends without one

    def opened(self) -> contextlib.AbstractContextManager[Conversation]:
        """Give a conversation."""

    def check(self) -> str:
        """Try whether it answers, without a patient, and say what cannot be tried."""

    def finds_us(self) -> bool:
        """Whether what it sends finds somebody who takes it."""


class DimseArchive:
    """A peer, asked over one association."""

    def __init__(self, settings: Settings, peer: Peer) -> None:
        self.name = peer.ae_title
        self.default_issuer = peer.default_issuer or settings.node.default_issuer
        self._settings, self._peer = settings, peer

    @contextlib.contextmanager
    def opened(self) -> Iterator[Conversation]:
        """Give an association for C-FIND and C-MOVE, which may accept one of them alone."""
        contexts = [find.find_context(), move.move_context()]
        with associated(self._settings, self._peer, contexts) as link:
            hold(link.assoc)
            yield _DimseConversation(link, self._settings.node.ae_title)

    def check(self) -> str:
        """Try whether the peer takes C-FIND and C-MOVE.

        Raises
        ------
        PeerRefused, PeerUnavailable
            If it does not.
        """
        contexts = [find.find_context(), move.move_context()]
        with associated(self._settings, self._peer, contexts) as link:
            for name, context in zip(("C-FIND", "C-MOVE"), contexts, strict=True):
                if not link.accepted(str(context.abstract_syntax)):
                    raise PeerRefused(f"{self.name} does not offer {name}, Study Root")
        us = self._settings.node.ae_title
        return (
            f"{self.name} takes C-FIND and C-MOVE; whether it knows {us} as a Move Destination "
            "shows at the first C-MOVE alone"
        )

    def finds_us(self) -> bool:
        """Whether our own port takes connections: the peer sends by an association of its own."""
        node = self._settings.node
        # The wildcard addresses stand for every one; one of this machine is meant here.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(node.host, node.host)
        try:
            socket.create_connection((host, node.port), OWN_S).close()
        except OSError:
            return False
        return True


class _DimseConversation:
    def __init__(self, link: Link, destination: str) -> None:
        self._link, self._destination = link, destination

    def find_studies(
        self, *, patient_id: str = "", days: tuple[date, date] | None = None, most: int
    ) -> list[StudyAnswer]:
        return find.find_studies(self._link, patient_id=patient_id, days=days, most=most)

    def find_series(self, study_uid: str, series_uid: str = "") -> list[SeriesAnswer]:
        return find.find_series(self._link, study_uid, series_uid)

    def retrieve(self, study_uid: str, series_uid: str) -> Retrieved:
        return move.move_series(self._link, self._destination, study_uid, series_uid)


class WebArchive:
    """A DICOMweb server; what it sends goes into the spool as imported files do."""

    def __init__(self, settings: Settings, name: str) -> None:
        server = next(s for s in settings.priors.dicomweb if s.name == name)
        self.name = server.name
        self.default_issuer = settings.node.default_issuer
        self._settings, self._server = settings, server

    @contextlib.contextmanager
    def opened(self) -> Iterator[Conversation]:
        """Give connections to the server, and the spool."""
        with opened(self._server, self._settings.spool) as session:
            yield session

    def check(self) -> str:
        """Try whether the server answers a question that nothing matches.

        Raises
        ------
        PeerRefused, PeerUnavailable, ConfigError
            If it does not.
        """
        with self.opened() as conversation:
            long_ago = date(1900, 1, 1)
            conversation.find_studies(days=(long_ago, long_ago), most=find.MAX_ANSWERS)
        return f"{self._server.url} answers QIDO-RS; whether it sends by WADO-RS was not tried"

    def finds_us(self) -> bool:
        """Whether somebody takes what it sends: we do, as it answers."""
        return True


def archive_of(settings: Settings, name: str) -> Archive:
    """Return the archive of an AE title or name of `[priors]`.

    Raises
    ------
    PeerUnavailable
        If the settings know none.
    """
    if any(server.name == name for server in settings.priors.dicomweb):
        return WebArchive(settings, name)
    peer = settings.peer(name)
    if peer is None:
        raise PeerUnavailable(f"{name} is none of node.peers, nor of priors.dicomweb")
    return DimseArchive(settings, peer)
