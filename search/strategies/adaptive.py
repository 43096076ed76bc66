"""The search that spends little: few points of few images find where the minimum lies, more images only refine it.

Three stages, each a function of what the ones before it measured:

1. Along the mean λ, then k, then the options of the solver, a line is explored at the first rung (`line`).
2. A quadratic surface is fitted to all of it, with the noise that the trials share (`surface`). It says where the
   minimum is and how much distance is lost, in expectation, because that is not known better.
3. Rounds on more and more images, while that loss is noticeable and the budget lasts: a base near the minimum, and a
   partner of it along each coordinate. Under common random numbers a distance errs smoothly, so more points tell no
   more about a slope than two, and more images do. Half way between base and partner the slope is known whatever the
   curvature, which is the least certain of all: partners are put so that the minimum lies there. Unless it is given,
   the budget is a fifth of what the paper's search would take on that surface.

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
from search.strategies.base import (
    FINISHED,
    WAIT,
    Candidate,
    History,
    Point,
    Setting,
    Signal,
    Step,
    bend_basis,
)
from search.strategies.paper import PaperStrategy
from search.strategies.surface import Sample, Surface, Vector, fit

_LOSS = 3e-4  # of the distance: an expected loss that is not worth more images
_REACH = 1.0  # of a half width: how far from where it was expected a fitted minimum is believed
_ROUNDS = 4  # at most: one on the middle number of images, two more if the minimum is far, and the last
_SHARE = 0.4  # of what the exploration left, for the middle round
_STEP = 0.3  # from base to partner, in half widths, at least
_MIRRORED = 2.0  # the same, at most
_SAME = 0.3  # of a half width: a partner stays if the minimum is so near to half way
_REBASE = 0.3  # of a half width: a base farther from the minimum is left
_FAR = 0.8  # the same, for another round on as many images
_FIFTH = 0.2  # of the trials of the paper's search,
_FEWER = 1  # where it takes so many fewer than expected
_SHORTEST = 7  # trials of it, at least: λ = 1, and two neighbours for each stride of b and of k
_LONG = 60  # and at most
_EXPLORED = (
    6  # trials of the first rung for each coordinate, which a budget that is not given has in any case
)
_WORTHWHILE = 1.2  # a round has at least so many times the images of the one before
_GRID = 250  # image counts of rounds are multiples of this
# The half width of k and bends, as the root mean square of the change of λ, over that of the mean. By the paper's
# tables of b and k and by the recorded network it is 1.2 to 2.1; too wide a guess costs less than too narrow a one.
_BENT = 2.0
_EXPECTED = 0.7  # the curvature along a coordinate is what its half width says, give or take this share
WINDOW = 1.0  # the same where the half width is that of a window of few images
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
    low: Vector
    high: Vector
    samples: dict[Setting, Sample] = field(default_factory=dict)
    asked: dict[Setting, set[int]] = field(default_factory=dict)
    images: int = 0

    def value(self, candidate: Candidate, images: int) -> float | None:
        """The candidate's distance at so many images; +inf: there is none; None: it has to be measured."""
        earlier = self.asked.setdefault(candidate.setting, set())
        before = len(earlier - {images})
        earlier.add(images)
        ended = self.points.get(candidate.setting, ())
        if (point := _first(ended, images)) is not None:
            return point.at(images)
        hopeless = any(point.state == "failed" or point.images >= images for point in ended)
        return math.inf if hopeless or len(ended) - before >= _TRIES else None

    def use(self, candidate: Candidate, position: Vector, images: int) -> None:
        """Enter what was measured on so many images among the samples of the surface."""
        point = _first(self.points[candidate.setting], images)
        if point is None:
            return
        before = self.samples.get(candidate.setting)
        rungs = dict(before.rungs) if before else {}
        self.images += max(images - max(rungs, default=0), 0)
        rungs[images] = point.at(images)
        longest = before.influence if before and max(rungs) > images else point.influence
        self.samples[candidate.setting] = Sample(position, rungs, longest)


def _first(points: Sequence[Point], images: int) -> Point | None:
    """The point that was the first to measure so many images: what later ones add must not change what was decided."""
    measured = [point for point in points if point.at(images) < math.inf]
    return min(measured, key=lambda p: (p.images, p.at(images), p.influence is None), default=None)


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
    those of the exploration. budget: images of the whole search. protocol: the paper's search; a fifth of what it
    would take, if distances were those of the surface that was explored, is added to the budget.
    """

    nfe: int
    axes: tuple[Axis, ...]
    images: int
    rung: int
    budget: int
    protocol: PaperStrategy | None = None

    def next(self, history: History) -> Step:
        """See `Strategy.next`; `WAIT` while any point runs."""
        if any(p.state == "running" for p in history):
            return WAIT
        return self._plan(history).wanted or FINISHED

    def finalists(self, history: History) -> tuple[Candidate, ...]:
        """The minimum of the surface, then those of fewer coordinates (a line, a uniform λ) and, after the simpler one,
        those whose gain is less than what their own uncertainty loses."""
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
        known = _Known(self.rung, points, *self._bounds())
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
        if not known.samples:
            return _Plan()
        return self._refine(known, centre, widths)

    def _explore(self, known: _Known, a: int, centre: Vector, widths: Vector) -> Candidate | None:
        """The next candidate of the line along axis a; None: it is explored, and centre and widths are moved."""
        axis = self.axes[a]
        step = self._step(axis, widths)
        widths[a] = abs(step)
        if axis.name.startswith("bend"):
            return None  # a line of few images shows less of it than what is expected of the surface
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
                if known.images + self.rung > self._budget(_SHORTEST):
                    break
                return candidate
            values[x] = value
            if candidate is not None and value < math.inf:
                known.use(candidate, self._position(candidate), self.rung)
            x = ask(values, start, step, axis.low, axis.high)
        known.low[a], known.high[a] = line.finite(values, axis.low, axis.high)
        found = line.window(values) if axis.step is not None else None
        if found is None:
            centre[a] = min(values, key=lambda x: (values[x], abs(x - start)))
        else:
            vertex, widths[a] = found
            centre[a] = min(max(line.rounded(vertex, widths[a]), known.low[a]), known.high[a])
        return None

    def _refine(self, known: _Known, centre: Vector, widths: Vector) -> _Plan:
        """The rounds. Partners that stay go on with more images, which costs only those."""
        surface = self._fit(known, centre, widths)
        if surface is None:
            return self._end(known, None, centre, centre, widths)
        at = base = self._believed(known, surface, centre, widths)
        budget = self._budget(self._protocol_trials(surface, at))
        steps = np.full(len(at), _STEP)
        images = self.rung
        middle = int(_SHARE * (budget - known.images)) // (len(at) + 1)
        far = moved = True
        for _ in range(_ROUNDS):
            positions = self._around(known, base, steps, widths)
            reused = sum(self._images(known, position) for position in positions)
            affordable = (budget - known.images + reused) // len(positions)
            count = _gridded(min(self.images, affordable, math.ceil(images * self._need(known, surface))))
            if far and images <= middle < count / _WORTHWHILE:
                count = max(_gridded(middle), images)
            if count <= self.rung or count < images * (1 if moved else _WORTHWHILE):
                break
            wanted = self._measured(known, positions, count)
            if wanted:
                return _Plan(wanted)
            images = count
            surface = self._fit(known, at, widths) or surface
            at = self._believed(known, surface, at, widths)
            budget = self._budget(self._protocol_trials(surface, at))
            away = (at - base) / widths
            distance = math.sqrt(np.mean(away**2))
            far = distance > _FAR
            off = np.abs(away - steps / 2) > _SAME
            moved = bool(off.any())
            if distance > _REBASE:
                base, moved = at, True
                steps = np.full(len(at), _STEP)
            else:
                steps = np.where(off, np.sign(away) * np.clip(np.abs(2 * away), _STEP, _MIRRORED), steps)
        return self._end(known, surface, at, centre, widths)

    def _protocol_trials(self, surface: Surface, at: Vector) -> int:
        """How many the paper's search would take if distances were those of the surface, whose minimum is at `at`."""
        history: list[Point] = []
        while (
            self.protocol is not None
            and len(history) < _LONG
            and not isinstance(step := self.protocol.next(history), Signal)
        ):
            for candidate in step:
                line = zip(self.axes, self._position(candidate), at, strict=True)
                position = [x if axis.name in ("mean", "k") else found for axis, x, found in line]
                value = surface.value(np.array(position))
                history.append(Point(candidate.mean, candidate.k, "complete", value, self.images))
        return max(len(history), _SHORTEST)

    def _budget(self, protocol_trials: int) -> int:
        """Images of the whole search, where the paper's takes so many trials."""
        if self.protocol is None:
            return self.budget
        fifth = round(_FIFTH * (protocol_trials - _FEWER) * self.images)
        return max(self.budget + fifth, _EXPLORED * len(self.axes) * self.rung)

    def _around(self, known: _Known, base: Vector, steps: Vector, widths: Vector) -> list[Vector]:
        """The base, and its partner along each coordinate that has room for one."""
        positions = [base]
        for a in range(len(base)):
            for step in (steps[a], -steps[a]):
                position = base.copy()
                position[a] = min(max(base[a] + step * widths[a], known.low[a]), known.high[a])
                position = self._rounded(known, position, widths)
                if abs(position[a] - base[a]) > 0.5 * _STEP * widths[a]:
                    positions.append(position)
                    break
        return positions

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

    def _end(
        self, known: _Known, surface: Surface | None, at: Vector, explored: Vector, widths: Vector
    ) -> _Plan:
        """The finalists: the minimum over all coordinates, over a line, over a uniform λ. One whose gain is not clear
        comes after the simpler one.

        at: about where the first is. explored: where the lines led to, from which the others are not far.
        """
        if surface is None:
            return _Plan(finalists=self._finalists([explored]))
        names = [axis.name for axis in self.axes]
        sizes = sorted({names.index(name) + 1 for name in ("mean", "k") if name in names} | {len(names)})
        found: list[Vector] = []
        for before, size in zip([0, *sizes[:-1]], sizes, strict=True):
            low, high = known.low.copy(), known.high.copy()
            for a, axis in enumerate(self.axes[size:], size):
                low[a] = high[a] = axis.start
            if size == len(names):
                least = self._believed(known, surface, at, widths)
            else:
                near = np.clip(explored, low, high)
                nearby = fit(tuple(known.samples.values()), near, widths, low, high, self._doubt) or surface
                least = self._rounded(
                    known, _clipped(nearby.least(low, high), near, widths, low, high), widths
                )
            gain = surface.value(found[0]) - surface.value(least) if found else math.inf
            clear = gain > surface.regret * (size - before) / len(names)  # than the loss that they add
            if gain > 0:
                found.insert(0 if clear else 1, least)
        return _Plan(finalists=self._finalists(found), loss=surface.regret)

    def _finalists(self, positions: Sequence[Vector]) -> tuple[Candidate, ...]:
        found = [self._candidate("final", position, self.rung) for position in positions]
        unscaled = Candidate("baseline", 1, 0).setting
        return tuple(c for c in found if c is not None and c.setting != unscaled)

    # ---- coordinates

    def _fit(self, known: _Known, centre: Vector, widths: Vector) -> Surface | None:
        return fit(tuple(known.samples.values()), centre.copy(), widths, known.low, known.high, self._doubt)

    @property
    def _doubt(self) -> Vector:
        return np.array([_EXPECTED if axis.step is None else WINDOW for axis in self.axes])

    def _bounds(self) -> tuple[Vector, Vector]:
        return np.array([axis.low for axis in self.axes]), np.array([axis.high for axis in self.axes])

    def _believed(self, known: _Known, surface: Surface, centre: Vector, widths: Vector) -> Vector:
        return self._rounded(known, _clipped(surface.minimum, centre, widths, known.low, known.high), widths)

    def _rounded(self, known: _Known, position: Vector, widths: Vector) -> Vector:
        """As people write it: a stride of a hundredth of the window or a little more."""
        rounded = np.array([line.rounded(x, w) for x, w in zip(position, widths, strict=True)])
        inside: Vector = np.clip(rounded, known.low, known.high)
        return inside

    def _step(self, axis: Axis, widths: Vector) -> float:
        if axis.step is not None:
            return axis.step
        t = np.arange(self.nfe) - (self.nfe - 1) / 2
        shape = t if axis.name == "k" else bend_basis(self.nfe)[int(axis.name[4:]) - 2]
        size = math.sqrt(np.mean(shape**2)) or 1.0  # k of one evaluation: it changes nothing
        step = float(_BENT * widths[0] / size)
        return line.rounded(step, step)

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
