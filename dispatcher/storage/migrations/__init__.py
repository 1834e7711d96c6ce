"""The tables' migrations (Alembic), and the functions that run them without an `alembic.ini`."""

from dispatcher.storage.migrations.runner import current, head, require_current, upgrade

__all__ = ["current", "head", "require_current", "upgrade"]
