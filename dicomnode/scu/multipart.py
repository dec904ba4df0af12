"""multipart/related as it streams in (RFC 2046 5.1, RFC 2387): one part at a time in memory."""

from collections.abc import Iterable, Iterator
from email.message import Message

from dicomnode.errors import PeerRefused

MAX_HEAD = 1 << 16  # what stands before the first part, and the head of a part
MAX_PART = 1 << 30  # of one Instance, as a C-STORE may have


def boundary_of(content_type: str) -> bytes:
    """Return what separates the parts.

    Raises
    ------
    PeerRefused
        If the answer is of another kind.
    """
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_param("boundary")
    if message.get_content_type() != "multipart/related" or not isinstance(boundary, str):
        raise PeerRefused(f"the answer is {message.get_content_type()}, not multipart/related")
    if not 1 <= len(boundary) <= 70 or not boundary.isascii():  # RFC 2046 5.1.1
        raise PeerRefused("the answer is multipart/related without a usable boundary")
    return boundary.encode()


def parts(chunks: Iterable[bytes], boundary: bytes, most: int = MAX_PART) -> Iterator[bytes]:
    """Yield the content of each part, as the chunks of the answer come in.

    Raises
    ------
    PeerRefused
        If it ends before its end mark, or a part is larger than that.
    """
    reader = _Reader(iter(chunks))
    # The line break before a mark belongs to the mark; before the first one there need be none.
    mark = b"\r\n--" + boundary
    reader.buffer += b"\r\n"
    reader.until(mark, MAX_HEAD)
    while True:
        after = reader.exactly(2)
        if after == b"--":
            return
        if after != b"\r\n":  # white space after the mark is allowed
            reader.until(b"\r\n", MAX_HEAD)
        # Put back, so that a part without any header ends its head by one line break alone.
        reader.buffer[:0] = b"\r\n"
        reader.until(b"\r\n\r\n", MAX_HEAD)
        yield reader.until(mark, most)


class _Reader:
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self.buffer = bytearray()

    def exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            self._more()
        return self._take(count)

    def until(self, mark: bytes, most: int) -> bytes:
        """Return what comes before a mark, and go past it."""
        searched = 0
        while (at := self.buffer.find(mark, searched)) < 0:
            if len(self.buffer) > most + len(mark):
                raise PeerRefused(f"a part of the answer has more than {most} bytes")
            searched = max(0, len(self.buffer) - len(mark) + 1)
            self._more()
        if at > most:
            raise PeerRefused(f"a part of the answer has more than {most} bytes")
        found = self._take(at)
        del self.buffer[: len(mark)]
        return found

    def _take(self, count: int) -> bytes:
        with memoryview(self.buffer) as view:
            found = bytes(view[:count])
        del self.buffer[:count]
        return found

    def _more(self) -> None:
        for chunk in self._chunks:
            if chunk:
                self.buffer += chunk
                return
        raise PeerRefused("the answer breaks off")
