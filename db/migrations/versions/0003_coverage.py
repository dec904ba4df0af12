"""What mining asks of a curve, in few bytes; `dicomnode db upgrade` fills it for older curves."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

ASKED = ["cell", "bundle", "low_um", "high_um", "stretches", "quality", "slices", "spacing_um"]


def upgrade() -> None:
    op.create_table(
        "bundle",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_bundle"),
        sa.ForeignKeyConstraint(["digest"], ["model.digest"], name="fk_bundle_digest_model"),
        sa.UniqueConstraint("digest", name="uq_bundle_digest"),
    )
    op.create_table(
        "coverage",
        sa.Column("series_id", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("bundle", sa.Integer(), nullable=False),
        sa.Column("cell", sa.Integer(), nullable=False),
        sa.Column("low_um", sa.Integer(), nullable=False),
        sa.Column("high_um", sa.Integer(), nullable=False),
        sa.Column("stretches", sa.Integer(), nullable=False),
        sa.Column("slices", sa.Integer(), nullable=False),
        sa.Column("spacing_um", sa.Integer(), nullable=False),
        sa.Column("flags", sa.Integer(), nullable=False),
        sa.Column("quality", sa.Float(53), nullable=False),
        sa.Column("slope", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("series_id", name="pk_coverage"),
        sa.ForeignKeyConstraint(
            ["series_id"],
            ["curve.series_id"],
            name="fk_coverage_series_id_curve",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["bundle"], ["bundle.id"], name="fk_coverage_bundle_bundle"),
    )
    op.create_index(
        "ix_coverage_cell",
        "coverage",
        ASKED,
    )
    op.create_index(
        "ix_coverage_gaps",
        "coverage",
        ["series_id", *ASKED],
        sqlite_where=sa.text("stretches > 1"),
        postgresql_where=sa.text("stretches > 1"),
    )
    op.create_table(
        "stretch",
        sa.Column("series_id", sa.Integer(), nullable=False),
        sa.Column("low_um", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("high_um", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("series_id", "low_um", name="pk_stretch"),
        sa.ForeignKeyConstraint(
            ["series_id"],
            ["coverage.series_id"],
            name="fk_stretch_series_id_coverage",
            ondelete="CASCADE",
        ),
    )
