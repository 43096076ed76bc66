"""How far the mean λ and k may move from the best ones before the distance rises noticeably.

From the records of one search: where its trials surround a minimum, from the quadratic surface through all of them;
for the paper's protocol, whose trials lie on two lines, from the points of those. Knows nothing of how trials are
chosen, nor of pictures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from objectives.paired import unpack
from samplers.schedule import Schedule
from search.strategies import line
from search.strategies.adaptive import WINDOW
from search.strategies.base import slope
from search.strategies.surface import Sample, Surface, fit
from storage import Evaluation, Job

LOSSES = (0.01, 0.05, 0.1)
"""Shares of the least distance."""

Coordinate = Literal["mean", "k"]
COORDINATES: tuple[Coordinate, ...] = ("mean", "k")
_REACH = 3.0  # half widths from the minimum within which a fitted surface is believed
_EXACT = 1e-9  # coordinates are rounded to this


@dataclass(frozen=True, slots=True)
class Range:
    """Where the distance is at most (1 + loss) times the least one; None: farther than what was measured."""

    loss: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Of one coordinate, the other one staying at its best. best: where the distance is least. images: of the trials
    that say so, at most. source: the fitted surface, or straight lines through the points."""

    coordinate: Coordinate
    best: float
    images: int
    source: Literal["surface", "points"]
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """Trials of equally many images that differ in one coordinate alone: coordinate → distance."""

    images: int
    other: float
    values: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class Fitted:
    """The surface over (mean, k), the half widths of its valley and the most images of a trial that it goes through."""

    surface: Surface
    widths: tuple[float, float]
    images: int


def position(evaluation: Evaluation) -> tuple[float, float]:
    """(mean, k), of the nearest line where there is a λ per evaluation."""
    return evaluation.mean, slope(Schedule(evaluation.lambdas, evaluation.k, evaluation.b))


def searched(job: Job, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The lines that the search measured, on its own random numbers and with the job's own solver."""
    return [
        e
        for e in evaluations
        if e.seed == job.seed
        and e.k is not None
        and not e.parameters
        and e.distance is not None
        and e.state in ("complete", "pruned")
    ]


def measured(job: Job, evaluations: Sequence[Evaluation]) -> tuple[Sensitivity, ...]:
    """Of the mean and of k, each where the trials tell."""
    tried = searched(job, evaluations)
    fitted = None if job.strategy == "paper" else surface(job, evaluations)
    if fitted is not None:
        return tuple(_of_surface(fitted, tried, axis) for axis in range(2))
    return tuple(found for axis in range(2) if (found := _of_points(tried, axis)) is not None)


def surface(job: Job, evaluations: Sequence[Evaluation]) -> Fitted | None:
    """The surface through all lines that the search tried; None where they do not determine one."""
    tried = searched(job, evaluations)
    windows = []
    for axis in range(2):
        explored = longest_line(tried, axis)
        window = None if explored is None else line.window(explored.values) or _flank(explored.values)
        if window is None:
            return None
        windows.append(window)
    centre, widths = (np.array(part) for part in zip(*windows, strict=True))
    samples = [Sample(np.array(position(e)), e.rungs, unpack(e.influence)) for e in tried]
    unbounded = np.full(2, np.inf)
    found = fit(samples, centre, widths, -unbounded, unbounded, np.full(2, WINDOW))
    if found is None or (np.abs(found.minimum - centre) > _REACH * widths).any():
        return None
    return Fitted(found, (float(widths[0]), float(widths[1])), max(e.images for e in tried))


def _flank(values: Mapping[float, float]) -> tuple[float, float] | None:
    """The window of a line that falls up to its end, as far as it is seen there; None where it hardly does."""
    best = min(values, key=lambda x: values[x])
    outwards = sorted(values, key=lambda x: abs(x - best))
    edge = _crossing(values, outwards, (1 + line.RISE) * values[best])
    return None if edge is None else (best, abs(edge - best))


def longest_line(tried: Sequence[Evaluation], axis: int) -> Line | None:
    """The most trials of equally many images that differ in coordinate `axis` (0: mean, 1: k) alone; of equally many
    those that are farthest apart, then the lowest. None for fewer than two."""
    lines: dict[tuple[int, float], dict[float, float]] = {}
    for e in tried:
        here = position(e)
        for images, distance in e.rungs.items():
            other = round(here[1 - axis] / _EXACT) * _EXACT
            lines.setdefault((images, other), {})[here[axis]] = distance
    long = [Line(n, other, values) for (n, other), values in lines.items() if len(values) > 1]

    def rank(one: Line) -> tuple[int, float, float, int]:
        return (
            len(one.values),
            max(one.values) - min(one.values),
            -min(one.values.values()),
            one.images,
        )

    return max(long, key=rank, default=None)


def _of_surface(fitted: Fitted, tried: Sequence[Evaluation], axis: int) -> Sensitivity:
    best = float(fitted.surface.minimum[axis])
    least = min(e.distance for e in tried if e.images == fitted.images and e.distance is not None)
    places = [position(e)[axis] for e in tried]
    ranges = []
    for loss in LOSSES:
        away = math.sqrt(loss * abs(least) / fitted.surface.curve[axis, axis])
        low, high = best - away, best + away
        ranges.append(Range(loss, low if low >= min(places) else None, high if high <= max(places) else None))
    return Sensitivity(COORDINATES[axis], best, fitted.images, "surface", tuple(ranges))


def _of_points(tried: Sequence[Evaluation], axis: int) -> Sensitivity | None:
    explored = longest_line(tried, axis)
    if explored is None:
        return None
    values = explored.values
    best = min(values, key=lambda x: (values[x], abs(x)))
    ranges = []
    for loss in LOSSES:
        limit = values[best] + loss * abs(values[best])
        low = _crossing(values, sorted((x for x in values if x <= best), reverse=True), limit)
        high = _crossing(values, sorted(x for x in values if x >= best), limit)
        ranges.append(Range(loss, low, high))
    return Sensitivity(COORDINATES[axis], best, explored.images, "points", tuple(ranges))


def _crossing(values: Mapping[float, float], outwards: Sequence[float], limit: float) -> float | None:
    """Where the values first pass the limit, on the way out from the best."""
    for near, far in pairwise(outwards):
        if values[far] > limit:
            return near + (far - near) * (limit - values[near]) / (values[far] - values[near])
    return None
