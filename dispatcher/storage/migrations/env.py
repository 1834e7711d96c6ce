"""Alembic executes this file for every command. The revisions run on the connection that the runner passes in."""

from alembic import context

from dispatcher.storage.migrations.runner import OPTIONS
from dispatcher.storage.models import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata, **OPTIONS)

with context.begin_transaction():
    context.run_migrations()
