"""Timesteps and noise levels."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers.errors import InputError
from samplers.grids import (
    Churn,
    default_sigma_range,
    discrete_grid,
    respaced,
    sigma_grid,
    sigma_levels,
    step_count,
    training_betas,
)


def test_linear_betas_keep_their_end_points_scaled_to_the_number_of_steps() -> None:
    betas = training_betas("linear", 4000)
    assert (betas[0], betas[-1], betas.size) == (pytest.approx(2.5e-5), pytest.approx(0.005), 4000)
    assert np.diff(betas) == pytest.approx((0.005 - 2.5e-5) / 3999)


def test_cosine_betas_follow_the_squared_cosine_until_they_are_capped() -> None:
    betas = training_betas("cosine", 1000)
    abar = np.cumprod(1 - betas)
    f = np.cos((np.arange(1, 1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert abar[:998] == pytest.approx(f[:998] / start, rel=1e-9)
    assert betas[-1] == 0.999


@pytest.mark.parametrize(("name", "steps"), [("linear", 20), ("cosine", 1), ("quadratic", 1000)])
def test_noise_schedule_that_does_not_exist_is_refused(name: str, steps: int) -> None:
    with pytest.raises(InputError, match=r"diffusion_steps|noise_schedule"):
        training_betas(name, steps)


def test_even_respacing_includes_the_first_and_the_last_timestep() -> None:
    assert respaced("5", 1000).tolist() == [0, 250, 500, 749, 999]
    assert respaced("4", 10).tolist() == [0, 3, 6, 9]


def test_sections_are_spaced_on_their_own_and_the_first_take_the_remainder() -> None:
    assert respaced("2,1,3", 11).tolist() == [0, 3, 4, 8, 9, 10]
    assert respaced("0,2", 10).tolist() == [5, 9]


def test_ddim_respacing_strides_from_zero_with_the_smallest_fitting_stride() -> None:
    assert respaced("ddim20", 1000).tolist() == list(range(0, 1000, 50))
    assert respaced("ddim3", 10).tolist() == [0, 4, 8]


def test_empty_respacing_visits_every_timestep() -> None:
    assert respaced("", 7).tolist() == list(range(7))


@given(steps=st.integers(2, 1200), data=st.data())
def test_respacing_visits_as_many_rising_timesteps_as_asked_or_is_refused(steps: int, data: Any) -> None:
    count = data.draw(st.integers(2, steps))
    kept = respaced(str(count), steps)
    assert kept.size == count
    assert (kept[0], kept[-1]) == (0, steps - 1)
    assert (np.diff(kept) > 0).all()
    try:
        strided = respaced(f"ddim{count}", steps)
    except InputError:
        assert count not in {math.ceil(steps / stride) for stride in range(1, steps)}
    else:
        assert strided.size == count
        assert len(set(np.diff(strided).tolist())) == 1


@pytest.mark.parametrize(
    ("respacing", "hint"),
    [
        ("1001", "1000 or fewer"),
        ("600,10", "section 1 of '600,10' has only 500"),
        ("1", "2 or more"),
        ("0", "2 or more"),
        ("ddim70", "ddim67, ddim72 work, and so does the evenly spaced form '70'"),
        ("ddim1", "ddim2"),
        ("ddim2000", "ddim1000"),
        ("fast27", "must look like"),
        ("-5", "must look like"),
        ("20,", "must look like"),
        ("ddim", "must look like"),
    ],
)
def test_impossible_respacing_is_refused_with_what_would_work(respacing: str, hint: str) -> None:
    with pytest.raises(InputError) as refusal:
        respaced(respacing, 1000)
    assert hint in str(refusal.value).replace("ddim63, ", "").replace(", ddim77", "")


@pytest.mark.parametrize("respacing", ["", "ddim25", "10,6,4", "20"])
def test_respaced_process_has_the_signal_levels_of_the_training_process(respacing: str) -> None:
    betas = training_betas("cosine", 1000)
    grid = discrete_grid(betas, respacing)
    assert grid.abar == pytest.approx(np.cumprod(1 - betas)[grid.timestep], rel=1e-9)
    assert grid.abar_prev[0] == 1
    assert (grid.abar_prev[1:] == grid.abar[:-1]).all()
    assert grid.times.tolist() == grid.timestep.tolist()
    assert grid.nfe == grid.timestep.size
    assert grid.posterior_variance[0] == 0


def test_arrays_of_grids_are_read_only() -> None:
    grid = discrete_grid(training_betas("linear", 100), "10")
    with pytest.raises(ValueError, match="read-only"):
        grid.abar[0] = 0.5
    with pytest.raises(ValueError, match="read-only"):
        sigma_grid(5).times[0] = 1.0


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, math.nan])
def test_betas_outside_zero_to_one_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        discrete_grid(np.array([0.1, bad, 0.3]), "")


@pytest.mark.parametrize("discretization", ["edm", "vp", "ve"])
@pytest.mark.parametrize("count", [2, 7, 40])
def test_noise_levels_fall_from_the_largest_to_the_smallest(discretization: Any, count: int) -> None:
    levels = sigma_levels(discretization, count, 0.01, 50.0)
    assert levels.size == count
    assert levels[0] == pytest.approx(50.0, rel=1e-9)
    assert levels[-1] == pytest.approx(0.01, rel=1e-6)
    assert (np.diff(levels) < 0).all()


def test_iddpm_levels_stay_inside_the_range_and_run_out_where_there_are_no_more() -> None:
    levels = sigma_levels("iddpm", 10, 0.01, 50.0)
    assert (np.diff(levels) < 0).all()
    assert levels[0] <= 50.0
    assert levels[-1] >= 0.01
    with pytest.raises(InputError, match="or fewer"):
        sigma_levels("iddpm", 1001, 0.01, 50.0)


def test_vp_default_range_is_that_of_the_vp_process() -> None:
    low, high = default_sigma_range("vp")
    assert low == pytest.approx(math.sqrt(math.exp(19.9e-6 / 2 + 1e-4) - 1), rel=1e-9)
    assert high == pytest.approx(math.sqrt(math.exp(19.9 / 2 + 0.1) - 1), rel=1e-9)


def test_heun_grid_puts_first_stages_at_even_and_corrections_at_odd_evaluations() -> None:
    grid = sigma_grid(7)
    levels = sigma_levels("edm", 4, 0.002, 80.0)
    assert [step.t for step in grid.steps] == [6, 4, 2, 0]
    assert [step.corrected for step in grid.steps] == [True, True, True, False]
    assert grid.times[::-2] == pytest.approx(levels, rel=1e-12)
    assert grid.times[5::-2] == pytest.approx(levels[1:], rel=1e-9)
    assert grid.start == 80.0


def test_euler_grid_has_one_evaluation_per_level() -> None:
    grid = sigma_grid(4, method="euler")
    assert [step.t for step in grid.steps] == [3, 2, 1, 0]
    assert grid.times[::-1] == pytest.approx(sigma_levels("edm", 4, 0.002, 80.0), rel=1e-12)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("discretization", ["edm", "vp", "ve", "iddpm"])
def test_one_evaluation_is_one_step_from_the_largest_level_to_zero(method: Any, discretization: Any) -> None:
    grid = sigma_grid(1, method=method, discretization=discretization, sigma_max=60.0)
    (step,) = grid.steps
    assert not step.corrected
    assert grid.times[0] == pytest.approx(60.0, rel=0.05)
    assert step.length == -grid.times[0]


def test_levels_are_kept_within_what_the_network_was_trained_for() -> None:
    grid = sigma_grid(5, limits=(0.01, 50.0))
    assert (grid.times.min(), grid.times.max()) == (pytest.approx(0.01), pytest.approx(50.0))
    narrower = sigma_grid(5, limits=(0.01, 50.0), sigma_min=0.1, sigma_max=20.0)
    assert (narrower.times.min(), narrower.times.max()) == (pytest.approx(0.1), pytest.approx(20.0))


def test_levels_are_rounded_to_those_the_network_knows() -> None:
    grid = sigma_grid(
        9, sigma_min=0.5, churn=Churn(amount=3.0), round_sigma=lambda sigma: np.round(sigma * 4) / 4
    )
    assert (grid.times * 4 % 1 == 0).all()


def test_churn_raises_the_levels_inside_its_range_by_at_most_the_square_root_of_two() -> None:
    grid = sigma_grid(9, method="euler", churn=Churn(amount=1e6, s_min=1.0, s_max=50.0, noise=1.5))
    levels = sigma_levels("edm", 9, 0.002, 80.0)
    inside = (levels >= 1.0) & (levels <= 50.0)
    factor = grid.times[::-1] / levels
    assert factor == pytest.approx(np.where(inside, math.sqrt(2), 1.0))
    added = np.array([step.noise for step in grid.steps])
    assert added == pytest.approx(np.where(inside, 1.5 * levels, 0.0))


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"nfe": 20}, "19 or 21"),
        ({"nfe": 0}, "at least 1"),
        ({"nfe": 5, "method": "midpoint"}, "'euler' or 'heun'"),
        ({"nfe": 5, "sigma_min": 90.0}, "sigma_min < sigma_max"),
        ({"nfe": 5, "sigma_min": 0.0}, "0 < sigma_min"),
        ({"nfe": 5, "limits": (0.002, 0.001)}, "0.002 .. 0.001"),
        ({"nfe": 5, "alpha": 0.0}, "alpha"),
        ({"nfe": 5, "rho": math.inf}, "rho"),
        ({"nfe": 5, "discretization": "ddim"}, "discretization"),
        ({"nfe": 5, "schedule": "cosine"}, "schedule"),
        ({"nfe": 5, "scaling": "ve"}, "scaling"),
        ({"nfe": 5, "discretization": "vp", "sigma_min": 30.0}, "lower sigma_min"),
    ],
)
def test_impossible_sigma_grid_is_refused_with_the_reason(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        sigma_grid(**options)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"amount": -1.0}, "S_churn"),
        ({"noise": math.nan}, "S_noise"),
        ({"s_min": 2.0, "s_max": 1.0}, "S_min and S_max"),
        ({"s_min": -1.0}, "S_min and S_max"),
    ],
)
def test_impossible_churn_is_refused(options: dict[str, float], key: str) -> None:
    with pytest.raises(InputError, match=f"^{key} must"):
        Churn(**options)


@given(steps=st.integers(1, 500))
def test_step_count_undoes_the_number_of_evaluations(steps: int) -> None:
    assert step_count(2 * steps - 1, "heun") == steps
    assert step_count(steps, "euler") == steps
