"""search.tuner: trials hand out images over real Ray actors, rung by rung, and tell the loop what happens."""

import time

import pytest
import ray

from samplers.errors import NonFiniteError
from search.tuner import run_trials, units


@ray.remote(num_cpus=0)
class Counter:
    """A worker whose moments are a list of image ids, so that every image can be accounted for."""

    def sample(self, sampling, schedule, start, stop):
        time.sleep(sampling["delay"] * (start % 3))  # calls end out of order
        if schedule == "not finite":
            raise NonFiniteError("images that are not finite")
        if schedule == "broken":
            raise RuntimeError("out of memory")
        return list(range(start, stop)), 0.5

    def merge(self, *parts):
        together = [image for part in parts for image in part]
        return together, float(together == list(range(len(together)))) * len(together)


class Loop:
    """Runs the given schedules one after another and remembers everything it is told."""

    def __init__(self, *schedules):
        self.todo, self.running, self.told, self.ends = list(schedules), {}, [], []

    def next_trial(self, trial_id):
        if not self.todo or any(progress.fatal for _, progress in self.told):
            return None
        self.running[trial_id] = self.todo.pop(0)
        return {"schedule": self.running[trial_id]}

    @property
    def finished(self):
        fatal = any(progress.fatal for _, progress in self.told)
        return not self.running and (fatal or not self.todo)

    def report(self, trial_id, progress):
        self.told.append((self.running[trial_id], progress))

    def complete(self, trial_id, lost):
        self.ends.append((self.running.pop(trial_id), lost))


def run(loop, workers=2, rungs=(10, 25, 60), unit=7):
    actors = [Counter.remote() for _ in range(workers)]
    run_trials(loop, actors, {"delay": 0.003}, rungs, unit)


def test_units_cover_every_image_once_and_stop_at_rungs():
    assert units([10, 25], 7) == [(0, 0, 7), (0, 7, 10), (1, 10, 17), (1, 17, 24), (1, 24, 25)]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_trial_reports_each_rung_once_in_order_with_all_its_images(workers):
    loop = Loop("a", "b")
    run(loop, workers)
    for schedule in "ab":
        rungs = [(p.images, p.distance) for s, p in loop.told if s == schedule and p.distance is not None]
        # The counting workers give the number of images as distance only if all came, in order, once.
        assert rungs == [(10, 10.0), (25, 25.0), (60, 60.0)]
        seconds = [p.seconds for s, p in loop.told if s == schedule]
        assert seconds == sorted(seconds)
        assert seconds[-1] == 0.5 * len(units([10, 25, 60], 7))
    assert loop.ends == [("a", None), ("b", None)]


@pytest.mark.usefixtures("local_ray")
def test_a_schedule_that_is_not_finite_fails_alone():
    loop = Loop("a", "not finite", "b")
    run(loop)
    failures = [(s, p.error, p.fatal) for s, p in loop.told if p.error]
    assert failures == [("not finite", "images that are not finite", False)]
    assert [s for s, _ in loop.ends] == ["a", "not finite", "b"]


@pytest.mark.usefixtures("local_ray")
def test_any_other_failure_ends_the_search_with_its_reason():
    loop = Loop("broken", "a")
    run(loop)
    assert [(s, p.error, p.fatal) for s, p in loop.told] == [("broken", "RuntimeError: out of memory", True)]
    assert loop.ends == [("broken", None)]
