"""The Fréchet distance against closed forms, torch-fidelity and a formula for low rank."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm  # type: ignore[import-untyped]
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from objectives.frechet import FrechetReference, Gaussian
from objectives.moments import Moments
from samplers.errors import NonFiniteError


def features(n: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    x: Tensor = torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing + shift
    return x


def distance(real: Tensor, generated: Tensor) -> float:
    return FrechetReference.of(Gaussian.of(Moments.of(real))).distance(Moments.of(generated))


def gaussian(mean: list[float], cov: list[list[float]]) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(cov, dtype=torch.float64))


def test_commuting_gaussians_have_the_sum_of_squared_differences_of_deviations() -> None:
    a = gaussian([1, 2, 3], [[4, 0, 0], [0, 9, 0], [0, 0, 0]])
    b = gaussian([1, 0, 3], [[1, 0, 0], [0, 16, 0], [0, 0, 25]])
    assert FrechetReference.of(a).distance(b) == pytest.approx(4 + 1 + 1 + 25, rel=1e-13)


def test_non_commuting_gaussians_match_the_matrix_square_root_of_the_product() -> None:
    a, b = (Moments.of(features(100, 7, seed, shift=seed / 10)) for seed in (1, 2))
    product = sqrtm(a.cov.numpy() @ b.cov.numpy()).real
    shift = float((a.mean - b.mean).square().sum())
    expected = shift + float(a.cov.trace() + b.cov.trace()) - 2 * float(np.trace(product))
    assert FrechetReference.of(Gaussian.of(a)).distance(b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "dim"), [(500, 48), (40, 64)])
def test_distance_is_torch_fidelitys_own(n: int, dim: int) -> None:
    real, generated = features(n, dim, 1, 0.5), features(n, dim, 2, 0.6)
    statistics = [fid_features_to_statistics(x) for x in (real, generated)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert distance(real, generated) == pytest.approx(theirs, rel=1e-6)


def test_rank_deficient_covariances_match_the_nuclear_norm_of_the_factors() -> None:
    # With C = centred features/sqrt(n-1), tr (Σr^½ Σg Σr^½)^½ is the sum of singular values of Cr Cgᵀ, which
    # involves no square root of a rounded zero.
    real, generated = features(20, 50, 3), features(30, 50, 4)
    factors = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (real, generated)]
    overlap = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    shift = (real.mean(0) - generated.mean(0)).square().sum()
    expected = shift + sum(f.square().sum() for f in factors) - 2 * overlap
    assert distance(real, generated) == pytest.approx(float(expected), rel=1e-6)


def test_distance_is_the_same_for_moments_added_in_any_split() -> None:
    real, generated = features(300, 16, 5), features(300, 16, 6)
    reference = FrechetReference.of(Gaussian.of(Moments.of(real)))
    whole = reference.distance(Moments.of(generated))
    for size in (1, 7, 299):
        parts = [Moments.of(part) for part in torch.split(generated, size)]
        assert reference.distance(sum(parts, Moments.zero(16))) == pytest.approx(whole, rel=1e-9)


def test_distance_is_symmetric_and_zero_to_itself() -> None:
    a, b = features(200, 12, 7), features(200, 12, 8)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)


def test_root_squares_to_the_covariance() -> None:
    reference = FrechetReference.of(Gaussian.of(Moments.of(features(100, 9, 9))))
    torch.testing.assert_close(reference.root @ reference.root, reference.gaussian.cov)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    real, generated = features(20, 4, 1), features(20, 4, 2)
    generated[3, 1] = bad
    with pytest.raises(
        NonFiniteError, match="the mean of the features has 1 NaN or infinite entries out of 4"
    ):
        distance(real, generated)
    with pytest.raises(NonFiniteError, match="the covariance of the features"):
        Gaussian(torch.zeros(2, dtype=torch.float64), torch.full((2, 2), bad, dtype=torch.float64))


def test_statistics_of_another_dimension_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        distance(features(20, 4, 1), features(20, 5, 1))
