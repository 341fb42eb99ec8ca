"""Runs the migrations on the connection that `graft.store.sql.migrate` opened and locked."""

from alembic import context

from graft.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite alters a table by copying it.
    render_as_batch=True,
    # One transaction, already begun by the caller.
    transactional_ddl=False,
)
context.run_migrations()
