"""Streamed moments: sums that add up."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from objectives.moments import Moments
from samplers.errors import InputError


def features(n: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ torch.randn(
        dim, dim, generator=generator, dtype=torch.float64
    )


@given(st.lists(st.integers(0, 29), max_size=6), st.randoms())
@settings(max_examples=30, deadline=None)
def test_moments_add_up_in_any_split_and_order(cuts: list[int], random: object) -> None:
    x = features(30, 4)
    edges = [0, *sorted(cuts), 30]
    parts = [Moments.of(x[a:b]) for a, b in pairwise(edges)]
    random.shuffle(parts)  # type: ignore[attr-defined]
    total = sum(parts, Moments.zero(4))
    whole = Moments.of(x)
    assert total.n == whole.n == 30
    torch.testing.assert_close(total.mean, whole.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(total.cov, whole.cov, rtol=1e-12, atol=1e-12)


def test_mean_and_covariance_are_those_of_numpy() -> None:
    x = features(50, 6) + 3
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean.numpy(), x.mean(0).numpy(), rtol=1e-13)
    np.testing.assert_allclose(moments.cov.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-11, atol=1e-12)


def test_float32_features_are_accumulated_in_float64() -> None:
    x = features(1000, 3).float() + 100
    exact = Moments.of(x.double())
    assert torch.equal(Moments.of(x).outer, exact.outer)
    assert torch.equal(Moments.of(x).sum, exact.sum)


def test_covariance_is_exactly_symmetric() -> None:
    cov = Moments.of(features(40, 17) * 1e3 + 1).cov
    assert torch.equal(cov, cov.T)


def test_a_mean_of_a_thousand_standard_deviations_leaves_the_covariance_eight_digits() -> None:
    x = features(2000, 8)
    shifted = Moments.of(x + 1000 * x.std()).cov
    torch.testing.assert_close(shifted, Moments.of(x).cov, rtol=0, atol=1e-8 * float(x.var()))


def test_too_few_images_for_a_mean_or_a_covariance_are_named() -> None:
    with pytest.raises(InputError, match="at least 1 image"):
        _ = Moments.zero(3).mean
    with pytest.raises(InputError, match="at least 2 images, not 1"):
        _ = Moments.of(features(1, 3)).cov


def test_moments_of_different_dimensions_do_not_add() -> None:
    with pytest.raises(AssertionError, match="3 and 4"):
        _ = Moments.zero(3) + Moments.zero(4)
