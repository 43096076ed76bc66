"""Servers for tests and benchmarks: a throw-away PostgreSQL, and nodes of a throw-away Ray cluster.

All on free ports of the loopback, in folders of their own. Each can be killed as a power cut would do it.
"""

import importlib.util
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psutil
from sqlalchemy import URL, create_engine, text

ROOT = Path(__file__).parents[1]
WORKER = "ray::SamplerWorker"
USER, PASSWORD = "lamtune", "p@ss/w:rd %{x}"  # as awkward as a password may be


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on now."""
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def postgresql_programs() -> list[Path]:
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


class PostgreSQL:
    """A server of our own; not as root, which it refuses. `url` is its database `postgres`."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="lamtune-postgresql-"))
        self._as: dict[str, object] = {}
        if os.geteuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            account = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            os.chown(self._folder, account.pw_uid, account.pw_gid)
            self._as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        (self._port,) = free_ports(1)
        self.url = URL.create("postgresql+psycopg", USER, PASSWORD, "127.0.0.1", self._port, "postgres")

    def _run(self, program: str, *arguments: str) -> None:
        quiet = subprocess.DEVNULL  # a pipe would stay open in the server
        subprocess.run(
            [str(self._programs / program), "-D", str(self._folder / "data"), *arguments],
            check=True,
            cwd=self._folder,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
            stdout=quiet,
            stderr=quiet,
            **self._as,  # type: ignore[call-overload]
        )

    def create(self) -> None:
        """Make its files and start it. OSError and CalledProcessError where that cannot be."""
        password = self._folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run(
            "initdb", "-U", USER, "-A", "scram-sha-256", f"--pwfile={password}", "-E", "UTF8", "--no-sync"
        )
        self.start()

    def start(self) -> None:
        """Start it, also after `kill`."""
        options = f"-F -p {self._port} -c listen_addresses=127.0.0.1 -k {self._folder}"
        self._run("pg_ctl", "-w", "-l", str(self._folder / "log"), "-o", options, "start")

    def kill(self) -> None:
        """Kill -9 of all its processes."""
        server = psutil.Process(int((self._folder / "data" / "postmaster.pid").read_text().split()[0]))
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=30)

    def stop(self) -> None:
        """End it and delete its files."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self._run("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(self._folder)


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """The first server that starts; RuntimeError where none does."""
    problems = ["no PostgreSQL programs found"]
    for programs in postgresql_programs():
        server = PostgreSQL(programs)
        try:
            server.create()
        except (OSError, subprocess.CalledProcessError) as error:
            problems.append(f"{programs}: {error}")
            server.stop()
            continue
        try:
            yield server
        finally:
            server.stop()
        return
    raise RuntimeError(f"no PostgreSQL: {'; '.join(problems)}")


def new_database(server: URL) -> URL:
    """An empty database in a server."""
    name = f"lamtune_{uuid4().hex}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.set(database=name)


class RayNode:
    """A node of a Ray cluster, `ray start --block` in a process of its own."""

    def __init__(self, words: Sequence[str], environment: dict[str, str]) -> None:
        listen, grpc, metrics = free_ports(3)
        own = [
            "--block", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000",
            f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}",
            f"--metrics-export-port={metrics}",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            ["ray", "start", *words, *own],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        """Kill -9 of all its processes, as when the machine goes."""
        process = psutil.Process(self.process.pid)
        processes = [process, *process.children(recursive=True)]
        for one in processes:
            if one.is_running():
                one.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it."""
        if self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for child in children:
            if child.is_running():
                child.kill()


def title(process: psutil.Process) -> str:
    """What a process calls itself; Ray has it say which call it is in, `ray::SamplerWorker.sample`."""
    try:
        return "".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def sampler_workers(ancestor: psutil.Process) -> list[psutil.Process]:
    """The processes of sampler workers below another one."""
    return [one for one in ancestor.children(recursive=True) if title(one).startswith(WORKER)]


class RayCluster:
    """A Ray cluster whose head works on nothing; its nodes have `environment` beside what they need.

    `gcs`: HOST:PORT for drivers. `dashboard`: http address of its job server.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: it has to hold names of sockets
        gcs, dashboard, client = free_ports(3)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LAMTUNE_"))}
        self.environment = {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.gcs, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self.head = RayNode(
            [
                "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={self._folder}",
                f"--ray-client-server-port={client}", "--num-cpus=0", "--num-gpus=0", "--labels=zone=a",
            ],
            self.environment,
        )  # fmt: skip
        self.nodes: list[RayNode] = []

    def add(self, cpus: int, **environment: str) -> RayNode:
        """Start a node with so many processors and the label zone=b; the head must answer."""
        words = [f"--address={self.gcs}", f"--num-cpus={cpus}", "--num-gpus=0", "--labels=zone=b"]
        self.nodes.append(RayNode(words, self.environment | environment))
        return self.nodes[-1]

    def drive(self, *words: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start `lamtune WORDS --cluster auto` on the head's machine; its output is added to `log`."""
        code = "from search.cli import main; main()"
        with log.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-c", code, *words, "--cluster", "auto"],
                env=self.environment | {"RAY_ADDRESS": self.gcs} | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def living(self) -> int:
        """How many nodes there are, as the head has it."""
        try:
            with urllib.request.urlopen(f"{self.dashboard}/nodes?view=summary", timeout=5) as answer:
                found = json.load(answer)["data"]["summary"]
        except OSError:
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in found)

    def stop(self) -> None:
        """End all nodes and delete what they left."""
        for node in (*self.nodes, self.head):
            node.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    """Wait until `condition()` holds; TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited for {seconds:.0f} s in vain")
        time.sleep(0.2)
