"""search.strategies.confirm: what is measured on fresh random numbers, in which order, and that it always ends."""

import itertools
import random

import numpy as np
import pytest

from search.strategies.base import FINISHED, WAIT, Candidate, Point, Signal, State, Step
from search.strategies.confirm import Confirmed
from search.strategies.paper import PaperStrategy
from storage import CONFIRM

IMAGES = 1000
MEANS = (1.02, 1.03, 1.04)


class Known:
    """A search of one trial whose finalists are given."""

    def __init__(self, *finalists: Candidate) -> None:
        self.given = finalists

    def next(self, history: list[Point]) -> Step:
        if any(p.state == "running" for p in history):
            return WAIT
        return FINISHED if history else (Candidate("baseline", 1, 0, images=100),)

    def finalists(self, history: list[Point]) -> tuple[Candidate, ...]:
        return self.given if history else ()

    def expected_trials(self, history: list[Point]) -> int:
        return 1


def point(
    candidate: Candidate, state: State = "complete", distance: float | None = 5.0, noise: float = 0.0
) -> Point:
    influence = np.random.default_rng(0).normal(size=IMAGES // 5).astype(np.float32)
    images = candidate.images or IMAGES
    if state == "running":
        images = 250
    own = np.random.default_rng(round(1e4 * candidate.mean)).normal(scale=noise, size=IMAGES // 5)
    return Point(
        candidate.mean,
        candidate.k,
        state,
        distance,
        images,
        candidate.bends,
        candidate.parameters,
        candidate.fresh,
        {} if distance is None else dict.fromkeys((250, 500, images), distance),
        (influence + own).astype(np.float32),
    )


@pytest.fixture
def confirmed() -> Confirmed:
    return Confirmed(Known(*(Candidate("final", mean, 0) for mean in MEANS)), IMAGES, 3)


SEARCHED = [point(Candidate("baseline", 1, 0, images=100))]


def test_the_search_goes_first_and_sees_no_fresh_points(confirmed: Confirmed) -> None:
    assert confirmed.next([]) == (Candidate("baseline", 1, 0, images=100),)
    assert confirmed.finalists(SEARCHED) == tuple(Candidate("final", mean, 0) for mean in MEANS)
    assert confirmed.next([point(Candidate("x", 1, 0, fresh=True))]) == (
        Candidate("baseline", 1, 0, images=100),
    )


def test_the_baseline_and_then_the_finalists_are_measured_once_each_and_best_first(
    confirmed: Confirmed,
) -> None:
    history, order = list(SEARCHED), []
    while not isinstance(step := confirmed.next(history), Signal):
        wanted = step[0]
        assert (wanted.phase, wanted.images, wanted.fresh) == (CONFIRM, IMAGES, True)
        order.append(wanted.mean)
        assert confirmed.next([*history, point(wanted, "running")]) is WAIT
        history.append(point(wanted))
    assert step is FINISHED
    assert order == [1, *MEANS]
    assert confirmed.expected_trials(SEARCHED) == confirmed.expected_trials(history) == len(history)


def test_finalists_that_are_the_baseline_or_each_other_are_measured_once() -> None:
    twice = Candidate("final", 1.02, 0)
    strategy = Confirmed(Known(Candidate("final", 1, 0), twice, twice), IMAGES, 3)
    step = strategy.next(SEARCHED)
    assert not isinstance(step, Signal)
    assert [c.mean for c in step] == [1, 1.02]


def test_a_schedule_with_other_parameters_is_another_finalist() -> None:
    strategy = Confirmed(Known(Candidate("final", 1, 0, parameters=(("eta", 0.5),))), IMAGES, 3)
    step = strategy.next(SEARCHED)
    assert not isinstance(step, Signal)
    assert [c.parameters for c in step] == [(), (("eta", 0.5),)]


def test_only_finalists_after_the_first_are_stopped_and_only_when_they_have_lost(
    confirmed: Confirmed,
) -> None:
    step = confirmed.next(SEARCHED)
    assert not isinstance(step, Signal)
    baseline, best, *others = step
    done = [*SEARCHED, point(baseline, distance=5.0), point(best, distance=4.0)]
    for candidate, lost in ((baseline, False), (best, False), (others[0], True)):
        running = point(candidate, "running", 9.0, noise=0.1)
        assert confirmed.has_lost([*done, running], running) == lost
    close = point(others[0], "running", 4.001, noise=0.1)
    assert not confirmed.has_lost([*done, close], close)
    # A rival that failed, or one that is still running, decides nothing.
    running = point(others[0], "running", 9.0, noise=0.1)
    assert not confirmed.has_lost(
        [*SEARCHED, point(baseline, "failed", 5.0), point(best, "pruned", 4.0)], running
    )
    searched = point(Candidate("b", 1.2, 0), "running", 9.0)
    assert not confirmed.has_lost([*done, searched], searched)


def test_a_finalist_with_many_rivals_needs_more_evidence_than_with_one(confirmed: Confirmed) -> None:
    """The error of a race is shared among all comparisons of a trial."""
    from search.strategies import confirm

    seen = []

    def note(_one: Point, _rival: Point, _images: int, looks: int) -> bool:
        seen.append(looks)
        return False

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(confirm, "has_lost", note)
        step = confirmed.next(SEARCHED)
        assert not isinstance(step, Signal)
        baseline, best, third, fourth = step
        running = point(fourth, "running", 9.0)
        confirmed.has_lost([*SEARCHED, point(baseline), point(best), point(third)], running)
    assert seen == [9, 9, 9]  # three rungs, three rivals


def test_every_history_ends_whatever_order_failures_and_repeats() -> None:
    numbers = random.Random(0)
    states: tuple[State, ...] = ("complete", "failed", "pruned")
    for _ in range(200):
        finalists = tuple(
            Candidate("final", numbers.choice((1, *MEANS)), 0) for _ in range(numbers.randrange(4))
        )
        strategy = Confirmed(Known(*finalists), IMAGES, 3)
        history: list[Point] = []
        for _ in itertools.count():
            numbers.shuffle(history)
            step = strategy.next(history)
            if isinstance(step, Signal):
                break
            ended = {(p.setting, p.fresh) for p in history}
            assert all((c.setting, c.fresh) not in ended for c in step)
            state = numbers.choice(states)
            one = point(numbers.choice(step), state, None if state == "failed" else 5 + numbers.random())
            history += [one] * numbers.choice((1, 2))
        assert step is FINISHED
        assert len({(p.setting, p.fresh) for p in history}) <= 2 + len(MEANS)


def test_the_paper_s_protocol_is_confirmed_too() -> None:
    strategy = Confirmed(PaperStrategy.of(20, "discrete"), IMAGES, 3)
    history: list[Point] = []
    while not isinstance(step := strategy.next(history), Signal):
        wanted = step[0]
        history.append(
            point(wanted, distance=30 + 2e4 * (wanted.mean - 1.012) ** 2 + 1e5 * (wanted.k - 0.0006) ** 2)
        )
    fresh = [p for p in history if p.fresh]
    assert [(p.mean, p.k) for p in fresh] == [(1, 0), (1.012, 0.0006), (1.012, 0)]
