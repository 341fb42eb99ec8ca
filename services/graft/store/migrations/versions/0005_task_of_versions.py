"""Adapter versions keep the definition of the task that they were trained with."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Adds the column; versions that are there were trained without a task."""
    with op.batch_alter_table("adapter_versions") as batch:
        batch.add_column(sa.Column("task_definition", sa.String(), nullable=True))
    op.execute("UPDATE adapter_versions SET task_definition = ''")
    with op.batch_alter_table("adapter_versions") as batch:
        batch.alter_column("task_definition", existing_type=sa.String(), nullable=False)


def downgrade() -> None:
    """Takes it back."""
    with op.batch_alter_table("adapter_versions") as batch:
        batch.drop_column("task_definition")
