"""Times trials over 1 … N workers of this machine, and simulates more of them with the times that were measured.

    python -m benchmarks.scaling [JOB.yaml] [--images N] [--json]

The trials are real ones: Ray Tune, the workers, distances and influences. The simulation is one of discrete events:
calls are handed out one by one, each worker computes what it has, and all features travel to one worker that takes the
distance. It shows where more workers stop to help, and what holds them up; it knows nothing of hosts that fail or
networks that are shared.
"""

import heapq
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import ray
import torch

from benchmarks.common import Found, Part, grid, load_case, main, milliseconds, once, scratch, seconds
from objectives.frechet import FrechetReference, Gaussian
from objectives.influence import Sensitivity
from objectives.moments import Moments
from samplers.sampling import Solver
from samplers.schedule import Schedule
from search import pool, tuner
from search.evaluator import BLOCK

_TRIALS = 3  # the first of them does not count: Tune starts its process
SIMULATED = (1, 8, 64, 512)
TOTALS = (10_000, 50_000)
INCEPTION = 2048  # dimensions of its features, with which messages and distances cost most
_NETWORK = 1.25e9  # bytes per second between hosts where workers are on several: 10 Gbit/s


class Timed(NamedTuple):
    """A trial: the times when its last image was there and when its influences were, the seconds that workers sampled
    and worked in all, and the distance."""

    sampled: float
    ended: float
    sampling: float
    busy: float
    distance: float


class _Trials:
    """A search of a fixed number of trials of λ = 1, as the tuner sees one; notes when each is sampled and ends."""

    def __init__(self, sampling: Solver, images: int, name: str) -> None:
        self._nfe, self._images, self._name = sampling.nfe, images, name
        self._begun = 0
        self._sampled, self._sampling = 0.0, 0.0
        self.trials: list[Timed] = []

    def next_trial(self, trial_id: str) -> tuner.TrialConfig | None:
        if self.finished:
            return None
        self._begun += 1
        key = f"{self._name}-{self._begun}"  # another one each: nothing is found in the cache
        return tuner.TrialConfig(
            schedule=Schedule.uniform(self._nfe, 1.0),
            parameters={},
            seed=self._begun,
            key=key,
            rungs=(self._images,),
            racing=False,
        )

    @property
    def finished(self) -> bool:
        return self._begun == _TRIALS

    def report(self, trial_id: str, progress: tuner.Progress) -> bool:
        assert progress.error is None, progress.error
        now = time.perf_counter()
        if progress.distance is None:
            self._sampled, self._sampling = now, progress.seconds
        else:
            self.trials.append(Timed(self._sampled, now, self._sampling, progress.seconds, progress.distance))
        return False

    def complete(self, trial_id: str, lost: str | None) -> None:
        assert lost is None, lost


def shares(trials: Sequence[Timed], workers: int, images: int) -> Found:
    """Means over all trials but the first, of which nobody knows when it began: see `table`."""
    pairs = list(pairwise(trials))
    wall = fmean(one.ended - before.ended for before, one in pairs)
    sampling = fmean(one.sampled - before.ended for before, one in pairs)
    work = fmean(one.sampling for _, one in pairs)
    return {
        "trial": wall,
        "images_per_second": images / wall,
        "image": work / images,
        "idle": 1 - fmean(one.busy for _, one in pairs) / (workers * wall),
        "idle_while_sampling": 1 - work / (workers * sampling),
        "after_sampling": 1 - sampling / wall,
    }


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that the simulation is made of.

    image: at a worker, per image. call: what handing out a call and taking its answer costs the trial's process.
    message: features of a block from one worker to another. add: moments and influences of a block. distance: with its
    derivative.
    """

    image: float
    call: float
    message: float
    add: float
    distance: float


def simulate(times: Times, workers: int, images: int, most: int, grain: int) -> dict[str, float]:
    """Seconds of one trial: until all is sampled, and in all. A network call of fewer images takes as long."""
    calls = tuner.units((images,), most, workers, grain)
    free = [(0.0, w) for w in range(workers)]  # when each worker can begin
    driver, done = 0.0, []
    for _, start, stop in calls:
        driver += times.call / 2
        ready, worker = heapq.heappop(free)
        end = max(ready, driver) + -(-(stop - start) // grain) * grain * times.image
        done.append(end)
        heapq.heappush(free, (end, worker))
    answered = 0.0
    for end in sorted(done):
        answered = max(answered, end) + times.call / 2
    blocks = -(-images // BLOCK)
    scored = blocks * (times.message * (workers > 1) + times.add) + times.distance
    return {"sampled": answered, "trial": answered + times.call + scored}


def simulated(times: Times, most: int, grain: int) -> Found:
    """What the simulation says of these times."""
    return {
        "times": asdict(times),
        "trials": {n: {w: simulate(times, w, n, most, grain) for w in SIMULATED} for n in TOTALS},
    }


def measured(dimension: int, device: torch.device, worker: Any, image: float) -> Times:
    """The times of the simulation with float32 features of some dimension, on random ones; a message also takes what a
    network of 10 Gbit/s makes of it.
    """
    features = torch.randn(BLOCK, dimension, device=device)
    sent = features.cpu().numpy()
    many = Moments.of(torch.randn(2 * dimension, dimension, dtype=torch.float64, device=device))
    frechet = FrechetReference.of(Gaussian.of(many))
    told: list[Sensitivity] = []
    distance = once(lambda: (frechet.distance(many), told.append(Sensitivity.of(frechet, many))))
    (sensitivity,) = told

    def add() -> None:
        owned = torch.tensor(sent, device=device)
        _ = Moments.of(owned) + many, sensitivity.influences(owned).cpu()

    return Times(
        image=image,
        call=seconds(lambda: ray.get(worker.__ray_ready__.remote()), 20),
        message=seconds(lambda: ray.get(ray.put(sent))) + sent.nbytes / _NETWORK,
        add=seconds(add),
        distance=distance,
    )


def measure(job: Path, images: int) -> Found:
    """Seconds of a trial over 1 … N workers for each NFE of the job, the simulation's times, and what it says."""
    case = load_case(job)
    spec, reference = case.spec, case.evaluator.reference
    resources = pool.available(spec, [pool.this_machine()])
    found: Found = {"device": resources.device, "ready": {}, "nfe": {}}
    with scratch(), pool.connected("local"):
        for count in _counts(resources.workers):
            cores = "auto" if resources.needs["GPU"] else 1  # else fewer workers would have more threads each
            asked = spec.resources.model_copy(update={"workers": count, "cpus": cores})
            one = pool.available(spec.model_copy(update={"resources": asked}), [pool.this_machine()])
            began = time.perf_counter()
            workers = pool.start_workers(spec, reference, case.evaluator.model.fingerprint, one)
            ray.get([worker.load.remote(*workers.needs) for worker in workers.actors])  # all of them
            found["ready"][count] = time.perf_counter() - began
            try:
                for sampling in spec.sampling:
                    loop = _Trials(sampling, images, f"scaling-{count}-{sampling.nfe}")
                    tuner.run_trials(loop, workers, sampling, one.unit)
                    here = found["nfe"].setdefault(sampling.nfe, {"workers": {}, "simulated": {}})
                    distances = [one.distance for one in loop.trials]
                    here["workers"][count] = {**shares(loop.trials, count, images), "distances": distances}
                    if count == 1:
                        image = here["workers"][1]["image"]
                        for dimension in dict.fromkeys((case.evaluator.extractor.dim, INCEPTION)):
                            times = measured(dimension, case.device, workers.actors[0], image)
                            here["simulated"][dimension] = simulated(times, resources.unit, workers.grain)
            finally:
                pool.stop_workers(workers)
    return found


def _counts(most: int) -> list[int]:
    """1, 2, 4, … and all."""
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})


def table(found: Found) -> list[str]:
    """What was measured, and what follows for more workers.

    idle: the share of the workers' time that went into nothing; while sampling that is handing out calls, and the last
    ones, which not all workers have. after sampling: the share of a trial that sums, distance and influences take.
    """
    lines = []
    for nfe, here in found["nfe"].items():
        head = ["trial", "images/s", "efficiency", "idle", "while sampling", "after sampling", "ready after"]
        rows: list[list[object]] = [[f"NFE {nfe}, workers", *head]]
        first = here["workers"][1]
        for n, one in here["workers"].items():
            gain = first["trial"] / one["trial"]
            parts = (gain / n, one["idle"], one["idle_while_sampling"], one["after_sampling"])
            times = (f"{one['trial']:.2f} s", f"{one['images_per_second']:,.0f}")
            rows.append([n, *times, *(f"{part:.1%}" for part in parts), f"{found['ready'][n]:.0f} s"])
        lines += grid(rows)
        apart = max(
            abs(a / b - 1)
            for one in here["workers"].values()
            for a, b in zip(one["distances"], first["distances"], strict=True)
        )
        lines.append(f"  largest relative difference of a distance to one worker's: {apart:.0e}")
        for dimension, answer in here["simulated"].items():
            lines += _simulated_table(dimension, answer)
    return lines


def _simulated_table(dimension: int, answer: Found) -> list[str]:
    times = ", ".join(f"{name} {milliseconds(t)}" for name, t in answer["times"].items())
    lines = [f"  simulated, {dimension} features; {times}"]
    for total, counts in answer["trials"].items():
        one = counts[1]["trial"]
        rows: list[list[object]] = [
            [f"{total:,} images", "trial", "times as fast", "efficiency", "until sampled"]
        ]
        for n, t in counts.items():
            gain = one / t["trial"]
            cells = [f"{t['trial']:.2f} s", f"{gain:.1f}", f"{gain / n:.0%}", f"{t['sampled']:.2f} s"]
            rows.append([f"{n} workers", *cells])
        lines += grid(rows)
    return lines


PART = Part("trials over workers", measure, table)

if __name__ == "__main__":
    main({"scaling": PART}, __doc__)
