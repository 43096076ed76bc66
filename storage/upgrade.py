"""Brings lamtune's tables to this program's version when a store is opened.

Knows nothing of what the tables hold, nor of Optuna's.
"""

from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from samplers.errors import InputError

if TYPE_CHECKING:
    from alembic.config import Config

VERSION_TABLE = "lamtune_version"
"""Not Alembic's own default: Optuna keeps its version there, in the same database."""

HEAD = "0005"
"""The newest revision in `migrations/versions`: four digits that count up, so that they compare as text."""

_LOCK = 0x1A37_0E  # any number that no other program takes in this database
_alembic_is_global = Lock()  # a second thread's upgrade would run on the first one's connection


def version(connection: Connection) -> str | None:
    """The revision that the database is at; None where lamtune has no tables yet."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return str(connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one())


def refuse_newer(found: str | None, safe_url: str) -> None:
    """Raise InputError for a database that a newer lamtune has upgraded."""
    if found is not None and found > HEAD:
        raise InputError(
            f"the store {safe_url} has schema version {found} and this lamtune knows up to {HEAD}: "
            "upgrade lamtune, or name another store in LAMTUNE_STORE"
        )


def check_writable(connection: Connection) -> None:
    """Raise the database's own error if our tables may only be read; nothing is changed.

    SQLite begins even an immediate transaction on a read-only file, and complains at the first statement.
    """
    connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = version_num WHERE 1 = 0"))


def alembic_config(connection: Connection) -> "Config":
    """Alembic's configuration for the packaged migrations, on a connection that is in a transaction."""
    from alembic.config import Config  # a quarter of a second that an up-to-date store need not pay

    config = Config()
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade(connection: Connection, safe_url: str) -> None:
    """Run the missing migrations in the connection's own (write) transaction; the caller commits.

    Several processes may open an empty store at once: SQLite's write transaction or PostgreSQL's advisory
    lock lets one of them work, and the others find the work done.
    """
    from alembic import command

    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    found = version(connection)
    refuse_newer(found, safe_url)
    if found != HEAD:
        with _alembic_is_global:
            command.upgrade(alembic_config(connection), "head")
