"""The contract: what identifies a schedule, and how candidates print."""

import math

import numpy as np
import pytest

from samplers.errors import InputError
from samplers.schedule import Schedule
from search.strategies.base import Candidate, Point, State, bend_basis, bends, key, slope


def test_a_candidate_prints_as_people_write_it() -> None:
    candidate = Candidate("fine", 1 + 17 * 0.001, 3 * 0.0002)
    assert (repr(candidate.mean), repr(candidate.k)) == ("1.017", "0.0006")


def test_a_candidate_has_no_negative_zero() -> None:
    assert math.copysign(1, Candidate("k", 1, -0.0).k) == 1


def test_the_same_schedule_has_the_same_key_however_it_was_computed() -> None:
    point = Point(1.003, 0.1 + 0.2, "complete", 3.0, 100)
    assert point.key == Candidate("b", 1.0 + 3 * 0.001, 0.3).key == key(1.003, 0.3)
    assert key(1.003, 0) != key(1.003000002, 0)


def test_a_candidate_keeps_the_sum_of_its_schedule() -> None:
    schedule = Candidate("k", 1.011, 0.0008).schedule(20)
    assert schedule.nfe == 20
    assert math.fsum(schedule.lambdas) == pytest.approx(20 * 1.011, abs=1e-12)
    assert schedule.b == pytest.approx(1.0034, abs=1e-12)  # the paper's own example
    assert schedule.lambdas[19] - schedule.lambdas[0] == pytest.approx(19 * 0.0008, abs=1e-12)


def test_a_schedule_that_would_reach_zero_is_refused() -> None:
    with pytest.raises(InputError, match="λ"):
        Candidate("k", 1.0, 0.2).schedule(20)


@pytest.mark.parametrize(
    ("mean", "k"), [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan)]
)
def test_a_candidate_that_is_no_schedule_cannot_be_made(mean: float, k: float) -> None:
    with pytest.raises(AssertionError):
        Candidate("b", mean, k)


@pytest.mark.parametrize(("state", "images"), [("stopped", 1), ("complete", -1)])
def test_a_point_that_no_store_holds_cannot_be_made(state: State, images: int) -> None:
    with pytest.raises(AssertionError):
        Point(1.0, 0.0, state, None, images)


# --- schedules that are no lines --------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 2, 3, 5, 10, 20])
def test_the_mean_k_and_bends_span_every_list_of_lambdas(nfe: int) -> None:
    basis = bend_basis(nfe)
    assert basis.shape == (max(nfe - 2, 0), nfe)
    t = np.arange(nfe) - (nfe - 1) / 2
    whole = np.vstack([np.ones(nfe), t, basis]) if nfe > 1 else np.ones((1, 1))
    assert np.linalg.matrix_rank(whole) == nfe
    gram = whole @ whole.T
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-9  # orthogonal: one coefficient moves no other
    assert np.allclose(np.abs(basis).max(axis=1), 1)


@pytest.mark.parametrize("nfe", [3, 5, 10])
def test_a_bend_is_a_polynomial_of_its_degree(nfe: int) -> None:
    t = np.arange(nfe)
    for degree, row in enumerate(bend_basis(nfe), 2):
        assert np.allclose(np.polyval(np.polyfit(t, row, degree), t), row, atol=1e-8)
        assert not np.allclose(np.polyval(np.polyfit(t, row, degree - 1), t), row, atol=1e-3)
        assert row[-1] > 0


@pytest.mark.parametrize("nfe", [3, 4, 10, 50])
def test_bends_and_slope_find_what_a_schedule_was_made_of(nfe: int) -> None:
    numbers = np.random.default_rng(nfe)
    for _ in range(20):
        bent = tuple(numbers.uniform(-0.02, 0.02, size=min(nfe - 2, 8)))
        candidate = Candidate(
            "bend", 1 + numbers.uniform(-0.05, 0.05), numbers.uniform(-1, 1) * 0.1 / nfe, bent
        )
        schedule = candidate.schedule(nfe)
        assert (schedule.k, schedule.b) == (None, None)
        assert schedule.mean == pytest.approx(candidate.mean, abs=1e-9)
        assert slope(schedule) == pytest.approx(candidate.k, abs=1e-9)
        assert bends(schedule) == pytest.approx(candidate.bends, abs=1e-9)
        point = Point(schedule.mean, slope(schedule), "complete", 5.0, 100, bends(schedule))
        assert point.setting == candidate.setting


def test_a_line_has_no_bends() -> None:
    for schedule in (
        Schedule.linear(20, 0.0008, 1.0034),
        Schedule.uniform(7, 1.01),
        Schedule.uniform(1, 1.1),
    ):
        assert bends(schedule) == ()
        assert bends(Schedule.free(schedule.lambdas)) == ()
    assert slope(Schedule.free(Schedule.linear(20, 0.0008, 1.0034).lambdas)) == pytest.approx(
        0.0008, abs=1e-12
    )
    line = Candidate("bend", 1.01, 0.002, bends=(0.0, 1e-12))
    assert line.bends == ()
    assert line.schedule(20) == Schedule.constrained(20, 1.01, 0.002)


def test_a_setting_is_the_same_whatever_the_order_of_parameters_and_the_images() -> None:
    one = Candidate("a", 1.01, 0, (0.1,), (("b", 0.1 + 0.2), ("a", 1.0)), images=50)
    other = Candidate("b", 1.01 + 1e-13, -0.0, (0.1, 0.0), (("a", 1.0), ("b", 0.3)), fresh=True)
    assert one.setting == other.setting
    point = Point(1.01, 0, "complete", 5.0, 100, (0.1, 0.0), (("b", 0.3), ("a", 1.0)))
    assert (*point.setting[:2], point.setting[3]) == (*one.setting[:2], one.setting[3])
    assert one.setting != Candidate("a", 1.01, 0, (0.1,), (("a", 1.0),)).setting
    assert one.setting != Candidate("a", 1.01, 0, (), one.parameters).setting


def test_a_bend_that_would_reach_zero_is_refused() -> None:
    with pytest.raises(InputError, match="λ"):
        Candidate("bend", 1.0, 0, (1.5,)).schedule(5)


def test_a_distance_counts_where_it_was_measured_and_finite() -> None:
    point = Point(1, 0, "pruned", 3.0, 100, rungs={50: 4.0, 75: math.nan, 100: 3.0})
    assert [point.at(n) for n in (50, 75, 100, 60)] == [4.0, math.inf, 3.0, math.inf]
    assert Point(1, 0, "complete", 3.0, 100).at(100) == 3.0
    assert Point(1, 0, "failed", 3.0, 100, rungs={100: 3.0}).at(100) == math.inf
    assert Point(1, 0, "running", None, 0).at(0) == math.inf
