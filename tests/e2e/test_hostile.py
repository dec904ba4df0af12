"""Peers that stall, lie about lengths or vanish: others are served meanwhile, and nothing leaks.

All over real sockets, against one node as it comes.
"""

import contextlib
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from pynetdicom.sop_class import Verification

from benchmarks.ingest.senders import Requestor
from dicomnode.config import Settings
from tests.dicom import ct_dataset, part10, without_meta
from tests.e2e.conftest import CT, Node, association, eventually, running_node

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.slow,
]

ECHO = (Verification, ["1.2.840.10008.1.2"])
# What a sender waits at most while others misbehave; a PACS gives up after 30 s or so.
SERVED_S = 10.0
# By then whoever said nothing whole is gone: the ARTIM timer of PS3.8 9.1.5 is 15 s of ours.
FREED_S = 60.0
GROWTH_BYTES = 64 << 20
HALF_OPEN = 500


@dataclass(frozen=True)
class Held:
    """What the receivers hold, all processes together."""

    threads: int
    descriptors: int
    rss: int


class Served:
    """Gives each test the one node, or a new one where a test left it stuck."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: list[Node] = []

    def node(self) -> Node:
        if not self._nodes:
            self._nodes.append(Node(self._folder / secrets.token_hex(4)))
            self._nodes[0].tracebacks_of = {"pynetdicom.dul"}
            self._nodes[0].start()
            for _ in range(3):  # what a first association makes once is no leak
                serve(self._nodes[0])
        return self._nodes[0]

    def discard(self) -> None:
        while self._nodes:
            self._nodes.pop().close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("hostile"))
    yield served
    served.discard()


@pytest.fixture
def node(served: Served) -> Iterator[Node]:
    """A node whose receivers must be the same afterwards, and hold what they held before."""
    node = served.node()
    before, pids = settled(node), {p.pid for p in node.processes("receiver")}
    try:
        yield node
        serve(node)
        deadline = time.monotonic() + FREED_S
        while (now := held(node)).threads > before.threads or now.descriptors > before.descriptors:
            assert time.monotonic() < deadline, f"{before} before, {now} after {FREED_S:.0f} s"
            time.sleep(0.1)
        assert {p.pid for p in node.processes("receiver")} == pids
        node.check_log()
    except BaseException:
        served.discard()
        raise


def held(node: Node) -> Held:
    processes = node.processes("receiver")
    return Held(
        sum(p.num_threads() for p in processes),
        sum(p.num_fds() for p in processes),
        sum(p.memory_info().rss for p in processes),
    )


def settled(node: Node) -> Held:
    """Return what it holds once that stays the same for a while."""
    last, since = held(node), time.monotonic()
    deadline = since + FREED_S
    while time.monotonic() - since < 1.0:
        assert time.monotonic() < deadline, f"does not settle: {last}"
        time.sleep(0.1)
        now = held(node)
        if (now.threads, now.descriptors) != (last.threads, last.descriptors):
            last, since = now, time.monotonic()
    return last


def serve(node: Node, tls: ssl.SSLContext | None = None) -> float:
    """Have a C-ECHO and a C-STORE answered on an association each; return the seconds it took."""
    start = time.monotonic()
    for context in (ECHO, CT):
        with association(node.port, context, tls=tls) as assoc:
            assert assoc.is_established, f"{context[0].name}: no association"
            if context is ECHO:
                assert assoc.send_c_echo().Status == 0x0000
            else:
                assert assoc.send_c_store(ct_dataset()).Status == 0x0000
    return time.monotonic() - start


def assert_served(node: Node, tls: ssl.SSLContext | None = None) -> None:
    """Fail unless a sound sender gets in and out in good time."""
    took = serve(node, tls)
    assert took < SERVED_S, f"a C-ECHO and a C-STORE took {took:.1f} s"


@contextlib.contextmanager
def connections(node: Node, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            found.append(socket.create_connection(("127.0.0.1", node.port), timeout=10.0))
            stack.enter_context(found[-1])
        yield found


def is_closed(connection: socket.socket) -> bool:
    """Whether the node closed, aborted or reset a connection."""
    connection.setblocking(False)
    try:
        while data := connection.recv(4096):
            if data[:1] in (b"\x03", b"\x07"):  # A-ASSOCIATE-RJ, A-ABORT: ours is to close now
                return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def slice_pdus(requestor: Requestor, matrix: int = 64) -> list[bytes]:
    ds = ct_dataset(Rows=matrix, Columns=matrix, PixelData=bytes(2 * matrix * matrix))
    return requestor.encode(ds.SOPInstanceUID, without_meta(part10(ds)))


# Peers that say nothing, or not enough


def test_500_half_open_connections(node):
    # Nothing, half a header, and a header whose PDU never comes.
    beginnings = (b"", b"\x01\x00\x00", b"\x01\x00\x00\x00\x00\xd0" + b"\x00\x01\x00\x00")
    with connections(node, HALF_OPEN) as stalled:
        for i, connection in enumerate(stalled):
            with contextlib.suppress(OSError):  # it may be refused already
                connection.sendall(beginnings[i % len(beginnings)])
        assert_served(node)
        assert_served(node)
        eventually(
            lambda: all(map(is_closed, stalled)), f"{HALF_OPEN} half-open are closed", FREED_S
        )
        assert_served(node)


def test_one_byte_at_a_time(node):
    # A-ASSOCIATE-RQ of 200 bytes, of which one comes every quarter of a second.
    request = b"\x01\x00\x00\x00\x00\xc8" + b"\x00\x01" + bytes(198)
    with connections(node, 10) as slow:
        started = time.monotonic()
        for byte in range(len(request)):
            for connection in slow:
                with contextlib.suppress(OSError):
                    connection.sendall(request[byte : byte + 1])
            if byte % 20 == 10:
                assert_served(node)
            if all(map(is_closed, slow)):
                break
            time.sleep(0.25)
        assert all(map(is_closed, slow))
        assert time.monotonic() - started < 45.0, "the time for a request begins at its first byte"


def test_a_data_set_that_trickles_in(node):
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(contextlib.closing(peer(node))) for _ in range(10)]
        data = [b"".join(slice_pdus(requestor)) for requestor in slow]
        for byte in range(40):
            for requestor, pdus in zip(slow, data, strict=True):
                requestor.send(pdus[byte : byte + 1])
            if byte % 10 == 0:
                assert_served(node)
        for requestor in slow:
            requestor.abort()


@pytest.mark.skipif("tls" not in Settings.model_fields, reason="this version has no TLS")
def test_silent_tls_clients(tmp_path):
    authority = trustme.CA()
    ours, theirs = authority.issue_cert("127.0.0.1"), authority.issue_cert("sender.test")
    ours.private_key_and_cert_chain_pem.write_to_path(tmp_path / "node.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    context.check_hostname = False
    theirs.configure_cert(context)
    settings = (
        f'[tls]\ncertificate = "{tmp_path / "node.pem"}"\nclient_ca = "{tmp_path / "ca.pem"}"\n'
    )
    # The start of a ClientHello of 512 bytes; the rest never comes.
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)
    with running_node(
        tmp_path / "node",
        more_settings=settings,
        tracebacks_of=frozenset({"pynetdicom.dul"}),
    ) as node:
        serve(node, context)
        before = settled(node)
        with connections(node, 40) as silent:
            for connection in silent[::2]:
                connection.sendall(hello)
            assert_served(node, context)
            assert_served(node, context)
            eventually(lambda: all(map(is_closed, silent)), "silent ones are closed", FREED_S)
        eventually(lambda: settled(node).threads <= before.threads, "threads are back", FREED_S)
        assert settled(node).descriptors <= before.descriptors


# Lengths that are lies


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pdu_that_claims_400_mib(node, when):
    header = struct.pack(">BBI", 0x01 if when == "before" else 0x04, 0, 400 << 20)
    before = held(node).rss
    most = 0
    with contextlib.ExitStack() as stack:
        if when == "before":
            (connection,) = stack.enter_context(connections(node, 1))
            send: Callable[[bytes], None] = connection.sendall
        else:
            send = stack.enter_context(contextlib.closing(peer(node))).send
        sent, chunk = 0, bytes(1 << 20)
        with contextlib.suppress(OSError):  # it hangs up, which is what it should do
            send(header)
            while sent < 200 << 20:
                send(chunk)
                sent += len(chunk)
                most = max(most, held(node).rss)
                if sent == 4 << 20:
                    assert_served(node)
        time.sleep(0.2)
        most = max(most, held(node).rss)
        assert_served(node)
    grown = (most - before) >> 20
    assert most - before <= GROWTH_BYTES, f"{grown} MiB more after {sent >> 20} MiB of one PDU"


# Peers that vanish


def test_connect_and_close_300_times(node):
    for i in range(300):
        with connections(node, 1) as (connection,):
            if i % 3 == 1:
                connection.sendall(b"\x01\x00\x00")
            if i % 3 == 2:  # a reset in place of a FIN
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert_served(node)


def test_a_sender_that_dies_within_a_slice(node):
    node.idle()
    known = {row.series_uid for row in node.series()}
    for i in range(20):
        requestor = peer(node)
        pdus = slice_pdus(requestor, 256)
        requestor.send(b"".join(pdus)[: 40_000 + i])
        if i % 2:
            requestor.reset()
        else:
            requestor.abort()
    assert_served(node)
    node.idle()
    new = {row.series_uid for row in node.series()} - known
    assert len(new) == 1, "half a slice was taken for one"  # that of `assert_served`


def test_threads_that_connect_all_at_once(node):
    # More than `maximum_associations`: who is refused is told so, for now, and nobody hangs.
    def one() -> None:
        with association(node.port, ECHO) as assoc:
            if assoc.is_established:
                answers.append(assoc.send_c_echo().Status)
            else:
                refused.append(assoc.is_rejected)

    answers: list[int] = []
    refused: list[bool] = []
    threads = [threading.Thread(target=one) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) + len(refused) == 60
    assert set(answers) == {0x0000} and all(refused)
    assert len(answers) >= 10
    assert_served(node)


def peer(node: Node) -> Requestor:
    return Requestor(node.port, calling_ae_title="TEST")
