"""Measures the exposure bias of a job's network: predicted noise and states in sampling, beside those of training.

Runs in this process on one device; needs neither Ray nor the store. What is measured is `samplers.exposure`'s and
`objectives.states`' matter; this binds them to a job. What comes out is `bias`'.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import Progress as Shown
from torch import Tensor

from objectives.frechet import FrechetReference
from objectives.moments import Moments
from objectives.reference import DIGITS, read_images
from objectives.states import ForwardProcess, StateSums, Variances, deltas, form
from samplers.errors import InputError
from samplers.exposure import Norms, late_start, levels, observe_training, plan_of
from samplers.generate import Sampler
from samplers.sampling import Solver
from samplers.schedule import Schedule
from search.bias import Diagnosis, Late, Sampled, named
from search.evaluator import Evaluator, accelerator
from search.ms_eps import complete
from search.plots import COMPARED
from search.spec import JobSpec, load

# Real images whose moments stand for the data, spread evenly over it: more say nothing new and take long to read.
_REAL = 50_000
_BATCH = {"cuda": 2000, "cpu": 500}  # images whose states are on the device at once

_Number = TypeVar("_Number", int, float)
Progress = Callable[[int, int], None]
"""progress(done, total): evaluations of the network on one image each."""


def diagnose(
    spec: JobSpec,
    evaluator: Evaluator,
    sampling: Solver,
    schedules: Sequence[tuple[str, Schedule]],
    *,
    images: int,
    late: Sequence[int] = (),
    progress: Progress | None = None,
) -> Diagnosis:
    """Sample `images` images with each schedule (name, λ) and compare with training at the same levels.

    sampling: of the job, with its Γ if it needs one. late: evaluations at which to start from real states too. The
    i-th image's training state is that of real image i, again from the first where there are fewer. Raises InputError
    before anything is sampled where the network, the images or `late` do not fit; NonFiniteError.
    """
    sampler = Sampler(
        model=evaluator.model,
        sampling=sampling,
        device=evaluator.device,
        seed=evaluator.seed,
        precision=getattr(torch, evaluator.precision),
        micro_batch=evaluator.micro_batch,
    )
    plan, at = plan_of(sampler), levels(sampler)
    for t in late:
        if plan.tail is None:
            raise InputError(f"--late: {sampling.solver} cannot start late; ddpm, ddim, euler and heun can")
        plan.tail(t)
    real = _real_moments(spec, evaluator)
    forward, nfe = ForwardProcess(real), sampling.nfe
    total = images * (nfe * (1 + len(schedules)) + len(schedules) * sum(t + 1 for t in late))
    count = _Count(total, progress)

    norms, states = Norms(nfe, evaluator.device), StateSums(nfe, _dim(evaluator))
    observe = _observer(norms, states)
    for x0, ids in _real_batches(spec, evaluator, images):
        observe_training(sampler, x0, ids, observe)
        count.add(len(x0) * nfe)
    training, floor = norms.means, deltas(forward, at, states)

    measured = []
    for name, schedule in schedules:
        norms, states = Norms(nfe, evaluator.device), StateSums(nfe, _dim(evaluator))
        observe = _observer(norms, states)
        features = []
        for start in range(0, images, _batch(evaluator)):
            stop = min(start + _batch(evaluator), images)
            features.append(evaluator.extractor(sampler.images(schedule, start, stop, observe)))
            count.add((stop - start) * nfe)
        measured.append(
            Sampled(
                name=name,
                k=schedule.k,
                b=schedule.b,
                lambdas=schedule.lambdas,
                norms=tuple(norms.means),
                deltas=tuple(deltas(forward, at, states)),
                distance=_distance(evaluator.frechet, features),
                late=tuple(
                    Late(t=t, distance=_late_distance(spec, evaluator, sampler, schedule, t, images, count))
                    for t in late
                ),
            )
        )
    return Diagnosis(
        model=spec.model.name,
        model_fingerprint=evaluator.model.fingerprint,
        dataset=spec.dataset.name,
        sampling=asdict(sampling),
        solver=sampling.solver,
        nfe=nfe,
        images=images,
        seed=evaluator.seed,
        precision=evaluator.precision,
        form=form(_dim(evaluator)),
        real_images=real.n,
        times=tuple(plan.times.tolist()),
        alpha=tuple(alpha for alpha, _ in at),
        sigma=tuple(sigma for _, sigma in at),
        training=tuple(training),
        floor=tuple(floor),
        schedules=tuple(measured),
    )


def run(
    job: Path, nfe: int | None, asked: Sequence[str], images: int, late: str | None, store: str
) -> Diagnosis:
    """What `lamtune diagnose` does: read the job, choose sampling and schedules, measure on this machine.

    asked: the schedules beside λ = 1, "best" of the store or "K,B"; late: "T,T,…". Raises InputError.
    """
    spec = load(job)
    places = [place for place, one in enumerate(spec.sampling) if nfe in (None, one.nfe)]
    if len(places) != 1:
        there = ", ".join(str(one.nfe) for one in spec.sampling)
        raise InputError(f"--nfe: name one of the job's samplings; it has NFE {there}")
    chosen = spec.sampling[places[0]]
    if len(asked) > (most := len(COMPARED) - 1):
        raise InputError(f"--schedule: at most {most} can be told apart in one picture")
    one = Schedule.uniform(chosen.nfe, 1.0)
    schedules = {named(one): one}
    for text in asked:
        other = _asked(text, spec, chosen, store)
        schedules.setdefault(named(other), other)
    evaluator = Evaluator.load(spec, accelerator())
    with Shown(transient=True) as bar:
        task = bar.add_task("network evaluations", total=None)
        ready = complete(spec, evaluator.model, evaluator.device)[places[0]].sampling
        evaluator.model.to(evaluator.device)
        found = diagnose(
            spec,
            evaluator,
            ready,
            list(schedules.items()),
            images=images,
            late=_numbers("--late", late, int) if late else (),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return replace(found, sampling=asdict(chosen))  # as the job has it, wherever its Γ was estimated


def _asked(text: str, spec: JobSpec, sampling: Solver, store: str) -> Schedule:
    if text != "best":
        line = _numbers("--schedule", text, float)
        if len(line) != 2:
            raise InputError(f"--schedule: give best, or K,B such as 0.0025,1.0, not {text!r}")
        return Schedule.linear(sampling.nfe, *line)
    from storage import open_store

    with open_store(store) as opened:
        found = opened.best(
            model=spec.model.name, dataset=spec.dataset.name, nfe=sampling.nfe, solver=sampling.solver
        )
    return Schedule(found.lambdas, found.k, found.b)


def _numbers(option: str, text: str, kind: type[_Number]) -> list[_Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: {text!r} is no list of numbers like 3,7") from None


class _Count:
    """Evaluations done so far."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, evaluations: int) -> None:
        self._done += evaluations
        if self._progress is not None:
            self._progress(self._done, self._total)


def _observer(norms: Norms, states: StateSums) -> Callable[[int, Tensor, Tensor], None]:
    def observe(t: int, x: Tensor, eps: Tensor) -> None:
        norms.add(t, eps)
        states.add(t, x)

    return observe


def _batch(evaluator: Evaluator) -> int:
    return _BATCH[evaluator.device.type]


def _dim(evaluator: Evaluator) -> int:
    channels, height, width = evaluator.model.shape
    return channels * height * width


def _distance(reference: FrechetReference, features: Sequence[Tensor]) -> float:
    return reference.distance(Moments.of(torch.cat(list(features))))


def _late_distance(
    spec: JobSpec,
    evaluator: Evaluator,
    sampler: Sampler,
    schedule: Schedule,
    t: int,
    images: int,
    count: _Count,
) -> float:
    features = []
    for x0, ids in _real_batches(spec, evaluator, images):
        features.append(evaluator.extractor(late_start(sampler, schedule, t, x0, ids)))
        count.add(len(x0) * (t + 1))
    return _distance(evaluator.frechet, features)


# --- real images --------------------------------------------------------------------------------------------


def _real_images(spec: JobSpec, evaluator: Evaluator, most: int) -> Iterator[Tensor]:
    """Real images in [-1, 1] on the device, float64 [B, C, H, W]. Raises InputError where there are statistics only."""
    source = spec.dataset.images or spec.dataset.reference
    try:
        for batch in read_images(source, evaluator.model.shape, resize=spec.dataset.resize, most=most):
            yield batch.to(evaluator.device).double() / 127.5 - 1
    except InputError as error:
        if source == DIGITS or spec.dataset.images is not None:
            raise
        raise InputError(
            f"{error}. The diagnosis needs the real images: name a folder, an archive or an .npz of them as "
            "dataset.images"
        ) from None


def _real_moments(spec: JobSpec, evaluator: Evaluator) -> Moments | Variances:
    kind = Moments if form(_dim(evaluator)) == "full" else Variances
    total: Any = None
    for batch in _real_images(spec, evaluator, _REAL):
        new = kind.of(batch.flatten(1))
        total = new if total is None else total + new
    if total is None or total.n < 2:
        raise InputError(f"{spec.dataset.images or spec.dataset.reference}: at least 2 images are needed")
    return total  # type: ignore[no-any-return]


def _real_batches(spec: JobSpec, evaluator: Evaluator, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`images` real images with their ids, again from the first where there are fewer."""
    done = 0
    while done < images:
        for batch in _real_images(spec, evaluator, images):
            part = batch[: images - done]
            yield part, torch.arange(done, done + len(part), device=evaluator.device)
            done += len(part)
            if done == images:
                return
