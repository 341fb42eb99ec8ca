"""Events and checkpoints name their project, as every other row of a project does."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_PROJECT = sa.String(length=63)


def upgrade() -> None:
    """Adds the column, fills it from the job, and only then forbids NULL."""
    for table in ("events", "checkpoints"):
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("project", _PROJECT, nullable=True))
        op.execute(f"UPDATE {table} SET project = (SELECT jobs.project FROM jobs WHERE jobs.id = {table}.job_id)")
        with op.batch_alter_table(table) as batch:
            batch.alter_column("project", existing_type=_PROJECT, nullable=False)


def downgrade() -> None:
    """Takes it back."""
    for table in ("events", "checkpoints"):
        with op.batch_alter_table(table) as batch:
            batch.drop_column("project")
