"""Fixtures of the search tests: a Ray of their own, and the smallest jobs that are still real."""

import logging
import os

import pytest
import ray


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
