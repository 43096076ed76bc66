"""search.study: the store and the Optuna study agree, whatever happens to the trials."""

import math

import optuna
import pytest

from samplers.errors import LamtuneError
from search.strategies.paper import PaperStrategy
from search.study import Search
from search.tuner import Progress
from storage import Evaluator, NewJob, open_store

NFE = 20


class Silent:
    def __init__(self):
        self.events = []

    def started(self, evaluation, expected):
        self.events.append(("started", evaluation.number, expected))

    def progressed(self, evaluation, images):
        self.events.append(("progressed", evaluation.number, images))

    def ended(self, evaluation):
        self.events.append(("ended", evaluation.number, evaluation.state))


@pytest.fixture
def store(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/store.db") as opened:
        yield opened


@pytest.fixture
def job(store):
    evaluator = Evaluator(fingerprint="ab", features="digits", dimension=64, reference="cd", details={})
    return store.create_job(
        NewJob(
            study_name="study",
            model="m",
            model_fingerprint="ef",
            dataset="d",
            solver="ddpm",
            sampling={},
            nfe=NFE,
            strategy="paper",
            images=100,
            seed=0,
            spec={},
            evaluator=evaluator,
        )
    )


def bowl(schedule):
    """A distance with its least value, 30, at mean 1.012 and k 0.0006."""
    return 30 + 2e4 * (schedule.mean - 1.012) ** 2 + 1e5 * (schedule.k - 0.0006) ** 2


def search_in(store, job, watcher=None):
    return Search(store, job, PaperStrategy.of(NFE, "discrete"), watcher or Silent())


def run(search, distance=bowl, stop_after=None):
    """Play Ray's part: start trials, report two rungs each, end them. Returns the schedules in order."""
    tried = []
    while stop_after is None or len(tried) < stop_after:
        name = f"trial-{len(tried)}"
        config = search.next_trial(name)
        if config is None:
            break
        value = distance(config["schedule"])
        search.report(name, Progress(images=30, distance=None, seconds=0.5))
        search.report(name, Progress(images=40, distance=value + 1, seconds=1.0))
        search.report(name, Progress(images=100, distance=value, seconds=2.0))
        search.complete(name, None)
        tried.append(config["schedule"])
    return tried


def test_a_search_finds_the_least_distance_and_store_and_study_agree(store, job):
    watcher = Silent()
    search = search_in(store, job, watcher)
    tried = run(search)
    assert search.finished
    search.check()
    best = store.best("m", "d", NFE)
    assert (round(best.lambdas[0], 9), best.k) == (round(1.012 - 0.0006 * 9.5, 9), 0.0006)
    assert best.baseline_distance == pytest.approx(bowl(tried[0]))
    assert best.seconds == 2.0 * len(tried)
    assert best.network_evaluations == 100 * NFE * len(tried)
    study = optuna.load_study(study_name="study", storage=store.optuna_storage())
    assert study.best_value == best.distance
    assert study.best_params == {"b": best.b, "k": best.k}
    evaluations = store.evaluations(job.id)
    for trial, evaluation in zip(study.trials, evaluations, strict=True):
        assert trial.value == evaluation.distance
        assert trial.intermediate_values == dict(evaluation.rungs)
        assert trial.user_attrs["lambdas"] == list(evaluation.lambdas)
        assert trial.user_attrs["phase"] == evaluation.phase
    assert [e for e in watcher.events if e[0] == "ended"] == [
        ("ended", n, "complete") for n in range(len(tried))
    ]


def test_a_killed_search_goes_on_as_if_nothing_had_happened(store, job):
    undisturbed = run(search_in(store, job))
    store_trials = len(store.evaluations(job.id))
    other = store.create_job(
        NewJob(**{f: getattr(job, f) for f in NewJob.__dataclass_fields__} | {"study_name": "other"})
    )
    first = search_in(store, other)
    tried = run(first, stop_after=4)
    assert first.next_trial("killed") is not None  # it runs when the process dies
    resumed = search_in(store, other)
    tried += run(resumed)
    assert tried == undisturbed
    states = [e.state for e in store.evaluations(other.id)]
    assert states.count("failed") == 1
    assert "running" not in states
    assert len(states) == store_trials + 1
    study = optuna.load_study(study_name="other", storage=store.optuna_storage())
    assert [t.state.name for t in study.trials].count("FAIL") == 1
    assert study.best_value == store.best("m", "d", NFE).distance


def test_a_distance_that_is_not_finite_fails_its_trial_and_never_wins(store, job):
    search = search_in(store, job)
    run(search, lambda schedule: bowl(schedule) if schedule.mean < 1.0101 else math.nan)
    assert search.finished
    search.check()
    best = store.best("m", "d", NFE)
    assert round(best.b + best.k * (NFE - 1) / 2, 9) <= 1.01
    failed = [e for e in store.evaluations(job.id) if e.state == "failed"]
    assert failed
    assert all("nan" in e.error for e in failed)


def test_a_trial_that_ray_lost_is_failed_with_the_reason(store, job):
    search = search_in(store, job)
    search.next_trial("a")
    search.complete("a", "its process died")
    assert [(e.state, e.error) for e in store.evaluations(job.id)] == [("failed", "its process died")]


def test_a_fatal_failure_ends_the_search_and_is_raised(store, job):
    search = search_in(store, job)
    search.next_trial("a")
    search.report("a", Progress(images=0, distance=None, seconds=0.0, error="out of memory", fatal=True))
    search.complete("a", None)
    assert search.next_trial("b") is None
    assert search.finished
    with pytest.raises(LamtuneError, match="out of memory"):
        search.check()


def test_a_search_without_any_distance_says_so(store, job):
    search = search_in(store, job)
    run(search, lambda schedule: math.inf)
    assert search.finished
    with pytest.raises(LamtuneError, match="no schedule has a finite distance"):
        search.check()
