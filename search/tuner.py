"""The Ray Tune side of a search: a thin trial that hands out image ranges, and a Searcher that asks the study.

A trial holds no model and imports no torch. It gives ranges of image ids to the sampler workers, which may come late
or die, has one of them measure the distance of all features rung by rung, and how much each image moves it, and reports
both; only references of features pass through it. Knows nothing of strategies, Optuna or SQL: those are behind
`SearchLoop`.
"""

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from objectives.paired import Influence, block_means
from samplers.errors import LamtuneError, NonFiniteError
from samplers.schedule import Schedule

_T = TypeVar("_T")

# Calls in flight per worker: while one is computed the next one waits at the worker, so it never idles.
_IN_FLIGHT = 2
_BLOCK = 250  # images of a block of the cache, as in `search.evaluator`, which imports torch
_LOSSES = 3  # how often a call may die with its worker, a worker while it loads, or results with their node
_ALONE_S = 600.0  # how long a search without any worker waits for one
_DIED = "its Tune process was killed; Ray does so itself where a machine has too little memory left"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """What a trial evaluates: a schedule and numbers of the solver, on which random numbers, up to which rungs.

    rungs: image counts, ascending; the last one ends it. racing: it may be stopped at a rung, so no call beyond
    is begun before the rung is known. key: of the feature cache, see `search.blocks`. measured: in the end the job's
    further metrics are computed and a picture is made.
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
    seconds: float  # so far; see `storage.Evaluation`
    influence: Influence | None = None
    metrics: Mapping[str, float] | None = None
    picture: bytes | None = None
    error: str | None = None
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Workers:
    """Sampler workers, ready or not (see `worker.SamplerWorker`), what their `load` takes, and what it answers: the
    images up to which their network calls are filled."""

    actors: Sequence[ActorHandle[Any]]
    needs: Sequence[Any]
    grain: int


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
    """A call at a worker: what it does ("sample", "score", "conclude"), for which images; how often it was lost."""

    kind: str
    rung: int
    start: int
    stop: int
    losses: int = 0


class Trial(tune.Trainable):
    """One schedule: all its images, rung by rung, over all workers that there are at the time.

    config: `trial`, a TrialConfig. Each `step` waits for the next finished call and says how far the trial is.

    A worker takes part from the moment on when it has loaded what it needs, which may be in the middle of a trial.
    When its process dies, what it was working on goes to others; it takes part again once Ray has started it anew,
    and if that cannot be, the trial goes on without it. Who computed what changes no number.
    """

    def setup(
        self,
        config: dict[str, Any],
        workers: Sequence[Any] = (),
        needs: Sequence[Any] = (),
        job: Sequence[Any] = (),
        unit: int = 1,
        grain: int = 1,
    ) -> None:
        self._workers, self._needs, self._job = list(workers), needs, list(job)
        self._unit, self._grain = unit, grain
        self._load: dict[int, int] = {}  # calls in flight of every worker that is ready
        self._joining: dict[Any, int] = {}  # reference of a call to load → worker
        self._last = ""  # why a worker is out for good
        for worker in range(len(self._workers)):
            self._join(worker)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._config: TrialConfig = config["trial"]
        self._rung = 0  # the rung that is measured next, or now
        self._score: tuple[float, Any] = 0.0, None  # of that rung: the distance and influences
        self._conclusion: tuple[Mapping[str, float] | None, bytes | None] = None, None
        self._computed = self._restarts = 0
        self._seconds = 0.0
        self._start_over()

    def _start_over(self) -> None:
        """Begin with the first image; what was reported stays so."""
        self._todo = deque(
            _Call("sample", rung, start, stop)
            for rung, start, stop in units(self._config.rungs, self._unit, len(self._workers), self._grain)
        )
        self._load = dict.fromkeys(self._load, 0)
        self._pending: dict[Any, tuple[int, _Call]] = {}
        self._made: dict[int, Any] = {}  # first image → features of a call in flight
        self._features: dict[int, tuple[int, Any]] = {}  # first image → (end, reference)
        self._measuring = False
        self._images = 0

    def step(self) -> dict[str, Any]:
        try:
            return self._step()
        except NonFiniteError as error:  # this schedule has no distance; others may
            return self._result(error=_message(error), fatal=False)
        except (ray.exceptions.RayError, LamtuneError) as error:
            return self._result(error=_message(error), fatal=True)

    def _step(self) -> dict[str, Any]:
        while True:
            self._hand_out()
            reference = self._wait()
            worker, call = self._pending[reference]
            try:
                value, seconds = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                self._lost(worker, error)
                continue
            except ray.exceptions.RayError as error:
                if not _object_lost(error):
                    raise
                self._objects_lost(error)
                continue
            del self._pending[reference]
            self._load[worker] -= 1
            self._seconds += seconds
            if call.kind == "sample":
                self._features[call.start] = call.stop, self._made.pop(call.start)
                self._images += call.stop - call.start
                self._computed += value
                self._measure()
                return self._result()
            if call.kind == "score":
                self._score = value
                if self._config.measured and self._rung == len(self._config.rungs) - 1:
                    self._todo.appendleft(_Call("conclude", self._rung, 0, self._end))
                    continue
            else:
                self._conclusion = value
            return self._rung_result()

    # ---- workers that come and go

    def _join(self, worker: int) -> None:
        # Repeated until Ray has started it again, or does so no more; each try at one that restarts counts for Ray.
        load = self._workers[worker].load.options(max_task_retries=-1)
        self._joining[load.remote(*self._needs)] = worker

    def _wait(self) -> Any:
        """The reference of the next finished call; workers that become ready on the way are given work."""
        while True:
            if not self._pending and not self._joining:
                raise LamtuneError(f"no sampler worker is left: {self._last}")
            waiting = [*self._pending, *self._joining]
            ready, _ = ray.wait(waiting, num_returns=1, timeout=None if self._pending else _ALONE_S)
            if not ready:
                raise LamtuneError(f"there has been no sampler worker for {_ALONE_S:.0f} s")
            worker = self._joining.pop(ready[0], None)
            if worker is None:
                return ready[0]
            try:
                ray.get(ready[0])
                self._load[worker] = 0
                self._hand_out()
            except ray.exceptions.RayError as error:  # it cannot load, or is not started any more
                self._last = _message(error)

    def _lost(self, worker: int, error: Exception) -> None:
        """A worker died: others get its calls. It may come back."""
        calls = {reference: call for reference, (at, call) in self._pending.items() if at == worker}
        for reference in calls:
            del self._pending[reference]
        del self._load[worker]
        self._join(worker)
        first, *behind = calls.values()  # what waited behind the first call is not to blame
        if first.losses == _LOSSES:
            raise LamtuneError(
                f"images {first.start} to {first.stop - 1}: {_LOSSES + 1} workers died with them: {error}"
            )
        self._todo.extendleft([*reversed(behind), first._replace(losses=first.losses + 1)])

    def _objects_lost(self, error: Exception) -> None:
        """What a worker left on its node is lost with that: begin again, with what the caches of hosts still have."""
        if self._restarts == _LOSSES:
            raise LamtuneError(f"results of workers were lost {_LOSSES + 1} times: {error}")
        self._restarts += 1
        self._start_over()

    # ---- work

    def _hand_out(self) -> None:
        """Give the workers that are ready as much as they need to be busy, and no more: who is slow gets less."""
        while self._todo and self._load:
            call = self._todo[0]
            worker = min(self._load, key=self._load.__getitem__)
            if call.kind == "sample":
                if self._load[worker] >= _IN_FLIGHT or (self._config.racing and call.rung > self._rung):
                    return
            else:
                worker = min(self._load)  # the same one while it lives: it may have the real images' features
            self._todo.popleft()
            self._pending[self._call(self._workers[worker], call)] = worker, call
            self._load[worker] += 1

    def _call(self, worker: Any, call: _Call) -> Any:
        """Call a worker; the reference of what is to be fetched (a value, and the seconds that it took), the rest stays
        where it was made."""
        if call.kind == "sample":
            config = self._config
            self._made[call.start], cost = worker.sample.options(num_returns=2).remote(
                *self._job, config.schedule, call.start, call.stop, config.seed, config.parameters, config.key
            )
            return cost
        # In the order of image ids, whoever computed them: sums do not depend on the workers.
        parts = [self._features[start][1] for start in sorted(self._features) if start < call.stop]
        if call.kind == "score":
            return worker.score.remote(call.stop, *parts)
        config = self._config
        return worker.conclude.remote(*self._job, config.schedule, config.seed, config.parameters, *parts)

    @property
    def _end(self) -> int:
        """The number of images of the rung that is measured."""
        return self._config.rungs[self._rung]

    def _measure(self) -> None:
        """Start on the next rung if its images are all there; one at a time, so that rungs end in order."""
        if self._measuring or self._rung == len(self._config.rungs):
            return
        there = sum(
            min(stop, self._end) - start for start, (stop, _) in self._features.items() if start < self._end
        )
        if there == self._end:
            self._measuring = True
            self._todo.appendleft(_Call("score", self._rung, 0, self._end))

    def _rung_result(self) -> dict[str, Any]:
        distance, influences = self._score
        images, self._rung, self._measuring = self._end, self._rung + 1, False
        self._measure()
        return self._result(
            distance=distance,
            influence=None if influences is None else block_means(influences),
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


def _object_lost(error: Exception) -> bool:
    """Whether Ray says of a result that it was lost with its node; also where a call took it as an argument."""
    lost = ray.exceptions.ObjectLostError
    return isinstance(error, lost) or isinstance(getattr(error, "cause", None), lost)


def _message(error: Exception) -> str:
    """What a worker raised, without the frames of Ray around it."""
    cause = getattr(error, "cause", error)
    return str(cause) if isinstance(cause, LamtuneError) else f"{type(cause).__name__}: {cause}"


def units(rungs: Sequence[int], unit: int, workers: int = 1, grain: int = 1) -> list[tuple[int, int, int]]:
    """The calls that make up a trial: (rung index, first image, end), in order.

    Up to each rung so many workers get the same number of calls, of at most `unit` images and larger ones first, so
    that all are done at about the same time. Calls begin and end at whole blocks of the cache where they can.
    grain: the images up to which network calls are filled; where those are whole blocks, calls are of whole grains, and
    the last one up to a rung may go beyond it: with fewer images it would take as long.
    """
    whole = grain if grain % _BLOCK == 0 else 1
    grid = max(min(unit, _BLOCK), whole)
    calls, start = [], 0
    for rung, asked in enumerate(rungs):
        end = min(-(-asked // whole) * whole, rungs[-1])
        if end <= start:
            continue
        edges = [start, *range((start // grid + 1) * grid, end, grid), end]
        cells = len(edges) - 1
        count = min(cells, workers * -(-cells // (workers * max(1, unit // grid))))
        each, more = divmod(cells, count)
        at = [number * each + min(number, more) for number in range(count + 1)]
        calls += [(rung, edges[a], edges[b]) for a, b in pairwise(at)]
        start = end
    return calls


class _Kept:
    """A loop whose errors Tune cannot swallow: the first one ends all trials, and `run_trials` raises it."""

    def __init__(self, loop: SearchLoop) -> None:
        self._loop = loop
        self.error: Exception | None = None

    def next_trial(self, trial_id: str) -> TrialConfig | None:
        """See SearchLoop."""
        return self._keeping(lambda: self._loop.next_trial(trial_id), None)

    @property
    def finished(self) -> bool:
        """See SearchLoop."""
        return self._keeping(lambda: self._loop.finished, True)

    def report(self, trial_id: str, progress: Progress) -> bool:
        """See SearchLoop."""
        return self._keeping(lambda: self._loop.report(trial_id, progress), True)

    def complete(self, trial_id: str, lost: str | None) -> None:
        """See SearchLoop."""
        self._keeping(lambda: self._loop.complete(trial_id, lost), None)

    def _keeping(self, call: Callable[[], _T], otherwise: _T) -> _T:
        if self.error is None:
            try:
                return call()
            except Exception as error:
                self.error = error
        return otherwise


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
        self._loop.complete(trial_id, _DIED if error else None)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its experiment to disk; the SQL store is the only truth

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the SQL store is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is resumed from its SQL store")


class _Reports(Stopper):
    """Passes every report on to the loop, which says whether the trial goes on; Tune asks this before all others."""

    def __init__(self, loop: _Kept) -> None:
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
        return self._loop.error is not None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # see StudySearcher


def run_trials(loop: SearchLoop, workers: Workers, sampling: object, unit: int) -> None:
    """Run trials until the loop has finished; what it raises ends them. Ray must be initialised.

    workers: every trial uses all of them, as they come. sampling: passed on to their `sample`. unit: images per call
    to them.
    """
    kept = _Kept(loop)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a process that dies is ours to tell of
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # Tune's own handler of Ctrl-C ends the run as if it were over; ours must see that it is not.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints a banner at any verbosity
    trainable = tune.with_resources(
        tune.with_parameters(
            # By reference: a trial passes `sampling` on without unpacking it, which would import torch.
            Trial,
            workers=list(workers.actors),
            needs=list(workers.needs),
            job=[ray.put(sampling)],
            unit=unit,
            grain=workers.grain,
        ),
        # A trial only waits, so it takes no processor from the workers; Tune wants some resource to be named.
        {"node:__internal_head__": 0.001},
    )
    with tempfile.TemporaryDirectory(prefix="lamtune-tune-") as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(kept),
                num_samples=-1,
                max_concurrent_trials=1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                stop=_Reports(kept),
                storage_path=scratch,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    if kept.error is not None:
        raise kept.error
