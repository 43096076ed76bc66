"""The division of predicted noise by λ_t."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers.grids import discrete_grid, sigma_grid, training_betas
from samplers.prediction import Predict, Prediction
from samplers.scaling import scaled
from samplers.schedule import Schedule
from samplers.solvers import ddim, ddpm, edm


def bent(x: Tensor, t: int) -> Prediction:
    return Prediction(torch.sin(3 * x + t), torch.cos(2 * x))


def test_eps_is_divided_by_the_lambda_of_its_evaluation_and_v_is_left_alone() -> None:
    x = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    predict = scaled(bent, Schedule.free([2.0, 4.0]))
    for t, divisor in ((0, 2.0), (1, 4.0)):
        eps, v = predict(x, t)
        assert torch.equal(eps, bent(x, t).eps / divisor)
        assert v is not None
        assert torch.equal(v, torch.cos(2 * x))


@settings(deadline=None)
@given(seed=st.integers(0, 2**31))
def test_lambda_of_one_changes_no_bit_of_any_solver(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, 2, 2, generator=generator)
    draws = torch.randn(9, 2, 1, 2, 2, generator=generator)
    discrete = discrete_grid(training_betas("linear", 100), "9")
    levels = sigma_grid(9)

    def noise(t: int) -> Tensor:
        return draws[t]

    def outputs(predict: Predict) -> list[Tensor]:
        return [
            ddpm(predict, x, discrete, noise, variance="learned_range"),
            ddim(predict, x, discrete, noise, eta=0.5),
            edm(predict, levels.start * x.double(), levels, noise),
        ]

    for plain, wrapped in zip(outputs(bent), outputs(scaled(bent, Schedule.uniform(9, 1.0))), strict=True):
        assert torch.equal(plain, wrapped)


def test_evaluation_beyond_the_schedule_is_an_error() -> None:
    with pytest.raises(IndexError):
        scaled(bent, Schedule.uniform(2, 1.0))(torch.zeros(1, 1, 1, 1), 2)
