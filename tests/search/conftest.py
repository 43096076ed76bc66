"""Fixtures of the search tests: a Ray of their own, and the smallest jobs that are still real."""

import logging

import pytest
import ray


@pytest.fixture(scope="session")
def local_ray():
    """A Ray with four logical processors, shared by the tests that do not start one themselves."""
    if ray.is_initialized():
        ray.shutdown()
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    yield
    ray.shutdown()
