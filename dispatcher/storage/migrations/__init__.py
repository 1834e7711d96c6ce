"""The tables' migrations: `revisions` says at which revision a database is, `runner` upgrades it with Alembic.

Only `runner` loads Alembic, and only commands and a new SQLite file need it.
"""
