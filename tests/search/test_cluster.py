"""search.cluster: two real Ray nodes and a PostgreSQL; jobs go through Ray's job server."""

import json
import os
import time
import urllib.request

import pytest
import yaml
from click.testing import CliRunner
from sqlalchemy import make_url

from benchmarks.jobs import GAUSS
from search.cli import main
from storage import open_store

JOB = {
    **GAUSS,
    "sampling": {"solver": "ddpm", "nfe": 3},
    "search": {
        "strategy": "paper",
        "images": 64,
        "confirm": 0,
        "b": {"coarse": 0.1, "fine": 0.05},
        "k": {"start": 0, "stop": 0},
    },
    "resources": {"workers": 1, "labels": {"zone": "b"}},
}


@pytest.fixture
def lamtune(two_nodes, postgresql_url):
    """lamtune(words…): the command with the cluster and the store in its environment."""

    def run(*words):
        environment = {"LAMTUNE_CLUSTER": two_nodes.dashboard, "LAMTUNE_STORE": postgresql_url}
        return CliRunner(env=environment).invoke(main, [str(word) for word in words], catch_exceptions=False)

    return run


@pytest.fixture
def write(tmp_path):
    """write(name, **sections): a job file."""

    def job(name, **sections):
        (tmp_path / name).write_text(yaml.safe_dump({**JOB, **sections}))
        return tmp_path / name

    return job


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def over(lamtune, name):
    text = lamtune("status", name).output
    return text if any(word in text for word in ("SUCCEEDED", "FAILED", "STOPPED")) else ""


def test_two_users_jobs_share_the_cluster_and_both_have_their_results(
    lamtune, write, postgresql_url, two_nodes, worker_cache
):
    old = worker_cache / "features" / "ab" / "abc"
    old.mkdir(parents=True)
    with (old / "0.npy").open("wb") as file:
        file.truncate(9 * 2**30)  # more than the cache may hold, though it takes no room on the disk
    os.utime(old, (1e9, 1e9))
    files = [write(f"{nfe}.yaml", sampling={"solver": "ddpm", "nfe": nfe}) for nfe in (3, 4)]
    began = time.monotonic()
    names = [lamtune("submit", file).output.strip() for file in files]
    assert time.monotonic() - began < 15
    assert len(set(names)) == 2
    again = lamtune("submit", files[0])
    assert again.output.splitlines()[0] == names[0]  # the same job is not sent twice
    for name in names:
        assert "SUCCEEDED" in until(lambda name=name: over(lamtune, name)), lamtune("logs", name).output
        assert "λ = 1 gives" in lamtune("logs", name).output
    assert not old.exists()  # each host keeps its own cache within the limit
    assert worker_cache.joinpath("features").exists()
    found = {}
    for nfe in (3, 4):
        words = ("best", "--model", "gauss", "--dataset", "digits", "--nfe", nfe, "--json")
        found[nfe] = json.loads(lamtune(*words).output)
        assert (found[nfe]["nfe"], found[nfe]["status"]) == (nfe, "finished")
    assert found[3]["job_id"] != found[4]["job_id"]
    with open_store(postgresql_url) as store:
        before = [store.evaluations(job.id) for job in store.jobs()]
        # Once it is over it may be sent again, under another name: what is finished stays as it is.
        repeated = lamtune("submit", files[0], "--wait")
        assert repeated.exit_code == 0, repeated.output
        assert repeated.output.splitlines()[0] == f"{names[0]}-2"
        assert [store.evaluations(job.id) for job in store.jobs()] == before
    with urllib.request.urlopen(f"{two_nodes.dashboard}/api/jobs/") as answer:
        public = answer.read().decode() + "".join(lamtune("logs", name).output for name in names)
    password = make_url(postgresql_url).password
    assert names[0] in public
    assert password not in public
    assert password.split("/")[0] not in public


def test_cancel_stops_the_driver_through_the_store_and_the_job_can_go_on(lamtune, write, postgresql_url):
    long = write("long.yaml", search={**JOB["search"], "images": 200_000, "rungs": [100]})
    name = lamtune("submit", long).output.strip()
    with open_store(postgresql_url) as store:
        until(lambda: store.jobs() and any(e.rungs for e in store.evaluations(1)))
        assert "running\n  last sign of life" in lamtune("status", 1).output
        assert lamtune("cancel", 1).output == "job 1 will stop within some seconds\n"
        assert "FAILED" in until(lambda: over(lamtune, name))
        assert (store.job(1).status, store.job(1).finished_at is None) == ("cancelled", False)
        assert "job 1 was cancelled; submit it again to go on" in lamtune("logs", name).output
        second = lamtune("cancel", 1)
        assert (second.exit_code, "cancelled already" in second.output) == (1, True)
        again = lamtune("submit", long).output.strip()
        assert again == f"{name}-2"
        until(lambda: store.job(1).status == "running")
        until(lambda: "RUNNING" in lamtune("status", again).output)
        assert lamtune("cancel", again).exit_code == 0
        assert "STOPPED" in until(lambda: over(lamtune, again))
        assert store.job(1).status == "cancelled"
        resumed = lamtune("resume", 1).output.strip()
        assert resumed not in (name, again)
        until(lambda: store.job(1).status == "running")
        assert lamtune("resume", 1).output.splitlines()[0] == resumed  # not sent twice
        assert lamtune("cancel", resumed).exit_code == 0
        assert "STOPPED" in until(lambda: over(lamtune, resumed))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"dataset": {"name": "d", "reference": "/nowhere/stats.npz"}}, "/nowhere/stats.npz"),
        ({"resources": {"labels": {"zone": "c"}}}, "resources.labels: no node has {'zone': 'c'}"),
    ],
)
def test_what_the_cluster_cannot_do_is_in_the_log_with_its_exit_code(lamtune, write, sections, message):
    result = lamtune("submit", write("job.yaml", **sections), "--wait")
    assert result.exit_code == 2
    assert message in result.output


def test_a_file_that_only_the_driver_sees_is_named_with_the_node(two_nodes, write, monkeypatch):
    import subprocess
    import sys

    script = """
import os, sys
from pathlib import Path
import ray
from search import pool
from search.spec import load
ray.init(address=sys.argv[1], log_to_driver=False)
os.dup2(os.open(sys.argv[2], os.O_RDONLY), 250)
nodes = pool.cluster()
spec = load(sys.argv[2])
pool.check_files(spec, nodes, {"model.path": Path(sys.argv[2])})
pool.check_files(spec, nodes, {"model.path": Path("/proc/self/fd/250")})
"""
    words = [sys.executable, "-c", script, two_nodes.gcs, str(write("job.yaml"))]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    result = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert "InputError: model.path: /proc/self/fd/250: no such file or folder (node " in result.stderr


def test_a_password_is_not_sent(lamtune, write, two_nodes):
    result = lamtune("submit", write("job.yaml"), "--store", "postgresql://me:hush-hush@host/name")
    assert result.exit_code == 2
    assert "set LAMTUNE_STORE or PGPASSWORD" in result.output
    assert "hush-hush" not in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["submit", "--store", "sqlite:///x.db"], "PostgreSQL"),
        (["submit", "--cluster", "http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer"),
        (["submit", "--cluster", "ray://127.0.0.1:10001"], "write http://HEAD:8265"),
        (["submit", "--cluster", "http://me:hush-hush@host:1"], "write http://HEAD:8265"),
        (["submit", "--cluster", "http://host:port"], "write http://HEAD:8265"),
        (["submit", "--cluster", "auto"], "set LAMTUNE_STORE where the cluster runs"),
        (["status", "lamtune-x"], "which cluster"),
        (["logs", "lamtune-x", "--cluster", "auto"], "which cluster"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_once(words, message, write):
    if words[0] == "submit":
        words.insert(1, str(write("job.yaml")))
        if "--cluster" not in words:
            words += ["--cluster", "http://127.0.0.1:1"]
    result = CliRunner(env={"LAMTUNE_STORE": None, "LAMTUNE_CLUSTER": None}).invoke(main, words)
    assert result.exit_code == 2
    assert message in result.output
    assert "hush-hush" not in result.output


def test_a_submission_that_is_not_there_is_named(lamtune):
    for command in ("status", "logs", "cancel"):
        result = lamtune(command, "lamtune-x")
        assert (result.exit_code, "has no submission lamtune-x" in result.output) == (1, True)
