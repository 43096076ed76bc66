"""docker/: the commands and health checks of compose.yaml, run here as the containers run them.

No image is built. A service gets the command and the environment of its file; only names and ports of the containers'
network become those of this machine.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray
import yaml
from sqlalchemy import make_url

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
KUBERAY = list(yaml.safe_load_all((ROOT / "docker" / "kuberay.yaml").read_text(encoding="utf-8")))
SECRETS = {"POSTGRES_PASSWORD": "p" * 32, "RAY_AUTH_TOKEN": "r" * 32, "LAMTUNE_TOKEN": "t" * 32}
SECRET_WORDS = ("PASSWORD", "TOKEN")


def interpolated(text):
    """What Compose makes of ${NAME}, ${NAME:-default} and ${NAME:?message} with SECRETS as the environment."""

    def value(match):
        name, kind, rest = match["name"], match["kind"], match["rest"]
        if name in SECRETS:
            return SECRETS[name]
        assert kind == ":-", f"{name} has no default"
        return rest

    return re.sub(r"\$\{(?P<name>\w+)(?:(?P<kind>:[-?])(?P<rest>[^}]*))?\}", value, str(text))


def service(name):
    """Its command, environment and health check as the container has them."""
    found = COMPOSE["services"][name]
    environment = {key: interpolated(value) for key, value in found.get("environment", {}).items()}
    kind, *check = found["healthcheck"]["test"]
    assert kind == "CMD"
    return [interpolated(word) for word in found.get("command", [])], environment, check


@pytest.fixture
def free_port():
    """free_port(): a port that nothing listens on, never the same twice."""
    taken = set()

    def find():
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            if port not in taken:
                taken.add(port)
                return port

    return find


@pytest.fixture
def short_folder():
    """A folder whose path leaves room for the names of Ray's sockets."""
    folder = tempfile.mkdtemp(prefix="ray-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(tmp_path):
    """run(command, environment): a service of this machine, killed with all its children at the end."""
    processes = []
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def start(command, environment):
        process = subprocess.Popen(
            command,
            env={**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT), **environment},
            cwd=tmp_path,
            stdout=(tmp_path / f"{len(processes)}.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until_healthy(process, check, environment, seconds=120):
    """Repeat a health check as Compose does, until it succeeds."""
    deadline = time.monotonic() + seconds
    while True:
        result = subprocess.run(check, env={**os.environ, **environment}, capture_output=True, check=False)
        if result.returncode == 0:
            return result.stdout.decode()
        assert process.poll() is None, "the service has ended"
        assert time.monotonic() < deadline, result.stderr
        time.sleep(0.2)


@pytest.mark.skipif(shutil.which("wget") is None, reason="the health checks call wget")
class TestServices:
    def test_serve_is_healthy_on_postgresql_and_keeps_its_secrets(
        self, run, free_port, postgresql_url, tmp_path
    ):
        command, environment, check = service("serve")
        port = str(free_port())
        command = [word.replace("8080", port) for word in command]
        check = [word.replace("8080", port) for word in check]
        asked, here = make_url(environment["LAMTUNE_STORE"]), make_url(postgresql_url)
        assert (asked.drivername, asked.password) == ("postgresql", None)  # it comes in PGPASSWORD
        assert {"LAMTUNE_STORE", "PGPASSWORD", "LAMTUNE_TOKEN"} == set(environment)
        environment["LAMTUNE_STORE"] = here.set(password="").render_as_string(hide_password=False)
        environment["PGPASSWORD"] = here.password
        process = run(command, environment)
        assert until_healthy(process, check, environment) == '{"status":"ok"}'
        refused = subprocess.run(
            ["wget", "-q", "-S", "-O-", f"http://127.0.0.1:{port}/api/jobs"], capture_output=True, check=False
        )
        assert b"401" in refused.stderr
        token = f"--header=Authorization: Bearer {environment['LAMTUNE_TOKEN']}"
        jobs = ["wget", "-q", "-O-", token, f"http://127.0.0.1:{port}/api/jobs"]
        assert subprocess.run(jobs, capture_output=True, check=True).stdout == b"[]"
        log = (tmp_path / "0.log").read_text()
        assert environment["LAMTUNE_TOKEN"] not in log
        assert environment["PGPASSWORD"] not in log

    def test_the_head_and_its_workers_make_a_cluster_that_wants_its_token(self, run, free_port, short_folder):
        gcs, dashboard = str(free_port()), str(free_port())
        ports = {"6379": gcs, "ray-head": "127.0.0.1"}
        agents = {}
        for name in ("ray-head", "worker-cpu", "worker-gpu"):
            command, environment, check = service(name)
            for old, new in ports.items():
                command = [word.replace(old, new) for word in command]
            agent = str(free_port())
            command += [
                f"--dashboard-agent-listen-port={agent}",
                f"--dashboard-agent-grpc-port={free_port()}",
                f"--metrics-export-port={free_port()}",
                "--node-ip-address=127.0.0.1",
                "--object-store-memory=100000000",
            ]
            if name == "ray-head":
                command += [
                    f"--temp-dir={short_folder}",
                    f"--dashboard-port={dashboard}",
                    f"--ray-client-server-port={free_port()}",
                ]
            agents[name] = run(command, environment)
            check = [word.replace("52365", agent) for word in check]
            assert "success" in until_healthy(agents[name], check, environment)
        assert ray.__version__ == KUBERAY[0]["spec"]["rayVersion"]
        script = (
            "from ray.job_submission import JobSubmissionClient as C\n"
            f"print(C('http://127.0.0.1:{dashboard}').get_version())"
        )
        asked = {
            token: subprocess.run(
                [sys.executable, "-c", script],
                env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
                capture_output=True,
                text=True,
                check=False,
            )
            for token in (SECRETS["RAY_AUTH_TOKEN"], "w" * 32)
        }
        right, wrong = asked.values()
        assert right.returncode == 0, right.stderr
        assert wrong.returncode != 0


def test_what_an_image_does_by_itself_is_to_say_what_it_can(run):
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    (command,) = re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE)
    assert "ENTRYPOINT" not in dockerfile
    assert run(json.loads(command), {}).wait(timeout=60) == 0


def test_every_image_from_elsewhere_has_an_exact_version():
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    ours = {found["image"] for found in COMPOSE["services"].values() if "build" in found}
    foreign = {found["image"] for found in COMPOSE["services"].values()} - ours
    stages = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE)
    bases = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) - set(stages)
    (python,) = re.findall(r"^ARG PYTHON=(\S+)$", dockerfile, re.MULTILINE)
    assert bases == {"python:${PYTHON}"}
    for image in (*foreign, f"python:{python}"):
        assert re.fullmatch(r"[a-z]+:\d+\.\d+(\.\d+)?-[a-z-]+", image), image
    assert {c["image"] for pod in pods() for c in pod["containers"]} == ours


def test_no_secret_stands_in_a_file_and_none_has_a_default():
    text = (ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8")
    for name, found in COMPOSE["services"].items():
        for key, value in found.get("environment", {}).items():
            if any(word in key for word in SECRET_WORDS):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), (name, key)
    assert not re.search(r"://[^/\s]*:[^/\s]*@", text)
    for pod in pods():
        for container in pod["containers"]:
            for one in container.get("env", []):
                assert "secretKeyRef" in one["valueFrom"], one


def pods():
    """Every pod of the manifests."""
    cluster, deployment, _service = KUBERAY
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in (*groups, deployment["spec"])]


def test_nothing_runs_as_root_and_every_service_has_a_health_check():
    assert all(found.get("healthcheck") for found in COMPOSE["services"].values())
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert all(not c["securityContext"]["allowPrivilegeEscalation"] for c in pod["containers"])
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    stages = dict(re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile, re.MULTILINE))
    assert stages.keys() >= {"base", "python:${PYTHON}"}
    assert "\nUSER 1000\n" in dockerfile.partition("AS base")[2]


def test_the_manifests_and_the_file_run_the_same_commands():
    _, deployment, _service = KUBERAY
    (serve,) = deployment["spec"]["template"]["spec"]["containers"]
    assert serve["command"] == COMPOSE["services"]["serve"]["command"]
    assert COMPOSE["services"]["worker-gpu"]["command"] == COMPOSE["services"]["worker-cpu"]["command"][:4]
    targets = {found["build"]["target"] for found in COMPOSE["services"].values() if "build" in found}
    assert targets == {"cpu", "cuda"}


def test_what_the_image_copies_is_what_the_package_needs():
    ignore = (ROOT / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    assert kept >= {
        "samplers",
        "objectives",
        "storage",
        "search",
        "pyproject.toml",
        "constraints.txt",
        "README.md",
    }
