"""Runs the parts: receivers, one worker that owns the device, exchange with peers, page."""

import contextlib
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine

from dicomnode import notify, store
from dicomnode.audit import Act, AuditLog
from dicomnode.config import Settings
from dicomnode.errors import (
    ConfigError,
    DeviceUnavailable,
    HeldUnavailable,
    SpoolBusy,
    StoreUnavailable,
    TransientError,
    WeightsError,
)
from dicomnode.held import Held
from dicomnode.outgoing.asking import Asking, destinations
from dicomnode.outgoing.work import shown
from dicomnode.rules import Rules
from dicomnode.scp.listener import listen
from dicomnode.spool import Spool
from dicomnode.spool.pulse import Sign

T = TypeVar("T")

logger = logging.getLogger(__name__)

BEAT_S = 5.0  # between heartbeats
LOOK_S = 1.0  # between looks for complete Series and pairs, where nothing says that there are
IDLE_S = 0.5  # a worker without work looks so often whether it is to stop
# Less than a batch waits so long for company: one by one, slices took 4 ms of CPU each.
COMPANY_S = 0.02
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # after an error; the last one again and again
TAKEOVER_S = 0.5  # between looks at a lease that another worker holds
FIRST_START_S = 60.0  # a part that says within it that a setting is wrong ends the node
DEVICE_FAILURES = 5
PRUNE_S = 600.0  # between looks at what was kept long enough
SWEEP_S = 2.0  # between looks at held pixels
SWEEP_SHARE = 50  # of the time, one part in so many goes into these looks at most
PORT_S = 15.0  # how long to wait for the port
STOP_S = 20.0  # a part that does not stop by itself in this time is killed


class Worker:
    """Takes one spool through score, assemble and align, a little of each in turn.

    No stage waits for the next: each step does a bounded piece of work and commits it. Inputs that
    were kept long enough are dropped when nothing else is left to do. Held pixels that nobody
    wants go whatever there is to do, and first: that may be what makes room to go on.
    """

    def __init__(
        self, settings: Settings, spool: Spool, engine: Engine, sign: Sign | None = None
    ) -> None:
        from dicomnode import device, weights
        from dicomnode.node.align import AlignStage
        from dicomnode.node.assemble import AssembleStage
        from dicomnode.node.prune import PruneStage
        from dicomnode.node.score import Scorer, ScoreStage
        from dicomnode.node.sweep import SweepStage

        rules = Rules.of(settings)
        bundle = weights.load(settings.score.model)
        on = weights.pick_device(settings.score.device)
        dtype = device.pick_dtype(settings.score.dtype, bundle, on)
        scorer = Scorer(bundle, on, settings.score.batch, dtype)
        issuers = {peer.ae_title: peer.default_issuer for peer in settings.node.peers}
        issuers[""] = settings.node.default_issuer
        with store.writing(engine) as session:
            store.record_model(session, bundle.digest, bundle.manifest, datetime.now(UTC))
            stale = store.count_stale(session, bundle.digest)
            strays = store.waiting_for(session) - destinations(settings)
        days = settings.keep.previews_days
        priors = store.AskPriors(settings.priors.names, settings.priors.recent_days)
        self._held = held_of(settings)
        self._audit = AuditLog(settings.audit_log)
        self._score = ScoreStage(
            spool,
            engine,
            scorer,
            issuers,
            keep_inputs=days > 0,
            priors=priors,
            held=self._held,
            audit=self._audit,
            uncorrected=[peer.ae_title for peer in settings.node.peers if not peer.corrects],
            placeholders=settings.node.placeholder_ids,
        )
        asking = Asking(settings)
        self._assemble = AssembleStage(
            engine,
            settings.series.quiet_seconds,
            settings.series.lost_seconds,
            self._audit,
            asking,
            rules,
        )
        # Always: what rules of before left behind is looked after as well.
        self._sweep = SweepStage(
            engine,
            Held(settings.held_path),
            [rule.name for rule in rules.rules],
            settings.keep.rule_days,
            settings.keep.late_seconds,
            settings.refuse_below_bytes,
        )
        self._sweep_at = -math.inf
        self._align = AlignStage(engine, asking)
        self._prune = PruneStage(engine, days)
        self._batch = settings.score.batch
        self._assembled_at = self._aligned_at = self._pruned_at = -math.inf
        # For who asks peers to send: whether what they sent was taken.
        self._engine, self._beats, self._beat_at = engine, bool(settings.priors.asked), -math.inf
        self._pairs_wait = False
        self._sign = sign or Sign(spool.path)
        self._sign.works_on(device.described(on, dtype))
        self.is_alone = False  # whether the last step took a few slices, and all there were
        logger.info(
            "worker started",
            extra={
                "model": bundle.name,
                "digest": bundle.digest,
                "device": str(on),
                "dtype": str(dtype).removeprefix("torch."),
            },
        )
        self._audit.write(Act.STARTED, part="worker", model=bundle.digest)
        if stale:
            logger.warning("curves of another bundle", extra={"curves": stale})
        if strays:  # should nothing be delivered any more, no exchange runs that says so
            where = sorted({shown(destination) for _, destination, _ in strays})
            logger.warning("deliveries wait for nobody", extra={"destinations": where})

    def close(self) -> None:
        """Let go of threads."""
        self._score.close()
        if self._held is not None:
            self._held.close()
        self._audit.write(Act.STOPPED, part="worker")
        self._audit.close()

    def step(self) -> int:
        """Do a little of everything that can be done now, and return how much that was.

        0 means that nothing is left to do, except that open Series may become quiet.
        """
        if (begun := time.monotonic()) >= self._sweep_at:
            self._sweep.step(datetime.now(UTC))
            took = time.monotonic() - begun
            self._sweep_at = time.monotonic() + max(SWEEP_S, SWEEP_SHARE * took)
        before = datetime.now(UTC)
        taken = self._score.step()
        if self._beats and begun >= self._beat_at:
            self._beat_at = begun + BEAT_S
            with store.writing(self._engine) as session:
                store.beat(session, store.WORKER, min(taken.until or before, before))
        self.is_alone = taken.last and 0 < taken.instances < self._batch
        done = taken.instances + (taken.until is not None)
        now = datetime.now(UTC)
        horizon = taken.until or now
        # With a backlog, looking for complete Series after every batch would be waste.
        is_due = self._assemble.due is not None and horizon >= self._assemble.due
        finished = 0
        if taken.until is None or is_due or time.monotonic() - self._assembled_at > LOOK_S:
            self._assembled_at = time.monotonic()
            finished = self._assemble.step(horizon, now)
        if finished or self._pairs_wait or time.monotonic() - self._aligned_at > LOOK_S:
            self._aligned_at = time.monotonic()
            aligned = self._align.step()
            self._pairs_wait = aligned > 0
            done += aligned
        done += finished
        if not done and time.monotonic() - self._pruned_at > PRUNE_S:
            done += self._prune.step(now)
            if not done:
                self._pruned_at = time.monotonic()
        self._sign.goes_on()
        return done

    def idle_s(self) -> float:
        """Return the seconds until an open Series becomes quiet, or to look again anyway."""
        if self._assemble.due is None:
            return IDLE_S
        return min(IDLE_S, max(0.0, (self._assemble.due - datetime.now(UTC)).total_seconds()))


def held_of(settings: Settings) -> Held | None:
    """Return where pixels are put once they are scored, None where nobody needs them.

    Raises
    ------
    ConfigError
        If the folder cannot be made.
    """
    if not settings.holds:
        return None
    held = Held(settings.keep.dicom_path or settings.held_path)
    try:
        held.make()
    except OSError as exc:
        key = "spool.path" if settings.keep.dicom_path is None else "keep.dicom_path"
        raise ConfigError(f"{key}: {held.path}: {exc.strerror}") from exc
    return held


def work(settings: Settings, stop: threading.Event) -> None:
    """Work until `stop` is set; errors of the database or device are waited out."""
    spool = Spool.of(settings.spool)
    with contextlib.ExitStack() as stack:
        stack.callback(spool.close)
        # After a kill, what an earlier node left running needs a moment to notice and end.
        _take_over(lambda: stack.enter_context(spool.lease()), stop)
        sign = Sign(spool.path)
        # The database may come up after the node: its absence is waited out as well.
        engine = _persist(
            lambda: stack.enter_context(store.opened(settings.database.url, create=True)),
            stop,
            sign,
        )
        if engine is None:
            return
        worker = _persist(lambda: Worker(settings, spool, engine, sign), stop, sign)
        if worker is None:
            return
        stack.callback(worker.close)
        stack.callback(notify.stopping)
        notify.ready()
        while not stop.is_set():
            notify.alive()
            if not _persist(worker.step, stop, sign):
                spool.wait(worker.idle_s())
            elif worker.is_alone:
                stop.wait(COMPANY_S)


@contextlib.contextmanager
def opened_worker(settings: Settings) -> Iterator[tuple[Worker, Spool, Engine]]:
    """Give a worker to a caller that steps it itself, under the spool's lease.

    Raises
    ------
    SpoolBusy
        If another worker is at that spool.
    """
    spool = Spool.of(settings.spool)
    with (
        contextlib.closing(spool),
        spool.lease(),
        store.opened(settings.database.url, create=True) as engine,
    ):
        worker = Worker(settings, spool, engine)
        try:
            yield worker, spool, engine
        finally:
            worker.close()


def _take_over(lease: Callable[[], object], stop: threading.Event) -> None:
    """Take the lease once it is free: a killed node lets go at once, an import when it is done."""
    told = False
    while not stop.is_set():
        try:
            lease()
            return
        except SpoolBusy as exc:
            if not told:
                logger.warning("worker waits", extra={"reason": str(exc)})
                told = True
        stop.wait(TAKEOVER_S)


def _persist(call: Callable[[], T], stop: threading.Event, sign: Sign) -> T | None:
    """Return what the call gives; repeat it while it fails, None once `stop` is set."""
    failures = 0
    while not stop.is_set():
        try:
            return call()
        except (ConfigError, WeightsError):
            raise
        except TransientError as exc:
            logger.warning("worker waits", extra={"reason": str(exc)})
            sign.waits(_why(exc))
            if isinstance(exc, DeviceUnavailable) and failures >= DEVICE_FAILURES:
                raise  # a broken CUDA context ends with its process, and the supervisor starts anew
        except Exception:  # must outlive one job
            logger.exception("worker step failed")
            sign.waits("a step failed: see the log")
        stop.wait(RETRY_S[min(failures, len(RETRY_S) - 1)])
        failures += 1
    return None


def _why(exc: TransientError) -> str:
    """Return what people at the page are told: no address of a database, no path."""
    match exc:
        case DeviceUnavailable():
            return str(exc)
        case StoreUnavailable():
            return "the database does not answer"
        case HeldUnavailable():
            return "the disk takes no pixels that rules want"
    return "it tries again: see the log"


@dataclass(slots=True)
class _Part:
    name: str
    command: list[str]
    listening: socket.socket | None  # which a receiver inherits
    process: subprocess.Popen[bytes]
    started: float
    failures: int = 0
    restart_at: float | None = None


def supervise(
    settings: Settings,
    config: Path | None,
    stop: threading.Event,
    options: Sequence[str],
    *,
    worker: bool = True,
) -> int:
    """Run each part as a process of its own until `stop` is set, and restart what dies.

    The parts are the receivers, which share one listening socket, the worker, and, where the
    settings ask for them, the exchange and the page. Each ends by itself when this process is gone:
    it holds the reading end of a pipe.

    Returns
    -------
    int
        Exit status: 2 where a part says that its settings are wrong.

    Raises
    ------
    ConfigError
        If a rule cannot be read, or the port is taken.
    """
    if worker:
        Rules.of(settings)  # before any peer is let in
    listening = _listen(settings, stop)
    if listening is None:
        return 0
    command = [sys.executable, "-m", "dicomnode", "serve", "--until-eof", *options]
    if config is not None:
        command += ["--config", str(config)]
    parts = []
    for number in range(1, settings.receivers + 1):
        name = "receive" if number == 1 else f"receive {number}"
        inherit = ["--only", "receive", "--listen-fd", str(listening.fileno())]
        parts.append(_start(name, command + inherit, listening))
    if worker:
        parts.append(_start("work", [*command, "--only", "work"], None))
        if settings.exchanges:
            parts.append(_start("exchange", [*command, "--only", "exchange"], None))
        if settings.web.enabled:
            parts.append(_start("web", [*command, "--only", "web"], None))
    notify.ready()  # what connects now waits to be accepted, be a part still on its way
    try:
        while not stop.wait(0.2):
            for part in parts:
                if _look_after(part) == 2:
                    return 2
            notify.status(_summary(parts))
            notify.alive()
    finally:
        notify.stopping()
        listening.close()
        _stop(parts)
    return 0


def _listen(settings: Settings, stop: threading.Event) -> socket.socket | None:
    """The socket that receivers share; None where `stop` was set before it could be had."""
    deadline = time.monotonic() + PORT_S
    while not stop.is_set():
        try:
            return listen(settings.node.host, settings.node.port)
        except ConfigError:
            # The receivers of a node that was killed need a moment to notice and let go of it.
            if time.monotonic() > deadline:
                raise
        stop.wait(0.2)
    return None


def _summary(parts: list[_Part]) -> str:
    waiting = [part.name for part in parts if part.restart_at is not None]
    return f"{', '.join(waiting)} died, to be restarted" if waiting else "every part runs"


def _look_after(part: _Part) -> int | None:
    now = time.monotonic()
    if part.restart_at is not None:
        if now >= part.restart_at:
            part.process, part.started, part.restart_at = _spawn(part), now, None
        return None
    status = part.process.poll()
    if status is None:
        return None
    if status == 2 and part.failures == 0 and now - part.started < FIRST_START_S:
        return 2  # a wrong setting: starting again would not help
    part.failures = 0 if now - part.started > 60 else part.failures + 1
    delay = 0.0 if part.failures == 0 else RETRY_S[min(part.failures - 1, len(RETRY_S) - 1)]
    logger.error("part died", extra={"part": part.name, "status": status, "restart_s": delay})
    part.restart_at = now + delay
    return None


def _start(name: str, command: list[str], listening: socket.socket | None) -> _Part:
    process = _spawn_command(command, listening)
    return _Part(name, command, listening, process, time.monotonic())


def _spawn(part: _Part) -> subprocess.Popen[bytes]:
    return _spawn_command(part.command, part.listening)


def _spawn_command(command: list[str], listening: socket.socket | None) -> subprocess.Popen[bytes]:
    inherited = [listening.fileno()] if listening is not None else []
    # This process answers to systemd for all of them.
    environment = {k: v for k, v in os.environ.items() if k not in notify.VARIABLES}
    return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=inherited, env=environment)


def _stop(parts: list[_Part]) -> None:
    for part in parts:
        if part.process.stdin is not None:
            part.process.stdin.close()
    deadline = time.monotonic() + STOP_S
    for part in parts:
        try:
            part.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            part.process.kill()
            part.process.wait()
