"""search.worker: what a worker refuses, and what it says of the time that it takes."""

import pytest
import torch

from benchmarks.jobs import GAUSS
from objectives.moments import Moments
from samplers.errors import InputError
from samplers.schedule import Schedule
from search.evaluator import Evaluator
from search.spec import parse
from search.worker import SamplerWorker

JOB = {
    **GAUSS,
    "sampling": {"solver": "ddpm", "nfe": 3},
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return parse(JOB, "job.yaml", tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def loaded(spec):
    """What the driver of the job has read."""
    return Evaluator.load(spec, torch.device("cpu"))


@pytest.fixture
def worker(spec):
    return SamplerWorker(spec, "cpu", torch.get_num_threads())


def test_a_network_that_has_changed_since_the_driver_read_it_is_refused(worker, loaded):
    with pytest.raises(
        InputError, match=r"model\.path: .* is not the network with which the job was started"
    ):
        worker.load(loaded.reference, "another one")


def test_every_call_says_how_long_it_took(worker, loaded, spec, forget):
    worker.load(loaded.reference, loaded.model.fingerprint)
    (sampling,), schedule = spec.sampling, Schedule.uniform(3, 1.0)
    features, (computed, sampled) = worker.sample(sampling, schedule, 0, 50, 0, {}, "key")
    assert (len(features), computed) == (50, 50)
    (distance, influences), scored = worker.score(50, features)
    assert distance == loaded.frechet.distance(Moments.of(torch.tensor(features)))
    assert influences.shape == (50,)
    (fewer, _), _ = worker.score(30, features[:20], features[20:])
    assert fewer == pytest.approx(loaded.frechet.distance(Moments.of(torch.tensor(features[:30]))), rel=1e-6)
    (metrics, picture), concluded = worker.conclude(sampling, schedule, 0, {}, features)
    assert (metrics, picture[1:4]) == ({}, b"PNG")
    assert all(0 < seconds < 60 for seconds in (sampled, scored, concluded))
