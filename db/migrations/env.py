"""What Alembic runs for each command: the caller's connection, in the caller's transaction."""

from typing import Any, Literal

from alembic import context

from db import schema


def render_item(kind: str, item: Any, autogen_context: Any) -> str | Literal[False]:
    """Write the plain type where the models have ours: a migration outlives what it imports."""
    if kind == "type" and isinstance(item, schema.UTCDateTime):
        return "sa.DateTime(timezone=True)"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.Base.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it; on Postgres it is a plain ALTER
    render_item=render_item,
)
context.run_migrations()
