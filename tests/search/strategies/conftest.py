"""Curves to search on: the published tables made into functions, and a runner that needs no GPU."""

import bisect
import math
from collections.abc import Callable, Sequence

import pytest

from benchmarks.search import PUBLISHED
from search.strategies.base import FINISHED, Point, Signal, Strategy

Curve = Callable[[float], float]
Surface = Callable[[float, float], float]
Table = Sequence[tuple[float, float]]


def _through(table: Table, steepness: float = 1.0) -> Curve:
    """A curve through the table: straight lines between its points; outside, a parabola.

    The parabola goes on with the slope of the table's last segment, times steepness, and bends upwards.
    """
    xs, ys = [x for x, _ in table], [y for _, y in table]
    best = xs[ys.index(min(ys))]

    def outside(x: float, end: int, neighbour: int) -> float:
        away = abs(x - xs[end])
        slope = steepness * (ys[end] - ys[neighbour]) / abs(xs[end] - xs[neighbour])
        reach = abs(xs[end] - best) or abs(xs[end] - xs[neighbour])
        return ys[end] + slope * away + abs(slope) * away**2 / (2 * reach)

    def curve(x: float) -> float:
        if x <= xs[0]:
            return outside(x, 0, 1)
        if x >= xs[-1]:
            return outside(x, -1, -2)
        i = bisect.bisect_right(xs, x) - 1
        share = (x - xs[i]) / (xs[i + 1] - xs[i])
        return ys[i] + share * (ys[i + 1] - ys[i])

    return curve


def _search(strategy: Strategy, surface: Surface) -> list[tuple[str, Point]]:
    """All trials of a search, in order, each with its phase; NaN from the surface is a trial that failed."""
    trials: list[tuple[str, Point]] = []
    while True:
        step = strategy.next([point for _, point in trials])
        if isinstance(step, Signal):
            assert step is FINISHED
            return trials
        for candidate in step:
            distance = surface(candidate.mean, candidate.k)
            failed = math.isnan(distance)
            point = Point(
                candidate.mean,
                candidate.k,
                "failed" if failed else "complete",
                None if failed else distance,
                0 if failed else 10_000,
            )
            trials.append((candidate.phase, point))


@pytest.fixture(scope="session")
def through() -> Callable[..., Curve]:
    return _through


@pytest.fixture(scope="session")
def search() -> Callable[[Strategy, Surface], list[tuple[str, Point]]]:
    return _search


@pytest.fixture(scope="session")
def published_b() -> dict[str, Table]:
    """FID over b (k = 0), CIFAR-10: the sensitivity tables of the paper, with the baseline."""
    return PUBLISHED


@pytest.fixture(scope="session")
def published_k() -> dict[str, Table]:
    """FID over k at the best mean λ, ADM at NFE 20: the sensitivity tables of the paper."""
    return {
        "LSUN tower 64": [
            (0, 8.22),
            (0.0002, 8.10),
            (0.0004, 8.01),
            (0.0006, 7.75),
            (0.0008, 7.60),
            (0.0010, 7.69),
        ],
        "FFHQ 128": [
            (0, 26.14),
            (0.0003, 24.50),
            (0.0004, 24.18),
            (0.0005, 24.35),
            (0.0006, 24.41),
            (0.0007, 24.73),
            (0.0008, 24.83),
        ],
        "ImageNet 64": [
            (0, 10.23),
            (0.0001, 10.19),
            (0.0002, 9.98),
            (0.0003, 10.22),
            (0.0004, 10.27),
            (0.0005, 10.31),
        ],
    }
