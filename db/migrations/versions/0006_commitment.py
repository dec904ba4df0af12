"""Storage Commitment of what was delivered."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column(
        "delivery", sa.Column("commitment_due_at", sa.DateTime(timezone=True), nullable=True)
    )
    op.add_column(
        "delivery",
        sa.Column("commitment_attempts", sa.Integer(), nullable=False, server_default=sa.text("0")),
    )
    op.create_index(
        "ix_delivery_destination_state_due_at", "delivery", ["destination", "state", "due_at"]
    )
    op.create_index("ix_delivery_commitment_due_at", "delivery", ["commitment_due_at"])
    op.create_index("ix_delivery_sop_instance_uid", "delivery", ["sop_instance_uid"])
