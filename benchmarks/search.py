"""Replays searches on recorded noise: what the paper's search and the adaptive one spend, and what they lose.

    python -m benchmarks.search [--restarts N] [--json]

`recorded.npz` is of an 11M-parameter ADM network of CIFAR-10, DDPM at NFE 20, on one H100: distances over the mean λ
and over k, and the influences of 4 × 10,000 images on them, as means of blocks of 25. Each restart draws its images
anew from these blocks (a bootstrap), so that all its distances share their noise as those of one seed do. The
distances of infinitely many images are the recorded ones, interpolated; both strategies see the same.

Regret is the distance of the answer minus the least one: `own` among the distances of the restart's own images, at as
many images as a full trial has (the paper's search looks at nothing else), and `true` among those of infinitely many.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from objectives.paired import BLOCK, Influence
from search.strategies.adaptive import AdaptiveStrategy, Axis
from search.strategies.base import Point, Signal, Strategy
from search.strategies.paper import PaperStrategy

Vector = NDArray[np.float64]

IMAGES = 10_000
RUNG = 1000
NFE = 20
_BIAS = 1600.0  # of the distance of n images: so much / n, as recorded
_RECORDED_BLOCK = 25
_STEEP = 12_000.0  # of the distance over the mean, per λ², outside of what was recorded

PUBLISHED = {
    "ADM NFE 100": [(1, 3.37), (1.015, 2.20), (1.016, 2.18), (1.017, 2.17), (1.018, 2.21), (1.019, 2.31)],
    "ADM NFE 50": [(1, 4.43), (1.015, 2.53), (1.016, 2.51), (1.017, 2.49), (1.018, 2.53), (1.019, 2.55)],
    "EDM NFE 35": [(1, 1.97), (1.0005, 1.948), (1.0006, 1.947), (1.0007, 1.949), (1.0008, 1.953)],
    "EDM NFE 13": [(1, 7.16), (1.004, 6.60), (1.005, 6.55), (1.006, 6.54), (1.007, 6.55)],
}
"""FID over b (k = 0), CIFAR-10: the sensitivity tables of the paper, with the baseline."""


def quadratic_tails(curve: NDArray[np.float64], x: Vector, low: float, high: float) -> Vector:
    """A polynomial (highest power first) inside [low, high]; outside, its second-order expansion at the end."""
    inside = np.clip(x, low, high)
    first, second = np.polyder(curve), np.polyder(curve, 2)
    away = x - inside
    return (
        np.polyval(curve, inside)
        + np.polyval(first, inside) * away
        + np.polyval(second, inside) / 2 * away**2
    )


def _powers(x: Vector, low: float, high: float, degree: int) -> Vector:
    """[…, degree + 1] powers of x, highest first; outside [low, high] their tangents."""
    inside = np.clip(x, low, high)[..., None]
    exponents = np.arange(degree, -1, -1)
    slopes = exponents * inside ** np.maximum(exponents - 1, 0)
    return inside**exponents + slopes * np.clip(x - np.clip(x, low, high), low - high, high - low)[..., None]


class Recording:
    """What was recorded: distances over the mean and k, and how much each image moves them."""

    def __init__(self) -> None:
        data = np.load(Path(__file__).with_name("recorded.npz"))
        self.influence = np.concatenate(
            [data["mean_influence"], data["k_influence"][1:] - data["k_influence"][:1]]
        ).astype(np.float64)
        self._mean_weights = np.linalg.pinv(np.vander(data["mean"] - 1.02, 4)).T
        k = data["k"][1:]
        self._k_weights = np.linalg.pinv(np.vander(k, 3) * k[:, None]).T
        means, distances = data["mean_distance"]
        self._means = means
        self._mean_curve = CubicSpline(means, distances, bc_type="natural")
        self._k_curve = np.polyfit(*data["k_distance"], 4)

    def distance(self, mean: Vector, k: Vector) -> Vector:
        """Of infinitely many images; outside of what was recorded, parabolas."""
        low, high = self._means[0], self._means[-1]
        curve, inside = self._mean_curve, np.clip(mean, low, high)
        below, above = np.minimum(mean - low, 0), np.maximum(mean - high, 0)
        over_mean = curve(inside) + curve(low, 1) * below + curve(high, 1) * above
        over_mean = over_mean + _STEEP * (below**2 + above**2)
        return over_mean + quadratic_tails(self._k_curve, np.asarray(k, float), -0.001, 0.004)

    def weights(self, mean: Vector, k: Vector) -> Vector:
        """[…, points] how the noise at (mean, k) is made of that at the recorded points."""
        over_mean = _powers(np.asarray(mean, float) - 1.02, -0.02, 0.02, 3) @ self._mean_weights.T
        over_k = _powers(np.asarray(k, float), 0.0, 0.0045, 3)[..., :3] @ self._k_weights.T
        return np.concatenate([over_mean, over_k], -1)


class World:
    """One restart: the distances that one seed's images have, at every mean and k and number of images.

    curve: another distance of infinitely many images over the mean (no k), whose least value is at `best`; the noise
    is then scaled with it: by its least value, and to the width `half` within which it rises by 3 %.
    """

    def __init__(
        self,
        recording: Recording,
        seed: int,
        curve: Callable[[float], float] | None = None,
        best: float = 1.0255,
        half: float = 0.009,
    ) -> None:
        blocks = recording.influence.shape[1]
        picked = np.random.default_rng(seed).integers(0, blocks, IMAGES // BLOCK)
        self._influence = recording.influence[:, picked] * math.sqrt(_RECORDED_BLOCK / BLOCK)
        self._sums = np.cumsum(self._influence, axis=1)
        self._recording, self._curve, self._best, self._half = recording, curve, best, half
        self._scale = 1.0 if curve is None else curve(best) / 33.0

    def _weights(self, mean: Vector, k: Vector) -> Vector:
        if self._curve is not None:
            mean = 1.0255 + (np.asarray(mean) - self._best) * 0.009 / self._half
        return self._scale * self._recording.weights(mean, k)

    def true(self, mean: Vector, k: Vector) -> Vector:
        """The distance of infinitely many images."""
        if self._curve is None:
            return self._recording.distance(mean, k)
        return np.vectorize(self._curve)(mean) + 0.0 * np.asarray(k)

    def own(self, mean: Vector, k: Vector, images: int = IMAGES) -> Vector:
        """The distance of the first images of this restart."""
        noise = self._weights(mean, k) @ (self._sums[:, images // BLOCK - 1] / (images // BLOCK))
        return self.true(mean, k) + noise + self._scale * _BIAS / images

    def influence(self, mean: float, k: float, images: int) -> Influence:
        """See `objectives.paired`."""
        found = self._weights(np.array(mean), np.array(k)) @ self._influence[:, : images // BLOCK]
        return (found - found.mean()).astype(np.float32)

    def measure(self, mean: float, k: float, images: int) -> Point:
        """A trial."""
        value = float(self.own(np.array(mean), np.array(k), images))
        state = "complete" if images == IMAGES else "pruned"
        return Point(
            mean, k, state, value, images, rungs={images: value}, influence=self.influence(mean, k, images)
        )


@dataclass(frozen=True)
class Outcome:
    """A finished search: its answer, its history, and the images that it generated (none twice)."""

    mean: float
    k: float
    history: Sequence[Point]
    images: int


def replay(strategy: Strategy, world: World) -> Outcome:
    """The whole search."""
    history: list[Point] = []
    spent: dict[tuple[float, float], int] = {}
    while not isinstance(step := strategy.next(history), Signal):
        for candidate in step:
            point = world.measure(candidate.mean, candidate.k, candidate.images or IMAGES)
            history.append(point)
            spent[point.key] = max(spent.get(point.key, 0), point.images)
    finalists = strategy.finalists(history)
    mean, k = finalists[0].key if finalists else (1.0, 0.0)
    return Outcome(mean, k, history, sum(spent.values()))


def adaptive(axes: int, step: float = 0.01) -> AdaptiveStrategy:
    """Over the mean, or the mean and k."""
    reach = 0.4 / (NFE - 1)
    searched = (Axis("mean", 1.0, step, 0.9, 1.2), Axis("k", 0.0, None, -reach, reach))[:axes]
    return AdaptiveStrategy(NFE, searched, IMAGES, RUNG, 0, paper(axes))


def paper(axes: int) -> PaperStrategy:
    """The same with the paper's search."""
    return PaperStrategy.of(NFE, "discrete", k=None if axes == 2 else {"start": 0.0, "stop": 0.0})


def regrets(world: World, outcome: Outcome, axes: int) -> tuple[float, float]:
    """own and true."""
    mean, k = np.meshgrid(np.arange(1.012, 1.04, 0.00025), np.arange(-0.001, 0.008, 0.0001), indexing="ij")
    if axes == 1:
        mean, k = mean[:, :1], np.zeros_like(mean[:, :1])
    at = np.array(outcome.mean), np.array(outcome.k)
    return float(world.own(*at) - world.own(mean, k).min()), float(
        world.true(*at) - world.true(mean, k).min()
    )


def through(table: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Straight lines between the points of a table; outside, a parabola with the slope of the last segment."""
    xs, ys = [x for x, _ in table], [y for _, y in table]
    best = xs[ys.index(min(ys))]

    def curve(x: float) -> float:
        if not xs[0] < x < xs[-1]:
            end, neighbour = (0, 1) if x <= xs[0] else (-1, -2)
            away = abs(x - xs[end])
            slope = (ys[end] - ys[neighbour]) / abs(xs[end] - xs[neighbour])
            return ys[end] + slope * away + abs(slope) * away**2 / (2 * (abs(xs[end] - best) or 1e-3))
        i = bisect.bisect_right(xs, x) - 1
        share = (x - xs[i]) / (xs[i + 1] - xs[i])
        return ys[i] + share * (ys[i + 1] - ys[i])

    return curve


def measure(restarts: int) -> dict[str, dict[str, list[float]]]:
    """By search and strategy: images, and both regrets, of every restart."""
    recording = Recording()
    found: dict[str, dict[str, list[float]]] = {}
    for axes, name in ((1, "b"), (2, "b, k")):
        for kind, strategy in (("paper", paper(axes)), ("adaptive", adaptive(axes))):
            rows = []
            for seed in range(restarts):
                world = World(recording, seed)
                outcome = replay(strategy, world)
                rows.append((outcome.images, *regrets(world, outcome, axes)))
            found[f"{name}: {kind}"] = dict(
                zip(("images", "own", "true"), map(list, zip(*rows, strict=True)), strict=True)
            )
    for name, table in PUBLISHED.items():
        fine = name.startswith("EDM")
        curve, best = through(table), min(table, key=lambda row: row[1])
        half = math.sqrt(0.03 * best[1] / (table[0][1] - best[1])) * abs(best[0] - 1)
        strategies = {
            "paper": PaperStrategy.of(NFE, "sigma" if fine else "discrete", k={"start": 0.0, "stop": 0.0}),
            "adaptive": adaptive(1, 0.001 if fine else 0.01),
        }
        for kind, strategy in strategies.items():
            rows = []
            for seed in range(restarts):
                world = World(recording, seed, curve, best[0], half)
                outcome = replay(strategy, world)
                rows.append((outcome.images, curve(outcome.mean) - best[1]))
            found[f"{name}: {kind}"] = dict(
                zip(("images", "true"), map(list, zip(*rows, strict=True)), strict=True)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--restarts", type=int, default=200, help="random restarts of each search")
    parser.add_argument("--json", action="store_true", help="every restart's numbers as JSON")
    arguments = parser.parse_args()
    found = measure(arguments.restarts)
    if arguments.json:
        print(json.dumps(found))
        return
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
    print(f"{'':24}{'mean':>9}" + "".join(f"{q:9.0%}" for q in quantiles) + "  within 0.05")
    for name, numbers in found.items():
        for of, values in numbers.items():
            digits = 0 if of == "images" else 4
            row = [np.mean(values), *np.quantile(values, quantiles)]
            within = "" if of == "images" else f"{np.mean(np.array(values) <= 0.05):13.1%}"
            print(f"{name + ' ' + of:24}" + "".join(f"{value:9.{digits}f}" for value in row) + within)


if __name__ == "__main__":
    main()
