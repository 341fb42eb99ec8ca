"""A version tells how it is served: as an adapter, until now the only way, or as a model of its own."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds the column; whoever does not know it writes adapters."""
    with op.batch_alter_table("adapter_versions") as batch:
        batch.add_column(sa.Column("served_as", sa.String(length=32), nullable=False, server_default="adapter"))


def downgrade() -> None:
    """Takes it back."""
    with op.batch_alter_table("adapter_versions") as batch:
        batch.drop_column("served_as")
