"""Decodes what is spooled and scores it in batches, slices of any Series together.

Reads the spool, writes slice rows; a file leaves the spool after that commit, not before.
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import threadpoolctl
import torch
from sqlalchemy import Engine

from dicomnode import dicomio, store
from dicomnode.core import preview
from dicomnode.core.preprocess import Input
from dicomnode.errors import CorruptObject, DeviceUnavailable, DicomError, TransientError
from dicomnode.model import Reason, Scores, SeriesState, SpooledEvent, SpooledInstance
from dicomnode.spool import Spool
from dicomnode.weights import Bundle

logger = logging.getLogger(__name__)

# A file that stops the worker this often, alone in its batch, is put aside.
POISON_ATTEMPTS = 3


class Scorer:
    """A bundle's network on its device."""

    def __init__(self, bundle: Bundle, device: torch.device, batch: int) -> None:
        self.bundle, self.device, self.batch = bundle, device, batch
        self._network = bundle.network.to(device)

    @torch.inference_mode()
    def score(self, inputs: Sequence[Input]) -> Scores:
        """Return the score of each input, (N,) float32; inputs are (size, size) uint8.

        Raises
        ------
        DeviceUnavailable
            If the device gives no answer, or no numbers.
        """
        if not inputs:
            return np.empty(0, np.float32)
        try:
            out = []
            for start in range(0, len(inputs), self.batch):
                x = torch.from_numpy(np.stack(inputs[start : start + self.batch]))[:, None]
                out.append(self._network(x.to(self.device)))  # (B, 1, 128, 128) -> (B,)
            scores = torch.cat(out).float().cpu().numpy()
        except RuntimeError as exc:
            raise DeviceUnavailable(f"{self.device}: {str(exc).splitlines()[0]}") from exc
        if not np.isfinite(scores).all():
            raise DeviceUnavailable(f"{self.device}: the network gave scores that are no numbers")
        return scores


@dataclass(frozen=True, slots=True)
class Taken:
    """What one step took from the spool."""

    instances: int
    until: datetime | None  # arrival of the newest entry dealt with; None: the spool is empty


class ScoreStage:
    """Takes from one spool, under its lease."""

    def __init__(
        self,
        spool: Spool,
        engine: Engine,
        scorer: Scorer,
        default_issuers: Mapping[str, str] | None = None,
        threads: int | None = None,
        keep_inputs: bool = True,
    ) -> None:
        self.spool, self.engine, self.scorer = spool, engine, scorer
        self.keep_inputs = keep_inputs
        self.default_issuers = dict(default_issuers or {})
        # Decoding is parallel by slice; matrix products that fork threads of their own inside
        # it made it three times slower.
        self._limits = threadpoolctl.threadpool_limits(1, "blas")
        self._pool = ThreadPoolExecutor(threads or os.cpu_count(), "decode")
        self._in_flight = spool.path / ".in-flight.json"
        self._suspects = self._read_in_flight()

    def close(self) -> None:
        """Let the decoding threads end."""
        self._pool.shutdown()
        self._limits.restore_original_limits()

    def step(self) -> Taken:
        """Deal with the oldest entries, one batch at most, and say how far that got.

        Raises
        ------
        StoreUnavailable, DeviceUnavailable
            Nothing is lost: the same entries come again.
        """
        entries = self.spool.pending(self.scorer.batch)
        if not entries:
            return Taken(0, None)
        if isinstance(entries[0], SpooledEvent):
            self._end(entries[0])
            return Taken(0, entries[0].arrived_at)
        batch: list[SpooledInstance] = []
        for entry in entries:  # up to the next event: what ended is noted after all it brought
            if isinstance(entry, SpooledEvent):
                break
            batch.append(entry)
        # What was in flight when the worker died goes alone, so that the one that did it is known.
        if any(entry.name in self._suspects for entry in batch):
            batch = batch[:1]
        attempts = self._suspects.get(batch[0].name, 0) + 1 if len(batch) == 1 else 1
        self._write_in_flight(batch, attempts)
        if attempts > POISON_ATTEMPTS:
            self._put_aside(batch[0], Reason.CORRUPT, "it stopped the worker")
        else:
            try:
                self._take(batch)
            except TransientError:
                self._in_flight.unlink(missing_ok=True)  # none of these did it
                raise
            except Exception:
                # One of these did it: next time each goes alone, and is counted.
                self._suspects |= {entry.name: attempts for entry in batch}
                raise
        self._suspects.pop(batch[0].name, None)
        self._in_flight.unlink(missing_ok=True)
        return Taken(len(batch), batch[-1].arrived_at)

    def _take(self, batch: list[SpooledInstance]) -> None:
        decoded = list(self._pool.map(self._decode, batch))
        inputs = [
            d.input for d in decoded if isinstance(d, dicomio.Decoded) and d.input is not None
        ]
        scores = iter(self.scorer.score(inputs))
        previews = iter(self._pool.map(preview.pack, inputs) if self.keep_inputs else ())
        now = datetime.now(UTC)  # no arrival lies later, whatever the clock was then
        results: list[store.SliceResult] = []
        aside: list[tuple[SpooledInstance, Reason, str]] = []
        for entry, d in zip(batch, decoded, strict=True):
            if isinstance(d, DicomError):
                aside.append((entry, d.reason, str(d)))
                continue
            score = float(next(scores)) if d.input is not None else None
            kept = next(previews, None) if d.input is not None else None
            if d.reason is not None and d.reason.state is SeriesState.QUARANTINED:
                aside.append((entry, d.reason, d.detail))
            if d.reason is not Reason.BAD_UID:  # a UID that is none names no Series
                results.append(
                    store.SliceResult(
                        d.header,
                        entry.association_id,
                        min(entry.arrived_at, now),
                        score,
                        d.reason,
                        d.body_centre_mm,
                        kept,
                    )
                )
        with store.writing(self.engine) as session:
            store.record_slices(session, self.scorer.bundle.digest, results)
            for entry, reason, detail in aside:
                store.record_quarantined(session, entry.name, reason, detail, entry.arrived_at)
        for entry, reason, _ in aside:
            self.spool.quarantine(entry, reason)
            logger.warning(
                "instance quarantined", extra={"file": entry.name, "reason": str(reason)}
            )
        self.spool.remove(*batch)

    def _decode(self, entry: SpooledInstance) -> dicomio.Decoded | DicomError:
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

    def _write_in_flight(self, batch: list[SpooledInstance], attempts: int) -> None:
        # Suspects that still wait keep their count; not synced: a power cut is no poison.
        names = {**self._suspects, **{entry.name: attempts for entry in batch}}
        partial = Path(f"{self._in_flight}.part")
        with contextlib.suppress(OSError):  # on a full disk, going on is what frees it
            partial.write_text(json.dumps(names))
            os.replace(partial, self._in_flight)
