"""C-STORE requests out of P-DATA-TF PDUs (PS3.8 9.3.5): bytes in, messages out, no I/O."""

import struct
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from dicomnode.scp.dimse import StoreRequest, decode_store_request

P_DATA_TF = 4
_COMMAND_BYTES = 4096  # a C-STORE command set has 150 to 400
_PDU = struct.Struct(">BxII")  # type, length, and the length of its first PDV
_ITEM = struct.Struct(">IBB")  # length of a PDV, its context, its message control header
_COMMAND, _LAST = 1, 2  # PS3.8 E.2


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may take up of us."""

    # Announced (PS3.8 D.1). DCMTK sends no more than that; fewer reads than pynetdicom's 16382.
    announced_pdu_bytes: int = 131_072
    # Beyond, a PDU is refused. Some senders never look at what is announced.
    pdu_bytes: int = 1 << 20
    # Of any other PDU: an A-ASSOCIATE-RQ of 128 contexts with 64 transfer syntaxes has 0.3 MB.
    negotiation_bytes: int = 1 << 20
    # Of a data set. A longer one is read to its end, not kept, and answered with 0xA700: the
    # sender keeps this object and goes on with the next. An abort would fail those too, and many
    # a PACS then sends all of them again, for ever.
    message_bytes: int = 1 << 30
    # One that is still longer does not end: the association is aborted.
    dropped_bytes: int = 4 << 30
    # Of all associations of the process together; beyond, as for `message_bytes`.
    buffered_bytes: int = 2 << 30
    # Kept from one message to the next.
    kept_bytes: int = 4 << 20
    # Without a byte within a message.
    stall_s: float = 60.0
    # On the average within a message, once it takes longer than `stall_s`.
    bytes_per_s: int = 1024
    # Of messages not yet answered. Without asynchronous operations there is one at a time.
    waiting_messages: int = 16


class Budget:
    """Bytes that several associations share."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Take `size` bytes if there are so many."""
        with self._lock:
            if size > self._free:
                return False
            self._free -= size
            return True

    def give(self, size: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._free += size

    @property
    def free(self) -> int:
        """Bytes that nobody took."""
        return self._free


@dataclass(frozen=True, slots=True)
class Received:
    """A C-STORE whose data set is whole; `data` is good until the next message is read."""

    request: StoreRequest
    data: memoryview


@dataclass(frozen=True, slots=True)
class Refused:
    """A C-STORE whose data set was read to its end and not kept."""

    request: StoreRequest
    reason: str


@dataclass(frozen=True, slots=True)
class HandedBack:
    """Bytes that are for somebody else to read, from the beginning of a PDU on."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Broken:
    """What was received can be no part of the message, which is lost; the peer went astray."""

    reason: str


Outcome = Received | Refused | HandedBack | Broken
# Gives where the next bytes go; takes how many came, at least one.
Reading = Generator[memoryview, int, Outcome]


class Reader:
    """Reads the messages of one association into a buffer that it keeps.

    Parameters
    ----------
    contexts
        Transfer syntax UID by presentation context ID and abstract syntax: those for storage.
    limits, budget
        What it may take up; `budget` is shared with other associations.
    """

    def __init__(
        self, contexts: Mapping[tuple[int, str], str], limits: Limits, budget: Budget
    ) -> None:
        self._contexts = contexts
        self._context_ids = {context_id for context_id, _ in contexts}
        self._limits = limits
        self._budget = budget
        self._command = memoryview(bytearray(_COMMAND_BYTES))
        self._buffer = bytearray()

    def release(self) -> None:
        """Keep no buffer; for an association that is over or idle."""
        self._budget.give(len(self._buffer))
        self._buffer = bytearray()

    def reuse(self) -> None:
        """Make ready for the next message, once the views of the last one are gone.

        A buffer that somebody still looks into is left to them, and a big one is not kept.
        """
        try:
            # Python refuses to resize what is looked into, and tells in no other way.
            self._buffer.append(0)
            self._buffer.pop()
        except BufferError:
            self.release()
        if len(self._buffer) > self._limits.kept_bytes:
            self.release()

    def read(self) -> Reading:
        """Read one message, from the boundary between two on."""
        command, got = self._command, 0
        pieces: list[memoryview] = []
        left = 0  # of this PDU
        while True:
            # The command set. What turns out to be no regular C-STORE is handed back whole.
            begin, want = got, got + (4 if left else 10)
            if want + 2 > _COMMAND_BYTES:
                return HandedBack(bytes(command[:got]))
            while got < want:
                got += yield command[got:want]
                if not left and self._astray(command[begin:got]):
                    return HandedBack(bytes(command[:got]))
            if not left:
                _, left, item = _PDU.unpack_from(command, begin)
            else:
                item = int.from_bytes(command[begin:want], "big")
            left -= 4 + item
            want += item
            if item < 2 or left < 0 or 0 < left < 6 or want > _COMMAND_BYTES:
                return HandedBack(bytes(command[:got]))
            piece = got + 2
            while got < want:
                got += yield command[got:want]
            context_id, flags = command[piece - 2], command[piece - 1]
            if not flags & _COMMAND or context_id not in self._context_ids:
                return HandedBack(bytes(command[:got]))
            pieces.append(command[piece:want])
            if flags & _LAST:
                break
        request = decode_store_request(b"".join(pieces), context_id, self._contexts)
        if request is None:
            return HandedBack(bytes(command[:got]))
        return (yield from self._data(request, left))

    def _data(self, request: StoreRequest, left: int) -> Reading:
        # A header is read to where the bytes after it go: each fragment and the header behind it
        # take one read, and the next fragment covers that header.
        reason = "" if self._reserve(self._limits.kept_bytes // 4) else "out of memory"
        if reason:
            return (yield from self._drop(request, left, 0, reason))
        view = memoryview(self._buffer)
        end = got = 0
        try:
            while True:
                want = 6 if left else 12
                while True:
                    # Before the first read too: there may be bytes behind the last fragment.
                    if not left and (astray := self._astray(view[end : end + got])):
                        return astray
                    if got >= want:
                        break
                    got += yield view[end + got : end + want]
                if not left:
                    left = int.from_bytes(view[end + 2 : end + 6], "big")
                item, context_id, flags = _ITEM.unpack_from(view, end + want - 6)
                left -= 4 + item
                if problem := self._problem(request, item, context_id, flags, left):
                    return Broken(problem)
                fragment = item - 2
                ahead = 0 if flags & _LAST else 6 if left else 12
                if end + fragment > self._limits.message_bytes:
                    reason = "data set too long"
                elif end + fragment + ahead > len(view):
                    view.release()
                    if not self._reserve(end + fragment + ahead, end):
                        reason = "out of memory"
                    view = memoryview(self._buffer)
                if reason:
                    view.release()
                    self.release()
                    return (yield from self._drop(request, left, fragment, reason, flags))
                got = 0
                while got < fragment:
                    got += yield view[end + got : end + fragment + ahead]
                end += fragment
                got -= fragment
                if flags & _LAST:
                    return Received(request, view[:end])
        finally:
            view.release()

    def _drop(
        self, request: StoreRequest, left: int, fragment: int, reason: str, flags: int = 0
    ) -> Reading:
        # Read what is left of a message, the first `fragment` bytes without a header.
        waste = memoryview(bytearray(1 << 16))
        dropped = 0
        while True:
            while fragment:
                fragment -= yield waste[: min(fragment, len(waste))]
            if flags & _LAST:
                return Refused(request, reason)
            want, got = 6 if left else 12, 0
            while got < want:
                got += yield waste[got:want]
                if not left and (astray := self._astray(waste[:got])):
                    return astray
            if not left:
                left = int.from_bytes(waste[2:6], "big")
            item, context_id, flags = _ITEM.unpack_from(waste, want - 6)
            left -= 4 + item
            if problem := self._problem(request, item, context_id, flags, left):
                return Broken(problem)
            fragment = item - 2
            dropped += fragment
            if dropped > self._limits.dropped_bytes:
                return Broken("data set without an end")

    def _astray(self, header: memoryview) -> HandedBack | Broken | None:
        """What becomes of a message whose next PDU begins so; None where it goes on."""
        if header and header[0] != P_DATA_TF:
            return HandedBack(bytes(header))  # A-ABORT, say
        if len(header) >= 6:
            length = int.from_bytes(header[2:6], "big")
            if not 6 <= length <= self._limits.pdu_bytes:
                return Broken(f"a PDU of {length} bytes")
        return None

    def _problem(
        self, request: StoreRequest, item: int, context_id: int, flags: int, left: int
    ) -> str:
        """What is wrong with a fragment of a data set, given what its PDU has left after it."""
        if left < 0 or item < 2 or 0 < left < 6:
            return "a PDV that does not fit its PDU"
        if flags & _COMMAND:
            return "a command within a data set"
        if context_id != request.context_id:
            return "a data set on another presentation context than its command"
        if flags & _LAST and left:
            return "more in a PDU than the end of its message"
        return ""

    def _reserve(self, size: int, used: int = 0) -> bool:
        """Make the buffer `size` bytes long at least, keeping what is `used`."""
        if size <= len(self._buffer):
            return True
        size = max(size, 2 * len(self._buffer))
        if not self._budget.take(size):
            return False
        try:
            old, self._buffer = self._buffer, bytearray(size)
        except MemoryError:
            self._budget.give(size)
            return False
        with memoryview(old) as view:
            self._buffer[:used] = view[:used]
        self._budget.give(len(old))
        return True
