"""Alembic's migrations of the store. A new one: change `tables.py`, then `alembic revision --autogenerate`.

The Graft of the revision before must go on with a migrated database: it runs while a cluster is upgraded, and after a
rollback. So columns are added with a default and dropped one release after the code that used them. A migration that
cannot be so ends with `UPDATE schema_readers SET oldest = '<its revision>'`; then older ones refuse the database. What
holds for JSON in columns, and for values that older ones cannot read, is ADR 12.
"""
