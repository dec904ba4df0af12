"""Rejection notes, and what tells slices of one place apart."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "rejection",
        sa.Column("sop_instance_uid", sa.String(64), nullable=False),
        sa.Column("note_uid", sa.String(64), nullable=False),
        sa.Column("code", sa.String(16), nullable=False),
        sa.Column("rejected_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("restored_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("sop_instance_uid", "note_uid", name="pk_rejection"),
    )
    op.add_column("slice", sa.Column("acquisition", sa.JSON(), nullable=True))
    op.add_column("curve", sa.Column("acquisitions", sa.LargeBinary(), nullable=True))
