"""Fixtures of the search tests: a Ray of their own, and a cluster of two nodes with a PostgreSQL."""

import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from benchmarks.jobs import new_job
from benchmarks.servers import RayCluster, until
from samplers.sampling import DDPM
from search import planning
from search.figures import grid
from search.spec import SearchSpec
from search.strategies.base import slope
from search.study import Search
from search.tuner import Progress
from storage import Evaluator, open_store


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The folder of caches of these tests, which workers of `local_ray` use whatever a test sets."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMTUNE_CACHE", str(folder))
        yield folder


@pytest.fixture
def forget(cache):
    """forget(): lose the features that were computed before, here and at the start of the test."""

    def forget():
        shutil.rmtree(cache / "features", ignore_errors=True)

    forget()
    return forget


@pytest.fixture(scope="session")
def local_ray(cache):
    """A Ray with at least four logical processors, shared by the tests that do not start one themselves."""
    if ray.is_initialized():
        ray.shutdown()
    os.environ.setdefault("RAY_worker_niceness", "0")  # as in search.pool
    ray.init(
        address="local",
        num_cpus=max(4, len(os.sched_getaffinity(0))),  # a worker takes all cores of the machine
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def worker_cache(tmp_path_factory):
    """The folder of caches of the worker of `two_nodes`, as if it were another host."""
    return tmp_path_factory.mktemp("worker")


@pytest.fixture(scope="session")
def two_nodes(postgresql_database, tmp_path_factory, worker_cache):
    """A Ray cluster of a head that works on nothing and a worker with the label zone=b and three processors.

    Its own LAMTUNE_STORE is the database of `postgresql_url`, password and all.
    """
    pytest.importorskip("aiohttp", reason="the job server needs the extra [cluster]")
    store = postgresql_database.url.render_as_string(hide_password=False)
    cluster = RayCluster({"LAMTUNE_STORE": store, "LAMTUNE_CACHE": str(tmp_path_factory.mktemp("cache"))})
    try:
        until(lambda: cluster.living() == 1)
        cluster.add(cpus=3, LAMTUNE_CACHE=str(worker_cache))
        until(lambda: cluster.living() == 2)
        yield cluster
    finally:
        cluster.stop()


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
            "model_fingerprint": "ef" * 32,
            "sampling": {"variance": "learned"},
            "nfe": 20,
            "strategy": strategy,
            "images": 5000,
            "confirm": 5000,
            "spec": {"model": {"name": "m"}},
            "evaluator": evaluator,
            "versions": {"torch": "2.11.0"},
        } | keys
        made = store.create_job(new_job(**job))
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
