"""search.study: the store and the Optuna study agree, whatever happens to the trials."""

import math

import numpy as np
import optuna
import pytest

from benchmarks import jobs
from objectives.paired import difference_error, first, pack, standard_error, unpack
from samplers.errors import LamtuneError
from samplers.sampling import DDPM
from samplers.schedule import Schedule
from search import planning
from search.spec import SearchSpec
from search.strategies.base import FINISHED, WAIT, Candidate
from search.strategies.confirm import Confirmed
from search.strategies.paper import PaperStrategy
from search.study import Search, fresh_seed, point_of
from search.tuner import Progress
from storage import CONFIRM, Evaluator, open_store

NFE = 20
IMAGES = 100


class Silent:
    def __init__(self):
        self.events = []

    def started(self, evaluation, images, expected):
        self.events.append(("started", evaluation.number, images, expected))

    def progressed(self, evaluation, images):
        self.events.append(("progressed", evaluation.number, images))

    def ended(self, evaluation):
        self.events.append(("ended", evaluation.number, evaluation.state))


class Listed:
    """Asks for the given candidates, one after another, each until it has ended; the last one is the finalist."""

    def __init__(self, *candidates):
        self.candidates = candidates

    def next(self, history):
        if any(p.state == "running" for p in history):
            return WAIT
        ended = [(p.setting, p.images) for p in history if not p.fresh]
        wanted = [
            c for c in self.candidates if not any(s == c.setting and n >= (c.images or 0) for s, n in ended)
        ]
        return tuple(wanted) or FINISHED

    def finalists(self, history):
        return self.candidates[-1:]

    def expected_trials(self, history):
        return len(self.candidates)


@pytest.fixture
def store(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/store.db") as opened:
        yield opened


@pytest.fixture
def new_job(store):
    """new_job(study name, …): a job in the store."""

    def make(study_name="study", **changes):
        evaluator = Evaluator(fingerprint="ab", features="digits", dimension=64, reference="cd", details={})
        fields = {"model_fingerprint": "ef", "nfe": NFE, "images": IMAGES, "evaluator": evaluator}
        return store.create_job(jobs.new_job(study_name=study_name, **fields | changes))

    return make


@pytest.fixture
def job(new_job):
    return new_job()


def bowl(config):
    """A distance with its least value, 30, at mean 1.012 and k 0.0006; other random numbers shift it."""
    schedule = config.schedule
    value = 30 + 2e4 * (schedule.mean - 1.012) ** 2 + 1e5 * (schedule.k - 0.0006) ** 2
    return value + (1 if config.seed else 0)


def noise(config, images, own=0.1):
    """Influences of so many images: most of it shared by all schedules of a seed, a part of size `own` not."""
    shared = np.random.default_rng(config.seed % 2**32).normal(size=-(-images // 5))
    mine = np.random.default_rng(round(1e6 * config.schedule.mean)).normal(size=-(-images // 5))
    return (shared + own * mine).astype(np.float32)


def search_in(store, job, strategy=None, watcher=None, rungs=(40, IMAGES), context="c"):
    strategy = strategy or PaperStrategy.of(NFE, "discrete")
    return Search(store, job, strategy, watcher or Silent(), rungs=rungs, context=context)


def play(search, name, config, distance=bowl, influence=noise):
    """Play Ray's part in one trial: report its rungs until it is stopped, and end it. Returns the last rung."""
    search.report(name, Progress(images=30, distance=None, computed=30, seconds=0.5))
    for images in config.rungs:
        value = distance(config) + (1 if images < config.rungs[-1] else 0)
        progress = Progress(
            images=images,
            distance=value,
            computed=images,
            seconds=images / 50,
            influence=influence(config, images),
        )
        if search.report(name, progress):
            break
    search.complete(name, None)
    return images


def run(search, distance=bowl, stop_after=None, influence=noise):
    """Play Ray's part: start trials and end them. Returns the configurations in order."""
    tried = []
    while stop_after is None or len(tried) < stop_after:
        name = f"trial-{len(tried)}"
        config = search.next_trial(name)
        if config is None:
            break
        play(search, name, config, distance, influence)
        tried.append(config)
    return tried


def test_a_search_finds_the_least_distance_and_store_and_study_agree(store, job):
    watcher = Silent()
    search = search_in(store, job, watcher=watcher)
    tried = run(search)
    assert search.finished
    search.check()
    best = store.best("m", "d", NFE)
    assert (round(best.lambdas[0], 9), best.k) == (round(1.012 - 0.0006 * 9.5, 9), 0.0006)
    assert best.baseline_distance == pytest.approx(bowl(tried[0]))
    assert best.seconds == 2.0 * len(tried)
    assert best.network_evaluations == IMAGES * NFE * len(tried)
    study = optuna.load_study(study_name="study", storage=store.optuna_storage())
    assert study.best_value == best.distance
    assert study.best_params == {"b": best.b, "k": best.k}
    evaluations = store.evaluations(job.id)
    for trial, evaluation in zip(study.trials, evaluations, strict=True):
        assert trial.state.name == "COMPLETE"
        assert trial.value == evaluation.distance
        assert trial.intermediate_values == dict(evaluation.rungs)
        assert trial.user_attrs["lambdas"] == list(evaluation.lambdas)
        assert trial.user_attrs["phase"] == evaluation.phase
    assert [e for e in watcher.events if e[0] == "ended"] == [
        ("ended", n, "complete") for n in range(len(tried))
    ]
    assert [e[:3] for e in watcher.events if e[0] == "started"] == [
        ("started", n, IMAGES) for n in range(len(tried))
    ]


def test_a_killed_search_goes_on_as_if_nothing_had_happened(store, job, new_job):
    undisturbed = run(search_in(store, job))
    store_trials = len(store.evaluations(job.id))
    other = new_job("other")
    first_part = search_in(store, other, context="other")
    tried = run(first_part, stop_after=4)
    assert first_part.next_trial("killed") is not None  # it runs when the process dies
    resumed = search_in(store, other, context="other")
    tried += run(resumed)
    assert [(c.schedule, c.rungs) for c in tried] == [(c.schedule, c.rungs) for c in undisturbed]
    states = [e.state for e in store.evaluations(other.id)]
    assert states.count("failed") == 1
    assert "running" not in states
    assert len(states) == store_trials + 1
    study = optuna.load_study(study_name="other", storage=store.optuna_storage())
    assert [t.state.name for t in study.trials].count("FAIL") == 1
    assert study.best_value == store.best("m", "d", NFE).distance


def test_an_adaptive_search_that_is_killed_at_any_trial_repeats_none(store, new_job):
    strategy = planning.strategy(SearchSpec(images=1000), DDPM("ddpm", NFE), "discrete", 64)
    quiet = {"influence": lambda config, images: noise(config, images, own=0.001)}
    whole = new_job("whole", strategy="adaptive", images=1000, confirm=1000)
    undisturbed = run(search_in(store, whole, strategy, rungs=(500, 1000)), **quiet)
    parts = new_job("parts", strategy="adaptive", images=1000, confirm=1000)
    tried = []
    while True:
        search = search_in(store, parts, strategy, rungs=(500, 1000), context="other")
        if search.finished:
            break
        tried += run(search, stop_after=1, **quiet)
        search.next_trial("killed")
    search.check()
    assert [(c.schedule, c.rungs, c.seed) for c in tried] == [
        (c.schedule, c.rungs, c.seed) for c in undisturbed
    ]
    one, other = store.evaluations(whole.id), [e for e in store.evaluations(parts.id) if e.state != "failed"]
    same = ("lambdas", "state", "rungs", "gain", "gain_error", "network_evaluations", "seed", "phase")
    assert [[getattr(e, name) for name in same] for e in one] == [
        [getattr(e, name) for name in same] for e in other
    ]
    best = store.best("m", "d", NFE)
    assert best.confirmed
    assert best.distance - 1 < 30.05  # where the bowl is least; fresh random numbers shift it by 1


def test_a_distance_that_is_not_finite_fails_its_trial_and_never_wins(store, job):
    search = search_in(store, job)
    run(search, lambda config: bowl(config) if config.schedule.mean < 1.0101 else math.nan)
    assert search.finished
    search.check()
    best = store.best("m", "d", NFE)
    assert round(best.b + best.k * (NFE - 1) / 2, 9) <= 1.01
    failed = [e for e in store.evaluations(job.id) if e.state == "failed"]
    assert failed
    assert all("nan" in e.error for e in failed)
    assert {e.images for e in failed} == {0}  # stopped at the first rung that said so


def test_a_trial_that_ray_lost_is_failed_with_the_reason_and_tried_again(store, job):
    search = search_in(store, job)
    search.next_trial("a")
    search.complete("a", "its process died")
    (found,) = store.evaluations(job.id)
    assert (found.state, found.error) == ("failed", "interrupted: its process died")
    again = search.next_trial("b")
    assert again is not None
    assert set(again.schedule.lambdas) == {1.0}


def test_a_failed_trial_keeps_its_rungs_and_its_cost_and_is_stopped(store, job):
    search = search_in(store, job)
    config = search.next_trial("a")
    progress = Progress(images=40, distance=31.0, computed=40, seconds=1.0, influence=noise(config, 40))
    assert not search.report("a", progress)
    failed = Progress(images=60, distance=None, computed=60, seconds=1.5, error="not finite")
    assert search.report("a", failed)
    search.complete("a", None)
    (found,) = store.evaluations(job.id)
    assert (found.state, found.error, found.rungs) == ("failed", "not finite", {40: 31.0})
    assert point_of(found, job).at(40) == math.inf  # what failed counts nowhere


def test_a_fatal_failure_ends_the_search_and_is_raised(store, job):
    search = search_in(store, job)
    search.next_trial("a")
    failure = Progress(images=0, distance=None, computed=0, seconds=0.0, error="out of memory", fatal=True)
    assert search.report("a", failure)
    search.complete("a", None)
    assert search.next_trial("b") is None
    assert search.finished
    with pytest.raises(LamtuneError, match="out of memory"):
        search.check()


def test_a_search_without_any_distance_says_so(store, job):
    search = search_in(store, job)
    run(search, lambda config: math.inf)
    assert search.finished
    with pytest.raises(LamtuneError, match="no schedule has a finite distance"):
        search.check()


def test_a_search_of_which_nothing_could_be_confirmed_says_why(store, new_job):
    job = new_job(confirm=IMAGES)
    strategy = Confirmed(Listed(Candidate("baseline", 1, 0), Candidate("b", 1.01, 0)), IMAGES, 2)
    search = search_in(store, job, strategy)
    run(search, lambda config: math.nan if config.seed else bowl(config))
    assert search.finished
    assert {e.state for e in store.evaluations(job.id) if e.phase == CONFIRM} == {"failed"}
    with pytest.raises(
        LamtuneError, match=r"nothing could be confirmed .* failed: the distance at 40 .* nan"
    ):
        search.check()


def test_a_search_that_was_stopped_in_between_says_so(store, job):
    search = search_in(store, job)
    run(search, stop_after=1)
    with pytest.raises(LamtuneError, match="submit the job again"):
        search.check()


# --- pairs on the same images -----------------------------------------------------------------------------------


def test_a_trial_of_few_images_is_told_as_pruned_with_the_images_it_reached(store, job):
    strategy = Listed(Candidate("baseline", 1, 0, images=25), Candidate("b", 1.01, 0, images=60))
    run(search_in(store, job, strategy))
    found = store.evaluations(job.id)
    assert [(e.state, e.images, list(e.rungs)) for e in found] == [
        ("pruned", 25, [25]),
        ("pruned", 60, [25, 40, 60]),  # where the first can be compared, and the rungs of the job
    ]
    assert [e.network_evaluations for e in found] == [25 * NFE, 60 * NFE]
    study = optuna.load_study(study_name="study", storage=store.optuna_storage())
    assert [(t.state.name, t.last_step) for t in study.trials] == [("PRUNED", 25), ("PRUNED", 60)]


def test_a_gain_is_paired_with_the_baseline_of_the_same_images_and_seed(store, new_job):
    job = new_job(confirm=80)
    strategy = Confirmed(Listed(Candidate("baseline", 1, 0), Candidate("b", 1.01, 0)), 80, 2)
    configs = run(search_in(store, job, strategy))
    baseline, found, fresh_baseline, fresh = store.evaluations(job.id)
    assert [c.seed for c in configs] == [0, 0, fresh_seed(0), fresh_seed(0)]
    assert [e.phase for e in (fresh_baseline, fresh)] == [CONFIRM, CONFIRM]
    assert (baseline.gain, baseline.gain_error) == (0.0, 0.0)
    for one, base, images in ((found, baseline, IMAGES), (fresh, fresh_baseline, 80)):
        assert one.images == base.images == images
        assert one.gain == pytest.approx(base.distance - one.distance)
        expected = difference_error(unpack(base.influence), unpack(one.influence))
        assert one.gain_error == pytest.approx(expected)
        assert one.standard_error == pytest.approx(standard_error(unpack(one.influence)))
        assert one.gain_error < one.standard_error / 3  # the noise that both share cancels
    assert fresh.gain != found.gain or fresh.distance != found.distance
    best = store.best("m", "d", NFE)
    assert (best.confirmed, best.seed, best.distance, best.gain) == (
        True,
        fresh_seed(0),
        fresh.distance,
        fresh.gain,
    )


def test_a_gain_is_not_taken_from_a_baseline_of_other_images(store, job):
    strategy = Listed(Candidate("baseline", 1, 0, images=25), Candidate("b", 1.01, 0, images=60))
    run(search_in(store, job, strategy))
    baseline, longer = store.evaluations(job.id)
    assert baseline.rungs.keys() == {25}
    assert (longer.gain, longer.gain_error) == (None, None)


def test_a_solver_with_other_parameters_is_no_baseline(store, job):
    strategy = Listed(Candidate("eta", 1, 0, parameters=(("eta", 0.5),)), Candidate("b", 1.01, 0))
    configs = run(search_in(store, job, strategy))
    other, longer = store.evaluations(job.id)
    assert configs[0].parameters == {"eta": 0.5} == other.parameters
    assert configs[0].key != configs[1].key
    assert not other.is_baseline
    assert other.gain is None is longer.gain
    study = optuna.load_study(study_name="study", storage=store.optuna_storage())
    assert study.trials[0].user_attrs["eta"] == 0.5


def test_a_fresh_seed_is_a_seed_and_another_one():
    for seed in (0, 1, 2**62, 2**63 - 1):
        assert 0 <= fresh_seed(seed) < 2**63
        assert fresh_seed(seed) != seed


# --- stopping ---------------------------------------------------------------------------------------------------


class Finalists(Listed):
    """The baseline is searched; three finalists follow, the best one first."""

    def finalists(self, history):
        return tuple(Candidate("final", mean, 0) for mean in (1.012, 1.1, 1.0121))


def test_a_finalist_that_has_lost_is_stopped_at_its_rung_and_told_as_pruned(store, new_job):
    job = new_job(confirm=IMAGES)
    strategy = Confirmed(Finalists(Candidate("baseline", 1, 0)), IMAGES, 2)
    search = search_in(store, job, strategy)
    configs = run(search)
    search.check()
    assert [c.racing for c in configs] == [False, True, True, True, True]
    found = store.evaluations(job.id)
    assert [(round(e.mean, 9), e.state, e.images) for e in found] == [
        (1, "complete", IMAGES),
        (1, "complete", IMAGES),
        (1.012, "complete", IMAGES),
        (1.1, "pruned", 40),
        (1.0121, "complete", IMAGES),  # as good, within the noise
    ]
    study = optuna.load_study(study_name="study", storage=store.optuna_storage())
    assert (study.trials[3].state.name, study.trials[3].last_step) == ("PRUNED", 40)
    assert found[3].network_evaluations == 40 * NFE


def test_a_trial_of_the_search_itself_is_never_stopped(store, new_job):
    job = new_job(confirm=IMAGES)
    strategy = Confirmed(Listed(Candidate("baseline", 1, 0), Candidate("b", 1.2, 0)), IMAGES, 2)
    run(search_in(store, job, strategy))
    assert [e.images for e in store.evaluations(job.id) if e.phase != CONFIRM] == [IMAGES, IMAGES]


def test_finalists_race_at_the_rungs_of_the_job_alone(store, new_job):
    """As many looks as the error probability of a race is shared among."""
    job = new_job(confirm=IMAGES)
    listed = Listed(*(Candidate("b", 1, 0, images=n) for n in (10, 20, 30, 50, 60)))
    configs = run(search_in(store, job, Confirmed(listed, IMAGES, 2)))
    assert [c.rungs for c in configs if c.seed == fresh_seed(0)] == [(40, IMAGES)]


# --- reuse ------------------------------------------------------------------------------------------------------


def test_what_another_job_has_measured_costs_nothing_and_says_where_it_is_from(store, job, new_job):
    run(search_in(store, job))
    other = new_job("other")
    watcher = Silent()
    search = search_in(store, other, watcher=watcher)
    assert run(search) == []  # nothing is left to run
    assert search.finished
    search.check()
    before, after = store.evaluations(job.id), store.evaluations(other.id)
    assert [e.reused for e in after] == [e.id for e in before]
    assert {(e.network_evaluations, e.seconds) for e in after} == {(0, 0.0)}
    for one, known in zip(after, before, strict=True):
        same = (
            "lambdas",
            "rungs",
            "images",
            "distance",
            "influence",
            "state",
            "standard_error",
            "gain",
            "gain_error",
        )
        assert [getattr(one, name) for name in same] == [getattr(known, name) for name in same]
    assert [e[0] for e in watcher.events] == ["ended"] * len(after)
    study = optuna.load_study(study_name="other", storage=store.optuna_storage())
    assert [t.value for t in study.trials] == [e.distance for e in after]


def test_a_longer_evaluation_is_known_at_its_rungs_only(store, job, new_job):
    run(search_in(store, job, Listed(Candidate("b", 1.01, 0))))
    (whole,) = store.evaluations(job.id)
    other = new_job("other")
    configs = run(search_in(store, other, Listed(*(Candidate("b", 1.01, 0, images=n) for n in (40, 50)))))
    assert [c.rungs for c in configs] == [(40, 50)]  # that of 40 images is known, that of 50 is not
    at_40, at_50 = store.evaluations(other.id)
    assert (at_40.reused, at_40.state, at_40.rungs) == (whole.id, "pruned", {40: whole.rungs[40]})
    assert len(unpack(at_40.influence)) == 8
    assert np.array_equal(unpack(at_40.influence), first(unpack(whole.influence), 40))
    assert at_50.reused is None


@pytest.mark.parametrize("change", ["seed", "context", "parameters"])
def test_other_numbers_are_not_taken_for_the_same(store, job, new_job, change):
    run(search_in(store, job, Listed(Candidate("b", 1.01, 0))))
    other = new_job("other", seed=1 if change == "seed" else 0)
    parameters = (("eta", 0.5),) if change == "parameters" else ()
    search = search_in(
        store,
        other,
        Listed(Candidate("b", 1.01, 0, parameters=parameters)),
        context="else" if change == "context" else "c",
    )
    assert len(run(search)) == 1


def test_what_failed_elsewhere_is_tried_again(store, job, new_job):
    run(search_in(store, job, Listed(Candidate("b", 1.01, 0))), lambda config: math.nan)
    assert len(run(search_in(store, new_job("other"), Listed(Candidate("b", 1.01, 0))))) == 1


def test_a_trial_without_influences_has_no_error_bars(store, job):
    run(
        search_in(store, job, Listed(Candidate("b", 1, 0), Candidate("b", 1.01, 0))),
        influence=lambda *_: None,
    )
    _, found = store.evaluations(job.id)
    assert found.gain is not None
    assert (found.standard_error, found.gain_error, found.influence) == (None, None, b"")
    assert point_of(found, job).influence is None


def test_a_free_schedule_comes_back_as_it_was_asked_for(store, job):
    candidate = Candidate("bend", 1.01, 0.002, bends=(0.01, -0.003), parameters=(("eta", 0.25),), images=40)
    run(search_in(store, job, Listed(candidate)), lambda config: 30.0)
    (found,) = store.evaluations(job.id)
    assert (found.k, found.b) == (None, None)
    assert point_of(found, job).setting == candidate.setting
    assert Schedule(found.lambdas) == candidate.schedule(NFE)
    assert pack(unpack(found.influence)) == found.influence
