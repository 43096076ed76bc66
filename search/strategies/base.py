"""The contract of search strategies: a pure function from what was tried to what to try next.

Knows nothing of how a candidate is evaluated, where the history is stored, or which trials run in parallel.
A strategy keeps no state: called again with the same history, after a crash or in another process, it answers
the same.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from objectives.paired import Influence
from samplers.schedule import Schedule

_DECIMALS = 9

State: TypeAlias = Literal["running", "complete", "failed", "pruned"]
Key: TypeAlias = tuple[float, float]
Parameters: TypeAlias = tuple[tuple[str, float], ...]
"""Options of the solver in place of the job's, by name and in the order of names."""


def key(mean: float, k: float) -> Key:
    """The identity of a linear schedule: rounded to 1e-9, so that 1 + 3 * 0.001 and 1.003 are one."""
    return _rounded(mean), _rounded(k)


def _rounded(value: float) -> float:
    return round(value, _DECIMALS) + 0.0  # + 0.0 turns -0.0 into 0.0


@lru_cache
def bend_basis(nfe: int) -> NDArray[np.float64]:
    """[max(nfe − 2, 0), nfe]: the discrete Legendre (Gram) polynomials of degree 2, 3, … on t = 0 … nfe − 1.

    Each is orthogonal to all of lower degree and has the largest absolute value 1, so that a coefficient is how far
    it takes λ. With the mean and k they span every list of λ.
    """
    powers = np.vander(np.linspace(-1, 1, nfe), nfe, increasing=True)
    q, _ = np.linalg.qr(powers)
    basis = q.T[2:]
    return basis / np.abs(basis).max(axis=1, keepdims=True) * np.sign(basis[:, -1:])


def bends(schedule: Schedule) -> tuple[float, ...]:
    """The coefficients of `bend_basis` in a schedule, without trailing zeros: () for a line."""
    basis = bend_basis(schedule.nfe)
    found = [_rounded(float(row @ np.asarray(schedule.lambdas) / (row @ row))) for row in basis]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


def slope(schedule: Schedule) -> float:
    """k of the line that is nearest to a schedule."""
    if schedule.k is not None:
        return schedule.k
    t = np.arange(schedule.nfe) - (schedule.nfe - 1) / 2
    return float(t @ np.asarray(schedule.lambdas) / (t @ t))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule to evaluate: λ_t = mean + k·(t − (NFE − 1)/2) + Σ_j bends[j]·P_{j+2}(t).

    A line has no bends: λ_t = k·t + b with b = mean − k·(NFE − 1)/2, so that Σ λ_t = NFE·mean. P are the rows of
    `bend_basis`. `phase` names the part of the search that asks for it. `mean` (> 0; it is b where k = 0), `k` (per
    evaluation) and `bends` are rounded to 1e-9 when made, so that they print as people write them. `parameters`: see
    there. `images`: how many it is evaluated on, None: as many as the job says. `fresh`: on random numbers that the
    search does not use otherwise.
    """

    phase: str
    mean: float
    k: float
    bends: tuple[float, ...] = ()
    parameters: Parameters = ()
    images: int | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        assert 0 < self.mean < math.inf, f"the mean {self.mean} of a candidate is not positive and finite"
        assert math.isfinite(self.k), f"the k {self.k} of a candidate is not finite"
        mean, k = self.key
        bent = [_rounded(c) for c in self.bends]
        while bent and bent[-1] == 0:
            bent.pop()
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "bends", tuple(bent))
        object.__setattr__(self, "parameters", _ordered(self.parameters))

    @property
    def key(self) -> Key:
        """The identity of a line; equal to the key of every `Point` that evaluated it."""
        return key(self.mean, self.k)

    @property
    def setting(self) -> Setting:
        """What is evaluated, whatever the images; equal to that of every `Point` that evaluated it."""
        return self.mean, self.k, self.bends, self.parameters

    def schedule(self, nfe: int) -> Schedule:
        """The schedule for `nfe` evaluations; `InputError` where it would hold a λ_t ≤ 0."""
        if not self.bends:
            return Schedule.constrained(nfe, self.mean, self.k)
        line = self.mean + self.k * (np.arange(nfe) - (nfe - 1) / 2)
        bent = line + np.asarray(self.bends) @ bend_basis(nfe)[: len(self.bends)]
        return Schedule.free(round(float(value), 12) for value in bent)


Setting: TypeAlias = tuple[float, float, tuple[float, ...], Parameters]
"""mean, k, bends and parameters, rounded: the identity of what is evaluated."""


def _ordered(parameters: Parameters) -> Parameters:
    return tuple(sorted((name, _rounded(value)) for name, value in parameters))


@dataclass(frozen=True, slots=True)
class Point:
    """One trial as the store tells it: what was tried (see `Candidate`), how far it got, and what it measured.

    `distance` (lower is better) is the latest value, measured on `images` generated images; None before the
    first. It may be NaN or infinite. `rungs`: images → distance, the earlier ones too. `influence`: see
    `objectives.paired`. Several points may have the same setting: a trial that was repeated.
    """

    mean: float
    k: float
    state: State
    distance: float | None
    images: int
    bends: tuple[float, ...] = ()
    parameters: Parameters = ()
    fresh: bool = False
    rungs: Mapping[int, float] = field(default_factory=dict, hash=False)
    influence: Influence | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        assert self.state in ("running", "complete", "failed", "pruned"), f"unknown state {self.state!r}"
        assert self.images >= 0, f"a trial with {self.images} images"

    @property
    def key(self) -> Key:
        """The identity of a line; equal to the key of the `Candidate` that it evaluates."""
        return key(self.mean, self.k)

    @property
    def setting(self) -> Setting:
        """Equal to the setting of the `Candidate` that it evaluates."""
        return (*self.key, tuple(_rounded(c) for c in self.bends), _ordered(self.parameters))

    def at(self, images: int) -> float:
        """The distance of so many images; +inf where it was not measured, failed or is not finite."""
        if self.state == "failed":
            return math.inf
        value = self.rungs.get(images, self.distance if self.images == images else None)
        return value if value is not None and math.isfinite(value) else math.inf


class Signal(enum.Enum):
    """What a strategy answers when it has no candidate."""

    WAIT = "wait"
    """Running points must finish before anything can be decided."""
    FINISHED = "finished"
    """The search is over."""


WAIT: Literal[Signal.WAIT] = Signal.WAIT
FINISHED: Literal[Signal.FINISHED] = Signal.FINISHED

History: TypeAlias = Sequence[Point]
Step: TypeAlias = tuple[Candidate, ...] | Signal


class Strategy(Protocol):
    """Chooses trials. All methods are pure, and none depends on the order of the history."""

    def next(self, history: History) -> Step:
        """The candidates to start now, or a `Signal`.

        There is at least one candidate, and none of them is running or was evaluated in `history`. A caller
        may start only some of them: what is still wanted will be proposed again.
        """

    def finalists(self, history: History) -> tuple[Candidate, ...]:
        """The schedules that the finished search would answer with, the best first; without λ = 1."""

    def expected_trials(self, history: History) -> int:
        """About how many trials the search will take in all, with those in `history`; for a progress bar."""
