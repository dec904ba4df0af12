"""`kill -9` of any process of a node at any moment, under load; or its power is cut.

    python -m tests.soak.kill --count 200 --seed 1
    python -m tests.soak.kill --count 50 --parts power

Prints one line, and exits with 1 where an acknowledged Instance is missing from its curve, or has
another score than the same slice of the same body in the same node before anything was killed.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dicomnode import store
from dicomnode.model import Method, SeriesState
from tests.e2e.conftest import Node, Scan, eventually, running_node
from tests.soak.disk import Disk, mounted
from tests.soak.load import Load, Visit, visit

# both: worker and every receiver; all: the supervisor and both, at once; supervisor: alone, its
# parts notice by themselves; power: all, and the disk forgets what was not synced.
PARTS = ("receiver", "worker", "both", "supervisor", "all", "power")
KILLS = PARTS[:-1]
BODIES = (9100, 9101, 9102)
ASSOCIATIONS = 4
# The supervisor lets a part that dies wait longer each time: 1, 2, 5 s and more.
PATIENCE = 2
UNDER_WAY = 50  # slices, at least, when something is killed
UNFINISHED = 40  # visits under way, at most
DRAIN_S = 300.0
# Scores of a slice differ by the batch in which it is scored: 3.8e-6 at most were seen, of scores
# from -10 to 10, and 2e-5 mm of an offset.
SAME_SCORE, SAME_MM = 1e-4, 1e-3


@dataclass
class Result:
    """What became of all that was sent."""

    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    again: int = 0  # sent again, since their answer was lost
    refused: Counter[int] = field(default_factory=Counter)
    missing: int = 0  # acknowledged, and in no curve
    surplus: int = 0  # in a curve more than once, or in a wrong one
    curves: int = 0
    scored_differently: int = 0
    score_difference: float = 0.0
    offsets: int = 0
    offsets_missing: int = 0
    offset_difference_mm: float = 0.0
    quarantined: int = 0
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether nothing was lost, and nothing came out twice."""
        return (
            not (self.missing or self.surplus or self.scored_differently)
            and not (self.offsets_missing or self.quarantined)
            and self.offset_difference_mm <= SAME_MM
        )

    def __str__(self) -> str:
        kills = ", ".join(f"{part} {self.kills[part]}" for part in PARTS if self.kills[part])
        return (
            f"{self.kills.total()} kills ({kills}); {self.acknowledged} acknowledged, "
            f"{self.again} sent again, refused {dict(self.refused) or 0}; "
            f"missing {self.missing}, surplus {self.surplus}, quarantined {self.quarantined}; "
            f"{self.curves} curves, scored twice differently {self.scored_differently} "
            f"(by {self.score_difference:.1e} at most); {self.offsets} offsets, missing "
            f"{self.offsets_missing} (differ by {self.offset_difference_mm:.1e} mm at most); "
            f"{self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Expected:
    """What an undisturbed node made of one body."""

    scores: tuple[np.ndarray, np.ndarray]  # by slice, of the prior and of the follow-up
    offsets_mm: dict[Method, float | None]


def run(
    node: Node,
    count: int,
    *,
    parts: Sequence[str] = KILLS,
    seed: int = 1,
    disk: Disk | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Result:
    """Kill parts of a node that is up, `count` times, and return what became of what it took.

    Parameters
    ----------
    parts
        Of `PARTS`: each once, then each as likely as the others.
    disk
        Where "power" is among the parts: what the spool and the database of the node lie on.
    """
    began = time.monotonic()
    rng, result = random.Random(seed), Result()
    first = rng.sample(list(parts), len(parts))  # each once, and then any
    bodies = {body: _undisturbed(node, body, number) for number, body in enumerate(BODIES)}
    load = Load(node.port, ASSOCIATIONS)
    visits: list[Visit] = []
    deaths: Counter[str] = Counter()  # under this supervisor
    starts = _starts(node) - 1  # of the worker, before the last time that it died
    try:
        while result.kills.total() < count:
            load.check()
            _let_it_finish(node)
            part = first.pop() if first else rng.choice(list(parts))
            died = {"both": ("receiver", "worker")}.get(part, (part,))
            if any(deaths[name] >= PATIENCE for name in died):
                part = "all"  # with a supervisor of its own, the next restart is prompt again
            if part != "receiver":
                eventually(lambda: _starts(node) > starts, "the worker is up again")  # noqa: B023
            while load.waiting < UNDER_WAY:
                made = visit(rng.choice(BODIES), len(BODIES) + len(visits))
                visits.append(made)
                for share in made.shares(rng, ASSOCIATIONS):
                    load.put(share)
            _wait_for_the_moment(load, part, rng)
            began_to_kill = time.monotonic()
            _kill(node, part, rng, disk)
            result.kills[part] += 1
            say(f"{result.kills.total()}: {part}, {len(load.acknowledged)} acknowledged")
            if part != "receiver":
                starts = _starts(node)
            deaths.update(died)
            if not node.running:
                deaths.clear()
                node.start(wait=False)
            if part == "power":
                load.doubt(began_to_kill)
        load.finish()
    except BaseException:
        node.close()
        load.give_up()
        raise
    node.idle(DRAIN_S)
    result.acknowledged, result.again = len(load.acknowledged), load.again
    result.refused = Counter(load.refused)
    for made in visits:
        _judge(node, made, bodies[made.body], load.acknowledged, result)
    result.quarantined = sum(node.quarantined().values())
    result.seconds = time.monotonic() - began
    return result


def _undisturbed(node: Node, body: int, number: int) -> Expected:
    made = visit(body, number)
    load = Load(node.port, 1)
    load.put([ds for one in made.scans for ds in one.slices])
    load.finish()
    for one in made.scans:
        node.finished(one.series_uid, len(one.slices))
    node.idle()
    found = [_scores(node, one) for one in made.scans]
    for one, scores in zip(made.scans, found, strict=True):
        assert scores.keys() == one.uids, "not even undisturbed"
    prior, follow_up = (
        np.array([scores[str(ds.SOPInstanceUID)] for ds in one.slices])
        for one, scores in zip(made.scans, found, strict=True)
    )
    return Expected((prior, follow_up), _offsets(node, made))


def _let_it_finish(node: Node) -> None:
    """Let a worker that is killed again and again come to an end with most of it."""

    def few() -> bool:
        with store.reading(node.engine) as session:
            return len(store.open_series(session)) <= 2 * UNFINISHED

    eventually(few, "Series finished between kills", DRAIN_S)


def _wait_for_the_moment(load: Load, part: str, rng: random.Random) -> None:
    """Return somewhere while slices arrive; for the worker, also while it works them off."""
    after = len(load.acknowledged) + rng.randrange(1, UNDER_WAY // 2)

    def enough() -> bool:
        load.check()
        return len(load.acknowledged) >= after

    eventually(enough, f"{after} acknowledged")
    time.sleep(rng.uniform(0, 1.0 if part in ("worker", "both") else 0.05))


def _starts(node: Node) -> int:
    """Return how often a worker said that it started."""
    return node.log_text().count('"worker started"')


def _kill(node: Node, part: str, rng: random.Random, disk: Disk | None) -> None:
    if part == "receiver":
        running = eventually(lambda: node.processes("receiver"), "a receiver is up again")
        node.kill_processes([rng.choice(running)])
    elif part == "worker":
        node.kill("worker")
    elif part == "both":
        node.kill_processes([*node.processes("receiver"), *node.processes("worker")])
    elif part == "supervisor":
        node.kill("supervisor")
    else:
        if part == "power":
            assert disk is not None, "power is cut of a disk"
            node.let_go()
            disk.cut()
        left = [*node.processes("receiver"), *node.processes("worker")]
        node.kill("supervisor")
        node.kill_processes(left)
        if part == "power":
            assert disk is not None
            disk.restore()
            node.put_log_aside()


def _judge(
    node: Node, made: Visit, expected: Expected, acknowledged: set[str], result: Result
) -> None:
    for one, scores in zip(made.scans, expected.scores, strict=True):
        found = _scores(node, one)
        row = node.one(one.series_uid)
        result.curves += row is not None and row.state is SeriesState.CURVE
        result.missing += len((one.uids & acknowledged) - found.keys())
        result.surplus += len(found.keys() - one.uids)
        for ds, score in zip(one.slices, scores, strict=True):
            if (got := found.get(str(ds.SOPInstanceUID))) is not None:
                difference = abs(got - float(score))
                result.score_difference = max(result.score_difference, difference)
                result.scored_differently += difference > SAME_SCORE
    offsets = _offsets(node, made)
    for method, offset_mm in expected.offsets_mm.items():
        result.offsets += method in offsets
        result.offsets_missing += method not in offsets
        if method in offsets:
            got_mm = offsets[method]
            assert (got_mm is None) == (offset_mm is None)
            if got_mm is not None and offset_mm is not None:
                result.offset_difference_mm = max(
                    result.offset_difference_mm, abs(got_mm - offset_mm)
                )


def _scores(node: Node, made: Scan) -> dict[str, float]:
    """Return SOP Instance UID -> score of a finished curve, which names each once."""
    with store.reading(node.engine) as session:
        curve = store.curve_of(session, made.series_uid)
    if curve is None:
        return {}
    assert len(set(curve.sop_instance_uids)) == len(curve.sop_instance_uids)
    return dict(zip(curve.sop_instance_uids, map(float, curve.score), strict=True))


def _offsets(node: Node, made: Visit) -> dict[Method, float | None]:
    with store.reading(node.engine) as session:
        stored = store.offsets_of(
            session, fixed_study=made.follow_up.study_uid, moving_study=made.prior.study_uid
        )
    return {s.offset.method: s.offset.offset_mm for s in stored}


@contextlib.contextmanager
def opened(folder: Path, power: bool) -> Iterator[tuple[Node, Disk | None]]:
    """Give a node that is up; with `power`, its spool and its database lie on a disk of theirs.

    Raises
    ------
    RuntimeError
        If this machine lets nobody mount a disk.
    """
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(mounted(folder / "power", 1024)) if power else None
        place = disk.path if disk else folder
        node = stack.enter_context(
            running_node(
                folder / "node",
                f"sqlite:///{place / 'node.sqlite'}",
                spool=place / "spool",
                # pynetdicom prints one of senders that are cut off when they stop sending.
                tracebacks_of=frozenset({"pynetdicom.dul"}),
            )
        )
        yield node, disk


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill as often as told, print what became of it, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.kill", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", default=",".join(KILLS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    with (
        tempfile.TemporaryDirectory(prefix="dicomnode-kill-", dir=options.folder) as folder,
        opened(Path(folder), "power" in parts) as (node, disk),
    ):
        result = run(node, options.count, parts=parts, seed=options.seed, disk=disk, say=say)
    print(result)
    return 0 if result.sound else 1


def say(message: str) -> None:
    """Tell the person who waits."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
