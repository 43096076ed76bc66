"""One search: asks the strategy what to try, and keeps the store and the Optuna study in step.

The store's evaluations are the history that the strategy sees; the Optuna study mirrors them for its dashboard.
Knows nothing of Ray: it sees trials as string ids that start, report and end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

from samplers.errors import LamtuneError
from search.strategies.base import Candidate, Point, Signal, Strategy
from search.tuner import Progress
from storage import Evaluation, Job, Store

# Wider than any search, so that all trials of all studies share them, which Optuna's plots need.
_DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "b": FloatDistribution(-10.0, 10.0),
    "k": FloatDistribution(-10.0, 10.0),
}
optuna.logging.set_verbosity(optuna.logging.WARNING)
_INTERRUPTED = "interrupted: the search was stopped while this ran"


class Watcher(Protocol):
    """Who is told how a search goes."""

    def started(self, evaluation: Evaluation, expected: int) -> None:
        """An evaluation began; `expected` is the number of trials that the whole search will take, about."""

    def progressed(self, evaluation: Evaluation, images: int) -> None:
        """The running evaluation has this many images."""

    def ended(self, evaluation: Evaluation) -> None:
        """An evaluation is complete or has failed."""


@dataclass(slots=True)
class _Running:
    evaluation: Evaluation
    trial: optuna.Trial
    failure: str | None = None


class Search:
    """A search in a single thread: `tuner.run_trials` calls it, the store and the study follow."""

    def __init__(self, store: Store, job: Job, strategy: Strategy, watcher: Watcher) -> None:
        self._store, self._job, self._strategy, self._watcher = store, job, strategy, watcher
        self._running: dict[str, _Running] = {}
        self._study = optuna.create_study(
            study_name=job.study_name,
            storage=store.optuna_storage(),
            direction="minimize",
            load_if_exists=True,
        )
        self.fatal: str | None = None
        self._fail_interrupted()

    def _fail_interrupted(self) -> None:
        """Close what an earlier, killed process left running; the strategy will ask for it again."""
        for evaluation in self._store.evaluations(self._job.id):
            if evaluation.state == "running":
                self._store.fail_evaluation(evaluation.id, _INTERRUPTED)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _history(self) -> Sequence[Point]:
        return [
            Point(mean=e.mean, k=e.k, state=e.state, distance=e.distance, images=e.images)
            for e in self._store.evaluations(self._job.id)
            if e.k is not None and e.error != _INTERRUPTED
        ]

    @property
    def finished(self) -> bool:
        """No trial runs and none will follow."""
        if self._running:
            return False
        return self.fatal is not None or self._strategy.next(self._history()) is Signal.FINISHED

    def next_trial(self, trial_id: str) -> dict[str, Any] | None:
        """Start the strategy's next candidate; None while there is none."""
        if self.fatal is not None:
            return None
        history = self._history()
        step = self._strategy.next(history)
        if isinstance(step, Signal):
            return None
        self._start(trial_id, step[0], self._strategy.expected_trials(history))
        return {"schedule": step[0].schedule(self._job.nfe)}

    def _start(self, trial_id: str, candidate: Candidate, expected: int) -> None:
        schedule = candidate.schedule(self._job.nfe)
        assert schedule.k is not None
        self._study.enqueue_trial({"b": schedule.b, "k": schedule.k})
        trial = self._study.ask(_DISTRIBUTIONS)
        trial.set_user_attr("phase", candidate.phase)
        trial.set_user_attr("lambdas", list(schedule.lambdas))
        evaluation = self._store.start_evaluation(self._job.id, trial.number, candidate.phase, schedule)
        self._running[trial_id] = _Running(evaluation, trial)
        self._watcher.started(evaluation, expected)

    def report(self, trial_id: str, progress: Progress) -> None:
        """Record a rung, or pass on how many images there are."""
        running = self._running[trial_id]
        if progress.error is not None:
            running.failure = progress.error
            if progress.fatal:
                self.fatal = progress.error
        elif progress.distance is None:
            self._watcher.progressed(running.evaluation, progress.images)
        elif not math.isfinite(progress.distance):
            running.failure = f"the distance at {progress.images} images is {progress.distance}"
        else:
            running.evaluation = self._store.report_rung(
                running.evaluation.id,
                images=progress.images,
                distance=progress.distance,
                network_evaluations=progress.images * self._job.nfe,
                seconds=progress.seconds,
            )
            running.trial.report(progress.distance, progress.images)

    def complete(self, trial_id: str, lost: str | None) -> None:
        """Close a trial: complete with its last distance, or failed."""
        running = self._running.pop(trial_id)
        failure = lost or running.failure
        if failure is None:
            ended = self._store.finish_evaluation(running.evaluation.id)
            self._study.tell(running.trial, ended.distance)
        else:
            ended = self._store.fail_evaluation(running.evaluation.id, failure)
            running.trial.set_user_attr("error", failure)
            self._study.tell(running.trial, state=TrialState.FAIL)
        self._watcher.ended(ended)

    def check(self) -> None:
        """After the last trial: raises LamtuneError where the search could not go on, or found nothing."""
        if self.fatal is not None:
            raise LamtuneError(self.fatal)
        if not self.finished:
            raise LamtuneError("the search was stopped before its end: submit the job again to go on")
        if not any(e.state == "complete" for e in self._store.evaluations(self._job.id)):
            raise LamtuneError(
                "no schedule has a finite distance, not even λ = 1: check the model and its flags, "
                "and try model.precision: float32"
            )
