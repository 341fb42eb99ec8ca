"""A base model tells its shape, a job the memory that it needs, and a check its task: none of them in older rows."""

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
    with op.batch_alter_table("dataset_checks") as batch:
        batch.add_column(sa.Column("task_definition", sa.String(), nullable=False, server_default=""))


def downgrade() -> None:
    """Takes them back."""
    with op.batch_alter_table("dataset_checks") as batch:
        batch.drop_column("task_definition")
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("memory")
    with op.batch_alter_table("base_models") as batch:
        batch.drop_column("shape")
