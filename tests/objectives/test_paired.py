"""objectives.paired: error bars of differences on the same random numbers, and their coverage."""

import math

import numpy as np
import pytest
import torch

from objectives.frechet import FrechetReference, Gaussian
from objectives.influence import Sensitivity
from objectives.moments import Moments
from objectives.paired import (
    BLOCK,
    block_means,
    covariance,
    difference_error,
    first,
    pack,
    packed_difference_error,
    standard_error,
    unpack,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_blocks_are_means_of_consecutive_images_and_the_rest_is_a_short_one() -> None:
    means = block_means(np.arange(12.0))
    assert means.dtype == np.float32
    assert means.tolist() == [2.0, 7.0, 10.5]
    assert block_means(np.arange(3.0)).tolist() == [1.0]
    assert block_means(np.arange(10.0)).tolist() == [2.0, 7.0]


@pytest.mark.parametrize("images", [BLOCK, 2 * BLOCK, 12, 23])
def test_the_first_images_have_the_first_blocks(images: int) -> None:
    influences = np.random.default_rng(0).normal(size=100)
    whole = images // BLOCK
    assert len(first(block_means(influences), images)) == len(block_means(influences[:images]))
    assert np.array_equal(
        first(block_means(influences), images)[:whole], block_means(influences[:images])[:whole]
    )


def test_what_is_packed_is_unpacked_on_any_machine() -> None:
    influence = np.array([1.5, -0.25, 3e-7], dtype=np.float32)
    assert pack(influence) == np.array([1.5, -0.25, 3e-7], dtype="<f4").tobytes()
    assert pack(influence.astype(">f4")) == pack(influence)
    found = unpack(pack(influence))
    assert found is not None
    assert np.array_equal(found, influence)
    assert found.dtype == np.float32
    found[0] = 1.0  # nobody else's memory
    assert unpack(b"") is None


@pytest.mark.parametrize("images", [1, BLOCK, BLOCK + 1, 500])
def test_the_error_of_a_difference_is_the_same_from_what_is_packed(images: int) -> None:
    one, other = (np.random.default_rng(seed).normal(size=100).astype(np.float32) for seed in (2, 3))
    wanted = difference_error(first(one, images), first(other, images))
    assert packed_difference_error(pack(one), pack(other), images) == pytest.approx(wanted, rel=1e-6)
    assert (wanted > 0) == (images > BLOCK)


def test_the_error_of_a_mean_of_blocks_is_that_of_independent_numbers() -> None:
    influence = np.random.default_rng(1).normal(size=400).astype(np.float32)
    assert standard_error(influence) == pytest.approx(np.std(influence, ddof=1) / 20, rel=1e-5)
    assert standard_error(influence[:1]) == 0


def test_covariances_of_several_distances_hold_the_errors_of_their_differences() -> None:
    numbers = np.random.default_rng(2)
    shared = numbers.normal(size=200)
    several = [(shared + 0.2 * numbers.normal(size=200)).astype(np.float32) for _ in range(3)]
    found = covariance(several)
    assert found.shape == (3, 3)
    for i, one in enumerate(several):
        for j, other in enumerate(several):
            paired = found[i, i] + found[j, j] - 2 * found[i, j]
            assert difference_error(one, other) == pytest.approx(math.sqrt(max(paired, 0)), abs=1e-6)
    assert difference_error(several[0], several[1]) < standard_error(several[0]) / 2


def test_the_nominal_interval_of_a_difference_holds_as_often_as_it_says() -> None:
    """The coverage of difference ± 1.96·error over repeated pairs on the same random numbers."""
    dim, n, repetitions = 4, 200, 400
    numbers = torch.Generator().manual_seed(3)
    scales = torch.linspace(1.2, 0.6, dim, dtype=torch.float64)
    real = FrechetReference.of(Gaussian(torch.zeros(dim, dtype=torch.float64), torch.diag(scales**2)))
    differences, errors, unpaired = [], [], []
    for _ in range(repetitions):
        shared = torch.randn(n, dim, generator=numbers, dtype=torch.float64)
        own = torch.randn(n, dim, generator=numbers, dtype=torch.float64)
        pair = []
        for x in (1.3 * scales * shared + 0.2, 1.25 * scales * (shared + 0.1 * own) + 0.15):
            moments = Moments.of(x)
            influence = block_means(Sensitivity.of(real, moments).influences(x).numpy())
            pair.append((real.distance(moments), influence))
        (one, mine), (other, theirs) = pair
        differences.append(one - other)
        errors.append(difference_error(mine, theirs))
        unpaired.append(math.hypot(standard_error(mine), standard_error(theirs)))
    # What n images give in the mean: the distance's bias at finite n is part of the question, not of its error.
    truth = np.mean(differences)
    held = np.mean(np.abs(np.array(differences) - truth) <= 1.96 * np.array(errors))
    assert 0.9 <= held <= 0.99, held
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.12)
    assert np.mean(errors) < np.mean(unpaired) / 2
