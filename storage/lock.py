"""One writing search per SQLite file: an advisory lock beside it. Knows nothing of jobs or SQL.

SQLite lets one connection write at a time, and a search writes all the time: two searches would wait for each other,
and over a network file system may damage the file. PostgreSQL serves any number.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL

from samplers.errors import InputError
from storage.connection import safe

_ANOTHER = "for several searches at once take PostgreSQL: --store postgresql://USER:PASSWORD@HOST/NAME"


@contextmanager
def only_writer(url: URL) -> Iterator[None]:
    """Hold a SQLite file, `FILE.lock` beside it, until the context or the process ends; PostgreSQL needs no lock.

    The kernel releases it with the process, however that dies; the lock's file stays, for who waits might have it
    open. It keeps nobody from reading, nor from a short write. Raises InputError where another process has it.
    """
    if url.get_backend_name() != "sqlite":
        yield
        return
    path = Path(f"{url.database}.lock")
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the store {safe(url)} cannot be locked: {path}: {error.strerror}; {_ANOTHER}"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"the store {safe(url)} is being written by another search ({file.read().strip()}), "
                f"and SQLite serves one process: wait for that one, or {_ANOTHER}"
            ) from None
        except OSError as error:  # a file system without locks
            raise InputError(
                f"the store {safe(url)} cannot be locked: {error.strerror}; {_ANOTHER}"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
