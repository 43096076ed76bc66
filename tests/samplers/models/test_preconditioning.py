"""The rows of EDM's table 1 against what defines them."""

import math

import numpy as np
import pytest
import torch

from samplers.models.preconditioning import Edm, Iddpm, Preconditioning, Ve, Vp

SIGMAS = [0.002, 0.05, 0.5, 3.0, 80.0]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_edm_keeps_input_and_target_at_variance_one(sigma: float) -> None:
    c, data = Edm(0.5).coefficients(sigma), 0.25
    assert c.scale_in**2 * (sigma**2 + data) == pytest.approx(1, rel=1e-6)
    # c_out² is the variance of x0 - c_skip·x, which c_skip makes smallest.
    assert c.out**2 == pytest.approx((1 - c.skip) ** 2 * data + c.skip**2 * sigma**2, rel=1e-5)
    assert c.skip == pytest.approx(data / (data + sigma**2), rel=1e-6)
    assert c.noise == pytest.approx(math.log(sigma) / 4, rel=1e-6)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_vp_tells_the_network_the_time_of_its_process(sigma: float) -> None:
    c = Vp(19.9, 0.1, 1000).coefficients(sigma)
    time = c.noise / 999
    assert math.sqrt(math.expm1(19.9 * time**2 / 2 + 0.1 * time)) == pytest.approx(sigma, rel=2e-2)
    # The official arithmetic is float32: 1 + sigma² loses the digits of a small sigma.
    assert (time > 1e-3) == (sigma > 0.011)
    assert (c.skip, c.out) == pytest.approx((1, -sigma))
    assert c.scale_in**2 * (1 + sigma**2) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_ve_leaves_the_input_alone(sigma: float) -> None:
    c = Ve().coefficients(sigma)
    assert (c.skip, c.out, c.scale_in) == pytest.approx((1, sigma, 1))
    assert c.noise == pytest.approx(math.log(sigma / 2), rel=1e-6)


@pytest.fixture(scope="module")
def iddpm() -> Iddpm:
    """Levels that fall from 1000 to 0, as iDDPM's do."""
    return Iddpm(torch.cat([torch.logspace(3, -2, 1000), torch.zeros(1)]))


def test_iddpm_tells_the_network_the_index_of_the_level(iddpm: Iddpm) -> None:
    for index in (0, 1, 500, 999):
        level = float(iddpm.levels[index])
        c = iddpm.coefficients(level)
        assert c.noise == 999 - index
        assert c.scale_in**2 * (1 + level**2) == pytest.approx(1, rel=1e-6)
        assert (c.skip, c.out) == pytest.approx((1, -level))
    assert iddpm.coefficients(1e-6).noise == -1  # nearest to the last level, 0


def test_iddpm_rounds_to_its_levels(iddpm: Iddpm) -> None:
    levels = iddpm.levels.double().numpy()
    chosen = levels[[3, 400, 998]]
    np.testing.assert_array_equal(iddpm.round_sigma(chosen * 1.001), chosen)
    np.testing.assert_array_equal(iddpm.round_sigma(chosen), chosen)
    assert iddpm.round_sigma(chosen).dtype == np.float64


@pytest.mark.parametrize("rule", [Edm(0.5), Vp(19.9, 0.1, 1000), Ve()])
def test_the_factors_are_single_precision_numbers(rule: Preconditioning) -> None:
    for value in rule.coefficients(0.7):
        assert value == float(np.float32(value))
