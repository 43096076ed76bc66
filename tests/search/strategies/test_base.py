"""The contract: what identifies a schedule, and how candidates print."""

import math

import pytest

from samplers.errors import InputError
from search.strategies.base import Candidate, Point, State, key


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
