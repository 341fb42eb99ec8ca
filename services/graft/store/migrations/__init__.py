"""Alembic's migrations of the store. A new one: change `tables.py`, then `alembic revision --autogenerate`."""
