"""Checks of data sets: asked for by the gateway, made by the orchestrator. A new table, which older code ignores."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Adds the table."""
    op.create_table(
        "dataset_checks",
        sa.Column("id", sa.String(length=80), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("dataset_id", sa.String(length=63), nullable=False),
        sa.Column("base_model", sa.String(length=63), nullable=False),
        sa.Column("held_out_id", sa.String(length=63), nullable=True),
        sa.Column("context_tokens", sa.Integer(), nullable=True),
        sa.Column("epochs", sa.Float(), nullable=False),
        sa.Column("done", sa.Boolean(), nullable=False),
        sa.Column("report", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset_checks")),
    )
    with op.batch_alter_table("dataset_checks") as batch:
        batch.create_index(batch.f("ix_dataset_checks_done"), ["done"], unique=False)


def downgrade() -> None:
    """Takes it back."""
    op.drop_table("dataset_checks")
