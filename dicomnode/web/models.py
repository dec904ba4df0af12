"""What the REST interface answers, and `dicomnode.client` gives: JSON of one shape everywhere.

The names are those of `dicomnode ... --json`. Lengths are mm, times ISO 8601; what was not
estimated is null, never 0.
"""

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from dicomnode.core.region import Extent
from dicomnode.model import (
    Commitment,
    DeliveryKind,
    DeliveryState,
    Evidence,
    Flag,
    Method,
    OffsetStatus,
    Reason,
    SeriesState,
)

# No control characters beyond white space: neither database takes a NUL.
EXPRESSION = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$"
MAX_ID = (1 << 31) - 1

UID = "1.2.840.113619.2.55.3.1"
FIXED, MOVING = f"{UID}.10", f"{UID}.20"
MODEL = "3f9a" * 16


class Format(StrEnum):
    """How what an expression finds is given: JSON in pages, the others all of it."""

    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Share(_Answer):
    """What a Series covers of a region."""

    region: str = Field(examples=["liver"])
    code: str = Field(examples=["10200004"], description="SNOMED CT.")
    fraction: float = Field(examples=[0.97], description="0 to 1.")


class Quality(_Answer):
    """How straight a curve is."""

    pearson_r: float | None = Field(examples=[0.998])
    slope: float | None = Field(examples=[1.02], description="Learned mm per true mm.")
    reasons: list[Flag] = Field(description="What to know of the curve.")


class Slice(_Answer):
    """One slice of a curve."""

    sop_instance_uid: str = Field(examples=[f"{UID}.1.1"])
    frame: int = Field(examples=[1], description="Counted from 1.")
    z_mm: float = Field(examples=[-412.5], description="Along the long axis, feet to head.")
    score: float = Field(examples=[4.125], description="Unitless.")
    height_mm: float = Field(examples=[311.2], description="Body height.")


class Curve(_Answer):
    """The curve of a Series, feet to head."""

    series_uid: str = Field(examples=[f"{UID}.1"])
    model: str = Field(examples=[MODEL], description="Digest of the weight bundle.")
    slices: list[Slice]
    quality: Quality
    coverage: list[Share]


class Series(_Answer):
    """A Series and where it stands."""

    patient_id: str = Field(examples=["PHANTOM-9001"])
    issuer: str = Field(examples=["HOSPITAL"])
    patient_key: str | None = Field(
        examples=["pX3v9Zt1"], description="Stands for the patient in addresses; null: nobody."
    )
    study_uid: str = Field(examples=[FIXED])
    series_uid: str = Field(examples=[f"{UID}.1"])
    study_datetime: str | None = Field(
        examples=["2026-01-05T08:15:00"], description="As the scanner wrote it, local time."
    )
    modality: str = Field(examples=["CT"])
    body_part_examined: str = Field(examples=["CHEST"])
    state: SeriesState
    reason: Reason | None
    evidence: Evidence | None = Field(description="Why it was taken to be complete.")
    revision: int = Field(examples=[1])
    received: int = Field(examples=[310], description="Instances.")
    scored: int = Field(examples=[308], description="Slices.")
    expected: int | None = Field(examples=[310])
    set_aside: dict[str, int] = Field(examples=[{"empty": 2}], description="Reason to slices.")
    last_arrival_at: datetime
    model: str | None = Field(examples=[MODEL])
    height_mm: tuple[float, float] | None = Field(
        examples=[[-20.0, 640.0]], description="Lowest and highest body height."
    )
    quality: Quality | None
    coverage: list[Share]


class SeriesPage(_Answer):
    """Some Series, those that came last first."""

    series: list[Series]
    next: int | None = Field(
        examples=[4711], description="Where the next page begins, for `before`; null: no more."
    )


class Side(_Answer):
    """One of two Series of a pair."""

    study_uid: str = Field(examples=[FIXED])
    series_uid: str = Field(examples=[f"{FIXED}.1"])


class Offset(_Answer):
    """The offset of a pair: z_fixed = z_moving + offset_mm for the same anatomy."""

    fixed: Side
    moving: Side
    method: Method
    offset_mm: float | None = Field(examples=[133.1])
    sigma_mm: float | None = Field(examples=[1.2], description="90 % of errors are in 1.645 sigma.")
    overlap_mm: float | None = Field(examples=[280.0])
    status: OffsetStatus
    reason: str | None = Field(description="Why it was refused.")
    dx_mm: float | None
    dy_mm: float | None
    model: str = Field(examples=[MODEL])
    computed_at: datetime
    seconds: float = Field(examples=[0.008])


class Place(_Answer):
    """One slice of a curve, and which."""

    sop_instance_uid: str = Field(examples=[f"{UID}.1.7"])
    frame: int = Field(examples=[1], description="Counted from 1.")
    index: int = Field(examples=[6], description="In the curve, feet to head, from 0.")
    z_mm: float = Field(examples=[-412.5])
    height_mm: float = Field(examples=[180.4], description="Body height.")


class View(_Answer):
    """Where to begin to look at a region in a Series."""

    series_uid: str = Field(examples=[f"{UID}.1"])
    model: str = Field(examples=[MODEL])
    region: str = Field(examples=["liver"])
    code: str = Field(examples=["10200004"], description="SNOMED CT.")
    extent: Extent | None = Field(description="How much of it is shown; null: nothing.")
    fraction: float | None = Field(examples=[0.97])
    slice: Place | None = Field(description="To open first; null: the region is not shown.")
    nearest: Place | None = Field(description="Then, the slice nearest to it.")
    distance_mm: float | None = Field(
        description="From there to it, body height; positive towards the head."
    )


class Line(_Answer):
    """`moving = intercept + slope * fixed`, in slices counted from 1, feet to head."""

    intercept: float
    slope: float


class Matched(_Answer):
    """A fixed slice, and the moving one that shows the same, where there is one."""

    fixed: Place
    moving: Place | None
    distance_mm: float | None = Field(
        description="Towards the head, from the fixed slice to the moving one."
    )


class SliceMap(_Answer):
    """The slices of a pair, feet to head: for linked scrolling."""

    offset: Offset
    line: Line | None = Field(description="The same as a straight line, where there is one.")
    slices: list[Matched] = Field(description="Every fixed slice; none of a refused offset.")


class TimelineStudy(_Answer):
    """A Study of a patient, with what each of its Series covers."""

    study_uid: str = Field(examples=[FIXED])
    study_datetime: str | None = Field(examples=["2026-01-05T08:15:00"])
    series: list[Series]


class Timeline(_Answer):
    """All Studies of a patient, the oldest first, and how they align."""

    patient_key: str
    studies: list[TimelineStudy]
    pairs: list[Offset] = Field(description="The best offset of each pair of Studies.")
    complete: bool = Field(description="Whether all is there: of very many, the newest are.")


class Match(_Answer):
    """A Series that an expression found."""

    patient_id: str
    issuer: str
    patient_key: str | None
    study_uid: str
    series_uid: str
    study_datetime: str | None
    modality: str
    body_part_examined: str
    manufacturer: str
    state: SeriesState
    reason: Reason | None
    model: str | None
    slices: int | None
    spacing_mm: float | None
    quality: float | None = Field(examples=[0.998], description="pearson_r of the curve.")
    slope: float | None
    height_mm: tuple[float, float] | None
    flags: list[Flag]
    coverage: list[Share]


class MatchPage(_Answer):
    """Some of what an expression found, those that came last first."""

    series: list[Match]
    next: int | None = Field(
        examples=[4711], description="Where the next page begins, for `before`; null: no more."
    )


class Count(_Answer):
    """How many Series an expression finds."""

    series: int = Field(examples=[2715])


class Step(_Answer):
    """A step of body height, and how many Series reach over it."""

    from_mm: float = Field(examples=[100.0])
    to_mm: float = Field(examples=[120.0])
    series: int = Field(examples=[1801])


class Histogram(_Answer):
    """How many of the Series that an expression finds reach over each step of body height."""

    series: int = Field(examples=[2715])
    steps: list[Step]


class PatientAsked(BaseModel):
    """Whose key is wanted. In a body, since addresses are kept in histories and logs."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"patient_id": "PHANTOM-9001"}]}
    )

    patient_id: str = Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")
    issuer: str | None = Field(
        default=None, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$", description="null: any."
    )


class PatientFound(_Answer):
    """A patient, and the key that stands for that one in addresses."""

    patient_key: str
    issuer: str = Field(examples=["HOSPITAL"])


class Delivery(_Answer):
    """Something that goes to a destination, and how that went."""

    id: int
    kind: DeliveryKind
    destination: str = Field(examples=["PACS"], description="AE title, or URL.")
    rule: str | None = Field(description="Which rule asked for it; null: none.")
    subject: str = Field(examples=[FIXED], description="UID of a Series, or of the fixed Study.")
    other: str | None = Field(examples=[MOVING], description="Of a pair, UID of the moving Study.")
    state: DeliveryState
    reason: str | None = Field(description="Of the last failure.")
    attempts: int
    version: int = Field(examples=[1], description="How often it was asked for.")
    asked_at: datetime
    due_at: datetime | None = Field(description="Of the next attempt, while it waits.")
    done_at: datetime | None
    sop_instance_uid: str | None = Field(description="Of the object that was sent last.")
    commitment: Commitment | None


class DeliveryPage(_Answer):
    """Some deliveries, those asked for last first."""

    deliveries: list[Delivery]
    next: int | None = Field(description="Where the next page begins, for `before`.")


class ExpressionAsked(BaseModel):
    """An expression in a body: for one that names a patient, or is long."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"q": "covers(liver, 0.9)"}]}
    )

    q: str = Field(max_length=4000, pattern=EXPRESSION)
    format: Format = Format.JSON
    limit: int = Field(default=100, ge=1, le=1000)
    before: int | None = Field(default=None, ge=1, le=MAX_ID)


class RegionKnown(_Answer):
    """A region of the bundle that the node scores with."""

    region: str = Field(examples=["liver"])
    code: str = Field(examples=["10200004"], description="SNOMED CT.")
    meaning: str = Field(examples=["Liver"])
    low_mm: float | None = Field(examples=[92.0], description="Body height; null: not known.")
    high_mm: float | None = Field(examples=[258.0])


class ProblemFound(BaseModel):
    """An error (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    position: int | None = Field(
        default=None, description="Of an expression: the character, counted from 0."
    )


class Readiness(_Answer):
    """Whether the node can do its work."""

    ready: bool
    checks: dict[str, bool] = Field(
        examples=[{"database": True, "spool": True, "worker": True}],
        description="`database` answers, with the schema of this version; `spool` takes what is "
        "sent; `worker` is at work.",
    )
