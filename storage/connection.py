"""From a database URL to an engine, never showing a password. Knows nothing of tables."""

import json
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event, make_url
from sqlalchemy.exc import SQLAlchemyError

from samplers.errors import InputError

_T = TypeVar("_T")
BUSY_SECONDS = 30
"""How long a SQLite writer waits for another one to finish."""

_CONNECT_SECONDS = 10
_AGAIN_SECONDS = 0.5
_BUSY_AGAIN_SECONDS = 0.01
_FORMS = (
    "write sqlite:///FILE.db or postgresql://USER:PASSWORD@HOST/NAME, "
    "with signs like @ and / in the password percent-encoded"
)


def default_url() -> str:
    """The environment's LAMTUNE_STORE, else lamtune.db in the working directory."""
    return os.environ.get("LAMTUNE_STORE") or "sqlite:///lamtune.db"


def parse(text: str) -> URL:
    """A URL of a SQLite file or of PostgreSQL by psycopg 3; else InputError, which repeats nothing secret."""
    try:
        url = make_url(text)
    except (SQLAlchemyError, ValueError):
        url = None
    if url is None:  # raised out here: the driver's own error, which may hold the password, is not chained
        raise InputError(f"the store's URL (LAMTUNE_STORE) cannot be read: {_FORMS}")
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        return _sqlite(url)
    if url.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        if any("@" in (part or "") for part in (url.host, url.database)):
            raise InputError(f"the store's URL (LAMTUNE_STORE) has an @ too many: {_FORMS}")
        if not url.database:
            raise InputError(f"the store {safe(url)} names no database: {_FORMS}")
        return url.set(drivername="postgresql+psycopg")
    raise InputError(f"the store's URL (LAMTUNE_STORE) is of the unknown kind {url.drivername!r}: {_FORMS}")


def _sqlite(url: URL) -> URL:
    if url.database in (None, "", ":memory:"):
        raise InputError("the store must be a file, which Optuna opens too: write sqlite:///FILE.db")
    if url.query:
        raise InputError(f"the store {safe(url)} has options after the ?: SQLite takes none here")
    path = Path(str(url.database))
    if path.is_dir():
        raise InputError(f"the store {safe(url)} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise InputError(
            f"the store {safe(url)} cannot be made: the folder {path.parent} does not exist, create it first"
        )
    return url


def _secrets(url: URL) -> dict[str, str]:
    """The query's options that hold a secret."""
    return {key: str(value) for key, value in url.query.items() if "password" in key.lower()}


def refuse_sqlite(text: str) -> None:
    """Raise InputError for the URL of a SQLite file, which only one process may write."""
    if (url := parse(text)).get_backend_name() == "sqlite":
        raise InputError(
            f"the store {safe(url)} is a SQLite file, which serves one process: a cluster's jobs need PostgreSQL, "
            "postgresql://USER@HOST/NAME"
        )


def refuse_secret(text: str) -> None:
    """Raise InputError for a URL with a password, which repeats none of it: it may not be sent to others."""
    url = parse(text)
    if url.password or _secrets(url):
        raise InputError(
            f"the store {safe(url)} has a password, which everybody could read on the cluster's dashboard: leave it "
            "out, and set LAMTUNE_STORE or PGPASSWORD (or PGPASSFILE) where the cluster runs"
        )


def safe(url: URL) -> str:
    """The URL for people and logs: no password, neither in its own place nor as an option."""
    return url.difference_update_query(_secrets(url)).render_as_string(hide_password=True)


def redacted(url: URL, error: BaseException) -> str:
    """The database's words for `error`, on one line, without the URL's secrets."""
    words = " ".join(str(getattr(error, "orig", None) or error).split())
    for secret in {url.password, *_secrets(url).values()} - {None, ""}:
        for form in (str(secret), quote(str(secret), safe=""), quote_plus(str(secret))):
            words = words.replace(form, "***")
    return words


def driver_options(url: URL) -> dict[str, Any]:
    """Keyword arguments of `create_engine`, the same for our engine and for Optuna's."""
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    timeout = {} if "connect_timeout" in url.query else {"connect_timeout": _CONNECT_SECONDS}
    return {"connect_args": timeout, "pool_pre_ping": True}


def make_engine(url: URL) -> Engine:
    """An engine for a URL from `parse`; it has not connected yet. InputError where psycopg is missing."""
    engine = None
    to_json = partial(json.dumps, allow_nan=False)  # PostgreSQL refuses NaN, so SQLite shall not take it
    with suppress(ImportError):
        engine = create_engine(url, json_serializer=to_json, hide_parameters=True, **driver_options(url))
    if engine is None:
        raise InputError(f"the store {safe(url)} needs psycopg: install lamtune with its extra [postgresql]")
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _sqlite_connected)
        event.listen(engine, "begin", _sqlite_begin)
    return engine


def wait_for(engine: Engine, seconds: float) -> None:
    """Have an engine try to connect for so long where the database does not answer, or is starting."""

    def connect(dialect: Dialect, _record: object, words: list[Any], options: dict[str, Any]) -> Any:
        absent = dialect.loaded_dbapi.OperationalError
        return _patiently(
            lambda: dialect.connect(*words, **options),
            lambda error: isinstance(error, absent),
            seconds,
            _AGAIN_SECONDS,
        )

    event.listen(engine, "do_connect", connect)


def _sqlite_connected(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own late BEGIN cannot say IMMEDIATE; see _sqlite_begin
    cursor = connection.cursor()
    _write_ahead(cursor)
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Have readers not wait for a writer.

    The mode stays with the file; the one statement that changes it fails at once, whatever the timeout, where
    another connection is about to do the same.
    """
    _patiently(lambda: cursor.execute("PRAGMA journal_mode=WAL"), _busy, BUSY_SECONDS, _BUSY_AGAIN_SECONDS)


def _busy(error: Exception) -> bool:
    return (
        isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
    )


def _patiently(
    call: Callable[[], _T], passes: Callable[[Exception], bool], seconds: float, again: float
) -> _T:
    """What a call returns, tried `again` and again for so many seconds where it fails by what `passes`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Exception as error:
            if not passes(error) or time.monotonic() >= deadline:
                raise
        time.sleep(again)


def _sqlite_begin(connection: Connection) -> None:
    # A transaction that reads first and writes later fails at once, whatever the timeout, if another one
    # wrote in between; one that takes the write lock at its start waits for it.
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
