"""Decodes what is spooled and scores it in batches, slices of any Series together.

Reads the spool, writes held pixels and slice rows; a file leaves the spool after that commit, not
before.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
import torch
from sqlalchemy import Engine

from dicomnode import dicomio, store
from dicomnode.audit import Act, AuditLog
from dicomnode.core import placeholder, preview
from dicomnode.core.preprocess import Input
from dicomnode.device import Runner, probes
from dicomnode.errors import (
    CorruptObject,
    DeviceUnavailable,
    DicomError,
    TransientError,
)
from dicomnode.held import Held, Pixels
from dicomnode.model import (
    Reason,
    Rejection,
    Scores,
    SeriesState,
    SliceHeader,
    SpooledEvent,
    SpooledInstance,
)
from dicomnode.objects import source
from dicomnode.spool import Entry, Spool
from dicomnode.weights import Bundle

logger = logging.getLogger(__name__)

# A file that stops the worker this often, alone in its batch, is put aside.
POISON_ATTEMPTS = 3
# An input without a score is tried so often alone, once the device gave scores of others.
ATTEMPTS_ALONE = 2
# Of the Instances of a batch, unless one alone has more: 64 of CT have 34 MB, but one of Enhanced
# CT may have hundreds of Frames, and 64 of those would hold a gigabyte of inputs.
BATCH_BYTES = 256 << 20
# Kept free for the names of what is in flight: two batches of the largest size, and their names.
ROOM_BYTES = 256 << 10


class Scorer:
    """A bundle's network on its device."""

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        batch: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.bundle, self.device, self.batch, self.dtype = bundle, device, batch, dtype
        self._run = Runner(bundle, device, dtype, batch)
        self._probes: list[Input] = []

    def score(self, inputs: Sequence[Input]) -> Scores:
        """Return the score of each input, (N,) float32; inputs are (size, size) uint8.

        NaN for an input of which the network makes no number, though it does of others.

        Raises
        ------
        DeviceUnavailable
            If the device gives no answer, or no numbers at all.
        """
        scores = self._scores(inputs)
        culprits = np.flatnonzero(~np.isfinite(scores)).tolist()
        if culprits and not self._gives_numbers():
            raise DeviceUnavailable(f"{self.device}: the network gave scores that are no numbers")
        for k in culprits:
            alone = (float(self._scores([inputs[k]])[0]) for _ in range(ATTEMPTS_ALONE))
            scores[k] = next((score for score in alone if math.isfinite(score)), math.nan)
        return scores

    def _gives_numbers(self) -> bool:
        """Whether the device gives scores of a drawn trunk."""
        self._probes = self._probes or probes(self.bundle.spec)
        return bool(np.isfinite(self._scores(self._probes)).any())

    def _scores(self, inputs: Sequence[Input]) -> Scores:
        try:
            return self._run(inputs)
        except RuntimeError as exc:
            raise DeviceUnavailable(f"{self.device}: {str(exc).splitlines()[0]}") from exc


@dataclass(frozen=True, slots=True)
class Taken:
    """What one step took from the spool."""

    instances: int
    until: datetime | None  # arrival of the newest entry dealt with; None: the spool is empty
    last: bool = False  # whether nothing more waited behind


@dataclass(frozen=True, slots=True)
class Read:
    """What one Frame of a spooled Instance holds, and its input as it is kept."""

    decoded: dicomio.Decoded
    preview: bytes | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Instances that are decoded together, while the batch before them is scored and stored."""

    entries: list[SpooledInstance]
    attempts: int  # the last one included
    read: "list[Future[list[Read] | DicomError]]"  # parallel to entries


class ScoreStage:
    """Takes from one spool, under its lease.

    One thread scores and stores; the others decode. With a backlog the next batch is decoded
    meanwhile: that is as far ahead as it goes, so that memory stays flat.
    """

    def __init__(
        self,
        spool: Spool,
        engine: Engine,
        scorer: Scorer,
        default_issuers: Mapping[str, str] | None = None,
        threads: int | None = None,
        keep_inputs: bool = True,
        priors: store.AskPriors | None = None,
        held: Held | None = None,
        audit: AuditLog | None = None,
        uncorrected: Collection[str] = (),
        placeholders: tuple[str, ...] = (),
    ) -> None:
        self.placeholders = placeholders  # Patient IDs that are nobody's
        self.audit = audit or AuditLog(None)
        self.uncorrected = frozenset(uncorrected)  # AE titles that correct no patient
        self.spool, self.engine, self.scorer, self.held = spool, engine, scorer, held
        self.priors = priors
        self.keep_inputs = keep_inputs
        self.default_issuers = dict(default_issuers or {})
        # Decoding is parallel by slice; matrix products that fork threads of their own inside
        # it made it three times slower.
        self._limits = threadpoolctl.threadpool_limits(1, "blas")
        cores = len(os.sched_getaffinity(0))
        # A core is left to the thread that scores. Two that decode, on two cores, took turns at the
        # interpreter's lock: 410 slices/s, where one gave 500.
        self._pool = ThreadPoolExecutor(threads or max(1, cores - 1), "decode")
        # Threads of torch wait for each other by spinning: two of them beside one that decodes, on
        # two cores, took 3.4 ms of CPU a slice, one takes 0.6.
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(max(1, cores // 4))
        self._ahead: Batch | None = None
        self._in_flight = spool.path / ".in-flight.json"
        self._room = spool.path / ".in-flight.room"
        self._suspects = self._read_in_flight()

    def close(self) -> None:
        """Let the decoding threads end."""
        self._pool.shutdown(cancel_futures=True)
        self._limits.restore_original_limits()
        torch.set_num_threads(self._torch_threads)

    def step(self) -> Taken:
        """Deal with the oldest entries, one batch at most, and say how far that got.

        Raises
        ------
        StoreUnavailable, DeviceUnavailable, HeldUnavailable
            Nothing is lost: the same entries come again.
        """
        batch, self._ahead = self._ahead, None
        taken = {entry.name for entry in batch.entries} if batch else set()
        waiting = self.spool.pending(2 * self.scorer.batch)
        waiting = [entry for entry in waiting if entry.name not in taken]
        if batch is None:
            if not waiting:
                return Taken(0, None)
            if isinstance(waiting[0], SpooledEvent):
                self._end(waiting[0])
                return Taken(0, waiting[0].arrived_at)
            batch = self._first(waiting)
            waiting = waiting[len(batch.entries) :]
        ahead = self._ahead_of(waiting)
        self._write_in_flight(batch, ahead)
        try:
            self._start(batch)
            self._start(ahead)
            self._finish(batch)
        except TransientError:
            self._wait(batch, ahead)
            self._in_flight.unlink(missing_ok=True)  # none of these did it
            raise
        except Exception:
            # One of these did it: next time each goes alone, and is counted.
            self._wait(batch, ahead)
            self._suspects |= {entry.name: batch.attempts for entry in batch.entries}
            raise
        self._suspects.pop(batch.entries[0].name, None)
        if ahead.entries:
            self._ahead = ahead
        else:
            self._in_flight.unlink(missing_ok=True)
        return Taken(len(batch.entries), batch.entries[-1].arrived_at, not waiting)

    def _first(self, waiting: list[Entry]) -> Batch:
        """Return the oldest Instances, up to the next event, as a batch."""
        entries, _ = self._batch_of(waiting)
        # What was in flight when the worker died goes alone, so that the one that did it is known.
        if any(entry.name in self._suspects for entry in entries):
            entries = entries[:1]
            return Batch(entries, self._suspects.get(entries[0].name, 0) + 1, [])
        # They are the oldest, or they are gone; but for those there is no room to set aside.
        self._suspects = {n: count for n, count in self._suspects.items() if self.spool.is_stuck(n)}
        return Batch(entries, 1, [])

    def _ahead_of(self, waiting: list[Entry]) -> Batch:
        """Return the batch to decode meanwhile: a full one, or none, so that batches fill up."""
        entries, is_full = self._batch_of(waiting)
        return Batch(entries if is_full and not self._suspects else [], 1, [])

    def _batch_of(self, waiting: list[Entry]) -> tuple[list[SpooledInstance], bool]:
        """Return the oldest Instances up to the next event, and whether they fill a batch."""
        entries = _up_to_event(waiting[: self.scorer.batch])
        size = 0
        for i, entry in enumerate(entries):
            size += self.spool.size(entry)
            if i and size > BATCH_BYTES:
                return entries[:i], True
        return entries, len(entries) == self.scorer.batch

    def _start(self, batch: Batch) -> None:
        if not batch.read and batch.attempts <= POISON_ATTEMPTS:
            batch.read.extend(self._pool.submit(self._read, entry) for entry in batch.entries)

    def _wait(self, *batches: Batch) -> None:
        """Wait until nothing of these is decoded any more: what comes next is a new attempt."""
        futures = [future for batch in batches for future in batch.read]
        for future in futures:
            future.cancel()
        wait(futures)

    def _finish(self, batch: Batch) -> None:
        if batch.attempts > POISON_ATTEMPTS:
            self._put_aside(batch.entries[0], Reason.CORRUPT, "it stopped the worker")
        else:
            self._store(batch.entries, [future.result() for future in batch.read])

    def _store(
        self, entries: list[SpooledInstance], read: Sequence[list[Read] | DicomError]
    ) -> None:
        """Hold pixels, score what was decoded, store it, let go of the entries, in this order.

        What is stored may finish its Series and be asked for by a rule: its pixels are there then.
        """
        if self.held is not None:
            entries, read = self._hold(self.held, entries, read)
        inputs = [
            frame.decoded.input
            for frames in read
            if not isinstance(frames, DicomError)
            for frame in frames
            if frame.decoded.input is not None
        ]
        scores = iter(self.scorer.score(inputs).tolist())
        now = datetime.now(UTC)  # no arrival lies later, whatever the clock was then
        results: list[store.SliceResult] = []
        aside: list[tuple[SpooledInstance, Reason, str]] = []
        sound: dict[str, SpooledInstance] = {}  # by SOP Instance UID
        notes: list[tuple[SpooledInstance, Rejection]] = []
        for entry, frames in zip(entries, read, strict=True):
            if isinstance(frames, DicomError):
                aside.append((entry, frames.reason, str(frames)))
                continue
            scored = [_scored(frame, scores) for frame in frames]
            unsound = [(d.reason, d.detail) for d, _ in scored if _is_unsound(d.reason)]
            if unsound and unsound[0][0] is not None:
                aside.append((entry, unsound[0][0], unsound[0][1]))
            notes += [(entry, d.rejection) for d, _ in scored if d.rejection is not None]
            if any(score is not None for _, score in scored):
                sound[frames[0].decoded.header.sop_instance_uid] = entry
            results += [
                store.SliceResult(
                    self._named(decoded.header),
                    entry.association_id,
                    min(entry.arrived_at, now),
                    score,
                    decoded.reason,
                    decoded.body_centre_mm,
                    frame.preview if score is not None else None,
                    decoded.header.calling_ae_title not in self.uncorrected,
                )
                for (decoded, score), frame in zip(scored, frames, strict=True)
                if decoded.reason is not Reason.BAD_UID  # a UID that is none names no Series
            ]
        with store.writing(self.engine) as session:
            # Before the slices of this batch, which may be what a note names.
            hidden = [
                store.record_rejection(
                    session, note, entry.association_id, min(entry.arrived_at, now)
                )
                for entry, note in notes
            ]
            describe = partial(self._describe, sound)
            store.record_slices(session, self.scorer.bundle.digest, results, describe, self.priors)
            for entry, reason, detail in aside:
                store.record_quarantined(session, entry.name, reason, detail, entry.arrived_at)
        for (entry, note), done in zip(notes, hidden, strict=True):
            self._tell(entry, note, done)
        for entry, reason, _ in aside:
            self.spool.quarantine(entry, reason)
            logger.warning(
                "instance quarantined", extra={"file": entry.name, "reason": str(reason)}
            )
        self.spool.remove(*entries)

    def _hold(
        self, held: Held, entries: list[SpooledInstance], read: Sequence[list[Read] | DicomError]
    ) -> tuple[list[SpooledInstance], list[list[Read] | DicomError]]:
        """Hold the pixels of a batch, and return what of it may be stored: all, or nearly so."""
        pixels = [_pixels(self.spool, *both) for both in zip(entries, read, strict=True)]
        try:
            held.put([one for one in pixels if one is not None])
            return entries, list(read)
        except OSError:
            held.check()
        failed: list[tuple[SpooledInstance, OSError]] = []
        for entry, one in zip(entries, pixels, strict=True):
            try:
                held.put([one] if one is not None else [])
            except OSError as exc:
                failed.append((entry, exc))
        for entry, why in failed:
            # Others may pass it meanwhile; what is in its way, a person has to see.
            self.spool.set_back(entry)
            logger.error("pixels not held", extra={"file": entry.name, "reason": why.strerror})
        names = {entry.name for entry, _ in failed}
        stored = [both for both in zip(entries, read, strict=True) if both[0].name not in names]
        return [entry for entry, _ in stored], [frames for _, frames in stored]

    def _tell(self, entry: SpooledInstance, note: Rejection, hidden: store.Hidden) -> None:
        told: dict[str, Any] = {
            "note": note.sop_instance_uid,
            "title": note.code,
            "instances": len(note.instances),
            "hidden": hidden.instances,
            "series": list(hidden.series),
        }
        logger.info("instances rejected", extra=told)
        studies = sorted(note.studies)
        self.audit.write(
            Act.REJECTED, association_id=entry.association_id, study_uids=studies, **told
        )

    def _read(self, entry: SpooledInstance) -> list[Read] | DicomError:
        """Return what an Instance holds, Frame by Frame, or what is wrong with it."""
        decoded = self._decode(entry)
        if isinstance(decoded, DicomError):
            return decoded
        return [
            Read(d, preview.pack(d.input) if self.keep_inputs and d.input is not None else None)
            for d in decoded
        ]

    def _decode(self, entry: SpooledInstance) -> tuple[dicomio.Decoded, ...] | DicomError:
        try:
            data = self.spool.read(entry)
            return dicomio.decode(data, self.scorer.bundle.spec, self.default_issuers)
        except DicomError as exc:
            return exc
        except (MemoryError, OSError):
            raise
        except Exception as exc:
            # What no rule foresaw must not stop the queue behind it.
            logger.exception("instance not understood", extra={"file": entry.name})
            return CorruptObject(f"not understood: {type(exc).__name__}")

    def _named(self, header: SliceHeader) -> SliceHeader:
        """Return a header in which a placeholder is nobody: else all who have it were one."""
        patient = placeholder.named(header.patient, self.placeholders)
        return header if patient is header.patient else replace(header, patient=patient)

    def _describe(
        self, sound: Mapping[str, SpooledInstance], result: store.SliceResult
    ) -> dict[str, str]:
        """Return the texts of the header of a slice: what decoding it does not read."""
        data = self.spool.read(sound[result.header.sop_instance_uid])
        try:
            return source.texts_of(dicomio.read(BytesIO(data), pixels=False))
        except DicomError:  # what was understood of it is in its slices
            return {}

    def _end(self, event: SpooledEvent) -> None:
        with store.writing(self.engine) as session:
            if event.kind == "started":
                store.end_lost_associations(session, event.arrived_at, timedelta(0), event.receiver)
            else:
                store.end_association(session, event.association_id, event.kind)
        self.spool.remove(event)

    def _put_aside(self, entry: SpooledInstance, reason: Reason, detail: str) -> None:
        with store.writing(self.engine) as session:
            store.record_quarantined(session, entry.name, reason, detail, entry.arrived_at)
        self.spool.quarantine(entry, reason)
        logger.error("instance quarantined", extra={"file": entry.name, "reason": str(reason)})

    def _read_in_flight(self) -> dict[str, int]:
        """Name -> attempts of what was in flight when the last worker stopped."""
        try:
            return {str(k): int(v) for k, v in json.loads(self._in_flight.read_text()).items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def _write_in_flight(self, *batches: Batch) -> None:
        # Suspects that still wait keep their count; not synced: a power cut is no poison.
        names = dict(self._suspects)
        for batch in batches:
            names |= {entry.name: batch.attempts for entry in batch.entries}
        text = json.dumps(names)
        with contextlib.suppress(OSError):  # on a full disk, going on is what frees it
            try:
                self._replace_in_flight(text)
            except OSError:
                # It would then be forgotten who kills the worker, and nothing free the disk.
                self._room.unlink(missing_ok=True)
                self._replace_in_flight(text)
            if not self._room.exists():
                self._room.write_bytes(bytes(ROOM_BYTES))

    def _replace_in_flight(self, text: str) -> None:
        partial = Path(f"{self._in_flight}.part")
        partial.write_text(text)
        os.replace(partial, self._in_flight)


def _pixels(spool: Spool, entry: SpooledInstance, frames: list[Read] | DicomError) -> Pixels | None:
    """Return what of an entry is to be held: CT of which something could be read."""
    if isinstance(frames, DicomError) or not any(_is_worth(f.decoded.reason) for f in frames):
        return None
    header = frames[0].decoded.header
    uids = header.study_uid, header.series_uid, header.sop_instance_uid
    return Pixels(*uids, spool.read(entry))


def _is_worth(reason: Reason | None) -> bool:
    # A slice that was set aside, such as a scout view, is part of its Series all the same.
    return reason is not Reason.NOT_CT and not _is_unsound(reason)


def _up_to_event(entries: list[Entry]) -> list[SpooledInstance]:
    """Return Instances before the next event: what ended is noted after all it brought."""
    end = next((i for i, e in enumerate(entries) if isinstance(e, SpooledEvent)), len(entries))
    return [entry for entry in entries[:end] if isinstance(entry, SpooledInstance)]


def _scored(frame: Read, scores: Iterator[float]) -> tuple[dicomio.Decoded, float | None]:
    """A Frame and its score, the next of them; set aside where that is none."""
    decoded = frame.decoded
    if decoded.input is None:
        return decoded, None
    score = next(scores)
    if math.isfinite(score):
        return decoded, score
    detail = "the network gives no number for it"
    return replace(decoded, input=None, reason=Reason.NO_SCORE, detail=detail), None


def _is_unsound(reason: Reason | None) -> bool:
    return reason is not None and reason.state is SeriesState.QUARANTINED
