"""The databases that the store's tests run on: a SQLite file and a real PostgreSQL, with awkward names."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import URL, Engine, create_engine, make_url, text

USER, PASSWORD = "lamtune", "p@ss/w:rd %{x}"


def _program_folders() -> list[Path]:
    """Folders that hold initdb and pg_ctl: of the PATH, of Debian, and of pip's pgserver."""
    found = [Path(program).resolve().parent for program in [shutil.which("initdb")] if program]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    spec = importlib.util.find_spec("pgserver")
    if spec is not None and spec.origin is not None:
        found.append(Path(spec.origin).parent / "pginstall" / "bin")
    return [
        folder
        for folder in dict.fromkeys(found)
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists()
    ]


class _Server:
    """A throw-away PostgreSQL on a free port of the loopback; not as root, which it refuses."""

    def __init__(self, programs: Path) -> None:
        self.programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="lamtune-postgresql-"))
        self.user: int | None = None
        if os.geteuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            account = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self.user, self.group = account.pw_uid, account.pw_gid
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), "-D", str(self.folder / "data"), *arguments]
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}
        quiet = subprocess.DEVNULL  # a pipe would stay open in the server
        if self.user is None:
            subprocess.run(command, check=True, cwd=self.folder, env=environment, stdout=quiet, stderr=quiet)
        else:
            subprocess.run(
                command,
                check=True,
                cwd=self.folder,
                env=environment,
                stdout=quiet,
                stderr=quiet,
                user=self.user,
                group=self.group,
                extra_groups=[],
            )

    def start(self) -> URL:
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self.run(
            "initdb", "-U", USER, "-A", "scram-sha-256", f"--pwfile={password}", "-E", "UTF8", "--no-sync"
        )
        options = f"-F -p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder}"
        self.run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")
        return URL.create("postgresql+psycopg", USER, PASSWORD, "127.0.0.1", self.port, "postgres")

    def stop(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.run("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(self.folder)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[URL]:
    """A PostgreSQL in which databases may be made: LAMTUNE_TEST_POSTGRESQL (a URL), else one started here."""
    given = os.environ.get("LAMTUNE_TEST_POSTGRESQL")
    if given:
        yield make_url(given).set(drivername="postgresql+psycopg")
        return
    pytest.importorskip("psycopg")
    problems = ["no PostgreSQL programs found"]
    for programs in _program_folders():
        server = _Server(programs)
        try:
            url = server.start()
        except (OSError, subprocess.CalledProcessError) as error:
            problems.append(f"{programs}: {error}")
            server.stop()
            continue
        yield url
        server.stop()
        return
    pytest.skip(f"no PostgreSQL: {'; '.join(problems)}")


@pytest.fixture(scope="session")
def postgresql_database(postgresql_server: URL) -> Iterator[Engine]:
    """A database of our own in that server."""
    name = f"lamtune_{uuid4().hex}"
    server = create_engine(postgresql_server, isolation_level="AUTOCOMMIT")
    database = create_engine(postgresql_server.set(database=name))
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield database
    database.dispose()
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def postgresql_url(postgresql_database: Engine) -> str:
    """A PostgreSQL database, emptied: far quicker than a new one."""
    with postgresql_database.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    return postgresql_database.url.render_as_string(hide_password=False)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path}/store {{x}}%20.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind in turn."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found
