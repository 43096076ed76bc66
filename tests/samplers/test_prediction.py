"""Conversions between what networks predict."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers.errors import InputError
from samplers.prediction import to_epsilon

processes = st.one_of(
    st.floats(0.02, math.pi / 2 - 0.02).map(lambda angle: (math.cos(angle), math.sin(angle))),
    st.floats(0.01, 100.0).map(lambda sigma: (1.0, sigma)),
)


@settings(deadline=None)
@given(process=processes, seed=st.integers(0, 2**31))
def test_every_parametrisation_of_one_prediction_gives_the_same_epsilon(
    process: tuple[float, float], seed: int
) -> None:
    alpha, sigma = process
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 1, 3, 2, 2, generator=generator, dtype=torch.float64)
    x = alpha * x0 + sigma * eps
    v = (alpha * eps - sigma * x0) / math.sqrt(alpha**2 + sigma**2)
    assert to_epsilon("epsilon", eps, x, alpha, sigma) is eps
    for kind, output in (("x0", x0), ("v", v)):
        torch.testing.assert_close(to_epsilon(kind, output, x, alpha, sigma), eps, rtol=1e-10, atol=1e-10)


def test_conversion_keeps_float32() -> None:
    x = torch.ones(1, 1, 2, 2)
    assert to_epsilon("x0", x, x, 0.6, 0.8).dtype == torch.float32
    assert to_epsilon("v", x, x, 0.6, 0.8).dtype == torch.float32


def test_unknown_parametrisation_is_refused() -> None:
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(InputError, match="'score'"):
        to_epsilon("score", x, x, 0.6, 0.8)
