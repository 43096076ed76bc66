"""Fixtures of the search tests: a Ray of their own, and a cluster of two nodes with a PostgreSQL."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch

from samplers.sampling import DDPM
from search import planning
from search.figures import grid
from search.spec import SearchSpec
from search.strategies.base import slope
from search.study import Search
from search.tuner import Progress
from storage import Evaluator, NewJob, open_store


@pytest.fixture(scope="session")
def local_ray():
    """A Ray with at least four logical processors, shared by the tests that do not start one themselves."""
    if ray.is_initialized():
        ray.shutdown()
    ray.init(
        address="local",
        num_cpus=max(4, len(os.sched_getaffinity(0))),  # a worker takes all cores of the machine
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@dataclass
class TwoNodes:
    """A Ray cluster on this machine: a head that works on nothing, and a worker with the label zone=b."""

    address: str
    gcs: str
    head: subprocess.Popen
    worker: subprocess.Popen


def _free_ports(n):
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="session")
def two_nodes(postgresql_database, tmp_path_factory):
    """Its own LAMTUNE_STORE is the database of `postgresql_url`, password and all."""
    pytest.importorskip("aiohttp", reason="the job server needs the extra [cluster]")
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: it has to hold the names of sockets
    gcs, dashboard, client, *agents = _free_ports(9)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "LAMTUNE_"))},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "LAMTUNE_STORE": postgresql_database.url.render_as_string(hide_password=False),
        "LAMTUNE_CACHE": str(tmp_path_factory.mktemp("cache")),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    own = ["--block", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]

    def start(*words):
        ports = zip(("agent-listen-port", "agent-grpc-port"), (agents.pop(), agents.pop()), strict=True)
        words = [*words, *own, *(f"--dashboard-{name}={port}" for name, port in ports)]
        words.append(f"--metrics-export-port={agents.pop()}")
        return subprocess.Popen(
            ["ray", "start", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    head = start(
        "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
        f"--temp-dir={folder}", "--num-cpus=0", "--num-gpus=0", "--labels=zone=a",
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    worker = None
    try:
        _until(lambda: _nodes(address) == 1, head)
        worker = start(f"--address=127.0.0.1:{gcs}", "--num-cpus=3", "--num-gpus=0", "--labels=zone=b")
        _until(lambda: _nodes(address) == 2, worker)
        yield TwoNodes(address, f"127.0.0.1:{gcs}", head, worker)
    finally:
        for process in filter(None, (worker, head)):
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
            for child in children:
                if child.is_running():
                    child.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _nodes(address):
    """How many nodes of a cluster live."""
    try:
        with urllib.request.urlopen(f"{address}/nodes?view=summary", timeout=5) as answer:
            found = json.load(answer)["data"]["summary"]
    except (urllib.error.URLError, OSError):
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in found)


def _until(condition, process):
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, "ray start has ended"
        assert time.monotonic() < deadline
        time.sleep(0.2)


# --- a search in the store, played without Ray


class Silent:
    """A watcher that shows nothing."""

    def started(self, evaluation, images, expected):
        pass

    def progressed(self, evaluation, images):
        pass

    def ended(self, evaluation):
        pass


def _distance(schedule, images):
    """Least, 30, at mean 1.012 and k 0.0006; more with few images."""
    return 30 + 2e4 * (schedule.mean - 1.012) ** 2 + 2e5 * (slope(schedule) - 0.0006) ** 2 + 2000 / images


@pytest.fixture
def play():
    """play(store, strategy, **job) → Job: a finished search of 5,000 images at NFE 20 whose distances are known, with
    influences and pictures, as Ray's trials would report it."""

    def run(store, strategy="adaptive", **keys):
        search = SearchSpec(strategy=strategy, images=5000)
        evaluator = Evaluator(
            fingerprint="ab" * 32, features="digits", dimension=64, reference="cd", details={}
        )
        job = {
            "study_name": f"{strategy}-{keys.get('nfe', 20)}",
            "model": "m",
            "model_fingerprint": "ef" * 32,
            "dataset": "d",
            "solver": "ddpm",
            "sampling": {"variance": "learned"},
            "nfe": 20,
            "strategy": strategy,
            "images": 5000,
            "confirm": 5000,
            "seed": 0,
            "spec": {"model": {"name": "m"}},
            "evaluator": evaluator,
            "versions": {"torch": "2.11.0"},
        } | keys
        made = store.create_job(NewJob(**job))
        sampling = DDPM("ddpm", made.nfe)
        chosen = planning.strategy(search, sampling, "discrete", 64)
        playing = Search(store, made, chosen, Silent(), rungs=search.all_rungs, context=made.study_name)
        store.claim(made.id, stale_after=20)
        common = np.random.default_rng(0).normal(0, 20, 1000)
        while (config := playing.next_trial("one")) is not None:
            own = np.random.default_rng(len(store.evaluations(made.id))).normal(0, 1, 1000)
            for images in config.rungs:
                influence = (common + own).astype(np.float32)[: images // 5]
                progress = Progress(
                    images, _distance(config.schedule, images), images, 0.01 * images, influence
                )
                if config.measured and images == config.rungs[-1]:
                    grey = 150 if config.schedule.mean > 1 else 100
                    picture = grid(torch.full((4, 1, 8, 8), grey, dtype=torch.uint8))
                    progress = replace(progress, metrics={"recall": 0.5}, picture=picture)
                playing.report("one", progress)
            playing.complete("one", None)
        playing.check()
        return store.set_status(made.id, "finished")

    return run


@pytest.fixture
def store(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/store.db") as opened:
        yield opened
