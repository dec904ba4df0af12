"""PDUs gone wrong, at the reader of the fast lane and at whole associations.

    python -m tests.fuzz.pdu --count 1000000 --seed 1 [--associations 5000]

The reader is driven by bytes alone. What it takes for a whole message is compared to what a
second, slow reading of the same bytes finds. Associations go to a receiver in a process of its
own; it is to live, to keep its memory and threads, and never to answer Success to more messages
than came whole. Prints one line, and fails with the seed of what broke.
"""

import argparse
import contextlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from dicomnode.scp.pdata import Broken, Budget, HandedBack, Limits, Reader, Received, Refused
from tests.pdu import (
    A_ABORT,
    A_RELEASE_RQ,
    CT,
    CT2,
    SC,
    STORAGE,
    Peer,
    associate_rq,
    cut,
    echo_rq,
    message,
    p_data,
    pdv,
    store,
    store_rq,
)

LIMITS = Limits(
    pdu_bytes=1 << 14, message_bytes=1 << 13, dropped_bytes=1 << 15, buffered_bytes=1 << 17,
    kept_bytes=1 << 12,
)  # fmt: skip
COMMAND = store_rq(message_id=2, instance="1.2.2")

# What a mutation starts from: whole exchanges, as their PDUs.
SEEDS: list[list[bytes]] = [
    [store(1, b"ab" * 100), store(2, b"cd" * 40), A_RELEASE_RQ],
    [*message(COMMAND, bytes(range(256)) * 4, size=100), store(3, b"ef")],
    [p_data(pdv(CT, 3, COMMAND), pdv(CT, 0, b"1" * 50), pdv(CT, 2, b"2" * 20)), store(3)],
    [*(p_data(pdv(CT, 1, COMMAND[i : i + 40])) for i in range(0, 80, 40)),
     p_data(pdv(CT, 3, COMMAND[80:])), p_data(pdv(CT, 0, b"x" * 90)), p_data(pdv(CT, 2))],
    [store(1, b"ab" * 30, context_id=CT2), echo_rq(2), store(3, b"ab" * 30)],
    [*message(store_rq(message_id=7), bytes(9000), size=2000), store(8, b"yz" * 9)],  # too long
    [*message(COMMAND, b"12345678" * 20, context_id=SC), *message(COMMAND, b"8" * 90)],
    [p_data(pdv(CT, 3, COMMAND)), p_data(pdv(CT, 0, b"q" * 200)), A_ABORT],
    [*message(COMMAND, b"z" * 600, size=7), store(5)],
]  # fmt: skip


class Fault(AssertionError):
    """What must not happen."""


def mutate(rng: random.Random, pdus: list[bytes]) -> bytes:
    """Return the bytes of an exchange, changed in one place or in a few."""
    pdus = list(pdus)
    whole = rng.random() < 0.5  # PDUs as a whole first
    if whole:
        i, j = rng.randrange(len(pdus)), rng.randrange(len(pdus))
        match rng.randrange(5):
            case 0:
                del pdus[i]
            case 1:
                pdus.insert(i, pdus[j])
            case 2:
                pdus[i], pdus[j] = pdus[j], pdus[i]
            case 3:
                pdus[i] = rng.choice(rng.choice(SEEDS))
            case 4:
                pdus[i] = bytes([rng.randrange(10)]) + pdus[i][1:]
    data = bytearray(b"".join(pdus))
    for _ in range(rng.choice((0, 1, 1, 2, 5)) if whole else rng.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            break
        # Where headers are, mostly: at the beginning of a PDU.
        at = rng.randrange(len(data))
        if rng.random() < 0.6:
            at = data.find(b"\x04\x00\x00", at)
            at = max(0, at) + rng.randrange(24)
            at = min(at, len(data) - 1)
        match rng.randrange(8):
            case 0 | 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at] = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 0x7F, 0x80, 0xFE, 0xFF))
            case 3:  # a length
                data[at : at + 4] = rng.choice((0, 1, 2, 5, 6, 1 << 14, 1 << 20, 0xFFFFFFFF)) \
                    .to_bytes(4, rng.choice(("big", "little")))  # fmt: skip
            case 4:
                del data[at : at + rng.choice((1, 2, 4, 12, 100))]
            case 5:
                data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 12, 100)))
            case 6:
                data[at:at] = data[at : at + rng.randrange(200)]
            case 7:
                del data[at:]
    return bytes(data)


@dataclass
class Message:
    """A message that came whole, by the slow reading."""

    context_id: int
    command: bytes
    data: bytes
    regular: bool  # all on one context, and nothing after it in its PDU


def read_slowly(stream: bytes) -> Iterator[Message]:
    """Give the messages of a stream that came whole, as lenient as pynetdicom is."""
    command, data, context_id, regular = bytearray(), bytearray(), -1, True
    at, have = 0, False
    while at + 6 <= len(stream):
        length = int.from_bytes(stream[at + 2 : at + 6], "big")
        body = stream[at + 6 : at + 6 + length]
        if stream[at] != 4 or len(body) < length:
            return
        at += 6 + length
        items, place = [], 0
        while place < length:
            size = int.from_bytes(body[place : place + 4], "big")
            item = body[place + 4 : place + 4 + size]
            if len(item) < size or size < 2:
                return
            items.append(item)
            place += 4 + size
        for number, item in enumerate(items):
            if item[1] & 1:
                regular &= not have
                context_id, command = item[0], command + item[2:]
                have |= bool(item[1] & 2)
            else:
                regular &= have and item[0] == context_id
                data += item[2:]
            # A data set of zero length may never follow, or the command have none at all.
            if item[1] & 2 and (
                not item[1] & 1 or b"\x00\x00\x00\x08\x02\0\0\0\x01\x01" in command
            ):
                regular &= number == len(items) - 1
                yield Message(context_id, bytes(command), bytes(data), regular)
                command, data, context_id, regular = bytearray(), bytearray(), -1, True
                have = False


def read(stream: bytes, rng: random.Random) -> dict[str, int]:
    """Drive a reader by a stream, and count what came of it.

    Raises
    ------
    Fault
        If it takes for a message what is none, or leaves something behind.
    """
    budget = Budget(LIMITS.buffered_bytes)
    reader = Reader(STORAGE, LIMITS, budget)
    counts = dict.fromkeys(("received", "refused", "handed_back", "broken", "unfinished"), 0)
    expected = read_slowly(stream)
    rest = memoryview(stream)
    piece = rng.choice((1, 3, 10, 100, 1 << 20))
    while True:
        reading = reader.read()
        view = next(reading)
        outcome = None
        while rest and outcome is None:
            count = min(len(view), len(rest), piece)
            if not count:
                raise Fault("the reader asks for nothing")
            view[:count] = rest[:count]
            rest = rest[count:]
            try:
                view = reading.send(count)
            except StopIteration as end:
                outcome = end.value
        match outcome:
            case None:
                counts["unfinished"] += 1
                reading.close()
                break
            case Received(request, data):
                counts["received"] += 1
                there = next(expected, None)
                if there is None or not there.regular:
                    raise Fault("no such message")
                if bytes(data) != there.data or request.context_id != there.context_id:
                    raise Fault("another data set")
                if request.affected_sop_instance_uid.encode() not in there.command:
                    raise Fault("another command")
                data.release()
                reader.reuse()
            case Refused():
                counts["refused"] += 1
                there = next(expected, None)
                if there is None or len(there.data) <= LIMITS.message_bytes:
                    raise Fault("a message refused that was not too long")
            case HandedBack(data):
                counts["handed_back"] += 1
                if not stream[: len(stream) - len(rest)].endswith(data):
                    raise Fault("other bytes handed back")
                break
            case Broken():
                counts["broken"] += 1
                break
    del view, reading
    reader.release()
    if budget.free != LIMITS.buffered_bytes:
        raise Fault("memory left behind")
    return counts


def fuzz_reader(count: int, seed: int) -> dict[str, int]:
    """Read mutated streams; the sum of what came of them."""
    total: dict[str, int] = {}
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        stream = mutate(rng, rng.choice(SEEDS))
        try:
            counts = read(stream, rng)
        except Exception as exc:
            raise Fault(f"seed {seed}, number {number}: {exc!r}") from exc
        for name, value in counts.items():
            total[name] = total.get(name, 0) + value
    return total


# Whole associations

RECEIVER = """
import dataclasses, logging, sys, signal, threading
from dicomnode.config import Settings
from dicomnode.node import receive
settings = Settings.model_validate_json(sys.argv[1])
limits = dataclasses.replace(receive.Limits(), stall_s=2.0, message_bytes=1 << 20)
receive.Limits = lambda: limits
receive.handle_store = lambda *args, **kwargs: 0
threading.excepthook = lambda args: None  # pynetdicom's threads may die of what they read
logging.disable()
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
receiver = receive.Receiver(settings)
receiver.start()
print(receiver.port, flush=True)
stop.wait()
receiver.stop()
"""


@contextlib.contextmanager
def receiver() -> Iterator[tuple[int, psutil.Process]]:
    """Give port and process of a receiver."""
    with tempfile.TemporaryDirectory(prefix="dicomnode-fuzz-") as folder:
        peers = [{"ae_title": "PACS", "host": "127.0.0.1", "port": 104}]
        settings = {
            "node": {
                "port": 0,
                "peers": peers,
                "idle_seconds": 2.0,
                "handshake_seconds": 2.0,
            },
            "spool": {"path": str(Path(folder) / "spool"), "reserve_bytes": 0},
        }
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RECEIVER, json.dumps(settings)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline()), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)
            process.stdout.close()


def associate(port: int, rng: random.Random) -> bool:
    """Send a mutated exchange in an association of its own; whether it was answered at all.

    Raises
    ------
    Fault
        If more messages were stored than came whole.
    """
    request = associate_rq()
    if bad := rng.random() < 0.15:
        request = mutate(rng, [request])
    stream = mutate(rng, rng.choice(SEEDS))
    with Peer(port, 0.25 if bad else 5) as peer:
        peer.send(request)
        answers = peer.receive(1)
        if not (answers and answers[0][0] == 2):
            return bool(answers)
        peer.send(*cut(stream, [rng.randrange(len(stream) + 1) for _ in range(rng.randrange(4))]))
        with contextlib.suppress(OSError):
            peer.connection.shutdown(1)  # SHUT_WR: no more will come
        if peer.finish(20) != "closed":
            raise Fault("the receiver does not hang up")
        stored = sum(is_success(answer) for answer in peer.pdus)
    whole = sum(1 for _ in read_slowly(request[len(request) :] + stream))
    if stored > whole:
        raise Fault(f"{stored} answered with Success, {whole} came whole")
    return True


def is_success(answer: bytes) -> bool:
    """Whether a PDU is a C-STORE response of Success."""
    field, status = bytes.fromhex("0000000102000000"), bytes.fromhex("0000000902000000")
    of_store = answer.partition(field)[2][:2] == b"\x01\x80"
    return of_store and answer.partition(status)[2][:2] == b"\0\0"


def check_serves(port: int) -> None:
    """Raise Fault unless a good C-STORE and C-ECHO are answered well."""
    with Peer(port, 30) as peer:
        peer.send(associate_rq())
        peer.receive(1)
        peer.send(store(1))
        (answer,) = peer.receive(1) or [b""]
        if not is_success(answer):
            raise Fault("a good C-STORE is not stored")
        peer.send(echo_rq(2))
        if len(peer.receive(1)) != 1:
            raise Fault("a good C-ECHO is not answered")
        peer.send(A_RELEASE_RQ)
        peer.receive(1)


@dataclass
class Size:
    """What a receiver takes up."""

    rss_kb: int
    threads: int
    fds: int


def size_of(port: int, process: psutil.Process, threads: int = 0) -> Size:
    """Return the size of a receiver at rest: with `threads`, or once its threads are the same."""
    check_serves(port)
    deadline = time.monotonic() + 20
    seen = [-1] * 8
    while time.monotonic() < deadline:
        seen = [*seen[1:], process.num_threads()]
        if (threads and seen[-1] <= threads) or (not threads and len(set(seen)) == 1):
            break
        time.sleep(0.1)
    return Size(process.memory_info().rss // 1024, process.num_threads(), process.num_fds())


def fuzz_associations(count: int, seed: int, parallel: int = 8) -> tuple[int, Size, Size]:
    """Return how many were answered, and the size of the receiver after a third and at the end.

    Raises
    ------
    Fault
        If the receiver died, grew, hung or stored what did not come whole.
    """
    faults: list[Exception] = []
    answered = 0
    lock = threading.Lock()
    with receiver() as (port, process):
        check_serves(port)

        def run(numbers: range) -> None:
            nonlocal answered
            for number in numbers:
                try:
                    good = associate(port, random.Random(f"{seed}/a{number}"))
                except Exception as exc:
                    faults.append(Fault(f"seed {seed}, association {number}: {exc!r}"))
                    return
                with lock:
                    answered += good

        def run_all(numbers: range) -> None:
            threads = [
                threading.Thread(target=run, args=(numbers[i::parallel],)) for i in range(parallel)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if faults:
                raise faults[0]

        first = max(1, count // 3)
        run_all(range(first))
        before = size_of(port, process)
        run_all(range(first, count))
        after = size_of(port, process, before.threads)
        check_serves(port)
    if after.threads > before.threads or after.fds > before.fds:
        raise Fault(f"threads or files left behind: {before} {after}")
    if after.rss_kb > before.rss_kb + 16_384:  # its heap grows by 10 MB in the first thousands
        raise Fault(f"memory left behind: {before} {after}")
    return answered, before, after


def main() -> None:
    """Fuzz, and print a line."""
    parser = argparse.ArgumentParser(prog="tests.fuzz.pdu", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="streams for the reader")
    parser.add_argument("--associations", type=int, help="default: a two-hundredth of them")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    associations = args.count // 200 if args.associations is None else args.associations
    fuzz_reader(min(args.count, 1000), args.seed)
    before = resident_kb()
    cpu, started = time.process_time(), time.perf_counter()
    counts = fuzz_reader(args.count, args.seed)
    seconds = time.perf_counter() - started
    print(
        f"reader: {args.count} streams, seed {args.seed}, {args.count / seconds:.0f}/s "
        f"({args.count / (time.process_time() - cpu):.0f}/s of CPU), {counts}, "
        f"RSS {before} -> {resident_kb()} kB (peak {peak_kb()})",
        flush=True,
    )
    if associations:
        started = time.perf_counter()
        answered, then, now = fuzz_associations(associations, args.seed)
        seconds = time.perf_counter() - started
        print(
            f"associations: {associations}, {associations / seconds:.0f}/s, "
            f"{answered} answered, RSS {then.rss_kb} -> {now.rss_kb} kB, "
            f"threads {then.threads} -> {now.threads}, files {then.fds} -> {now.fds}"
        )


def resident_kb() -> int:
    """Memory of this process."""
    return psutil.Process().memory_info().rss // 1024


def peak_kb() -> int:
    """The most memory this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
