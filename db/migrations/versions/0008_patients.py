"""Links between patient keys, and whose a Series was taken for."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "patient_link",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("merged_id", sa.String(64), nullable=False),
        sa.Column("merged_issuer", sa.String(64), nullable=False),
        sa.Column("into_id", sa.String(64), nullable=False),
        sa.Column("into_issuer", sa.String(64), nullable=False),
        sa.Column("source", sa.String(8), nullable=False),
        sa.Column("control_id", sa.String(199), nullable=False),
        sa.Column("linked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("unlinked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_patient_link"),
    )
    op.create_index("ix_patient_link_merged", "patient_link", ["merged_id", "merged_issuer"])
    op.create_index("ix_patient_link_into", "patient_link", ["into_id", "into_issuer"])
    op.create_table(
        "patient_member",
        sa.Column("patient_id", sa.String(64), nullable=False),
        sa.Column("issuer", sa.String(64), nullable=False),
        sa.Column("group_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("patient_id", "issuer", name="pk_patient_member"),
    )
    op.create_index("ix_patient_member_group_id", "patient_member", ["group_id"])
    op.create_table(
        "patient_message",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_patient_message"),
    )
    op.add_column("series", sa.Column("dissent", sa.JSON(), nullable=True))
    op.add_column("series", sa.Column("former", sa.JSON(), nullable=True))
