"""One search: asks the strategy what to try, and keeps the store and the Optuna study in step.

The store's evaluations are the history that the strategy sees; the Optuna study mirrors them for its dashboard.
Knows nothing of Ray: it sees trials as string ids that start, report and end.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import optuna
from optuna.artifacts import upload_artifact
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

from objectives.paired import Influence, difference_error, first, pack, standard_error, unpack
from samplers.errors import LamtuneError
from samplers.schedule import Schedule
from search.strategies.base import Candidate, Point, Signal, Strategy, bends, slope
from search.tuner import Progress, TrialConfig
from search.watch import EXPECTED
from storage import CONFIRM, Evaluation, Job, Pictures, Store

# Wider than any search, so that all trials of all studies share them, which Optuna's plots need.
_DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "b": FloatDistribution(-10.0, 10.0),
    "k": FloatDistribution(-10.0, 10.0),
}
optuna.logging.set_verbosity(optuna.logging.WARNING)
# What did not fail by the fault of its schedule is tried again, and no strategy hears of it.
_INTERRUPTED = "interrupted: "
_LOSSES = 3  # how often a trial's own process may die, one after the other


class Watcher(Protocol):
    """Who is told how a search goes."""

    def started(self, evaluation: Evaluation, images: int, expected: int) -> None:
        """An evaluation of so many images began; the whole search will take `expected` trials, about."""

    def progressed(self, evaluation: Evaluation, images: int) -> None:
        """The running evaluation has this many images."""

    def ended(self, evaluation: Evaluation) -> None:
        """An evaluation is complete, pruned or failed."""


@runtime_checkable
class Racing(Protocol):
    """A strategy that stops trials which have lost."""

    def has_lost(self, history: Sequence[Point], point: Point) -> bool:
        """Whether the running trial `point` need not go on beyond the images that it has."""


def fresh_seed(seed: int) -> int:
    """The seed of random numbers that a search with `seed` has not seen; 0 to 2⁶³ − 1, as all seeds are."""
    return (seed + 2**62) % 2**63


def point_of(evaluation: Evaluation, job: Job) -> Point:
    """An evaluation as strategies see it."""
    schedule = Schedule(evaluation.lambdas, evaluation.k, evaluation.b)
    return Point(
        mean=evaluation.mean,
        k=slope(schedule),
        state=evaluation.state,
        distance=evaluation.distance,
        images=evaluation.images,
        bends=() if evaluation.k is not None else bends(schedule),
        parameters=tuple(evaluation.parameters.items()),
        fresh=evaluation.seed != job.seed,
        rungs=evaluation.rungs,
        influence=unpack(evaluation.influence),
    )


def _interrupted(evaluation: Evaluation) -> bool:
    """Whether it failed by no fault of its own."""
    return (evaluation.error or "").startswith(_INTERRUPTED)


@dataclass(slots=True)
class _Running:
    evaluation: Evaluation
    trial: int  # Optuna's id
    images: int  # that it was asked for
    computed: int = 0
    seconds: float = 0.0
    stopped: bool = False
    failure: str | None = None


class Search:
    """A search in a single thread: `tuner.run_trials` calls it, the store and the study follow.

    rungs: image counts at which trials report, besides those that the strategy asks for. context: digest of all that
    decides the numbers of an evaluation besides its λ, parameters and seed. metrics: what is measured besides the
    distance in the end of evaluations on fresh random numbers.
    """

    def __init__(
        self,
        store: Store,
        job: Job,
        strategy: Strategy,
        watcher: Watcher,
        *,
        rungs: Sequence[int],
        context: str,
        metrics: Collection[str] = (),
    ) -> None:
        self._store, self._job, self._strategy, self._watcher = store, job, strategy, watcher
        self._rungs, self._context = tuple(rungs), context
        self._metrics = frozenset(metrics)
        self._running: dict[str, _Running] = {}
        self._losses = 0
        self._expected: int | None = None  # as the study has it
        self._tried = {
            one.number: one for one in store.evaluations(job.id)
        }  # this process alone writes to them
        self._points: dict[int, Point] = {}
        self._storage = store.optuna_storage()
        optuna.create_study(
            study_name=job.study_name, storage=self._storage, direction="minimize", load_if_exists=True
        )
        # One call per step, which `ask` and `tell` with their sampler and pruner would make ten.
        self._study = self._storage.get_study_id_from_name(job.study_name)
        self.fatal: str | None = None
        self._fail_interrupted()

    def _fail_interrupted(self) -> None:
        """Close what an earlier, killed process left running; the strategy will ask for it again."""
        for evaluation in list(self._tried.values()):
            if evaluation.state == "running":
                error = f"{_INTERRUPTED}the search was stopped while this ran"
                self._keep(self._store.fail_evaluation(evaluation.id, error))
        for trial in self._storage.get_all_trials(
            self._study, deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)
        ):
            # One that has ended in the store was stopped before the study knew.
            self._tell(trial._trial_id, self._tried.get(trial.number))

    def _tell(self, trial: int, ended: Evaluation | None) -> None:
        """End Optuna's trial as its evaluation has."""
        if ended is not None and ended.state == "complete":
            assert ended.distance is not None
            self._storage.set_trial_state_values(trial, TrialState.COMPLETE, [ended.distance])
        elif ended is not None and ended.state == "pruned":
            self._storage.set_trial_state_values(trial, TrialState.PRUNED)
        else:
            self._storage.set_trial_state_values(trial, TrialState.FAIL)

    def _keep(self, evaluation: Evaluation) -> Evaluation:
        """An evaluation as the store has it now."""
        self._tried[evaluation.number] = evaluation
        self._points.pop(evaluation.number, None)
        return evaluation

    def _history(self) -> list[Point]:
        found = []
        for number, evaluation in self._tried.items():
            if not _interrupted(evaluation):
                if number not in self._points:
                    self._points[number] = point_of(evaluation, self._job)
                found.append(self._points[number])
        return found

    @property
    def finished(self) -> bool:
        """No trial runs and none will follow."""
        if self._running:
            return False
        return self.fatal is not None or self._strategy.next(self._history()) is Signal.FINISHED

    def next_trial(self, trial_id: str) -> TrialConfig | None:
        """Start the strategy's next candidate; None while there is none. What some job has measured already is taken
        from the store on the way."""
        while self.fatal is None:
            history = self._history()
            step = self._strategy.next(history)
            if isinstance(step, Signal):
                return None
            candidate, schedule = step[0], step[0].schedule(self._job.nfe)
            images = candidate.images or self._job.images
            seed = fresh_seed(self._job.seed) if candidate.fresh else self._job.seed
            key = self._key(schedule, candidate, seed)
            known = self._store.known(key, images)
            if candidate.fresh and known is not None and not self._has_metrics(known, images):
                known = None
            running = self._start(candidate, schedule, images, seed, key, known)
            if known is not None:
                self._copy(running, known)
                continue
            self._running[trial_id] = running
            expected = self._strategy.expected_trials(history)
            if expected != self._expected:
                self._storage.set_study_user_attr(self._study, EXPECTED, expected)
                self._expected = expected
            self._watcher.started(running.evaluation, images, expected)
            # A race shares its error among the job's rungs, so it looks at no others.
            rungs = self._rungs if candidate.fresh else self._all_rungs
            return TrialConfig(
                schedule=schedule,
                parameters=dict(candidate.parameters),
                seed=seed,
                key=key,
                rungs=(*(rung for rung in rungs if rung < images), images),
                racing=candidate.fresh,
                measured=candidate.fresh,
            )
        return None

    def _has_metrics(self, known: Evaluation, images: int) -> bool:
        return not self._metrics or (known.images == images and self._metrics <= known.metrics.keys())

    @property
    def _all_rungs(self) -> list[int]:
        """The job's rungs and those that trials were asked for before: where all can be compared."""
        asked = {e.images for e in self._tried.values() if e.state != "running"}
        return sorted({*self._rungs, *(n for n in asked if n)})

    def _key(self, schedule: Schedule, candidate: Candidate, seed: int) -> str:
        parts = [self._context, [x.hex() for x in schedule.lambdas], candidate.parameters, seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _start(
        self,
        candidate: Candidate,
        schedule: Schedule,
        images: int,
        seed: int,
        key: str,
        known: Evaluation | None,
    ) -> _Running:
        middle = (self._job.nfe - 1) / 2
        b = candidate.mean - candidate.k * middle if schedule.b is None else schedule.b
        trial = self._storage.create_new_trial(
            self._study,
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params={"b": b, "k": candidate.k},
                distributions=_DISTRIBUTIONS,
                user_attrs={
                    "phase": candidate.phase,
                    "lambdas": list(schedule.lambdas),
                    **dict(candidate.parameters),
                },
            ),
        )
        evaluation = self._keep(
            self._store.start_evaluation(
                self._job.id,
                self._storage.get_trial_number_from_id(trial),
                candidate.phase,
                schedule,
                seed=seed,
                parameters=dict(candidate.parameters),
                key=key,
                reused=None if known is None else known.id,
            )
        )
        return _Running(evaluation, trial, images)

    def _copy(self, running: _Running, known: Evaluation) -> None:
        """Enter what was measured before, at no cost."""
        influence = unpack(known.influence)
        for images, distance in known.rungs.items():
            if images <= running.images:
                part = None if influence is None else first(influence, images)
                self._rung(
                    running, images, distance, part, metrics=known.metrics if images == known.images else {}
                )
        # Only a confirmation has one; the explorations of a search need not read all pictures of another job.
        if (
            known.phase == CONFIRM
            and (picture := self._store.pictures(known.job_id).get(known.id)) is not None
        ):
            self._attach(running, picture)
        self._end(running, None)

    def _attach(self, running: _Running, picture: bytes) -> None:
        """Attach a picture to the trial; Optuna refuses when it has ended."""
        with tempfile.TemporaryDirectory(prefix="lamtune-") as folder:
            file = Path(folder, "images.png")
            file.write_bytes(picture)
            upload_artifact(
                artifact_store=Pictures(self._store, running.evaluation.id),
                file_path=str(file),
                study_or_trial=self._storage.get_trial(running.trial),
                storage=self._storage,
            )

    def report(self, trial_id: str, progress: Progress) -> bool:
        """Record a rung, or pass on how many images there are; whether the trial has lost and is to be stopped."""
        running = self._running[trial_id]
        running.computed, running.seconds = progress.computed, progress.seconds
        if progress.error is not None:
            running.failure = progress.error
            if progress.fatal:
                self.fatal = progress.error
        elif progress.distance is None:
            self._watcher.progressed(running.evaluation, progress.images)
        elif not math.isfinite(progress.distance):
            running.failure = f"the distance at {progress.images} images is {progress.distance}"
        else:
            self._rung(running, progress.images, progress.distance, progress.influence, progress.metrics)
            if progress.picture is not None:
                self._attach(running, progress.picture)
            if progress.images < running.images and isinstance(self._strategy, Racing):
                point = point_of(running.evaluation, self._job)
                running.stopped = self._strategy.has_lost(self._history(), point)
        return running.stopped or running.failure is not None

    def _rung(
        self,
        running: _Running,
        images: int,
        distance: float,
        influence: Influence | None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Record a distance with its error bars, in the store and in the study."""
        gain, gain_error = self._gain(running.evaluation, images, distance, influence)
        running.evaluation = self._keep(
            self._store.report_rung(
                running.evaluation.id,
                images=images,
                distance=distance,
                network_evaluations=running.computed * self._job.nfe,
                seconds=running.seconds,
                standard_error=None if influence is None else standard_error(influence),
                gain=gain,
                gain_error=gain_error,
                influence=b"" if influence is None else pack(influence),
                metrics=metrics,
            )
        )
        self._storage.set_trial_intermediate_value(running.trial, images, distance)

    def _gain(
        self, evaluation: Evaluation, images: int, distance: float, influence: Influence | None
    ) -> tuple[float | None, float | None]:
        """The distance of λ = 1 on the same images minus this one, and its standard error."""
        if evaluation.is_baseline:
            return 0.0, 0.0
        for other in self._tried.values():
            if other.seed == evaluation.seed and other.is_baseline and images in other.rungs:
                theirs = unpack(other.influence)
                error = (
                    None
                    if theirs is None or influence is None
                    else difference_error(first(theirs, images), influence)
                )
                return other.rungs[images] - distance, error
        return None, None

    def complete(self, trial_id: str, lost: str | None) -> None:
        """Close a trial: complete with its last distance, pruned where it was not to have all images, or failed."""
        self._losses = 0 if lost is None else self._losses + 1
        if self._losses > _LOSSES:
            self.fatal = lost
        self._end(self._running.pop(trial_id), lost)

    def _end(self, running: _Running, lost: str | None) -> None:
        failure = lost or running.failure
        evaluation = running.evaluation
        full = self._job.confirm if evaluation.phase == CONFIRM else self._job.images
        if failure is not None:
            if lost is not None or self.fatal is not None:
                failure = f"{_INTERRUPTED}{failure}"
            ended = self._store.fail_evaluation(evaluation.id, failure)
            self._storage.set_trial_user_attr(running.trial, "error", failure)
        elif evaluation.images < full:
            ended = self._store.finish_evaluation(evaluation.id, pruned=True)
        else:
            ended = self._store.finish_evaluation(evaluation.id)
        self._tell(running.trial, ended)
        self._watcher.ended(self._keep(ended))

    def check(self) -> None:
        """After the last trial: raises LamtuneError where the search could not go on, or found nothing."""
        if self.fatal is not None:
            raise LamtuneError(self.fatal)
        if not self.finished:
            raise LamtuneError("the search was stopped before its end: submit the job again to go on")
        if not any(e.state in ("complete", "pruned") for e in self._tried.values()):
            raise LamtuneError(
                "no schedule has a finite distance, not even λ = 1: check the model and its flags, "
                "and try model.precision: float32"
            )
        confirming = [e for e in self._tried.values() if e.phase == CONFIRM and not _interrupted(e)]
        if confirming and all(e.state == "failed" for e in confirming):
            raise LamtuneError(
                "nothing could be confirmed on fresh random numbers, so the search has no result; the last attempt "
                f"failed: {confirming[-1].error}"
            )
