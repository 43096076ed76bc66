"""search.strategies.race: how often a trial is stopped that is as good as its rival, and that bad ones are."""

import numpy as np
import pytest

from objectives.paired import Influence
from search.strategies.base import Point
from search.strategies.race import ERROR, has_lost

RUNGS = (100, 250, 500, 1000)


def points(gap: float, noises: tuple[Influence, Influence], images: int = 1000) -> tuple[Point, Point]:
    """A running trial and its complete rival; their distances are off by the means of their influences."""
    found = []
    for extra, noise, state, last in (
        (gap, noises[0], "running", images),
        (0.0, noises[1], "complete", 1000),
    ):
        rungs = {n: 10 + extra + float(noise[: n // 5].mean()) for n in RUNGS if n <= last}
        point = Point(1.0, 0.0, state, rungs[last], last, rungs=rungs, influence=noise[: last // 5])  # type: ignore[arg-type]
        found.append(point)
    return found[0], found[1]


def noisy(numbers: np.random.Generator, own: float = 0.3) -> tuple[Influence, Influence]:
    """Two influences of 1,000 images that share most of their noise."""
    shared, one, other = numbers.normal(size=(3, 200))
    return (shared + own * one).astype(np.float32), (shared + own * other).astype(np.float32)


def stopped(gap: float, noises: tuple[Influence, Influence]) -> bool:
    """Whether a race over all rungs but the last is lost."""
    looks = [n for n in RUNGS if n < 1000]
    return any(has_lost(*points(gap, noises, n), n, len(looks)) for n in looks)


def test_a_trial_as_good_as_its_rival_is_stopped_no_more_often_than_stated() -> None:
    numbers = np.random.default_rng(0)
    repetitions = 20_000
    losses = sum(stopped(0.0, noisy(numbers)) for _ in range(repetitions))
    assert losses / repetitions < ERROR + 2 * (ERROR / repetitions) ** 0.5  # two deviations of the count
    assert losses > 0  # it is no rule that never stops


def test_a_clearly_worse_trial_loses_at_its_first_rung_and_a_better_one_never() -> None:
    numbers = np.random.default_rng(1)
    for _ in range(200):
        noises = noisy(numbers)
        assert has_lost(*points(1.0, noises, 100), 100, 3)
        assert not stopped(-1.0, noises)


def test_what_both_share_does_not_hide_a_difference() -> None:
    shared = np.random.default_rng(2).normal(size=200).astype(np.float32)
    own = np.random.default_rng(3).normal(scale=0.01, size=200).astype(np.float32)
    running, rival = points(0.05, (shared + own, shared), 500)
    assert float(np.std(shared)) / 10 > 0.05  # the error bar of either alone is larger than the difference
    assert has_lost(running, rival, 500, 3)


def test_more_looks_want_more_evidence() -> None:
    numbers = np.random.default_rng(4)
    lost = [0, 0]
    for _ in range(300):
        noises = noisy(numbers)
        for i, looks in enumerate((1, 100)):
            lost[i] += has_lost(*points(0.14, noises, 500), 500, looks)
    assert lost[0] > lost[1] > 0


def test_nothing_is_decided_without_influences_or_at_other_numbers_of_images() -> None:
    noises = noisy(np.random.default_rng(5))
    running, rival = points(5.0, noises, 250)
    assert has_lost(running, rival, 250, 3)

    def changed(point: Point, **fields: object) -> Point:
        known = {name: getattr(point, name) for name in Point.__dataclass_fields__}
        return Point(**{**known, **fields})  # type: ignore[arg-type]

    assert not has_lost(changed(running, influence=None), rival, 250, 3)
    assert not has_lost(running, changed(rival, influence=None), 250, 3)
    assert not has_lost(running, changed(rival, rungs={100: 10.0, 1000: 10.0}), 250, 3)  # no rung there
    assert not has_lost(running, changed(rival, influence=noises[1][:20], images=100), 250, 3)
    assert not has_lost(running, changed(rival, state="failed"), 250, 3)
    assert not has_lost(changed(running, rungs={}, images=251), rival, 250, 3)
    assert not has_lost(running, rival, 500, 3)  # which the running one has not reached
    one = changed(running, influence=noises[0][:1], rungs={5: 20.0})
    assert not has_lost(one, changed(rival, rungs={5: 1.0}), 5, 3)  # one block knows no spread


@pytest.mark.parametrize("looks", [1, 4, 12])
def test_equal_trials_are_never_stopped(looks: int) -> None:
    noise = np.random.default_rng(6).normal(size=200).astype(np.float32)
    assert not has_lost(*points(0.0, (noise, noise), 500), 500, looks)
