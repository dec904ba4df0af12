"""Scores stored curves anew when the bundle changed, from the inputs that were kept.

Each Series is a transaction of its own: what is done stays done, a repeat finds only the rest,
and a node may run beside.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.core import preview
from dicomnode.core.preprocess import PreprocessSpec
from dicomnode.errors import StoreUnavailable, WeightsError
from dicomnode.model import ScoreCurve
from dicomnode.node import assemble
from dicomnode.node.align import AlignStage
from dicomnode.outgoing.asking import Asking

if TYPE_CHECKING:
    from dicomnode.node.score import Scorer
    from dicomnode.weights import Bundle

T = TypeVar("T")

RETRY_S = (0.5, 2.0, 5.0)  # a worker beside may hold what a transaction needs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What of the database a bundle did not score, and whether it can."""

    series: tuple[store.StaleSeries, ...]  # to be scored anew
    without_inputs: tuple[str, ...]  # Series Instance UIDs of curves whose inputs are not kept
    other_input: tuple[str, ...]  # and of those whose inputs were made another way


@dataclass(slots=True)
class Summary:
    """What was done."""

    rescored: list[str] = field(default_factory=list)  # Series Instance UIDs
    changed: list[str] = field(default_factory=list)  # they changed meanwhile, and were left alone
    pairs: int = 0  # that wait for their offsets by it


def plan(engine: Engine, bundle: "Bundle", series_uid: str | None = None) -> Plan:
    """Return what there is to score anew by a bundle, of one Series or of all."""
    with store.writing(engine) as session:
        store.record_model(session, bundle.digest, bundle.manifest, datetime.now(UTC))
    with store.reading(engine) as session:
        stale = store.stale_series(session, bundle.digest, series_uid)
        specs = {
            digest: store.manifest_of(session, digest).get("preprocess")
            for digest in set().union(*(s.models for s in stale))
        }
    same = {digest for digest, spec in specs.items() if _is_same(spec, bundle.spec)}
    other = [s.series_uid for s in stale if s.kept and not s.models <= same]
    return Plan(
        series=tuple(s for s in stale if s.kept and s.models <= same),
        without_inputs=tuple(s.series_uid for s in stale if not s.kept),
        other_input=tuple(other),
    )


def run(
    engine: Engine,
    scorer: "Scorer",
    series: Sequence[store.StaleSeries],
    progress: Callable[[int], None] = lambda n: None,
    asking: Asking | None = None,
) -> Summary:
    """Score the Series of a plan, and compute the offsets that follow.

    Raises
    ------
    StoreUnavailable, DeviceUnavailable
        What was done until then stays done; start again.
    """
    summary = Summary()
    for stale in series:
        pairs = _persist(partial(_rescore, engine, scorer, stale, asking))
        if pairs is None:
            summary.changed.append(stale.series_uid)
        else:
            summary.rescored.append(stale.series_uid)
            summary.pairs += pairs
        progress(1)
    align = AlignStage(engine, asking)
    while _persist(align.step):  # those of a node that runs beside too: either may be first
        pass
    return summary


def _persist(call: Callable[[], T]) -> T:
    for wait_s in RETRY_S:
        try:
            return call()
        except StoreUnavailable:
            time.sleep(wait_s)  # for the worker beside to commit; the last try below raises
    return call()


def _is_same(values: object, spec: PreprocessSpec) -> bool:
    try:
        return isinstance(values, dict) and PreprocessSpec.from_dict(values) == spec
    except WeightsError:  # of a version that this code does not know
        return False


def _rescore(
    engine: Engine, scorer: "Scorer", stale: store.StaleSeries, asking: Asking | None
) -> int | None:
    """Give one Series its curve by the scorer's bundle, and return the pairs that now wait."""
    digest = scorer.bundle.digest
    with store.reading(engine) as session:
        kept = store.kept_inputs(session, stale.id, digest)
    if kept is None:
        return None
    scores = scorer.score([preview.unpack(data) for data in kept.inputs])
    by_slice = dict(zip(kept.slices, scores.tolist(), strict=True))
    with store.writing(engine) as session:
        claimed = store.exchange_scores(session, kept, digest, by_slice)
        if claimed is None:
            return None
        result = assemble.outcome(session, stale.series_uid, claimed)
        now = datetime.now(UTC)
        pairs = store.finish_series(session, stale.id, result, claimed, kept.evidence, now)
        if asking is not None and isinstance(result, ScoreCurve):
            asking.curve_stored(session, stale.series_uid, now)
    logger.info("series rescored", extra={"series_uid": stale.series_uid, "pairs": pairs})
    return pairs
