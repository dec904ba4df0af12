"""The schema: one row a Series, one row a curve, one row an offset; portable types only.

Slice rows live only while their Series is open: a complete curve is one row with its arrays.
Arrays are little-endian bytes, their dtype and shape named beside the column.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

UID = String(64)
NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UTCDateTime(TypeDecorator[datetime]):
    """A timezone-aware UTC time on both databases; SQLite itself forgets the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a naive time, store UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a stored time needs a timezone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time with its zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Root of all tables; constraints are named so that migrations can name them."""

    metadata = MetaData(naming_convention=NAMES)


class Model(Base):
    """A weight bundle that scored something here; its map turns scores into body heights."""

    __tablename__ = "model"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    manifest: Mapped[dict[str, Any]] = mapped_column(JSON)
    first_used_at: Mapped[datetime] = mapped_column(UTCDateTime)


class Series(Base):
    """One Series and where it stands."""

    __tablename__ = "series"
    __table_args__ = (Index("ix_series_patient", "patient_id", "issuer"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    series_uid: Mapped[str] = mapped_column(UID, unique=True)
    study_uid: Mapped[str] = mapped_column(UID, index=True)
    patient_id: Mapped[str] = mapped_column(String(64))
    issuer: Mapped[str] = mapped_column(String(64))
    # As the scanner wrote it, local time: it orders studies, and nothing else.
    study_datetime: Mapped[datetime | None] = mapped_column(DateTime)
    modality: Mapped[str] = mapped_column(String(16))
    body_part_examined: Mapped[str] = mapped_column(String(16))
    manufacturer: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), index=True)
    reason: Mapped[str | None] = mapped_column(String(40))
    evidence: Mapped[str | None] = mapped_column(String(24))
    revision: Mapped[int]  # of the curve: how often the Series was finished
    received: Mapped[int]  # distinct Instances
    expected: Mapped[int | None]
    # SOP Instance UID, `#` and which Frame where it is not the first -> reason, of slices that
    # are in no curve; filled when finished.
    set_aside: Mapped[dict[str, str]] = mapped_column(JSON)
    first_arrival_at: Mapped[datetime] = mapped_column(UTCDateTime)
    last_arrival_at: Mapped[datetime] = mapped_column(UTCDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    # DICOM keyword -> text of one of its Instances, for objects that refer to the Series: of the
    # patient, so it leaves the database in these alone. Null: it came before schema 0005.
    header: Mapped[dict[str, str] | None] = mapped_column(JSON(none_as_null=True), deferred=True)
    # Whether its patient is that of another Series of its Study, which was corrected, while its own
    # images, which a rule sends on, said another one when they last came.
    moved_along: Mapped[bool] = mapped_column(server_default=false())
    # SOP Instance UID -> PatientID, issuer, Study Instance UID, of Instances that last said
    # otherwise than this row: once they are most, it moves there. Null: none.
    dissent: Mapped[dict[str, list[str]] | None] = mapped_column(JSON(none_as_null=True))
    # (PatientID, issuer) of whom it was taken for before; null: of nobody.
    former: Mapped[list[list[str]] | None] = mapped_column(JSON(none_as_null=True))


class Slice(Base):
    """One slice of an open Series: scored, or set aside with a reason."""

    __tablename__ = "slice"

    series_id: Mapped[int] = mapped_column(
        ForeignKey("series.id", ondelete="CASCADE"), primary_key=True
    )
    sop_instance_uid: Mapped[str] = mapped_column(UID, primary_key=True)
    frame: Mapped[int] = mapped_column(primary_key=True)
    sop_class_uid: Mapped[str | None] = mapped_column(UID)
    model: Mapped[str | None] = mapped_column(String(64))
    score: Mapped[float | None] = mapped_column(Float(53))
    reason: Mapped[str | None] = mapped_column(String(40))
    image_position: Mapped[list[float] | None] = mapped_column(JSON)
    image_orientation: Mapped[list[float] | None] = mapped_column(JSON)
    frame_of_reference_uid: Mapped[str] = mapped_column(UID)
    body_centre: Mapped[list[float] | None] = mapped_column(JSON)  # x, y, mm
    # Values of `model.Acquisition`, in their order there; null: none is known.
    acquisition: Mapped[list[Any] | None] = mapped_column(JSON)
    # The network input, packed; read only where it is asked for.
    preview: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)


class Arrival(Base):
    """Which associations carried slices of an open Series, and when they last did."""

    __tablename__ = "arrival"

    series_id: Mapped[int] = mapped_column(
        ForeignKey("series.id", ondelete="CASCADE"), primary_key=True
    )
    association_id: Mapped[str] = mapped_column(String(16), primary_key=True)
    last_at: Mapped[datetime] = mapped_column(UTCDateTime)
    ended: Mapped[str | None] = mapped_column(String(16))  # released, aborted, or lost


class Curve(Base):
    """The finished curve of a Series, feet to head."""

    __tablename__ = "curve"

    series_id: Mapped[int] = mapped_column(
        ForeignKey("series.id", ondelete="CASCADE"), primary_key=True
    )
    model: Mapped[str] = mapped_column(ForeignKey("model.digest"), index=True)
    revision: Mapped[int]
    count: Mapped[int]  # N
    z_mm: Mapped[bytes] = mapped_column(LargeBinary)  # (N,) <f8
    score: Mapped[bytes] = mapped_column(LargeBinary)  # (N,) <f4
    image_position: Mapped[bytes] = mapped_column(LargeBinary)  # (N, 3) <f8
    image_orientation: Mapped[list[float]] = mapped_column(JSON)  # (6,)
    # zlib of JSON: [[SOP Instance UID, frame, index into frames_of_reference, index into
    # sop_classes], ...], N long
    instances: Mapped[bytes] = mapped_column(LargeBinary)
    frames_of_reference: Mapped[list[str]] = mapped_column(JSON)
    # Null, and no fourth index in `instances`: the curve came before schema 0005. In it, null is
    # that of slices of such a curve.
    sop_classes: Mapped[list[str | None] | None] = mapped_column(JSON(none_as_null=True))
    height_min_mm: Mapped[float] = mapped_column(Float(53))
    height_max_mm: Mapped[float] = mapped_column(Float(53))
    pearson_r: Mapped[float] = mapped_column(Float(53))
    slope: Mapped[float] = mapped_column(Float(53))
    flags: Mapped[list[str]] = mapped_column(JSON)
    computed_at: Mapped[datetime] = mapped_column(UTCDateTime)
    body_centre: Mapped[bytes | None] = mapped_column(LargeBinary)  # (N, 2) <f8, NaN: unknown
    # zlib of JSON: of each value of `model.Acquisition` a list, N long; read to reopen a Series.
    acquisitions: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)


class Bundle(Base):
    """A short number for a weight bundle: ten million rows name theirs."""

    __tablename__ = "bundle"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("model.digest"), unique=True)


class Coverage(Base):
    """What mining asks of a finished curve, in few bytes; it goes with the curve.

    Heights are whole micrometres of body height by that bundle's map, so that both databases
    and Python agree to the last bit. What the slices fill reaches from `low_um` to `high_um`;
    where slices are missing between, `stretches` is above 1 and table `stretch` has each.
    """

    __tablename__ = "coverage"
    __table_args__ = (
        # Led by the cell, so that a histogram is counted in the order of the index; the rest lets
        # most questions be answered from the index alone.
        Index(
            "ix_coverage_cell",
            "cell",
            "bundle",
            "low_um",
            "high_um",
            "stretches",
            "quality",
            "slices",
            "spacing_um",
        ),
        # The few with missing slices are asked another way, and by themselves.
        Index(
            "ix_coverage_gaps",
            "series_id",
            "cell",
            "bundle",
            "low_um",
            "high_um",
            "stretches",
            "quality",
            "slices",
            "spacing_um",
            sqlite_where=text("stretches > 1"),
            postgresql_where=text("stretches > 1"),
        ),
    )

    series_id: Mapped[int] = mapped_column(
        ForeignKey("curve.series_id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    bundle: Mapped[int] = mapped_column(ForeignKey("bundle.id"))
    cell: Mapped[int]  # of the steps that hold low_um and high_um, see store/coverage.py
    low_um: Mapped[int]
    high_um: Mapped[int]
    stretches: Mapped[int]
    slices: Mapped[int]  # positions in the curve
    spacing_um: Mapped[int]  # between slices, median
    flags: Mapped[int]  # one bit each, see store/coverage.py
    quality: Mapped[float] = mapped_column(Float(53))  # pearson_r of the curve
    slope: Mapped[float] = mapped_column(Float(53))


class Stretch(Base):
    """One of several stretches of body height that the slices of a curve fill."""

    __tablename__ = "stretch"

    series_id: Mapped[int] = mapped_column(
        ForeignKey("coverage.series_id", ondelete="CASCADE"), primary_key=True
    )
    low_um: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    high_um: Mapped[int]


class Preview(Base):
    """The network inputs of a finished curve, kept so that another bundle can score them."""

    __tablename__ = "preview"

    series_id: Mapped[int] = mapped_column(
        ForeignKey("series.id", ondelete="CASCADE"), primary_key=True
    )
    count: Mapped[int]  # N, as the curve's
    arrived_at: Mapped[datetime] = mapped_column(UTCDateTime, index=True)  # the last slice
    sizes: Mapped[bytes] = mapped_column(LargeBinary)  # (N,) <u4, bytes of each input
    data: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)  # the inputs, packed, in turn


class Offset(Base):
    """The offset of a pair of curves by one method: z_fixed = z_moving + offset_mm.

    A row with `status` null is work to do; it is written together with the curve that asks
    for it, so that no pair is forgotten.
    """

    __tablename__ = "offset"
    __table_args__ = (
        UniqueConstraint("fixed_series_id", "moving_series_id", "method", name="uq_offset_pair"),
        Index("ix_offset_moving_series_id", "moving_series_id"),
        Index("ix_offset_status", "status"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    fixed_series_id: Mapped[int] = mapped_column(ForeignKey("series.id", ondelete="CASCADE"))
    moving_series_id: Mapped[int] = mapped_column(ForeignKey("series.id", ondelete="CASCADE"))
    method: Mapped[str] = mapped_column(String(16))
    status: Mapped[str | None] = mapped_column(String(16))
    model: Mapped[str] = mapped_column(ForeignKey("model.digest"))
    offset_mm: Mapped[float | None] = mapped_column(Float(53))
    sigma_mm: Mapped[float | None] = mapped_column(Float(53))
    overlap_mm: Mapped[float | None] = mapped_column(Float(53))
    dx_mm: Mapped[float | None] = mapped_column(Float(53))
    dy_mm: Mapped[float | None] = mapped_column(Float(53))
    reason: Mapped[str | None] = mapped_column(Text)
    computed_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    seconds: Mapped[float | None] = mapped_column(Float(53))


class Quarantined(Base):
    """One spooled file that a person should look at; the file is kept under this name."""

    __tablename__ = "quarantined"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    reason: Mapped[str] = mapped_column(String(40), index=True)
    detail: Mapped[str] = mapped_column(Text)  # never a patient attribute
    arrived_at: Mapped[datetime] = mapped_column(UTCDateTime)


class Rejection(Base):
    """An Instance that a rejection note names (IHE RAD TF, Imaging Object Change Management).

    It is hidden while one of its rows is in force; whether it is here, or ever was, is no matter.
    """

    __tablename__ = "rejection"

    sop_instance_uid: Mapped[str] = mapped_column(UID, primary_key=True)
    note_uid: Mapped[str] = mapped_column(UID, primary_key=True)
    code: Mapped[str] = mapped_column(String(16))  # the note's title, of scheme DCM
    rejected_at: Mapped[datetime] = mapped_column(UTCDateTime)  # when the note arrived
    # When the Instance was sent again, which ends the rejection for data retention; null: in force
    restored_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


class Delivery(Base):
    """Something that goes to a destination: the outbox, one row for what is to be there.

    Written together with what asks for it, so that none is forgotten. What exactly is sent is
    made when it is due. `version` counts how often it was asked for: what an older one sent does
    not settle a newer one.
    """

    __tablename__ = "delivery"
    __table_args__ = (
        UniqueConstraint(
            "kind", "destination", "rule", "subject", "other", name="uq_delivery_what"
        ),
        Index("ix_delivery_state_due_at", "state", "due_at"),
        Index("ix_delivery_subject", "subject"),
        Index("ix_delivery_other", "other"),
        Index("ix_delivery_transaction_uid", "transaction_uid"),
        # A destination that is down does not hide what waits for another.
        Index("ix_delivery_destination_state_due_at", "destination", "state", "due_at"),
        Index("ix_delivery_commitment_due_at", "commitment_due_at"),
        Index("ix_delivery_sop_instance_uid", "sop_instance_uid"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))  # registration, report, forward, webhook
    destination: Mapped[str] = mapped_column(String(255))  # AE title, or URL
    rule: Mapped[str] = mapped_column(String(64))  # its name, empty: none
    # UID of a Series; of a pair, the fixed Study, and in `other` the moving one.
    subject: Mapped[str] = mapped_column(UID)
    other: Mapped[str] = mapped_column(UID)
    version: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int]  # since it was last asked for
    asked_at: Mapped[datetime] = mapped_column(UTCDateTime)
    # When an attempt failed first since then: what waits while this node is down is not late.
    failed_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    due_at: Mapped[datetime] = mapped_column(UTCDateTime)
    done_at: Mapped[datetime | None] = mapped_column(UTCDateTime)  # when it was delivered last
    reason: Mapped[str | None] = mapped_column(Text)  # of the last failure; no patient attribute
    sop_class_uid: Mapped[str | None] = mapped_column(UID)
    sop_instance_uid: Mapped[str | None] = mapped_column(UID)  # of the object that was sent last
    transaction_uid: Mapped[str | None] = mapped_column(UID)  # of Storage Commitment
    commitment: Mapped[str | None] = mapped_column(String(16))  # wanted, asked, committed, ...
    commitment_due_at: Mapped[datetime | None] = mapped_column(UTCDateTime)  # to ask, or ask again
    commitment_attempts: Mapped[int] = mapped_column(server_default=text("0"))


class Inquiry(Base):
    """A question to a peer: which earlier Studies of a patient, or which Studies of a day it has.

    Of a patient there is one for each Study that asks, written together with the Study's first
    Series, so that none is forgotten and none asked twice.
    """

    __tablename__ = "inquiry"
    __table_args__ = (
        UniqueConstraint("cause", "peer", "subject", name="uq_inquiry_what"),
        Index("ix_inquiry_peer_state_due_at", "peer", "state", "due_at"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    cause: Mapped[str] = mapped_column(String(16))  # prior, catch_up
    peer: Mapped[str] = mapped_column(String(64))  # AE title, or name of a DICOMweb server
    subject: Mapped[str] = mapped_column(UID)  # UID of the Study that asks, or day as 20260131
    version: Mapped[int]  # how often it was asked for
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int]  # since it was last asked for
    asked_at: Mapped[datetime] = mapped_column(UTCDateTime)
    due_at: Mapped[datetime] = mapped_column(UTCDateTime)
    done_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    reason: Mapped[str | None] = mapped_column(Text)  # no patient attribute
    studies: Mapped[int | None]  # of the answer, those that were wanted
    series: Mapped[int | None]  # that were asked for because of it


class Fetch(Base):
    """A Series that a peer is asked for: one row, whatever asks for it.

    It is there before the Series is asked for: a Study with a row as a prior is known to have come
    by our own asking, and asks for nothing itself.
    """

    __tablename__ = "fetch"
    __table_args__ = (
        Index("ix_fetch_peer_state_due_at", "peer", "state", "due_at"),
        Index("ix_fetch_study_uid", "study_uid"),
        Index("ix_fetch_asked_by", "asked_by"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    series_uid: Mapped[str] = mapped_column(UID, unique=True)
    study_uid: Mapped[str] = mapped_column(UID)
    peer: Mapped[str] = mapped_column(String(64))
    cause: Mapped[str] = mapped_column(String(16))
    asked_by: Mapped[str] = mapped_column(UID)  # the Study that asks; the day, of catching up
    study_date: Mapped[str] = mapped_column(String(8))  # as the peer answered, YYYYMMDD, or empty
    expected: Mapped[int | None]  # NumberOfSeriesRelatedInstances, the most a peer answered
    version: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int]
    asked_at: Mapped[datetime] = mapped_column(UTCDateTime)
    due_at: Mapped[datetime] = mapped_column(UTCDateTime)
    done_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    reason: Mapped[str | None] = mapped_column(Text)
    # Of the last attempt: sub-operations of the C-MOVE, or Instances by DICOMweb.
    completed: Mapped[int | None]
    failed: Mapped[int | None]
    warning: Mapped[int | None]
    # Other peers that answered with it: the next one is asked where this one fails.
    others: Mapped[list[str]] = mapped_column(JSON)
    # When a peer last said that it sent some of it, and what was here before: whether that came,
    # and whether it helped, shows later.
    sent_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    held_before: Mapped[int | None]  # Instances
    fruitless: Mapped[int]  # how often in a row it was sent, and nothing new was here after


class Turn(Base):
    """When a peer may be asked for something again, by whichever process."""

    __tablename__ = "turn"

    peer: Mapped[str] = mapped_column(String(64), primary_key=True)
    next_at: Mapped[datetime] = mapped_column(UTCDateTime)
    failures: Mapped[int]  # in a row, to reach it at all
    reason: Mapped[str | None] = mapped_column(Text)  # of the last of them


class Heartbeat(Base):
    """When a part of the node was last known to be up."""

    __tablename__ = "heartbeat"

    part: Mapped[str] = mapped_column(String(32), primary_key=True)
    at: Mapped[datetime] = mapped_column(UTCDateTime)


class PatientLink(Base):
    """Two patient keys that are one patient, as somebody said; taken back where a time says so.

    Keys are those of headers, (PatientID, issuer). Which keys are one patient today follows from
    all links that hold, in whatever order they came: `patient_member` says it.
    """

    __tablename__ = "patient_link"
    __table_args__ = (
        Index("ix_patient_link_merged", "merged_id", "merged_issuer"),
        Index("ix_patient_link_into", "into_id", "into_issuer"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    merged_id: Mapped[str] = mapped_column(String(64))
    merged_issuer: Mapped[str] = mapped_column(String(64))
    into_id: Mapped[str] = mapped_column(String(64))
    into_issuer: Mapped[str] = mapped_column(String(64))
    source: Mapped[str] = mapped_column(String(8))  # cli, hl7
    control_id: Mapped[str] = mapped_column(String(199))  # MSH-10 of the message, empty: none
    linked_at: Mapped[datetime] = mapped_column(UTCDateTime)
    unlinked_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


class PatientMember(Base):
    """Which patient keys are one patient: those of one group. A key without a row is alone.

    Worked out from `patient_link` whenever that changes, and nothing else.
    """

    __tablename__ = "patient_member"
    __table_args__ = (Index("ix_patient_member_group_id", "group_id"),)

    patient_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    issuer: Mapped[str] = mapped_column(String(64), primary_key=True)
    group_id: Mapped[int]  # the lowest id of its links that hold


class PatientMessage(Base):
    """A message that linked patients, or took a link back: sent again, it does nothing twice."""

    __tablename__ = "patient_message"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)  # see `store.take_message`
    taken_at: Mapped[datetime] = mapped_column(UTCDateTime)
