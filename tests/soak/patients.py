"""Patients merged and taken apart in random order, while studies arrive and are corrected.

    python -m tests.soak.patients --patients 10000 --seed 1
    python -m tests.soak.patients --patients 2000 --seed 1 --database postgres --threads 4

Prints what it did, and exits with 1 where the offsets in the database are not exactly those of the
final grouping: each pair of curves of two Studies of one patient, by each method, once. Who is one
patient is worked out anew, in plain Python, from the links that hold and from what the headers
said last. The store is asked through the functions of the node alone.
"""

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import aliased

from db import engine as engines
from db import migrate, schema
from dicomnode import store
from dicomnode.core import curve
from dicomnode.core.admission import CT_IMAGE
from dicomnode.core.curve import HeightMap
from dicomnode.errors import StoreUnavailable
from dicomnode.model import (
    Evidence,
    Method,
    Offset,
    OffsetStatus,
    PatientKey,
    ScoreCurve,
    SeriesState,
    SliceHeader,
)
from dicomnode.store import LinkSource, SliceResult
from tests.conftest import (
    _postgres_binaries,
    _serve_postgres,
    _unprivileged_user,
    postgres_database,
)

MODEL = "5" * 64
HEIGHTS = HeightMap(mm_per_score=10.0, intercept_mm=0.0, residual_sd_mm=5.0)
T0 = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
SLICES = 8  # the fewest of which a curve is made
# How often each is done; a link is taken back as often as one is made, once there are some, so
# that patients stay small: what is asked for is in the square of their Studies.
ACTS = {
    "arrive": 8,
    "merge": 12,
    "unmerge": 5,
    "correct": 2,
    "stale copy": 1,
    "late slice": 1,
    "align": 2,
}
LINKS_PER_PATIENT = 0.45


@dataclass
class Result:
    """What was done, and what the database held then."""

    acts: Counter[str] = field(default_factory=Counter)
    again: int = 0  # acts that the database broke off, and that were done again
    series: int = 0
    links: int = 0  # that hold
    patients: int = 0  # of more than one key
    largest: int = 0  # keys
    pairs: int = 0
    missing: int = 0
    surplus: int = 0
    groups_wrong: int = 0
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether the offsets are exactly those of the final grouping."""
        return not (self.missing or self.surplus or self.groups_wrong)

    def __str__(self) -> str:
        acts = ", ".join(f"{name} {count}" for name, count in sorted(self.acts.items()))
        return (
            f"{acts}; done again {self.again}; {self.series} Series, {self.links} links, "
            f"{self.patients} patients of several keys (up to {self.largest}), {self.pairs} pairs; "
            f"missing {self.missing}, surplus {self.surplus}, groups wrong {self.groups_wrong}; "
            f"{self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Truth:
    """Who is one patient and which pairs that makes, in plain Python, from links and headers."""

    groups: frozenset[frozenset[PatientKey]]  # of more than one key
    pairs: frozenset[tuple[str, str]]  # fixed, moving Series


def grouping(keys: set[PatientKey], links: list[tuple[PatientKey, PatientKey]]) -> dict[Any, Any]:
    """Return key -> representative: union-find over the links that hold."""
    parent = {key: key for key in keys} | {key: key for link in links for key in link}

    def find(key: PatientKey) -> PatientKey:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for a, b in links:
        parent[find(a)] = find(b)
    return {key: find(key) for key in parent}


def truth(engine: Engine) -> Truth:
    """Work out what the database should hold, from its links and headers alone."""
    series, link = schema.Series, schema.PatientLink
    with store.reading(engine) as session:
        links = [
            (PatientKey(a, b), PatientKey(c, d))
            for a, b, c, d in session.execute(
                select(link.merged_id, link.merged_issuer, link.into_id, link.into_issuer).where(
                    link.unlinked_at.is_(None)
                )
            )
        ]
        rows = session.execute(
            select(
                series.series_uid,
                series.study_uid,
                series.study_datetime,
                series.patient_id,
                series.issuer,
                series.state,
            )
        ).all()
    return made(
        links,
        [
            (uid, study, when, PatientKey(patient, issuer))
            for uid, study, when, patient, issuer, state in rows
            if state == SeriesState.CURVE
        ],
    )


def made(
    links: list[tuple[PatientKey, PatientKey]],
    curves: list[tuple[str, str, datetime | None, PatientKey]],
) -> Truth:
    """Work out groups and pairs of links that hold, and of curves: Series, Study, time, key."""
    of = grouping({key for *_, key in curves}, links)
    groups: dict[PatientKey, set[PatientKey]] = {}
    for key, first in of.items():
        groups.setdefault(first, set()).add(key)
    by_patient: dict[PatientKey, list[tuple[datetime, str, str]]] = {}
    for uid, study, when, key in curves:
        if key.patient_id:
            by_patient.setdefault(of[key], []).append((when or datetime.min, study, uid))
    pairs = {
        (b[2], a[2])
        for found in by_patient.values()
        for a, b in combinations(sorted(found), 2)
        if a[1] != b[1]
    }
    several = frozenset(frozenset(g) for g in groups.values() if len(g) > 1)
    return Truth(several, frozenset(pairs))


def judge(engine: Engine, result: Result) -> None:
    """Set what the database holds beside the truth."""
    expected = truth(engine)
    fixed, moving = aliased(schema.Series), aliased(schema.Series)
    with store.reading(engine) as session:
        rows = session.execute(
            select(fixed.series_uid, moving.series_uid, schema.Offset.method)
            .join(fixed, fixed.id == schema.Offset.fixed_series_id)
            .join(moving, moving.id == schema.Offset.moving_series_id)
        )
        found = Counter(tuple(row) for row in rows)
        members = schema.PatientMember
        groups: dict[int, set[PatientKey]] = {}
        for patient_id, issuer, group in session.execute(
            select(members.patient_id, members.issuer, members.group_id)
        ):
            groups.setdefault(group, set()).add(PatientKey(patient_id, issuer))
        result.links = len(store.list_links(session))
        result.series = len(session.scalars(select(schema.Series.id)).all())
    wanted = {(f, m, method) for f, m in expected.pairs for method in Method}
    result.pairs = len(expected.pairs)
    result.missing = len(wanted - set(found))
    result.surplus = len(set(found) - wanted) + sum(n - 1 for n in found.values())
    kept = {frozenset(group) for group in groups.values()}
    result.groups_wrong = len(kept ^ expected.groups)
    result.patients = len(expected.groups)
    result.largest = max(map(len, expected.groups), default=0)


class World:
    """A database, and what is done to it."""

    def __init__(self, engine: Engine, patients: int, seed: int | str) -> None:
        self.engine, self.patients = engine, patients
        self.random = random.Random(seed)
        self.name = f"1.2.{1 + self.random.randrange(1 << 40)}"  # of what this one makes
        self.studies: list[tuple[str, datetime, list[str]]] = []
        self.keys: dict[str, PatientKey] = {}  # Series -> whose it is by what was sent
        self.former: dict[str, set[PatientKey]] = {}  # and whose it was before
        self.links: dict[int, tuple[PatientKey, PatientKey]] = {}
        self.slices: Counter[str] = Counter()
        self.result = Result()

    def act(self, name: str | None = None) -> None:
        """Do something; once more where the database breaks it off, as a node does."""
        names = list(ACTS)
        name = name or self.random.choices(names, [ACTS[n] for n in names])[0]
        state = self.random.getstate()
        while True:
            try:
                getattr(self, name.replace(" ", "_"))()
                break
            except StoreUnavailable:  # a deadlock, on Postgres
                self.result.again += 1
                self.random.setstate(state)
        self.result.acts[name] += 1

    def key(self, near: int | None = None) -> PatientKey:
        """Return the key of a patient; with `near`, of one with a number close by."""
        r = self.random
        n = r.randrange(self.patients) if near is None else (near + r.choice((1, 1, 2, 7)))
        n %= self.patients
        if r.random() < 0.01:
            return PatientKey("", "HOSPITAL")  # nobody
        return PatientKey(f"P{n}", "OTHER" if n % 5 == 0 else "HOSPITAL")

    def arrive(self) -> None:
        """A new Study of one or two Series."""
        r = self.random
        study = f"{self.name}.{len(self.studies) + 1}"
        when = datetime(2020, 1, 1) + timedelta(days=r.randrange(1500))
        key, series = self.key(), [f"{study}.{k}" for k in range(1, r.choice((2, 2, 3)))]
        for uid in series:
            self._store(uid, study, key, when)
            self.keys[uid], self.former[uid] = key, set()
        self.studies.append((study, when, series))

    def correct(self) -> None:
        """A Study comes again under another patient: all of it, or one Series."""
        if not self.studies:
            return
        study, when, series = self.random.choice(self.studies)
        key = self._another(series[0])
        for uid in series if self.random.random() < 0.5 else series[:1]:
            self._store(uid, study, key, when)
            self._corrected(uid, series, key)

    def stale_copy(self) -> None:
        """Less than half of a Series comes again under another patient."""
        if self.studies:
            study, when, series = self.random.choice(self.studies)
            uid = self.random.choice(series)
            results = [_slice(uid, study, self._another(uid), when, k) for k in range(SLICES // 2)]
            with store.writing(self.engine) as session:
                store.record_slices(session, MODEL, results[: self.random.randrange(1, 5)])

    def late_slice(self) -> None:
        """A slice more of a finished Series."""
        if self.studies:
            study, when, series = self.random.choice(self.studies)
            uid = self.random.choice(series)
            self._store(uid, study, self.keys[uid], when, self.slices[uid] + 1)

    def merge(self) -> None:
        """A link between two patients, by either source."""
        if len(self.links) > LINKS_PER_PATIENT * self.patients:
            return self.unmerge()
        n = self.random.randrange(self.patients)
        merged, into = (self.key(near=n) for _ in range(2))
        if merged == into or not (merged.known and into.known):
            return None
        source = self.random.choice(list(LinkSource))
        with store.writing(self.engine) as session:
            done = store.link_patients(session, merged, into, source, T0)
        self.links[done.link.id] = (merged, into)
        return None

    def unmerge(self) -> None:
        """A link is taken back, whichever."""
        if self.links:
            link_id = self.random.choice(list(self.links))
            with store.writing(self.engine) as session:
                store.unlink_patients(session, link_id, T0)
            del self.links[link_id]

    def align(self) -> None:
        """Some pairs that wait get an offset."""
        with store.reading(self.engine) as session:
            waiting = store.pending_offsets(session, 60)
        found = [(p, Offset(p.method, OffsetStatus.OK, 1.0, 50.0), 0.0) for p in waiting]
        with store.writing(self.engine) as session:
            store.store_offsets(session, found, T0)

    def truth(self) -> Truth:
        """What it should have come to, by what was done alone; of a world that was alone."""
        curves: list[tuple[str, str, datetime | None, PatientKey]] = [
            (uid, study, when, self.keys[uid])
            for study, when, series in self.studies
            for uid in series
        ]
        return made(list(self.links.values()), curves)

    def _another(self, uid: str) -> PatientKey:
        """Return the key of a patient, now and then one that the Series had before."""
        former = sorted(self.former[uid], key=str)
        return self.random.choice(former) if former and self.random.random() < 0.3 else self.key()

    def _corrected(self, uid: str, series: list[str], key: PatientKey) -> None:
        """Note that a Series came again under a key, and which others go along."""
        before = self.keys[uid]
        if not key.known or key == before:
            return
        for other in series:
            along = self.keys[other] == before and key not in self.former[other]
            if other == uid or along:
                self.former[other] = (self.former[other] | {before}) - {key}
                self.keys[other] = key

    def _store(
        self, uid: str, study: str, key: PatientKey, when: datetime, count: int | None = None
    ) -> None:
        """Let the slices of a Series arrive, and finish it where that opened it."""
        count = count or max(SLICES, self.slices[uid])
        results = [_slice(uid, study, key, when, k) for k in range(count)]
        with store.writing(self.engine) as session:
            store.record_slices(session, MODEL, results)
        self.slices[uid] = count
        with store.writing(self.engine) as session:
            found = session.execute(
                select(schema.Series.id, schema.Series.state).where(schema.Series.series_uid == uid)
            ).one()
            claimed = None
            if found.state == SeriesState.OPEN:
                claimed = store.claim_series(session, found.id)
            if claimed is None:
                return
            outcome = curve.assemble(
                claimed.slices, series_uid=uid, model=MODEL, heights=HEIGHTS, refused=0
            )
            assert isinstance(outcome, ScoreCurve), outcome
            store.finish_series(
                session, found.id, outcome, claimed, Evidence.RELEASED_AND_QUIET, T0
            )


def _slice(uid: str, study: str, key: PatientKey, when: datetime, k: int) -> SliceResult:
    header = SliceHeader(
        sop_class_uid=CT_IMAGE,
        sop_instance_uid=f"{uid}.{k + 1}",
        series_uid=uid,
        study_uid=study,
        patient=key,
        study_datetime=when,
        modality="CT",
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        image_position=(-100.0, -100.0, 10.0 * k),
        image_orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        pixel_spacing=(0.8, 0.8),
        rows=512,
        columns=512,
        frame_of_reference_uid=f"{uid}.99",
    )
    return SliceResult(header, "0123456789abcdef", T0, float(k))


def run(engine: Engine, patients: int, seed: int, acts: int, threads: int = 1) -> Result:
    """Do so many things from a seed, in so many threads, and judge what came of it."""
    with store.writing(engine) as session:
        heights = {"mm_per_score": 10.0, "intercept_mm": 0.0, "residual_sd_mm": 5.0}
        store.record_model(session, MODEL, {"name": "made", "heights": heights}, T0)
    start = time.monotonic()
    worlds = [World(engine, patients, f"{seed}.{n}") for n in range(threads)]
    failures: list[BaseException] = []

    def work(world: World) -> None:
        try:
            for _ in range(acts // threads):
                world.act()
        except BaseException as exc:
            failures.append(exc)

    running = [threading.Thread(target=work, args=(world,)) for world in worlds]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]
    result = Result()
    for world in worlds:
        result.acts += world.result.acts
        result.again += world.result.again
    judge(engine, result)
    if threads == 1 and worlds[0].truth() != truth(engine):
        result.groups_wrong += 1  # links or headers are not what was said
    result.seconds = time.monotonic() - start
    return result


@contextlib.contextmanager
def database(kind: str) -> Iterator[Engine]:
    """Give an empty database of that kind, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="dicomnode-patients-") as folder:
        with contextlib.ExitStack() as stack:
            url = f"sqlite:///{folder}/node.sqlite"
            if kind == "postgres":
                binaries, user = _postgres_binaries(), _unprivileged_user()
                assert binaries is not None, "no initdb and postgres"
                root = Path(folder) / "pg"
                root.mkdir()
                if user is not None:
                    Path(folder).chmod(0o755)
                    shutil.chown(root, user)
                stack.enter_context(_serve_postgres(binaries, root, user))
                server = f"postgresql://postgres@/postgres?host={root}"
                url = stack.enter_context(postgres_database(server))
            engine = engines.create(url)
            stack.callback(engine.dispose)
            migrate.upgrade(engine)
            yield engine


def main() -> None:
    """Run it from the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=10_000)
    parser.add_argument("--acts", type=int, help="things done; 3 a patient where it is not said")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    acts = asked.acts or 3 * asked.patients
    with database(asked.database) as engine:
        result = run(engine, asked.patients, asked.seed, acts, asked.threads)
    print(f"{asked.database}, {asked.patients} patients, seed {asked.seed}: {result}")
    sys.exit(0 if result.sound else 1)


if __name__ == "__main__":
    main()
