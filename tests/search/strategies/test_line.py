"""The exploration of one coordinate, without noise: the strategy and the surface deal with that."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.strategies import line


def explore(curve: Callable[[float], float], low: float = 0.5, high: float = 1.5) -> dict[float, float]:
    """All values of an exploration from 1 with the step 0.01."""
    values = {1.0: curve(1.0)}
    while (x := line.ask(values, 1.0, 0.01, low, high)) is not None:
        assert x not in values
        assert low <= x <= high
        values[x] = curve(x)
    return values


@pytest.mark.parametrize("least", [0.93, 0.998, 1.0, 1.003, 1.026, 1.2])
def test_a_parabola_is_explored_until_its_window_is_known(least: float) -> None:
    values = explore(lambda x: 30 + 12_000 * (x - least) ** 2)
    found = line.window(values)
    assert found is not None
    assert found[0] == pytest.approx(least, abs=1e-6)
    assert found[1] == pytest.approx(math.sqrt(0.9 / 12_000), rel=0.02)
    assert len(values) <= 14
    assert any(abs(x - least) <= found[1] / 2 for x in values)


def test_the_search_stops_at_an_edge_that_the_curve_falls_to() -> None:
    values = explore(lambda x: 30 - x, high=1.05)
    assert min(values, key=lambda x: values[x]) == 1.05
    assert line.window(values) is None


def test_no_value_is_asked_beyond_one_that_is_not_there_but_nearer_ones_are() -> None:
    values = explore(lambda x: 30 - 100 * x if x < 1.023 else math.inf)
    assert max(x for x in values if values[x] < math.inf) > 1.02
    assert sum(value == math.inf for value in values.values()) < 6


def test_nothing_is_asked_where_the_start_has_no_value() -> None:
    assert line.ask({1.0: math.inf}, 1.0, 0.01, 0.5, 1.5) is None


def test_a_flat_curve_ends() -> None:
    assert len(explore(lambda x: 30.0)) <= 14


def test_numbers_are_rounded_to_a_hundredth_of_the_half_width_or_coarser() -> None:
    assert line.rounded(1.023456789, 0.009) == 1.0235
    assert line.rounded(1.000567891, 0.0004) == 1.00057


@given(
    st.lists(st.one_of(st.floats(0, 100), st.just(math.inf)), min_size=30, max_size=30),
    st.sampled_from([0.01, -0.01]),
)
def test_any_values_end_inside_the_bounds(noise: list[float], step: float) -> None:
    values = {1.0: noise[0]}
    for value in noise[1:]:
        x = line.ask(values, 1.0, step, 0.9, 1.2)
        if x is None:
            break
        assert 0.9 <= x <= 1.2
        assert x not in values
        values[x] = value
    else:
        pytest.fail("it does not end")
