"""Base models that are served beside the first one, and base models of one project alone."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Adds both. The orchestrator fills `base_models` anew when it starts."""
    with op.batch_alter_table("base_models") as batch:
        batch.add_column(sa.Column("project", sa.String(length=63), nullable=False, server_default=""))
    op.create_table(
        "deployments",
        sa.Column("base_model", sa.String(length=63), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.PrimaryKeyConstraint("base_model", name=op.f("pk_deployments")),
    )


def downgrade() -> None:
    """Takes it back."""
    op.drop_table("deployments")
    with op.batch_alter_table("base_models") as batch:
        batch.drop_column("project")
