"""The database tells the oldest Graft that can use it, so that the one before a migration goes on during an upgrade."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Adds the table and its row."""
    op.create_table("schema_readers", sa.Column("oldest", sa.String(), primary_key=True))
    op.execute("INSERT INTO schema_readers (oldest) VALUES ('0009')")


def downgrade() -> None:
    """Takes it back."""
    op.drop_table("schema_readers")
