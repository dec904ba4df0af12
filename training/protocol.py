"""The protocol of Table 1: which pairs are made, how they are cropped, how errors are counted.

Everything here was fixed before a method was run on it.
"""

import fnmatch
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np

from training.followup import FollowUpConfig

Span = tuple[float, float]
Group = Literal["none", "0-25 %", "25-75 %", "more"]

# |error|, mm, up to which a pair is of category 1, 2, 3; beyond is 4. The paper's readers gave
# 1 to 4 by eye; its own thresholds are not known.
CATEGORIES_MM = (10.0, 25.0, 75.0)
OVERLAPS: tuple[Group, ...] = ("none", "0-25 %", "25-75 %", "more")


class Kind(StrEnum):
    """Where the truth of a pair comes from."""

    FOLLOW_UP = "follow-up"  # synthetic, the moving one cropped as in the paper
    STRESS = "stress"  # synthetic, both cropped
    SAME_FRAME = "same frame"  # one scan reconstructed twice: truth 0
    SAME_FRAME_CROPPED = "same frame, cropped"
    KNOWN = "known"  # measured by eye


@dataclass(frozen=True, slots=True)
class KnownPair:
    """Two Series whose offset was measured: `z_fixed = z_moving + truth_mm`, +- tolerance."""

    fixed: str  # Series Instance UID
    moving: str
    truth_mm: float
    tolerance_mm: float


# ACRIN-FLT-Breast_001 of the public archive, arms up (A, moving) against arms down (C, fixed):
# carina and five other levels by eye.
ACRIN = KnownPair(
    fixed="1.2.826.0.1.3680043.8.498.92189419572062754932659659254371335056",
    moving="1.2.826.0.1.3680043.8.498.11359009461316480851354443676437747774",
    truth_mm=-215.0,
    tolerance_mm=10.0,
)


@dataclass(frozen=True, slots=True)
class ProtocolConfig:
    """All that decides which pairs are made."""

    seed: int = 0
    follow_up: FollowUpConfig = field(default_factory=FollowUpConfig)
    pairs: int = 277  # follow-ups, as many as the paper has pairs
    per_patient: int = 6  # at most
    stress_pairs: int = 300
    stress_per_patient: int = 8
    stress_mm: Span = (60.0, 250.0)  # length of each scan
    stress_extent_mm: float = 150.0  # a volume that shows less is not cropped twice
    crops: int = 4  # of each same-frame pair in each direction
    min_slices: int = 20  # of a volume, and of a crop at about 1 mm
    tail_slices: int = 100  # a crop starts before the last so many
    # The first pattern that a patient's name matches tells the region.
    regions: tuple[tuple[str, str], ...] = (
        ("OpenKBP-*", "head-neck"),
        ("HNC-*", "head-neck"),
        ("C3N-*", "head-neck"),
        ("STS_*", "limb"),
        ("*", "trunk"),
    )
    # Of the pairs; what a region cannot fill goes to the others. Cropped limbs are not what the
    # regressor is made for: no share.
    shares: tuple[tuple[str, float], ...] = (("trunk", 0.5), ("head-neck", 0.5))
    known: tuple[KnownPair, ...] = (ACRIN,)


QUICK = ProtocolConfig(pairs=6, stress_pairs=8, crops=1)


@dataclass(frozen=True, slots=True)
class Source:
    """A Series that pairs can be made from; positions are those of slices that show a body."""

    patient: str
    study_uid: str
    series_uid: str
    frame_uid: str  # "" where its slices do not agree on one
    z_mm: tuple[float, ...]

    @property
    def span_mm(self) -> Span:
        """Its first and last position."""
        return self.z_mm[0], self.z_mm[-1]


@dataclass(frozen=True, slots=True)
class Planned:
    """One pair to be made; the same Series twice where the moving one is a follow-up."""

    kind: Kind
    patient: str
    region: str
    fixed: str  # Series Instance UID
    moving: str
    number: int  # among the patient's pairs of this kind: seeds all that is drawn for it
    group: Group | None = None  # true overlap that a stress pair is cropped to
    truth_mm: float = 0.0
    tolerance_mm: float = 0.0


def region_of(patient: str, config: ProtocolConfig) -> str:
    """Return the region of a patient's scans, by name."""
    return next((r for p, r in config.regions if fnmatch.fnmatch(patient, p)), "other")


def plan(sources: Sequence[Source], config: ProtocolConfig) -> list[Planned]:
    """Return all pairs of an archive, by patient; the same for the same archive and config."""
    usable = [s for s in sources if len(s.z_mm) >= config.min_slices]
    long = [s for s in usable if s.z_mm[-1] - s.z_mm[0] >= config.stress_extent_mm]
    planned = _follow_ups(usable, Kind.FOLLOW_UP, config.pairs, config.per_patient, config)
    planned += _follow_ups(
        long, Kind.STRESS, config.stress_pairs, config.stress_per_patient, config
    )
    planned += _same_frame(usable, config)
    by_uid = {s.series_uid: s for s in sources}
    for number, known in enumerate(config.known):
        if known.fixed in by_uid and known.moving in by_uid:
            patient = by_uid[known.fixed].patient
            planned.append(
                Planned(
                    Kind.KNOWN,
                    patient,
                    region_of(patient, config),
                    known.fixed,
                    known.moving,
                    number,
                    truth_mm=known.truth_mm,
                    tolerance_mm=known.tolerance_mm,
                )
            )
    return sorted(planned, key=lambda p: (p.patient, p.kind, p.number))


def allocate(
    patients: dict[str, list[str]],
    shares: Sequence[tuple[str, float]],
    total: int,
    most: int,
    seed: int,
) -> dict[str, int]:
    """Return patient -> number of pairs: at most `most` each, as even as can be in a region.

    `patients` holds those of each region. What a region cannot fill goes to the others.
    """
    wanted = {r: share for r, share in shares if patients.get(r)}
    room = {r: most * len(patients[r]) for r in wanted}
    counts = dict.fromkeys(wanted, 0)
    left = min(total, sum(room.values()))
    while left > 0:
        open_ = [r for r in wanted if counts[r] < room[r]]
        # The region that is furthest behind its share takes the next pair.
        behind = min(open_, key=lambda r: (counts[r] + 1) / wanted[r])
        counts[behind] += 1
        left -= 1
    given = {}
    for region, count in counts.items():
        members = sorted(patients[region])
        rng = np.random.default_rng([seed, zlib.crc32(region.encode())])
        lucky = set(rng.permutation(members)[: count % len(members)].tolist())
        for patient in members:
            given[patient] = count // len(members) + (patient in lucky)
    return given


def random(planned: Planned, config: ProtocolConfig) -> np.random.Generator:
    """Return the generator that belongs to one planned pair."""
    name = f"{planned.patient}/{planned.kind}"
    return np.random.default_rng(
        [config.seed, config.follow_up.seed, zlib.crc32(name.encode()), planned.number]
    )


def paper_crop(slices: int, config: ProtocolConfig, rng: np.random.Generator) -> tuple[int, int]:
    """Return (first, count) of a crop as in the paper, of slices of about 1 mm.

    It starts anywhere from the first to the 100th slice from the end, and has from 20 slices
    to all that remain. A shorter volume starts at its first slice.
    """
    first = int(rng.integers(0, max(0, slices - config.tail_slices) + 1))
    rest = slices - first
    return first, int(rng.integers(min(config.min_slices, rest), rest + 1))


def stress_crops(
    span_mm: Span, group: Group, config: ProtocolConfig, rng: np.random.Generator
) -> tuple[Span, Span]:
    """Return two parts of a volume, mm, that overlap by as much as the group says.

    Lengths and places are uniform among those that do; of a volume too short for
    the wanted lengths, shorter parts.
    """
    low, high = span_mm
    shortest = min(config.stress_mm[0], (high - low) / 2.2)
    longest = max(shortest, min(config.stress_mm[1], high - low))
    for _ in range(10_000):
        length = rng.uniform(shortest, longest, 2)
        start = low + rng.uniform(0, 1, 2) * (high - low - length)
        a, b = ((float(s), float(s + n)) for s, n in zip(start, length, strict=True))
        if group_of(overlap(a, b)) == group:
            return a, b
    raise ValueError(f"{high - low:.0f} mm do not hold two parts with overlap {group}")


def overlap(a: Span, b: Span) -> float:
    """Return what two scans share, of the shorter one: 0..1."""
    shared = min(a[1], b[1]) - max(a[0], b[0])
    return max(0.0, shared) / min(a[1] - a[0], b[1] - b[0])


def group_of(share: float) -> Group:
    """Return the bin of a true overlap."""
    return OVERLAPS[int(np.searchsorted([0.0, 0.25, 0.75], share, side="left"))]


def category(error_mm: float) -> int:
    """Return 1 to 4 of an error in mm, by `CATEGORIES_MM`."""
    return 1 + int(np.searchsorted(CATEGORIES_MM, abs(error_mm), side="left"))


def _follow_ups(
    sources: Sequence[Source], kind: Kind, total: int, most: int, config: ProtocolConfig
) -> list[Planned]:
    by_patient: dict[str, list[Source]] = defaultdict(list)
    for s in sorted(sources, key=lambda s: s.series_uid):
        by_patient[s.patient].append(s)
    regions: dict[str, list[str]] = defaultdict(list)
    for patient in by_patient:
        regions[region_of(patient, config)].append(patient)
    given = allocate(regions, config.shares, total, most, config.seed)
    planned = []
    turn: dict[str, int] = defaultdict(int)
    for patient, count in sorted(given.items()):
        region = region_of(patient, config)
        for number in range(count):
            # The Series of a patient take turns; so do the bins of overlap over all pairs.
            uid = by_patient[patient][number % len(by_patient[patient])].series_uid
            group = OVERLAPS[turn[region] % len(OVERLAPS)] if kind is Kind.STRESS else None
            turn[region] += 1
            planned.append(Planned(kind, patient, region, uid, uid, number, group))
    return planned


def _same_frame(sources: Sequence[Source], config: ProtocolConfig) -> list[Planned]:
    planned = []
    counts: dict[str, int] = defaultdict(int)
    ordered = sorted(sources, key=lambda s: s.series_uid)
    for fixed in ordered:
        for moving in ordered:
            same = fixed.patient == moving.patient and fixed.frame_uid == moving.frame_uid
            if not same or not fixed.frame_uid or fixed is moving:
                continue
            if overlap(fixed.span_mm, moving.span_mm) < 0.5:
                continue
            region = region_of(fixed.patient, config)
            kinds = [Kind.SAME_FRAME, *[Kind.SAME_FRAME_CROPPED] * config.crops]
            for kind in kinds:
                number = counts[fixed.patient]
                counts[fixed.patient] += 1
                planned.append(
                    Planned(
                        kind, fixed.patient, region, fixed.series_uid, moving.series_uid, number
                    )
                )
    return planned
