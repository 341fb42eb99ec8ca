"""A data set tells the values that may be labels, so that a job that takes them from it need not read the file."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Adds the column. Older rows do not tell: their labels were never counted."""
    with op.batch_alter_table("datasets") as batch:
        batch.add_column(sa.Column("labels", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    """Takes it back."""
    with op.batch_alter_table("datasets") as batch:
        batch.drop_column("labels")
