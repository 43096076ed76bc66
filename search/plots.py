"""What the pictures of a search show, as plain values: panels, series and labels, from the store's records.

Only distances of equally many images on the same random numbers compare, so each such group has a panel of its own,
or trials that nothing joins. Knows nothing of how they are drawn: `figures` makes pictures of them, `dashboard` the
interactive plots of Optuna's dashboard.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from objectives.paired import difference_error, first, unpack
from search.bias import Diagnosis
from search.report import number, parameter_names, parameters_in_words
from search.sensitivity import COORDINATES, Fitted, position, searched, surface
from storage import CONFIRM, Evaluation, Job

Look = Literal["baseline", "first", "second", "third", "fourth", "fifth", "lost", "fit", "join"]
"""What a series is, which `figures` gives a colour and a marker."""

COMPARED: tuple[Look, ...] = ("second", "first", "third", "fourth")
"""Those of the schedules of a diagnosis, λ = 1 first; more cannot be told apart."""

_EVALUATIONS = "evaluation t (sampling goes from left to right)"
_LABELS = {"mean": "mean λ", "k": "k (change of λ per network evaluation)"}
_LOOKS: dict[str, Look] = {
    "baseline": "baseline",
    "b": "first",
    "coarse": "first",
    "k": "second",
    "fine": "third",
    "refine": "third",
    "bend": "fourth",
    CONFIRM: "fifth",
}


@dataclass(frozen=True, slots=True)
class Series:
    """Points x, y with error bars, where they are known; joined by a line or not. texts: of each point, to read."""

    name: str
    look: Look
    x: tuple[float, ...]
    y: tuple[float, ...]
    errors: tuple[float, ...] | None = None
    texts: tuple[str, ...] = ()
    markers: bool = True
    joined: bool = False
    shown: bool = True  # in the legend


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes. y_label: where it is another one than the plot's."""

    title: str
    series: tuple[Series, ...]
    y_label: str = ""

    @property
    def marks(self) -> list[float]:
        """The x to label on a logarithmic axis: all but those whose labels would overlap the next one's."""
        seen = sorted({x for series in self.series for x in series.x})
        return [x for x, above in zip(seen, [*seen[1:], math.inf], strict=True) if above > 1.25 * x]


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture. key: for file names. falling: the x axis runs from large to small. bars: y is named, x are lengths."""

    key: str
    title: str
    x_label: str
    y_label: str
    panels: tuple[Panel, ...]
    note: str = ""
    log_x: bool = False
    falling: bool = False
    bars: bool = False

    @property
    def columns(self) -> int:
        """Panels side by side: so few that letters can be read where a page is as wide as a text."""
        return min(len(self.panels), 2)


def of_job(job: Job, evaluations: Sequence[Evaluation]) -> tuple[Plot, ...]:
    """Every plot of a search for which there is something to show."""
    fitted = surface(job, evaluations)
    plots = (
        distances(job, evaluations, 0, fitted),
        distances(job, evaluations, 1, fitted),
        parameters(job, evaluations),
        schedules(evaluations, job),
        rungs(job, evaluations),
        cost(job, evaluations),
    )
    return tuple(plot for plot in plots if any(panel.series for panel in plot.panels))


# --- distance over a coordinate -----------------------------------------------------------------------------


def distances(job: Job, evaluations: Sequence[Evaluation], axis: int, fitted: Fitted | None) -> Plot:
    """The distance over the mean λ (axis 0) or k (1): a panel for each image count and seed that the search compared.

    Joined: trials that differ in this coordinate alone. Bars: the standard error of the difference to the lowest one
    of the panel, which is what decides, since their common error does not.
    """
    groups: dict[tuple[bool, int], list[Evaluation]] = {}
    for e in searched(job, evaluations):
        groups.setdefault((False, e.images), []).append(e)
    for e in evaluations:
        if e.phase == CONFIRM and e.seed != job.seed and e.state == "complete" and not e.parameters:
            groups.setdefault((True, e.images), []).append(e)
    for (fresh, images), group in groups.items():
        if not fresh:  # those that went on from there had as many images once
            group += [e for e in searched(job, evaluations) if images in e.rungs and e not in group]
    panels = []
    for (fresh, images), group in sorted(groups.items()):
        if len({position(e)[axis] for e in group}) > 1:
            panels.append(_panel(group, axis, images, fresh, None if fresh else fitted))
    name = COORDINATES[axis]
    return Plot(
        key=f"distance-over-{name}",
        title=f"Distance over {'the mean λ' if axis == 0 else 'k'}",
        x_label=_LABELS[name],
        y_label=job.evaluator.objective,
        panels=tuple(panels),
        note="Bars: standard error of the difference to the lowest point of the panel. "
        "Lines join trials that differ in nothing else.",
    )


def _panel(group: list[Evaluation], axis: int, images: int, fresh: bool, fitted: Fitted | None) -> Panel:
    series = []
    lines: dict[float, dict[float, float]] = {}
    for e in group:
        here = position(e)
        lines.setdefault(round(here[1 - axis], 9), {})[here[axis]] = e.rungs[images]
    for other, values in lines.items():
        if len(values) > 2 and not fresh:
            x = sorted(values)
            name = f"{'k' if axis == 0 else 'mean λ'} = {number(other)}"
            series.append(
                Series(
                    name,
                    "join",
                    tuple(x),
                    tuple(values[v] for v in x),
                    markers=False,
                    joined=True,
                    shown=False,
                )
            )
    if fitted is not None:
        section = _section(group, axis, images, fitted)
        if section is not None:
            series.append(section)
    series += _points(group, images, lambda e: position(e)[axis])
    return Panel(f"{images:,} images{', fresh random numbers' if fresh else ''}", tuple(series))


def _points(group: list[Evaluation], images: int, place: Callable[[Evaluation], float]) -> list[Series]:
    """A series for each phase of a group of trials, at `place`."""
    lowest = min(group, key=lambda e: e.rungs[images])
    by_phase: dict[str, list[Evaluation]] = {}
    for e in group:
        by_phase.setdefault("baseline" if e.is_baseline else e.phase, []).append(e)
    return [
        Series(
            "λ = 1" if phase == "baseline" else phase,
            _LOOKS.get(phase, "fourth"),
            tuple(place(e) for e in members),
            tuple(e.rungs[images] for e in members),
            tuple(_error(e, lowest, images) for e in members),
            tuple(_text(e, images) for e in members),
        )
        for phase, members in by_phase.items()
    ]


def parameters(job: Job, evaluations: Sequence[Evaluation]) -> Plot:
    """The distance over each of the solver's numbers that was searched beside λ, on the number of images at which most
    values of it were tried. Where a trial left it alone it is what the job says."""
    tried = [e for e in evaluations if e.seed == job.seed and e.distance is not None]
    groups: dict[int, list[Evaluation]] = {}
    for e in tried:
        for images in e.rungs:
            groups.setdefault(images, []).append(e)
    panels = []
    for name in parameter_names(tried):

        def value(e: Evaluation, name: str = name) -> float:
            return float(e.parameters.get(name, job.sampling.get(name) or 0.0))

        images, group = max(
            groups.items(), key=lambda one: (len({value(e) for e in one[1] if e.parameters}), -one[0])
        )
        panels.append(Panel(f"{name}, {images:,} images", tuple(_points(group, images, value))))
    return Plot(
        key="distance-over-parameters",
        title="Distance over the solver's numbers",
        x_label="value",
        y_label=job.evaluator.objective,
        panels=tuple(panels),
        note="Bars: standard error of the difference to the lowest point of the panel. λ differs between the points.",
    )


def _section(group: Sequence[Evaluation], axis: int, images: int, fitted: Fitted) -> Series | None:
    """The fitted surface through its minimum, at the level of the trials of so many images."""
    found, width = fitted.surface, fitted.widths[axis]
    near = [
        e
        for e in group
        if (np.abs(np.array(position(e)) - found.minimum) <= 2 * np.array(fitted.widths)).all()
    ]
    if not near:
        return None
    level = float(np.mean([e.rungs[images] - found.value(np.array(position(e))) for e in near]))
    x = np.linspace(found.minimum[axis] - 2 * width, found.minimum[axis] + 2 * width, 41)
    places = np.tile(found.minimum, (len(x), 1))
    places[:, axis] = x
    y = [level + found.value(place) for place in places]
    other = number(round(float(found.minimum[1 - axis]), 4))
    name = f"fit at {'k' if axis == 0 else 'mean λ'} = {other}"
    return Series(name, "fit", tuple(map(float, x)), tuple(y), markers=False, joined=True)


def _error(e: Evaluation, lowest: Evaluation, images: int) -> float:
    one, other = unpack(e.influence), unpack(lowest.influence)
    if e is lowest or one is None or other is None:
        return 0.0
    return difference_error(first(one, images), first(other, images))


def _text(e: Evaluation, images: int) -> str:
    mean, k = (number(round(x, 6)) for x in position(e))
    more = parameters_in_words(e.parameters)
    return f"trial {e.number}, {e.phase}: mean λ {mean}, k {k}{more}, {images:,} images"


# --- schedules ----------------------------------------------------------------------------------------------


def winners(evaluations: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """The best of each kind of schedule ("uniform", "linear", "free") on most images: of those that were confirmed,
    where some were."""
    known = [e for e in evaluations if e.distance is not None and e.state in ("complete", "pruned")]
    tried = [e for e in known if not e.is_baseline]
    found = {}
    for kind in ("uniform", "linear", "free"):
        of_kind = [e for e in tried if _kind(e) == kind]
        final = [e for e in of_kind if e.phase == CONFIRM] or of_kind
        if final:
            most = max(e.images for e in final)
            found[kind] = min((e for e in final if e.images == most), key=lambda e: e.distance or 0.0)
    return found


def _kind(e: Evaluation) -> str:
    return "free" if e.k is None else "uniform" if e.k == 0 else "linear"


def schedules(evaluations: Sequence[Evaluation], job: Job) -> Plot:
    """λ_t over the evaluations as sampling goes: λ = 1 and the best schedule of each kind."""
    steps = tuple(float(t) for t in range(job.nfe))
    looks: dict[str, Look] = {"uniform": "first", "linear": "second", "free": "third"}
    best = winners(evaluations)
    series = [
        Series(_described(kind, e), looks[kind], steps, e.lambdas, joined=True) for kind, e in best.items()
    ]
    if series:
        series.insert(0, Series("λ = 1", "baseline", steps, (1.0,) * job.nfe, joined=True))
    return Plot(
        key="schedules",
        title="The best schedules",
        x_label=_EVALUATIONS,
        y_label="λ_t (divides the predicted noise)",
        panels=(Panel("", tuple(series)),),
        falling=True,
    )


def _described(kind: str, e: Evaluation) -> str:
    extra = parameters_in_words(e.parameters)
    if kind == "uniform":
        return f"uniform, λ = {number(e.b)}{extra}"
    return f"free{extra}" if kind == "free" else f"linear, k = {number(e.k)}, b = {number(e.b)}{extra}"


# --- rungs and cost -----------------------------------------------------------------------------------------


def rungs(job: Job, evaluations: Sequence[Evaluation]) -> Plot:
    """The distance over the images so far, a line for each trial; crosses end those that did not get all images."""
    panels = []
    for fresh in (False, True):
        series: list[Series] = []
        seen: set[str] = set()
        for e in evaluations:
            if (e.seed != job.seed) != fresh or not e.rungs or e.state == "failed":
                continue
            x = tuple(float(n) for n in sorted(e.rungs))
            y = tuple(e.rungs[int(n)] for n in x)
            one = e.is_baseline
            full = e.images == (job.confirm if e.phase == CONFIRM else job.images)
            name = "λ = 1" if one else "to the end" if full else "fewer images"
            look: Look = "baseline" if one else "first" if full else "lost"
            texts = tuple(_text(e, int(n)) for n in x)
            series.append(Series(name, look, x, y, texts=texts, joined=True, shown=name not in seen))
            seen.add(name)
        if series:
            title = "confirmation, fresh random numbers" if fresh else f"search, seed {job.seed}"
            panels.append(Panel(title, tuple(series)))
    return Plot(
        key="distance-over-images",
        title="Distance over images",
        x_label="images so far",
        y_label=job.evaluator.objective,
        panels=tuple(panels),
        note="Distances of unequal numbers of images do not compare. Crosses: trials that ended with fewer.",
        log_x=True,
    )


def cost(job: Job, evaluations: Sequence[Evaluation]) -> Plot:
    """What each phase cost in network evaluations, in units of one full trial in its labels."""
    full = job.images * job.nfe
    spent: dict[str, list[Evaluation]] = {}
    for e in evaluations:
        spent.setdefault(e.phase, []).append(e)
    names, lengths, texts = [], [], []
    for phase, members in spent.items():
        total = sum(e.network_evaluations for e in members)
        trials = f"{len(members)} trial{'s' if len(members) > 1 else ''}"
        names.append(phase)
        lengths.append(float(total))
        texts.append(f"{phase}: {trials}, {total / full:.2g} full trials")
    series = tuple(
        Series(text, _LOOKS.get(name, "fourth"), (length,), (float(place),))
        for place, (name, length, text) in enumerate(zip(names, lengths, texts, strict=True))
    )
    return Plot(
        key="cost",
        title="Cost of the search",
        x_label="network evaluations on one image",
        y_label="phase",
        panels=(Panel("", series),),
        note=f"A full trial: {job.images:,} images × NFE {job.nfe} = {full:,} evaluations.",
        bars=True,
    )


# --- exposure bias ------------------------------------------------------------------------------------------


def exposure(found: Diagnosis) -> Plot:
    """The noise that the solver removes beside that of training, their ratio, and δ_t above its floor, over the
    evaluations as sampling goes."""
    steps = tuple(float(t) for t in range(found.nfe))

    def panel(title: str, label: str, training: Sequence[float], of: Sequence[Sequence[float]]) -> Panel:
        series = [Series("training", "fit", steps, tuple(training), markers=False, joined=True)]
        for one, look, values in zip(found.schedules, COMPARED, of, strict=False):
            series.append(Series(one.name, look, steps, tuple(values), joined=True))
        return Panel(title, tuple(series), label)

    schedules = found.schedules
    above = [
        [delta - floor for delta, floor in zip(one.deltas, found.floor, strict=True)] for one in schedules
    ]
    return Plot(
        key="exposure-bias",
        title="Noise and states of sampling against training",
        x_label=_EVALUATIONS,
        y_label="",
        panels=(
            panel(
                "Predicted noise",
                "mean ‖ε/λ‖₂ of an image",
                found.training,
                [one.scaled for one in schedules],
            ),
            panel(
                "Sampling against training",
                "‖ε/λ‖₂ in sampling / ‖ε‖₂ in training",
                (1.0,) * found.nfe,
                [found.ratios(one) for one in schedules],
            ),
            panel("States", "δ_t above its floor", (0.0,) * found.nfe, above),
        ),
        note="ε/λ: the noise that the solver removes. "
        f"δ_t: squared Fréchet distance of {found.images:,} states of sampling to noised real images; "
        "floor: that of as many noised images.",
        falling=True,
    )
