"""search.tuner: trials hand out images over real Ray actors, rung by rung, and tell the loop what happens."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from objectives.paired import block_means
from samplers.errors import NonFiniteError
from search.tuner import Trial, TrialConfig, run_trials, units

RUNGS = (10, 25, 60)


@ray.remote(num_cpus=0, max_restarts=2, max_task_retries=2)
class Counter:
    """A worker whose moments and features are lists of image ids, so that every image can be accounted for."""

    def sample(self, sampling, schedule, start, stop, seed, parameters, key):
        time.sleep(sampling["delay"] * (start % 3))  # calls end out of order
        if schedule == "not finite":
            raise NonFiniteError("images that are not finite")
        if schedule == "broken":
            raise RuntimeError("out of memory")
        assert (seed, dict(parameters), key) == (7, {"eta": 0.5}, f"key of {schedule}")
        ids = list(range(start, stop))
        return ids, np.array(ids, float), (stop - start - parameters["eta"], 0.5)  # half an image was known

    def merge(self, *parts):
        together = [image for part in parts for image in part]
        return together, float(together == list(range(len(together)))) * len(together), len(together)

    def influences(self, sensitivity, features):
        if (fuse := os.environ.get("LAMTUNE_TEST_FUSE")) and Path(fuse).exists():
            Path(fuse).unlink()
            os._exit(1)
        return features + 1000 * sensitivity  # whose numbers they are, at which rung


class Loop:
    """Runs the given schedules one after another and remembers everything it is told.

    stop: schedule → the number of images at whose distance it is to be stopped.
    """

    def __init__(self, *schedules, racing=False, rungs=RUNGS, stop=None):
        self.todo, self.running, self.told, self.ends = list(schedules), {}, [], []
        self.racing, self.rungs, self.stop = racing, rungs, stop or {}

    def next_trial(self, trial_id):
        if not self.todo or any(progress.fatal for _, progress in self.told):
            return None
        schedule = self.running[trial_id] = self.todo.pop(0)
        return TrialConfig(
            schedule=schedule,
            parameters={"eta": 0.5},
            seed=7,
            key=f"key of {schedule}",
            rungs=self.rungs,
            racing=self.racing,
        )

    @property
    def finished(self):
        fatal = any(progress.fatal for _, progress in self.told)
        return not self.running and (fatal or not self.todo)

    def report(self, trial_id, progress):
        schedule = self.running[trial_id]
        self.told.append((schedule, progress))
        return progress.distance is not None and progress.images == self.stop.get(schedule)

    def complete(self, trial_id, lost):
        self.ends.append((self.running.pop(trial_id), lost))

    def of(self, schedule):
        """What was told of a schedule at its rungs."""
        return [p for s, p in self.told if s == schedule and p.distance is not None]


def run(loop, workers=2, unit=7, environment=None):
    options = {"runtime_env": {"env_vars": environment}} if environment else {}
    actors = [Counter.options(**options).remote() for _ in range(workers)]
    try:
        run_trials(loop, actors, {"delay": 0.003}, unit)
    finally:
        for actor in actors:
            ray.kill(actor)


def assert_whole(loop, schedule, rungs=RUNGS):
    """All rungs of a schedule were told in order, each with all its images."""
    told = loop.of(schedule)
    # The counting workers give the number of images as distance only if all came, in order, once.
    assert [(p.images, p.distance) for p in told] == [(n, n) for n in rungs]
    for progress in told:
        expected = block_means(np.arange(progress.images) + 1000.0 * progress.images)
        assert np.array_equal(progress.influence, expected)


def test_units_cover_every_image_once_and_stop_at_rungs():
    assert units([10, 25], 7) == [(0, 0, 7), (0, 7, 10), (1, 10, 14), (1, 14, 21), (1, 21, 25)]
    for rungs in ([50], [100, 300, 600], [500, 3250, 10_000]):
        for unit in (1, 30, 250, 500):
            for workers in (1, 2, 3, 16):
                found = units(rungs, unit, workers)
                assert [start for _, start, _ in found] == [0, *(stop for _, _, stop in found[:-1])]
                assert all(start < stop <= start + unit for _, start, stop in found)
                assert [max(stop for r, _, stop in found if r == rung) for rung in range(len(rungs))] == rungs


def test_units_begin_at_blocks_of_the_cache_and_are_shared_evenly():
    assert units([100, 1100], 500) == [(0, 0, 100), (1, 100, 500), (1, 500, 1000), (1, 1000, 1100)]
    assert [stop - start for _, start, stop in units([10_000], 500, 8)] == [500] * 20
    assert [stop - start for _, start, stop in units([1000], 500, 4)] == [250] * 4


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("workers", "racing"), [(1, False), (3, False), (3, True)])
def test_a_trial_reports_each_rung_once_in_order_with_all_its_images(workers, racing):
    loop = Loop("a", "b", racing=racing)
    run(loop, workers)
    calls = len(units(RUNGS, 7, workers))
    for schedule in "ab":
        assert_whole(loop, schedule)
        told = [p for s, p in loop.told if s == schedule]
        seconds = [p.seconds for p in told]
        assert seconds == sorted(seconds)
        assert seconds[-1] == 0.5 * calls
        assert told[-1].computed == RUNGS[-1] - 0.5 * calls  # what a cache had is not counted
    assert loop.ends == [("a", None), ("b", None)]


@pytest.mark.usefixtures("local_ray")
def test_a_rung_has_its_own_distance_even_where_calls_are_told_in_the_reverse_order(monkeypatch):
    loop = Loop("a")
    trial, wait = object.__new__(Trial), ray.wait

    def last_first(calls, **_):
        wait(calls, num_returns=len(calls))
        return calls[-1:], calls[:-1]

    actors = [Counter.remote() for _ in range(2)]
    trial.setup({"trial": loop.next_trial("1")}, workers=actors, job=[{"delay": 0.0}], unit=7)
    with monkeypatch.context() as patch:
        patch.setattr(ray, "wait", last_first)
        results = [trial.step()]
        while not results[-1]["done"]:
            results.append(trial.step())
    told = [(r["images"], r["distance"], len(r["influence"])) for r in results if r["distance"] is not None]
    assert told == [(10, 10.0, 2), (25, 25.0, 5), (60, 60.0, 12)]
    for actor in actors:
        ray.kill(actor)


@pytest.mark.usefixtures("local_ray")
def test_a_race_computes_nothing_beyond_the_rung_at_which_it_is_lost():
    loop = Loop("a", "b", racing=True, stop={"a": 25})
    run(loop, workers=3)
    assert [p.images for p in loop.of("a")] == [10, 25]
    assert loop.of("a")[-1].computed == 25 - 0.5 * len(units([10, 25], 7, 3))
    assert_whole(loop, "b")  # nothing of the first one is left over
    assert loop.ends == [("a", None), ("b", None)]


@pytest.mark.usefixtures("local_ray")
def test_a_trial_that_is_stopped_with_calls_in_flight_leaves_nothing_to_the_next():
    loop = Loop("a", "b", "c", stop={"a": 10, "b": 10})
    run(loop, workers=3, unit=2)
    assert [p.images for p in loop.of("a")] == [p.images for p in loop.of("b")] == [10]
    assert_whole(loop, "c")


@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_dies_between_its_images_and_their_influences_changes_nothing(tmp_path):
    fuse = tmp_path / "fuse"
    fuse.touch()
    loop = Loop("a", "b")
    run(loop, workers=2, environment={"LAMTUNE_TEST_FUSE": str(fuse)})
    assert not fuse.exists()
    assert_whole(loop, "a")
    assert_whole(loop, "b")
    assert loop.ends == [("a", None), ("b", None)]


@pytest.mark.usefixtures("local_ray")
def test_workers_that_are_gone_end_the_search_with_its_reason():
    actors = [Counter.options(max_restarts=0, max_task_retries=0).remote()]
    ray.kill(actors[0])
    loop = Loop("a", "b")
    run_trials(loop, actors, {"delay": 0.0}, 7)
    ((schedule, progress),) = loop.told
    assert (schedule, progress.fatal) == ("a", True)
    assert "the sampler workers cannot be reached" in progress.error
    assert loop.ends == [("a", None)]


@pytest.mark.usefixtures("local_ray")
def test_a_schedule_that_is_not_finite_fails_alone():
    loop = Loop("a", "not finite", "b")
    run(loop)
    failures = [(s, p.error, p.fatal) for s, p in loop.told if p.error]
    assert failures == [("not finite", "images that are not finite", False)]
    assert [s for s, _ in loop.ends] == ["a", "not finite", "b"]
    assert_whole(loop, "b")


@pytest.mark.usefixtures("local_ray")
def test_any_other_failure_ends_the_search_with_its_reason():
    loop = Loop("broken", "a")
    run(loop)
    assert [(s, p.error, p.fatal) for s, p in loop.told] == [("broken", "RuntimeError: out of memory", True)]
    assert loop.ends == [("broken", None)]
