"""alpha and sigma of a training process, and the rounding to pixels."""

import numpy as np
import pytest
import torch

from samplers.errors import InputError
from samplers.grids import training_betas
from samplers.models.process import Process


def test_discrete_coefficients_are_roots_of_the_product_of_one_minus_beta() -> None:
    betas = training_betas("cosine", 50)
    process = Process(betas=betas)
    assert process.time == "discrete"
    for index in (0, 17, 49):
        alpha, sigma = process.coefficients(float(index))
        assert alpha**2 == pytest.approx(np.prod(1 - betas[: index + 1]), rel=1e-12)
        assert alpha**2 + sigma**2 == pytest.approx(1, rel=1e-14)


def test_in_sigma_time_the_time_is_sigma_and_alpha_is_one() -> None:
    process = Process(sigma_range=(0.0, float("inf")))
    assert process.time == "sigma"
    assert process.coefficients(2.5) == (1.0, 2.5)


@pytest.mark.parametrize("limits", [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_a_sigma_range_that_is_none_is_refused(limits: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="sigma_min < sigma_max"):
        Process(sigma_range=limits)


def test_options_name_either_process() -> None:
    discrete = Process.of("discrete", "linear", 100, 0.0, 0.0)
    assert discrete.betas is not None
    assert np.array_equal(discrete.betas, training_betas("linear", 100))
    assert Process.of("sigma", "", 0, 0.1, 9.0).sigma_range == (0.1, 9.0)


def test_pixels_of_sigma_models_are_half_a_step_above_those_of_discrete_ones() -> None:
    x = torch.tensor([-1.5, -1.0, -0.0001, 0.0, 0.0039, 0.99, 1.0, 2.0], dtype=torch.float64)
    discrete = Process.of("discrete", "linear", 100, 0.0, 0.0).pixels(x)
    sigma = Process.of("sigma", "", 0, 0.1, 9.0).pixels(x)
    assert discrete.dtype == sigma.dtype == torch.uint8
    assert discrete.tolist() == [0, 0, 127, 127, 127, 253, 255, 255]
    assert sigma.tolist() == [0, 0, 127, 128, 128, 254, 255, 255]
