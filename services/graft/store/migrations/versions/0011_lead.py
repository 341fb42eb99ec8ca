"""The lease by which one orchestrator leads. A new table, which older code ignores."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Adds the table and its row, which is nobody's."""
    op.create_table(
        "leads",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("expire_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leads")),
    )
    op.execute("INSERT INTO leads (name, owner, expire_time) VALUES ('orchestrator', '', 0)")


def downgrade() -> None:
    """Takes it back."""
    op.drop_table("leads")
