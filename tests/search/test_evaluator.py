"""search.evaluator: what was computed once is not computed again, and is the same to the last bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.jobs import GAUSS
from objectives.moments import Moments
from samplers.errors import InputError
from samplers.schedule import Schedule
from search.evaluator import BLOCK, Evaluator, Sampled
from search.spec import FRECHET, JobSpec, parse

JOB = {
    **GAUSS,
    "sampling": [{"solver": "ddim", "nfe": 3, "eta": 0.0}],
}
SCHEDULE = Schedule.uniform(3, 1.02)


def loaded(**sections: Any) -> tuple[JobSpec, Evaluator]:
    spec = parse({**JOB, **sections}, "job.yaml", Path())
    return spec, Evaluator.load(spec, torch.device("cpu"))


@pytest.fixture(scope="module")
def job() -> tuple[JobSpec, Evaluator]:
    return loaded()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the features of one test."""
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path))
    return tmp_path / "features"


def sample(job: tuple[JobSpec, Evaluator], start: int, stop: int, **options: Any) -> Sampled:
    spec, evaluator = job
    return evaluator.sample(spec.sampling[0], options.pop("schedule", SCHEDULE), start, stop, **options)


def same(one: Sampled, other: Sampled) -> bool:
    return one.features.dtype == other.features.dtype and np.array_equal(one.features, other.features)


def test_features_are_in_the_order_of_images_wherever_a_range_begins(job: tuple[JobSpec, Evaluator]) -> None:
    found = sample(job, 100, 400)
    assert (len(found.features), found.computed) == (300, 300)
    assert np.array_equal(sample(job, 250, 300).features, found.features[150:200])


def test_what_is_cached_is_the_same_to_the_last_bit_and_costs_nothing(
    job: tuple[JobSpec, Evaluator], own_cache: Path
) -> None:
    uncached = sample(job, 0, 2 * BLOCK)
    assert not own_cache.exists()
    first = sample(job, 0, 2 * BLOCK, key="k")
    again = sample(job, 0, 2 * BLOCK, key="k")
    assert (first.computed, again.computed) == (2 * BLOCK, 0)
    assert same(uncached, first)
    assert same(first, again)


def test_what_is_cached_in_part_is_computed_in_part(job: tuple[JobSpec, Evaluator], own_cache: Path) -> None:
    whole = sample(job, 100, 4 * BLOCK + 50)
    sample(job, BLOCK, 2 * BLOCK, key="k")
    partly = sample(job, 100, 4 * BLOCK + 50, key="k")
    assert partly.computed == 3 * BLOCK + 50 - 100
    assert same(whole, partly)
    # Blocks at the ends that are not whole are not kept.
    assert sorted(file.name for file in own_cache.glob("*/*/*")) == ["1.npy", "2.npy", "3.npy"]
    assert sample(job, 100, 4 * BLOCK + 50, key="k").computed == BLOCK - 100 + 50


def test_a_range_inside_of_a_block_is_computed_and_not_kept(
    job: tuple[JobSpec, Evaluator], own_cache: Path
) -> None:
    assert sample(job, 10, 60, key="k").computed == 50
    assert not own_cache.exists()


def test_another_key_is_other_features(job: tuple[JobSpec, Evaluator]) -> None:
    one = sample(job, 0, BLOCK, key="a")
    other = sample(job, 0, BLOCK, key="b", seed=5)
    assert (one.computed, other.computed) == (BLOCK, BLOCK)
    assert not np.array_equal(one.features, other.features)
    assert same(one, sample(job, 0, BLOCK, key="a"))


def test_a_seed_is_that_of_the_job_unless_another_one_is_asked_for(job: tuple[JobSpec, Evaluator]) -> None:
    spec, evaluator = job
    assert same(sample(job, 0, 20), sample(job, 0, 20, seed=spec.search.seed))
    assert not same(sample(job, 0, 20), sample(job, 0, 20, seed=spec.search.seed + 1))
    reseeded = spec.model_copy(update={"search": spec.search.model_copy(update={"seed": 9})})
    assert same(sample((reseeded, replace(evaluator, seed=9)), 0, 20), sample(job, 0, 20, seed=9))


@pytest.mark.parametrize(
    ("time", "sampling", "parameters"),
    [
        ("discrete", {"solver": "ddim", "nfe": 3, "eta": 0.0}, {"eta": 0.7}),
        (
            "sigma",
            {"solver": "heun", "nfe": 5, "S_churn": 0.0, "S_noise": 1.0},
            {"S_churn": 10.0, "S_noise": 1.01},
        ),
    ],
)
def test_parameters_are_those_of_a_job_that_has_them(
    time: str, sampling: dict[str, Any], parameters: dict[str, float]
) -> None:
    model = {**JOB["model"], "options": {**JOB["model"]["options"], "time": time}}  # type: ignore[index, dict-item]
    schedule = Schedule.uniform(sampling["nfe"], 1.01)
    plain = loaded(model=model, sampling=[sampling])
    asked = loaded(model=model, sampling=[{**sampling, **parameters}])
    found = sample(plain, 0, 30, schedule=schedule, parameters=parameters)
    assert same(found, sample(asked, 0, 30, schedule=schedule))
    assert not same(found, sample(plain, 0, 30, schedule=schedule))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"S_noise": 1.0}, "S_noise is no number of ddim; it has eta"),
        ({"nfe": 7.0}, "nfe is no number of ddim"),
        ({"eta": 2.0}, "eta must lie between 0 .*not 2"),
    ],
)
def test_a_parameter_that_the_solver_does_not_take_is_named(
    job: tuple[JobSpec, Evaluator], parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sample(job, 0, 2, parameters=parameters)


def test_a_distance_and_its_influences_are_those_of_all_images_however_they_were_split(
    job: tuple[JobSpec, Evaluator],
) -> None:
    _, evaluator = job
    parts = [sample(job, a, b).features for a, b in ((0, 100), (100, 250), (250, 300))]
    for part in parts:
        part.flags.writeable = False  # as Ray hands them out
    distance, influences = evaluator.score(FRECHET, None, parts)
    moments = Moments.of(torch.from_numpy(sample(job, 0, 300).features))
    assert distance == pytest.approx(evaluator.frechet.distance(moments), rel=1e-12)
    whole, together = evaluator.score(FRECHET, None, [sample(job, 0, 300).features])
    assert distance == pytest.approx(whole, rel=1e-12)
    assert influences is not None
    assert together is not None
    assert influences.shape == (300,)
    np.testing.assert_allclose(influences, together, rtol=1e-9, atol=1e-12)
    assert abs(influences.sum()) < 1e-8 * np.abs(influences).sum()
