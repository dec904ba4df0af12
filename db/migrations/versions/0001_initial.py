"""The first schema: models, Series and their slices, arrivals, curves, offsets, quarantine."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "model",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("first_used_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_model"),
    )
    op.create_table(
        "series",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("series_uid", sa.String(64), nullable=False),
        sa.Column("study_uid", sa.String(64), nullable=False),
        sa.Column("patient_id", sa.String(64), nullable=False),
        sa.Column("issuer", sa.String(64), nullable=False),
        sa.Column("study_datetime", sa.DateTime(), nullable=True),
        sa.Column("modality", sa.String(16), nullable=False),
        sa.Column("body_part_examined", sa.String(16), nullable=False),
        sa.Column("manufacturer", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(40), nullable=True),
        sa.Column("evidence", sa.String(24), nullable=True),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("received", sa.Integer(), nullable=False),
        sa.Column("expected", sa.Integer(), nullable=True),
        sa.Column("set_aside", sa.JSON(), nullable=False),
        sa.Column("first_arrival_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_arrival_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_series"),
        sa.UniqueConstraint("series_uid", name="uq_series_series_uid"),
    )
    op.create_index("ix_series_patient", "series", ["patient_id", "issuer"])
    op.create_index("ix_series_state", "series", ["state"])
    op.create_index("ix_series_study_uid", "series", ["study_uid"])
    op.create_table(
        "slice",
        sa.Column("series_id", sa.Integer(), nullable=False),
        sa.Column("sop_instance_uid", sa.String(64), nullable=False),
        sa.Column("frame", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(64), nullable=True),
        sa.Column("score", sa.Float(53), nullable=True),
        sa.Column("reason", sa.String(40), nullable=True),
        sa.Column("image_position", sa.JSON(), nullable=True),
        sa.Column("image_orientation", sa.JSON(), nullable=True),
        sa.Column("frame_of_reference_uid", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("series_id", "sop_instance_uid", "frame", name="pk_slice"),
        sa.ForeignKeyConstraint(
            ["series_id"], ["series.id"], name="fk_slice_series_id_series", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "arrival",
        sa.Column("series_id", sa.Integer(), nullable=False),
        sa.Column("association_id", sa.String(16), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended", sa.String(16), nullable=True),
        sa.PrimaryKeyConstraint("series_id", "association_id", name="pk_arrival"),
        sa.ForeignKeyConstraint(
            ["series_id"], ["series.id"], name="fk_arrival_series_id_series", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "curve",
        sa.Column("series_id", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("z_mm", sa.LargeBinary(), nullable=False),
        sa.Column("score", sa.LargeBinary(), nullable=False),
        sa.Column("image_position", sa.LargeBinary(), nullable=False),
        sa.Column("image_orientation", sa.JSON(), nullable=False),
        sa.Column("instances", sa.LargeBinary(), nullable=False),
        sa.Column("frames_of_reference", sa.JSON(), nullable=False),
        sa.Column("height_min_mm", sa.Float(53), nullable=False),
        sa.Column("height_max_mm", sa.Float(53), nullable=False),
        sa.Column("pearson_r", sa.Float(53), nullable=False),
        sa.Column("slope", sa.Float(53), nullable=False),
        sa.Column("flags", sa.JSON(), nullable=False),
        sa.Column("computed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("series_id", name="pk_curve"),
        sa.ForeignKeyConstraint(
            ["series_id"], ["series.id"], name="fk_curve_series_id_series", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["model"], ["model.digest"], name="fk_curve_model_model"),
    )
    op.create_table(
        "offset",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("fixed_series_id", sa.Integer(), nullable=False),
        sa.Column("moving_series_id", sa.Integer(), nullable=False),
        sa.Column("method", sa.String(16), nullable=False),
        sa.Column("status", sa.String(16), nullable=True),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("offset_mm", sa.Float(53), nullable=True),
        sa.Column("sigma_mm", sa.Float(53), nullable=True),
        sa.Column("overlap_mm", sa.Float(53), nullable=True),
        sa.Column("dx_mm", sa.Float(53), nullable=True),
        sa.Column("dy_mm", sa.Float(53), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("computed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("seconds", sa.Float(53), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_offset"),
        sa.UniqueConstraint("fixed_series_id", "moving_series_id", "method", name="uq_offset_pair"),
        sa.ForeignKeyConstraint(
            ["fixed_series_id"],
            ["series.id"],
            name="fk_offset_fixed_series_id_series",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["moving_series_id"],
            ["series.id"],
            name="fk_offset_moving_series_id_series",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["model"], ["model.digest"], name="fk_offset_model_model"),
    )
    op.create_index("ix_offset_moving_series_id", "offset", ["moving_series_id"])
    op.create_index("ix_offset_status", "offset", ["status"])
    op.create_table(
        "quarantined",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("reason", sa.String(40), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("arrived_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_quarantined"),
    )
    op.create_index("ix_quarantined_reason", "quarantined", ["reason"])
