"""The Ray Tune side of a search: a thin trial that hands out image ranges, and a Searcher that asks the study.

A trial holds no model and imports no torch. It gives ranges of image ids to the sampler workers, merges their
moments rung by rung on one of them, has each worker say how much its images move that distance, and reports both;
only object references pass through it. Knows nothing of strategies, Optuna or SQL: those are behind `SearchLoop`.
"""

import logging
import os
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from objectives.paired import Influence, block_means
from samplers.errors import LamtuneError, NonFiniteError
from samplers.schedule import Schedule

# Calls in flight per worker: while one is computed the next one waits at the worker, so it never idles.
_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """What a trial evaluates: a schedule and numbers of the solver, on which random numbers, up to which rungs.

    rungs: image counts, ascending; the last one ends it. racing: it may be stopped at a rung, so nothing beyond is
    begun before the rung is known. key: of the feature cache, see `search.blocks`. measured: in the end
    the job's further metrics are computed and a picture is made.
    """

    schedule: Schedule
    parameters: Mapping[str, float]
    seed: int
    key: str
    rungs: tuple[int, ...]
    racing: bool
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """What a trial has reached: images sampled; at a rung also the distance of images 0 .. images − 1 and their
    influence on it, and at the last one the metrics and the picture (PNG) that were asked for."""

    images: int
    distance: float | None
    computed: int  # images that were sampled for it, and not taken from a cache
    seconds: float  # accelerator-seconds of all workers so far
    influence: Influence | None = None
    metrics: Mapping[str, float] | None = None
    picture: bytes | None = None
    error: str | None = None
    fatal: bool = False


class SearchLoop(Protocol):
    """What the searcher needs from the study: trials by a string id, in a single thread."""

    def next_trial(self, trial_id: str) -> TrialConfig | None:
        """The configuration of a new trial, or None: nothing to start now."""
        ...

    @property
    def finished(self) -> bool:
        """No trial will follow."""
        ...

    def report(self, trial_id: str, progress: Progress) -> bool:
        """A running trial got on; whether it is to be stopped."""
        ...

    def complete(self, trial_id: str, lost: str | None) -> None:
        """A trial ended; `lost` says why if Ray lost it (its process died)."""
        ...


class _Call(NamedTuple):
    """A call at a worker: what it does ("sample", "merge", "influences" or "conclude"), for which rung and images."""

    worker: int
    kind: str
    rung: int
    start: int
    stop: int


class Trial(tune.Trainable):
    """One schedule: all its images, rung by rung, over all workers.

    config: `trial`, a TrialConfig. Each `step` waits for the next finished call and says how far the trial is.
    """

    def setup(
        self, config: dict[str, Any], workers: Sequence[Any] = (), job: Sequence[Any] = (), unit: int = 1
    ) -> None:
        self._workers, self._job, self._unit = list(workers), list(job), unit
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._config: TrialConfig = config["trial"]
        self._todo = deque(units(self._config.rungs, self._unit))
        self._load = [0] * len(self._workers)
        self._pending: dict[Any, _Call] = {}
        self._moments: dict[int, dict[int, Any]] = {}  # rung → {first image: reference}
        self._features: dict[int, tuple[int, int, Any]] = {}  # first image → (worker, end, reference)
        self._left = [
            sum(1 for r, _, _ in self._todo if r == rung) for rung in range(len(self._config.rungs))
        ]
        self._total: Any = None
        self._rung = 0  # the rung that is measured next, or now
        self._measuring = False
        self._distance: float | None = None  # of the rung that is measured
        self._influences: dict[int, Any] = {}  # of the rung that is measured: first image → numbers
        self._conclusion: tuple[Mapping[str, float] | None, bytes | None] = None, None
        self._images = self._computed = 0
        self._seconds = 0.0

    def step(self) -> dict[str, Any]:
        try:
            return self._step()
        except NonFiniteError as error:  # this schedule has no distance; others may
            return self._result(error=_message(error), fatal=False)
        except ray.exceptions.RayTaskError as error:
            return self._result(error=_message(error), fatal=True)
        except ray.exceptions.RayError as error:
            return self._result(error=f"the sampler workers cannot be reached: {error}", fatal=True)

    def _step(self) -> dict[str, Any]:
        while True:
            self._hand_out()
            ready, _ = ray.wait(list(self._pending), num_returns=1)
            call = self._pending.pop(ready[0])
            self._load[call.worker] -= 1
            value = ray.get(ready[0])
            if call.kind == "sample":
                computed, seconds = value
                self._images += call.stop - call.start
                self._computed += computed
                self._seconds += seconds
                self._left[call.rung] -= 1
                self._measure()
                return self._result()
            if call.kind == "conclude":
                self._conclusion = value
                return self._rung_result()
            if call.kind == "merge":
                self._distance = value
            else:
                self._influences[call.start] = value
            asked = sum(end <= self._end for _, end, _ in self._features.values())
            # Ray may name an influence as ready before the distance that it is derived from.
            if self._distance is not None and len(self._influences) == asked:
                if self._config.measured and self._end == self._config.rungs[-1]:
                    self._conclude()
                    continue
                return self._rung_result()

    def _hand_out(self) -> None:
        while self._todo:
            worker = min(range(len(self._workers)), key=self._load.__getitem__)
            rung, start, stop = self._todo[0]
            if self._load[worker] >= _IN_FLIGHT or (self._config.racing and rung > self._rung):
                return
            self._todo.popleft()
            config = self._config
            moments, features, cost = (
                self._workers[worker]
                .sample.options(num_returns=3)
                .remote(*self._job, config.schedule, start, stop, config.seed, config.parameters, config.key)
            )
            self._moments.setdefault(rung, {})[start] = moments
            self._features[start] = worker, stop, features
            self._call(cost, _Call(worker, "sample", rung, start, stop))

    def _call(self, reference: Any, call: _Call) -> None:
        self._pending[reference] = call
        self._load[call.worker] += 1

    @property
    def _end(self) -> int:
        """The number of images of the rung that is measured."""
        return self._config.rungs[self._rung]

    def _measure(self) -> None:
        """Start on the next rung if its images are all there; one at a time, so that rungs end in order."""
        rungs = self._config.rungs
        if self._measuring or self._rung == len(rungs) or self._left[self._rung]:
            return
        parts = self._moments.pop(self._rung)
        # In the order of image ids, whoever computed them: sums do not depend on the workers.
        refs = [parts[start] for start in sorted(parts)]
        if self._total is not None:
            refs.insert(0, self._total)
        worker = min(range(len(self._workers)), key=self._load.__getitem__)
        self._total, distance, sensitivity = self._workers[worker].merge.options(num_returns=3).remote(*refs)
        self._call(distance, _Call(worker, "merge", self._rung, 0, self._end))
        self._measuring, self._distance, self._influences = True, None, {}
        for start, (holder, stop, features) in self._features.items():
            if stop <= self._end:  # where they were made: features do not travel
                influence = self._workers[holder].influences.remote(sensitivity, features)
                self._call(influence, _Call(holder, "influences", self._rung, start, stop))

    def _conclude(self) -> None:
        """By the first worker, which then has the real images' features for the next trial too."""
        config = self._config
        parts = [self._features[start][2] for start in sorted(self._features)]
        conclusion = self._workers[0].conclude.remote(
            *self._job, config.schedule, config.seed, config.parameters, *parts
        )
        self._call(conclusion, _Call(0, "conclude", self._rung, 0, self._end))

    def _rung_result(self) -> dict[str, Any]:
        influences = np.concatenate([self._influences[start] for start in sorted(self._influences)])
        images, distance = self._end, self._distance
        self._rung, self._measuring = self._rung + 1, False
        self._measure()
        return self._result(
            distance=distance,
            influence=block_means(influences),
            images=images,
            metrics=self._conclusion[0],
            picture=self._conclusion[1],
            done=self._rung == len(self._config.rungs),
        )

    def _result(
        self, distance: float | None = None, images: int | None = None, **extra: Any
    ) -> dict[str, Any]:
        return {
            "images": self._images if images is None else images,
            "distance": distance,
            "computed": self._computed,
            "seconds": self._seconds,
            "done": "error" in extra,
            **extra,
        }


def _message(error: Exception) -> str:
    """What a worker raised, without the frames of Ray around it."""
    cause = getattr(error, "cause", error)
    return str(cause) if isinstance(cause, LamtuneError) else f"{type(cause).__name__}: {cause}"


def units(rungs: Sequence[int], unit: int) -> list[tuple[int, int, int]]:
    """The calls that make up a trial: (rung index, first image, end) of at most `unit` images, in order."""
    calls, start = [], 0
    for rung, end in enumerate(rungs):
        while start < end:
            stop = min(start + unit, end)
            calls.append((rung, start, stop))
            start = stop
    return calls


class StudySearcher(Searcher):
    """Ray Tune's view of a search: asks the loop for trials and tells it when they end."""

    def __init__(self, loop: SearchLoop) -> None:
        super().__init__(metric="images", mode="max")  # Tune's own ranking is not used
        self._loop = loop

    def suggest(self, trial_id: str) -> Any:
        config = self._loop.next_trial(trial_id)
        if config is not None:
            return {"trial": config}
        # FINISHED cannot be taken back, so it is said only when nothing runs and nothing will follow.
        return Searcher.FINISHED if self._loop.finished else None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._loop.complete(trial_id, "its Tune process died" if error else None)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its experiment to disk; the SQL store is the only truth

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the SQL store is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is resumed from its SQL store")


class _Reports(Stopper):
    """Passes every report on to the loop, which says whether the trial goes on; Tune asks this before all others."""

    def __init__(self, loop: SearchLoop) -> None:
        self._loop = loop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._loop.report(
            trial_id,
            Progress(
                images=result["images"],
                distance=result.get("distance"),
                computed=result["computed"],
                seconds=result["seconds"],
                influence=result.get("influence"),
                metrics=result.get("metrics"),
                picture=result.get("picture"),
                error=result.get("error"),
                fatal=result.get("fatal", False),
            ),
        )

    def stop_all(self) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # see StudySearcher


def run_trials(loop: SearchLoop, workers: Sequence[ActorHandle[Any]], sampling: object, unit: int) -> None:
    """Run trials until the loop has finished. Ray must be initialised; every trial uses all workers.

    sampling: passed on to the workers' `sample`. unit: images per call.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # Tune's own handler of Ctrl-C ends the run as if it were over; ours must see that it is not.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints a banner at any verbosity
    trainable = tune.with_resources(
        tune.with_parameters(
            # By reference: a trial passes `sampling` on without unpacking it, which would import torch.
            Trial,
            workers=list(workers),
            job=[ray.put(sampling)],
            unit=unit,
        ),
        # A trial only waits, so it takes no processor from the workers; Tune wants some resource to be named.
        {"node:__internal_head__": 0.001},
    )
    with tempfile.TemporaryDirectory(prefix="lamtune-tune-") as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(loop),
                num_samples=-1,
                max_concurrent_trials=1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                stop=_Reports(loop),
                storage_path=scratch,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
