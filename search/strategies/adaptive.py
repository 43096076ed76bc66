"""The search that spends little: few points of few images find where the minimum lies, more images only refine it.

Three stages, each a function of what the ones before it measured:

1. Along each coordinate in turn (the mean λ, k, …) a line is explored at the first rung, until the best value lies
   in a window where the distance is a parabola (`line`).
2. A quadratic surface is fitted to all of it, with the noise that the trials share (`surface`). It says where the
   minimum is and how much distance is lost, in expectation, because that is not known better.
3. While that loss is noticeable and the budget lasts, the corners of a simplex around the minimum are measured on
   as many more images as it takes, and the surface is fitted again.

The stride is as fine as the noise allows: the answer is a minimum of the surface, and not one of the points.

Knows nothing of models or images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from samplers.errors import InputError
from search.strategies import line
from search.strategies.base import FINISHED, WAIT, Candidate, History, Point, Setting, Step, bend_basis
from search.strategies.surface import Sample, Surface, Vector, fit

_LOSS = 3e-4  # of the distance: an expected loss that is not worth more images
_CLEAR = 2.0  # coordinates are moved for a gain of so many times what noise alone would give
_REACH = 3.0  # of the window's half width: how far a fitted minimum is believed
_STEP = 0.3  # of the steps of a round, in half widths
_SHARE = 0.3
_ROUNDS = 4
_SLACK = 2.0
_REBASE = 0.5
_SAME = 0.3
_MOVED = 1.0  # of a half width: a minimum so far from the corners wants new ones
_GRID = 250
_WORTHWHILE = 1.2
_RESERVE = 0
_TRIES = 2  # so often is a trial repeated that ends without the rung that was asked for


@dataclass(frozen=True, slots=True)
class Axis:
    """A coordinate of the search: "mean", "k", "bend2", "bend3", … or an option of the solver.

    It starts at `start` with a first step of `step` (signed by where the minimum is expected; None: as much of λ as
    the window of the mean) and stays inside [low, high].
    """

    name: str
    start: float
    step: float | None
    low: float
    high: float

    def __post_init__(self) -> None:
        assert self.low <= self.start <= self.high, self
        assert self.step != 0, self


@dataclass(slots=True)
class _Known:
    """What has been measured, and the part of it that the stages so far have asked for."""

    rung: int
    points: Mapping[Setting, Sequence[Point]]
    samples: dict[Setting, Sample] = field(default_factory=dict)
    asked: dict[Setting, set[int]] = field(default_factory=dict)
    images: int = 0

    def value(self, candidate: Candidate, images: int) -> float | None:
        """The candidate's distance at so many images; +inf: there is none; None: it has to be measured."""
        ended = self.points.get(candidate.setting, ())
        value = min((point.at(images) for point in ended), default=math.inf)
        if value < math.inf:
            self.asked.setdefault(candidate.setting, set()).add(images)
            return value
        tried = [point for point in ended if point.state == "failed" or point.images >= images]
        earlier = self.asked.setdefault(candidate.setting, set()) - {images}
        self.asked[candidate.setting].add(images)
        return math.inf if tried or len(ended) - len(earlier) >= _TRIES else None

    def use(self, candidate: Candidate, position: Vector, images: int) -> None:
        """Enter what was measured up to so many images among the samples of the surface."""
        ended = [p for p in self.points[candidate.setting] if p.at(images) < math.inf]
        if not ended:
            return
        best = min(ended, key=lambda p: p.at(images))
        before = self.samples.get(candidate.setting)
        self.images += images - (max(before.rungs) if before else 0)
        wanted = {self.rung, images} | (set(before.rungs) if before else set())
        rungs = {n: best.at(n) for n in sorted(wanted) if best.at(n) < math.inf}
        self.samples[candidate.setting] = Sample(position, rungs, best.influence)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where a history leads: to candidates, or to the finalists of a search that is over."""

    wanted: tuple[Candidate, ...] = ()
    finalists: tuple[Candidate, ...] = ()
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class AdaptiveStrategy:
    """See the module.

    nfe: network evaluations. axes: explored in this order, the mean first. images: the most for one trial. rung:
    those of the exploration. budget: images of the whole search, which refinements keep to.
    """

    nfe: int
    axes: tuple[Axis, ...]
    images: int
    rung: int
    budget: int

    def next(self, history: History) -> Step:
        """See `Strategy.next`; `WAIT` while any point runs."""
        if any(p.state == "running" for p in history):
            return WAIT
        return self._plan(history).wanted or FINISHED

    def finalists(self, history: History) -> tuple[Candidate, ...]:
        """The minimum of the surface, then those for fewer coordinates: a line, a uniform λ."""
        return self._plan(history).finalists

    def expected_trials(self, history: History) -> int:
        """See `Strategy.expected_trials`."""
        ended = [p for p in history if p.state != "running"]
        wanted = self._plan(ended).wanted
        usual = 2 + 5 * len(self.axes)
        return max(usual, len(history) + len(wanted)) if wanted else len(history)

    def loss(self, history: History) -> float | None:
        """The distance that the finished search expects to lose because the minimum is not known better."""
        return self._plan(history).loss

    # ---- the stages

    def _plan(self, history: History) -> _Plan:
        points: dict[Setting, list[Point]] = {}
        for point in history:
            if point.state != "running" and not point.fresh:
                points.setdefault(point.setting, []).append(point)
        known = _Known(self.rung, points)
        baseline = Candidate("baseline", 1, 0, images=self.rung)
        value = known.value(baseline, self.rung)
        if value is None:
            return _Plan((baseline,))
        known.use(baseline, self._position(baseline), self.rung)

        centre = np.array([axis.start for axis in self.axes])
        widths = np.array([abs(axis.step or 1.0) for axis in self.axes])
        for a in range(len(self.axes)):
            wanted = self._explore(known, a, centre, widths)
            if wanted is not None:
                return _Plan((wanted,))
        return self._refine(known, centre, widths)

    def _explore(self, known: _Known, a: int, centre: Vector, widths: Vector) -> Candidate | None:
        """The next candidate of the line along axis a; None: it is explored, and centre and widths are moved."""
        axis = self.axes[a]
        step = self._step(axis, widths)
        widths[a] = abs(step)
        ask = line.ask if axis.step is not None else line.bracket
        values = {}
        for sample in known.samples.values():
            others = np.delete(sample.position - centre, a)
            if (np.abs(others) < 1e-9).all() and self.rung in sample.rungs:
                values[float(sample.position[a])] = sample.rungs[self.rung]
        start = float(centre[a])
        x: float | None = start if start not in values else ask(values, start, step, axis.low, axis.high)
        while x is not None:
            position = centre.copy()
            position[a] = x
            candidate = self._candidate(_phase(axis.name), position, self.rung)
            value = math.inf if candidate is None else known.value(candidate, self.rung)
            if value is None:
                return candidate
            values[x] = value
            if candidate is not None and value < math.inf:
                known.use(candidate, self._position(candidate), self.rung)
            x = ask(values, start, step, axis.low, axis.high)
        found = line.window(values) if axis.step is not None else None
        if found is None:
            centre[a] = min(values, key=lambda x: (values[x], abs(x - start)))
        else:
            vertex, widths[a] = found
            centre[a] = min(max(line.rounded(vertex, widths[a]), axis.low), axis.high)
        return None

    def _refine(self, known: _Known, centre: Vector, widths: Vector) -> _Plan:
        """Rounds on more and more images: a base, and a partner of it along each coordinate.

        Base and partner tell the slope half way between them, where no curvature has to be known. So a partner is
        kept, and goes on with more images, while the minimum stays about half way; else it is mirrored at the minimum.
        """
        size = len(self.axes) + 1
        surface = self._fit(known, centre, widths)
        if surface is None:
            return self._end(known, None, centre, widths)
        base = centre = self._believed(surface, centre, widths)
        steps = np.array([_STEP if a.high - x >= x - a.low else -_STEP for a, x in zip(self.axes, base, strict=True)])
        images, far, changed = self.rung, True, True
        middle = _gridded(int(_SHARE * (self.budget - known.images)) // size)
        for _ in range(_ROUNDS):
            need = self._need(known, surface)
            if need <= 1:
                break
            positions = [base, *(self._partner(base, a, steps, widths) for a in range(len(steps)))]
            kept = sum(self._images(known, position) for position in positions)
            count = (self.budget - known.images + kept) // (size + (_RESERVE if images <= middle else 0))
            count = _gridded(min(count, self.images, math.ceil(images * need)))
            if far and middle < count / _WORTHWHILE and images <= middle:
                count = max(middle, images)
            if count < images or (not changed and count < _WORTHWHILE * images):
                break
            wanted = self._measured(known, positions, count)
            if wanted:
                return _Plan(wanted)
            images = count
            surface = self._fit(known, centre, widths) or surface
            centre = self._believed(surface, centre, widths)
            away = (centre - base) / widths
            far = bool((np.abs(away) > _MOVED).any())
            if (np.abs(away) > _REBASE).any():
                base = centre
                off = np.array([True])
            else:
                off = np.abs(away - steps / 2) > _SAME
                mirrored = np.sign(away) * np.clip(np.abs(2 * away), _STEP, 2)
                steps = np.where(off, mirrored, steps)
            changed = far or bool(off.any())
        return self._end(known, surface, centre, widths)

    def _partner(self, base: Vector, a: int, steps: Vector, widths: Vector) -> Vector:
        position = base.copy()
        position[a] += steps[a] * widths[a]
        return self._rounded(position, widths)

    def _images(self, known: _Known, position: Vector) -> int:
        """On how many images a position was measured."""
        candidate = self._candidate("refine", position, self.rung)
        sample = None if candidate is None else known.samples.get(candidate.setting)
        return 0 if sample is None else max(sample.rungs)

    def _need(self, known: _Known, surface: Surface) -> float:
        """How many times the images the expected loss is worth."""
        distance = min(min(s.rungs.values()) for s in known.samples.values())
        return surface.regret / (_LOSS * max(abs(distance), 1e-12))

    def _measured(self, known: _Known, positions: Sequence[Vector], images: int) -> tuple[Candidate, ...]:
        """Use what is known of these positions at so many images; what has still to be measured there."""
        wanted = []
        for position in positions:
            candidate = self._candidate("refine", position, images)
            if candidate is None:
                continue
            value = known.value(candidate, images)
            if value is None:
                wanted.append(candidate)
            elif value < math.inf:
                known.use(candidate, self._position(candidate), images)
        return tuple(wanted)

    def _end(self, known: _Known, surface: Surface | None, centre: Vector, widths: Vector) -> _Plan:
        """The finalists: the minimum over all coordinates, over a line, over a uniform λ, where each is worth it."""
        if not known.samples:
            return _Plan()
        if surface is None:
            only = self._candidate("final", centre, self.rung)
            return _Plan(finalists=() if only is None else (only,))
        names = [axis.name for axis in self.axes]
        sizes = sorted({names.index(name) + 1 for name in ("mean", "k") if name in names} | {len(names)})
        found: list[Vector] = []
        for size in sizes:
            low, high = self._bounds()
            for a, axis in enumerate(self.axes[size:], size):
                low[a] = high[a] = axis.start
            at = self._rounded(_clipped(surface.least(low, high), centre, widths, low, high), widths)
            if found:
                gain = surface.value(found[-1]) - surface.value(at)
                noise = surface.regret * (size - sizes[sizes.index(size) - 1]) / len(self.axes)
                if gain <= _CLEAR * noise:
                    continue
            found.append(at)
        finalists = [self._candidate("final", at, self.rung) for at in reversed(found)]
        return _Plan(finalists=tuple(c for c in finalists if c is not None), loss=surface.regret)

    # ---- coordinates

    def _fit(self, known: _Known, centre: Vector, widths: Vector) -> Surface | None:
        return fit(tuple(known.samples.values()), centre.copy(), widths, *self._bounds())

    def _bounds(self) -> tuple[Vector, Vector]:
        return np.array([axis.low for axis in self.axes]), np.array([axis.high for axis in self.axes])

    def _believed(self, surface: Surface, centre: Vector, widths: Vector) -> Vector:
        return self._rounded(_clipped(surface.minimum, centre, widths, *self._bounds()), widths)

    def _rounded(self, position: Vector, widths: Vector) -> Vector:
        """As people write it: a stride of a hundredth of the window or a little more."""
        low, high = self._bounds()
        rounded = np.array([line.rounded(x, w) for x, w in zip(position, widths, strict=True)])
        return np.clip(rounded, low, high)

    def _step(self, axis: Axis, widths: Vector) -> float:
        if axis.step is not None:
            return axis.step
        t = np.arange(self.nfe) - (self.nfe - 1) / 2
        shape = t if axis.name == "k" else bend_basis(self.nfe)[int(axis.name[4:]) - 2]
        return float(_SLACK * widths[0] / math.sqrt(np.mean(shape**2)))

    def _position(self, candidate: Candidate) -> Vector:
        bends = {f"bend{j + 2}": c for j, c in enumerate(candidate.bends)}
        values = {"mean": candidate.mean, "k": candidate.k, **bends, **dict(candidate.parameters)}
        return np.array(
            [values.get(a.name, 0.0 if a.name.startswith("bend") else a.start) for a in self.axes]
        )

    def _candidate(self, phase: str, position: Vector, images: int) -> Candidate | None:
        """The candidate at a position; None where it would hold a λ_t ≤ 0."""
        values = {axis.name: float(x) for axis, x in zip(self.axes, position, strict=True)}
        if values["mean"] <= 0:
            return None
        bends = tuple(values.get(f"bend{j + 2}", 0.0) for j in range(max(self.nfe - 2, 0)))
        parameters = tuple(
            (axis.name, values[axis.name])
            for axis in self.axes
            if axis.name not in ("mean", "k")
            and not axis.name.startswith("bend")
            and round(values[axis.name] - axis.start, 9) != 0
        )
        candidate = Candidate(phase, values["mean"], values.get("k", 0.0), bends, parameters, images)
        try:
            candidate.schedule(self.nfe)
        except InputError:
            return None
        return candidate


def _phase(name: str) -> str:
    return "b" if name == "mean" else "bend" if name.startswith("bend") else name


def _clipped(x: Vector, centre: Vector, widths: Vector, low: Vector, high: Vector) -> Vector:
    """x, but no farther from the centre than a fit is believed, nor outside of the bounds."""
    near = np.clip(x, centre - _REACH * widths, centre + _REACH * widths)
    return np.clip(near, low, high)


def _gridded(images: int) -> int:
    return images // _GRID * _GRID if images >= _GRID else images
