"""What a search has found, put together for readers: an answer in words, tables, plots and pictures.

From the store's records alone, needing neither torch nor Optuna. Knows nothing of file formats: `pages` writes them,
`dashboard` shows them.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from search import plots, sensitivity
from search.bias import Diagnosis
from search.planning import at_the_edge
from search.plots import Plot
from search.report import (
    amount,
    best_as_dict,
    best_in_words,
    duration,
    error_bar,
    gain,
    line_in_words,
    metric,
    number,
    parameter_names,
    parameters_in_words,
)
from search.sensitivity import Sensitivity
from search.spec import SearchSpec
from storage import CONFIRM, Best, Evaluation, Job, NotInStore, Store

_PAGE = 500
_SHORT = 12  # hex digits of a fingerprint that people compare


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a header and rows of text of the same length; note: what is to be known of it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a report says of one job. best: None before there is a result. others: of every NFE, solver and
    strategy on the same model and dataset. pictures: caption → PNG, each of the same random numbers."""

    job: Job
    evaluations: tuple[Evaluation, ...]
    best: Best | None
    others: tuple[Best, ...]
    sensitivity: tuple[Sensitivity, ...]
    diagnosis: Diagnosis | None
    plots: tuple[Plot, ...]
    pictures: Mapping[str, bytes]

    @property
    def title(self) -> str:
        """Which search this is."""
        job = self.job
        return f"{job.model} on {job.dataset}, {job.solver}, NFE {job.nfe}"

    @property
    def answer(self) -> str:
        """The result in one paragraph."""
        if self.best is None:
            return f"Job {self.job.id} is {self.job.status} and has no result yet."
        words = best_in_words(self.best)
        edge = None
        with suppress(ValueError):  # the job file of another version
            search = SearchSpec.model_validate(self.job.spec.get("search", {}))
            edge = at_the_edge(search, self.best)
        return words if edge is None else f"{words} {edge[0].upper()}{edge[1:]}."

    @property
    def tables(self) -> tuple[Table, ...]:
        """Every table that has rows, the most telling first."""
        found = (
            _results(self),
            *_lines(self),
            _sensitivity(self.sensitivity),
            *(() if self.diagnosis is None else (_exposure(self.diagnosis), _late(self.diagnosis))),
            _side_by_side(self.others),
            _trials(self.evaluations),
            _cost(self),
            _again(self),
        )
        return tuple(table for table in found if table.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for programs."""
        job = asdict(self.job)
        evaluations = []
        for e in self.evaluations:
            evaluations.append({k: v for k, v in asdict(e).items() if k not in ("influence", "job_id")})
        content = {
            "answer": self.answer,
            "best": None if self.best is None else best_as_dict(self.best),
            "job": job,
            "evaluations": evaluations,
            "sensitivity": [asdict(one) for one in self.sensitivity],
            "diagnosis": None if self.diagnosis is None else self.diagnosis.as_dict(),
            "others": [best_as_dict(one) for one in self.others],
        }
        plain: dict[str, Any] = json.loads(json.dumps(content, default=str))  # times as text
        return plain


def of_job(store: Store, job_id: int) -> Findings:
    """What the store knows of a job. NotInStore."""
    job, evaluations = store.job(job_id), store.evaluations(job_id)
    best = None
    with suppress(NotInStore):
        best = store.best_of(job_id)
    images = store.pictures(job_id)
    content = store.diagnosis(job_id)
    diagnosis = None if content is None else Diagnosis.from_dict(content)
    drawn = plots.of_job(job, evaluations)
    return Findings(
        job=job,
        evaluations=evaluations,
        best=best,
        others=_others(store, job),
        sensitivity=sensitivity.measured(job, evaluations),
        diagnosis=diagnosis,
        plots=drawn if diagnosis is None else (*drawn, plots.exposure(diagnosis)),
        pictures={_caption(e): images[e.id] for e in evaluations if e.id in images},
    )


def _caption(e: Evaluation) -> str:
    return f"{described(e)}: distance {e.distance:.4g} (trial {e.number})"


def described(e: Evaluation) -> str:
    """A schedule in a few words."""
    what = f"free λ_t of mean {number(round(e.mean, 6))}" if e.k is None else line_in_words(e.k, e.b)
    return what + parameters_in_words(e.parameters)


def _others(store: Store, job: Job) -> tuple[Best, ...]:
    """What the newest job with a result found, for each solver, NFE, strategy and objective."""
    found: dict[tuple[str, int, str, str], Best] = {}
    before = None
    while page := store.jobs(model=job.model, dataset=job.dataset, limit=_PAGE, before_id=before):
        for one in page:
            search = (one.solver, one.nfe, one.strategy, one.evaluator.objective)
            if search not in found:
                with suppress(NotInStore):
                    found[search] = store.best_of(one.id)
        before = page[-1].id
    return tuple(found[search] for search in sorted(found))


# --- tables -------------------------------------------------------------------------------------------------


def _results(found: Findings) -> Table:
    """λ = 1 and what was found, on the same images."""
    confirmed = [e for e in found.evaluations if e.phase == CONFIRM and e.distance is not None]
    if not confirmed and found.best is not None:
        best = found.best
        confirmed = [
            e
            for e in found.evaluations
            if (e.images, e.seed) == (best.images, best.seed) and (e.is_baseline or e.number == best.number)
        ]
    names = list(dict.fromkeys(name for e in confirmed for name in e.metrics))
    rows = [
        (
            described(e),
            amount(e.distance),
            error_bar(e.standard_error),
            gain(e),
            *(amount(e.metrics.get(name)) for name in names),
            f"{e.images:,}",
            "stopped, it had lost" if e.state == "pruned" else "",
        )
        for e in confirmed
    ]
    header = (
        "schedule",
        found.job.evaluator.objective,
        "±",
        "gain over λ = 1",
        *map(metric, names),
        "images",
        "",
    )
    fresh = bool(confirmed) and confirmed[0].phase == CONFIRM
    note = "Measured on random numbers that the search has not seen." if fresh else ""
    if "inception_score" in names and not found.job.evaluator.features.startswith("inception"):
        note += " The Inception score is of this extractor's classes, not of Inception's."
    return Table("Result", header, tuple(rows), note.strip())


def _lines(found: Findings) -> list[Table]:
    """The distance over the mean and over k as the paper prints it, a column for each value."""
    tried = sensitivity.searched(found.job, found.evaluations)
    tables = []
    for axis, (name, other) in enumerate((("λ (uniform)", "k"), ("k", "mean λ"))):
        line = sensitivity.longest_line(tried, axis)
        if line is None:
            continue
        title = f"Distance over {'λ' if axis == 0 else 'k'}, {other} = {number(round(line.other, 6))}"
        values = sorted(line.values)
        best = min(values, key=lambda x: line.values[x])
        mark = ["*" if x == best else "" for x in values]
        row = ("distance", *(f"{amount(line.values[x])}{m}" for x, m in zip(values, mark, strict=True)))
        header = (
            name if other == "mean λ" or line.other == 0 else "mean λ",
            *(number(round(x, 6)) for x in values),
        )
        tables.append(
            Table(title, header, (row,), f"{line.images:,} images, seed {found.job.seed}; * the least.")
        )
    return tables


def _sensitivity(measured: Sequence[Sensitivity]) -> Table:
    rows = []
    for one in measured:
        cells = []
        for edge in one.ranges:
            low, high = ("…" if x is None else f"{x:.4g}" for x in (edge.low, edge.high))
            cells.append(f"{low} to {high}")
        name = "mean λ (b where k = 0)" if one.coordinate == "mean" else "k"
        how = "fitted surface" if one.source == "surface" else "points"
        rows.append((name, f"{one.best:.4g}", *cells, f"{how}, {one.images:,} images"))
    losses = [f"{100 * loss:g} % loss" for loss in sensitivity.LOSSES]
    note = "Where the distance is at most so much above the least, the other one staying; …: beyond what was measured."
    return Table("Sensitivity", ("", "best", *losses, "from"), tuple(rows), note)


def _exposure(found: Diagnosis) -> Table:
    """‖ε‖ and δ_t of each evaluation, as sampling goes."""
    names = [f"({n + 1})" for n in range(len(found.schedules))]
    of_each = [
        f"{what} {name}"
        for name, one in zip(names, found.schedules, strict=True)
        for what in (("‖ε‖",) if one.is_baseline else ("‖ε‖", "‖ε/λ‖")) + ("ratio", "δ_t")
    ]
    rows = []
    for t in reversed(range(found.nfe)):
        measured = []
        for one in found.schedules:
            norms = (one.norms,) if one.is_baseline else (one.norms, one.scaled)
            measured += [f"{norm[t]:.4f}" for norm in norms]
            measured += [f"{found.ratios(one)[t]:.4f}", f"{one.deltas[t]:.4g}"]
        rows.append(
            (str(t), f"{found.times[t]:.4g}", f"{found.training[t]:.4f}", *measured, f"{found.floor[t]:.4g}")
        )
    numbered = list(zip(names, found.schedules, strict=True))
    what = ", ".join(f"{name} {one.name}" for name, one in numbered)
    counts = " ".join(f"{name}: {found.summary(one)}." for name, one in numbered)
    note = (
        f"Sampling with {what}; {found.images:,} images, seed {found.seed}, {found.precision}. ε: the network's "
        "answer, ε/λ: the noise that the solver removes, ratio: of that to training. δ_t: squared Fréchet distance to "
        f"the forward process of {found.real_images:,} real images, floor: of as many of its own states. {counts}"
    )
    return Table("Exposure bias", ("t", "time", "‖ε‖ training", *of_each, "δ_t floor"), tuple(rows), note)


def _late(found: Diagnosis) -> Table:
    """The Fréchet distance of sampling that starts from real images."""
    starts = [late.t for late in found.schedules[0].late]
    rows = [
        (one.name, amount(one.distance), *(amount(late.distance) for late in one.late))
        for one in found.schedules
        if one.late
    ]
    header = ("schedule", "from noise", *(f"from real images at t = {t}" for t in starts))
    note = f"Fréchet distance of {found.images:,} images, seed {found.seed}, {found.precision}."
    return Table("Sampling that starts late", header, tuple(rows), note)


def _side_by_side(others: Sequence[Best]) -> Table:
    rows = [
        (
            one.solver,
            str(one.nfe),
            one.strategy,
            "–" if one.k is None else number(round(one.k, 6)),
            "free" if one.b is None else number(round(one.b, 6)),
            amount(one.baseline_distance),
            f"{amount(one.distance)} {error_bar(one.standard_error)}".rstrip(),
            "" if one.gain is None else f"{amount(one.gain, '+')} {error_bar(one.gain_error)}".rstrip(),
            f"{one.images:,}",
            f"{one.network_evaluations // one.nfe:,}",
            one.evaluator[:_SHORT],
            str(one.job_id),
        )
        for one in others
    ]
    header = (
        "solver",
        "NFE",
        "strategy",
        "k",
        "b",
        "λ = 1",
        "distance",
        "gain",
        "images",
        "images of the search",
        "evaluator",
        "job",
    )
    note = "Distances of different evaluators or numbers of images do not compare."
    return Table("All NFE of this model and dataset", header, tuple(rows), note)


def _trials(evaluations: Sequence[Evaluation]) -> Table:
    names = parameter_names(evaluations)
    rows = [
        (
            str(e.number),
            e.phase,
            number(round(e.mean, 6)),
            number(None if e.k is None else round(e.k, 6)),
            *(number(e.parameters.get(name)) for name in names),
            f"{e.images:,}",
            amount(e.distance),
            error_bar(e.standard_error),
            gain(e),
            e.error or (e.state if e.reused is None else f"{e.state}, known before"),
        )
        for e in evaluations
    ]
    header = ("trial", "phase", "mean λ", "k", *names, "images", "distance", "±", "gain over λ = 1", "state")
    return Table("Trials", header, tuple(rows), "pruned: ended with fewer images than a full trial.")


def _cost(found: Findings) -> Table:
    phases: dict[str, list[Evaluation]] = {}
    for e in found.evaluations:
        phases.setdefault(e.phase, []).append(e)
    full = found.job.images * found.job.nfe
    rows = [_spent(phase, members, full) for phase, members in phases.items()]
    if rows:
        rows.append(_spent("all", found.evaluations, full))
    header = ("phase", "trials", "network evaluations", "in full trials", "device time", "device hours")
    note = f"A network evaluation is of one image; a full trial has {full:,}."
    return Table("Cost", header, tuple(rows), note)


def _spent(name: str, members: Sequence[Evaluation], full: int) -> tuple[str, ...]:
    evaluations, seconds = sum(e.network_evaluations for e in members), sum(e.seconds for e in members)
    share = f"{evaluations / full:.2g}"
    return name, str(len(members)), f"{evaluations:,}", share, duration(seconds), f"{seconds / 3600:.3g}"


def _again(found: Findings) -> Table:
    """What has to be the same for the same numbers."""
    job = found.job
    details = ", ".join(f"{key} {value}" for key, value in job.evaluator.details.items())
    facts = {
        "job": f"{job.id}, {job.status}, strategy {job.strategy}",
        "seed": str(job.seed),
        "images": f"{job.images:,} for a trial of the search, {job.confirm:,} to confirm",
        "solver": ", ".join(f"{key} {value}" for key, value in job.sampling.items() if value is not None),
        "network (weights and options)": job.model_fingerprint,
        "evaluator (features and reference)": job.evaluator.fingerprint,
        "features": f"{job.evaluator.features}, {job.evaluator.dimension} numbers",
        "reference": f"{job.evaluator.reference} ({details})",
        "versions": ", ".join(f"{name} {value}" for name, value in job.versions.items()) or "not recorded",
    }
    if job.warm_start is not None:
        facts["began at"] = ", ".join(f"{key} {value}" for key, value in job.warm_start.items())
    return Table("To do it again", ("", ""), tuple(facts.items()))
