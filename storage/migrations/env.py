"""Alembic's entry: runs migrations on the connection that `storage.upgrade` hands over.

Touches no table but `lamtune_*`.
"""

from collections.abc import MutableMapping
from typing import Any

from alembic import context

from storage.tables import Base
from storage.upgrade import VERSION_TABLE


def _ours(name: str | None, kind: str, parents: MutableMapping[Any, Any]) -> bool:
    """Optuna's tables stand in the same database and are not ours to compare."""
    return kind != "table" or (name is not None and name.startswith("lamtune_"))


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    include_name=_ours,
    render_as_batch=True,  # SQLite cannot alter a column in place
)
with context.begin_transaction():
    context.run_migrations()
