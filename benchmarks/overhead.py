"""Trials a second without a model: what Ray Tune, Optuna and the store cost a search.

    python -m benchmarks.overhead [--trials N] [--sqlite] [--json]

A function of λ takes the place of images, and a worker that answers at once that of the sampler. Beside it, in the
same run and on a database of the same kind: plain Ray Tune with its own OptunaSearch and Optuna's storage, one trial
at a time as a search has it; and the parts of ours: the search and its store without Ray Tune, Optuna's storage alone.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from benchmarks.servers import new_database, postgresql
from samplers.schedule import Schedule
from search.strategies.base import FINISHED, Candidate, History, Step
from search.study import Search
from search.tuner import Progress, Workers, run_trials
from storage import Evaluation, Evaluator, Job, NewJob, Store, open_store

NFE, IMAGES = 20, 500


def distance(mean: float, k: float) -> float:
    """Takes the place of a Fréchet distance."""
    return 30 + 2e4 * (mean - 1.012) ** 2 + 1e5 * (k - 0.0006) ** 2


class Scan:
    """A strategy that tries so many means, one after the other."""

    def __init__(self, trials: int) -> None:
        self._trials = trials

    def next(self, history: History) -> Step:
        """See `Strategy.next`."""
        done = sum(point.state != "running" for point in history)
        return FINISHED if done == self._trials else (Candidate("scan", 1 + done / 1e5, 0.0),)

    def finalists(self, history: History) -> tuple[Candidate, ...]:
        """See `Strategy.finalists`."""
        return ()

    def expected_trials(self, history: History) -> int:
        """See `Strategy.expected_trials`."""
        return self._trials


class Silent:
    """A watcher that nobody looks at."""

    def started(self, evaluation: Evaluation, images: int, expected: int) -> None:
        """See `Watcher`."""

    def progressed(self, evaluation: Evaluation, images: int) -> None:
        """See `Watcher`."""

    def ended(self, evaluation: Evaluation) -> None:
        """See `Watcher`."""


@ray.remote(num_cpus=0)
class Function:
    """Answers as a sampler worker does, from `distance`."""

    def load(self) -> None:
        """Nothing."""

    def sample(
        self, _sampling: Any, schedule: Schedule, start: int, stop: int, *_: Any
    ) -> tuple[Any, tuple[int, float]]:
        """See `SamplerWorker`."""
        assert schedule.k is not None
        return np.full(stop - start, distance(schedule.mean, schedule.k)), (stop - start, 0.0)

    def score(self, images: int, features: Any) -> tuple[tuple[float, Any], float]:
        """See `SamplerWorker`."""
        return (float(features[0]), np.zeros_like(features)), 0.0


def new_job(store: Store, name: str) -> Job:
    """A job without a model."""
    return store.create_job(
        NewJob(
            study_name=name,
            model="function",
            model_fingerprint="w",
            dataset="none",
            solver="ddpm",
            sampling={},
            nfe=NFE,
            strategy="scan",
            images=IMAGES,
            seed=0,
            spec={},
            evaluator=Evaluator(fingerprint="e", features="none", dimension=1, reference="r", details={}),
        )
    )


def search(store: Store, name: str, trials: int) -> Search:
    """A search of ours."""
    return Search(store, new_job(store, name), Scan(trials), Silent(), rungs=(), context=name)


def ours(url: str, trials: int) -> None:
    """A search as it runs, but for the worker."""
    with open_store(url) as store:
        found = search(store, "tune", trials)
        run_trials(found, Workers([Function.remote()], (), 1), None, IMAGES)
        found.check()
        assert len(store.evaluations(1)) == trials


def without_tune(url: str, trials: int) -> None:
    """The search, its store and its study; nothing of Ray."""
    with open_store(url) as store:
        found = search(store, "plain", trials)
        while (config := found.next_trial("t")) is not None:
            value = distance(config.schedule.mean, config.schedule.k or 0.0)
            influence = np.zeros(IMAGES // 5, np.float32)
            found.report("t", Progress(IMAGES, value, IMAGES, 0.0, influence))
            found.complete("t", None)


def optuna_alone(url: str, trials: int) -> None:
    """Ask, one report and tell, on Optuna's own storage."""
    with open_store(url) as store:
        study = optuna.create_study(storage=store.optuna_storage(), sampler=optuna.samplers.RandomSampler())
    for _ in range(trials):
        trial = study.ask()
        value = distance(trial.suggest_float("mean", 0.9, 1.2), trial.suggest_float("k", -0.01, 0.01))
        trial.report(value, IMAGES)
        study.tell(trial, value)


def plain_tune(url: str, trials: int) -> None:
    """Ray Tune with OptunaSearch on Optuna's storage, as its documentation has it; one trial at a time."""
    with open_store(url) as store:
        storage = store.optuna_storage()
    sampler = optuna.samplers.RandomSampler()  # no time for a model of the function
    space = {"mean": tune.uniform(0.9, 1.2), "k": tune.uniform(-0.01, 0.01)}
    algorithm = OptunaSearch(space, metric="distance", mode="min", sampler=sampler, storage=storage)
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            lambda config: {"distance": distance(config["mean"], config["k"])},
            tune_config=tune.TuneConfig(
                search_alg=algorithm, num_samples=trials, max_concurrent_trials=1, reuse_actors=True
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()


def measure(url: Callable[[], str], trials: int) -> dict[str, float]:
    """Trials a second of each; a few first, so that neither imports nor the start of processes count."""
    cases = {
        "lamtune: Ray Tune, Optuna, store": ours,
        "  without Ray Tune": without_tune,
        "  Optuna alone": optuna_alone,
        "plain Ray Tune with OptunaSearch": plain_tune,
    }
    result = {}
    for name, case in cases.items():
        times = []
        for n in (3, 3 + trials):
            fresh = url()
            began = time.perf_counter()
            case(fresh, n)
            times.append(time.perf_counter() - began)
        result[name] = trials / (times[1] - times[0])
    return result


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100, help="of each kind (default 100)")
    parser.add_argument("--sqlite", action="store_true", help="SQLite files in place of a PostgreSQL")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    try:
        if arguments.sqlite:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(lambda: f"sqlite:///{tempfile.mkdtemp(dir=folder)}/s.db", arguments.trials)
        else:
            with postgresql() as server:
                found = measure(
                    lambda: new_database(server.url).render_as_string(hide_password=False), arguments.trials
                )
    finally:
        ray.shutdown()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, rate in found.items():
        print(f"{name:34} {rate:6.1f} trials/s, {1000 / rate:6.0f} ms each")


if __name__ == "__main__":
    main()
