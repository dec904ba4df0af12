"""Kept network inputs, and the body's centre in each slice."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("slice") as batch:
        batch.add_column(sa.Column("body_centre", sa.JSON(), nullable=True))
        batch.add_column(sa.Column("preview", sa.LargeBinary(), nullable=True))
    with op.batch_alter_table("curve") as batch:
        batch.add_column(sa.Column("body_centre", sa.LargeBinary(), nullable=True))
        batch.create_index("ix_curve_model", ["model"])
    op.create_table(
        "preview",
        sa.Column("series_id", sa.Integer(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("arrived_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("sizes", sa.LargeBinary(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("series_id", name="pk_preview"),
        sa.ForeignKeyConstraint(
            ["series_id"], ["series.id"], name="fk_preview_series_id_series", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_preview_arrived_at", "preview", ["arrived_at"])
