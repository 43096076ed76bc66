"""Writes results for people and for programs. Knows the store's records and nothing of how they came about."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from objectives.paired import packed_difference_error
from storage import CONFIRM, STALE_S, Best, Evaluation, Job

_ORDER = (
    "model",
    "dataset",
    "solver",
    "nfe",
    "k",
    "b",
    "lambdas",
    "distance",
    "standard_error",
    "baseline_distance",
    "gain",
    "gain_error",
    "significant",
    "confirmed",
    "images",
    "trials",
    "status",
)


def number(value: float | None) -> str:
    """A schedule's number as people write it: at most 9 decimals, no trailing zeros; – where there is none."""
    return "–" if value is None else f"{value:.9f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """4.6 s, 3 min, 2 h 05."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02}"


def amount(number: float | None, sign: str = "") -> str:
    """A distance or a difference (sign: "+") of any size; – where there is none."""
    return "–" if number is None else f"{number:{sign}.4g}" if abs(number) < 0.01 else f"{number:{sign}.4f}"


def error_bar(value: float | None) -> str:
    """± 0.12; nothing where it is not known."""
    return "" if value is None else f"± {value:.2g}"


def metric(name: str) -> str:
    """A metric's name as people write it."""
    return {"kid": "KID", "frechet": "Fréchet distance"}.get(name, name.replace("_", " "))


def gain(evaluation: Evaluation) -> str:
    """How much better than λ = 1 on the same images, with its error bar; nothing for λ = 1 itself."""
    if evaluation.gain is None or (evaluation.gain == 0 and evaluation.gain_error == 0):
        return ""
    return f"{amount(evaluation.gain, '+')} {error_bar(evaluation.gain_error)}".rstrip()


def line_in_words(k: float, b: float | None) -> str:
    """λ_t = k·t + b."""
    return f"λ = {number(b)}" if k == 0 else f"λ_t = {number(k)}·t + {number(b)}"


def parameters_in_words(parameters: Mapping[str, float], before: str = ", ") -> str:
    """The solver's numbers of a trial, each after `before`; nothing where there are none."""
    return "".join(f"{before}{name} {number(value)}" for name, value in parameters.items())


def parameter_names(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """The solver's numbers that were searched beside λ."""
    return tuple(dict.fromkeys(name for one in evaluations for name in one.parameters))


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """The schedule that came nearest to the best one: `behind` it by a paired difference with `behind_error`, on the
    first `images` images of the same random numbers."""

    k: float | None
    b: float | None
    mean: float
    parameters: Mapping[str, float]
    images: int
    behind: float
    behind_error: float


def runner_up(best: Best, tried: Sequence[Evaluation]) -> RunnerUp | None:
    """Of the evaluations of the best one's job on its random numbers, λ = 1 apart, the one that is least behind it.

    Each is compared at the most images that both have. None where there is no other, or no influence is known.
    """
    winner = next(one for one in tried if one.number == best.number)
    found = []
    for one in tried:
        common = winner.rungs.keys() & one.rungs.keys()
        if (
            one.id == winner.id
            or one.state not in ("complete", "pruned")
            or one.seed != winner.seed
            or one.is_baseline
            or not winner.influence
            or not one.influence
            or not common
        ):
            continue
        images = max(common)
        error = packed_difference_error(winner.influence, one.influence, images)
        behind = one.rungs[images] - winner.rungs[images]
        found.append(RunnerUp(one.k, one.b, one.mean, one.parameters, images, behind, error))
    # The same number of images for all of them: only then are they compared with each other.
    most = max((one.images for one in found), default=0)
    return min((one for one in found if one.images == most), key=lambda one: one.behind, default=None)


def exploration(tried: Sequence[Evaluation], nfe: int) -> int:
    """Images of a search before its refinement and confirmation."""
    return sum(e.network_evaluations for e in tried if e.phase not in ("refine", CONFIRM)) // nfe


def best_as_dict(best: Best) -> dict[str, Any]:
    """The answer for programs: first the keys that others rely on, then what identifies and priced the search."""
    return {key: getattr(best, key) for key in _ORDER} | asdict(best)


def best_as_text(best: Best, second: RunnerUp | None = None) -> str:
    """The answer for people."""
    lines = [
        f"{best.model} on {best.dataset}, {best.solver}, NFE {best.nfe} (job {best.job_id}, {best.status})",
        "",
    ]
    if best.k is None:
        lines.append("  λ_t per evaluation, free")
    elif best.k == 0:
        lines.append(f"  λ = {number(best.b)} at every evaluation")
    else:
        lines.append(
            f"  λ_t = k·t + b with k = {number(best.k)}, b = {number(best.b)} (t = 0 is the last evaluation)"
        )
    if best.parameters:
        lines.append(f"  with {parameters_in_words(best.parameters).removeprefix(', ')}")
    fresh = (
        "random numbers that the search has not seen" if best.confirmed else "the search's own random numbers"
    )
    lines.append(
        f"  {best.objective} {amount(best.distance)} {error_bar(best.standard_error)}".rstrip()
        + f" with {best.images:,} images, on {fresh}"
    )
    base, won = best.baseline_distance, best.gain
    if base is not None and not best.is_baseline:
        won = base - best.distance if won is None else won
        share = f" ({100 * won / base:.1f} %)" if base > 0 else ""
        lines.append(
            f"  λ = 1 gives {amount(base)}: a gain of {amount(won)} {error_bar(best.gain_error)}".rstrip()
            + share
        )
    if best.metrics:
        lines.append("  " + ", ".join(f"{metric(name)} {value:.4g}" for name, value in best.metrics.items()))
    if best.is_baseline:
        lines.append("  nothing that was tried is better than λ = 1")
    elif best.significant is False:
        lines.append("  that is no significant gain: λ = 1 is as good, within twice the standard error")
    if second is not None:
        what = (
            f"λ = {number(second.b)} at every evaluation"
            if second.k == 0
            else f"k = {number(second.k)}, b = {number(second.b)}"
            if second.k is not None
            else f"a free schedule of mean {number(round(second.mean, 6))}"
        )
        what += parameters_in_words(second.parameters)
        lines.append(
            f"  the runner-up, {what}, is behind by {amount(second.behind)} {error_bar(second.behind_error)} "
            f"on {second.images:,} images"
        )
    lines.append(
        f"  found in {best.trials} trials, {best.network_evaluations:,} network evaluations, "
        f"{duration(best.seconds)} of device time"
        + (
            f"; confirmed with {best.confirm_network_evaluations:,} more, {duration(best.confirm_seconds)}"
            if best.confirm_network_evaluations
            else ""
        )
    )
    shown = [number(round(v, 6)) for v in best.lambdas]
    if best.k != 0 and len(shown) > 8:
        shown = [*shown[:4], "…", *shown[-3:]]
    if best.k != 0:
        lines.append(f"  λ_0 … λ_{best.nfe - 1}: {', '.join(shown)}")
    return "\n".join(lines)


def best_in_words(best: Best) -> str:
    """The answer as a paragraph."""
    if best.k is None:
        mean = number(round(sum(best.lambdas) / best.nfe, 6))
        what = f"a λ of its own at each of {best.nfe} evaluations (mean {mean})"
    elif best.k == 0:
        what = f"λ = {number(best.b)} at each of {best.nfe} evaluations"
    else:
        what = f"λ_t = {number(best.k)}·t + {number(best.b)} (t = 0 is the last of {best.nfe} evaluations)"
    extra = parameters_in_words(best.parameters, ", with ")
    where = f"the {best.objective} of {best.model} on {best.dataset} with {best.solver}"
    images = f"{best.images:,} images" + (
        " on random numbers that the search has not seen" if best.confirmed else ""
    )
    distance = f"{best.distance:.4g} {error_bar(best.standard_error)}".rstrip()
    if best.baseline_distance is None:
        text = f"With {what}{extra}, {where} is {distance} ({images})."
    elif best.is_baseline:
        text = f"λ = 1 is best: {where} is {distance} ({images}), and no schedule that was tried is better."
    else:
        won = best.baseline_distance - best.distance if best.gain is None else best.gain
        share = f" ({100 * won / best.baseline_distance:.1f} %)" if best.baseline_distance > 0 else ""
        text = (
            f"Dividing the predicted noise by {what}{extra} takes {where} from {best.baseline_distance:.4g} at λ = 1 "
            f"to {distance}: a gain of {won:.3g} {error_bar(best.gain_error)}".rstrip()
            + f"{share}, measured with {images}."
        )
        if best.significant is False:
            text += " That is no significant gain: λ = 1 is as good, within twice the standard error."
    return (
        f"{text} The search took {best.trials} trials, {best.network_evaluations:,} network evaluations and "
        f"{duration(best.seconds)} of device time."
    )


def job_as_text(job: Job, tried: Sequence[Evaluation], now: datetime) -> str:
    """How a job is at the store's time `now`, for people."""
    lines = [f"job {job.id}: {job.model} on {job.dataset}, {job.solver}, NFE {job.nfe}: {job.status}"]
    if job.finished_at is None and job.status != "queued":
        silence = (now - job.updated_at).total_seconds()
        lost = ", so its process is gone: submit the job again to go on" if silence > STALE_S else ""
        lines.append(f"  last sign of life {duration(max(silence, 0.0))} ago{lost}")
    if job.error is not None:
        lines.append(f"  {job.error}")
    counts = Counter(one.state for one in tried)
    lines.append(f"  trials: {', '.join(f'{n} {state}' for state, n in counts.items()) or 'none yet'}")
    ranked = [
        (one.distance, one.number, one)
        for one in tried
        if one.state == "complete"
        and one.distance is not None
        and (one.images, one.seed) == (job.images, job.seed)
    ]
    if ranked:
        distance, trial, best = min(ranked, key=lambda entry: entry[:2])
        where = f"in trial {trial}, b {number(best.b)}, k {number(best.k)}"
        lines.append(f"  lowest {job.evaluator.objective} {amount(distance)} {where}")
    return "\n".join(lines)
