"""The frozen values that stages hand on to each other.

Lengths are mm in the patient coordinate system (LPS, PS3.3 C.7.6.2.1.1), times are UTC,
intensities HU. Each value is made whole or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

import numpy as np
import numpy.typing as npt

# The first digits of an association's id name the receiver that opened it, of several on a spool.
RECEIVER_DIGITS = 8

Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]


class SeriesState(StrEnum):
    """Where a Series stands. Every Series leaves `OPEN`, possibly to return to it."""

    OPEN = "open"
    CURVE = "curve"
    IGNORED = "ignored"
    QUARANTINED = "quarantined"


class Reason(StrEnum):
    """Why a slice or a Series was set aside; shown by `dicomnode series` and counted."""

    # ignored: a sound object that is not what the regressor was made for
    NOT_CT = "not_ct_image"
    MULTI_FRAME = "multi_frame"
    EMPTY = "empty"  # shows no body
    LOCALIZER = "localizer"
    REFORMAT = "reformat"
    NON_AXIAL = "non_axial"
    TILT = "tilt"
    TOO_FEW_POSITIONS = "too_few_positions"
    TOO_SHORT = "too_short"
    DUPLICATE_POSITION = "duplicate_position"  # another slice of the curve lies there
    REJECTED = "rejected"  # a rejection note says that it is not to be used (IHE IOCM)
    # quarantined: the object is unsound, a person should look
    NOT_DICOM = "not_dicom"
    BAD_UID = "bad_uid"
    CORRUPT = "corrupt"
    PIXEL_DATA = "pixel_data"
    UNSUPPORTED_TRANSFER_SYNTAX = "unsupported_transfer_syntax"
    NO_GEOMETRY = "no_geometry"
    NOT_ONE_STACK = "not_one_stack"
    NO_SCORE = "no_score"  # the network gives no number for it

    @property
    def state(self) -> SeriesState:
        """The state of a Series that ends for this reason."""
        return SeriesState.IGNORED if self in _IGNORED else SeriesState.QUARANTINED


_IGNORED = frozenset(
    {
        Reason.NOT_CT,
        Reason.MULTI_FRAME,
        Reason.EMPTY,
        Reason.LOCALIZER,
        Reason.REFORMAT,
        Reason.NON_AXIAL,
        Reason.TILT,
        Reason.TOO_FEW_POSITIONS,
        Reason.TOO_SHORT,
        Reason.DUPLICATE_POSITION,
        Reason.REJECTED,
    }
)


class Flag(StrEnum):
    """What a reader of a curve should know; a curve with flags is still a curve."""

    DUPLICATE_POSITION = "duplicate_position"
    GAP = "gap"
    UNEVEN_SPACING = "uneven_spacing"
    FRAME_OF_REFERENCE_VARIES = "frame_of_reference_varies"
    LOW_CORRELATION = "low_correlation"
    REVERSED = "reversed"
    SLOPE = "slope"
    SLICES_REFUSED = "slices_refused"
    OTHER_MODEL = "other_model"
    PATIENT_POSITION = "patient_position"


class Evidence(StrEnum):
    """Why a Series was taken to be complete."""

    EXPECTED_COUNT = "expected_count"
    RELEASED_AND_QUIET = "released_and_quiet"
    ASSOCIATION_LOST = "association_lost"


class Method(StrEnum):
    """How an offset was estimated."""

    FAST = "fast"
    L1 = "l1"
    ROBUST = "robust"


class OffsetStatus(StrEnum):
    """What an offset may be used for."""

    OK = "ok"
    EXTRAPOLATED = "extrapolated"
    REFUSED = "refused"


class DeliveryKind(StrEnum):
    """What goes out."""

    REGISTRATION = "registration"  # Spatial Registration of a pair of Studies
    REPORT = "report"  # SR of what a Series covers
    FORWARD = "forward"  # the Series itself, or slices of it
    WEBHOOK = "webhook"  # JSON about a Series or a pair of Studies


class DeliveryState(StrEnum):
    """Where a delivery stands."""

    WAITING = "waiting"  # for its time, or for the next attempt
    DONE = "done"
    FAILED = "failed"  # given up; a person should look, and may queue it again
    DROPPED = "dropped"  # when it was due, there was nothing to say any more


class FetchCause(StrEnum):
    """Why a peer is asked for a Series."""

    PRIOR = "prior"  # it is of an earlier Study of the patient of a new one
    CATCH_UP = "catch_up"  # the peer has it, and it never came


class FetchState(StrEnum):
    """Where a question to a peer, or a Series it is asked for, stands."""

    WAITING = "waiting"  # for its time, or for the next attempt
    DONE = "done"
    FAILED = "failed"  # given up; a person should look, and may queue it again
    DROPPED = "dropped"  # when it was due, it was here already, or could not be asked


class Commitment(StrEnum):
    """Whether a peer committed itself to keep what it was sent (PS3.4 Annex J)."""

    WANTED = "wanted"  # to be asked
    ASKED = "asked"  # its answer may come on an association of its own
    COMMITTED = "committed"
    FAILED = "failed"
    UNANSWERED = "unanswered"  # given up


@dataclass(frozen=True, slots=True)
class SpooledInstance:
    """One Instance on stable storage: a DICOM Part 10 file with a name of our own making.

    Where it lies is the spool's business; `Spool.read` gives its bytes.
    """

    name: str
    association_id: str
    arrived_at: datetime
    place: object = field(default=None, repr=False, compare=False)  # known to the spool alone


@dataclass(frozen=True, slots=True)
class SpooledEvent:
    """The end of an association, as the receiver wrote it to the spool.

    `kind` is "released", "aborted", or "started": a receiver that starts anew
    says so, and every association that it opened before is over.
    """

    name: str
    association_id: str
    kind: str
    arrived_at: datetime
    place: object = field(default=None, repr=False, compare=False)

    @property
    def receiver(self) -> str:
        """The receiver that wrote it: what the ids of all its associations begin with."""
        return self.association_id[:RECEIVER_DIGITS]


@dataclass(frozen=True, slots=True)
class PatientKey:
    """Identity of a patient within this node.

    Two keys are the same patient only when both parts agree exactly. An empty
    `patient_id` is nobody: such a study has no priors.
    """

    patient_id: str
    issuer: str = ""

    @property
    def known(self) -> bool:
        """Whether studies may be matched by this key at all."""
        return bool(self.patient_id)


@dataclass(frozen=True, slots=True)
class Acquisition:
    """What tells slices of one place apart, and how the patient lay; None or "": not told."""

    acquisition_number: int | None = None  # (0020,0012)
    temporal_position: int | None = None  # (0020,0100)
    trigger_time_ms: float | None = None  # (0018,1060)
    content_time: str = ""  # (0008,0033); of a Frame, when it was acquired
    stack_id: str = ""  # (0020,9056), of a Frame
    patient_position: str = ""  # (0018,5100)


@dataclass(frozen=True, slots=True)
class SliceHeader:
    """What the node reads of one Frame of an Instance, pixels aside."""

    sop_class_uid: str
    sop_instance_uid: str
    series_uid: str
    study_uid: str
    patient: PatientKey
    study_datetime: datetime | None
    modality: str
    image_type: tuple[str, ...]
    image_position: tuple[float, ...] | None  # (3,) mm, LPS
    image_orientation: tuple[float, ...] | None  # (6,) row, then column direction cosines
    pixel_spacing: tuple[float, ...] | None  # (2,) mm between rows, mm between columns
    rows: int
    columns: int
    number_of_frames: int = 1
    frame_of_reference_uid: str = ""
    body_part_examined: str = ""
    manufacturer: str = ""
    expected_instances: int | None = None  # NumberOfSeriesRelatedInstances (0020,1209)
    frame: int = 1  # counted from 1, as in PS3.3
    issuer_is_default: bool = False  # the data set named none
    calling_ae_title: str = ""  # who sent it; empty: nobody did, or it is not known
    acquisition: Acquisition = Acquisition()


@dataclass(frozen=True, slots=True)
class ScoredSlice:
    """The score of one slice, with what is needed to place it in its stack."""

    sop_instance_uid: str
    image_position: tuple[float, ...]  # (3,) mm, LPS
    image_orientation: tuple[float, ...]  # (6,)
    score: float
    frame: int = 1  # counted from 1, as in PS3.3
    frame_of_reference_uid: str = ""
    body_centre_mm: tuple[float, float] | None = None  # x, y in LPS; None: unknown
    sop_class_uid: str = ""  # empty: unknown
    acquisition: Acquisition = Acquisition()


@dataclass(frozen=True, slots=True)
class Rejection:
    """A rejection note: Instances that are not to be used any more (IHE RAD TF, IOCM).

    `code` is its document title, of `core.admission.REJECTIONS`.
    """

    sop_instance_uid: str  # of the note
    study_uid: str  # in which the note lies
    code: str
    instances: frozenset[str]  # SOP Instance UIDs
    studies: frozenset[str]  # Study Instance UIDs that it names
    series: frozenset[str]  # and Series Instance UIDs


@dataclass(frozen=True, slots=True)
class Quality:
    """How straight a curve is.

    `pearson_r` is the correlation of score with position; `slope` is learned mm
    (body height) per true mm, 1 for the average adult.
    """

    pearson_r: float
    slope: float
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreCurve:
    """Slice scores of one Series against position.

    z_mm is where each slice cuts the patient's long axis (LPS, x = y = 0), strictly increasing;
    score, height_mm, sop_instance_uids and frames run parallel to it.
    """

    series_uid: str
    model: str  # digest of the weight bundle
    z_mm: Floats  # (N,) float64
    score: Scores  # (N,) float32, unitless
    height_mm: Floats  # (N,) float64, body height
    sop_instance_uids: tuple[str, ...]
    frames: tuple[int, ...]
    quality: Quality
    # (N, 2) float64, x and y of the body's centre, LPS; NaN where unknown, None: nowhere known
    body_centre_mm: Floats | None = None

    def __post_init__(self) -> None:
        n = len(self.z_mm)
        if n < 2:
            raise ValueError(f"a curve needs two positions, got {n}")
        parallel: Sequence[Sequence[object] | Floats | Scores] = (
            self.score,
            self.height_mm,
            self.sop_instance_uids,
            self.frames,
        )
        if any(len(part) != n for part in parallel):
            raise ValueError("z_mm, score, height_mm, sop_instance_uids, frames differ in length")
        if not (np.diff(self.z_mm) > 0).all():
            raise ValueError("z_mm is not strictly increasing")
        if not np.isfinite(self.score).all():
            raise ValueError("a score is not finite")
        if self.body_centre_mm is not None and self.body_centre_mm.shape != (n, 2):
            raise ValueError(f"body_centre_mm has shape {self.body_centre_mm.shape}")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A Series that ends without a curve, and why."""

    series_uid: str
    reason: Reason

    def __str__(self) -> str:
        return f"{self.reason.state}:{self.reason}"


@dataclass(frozen=True, slots=True)
class Offset:
    """`z_fixed = z_moving + offset_mm` for the same anatomy.

    Numbers are None where they were not estimated, never 0 in their stead.
    """

    method: Method
    status: OffsetStatus
    offset_mm: float | None = None
    overlap_mm: float | None = None
    sigma_mm: float | None = None
    reason: str | None = None
    dx_mm: float | None = None
    dy_mm: float | None = None
