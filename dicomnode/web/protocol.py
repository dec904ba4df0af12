"""HTTP/1.1 as uvicorn speaks it, with bounds on connections that have not asked anything yet.

uvicorn bounds the time between requests, but not that of a request's head: a connection that
sends a byte a minute would stay for ever.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0  # from the connection, or the last answer, to the end of a request's head
PER_ADDRESS, CONNECTIONS = 64, 256  # of one address, and of all
TAKEN_MS = 60_000  # for what was sent to be acknowledged
MAX_HEAD = 32 << 10  # bytes


def protocol(
    refused: Callable[[str, int], None], head_s: float = HEAD_S, per_address: int = PER_ADDRESS
) -> type[H11Protocol]:
    """Return the class of connections; `refused` is told address and status of what is none."""
    counts: dict[str, int] = {}

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _counted = False

        @property
        def _address(self) -> str:
            return self.client[0] if self.client else ""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if counts.get(self._address, 0) >= per_address or len(self.connections) > CONNECTIONS:
                refused(self._address, 429)
                transport.abort()
                return
            self._counted = True
            counts[self._address] = counts.get(self._address, 0) + 1
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # an answer that is not taken; Linux
                sock = transport.get_extra_info("socket")
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TAKEN_MS)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            if self._counted:
                counts[self._address] -= 1
                if not counts[self._address]:
                    del counts[self._address]
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._is_asked():
                self._stop_waiting()
            elif self._timer is None:
                self._wait()  # the head of the next request has begun

        def send_400_response(self, msg: str) -> None:
            refused(self._address, 400)
            super().send_400_response(msg)

        def _is_asked(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _wait(self) -> None:
            self._timer = self.loop.call_later(head_s, self._give_up)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            if not self._is_asked() and not self.transport.is_closing():
                refused(self._address, 408)
                self.transport.abort()

    return Protocol
