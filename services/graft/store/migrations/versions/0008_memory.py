"""A base model tells its shape, and a job the memory that it needs: unknown until now, and of older rows."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Adds the columns."""
    with op.batch_alter_table("base_models") as batch:
        batch.add_column(sa.Column("shape", sa.JSON(none_as_null=True), nullable=True))
    with op.batch_alter_table("jobs") as batch:
        batch.add_column(sa.Column("memory", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    """Takes them back."""
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("memory")
    with op.batch_alter_table("base_models") as batch:
        batch.drop_column("shape")
