"""From a job to the strategy of one of its searches: coordinates, bounds, first steps and the budget.

Knows the strategies and what a job file may say of them; nothing of how they work or of trials.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from samplers.errors import InputError
from samplers.sampling import Solver, with_parameters
from search.spec import SearchSpec
from search.strategies.adaptive import AdaptiveStrategy, Axis
from search.strategies.base import Strategy
from search.strategies.confirm import Confirmed
from search.strategies.paper import PaperStrategy
from storage import Best

_B_STEP = {"discrete": 0.01, "sigma": 0.002}  # first steps of the mean λ away from where it starts
_B_RANGE = (0.9, 1.2)
_K_SPREAD = 0.2  # how far from the mean the default range of k takes λ_t
_BENDS = (
    8  # of a free schedule at most: NFE up to 10 have one λ per evaluation, larger ones a curve of degree 9
)
_BEND_RANGE = (-0.2, 0.2)
_EDGE = 0.01  # of a range: what is nearer to its end is at the edge
_LEAST_RUNG = 50
_GRID = 250
_PER_AXIS = 1.2  # full trials' images for each coordinate beyond the mean and k


@dataclass(frozen=True, slots=True)
class Start:
    """Where a search begins: the best `mean` and `k` of job `job`, which had `nfe` evaluations."""

    mean: float
    k: float
    nfe: int
    job: int


def strategy(
    search: SearchSpec,
    sampling: Solver,
    time: Literal["discrete", "sigma"],
    dimension: int,
    start: Start | None = None,
) -> Strategy:
    """The strategy of one search, with its confirmation.

    time: the model's. dimension: of the features; an exploration has at least half as many images. Raises InputError
    that names the key.
    """
    try:
        inner = _inner(search, sampling, time, dimension, start)
    except InputError as error:
        raise InputError(f"search.{error}") from None
    if not search.confirm_images:
        return inner
    return Confirmed(inner, search.confirm_images, len(search.all_rungs))


def _inner(
    search: SearchSpec,
    sampling: Solver,
    time: Literal["discrete", "sigma"],
    dimension: int,
    start: Start | None,
) -> Strategy:
    nfe = sampling.nfe
    if search.strategy == "paper":
        return PaperStrategy.of(nfe, time, search.b, search.k)
    _known(search.b, "b", ("start", "stop", "step"))
    _known(search.k, "k", ("start", "stop"))
    low, high = _range(search.b, "b", _B_RANGE, inside=1.0)
    mean = 1.0 if start is None else min(max(start.mean, low), high)
    step = search.b.get("step", _B_STEP[time])
    if not 0 < step < math.inf:
        raise InputError(f"b.step is {step}: it must be finite and above 0")
    axes = [Axis("mean", mean, step if mean <= high - step else -step, low, high)]
    if nfe > 1:
        low, high = _range(search.k, "k", _k_range(nfe), inside=0.0)
        # λ at the ends moves by k·(NFE − 1)/2: the same there is a like schedule at another NFE.
        k = 0.0 if start is None else start.k * max(start.nfe - 1, 1) / (nfe - 1)
        if low < high:
            axes.append(Axis("k", min(max(round(k, 9), low), high), None, low, high))
    if search.strategy == "free":
        axes += [Axis(f"bend{j}", 0.0, None, *_BEND_RANGE) for j in range(2, min(nfe, _BENDS + 2))]
    axes += [_parameter(sampling, name, *ends) for name, ends in search.parameters.items()]
    rung = max(search.images / 10, dimension / 2, _LEAST_RUNG)
    rung = min(search.images, round(rung / _GRID) * _GRID if rung >= _GRID else round(rung))
    if search.budget is not None:
        return AdaptiveStrategy(nfe, tuple(axes), search.images, rung, search.budget)
    budget = round(_PER_AXIS * max(len(axes) - 2, 0) * search.images)
    return AdaptiveStrategy(nfe, tuple(axes), search.images, rung, budget, PaperStrategy.of(nfe, time))


def at_the_edge(search: SearchSpec, best: Best) -> str | None:
    """What to say of a best schedule that lies where its search was not allowed to go on; None for any other."""
    if best.k is None or best.is_baseline:
        return None
    found = [("b", "mean λ", sum(best.lambdas) / best.nfe, _range(search.b, "b", _B_RANGE, inside=1.0))]
    if best.nfe > 1:
        found.append(("k", "k", best.k, _range(search.k, "k", _k_range(best.nfe), inside=0.0)))
    for key, name, value, (low, high) in found:
        near = _EDGE * (high - low)
        for end, bound, away in (("start", low, value - low), ("stop", high, high - value)):
            if low < high and away <= near:
                return (
                    f"the best {name} lies at the edge of the search, {bound:.4g}: with another search.{key}.{end} "
                    "it may find better"
                )
    return None


def _k_range(nfe: int) -> tuple[float, float]:
    """The default: λ_t within _K_SPREAD of its mean."""
    spread = _K_SPREAD / ((nfe - 1) / 2)
    return -spread, spread


def _parameter(sampling: Solver, name: str, low: float, high: float) -> Axis:
    """A number of the solver, which starts at the job's own value."""
    try:
        for value in (low, high):
            with_parameters(sampling, {name: value})
    except InputError as error:
        raise InputError(f"parameters.{name}: {error}") from None
    start = float(getattr(sampling, name))
    if not -math.inf < low <= start <= high < math.inf or low == high:
        raise InputError(
            f"parameters.{name}: [{low}, {high}] must be a range that holds sampling.{name}, which is {start}"
        )
    step = (high - low) / 8
    return Axis(name, start, step if start + step <= high else -step, low, high)


def _known(given: Mapping[str, float], name: str, keys: tuple[str, ...]) -> None:
    for unknown in sorted(given.keys() - set(keys)):
        raise InputError(f"{name}.{unknown} is not a key: {name} takes {', '.join(keys)}")


def _range(
    given: Mapping[str, float], name: str, default: tuple[float, float], inside: float
) -> tuple[float, float]:
    low, high = given.get("start", default[0]), given.get("stop", default[1])
    if not -math.inf < low <= inside <= high < math.inf or (name == "b" and low <= 0):
        raise InputError(f"{name}: [{low}, {high}] must be a range of numbers that holds {inside:g}")
    return low, high
