"""The search protocol of the paper: a coarse then a fine search for b, then one for k under a constant sum.

"Elucidating the Exposure Bias in Diffusion Models" (ICLR 2024) scans lists of values. Here each of the three
phases is a line search on a lattice with the paper's stride, and ends with what the scan promises: the
neighbours of the best value, one stride to either side, were evaluated and are not better. It takes far fewer
trials.

Knows nothing of models, images or trials in flight. It asks for one candidate at a time: each result decides
the next question, and a trial can use every GPU by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from samplers.errors import InputError
from search.strategies.base import FINISHED, WAIT, Candidate, History, Key, Point, Step, key

_LEAST = 1e-6  # no smaller λ_t or stride; well above the 1e-9 to which candidates are rounded
_FUZZ = 1e-6  # of a stride: how far the end of a range may miss a lattice point and still mean it
_GROWTH = 2  # each step beyond the window, in steps before it: 1, 3, 7, 15, … strides from the start
_SPREAD = 0.2  # how far from the mean the default range of k takes λ_t

# Usual trials by the end of each phase, for the progress bar only.
_USUAL = {"baseline": 1, "coarse": 6, "fine": 9, "k": 13}


@dataclass(frozen=True, slots=True)
class BRange:
    """Where and how finely to search b: at whole strides from 1, inside [start, stop].

    `coarse` must be a multiple of `fine`, so that the coarse points are fine ones too. 0 < start ≤ 1 ≤ stop;
    start = stop = 1 searches no b. Anything else is an `InputError` that names the key.
    """

    coarse: float
    fine: float
    start: float = 0.9
    stop: float = 1.2

    def __post_init__(self) -> None:
        _require_stride("b.coarse", self.coarse)
        _require_stride("b.fine", self.fine)
        if self.fine > self.coarse:
            raise InputError(f"b.fine ({self.fine}) is larger than b.coarse ({self.coarse}): make it smaller")
        if abs(self.coarse / self.fine - self.ratio) > _FUZZ:
            raise InputError(f"b.coarse ({self.coarse}) must be a multiple of b.fine ({self.fine})")
        if not 0 < self.start <= 1:
            raise InputError(f"b.start is {self.start}: it must be above 0 and at most 1, where b starts")
        if not 1 <= self.stop < math.inf:
            raise InputError(f"b.stop is {self.stop}: it must be finite and at least 1, where b starts")

    @property
    def ratio(self) -> int:
        """Fine strides per coarse stride."""
        return round(self.coarse / self.fine)

    def limits(self) -> tuple[int, int]:
        """The first and last index i of b = 1 + i·fine."""
        low, high = _lattice(self.start - 1, self.stop - 1, self.fine)
        return max(low, math.ceil((_LEAST - 1) / self.fine)), high


@dataclass(frozen=True, slots=True)
class KRange:
    """Where and how finely to search k (per evaluation): at whole strides from 0, inside [start, stop].

    start ≤ 0 ≤ stop; start = stop = 0 searches no k. None reaches as far as every λ_t stays within 0.2 of the
    mean, which is 0.4/(NFE − 1). Anything else is an `InputError` that names the key.
    """

    stride: float
    start: float | None = None
    stop: float | None = None

    def __post_init__(self) -> None:
        _require_stride("k.stride", self.stride)
        if self.start is not None and not -math.inf < self.start <= 0:
            raise InputError(f"k.start is {self.start}: it must be finite and at most 0, where k starts")
        if self.stop is not None and not 0 <= self.stop < math.inf:
            raise InputError(f"k.stop is {self.stop}: it must be finite and at least 0, where k starts")

    def limits(self, nfe: int, mean: float) -> tuple[int, int]:
        """The first and last index j of k = j·stride; every λ_t stays positive, whatever the range."""
        if nfe == 1:
            return 0, 0  # the one λ is the mean
        arm = (nfe - 1) / 2  # evaluations from the middle of the schedule, where λ is the mean, to either end
        low, high = _lattice(
            -_SPREAD / arm if self.start is None else self.start,
            _SPREAD / arm if self.stop is None else self.stop,
            self.stride,
        )
        positive = math.floor((mean - _LEAST) / arm / self.stride)
        return max(low, -positive), min(high, positive)


_Range = TypeVar("_Range", BRange, KRange)

_DEFAULTS = {
    "discrete": ({"coarse": 0.005, "fine": 0.001}, {"stride": 0.0002}),
    "sigma": ({"coarse": 0.001, "fine": 0.0001}, {"stride": 0.00002}),
}


@dataclass(frozen=True, slots=True)
class PaperStrategy:
    """λ = 1, then b coarse, then b fine, then k at the best b with Σ λ_t kept. Made by `PaperStrategy.of`.

    `nfe` ≥ 1 is the number of network evaluations. The trials must be comparable: as many images each, made
    from the same random numbers. Whatever failed, was pruned or measured no finite number is never best and
    not tried again; where nothing around λ = 1 gave a number, the search ends. Points off the lattices are
    ignored.
    """

    nfe: int
    b: BRange
    k: KRange

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise InputError(f"nfe is {self.nfe}: it must be at least 1")

    @classmethod
    def of(
        cls,
        nfe: int,
        time: Literal["discrete", "sigma"],
        b: Mapping[str, float] | None = None,
        k: Mapping[str, float] | None = None,
    ) -> PaperStrategy:
        """The strategy with the defaults of a model family, except for what the job file's `b` and `k` say.

        `time` is the model's. "discrete" (ADM) has the strides of the paper: b 0.005 then 0.001, k 0.0002.
        "sigma" (EDM) has b 0.001 then 0.0001, because its published optima have four decimals, and k 0.00002:
        the paper has no k for EDM, and this keeps its ratio of k's stride to b's. One stride of k moves the
        ends of the schedule by stride·(NFE − 1)/2, at NFE 20 about two fine strides of b; a long schedule may
        want a smaller one.

        Unknown keys and impossible values are an `InputError` that names the key.
        """
        b_defaults, k_defaults = _DEFAULTS[time]
        return cls(nfe, _range("b", BRange, b_defaults, b), _range("k", KRange, k_defaults, k))

    def next(self, history: History) -> Step:
        """The one candidate to start now; `WAIT` while any point is running; or `FINISHED`.

        See `Strategy.next`.
        """
        known, running = _outcomes(history)
        if running:
            return WAIT
        wanted = self._wanted(known)
        return FINISHED if wanted is None else (wanted,)

    def finalists(self, history: History) -> tuple[Candidate, ...]:
        """The complete trial of the least distance, and that of the least among uniform λ; without λ = 1."""
        known, _ = _outcomes(history)
        ranked = sorted((value, schedule) for schedule, value in known.items() if value < math.inf)
        found = []
        for of_kind in (ranked, [(value, schedule) for value, schedule in ranked if schedule[1] == 0]):
            if of_kind and of_kind[0][1] != key(1, 0) and of_kind[0][1] not in [c.key for c in found]:
                found.append(Candidate("final", *of_kind[0][1]))
        return tuple(found)

    def expected_trials(self, history: History) -> int:
        """As many as there are, and as many more as is usual; exact at the end.

        See `Strategy.expected_trials`.
        """
        known, running = _outcomes(history)
        wanted = self._wanted(known)
        if wanted is None:
            return len(known) + len(running)
        at_least = len(known) + max(len(running), 1)
        return max(at_least, _USUAL[wanted.phase]) + _USUAL["k"] - _USUAL[wanted.phase]

    @property
    def most_trials(self) -> int:
        """A number of trials that no search exceeds, whatever is measured."""
        low, high = self.b.limits()
        coarse_low, coarse_high = self._coarse_limits()
        k_low, k_high = self.k.limits(self.nfe, self.b.stop)
        return (
            1
            + _most_steps(coarse_high - coarse_low)
            + _most_steps(min(high - low, 2 * self.b.ratio - 2))  # inside one coarse stride on either side
            + _most_steps(k_high - k_low)
        )

    def _coarse_limits(self) -> tuple[int, int]:
        """The first and last index i of b = 1 + i·coarse."""
        low, high = self.b.limits()
        return -(-low // self.b.ratio), high // self.b.ratio

    def _wanted(self, known: Mapping[Key, float]) -> Candidate | None:
        """The next candidate of the first phase that wants one."""
        if key(1, 0) not in known:
            return Candidate("baseline", 1, 0)

        ratio = self.b.ratio
        b_values = {mean: value for (mean, k), value in known.items() if k == 0}
        fine = _Line(_indexed(b_values, 1, self.b.fine, self.b.limits()), *self.b.limits())
        coarse_values = {i // ratio: value for i, value in fine.values.items() if i % ratio == 0}
        coarse = _Line(coarse_values, *self._coarse_limits())
        if (i := coarse.next()) is not None:
            return Candidate("coarse", 1 + i * ratio * self.b.fine, 0)
        if not math.isfinite(fine.values[fine.best]):
            return None
        if (i := fine.next()) is not None:
            return Candidate("fine", 1 + i * self.b.fine, 0)

        best, _ = key(1 + fine.best * self.b.fine, 0)
        k_values = {k: value for (mean, k), value in known.items() if mean == best}
        limits = self.k.limits(self.nfe, best)
        j = _Line(_indexed(k_values, 0, self.k.stride, limits), *limits).next()
        return None if j is None else Candidate("k", best, j * self.k.stride)


@dataclass(frozen=True, slots=True)
class _Line:
    """One line search: the known values by lattice index (+inf: a trial that gave none), and its limits.

    Index 0 is the start of the search and is known.
    """

    values: Mapping[int, float]
    low: int
    high: int

    @property
    def best(self) -> int:
        """The index of the least value; among equals the one nearest to the start."""
        return min(self.values, key=lambda i: (self.values[i], abs(i), i))

    def next(self) -> int | None:
        """The index to evaluate next, in low..high and new; None when both neighbours of the best are known.

        While the best is at an edge of the window, the window grows there; then the gaps on both sides of the
        best are narrowed to one stride. What lies beyond low..high counts as known and worse.
        """
        best = self.best
        below = max((i for i in self.values if i < best), default=None)
        above = min((i for i in self.values if i > best), default=None)
        # Upwards first: the optimum is rarely below the start. At 0 there is no last step to grow from.
        if above is None and best < self.high:
            return min(best + _GROWTH * (best - below) if below is not None and best else 1, self.high)
        if below is None and best > self.low:
            return max(best - _GROWTH * (above - best) if above is not None and best else -1, self.low)
        left = self.low - 1 if below is None else below
        right = self.high + 1 if above is None else above
        if right - left == 2:
            return None
        return best + self._inward(left, best, right)

    def _inward(self, left: int, best: int, right: int) -> int:
        """The step from the best towards the vertex of the parabola through left, best and right."""
        down, up = best - left, right - best
        wide, toward = (up, 1) if up >= down else (down, -1)
        fall = self.values.get(left, math.inf) - self.values[best]
        rise = self.values.get(right, math.inf) - self.values[best]
        # A far edge much higher than the rest holds the vertex near the best: after a few, halve the gap.
        passed = sorted(abs(i - best) for i in self.values if (i - best) * toward < 0)
        creeping = len(passed) > 2 and 2 * passed[2] <= wide
        if creeping or not math.isfinite(fall + rise):
            return toward * (wide // 2)

        slopes = fall / down + rise / up
        share = fall / down / slopes if slopes > 0 else down / (down + up)
        vertex = (share * up - (1 - share) * down) / 2
        if abs(round(vertex)) > 2:
            return round(vertex)
        # One stride away must be evaluated anyway if the best is within two, so it goes before two.
        if vertex >= 0:
            return 1 if up > 1 else -1
        return -1 if down > 1 else 1


def _most_steps(span: int) -> int:
    """The most steps of a `_Line` with span + 1 indices.

    The window doubles until the best is inside (one step per bit, one at the limit, one on the other side);
    then any four steps shrink the wider gap by a third or more, which is 4 / log2(1.5) < 7 steps per bit.
    """
    return min(span, 8 * span.bit_length() + 2)


def _outcomes(history: History) -> tuple[dict[Key, float], set[Key]]:
    """The value of each schedule that is known (+inf: no finite number), and the schedules that are running.

    Of repeated trials the least value counts; a running one hides a failure, since it may be its retry.
    """
    known: dict[Key, float] = {}
    for point in history:
        if point.state != "running":
            known[point.key] = min(known.get(point.key, math.inf), _value(point))
    running = {point.key for point in history if point.state == "running"}
    running -= {schedule for schedule, value in known.items() if value < math.inf}
    return {schedule: value for schedule, value in known.items() if schedule not in running}, running


def _value(point: Point) -> float:
    """A finished point's distance; +inf where it has none, or one of too few images."""
    if point.state == "complete" and point.distance is not None and math.isfinite(point.distance):
        return point.distance
    return math.inf


def _lattice(start: float, stop: float, stride: float) -> tuple[int, int]:
    """The first and last multiple of stride in [start, stop], in strides; start ≤ 0 ≤ stop."""
    return math.ceil(start / stride - _FUZZ), math.floor(stop / stride + _FUZZ)


def _indexed(
    values: Mapping[float, float], origin: float, stride: float, limits: tuple[int, int]
) -> dict[int, float]:
    """The values of those numbers that lie at origin + i·stride with i within the limits, by i."""
    low, high = limits
    indices = {number: round((number - origin) / stride) for number in values}
    return {
        i: values[number]
        for number, i in indices.items()
        if low <= i <= high and key(origin + i * stride, 0) == key(number, 0)
    }


def _require_stride(name: str, value: float) -> None:
    if not _LEAST <= value < math.inf:
        raise InputError(f"{name} is {value}: a stride must be a finite number of at least {_LEAST}")


def _range(
    name: str, kind: type[_Range], defaults: Mapping[str, float], given: Mapping[str, float] | None
) -> _Range:
    """The range with the fields that the job file's section `name` gives, and the defaults of the others."""
    names = [f.name for f in fields(kind)]
    for unknown in sorted((given or {}).keys() - set(names)):
        raise InputError(f"{name}.{unknown} is not a key: {name} takes {', '.join(names)}")
    return kind(**{**defaults, **(given or {})})
