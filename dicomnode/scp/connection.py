"""The TCP connection of an association."""

import socket
import ssl

QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux alone has it

# An A-ASSOCIATE-RQ of 128 presentation contexts with 64 transfer syntaxes each has 0.3 MB.
REQUEST_BYTES = 1 << 20


class _Prompt(socket.socket):
    """A connection that acknowledges at once what it receives.

    DCMTK leaves Nagle on: it holds the end of a message back until its beginning is
    acknowledged, which Linux delays by 40 ms. Real CT came in at 24 slices/s without this.

    Until the association is established, a peer may send so many bytes and no more: pynetdicom
    reads a PDU of whatever length its header says.
    """

    allowance: int | None = REQUEST_BYTES  # None: no bound any more

    def recv(self, *args: int) -> bytes:
        """Receive as usual; the option is not sticky, so it is set before each read."""
        if QUICK_ACK is not None:
            self.setsockopt(socket.IPPROTO_TCP, QUICK_ACK, 1)
        data = super().recv(*args)
        if self.allowance is not None:
            self.allowance -= len(data)
            if self.allowance < 0:
                raise ConnectionAbortedError("too many bytes for an association request")
        return data


class PromptSocket(_Prompt):
    """Over TCP."""


class PromptTLSSocket(_Prompt, ssl.SSLSocket):
    """Over TLS."""


def shut_down(connection: socket.socket) -> None:
    """End a connection for whoever reads or writes it, in whichever thread."""
    try:
        # Of TCP, not of TLS: that one would take its state from under the other thread.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        pass  # it is over already
