"""λ_t as a value object."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers.errors import InputError
from samplers.schedule import Schedule


@given(
    nfe=st.integers(1, 1000),
    mean=st.floats(0.9, 1.2),
    spread=st.floats(-0.5, 0.5),
)
def test_constrained_keeps_the_sum_of_the_uniform_schedule(nfe: int, mean: float, spread: float) -> None:
    schedule = Schedule.constrained(nfe, mean, spread / nfe)
    assert math.fsum(schedule.lambdas) == pytest.approx(nfe * mean, rel=1e-12)
    assert schedule.mean == pytest.approx(mean, rel=1e-12)


def test_constrained_gives_the_b_of_the_papers_lsun_schedule() -> None:
    schedule = Schedule.constrained(20, 1.011, 0.0008)
    assert schedule.b == pytest.approx(1.0034, rel=1e-12)
    assert schedule.k == 0.0008
    assert schedule.lambdas[0] == pytest.approx(1.0034, rel=1e-12)
    assert schedule.lambdas[19] == pytest.approx(1.0186, rel=1e-12)


def test_linear_is_k_t_plus_b_and_largest_at_the_start_of_sampling_for_positive_k() -> None:
    schedule = Schedule.linear(5, 0.01, 1.0)
    assert schedule.lambdas == (1.0, 1.01, 1.02, 1.03, 1.04)
    assert max(schedule.lambdas) == schedule.lambdas[schedule.nfe - 1]


def test_uniform_repeats_b_with_slope_zero() -> None:
    schedule = Schedule.uniform(3, 1.017)
    assert schedule.lambdas == (1.017, 1.017, 1.017)
    assert (schedule.k, schedule.b, schedule.nfe) == (0.0, 1.017, 3)


def test_free_list_has_neither_k_nor_b() -> None:
    schedule = Schedule.free([1.0, 1.1])
    assert (schedule.lambdas, schedule.k, schedule.b) == ((1.0, 1.1), None, None)


def test_equal_schedules_are_equal_and_frozen() -> None:
    schedule = Schedule.linear(4, 0.001, 1.0)
    assert schedule == Schedule.linear(4, 0.001, 1.0)
    assert hash(schedule) == hash(Schedule.linear(4, 0.001, 1.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.k = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_lambda_that_is_not_finite_and_positive_is_refused_with_its_place(bad: float) -> None:
    with pytest.raises(InputError, match="evaluation 1"):
        Schedule.free([1.0, bad, 1.0])


def test_linear_schedule_that_falls_to_zero_is_refused() -> None:
    with pytest.raises(InputError, match="k nearer to 0"):
        Schedule.constrained(20, 1.0, 0.2)


def test_empty_schedule_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        Schedule.uniform(0, 1.0)


def test_k_without_b_and_k_b_that_do_not_describe_the_list_are_refused() -> None:
    with pytest.raises(InputError, match="both k and b"):
        Schedule((1.0, 1.0), k=0.0)
    with pytest.raises(InputError, match="not k"):
        Schedule((1.0, 1.2), k=0.1, b=1.0)


def test_first_stages_leaves_heun_corrections_unscaled() -> None:
    assert Schedule.uniform(5, 1.1).first_stages().lambdas == (1.1, 1.0, 1.1, 1.0, 1.1)
    with pytest.raises(InputError, match="odd"):
        Schedule.uniform(4, 1.1).first_stages()
