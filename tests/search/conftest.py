"""Fixtures of the search tests: a Ray of their own, and a cluster of two nodes with a PostgreSQL."""

import logging
import os
import shutil

import pytest
import ray

from benchmarks.servers import RayCluster, until


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
def two_nodes(postgresql_database, tmp_path_factory):
    """A Ray cluster of a head that works on nothing and a worker with the label zone=b and three processors.

    Its own LAMTUNE_STORE is the database of `postgresql_url`, password and all.
    """
    pytest.importorskip("aiohttp", reason="the job server needs the extra [cluster]")
    store = postgresql_database.url.render_as_string(hide_password=False)
    cluster = RayCluster({"LAMTUNE_STORE": store, "LAMTUNE_CACHE": str(tmp_path_factory.mktemp("cache"))})
    try:
        until(lambda: cluster.living() == 1)
        cluster.add(cpus=3)
        until(lambda: cluster.living() == 2)
        yield cluster
    finally:
        cluster.stop()
