"""What objects tell of their images: a header of each Series, the SOP Class of each Instance."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("series", sa.Column("header", sa.JSON(), nullable=True))
    op.add_column(
        "series",
        sa.Column("moved_along", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    op.add_column("slice", sa.Column("sop_class_uid", sa.String(64), nullable=True))
    op.add_column("curve", sa.Column("sop_classes", sa.JSON(), nullable=True))
