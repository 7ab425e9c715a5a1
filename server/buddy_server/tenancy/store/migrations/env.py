"""Alembic runs this for every command; `Database.migrate` has put its connection into the attributes."""

from alembic import context

from buddy_server.tenancy.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
