"""search.tuner: trials hand out images over real Ray actors, rung by rung, and tell the loop what happens."""

import logging
import os
import queue
import threading
import time
from contextlib import suppress
from logging.handlers import QueueHandler

import numpy as np
import psutil
import pytest
import ray

from benchmarks.servers import title
from objectives.paired import block_means
from samplers.errors import InputError, LamtuneError, NonFiniteError
from search import tuner
from search.tuner import Trial, TrialConfig, Workers, run_trials, units

RUNGS = (10, 25, 60)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class Counter:
    """A worker whose features are image ids, so that every image can be accounted for.

    behaviour: `after`, a file without which it does not get ready; `cannot`, why it cannot load; `slow`, seconds a
    call; `log`, a file that gets a line per call; `dies`: the first image of calls that kill its process, unless the
    file `once` exists, which it then makes; `fuse`, a file that it removes and dies in the call that is named in it.
    """

    def __init__(self, **behaviour):
        self.behaviour = behaviour

    def load(self, *needs):
        assert needs == ("reference", "fingerprint")
        if "cannot" in self.behaviour:
            raise InputError(self.behaviour["cannot"])
        while not os.path.exists(self.behaviour.get("after", os.curdir)):
            time.sleep(0.01)

    def sample(self, sampling, schedule, start, stop, seed, parameters, key):
        assert (seed, parameters, key) == (3, {"eta": 0.5}, "key")
        with open(self.behaviour.get("log", os.devnull), "a") as log:
            log.write(f"{start}\n")
        if start in self.behaviour.get("dies", ()) and not os.path.exists(once := self.behaviour["once"]):
            if once:
                open(once, "w").close()
            os._exit(1)
        time.sleep(self.behaviour.get("slow", sampling["delay"] * (start % 3)))  # calls end out of order
        if schedule == "not finite":
            raise NonFiniteError("images that are not finite")
        if schedule == "broken":
            raise RuntimeError("out of memory")
        return np.arange(start, stop, dtype=float), (stop - start - 1, 0.5)

    def burn(self, call):
        with suppress(FileNotFoundError), open(self.behaviour.get("fuse", "")) as fuse:
            if fuse.read() == call:
                os.remove(fuse.name)
                os._exit(1)

    def score(self, images, *parts):
        self.burn("score")
        assert sum(map(len, parts[:-1])) < images
        together = np.concatenate(parts)[:images]
        count = len(together)
        return (float(np.array_equal(together, np.arange(count))) * count, 1000.0 + together), 8.0

    def conclude(self, sampling, schedule, seed, parameters, *parts):
        self.burn("conclude")
        return ({"images": sum(map(len, parts))}, b"PNG"), 0.0625


class Loop:
    """Runs the given schedules one after another and remembers everything it is told.

    stop: schedule → the number of images at whose distance it is to be stopped.
    """

    def __init__(self, *schedules, racing=False, measured=False, stop=None, fails=None):
        self.todo, self.running, self.told, self.ends = list(schedules), {}, [], []
        self.racing, self.measured, self.stop, self.fails = racing, measured, stop or {}, fails

    def next_trial(self, trial_id):
        if not self.todo or any(progress.fatal for _, progress in self.told):
            return None
        self.running[trial_id] = self.todo.pop(0)
        return config(self.running[trial_id], self.racing, self.measured)

    @property
    def finished(self):
        fatal = any(progress.fatal for _, progress in self.told)
        return not self.running and (fatal or not self.todo)

    def report(self, trial_id, progress):
        if self.fails is not None:
            raise self.fails
        schedule = self.running[trial_id]
        self.told.append((schedule, progress))
        return progress.distance is not None and progress.images == self.stop.get(schedule)

    def complete(self, trial_id, lost):
        self.ends.append((self.running.pop(trial_id), lost))

    def of(self, schedule):
        """What was told of a schedule at its rungs."""
        return [p for s, p in self.told if s == schedule and p.distance is not None]


def config(schedule, racing=False, measured=False, rungs=None):
    return TrialConfig(
        schedule=schedule,
        parameters={"eta": 0.5},
        seed=3,
        key="key",
        rungs=rungs or RUNGS,
        racing=racing,
        measured=measured,
    )


@pytest.fixture
def workers(local_ray):
    """workers(*behaviours): one per mapping; they go with the test."""
    made = []

    def make(*behaviours):
        made.extend(Counter.remote(**behaviour) for behaviour in behaviours)
        return Workers(list(made), ("reference", "fingerprint"), 1)

    yield make
    for actor in made:
        ray.kill(actor)


def run(loop, found):
    run_trials(loop, found, {"delay": 0.003}, 7)


def alone(found, unit=7, grain=1, **how):
    """A trial in this process, until it has ended: what it reported."""
    trial = Trial.__new__(Trial)
    sampling = {"delay": 0.003}
    trial.setup({"trial": config("a", **how)}, found.actors, found.needs, [sampling], unit, grain)
    results = []
    while not (results and results[-1]["done"]):
        results.append(trial.step())
    return results


def rungs_of(results):
    return [(r["images"], r["distance"]) for r in results if r["distance"] is not None]


ALL = [(10, 10.0), (25, 25.0), (60, 60.0)]  # the number of images as distance: all came, in order, once


def test_units_cover_every_image_once_and_stop_at_rungs():
    assert units([10, 25], 7) == [(0, 0, 7), (0, 7, 10), (1, 10, 14), (1, 14, 21), (1, 21, 25)]


@pytest.mark.parametrize(
    ("workers", "sizes"),
    [
        (1, [2000] * 5),
        (2, [1750] * 4 + [1500] * 2),
        (4, [1250] * 8),
        (8, [1250] * 8),
        (16, [750] * 8 + [500] * 8),
        (64, [250] * 40),
    ],
)
def test_units_give_every_worker_the_same_number_of_images(workers, sizes):
    assert [stop - start for _, start, stop in units([10_000], 2000, workers)] == sizes


@pytest.mark.parametrize(
    ("grain", "workers", "calls"),
    [
        # The first rung lies within a call, and the second call goes beyond no rung.
        (1250, 1, [(0, 0, 1250), (1, 1250, 2500), (2, 2500, 3750), (2, 3750, 4500)]),
        (1250, 8, [(0, 0, 1250), (1, 1250, 2500), (2, 2500, 3750), (2, 3750, 4500)]),
        (500, 1, [(0, 0, 1000), (1, 1000, 2500), (2, 2500, 4500)]),
        (
            500,
            3,
            [
                *((0, 0, 500), (0, 500, 1000)),
                *((1, 1000, 1500), (1, 1500, 2000), (1, 2000, 2500)),
                *((2, 2500, 3500), (2, 3500, 4000), (2, 4000, 4500)),
            ],
        ),
        # The first call has all images of the second rung, too.
        (3000, 2, [(0, 0, 3000), (2, 3000, 4500)]),
    ],
)
def test_units_are_whole_network_calls_where_those_are_whole_blocks(grain, workers, calls):
    assert units([1000, 2500, 4500], 2000, workers, grain) == calls


@pytest.mark.parametrize("racing", [False, True])
def test_rungs_within_a_call_are_measured_on_their_own_images(workers, racing):
    rungs = (300, 400, 700, 1500)
    results = alone(workers({}, {}), 500, 500, racing=racing, rungs=rungs)
    assert rungs_of(results) == [(n, float(n)) for n in rungs]
    for r in results:
        if r["distance"] is not None:
            assert np.array_equal(r["influence"], block_means(1000.0 + np.arange(r["images"])))


def test_units_end_at_whole_blocks_also_after_a_rung_that_does_not():
    found = units([600, 5750], 2000, 2)
    assert [start % 250 for _, start, _ in found if start != 600] == [0] * (len(found) - 1)
    by_worker = [sum(stop - start for rung, start, stop in found[i::2] if rung == 1) for i in range(2)]
    assert max(by_worker) - min(by_worker) <= 750


@pytest.mark.parametrize("rungs", [[50], [100, 300, 600], [500, 3250, 10_000]])
@pytest.mark.parametrize("unit", [1, 30, 250, 500])
@pytest.mark.parametrize("workers", [1, 3, 16])
def test_units_of_any_size_for_any_number_of_workers_go_on_and_leave_nothing_out(rungs, unit, workers):
    found = units(rungs, unit, workers)
    assert [start for _, start, _ in found] == [0, *(stop for _, _, stop in found[:-1])]
    assert all(start < stop <= start + unit for _, start, stop in found)
    assert [max(stop for r, _, stop in found if r == rung) for rung in range(len(rungs))] == rungs


@pytest.mark.parametrize("n", [1, 3])
def test_a_trial_reports_each_rung_once_in_order_with_all_its_images_and_their_influences(workers, n):
    loop = Loop("a", "b")
    run(loop, workers(*[{}] * n))
    for schedule in "ab":
        told = [p for s, p in loop.told if s == schedule]
        rungs = [p for p in told if p.distance is not None]
        assert [(p.images, p.distance) for p in rungs] == ALL
        for p in rungs:
            assert np.array_equal(p.influence, block_means(1000.0 + np.arange(p.images)))
        calls = units(RUNGS, 7)
        seconds = [p.seconds for p in told]
        assert seconds == sorted(seconds)
        assert seconds[-1] == 0.5 * len(calls) + 8.0 * len(RUNGS)
        assert told[-1].computed == 60 - len(calls)
    assert loop.ends == [("a", None), ("b", None)]


def test_a_racing_trial_begins_nothing_beyond_the_rung_at_which_it_is_stopped(workers, tmp_path):
    run(
        Loop("a", racing=True, stop={"a": 10}),
        workers({"log": str(tmp_path / "log")}, {"log": str(tmp_path / "log")}),
    )
    assert sorted((tmp_path / "log").read_text().split()) == ["0", "7"]


def test_a_schedule_that_is_not_finite_fails_alone(workers):
    loop = Loop("a", "not finite", "b")
    run(loop, workers({}, {}))
    failures = [(s, p.error, p.fatal) for s, p in loop.told if p.error]
    assert failures == [("not finite", "images that are not finite", False)]
    assert [s for s, _ in loop.ends] == ["a", "not finite", "b"]


def test_any_other_failure_ends_the_search_with_its_reason(workers):
    loop = Loop("broken", "a")
    run(loop, workers({}, {}))
    assert [(s, p.error, p.fatal) for s, p in loop.told] == [("broken", "RuntimeError: out of memory", True)]
    assert loop.ends == [("broken", None)]


def test_what_the_loop_raises_comes_out_and_nothing_more_is_tried(workers):
    loop = Loop("a", "b", fails=LamtuneError("the store failed"))
    with pytest.raises(LamtuneError, match="the store failed"):
        run(loop, workers({}))
    assert loop.todo == ["b"]


def test_a_worker_that_dies_costs_its_calls_in_flight_and_works_again(workers, tmp_path):
    log = str(tmp_path / "log")
    results = alone(workers({"log": log, "dies": [10], "once": str(tmp_path / "dead")}))
    assert rungs_of(results) == ALL
    assert (tmp_path / "dead").exists()
    sampled = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert set(sampled) == {start for _, start, _ in units(RUNGS, 7)}
    assert len(sampled) - len(set(sampled)) <= tuner._IN_FLIGHT


@pytest.mark.parametrize("call", ["score", "conclude"])
def test_a_worker_that_dies_after_its_images_changes_nothing(workers, tmp_path, call):
    fuse = tmp_path / "fuse"
    fuse.write_text(call)
    loop = Loop("a", "b", measured=True)
    run(loop, workers({"fuse": str(fuse)}, {"fuse": str(fuse)}))
    assert not fuse.exists()
    for schedule in "ab":
        rungs = loop.of(schedule)
        assert [(p.images, p.distance) for p in rungs] == ALL
        assert all(np.array_equal(p.influence, block_means(1000.0 + np.arange(p.images))) for p in rungs)
        assert [(p.metrics, p.picture) for p in rungs] == [(None, None)] * 2 + [({"images": 60}, b"PNG")]


def test_a_trial_that_is_stopped_with_calls_in_flight_leaves_nothing_to_the_next(workers):
    loop = Loop("a", "b", stop={"a": 10})
    run(loop, workers({}, {}, {}))
    assert [p.images for p in loop.of("a")] == [10]
    assert [(p.images, p.distance) for p in loop.of("b")] == ALL


def test_a_trial_whose_own_process_is_killed_is_told_as_lost_without_a_traceback(workers):
    def kill():
        while True:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if title(process).startswith("ray::ResourceTrainable"):
                        return process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    loop, logged = Loop("a"), queue.SimpleQueue()
    logging.getLogger("ray.tune").addHandler(handler := QueueHandler(logged))
    run(loop, workers({"slow": 0.2}))
    logging.getLogger("ray.tune").removeHandler(handler)
    killer.join()
    assert loop.ends == [("a", tuner._DIED)]
    assert logged.empty()


def test_images_that_kill_every_worker_end_the_search(workers):
    error = alone(workers({"dies": [10], "once": ""}))[-1]
    assert (error["fatal"], "images 10 to 13: 4 workers died with them" in error["error"]) == (True, True)


def test_a_worker_that_comes_late_gets_work_in_the_middle_of_a_trial(workers, tmp_path):
    early, late = str(tmp_path / "early"), str(tmp_path / "late")
    results = alone(workers({"log": early, "slow": 0.2}, {"log": late, "after": early}))
    assert rungs_of(results) == ALL
    mine, theirs = ((tmp_path / name).read_text().split() for name in ("early", "late"))
    assert mine[0] == "0"
    assert len(theirs) > len(mine)  # it is quicker, and gets more from then on


def test_the_search_goes_on_without_a_worker_that_cannot_load_or_was_ended_for_good(workers):
    found = workers({"cannot": "stats.npz: no such file"}, {"slow": 0.1}, {"slow": 0.1})
    ray.kill(found.actors[1])
    assert rungs_of(alone(found)) == ALL


def test_without_any_worker_the_search_ends_with_the_reason(workers):
    error = alone(workers({"cannot": "stats.npz: no such file"}))[-1]
    assert (error["error"], error["fatal"]) == ("no sampler worker is left: stats.npz: no such file", True)


def test_a_search_without_a_worker_that_is_ready_waits_but_not_for_ever(workers, monkeypatch):
    monkeypatch.setattr(tuner, "_ALONE_S", 0.2)
    error = alone(workers({"after": "/nowhere"}))[-1]
    assert "there has been no sampler worker for 0 s" in error["error"]
