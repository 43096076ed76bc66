"""The contract of search strategies: a pure function from what was tried to what to try next.

Knows nothing of how a candidate is evaluated, where the history is stored, or which trials run in parallel.
A strategy keeps no state: called again with the same history, after a crash or in another process, it answers
the same.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from samplers.schedule import Schedule

_DECIMALS = 9

State: TypeAlias = Literal["running", "complete", "failed", "pruned"]
Key: TypeAlias = tuple[float, float]


def key(mean: float, k: float) -> Key:
    """The identity of a linear schedule: rounded to 1e-9, so that 1 + 3 * 0.001 and 1.003 are one."""
    return round(mean, _DECIMALS) + 0.0, round(k, _DECIMALS) + 0.0  # + 0.0 turns -0.0 into 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule to evaluate: λ_t = k·t + b with b = mean − k·(NFE − 1)/2, so that Σ λ_t = NFE·mean.

    `phase` names the part of the search that asks for it. `mean` (> 0; it is b where k = 0) and `k` (per
    evaluation) are rounded to 1e-9 when made, so that they print as people write them.
    """

    phase: str
    mean: float
    k: float

    def __post_init__(self) -> None:
        assert 0 < self.mean < math.inf, f"the mean {self.mean} of a candidate is not positive and finite"
        assert math.isfinite(self.k), f"the k {self.k} of a candidate is not finite"
        mean, k = self.key
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "k", k)

    @property
    def key(self) -> Key:
        """Its identity; equal to the key of every `Point` that evaluated it."""
        return key(self.mean, self.k)

    def schedule(self, nfe: int) -> Schedule:
        """The schedule for `nfe` evaluations; `InputError` where it would hold a λ_t ≤ 0."""
        return Schedule.constrained(nfe, self.mean, self.k)


@dataclass(frozen=True, slots=True)
class Point:
    """One trial as the store tells it: the schedule (`mean`, `k`), how far it got, and what it measured.

    `distance` (lower is better) is the latest value, measured on `images` generated images; None before the
    first. It may be NaN or infinite. Several points may have the same key: a trial that was repeated.
    """

    mean: float
    k: float
    state: State
    distance: float | None
    images: int

    def __post_init__(self) -> None:
        assert self.state in ("running", "complete", "failed", "pruned"), f"unknown state {self.state!r}"
        assert self.images >= 0, f"a trial with {self.images} images"

    @property
    def key(self) -> Key:
        """Its identity; equal to the key of the `Candidate` that it evaluates."""
        return key(self.mean, self.k)


class Signal(enum.Enum):
    """What a strategy answers when it has no candidate."""

    WAIT = "wait"
    """Running points must finish before anything can be decided."""
    FINISHED = "finished"
    """The search is over: its answer is the complete point with the least distance."""


WAIT: Literal[Signal.WAIT] = Signal.WAIT
FINISHED: Literal[Signal.FINISHED] = Signal.FINISHED

History: TypeAlias = Sequence[Point]
Step: TypeAlias = tuple[Candidate, ...] | Signal


class Strategy(Protocol):
    """Chooses trials. Both methods are pure, and neither depends on the order of the history."""

    def next(self, history: History) -> Step:
        """The candidates to start now, or a `Signal`.

        There is at least one candidate, and none of them is running or was evaluated in `history`. A caller
        may start only some of them: what is still wanted will be proposed again.
        """

    def expected_trials(self, history: History) -> int:
        """About how many trials the search will take in all, with those in `history`; for a progress bar."""
