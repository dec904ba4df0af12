"""What the store takes and gives, beside the values of `model`."""

from dataclasses import dataclass
from datetime import datetime

from dicomnode.core.region import Region
from dicomnode.model import (
    Evidence,
    Method,
    Offset,
    PatientKey,
    Quality,
    Reason,
    ScoredSlice,
    SeriesState,
    SliceHeader,
)


@dataclass(frozen=True, slots=True)
class SliceResult:
    """What decode and score made of one Frame: a score, or the reason why there is none."""

    header: SliceHeader
    association_id: str
    arrived_at: datetime
    score: float | None = None
    reason: Reason | None = None
    body_centre_mm: tuple[float, float] | None = None
    preview: bytes | None = None  # the input, packed, where it is to be kept
    corrects: bool = True  # whether its sender may say that its Series is another patient's


@dataclass(frozen=True, slots=True)
class SeriesRow:
    """One Series as a person asks for it."""

    series_uid: str
    study_uid: str
    patient: PatientKey
    study_datetime: datetime | None
    modality: str
    body_part_examined: str
    state: SeriesState
    reason: Reason | None
    evidence: Evidence | None
    revision: int
    received: int
    scored: int
    expected: int | None
    set_aside: dict[str, int]  # reason -> slices
    first_arrival_at: datetime
    last_arrival_at: datetime
    quality: Quality | None
    height_mm: tuple[float, float] | None  # lowest, highest
    model: str | None
    coverage: tuple[tuple[Region, float], ...] = ()  # empty without a curve or regions


@dataclass(frozen=True, slots=True)
class StoredOffset:
    """An offset and the pair it belongs to."""

    offset: Offset
    fixed_study: str
    fixed_series: str
    moving_study: str
    moving_series: str
    model: str
    computed_at: datetime
    seconds: float


@dataclass(frozen=True, slots=True)
class FoundPair:
    """An offset, and whose."""

    patient: PatientKey
    stored: StoredOffset


@dataclass(frozen=True, slots=True)
class OpenSeries:
    """What is known of a Series that is not finished."""

    id: int
    series_uid: str
    received: int
    expected: int | None
    last_arrival_at: datetime
    ends: tuple[str | None, ...]  # how each association that carried it ended, None: it did not
    revision: int = 0  # how often it was finished before


@dataclass(frozen=True, slots=True)
class Claimed:
    """The slices of an open Series: those scored by one bundle, and those set aside."""

    slices: tuple[ScoredSlice, ...]
    set_aside: dict[tuple[str, int], str]  # SOP Instance UID and Frame -> reason
    model: str | None  # digest of that bundle, None where nothing was scored
    other_model: int  # slices that another bundle scored


@dataclass(frozen=True, slots=True)
class StaleSeries:
    """A finished Series with scores of other bundles than the one asked about."""

    id: int
    series_uid: str
    models: frozenset[str]  # those bundles
    kept: bool  # whether the input of every such slice was kept


@dataclass(frozen=True, slots=True)
class KeptInputs:
    """The inputs of a finished Series that another bundle scored, and what it was then."""

    series_id: int
    revision: int
    evidence: Evidence
    slices: tuple[tuple[str, int], ...]  # SOP Instance UID, frame
    inputs: tuple[bytes, ...]  # packed, parallel to slices


@dataclass(frozen=True, slots=True)
class PendingOffset:
    """One pair that waits for its offset."""

    id: int
    method: Method
    fixed_series: str
    moving_series: str
    fixed_revision: int
    moving_revision: int
