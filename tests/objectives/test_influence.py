"""objectives.influence: the derivative of the distance by images, and the error bars that follow from it."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from objectives.frechet import FrechetReference, Gaussian
from objectives.influence import Sensitivity
from objectives.moments import Moments
from objectives.paired import block_means, difference_error, standard_error
from samplers.errors import InputError, NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")

Floats = NDArray[np.float64]
DIM = 6


def features(n: int, seed: int = 0, dim: int = DIM) -> torch.Tensor:
    """Features of another Gaussian than the reference's, with correlations."""
    numbers = torch.Generator().manual_seed(seed)
    mixing = torch.eye(dim, dtype=torch.float64) + 0.3 * torch.ones(dim, dim, dtype=torch.float64).tril()
    return torch.randn(n, dim, generator=numbers, dtype=torch.float64) @ mixing + 0.2


@pytest.fixture(scope="module")
def reference() -> FrechetReference:
    numbers = torch.Generator().manual_seed(99)
    root = torch.randn(DIM, DIM, generator=numbers, dtype=torch.float64)
    return FrechetReference.of(
        Gaussian(torch.zeros(DIM, dtype=torch.float64), root @ root.T / DIM + 0.2 * torch.eye(DIM))
    )


def weighted(reference: FrechetReference, x: torch.Tensor, weights: torch.Tensor) -> float:
    """The distance of images with weights that sum to their number; the covariance's divisor stays n − 1."""
    n = len(x)
    mean = (weights[:, None] * x).sum(0) / n
    centred = x - mean
    return reference.distance(Gaussian(mean, (weights[:, None] * centred).T @ centred / (n - 1)))


def test_influences_sum_to_zero(reference: FrechetReference) -> None:
    for n in (4, 50, 1000):  # fewer than dimensions, too
        x = features(n)
        influences = Sensitivity.of(reference, Moments.of(x)).influences(x)
        assert influences.shape == (n,)
        assert influences.dtype == torch.float64
        assert abs(float(influences.sum())) < 1e-9 * float(influences.abs().sum())


def test_an_influence_is_the_derivative_of_the_distance_by_the_weight_of_an_image(
    reference: FrechetReference,
) -> None:
    n, step = 80, 1e-4
    x = features(n)
    influences = Sensitivity.of(reference, Moments.of(x)).influences(x)
    for i in (0, 17, 79):
        ends = []
        for sign in (1, -1):
            # The distribution (1 − s)·P + s·δ_i, in weights that sum to n.
            weights = torch.full((n,), 1 - sign * step, dtype=torch.float64)
            weights[i] += sign * step * n
            ends.append(weighted(reference, x, weights))
        slope = (ends[0] - ends[1]) / (2 * step)
        # The distance's covariance has the divisor n − 1, which influences are exact for up to that factor.
        assert float(influences[i]) == pytest.approx(slope, rel=3 / n, abs=3 / n)


def test_the_standard_error_is_the_spread_of_repeated_distances() -> None:
    real = diagonal(6)
    distances, errors, _ = repeated(real, 6, 600)
    assert np.mean(errors[0]) == pytest.approx(np.std(distances[0]), rel=0.12)  # 250 know a spread to 5 %


def test_with_fewer_images_than_features_differences_keep_their_error_and_distances_get_too_large_a_one() -> (
    None
):
    """The distance is far from linear in so few images; what two schedules share of that cancels."""
    real = diagonal(60)
    for n in (30, 60):
        distances, errors, paired = repeated(real, 60, n)
        assert 1 < np.mean(errors[0]) / np.std(distances[0]) < 1.6
        assert np.mean(paired) == pytest.approx(np.std(distances[0] - distances[1]), rel=0.25)


def diagonal(dim: int) -> FrechetReference:
    scales = torch.linspace(1.5, 0.3, dim, dtype=torch.float64)
    return FrechetReference.of(Gaussian(torch.zeros(dim, dtype=torch.float64), torch.diag(scales**2)))


def repeated(real: FrechetReference, dim: int, n: int) -> tuple[Floats, Floats, Floats]:
    """Distances [2, 250] of two schedules that share most of their noise, their errors, and the paired error [250]."""
    numbers = torch.Generator().manual_seed(5)
    scales = torch.linspace(1.5, 0.3, dim, dtype=torch.float64)
    distances, errors, paired = [], [], []
    for _ in range(250):
        shared, own = (torch.randn(n, dim, generator=numbers, dtype=torch.float64) for _ in range(2))
        found = []
        for x in (1.2 * scales * shared + 0.1, 1.15 * scales * (shared + 0.1 * own) + 0.05):
            moments = Moments.of(x)
            found.append(
                (real.distance(moments), block_means(Sensitivity.of(real, moments).influences(x).numpy()))
            )
        distances.append([distance for distance, _ in found])
        errors.append([standard_error(influence) for _, influence in found])
        paired.append(difference_error(found[0][1], found[1][1]))
    return np.array(distances).T, np.array(errors).T, np.array(paired)


def test_features_of_any_float_type_and_read_only_arrays_will_do(reference: FrechetReference) -> None:
    x = features(30)
    sensitivity = Sensitivity.of(reference, Moments.of(x))
    assert torch.allclose(sensitivity.influences(x.float()), sensitivity.influences(x), atol=1e-5)


def test_what_the_distance_refuses_has_no_influences(reference: FrechetReference) -> None:
    with pytest.raises(InputError, match="2 images"):
        Sensitivity.of(reference, Moments.of(features(1)))
    broken = features(10)
    broken[3, 2] = math.nan
    with pytest.raises(NonFiniteError):
        Sensitivity.of(reference, Moments.of(broken))
