"""The Ray Tune side of a search: a thin trial that hands out image ranges, and a Searcher that asks the study.

A trial holds no model and imports no torch. It gives ranges of image ids to the sampler workers, merges their
moments rung by rung on one of them, and reports the distance; only object references pass through it.
Knows nothing of strategies, Optuna or SQL: those are behind `SearchLoop`.
"""

import logging
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.search import Searcher

from samplers.errors import LamtuneError, NonFiniteError

# Calls in flight per worker: while one is computed the next one waits at the worker, so it never idles.
_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Progress:
    """What a trial has reached: images sampled; at a rung also the distance of images 0 .. images − 1."""

    images: int
    distance: float | None
    seconds: float  # accelerator-seconds of all workers so far
    error: str | None = None
    fatal: bool = False


class SearchLoop(Protocol):
    """What the searcher needs from the study: trials by a string id, in a single thread."""

    def next_trial(self, trial_id: str) -> "dict[str, Any] | None":
        """The configuration of a new trial, or None: nothing to start now."""
        ...

    @property
    def finished(self) -> bool:
        """No trial will follow."""
        ...

    def report(self, trial_id: str, progress: Progress) -> None:
        """A running trial got on."""
        ...

    def complete(self, trial_id: str, lost: str | None) -> None:
        """A trial ended; `lost` says why if Ray lost it (its process died)."""
        ...


class Trial(tune.Trainable):
    """One λ schedule: all its images, rung by rung, over all workers.

    config: `schedule`. Each `step` waits for the next finished call and says how far the trial is.
    """

    def setup(
        self,
        config: dict[str, Any],
        workers: Sequence[Any] = (),
        job: Sequence[Any] = (),
        rungs: Sequence[int] = (),
        unit: int = 1,
    ) -> None:
        self._workers, self._job, self._rungs, self._unit = list(workers), list(job), list(rungs), unit
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._schedule = config["schedule"]
        self._todo = deque(units(self._rungs, self._unit))
        self._load = [0] * len(self._workers)
        self._pending: dict[Any, tuple[int, int, int]] = {}  # seconds/result ref → (worker, rung, images)
        self._parts: dict[int, dict[int, Any]] = {}  # rung → {first image: moments ref}
        self._left = [sum(1 for r, _, _ in self._todo if r == rung) for rung in range(len(self._rungs))]
        self._total: Any = None
        self._rung = 0  # the rung that is merged next, or now
        self._merging = False
        self._images, self._seconds = 0, 0.0

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
        self._hand_out()
        ready, _ = ray.wait(list(self._pending), num_returns=1)
        worker, rung, images = self._pending.pop(ready[0])
        self._load[worker] -= 1
        value = ray.get(ready[0])
        if images == 0:  # a merge: value is the distance of this rung
            self._rung, self._merging = rung + 1, False
            self._merge()
            return self._result(distance=value, images=self._rungs[rung], done=self._rung == len(self._rungs))
        self._images += images
        self._seconds += value
        self._left[rung] -= 1
        self._merge()
        return self._result()

    def _hand_out(self) -> None:
        while self._todo:
            worker = min(range(len(self._workers)), key=self._load.__getitem__)
            if self._load[worker] >= _IN_FLIGHT:
                return
            rung, start, stop = self._todo.popleft()
            moments, seconds = (
                self._workers[worker]
                .sample.options(num_returns=2)
                .remote(*self._job, self._schedule, start, stop)
            )
            self._parts.setdefault(rung, {})[start] = moments
            self._pending[seconds] = (worker, rung, stop - start)
            self._load[worker] += 1

    def _merge(self) -> None:
        """Start the next rung's distance if its images are all there; one at a time, so that rungs end in order."""
        if self._merging or self._rung == len(self._rungs) or self._left[self._rung]:
            return
        parts = self._parts.pop(self._rung)
        # In the order of image ids, whoever computed them: sums do not depend on the workers.
        refs = [parts[start] for start in sorted(parts)]
        if self._total is not None:
            refs.insert(0, self._total)
        worker = min(range(len(self._workers)), key=self._load.__getitem__)
        self._total, distance = self._workers[worker].merge.options(num_returns=2).remote(*refs)
        self._pending[distance] = (worker, self._rung, 0)
        self._load[worker] += 1
        self._merging = True

    def _result(
        self, distance: float | None = None, images: int | None = None, **extra: Any
    ) -> dict[str, Any]:
        failed = "error" in extra
        return {
            "images": self._images if images is None else images,
            "distance": distance,
            "seconds": self._seconds,
            "done": failed,
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
    """Ray Tune's view of a search: asks the loop for trials and tells it what they report."""

    def __init__(self, loop: SearchLoop) -> None:
        super().__init__(metric="images", mode="max")  # Tune's own ranking is not used
        self._loop = loop

    def suggest(self, trial_id: str) -> Any:
        config = self._loop.next_trial(trial_id)
        if config is not None:
            return config
        # FINISHED cannot be taken back, so it is said only when nothing runs and nothing will follow.
        return Searcher.FINISHED if self._loop.finished else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._loop.report(trial_id, _progress(result))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        # Tune gives a trial's last report here and not to on_trial_result.
        if result is not None and not error:
            self._loop.report(trial_id, _progress(result))
        self._loop.complete(trial_id, "its Tune process died" if error else None)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its experiment to disk; the SQL store is the only truth

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the SQL store is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is resumed from its SQL store")


def _progress(result: dict[str, Any]) -> Progress:
    return Progress(
        images=result["images"],
        distance=result.get("distance"),
        seconds=result["seconds"],
        error=result.get("error"),
        fatal=result.get("fatal", False),
    )


def run_trials(
    loop: SearchLoop,
    workers: Sequence[ActorHandle[Any]],
    sampling: object,
    rungs: Sequence[int],
    unit: int,
) -> None:
    """Run trials until the loop has finished. Ray must be initialised; every trial uses all workers.

    sampling: passed on to the workers' `sample`. rungs: image counts, ascending. unit: images per call.
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
            rungs=list(rungs),
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
                storage_path=scratch,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
