"""benchmarks.scaling: the simulation and the shares follow what can be said of them by hand."""

from dataclasses import replace

import pytest

from benchmarks.scaling import Timed, Times, shares, simulate

FREE = Times(image=0.001, call=0.0, message=0.0, add=0.0, distance=0.0)


def test_work_alone_is_shared_among_workers_until_there_are_no_more_calls_than_workers():
    trials = {n: simulate(FREE, n, 10_000, 2000, 1)["trial"] for n in (1, 8, 40, 400)}
    assert trials == pytest.approx({1: 10.0, 8: 1.25, 40: 0.25, 400: 0.25})


def test_a_network_call_that_is_not_full_takes_as_long():
    assert simulate(FREE, 8, 10_000, 2000, 1250)["trial"] == pytest.approx(1.25)
    assert simulate(FREE, 8, 10_000, 2000, 500)["trial"] == pytest.approx(1.5)
    assert simulate(FREE, 1, 700, 2000, 500)["trial"] == pytest.approx(1.0)


def test_a_distance_and_messages_are_waited_for_by_all():
    times = replace(FREE, distance=2.0, message=0.01, add=0.02)
    # 8 blocks of 250 images, one per worker: 0.25 s, their messages and moments, and the distance.
    assert simulate(times, 8, 2000, 2000, 1)["trial"] == pytest.approx(0.25 + 8 * 0.03 + 2.0)
    # One worker has two calls of 1,000 images, and nothing travels.
    alone = simulate(times, 1, 2000, 1000, 1)
    assert alone["trial"] == pytest.approx(2.0 + 8 * 0.02 + 2.0)


def test_a_slow_process_that_hands_out_calls_is_what_many_workers_wait_for():
    slow = replace(FREE, call=1.0)
    assert simulate(slow, 40, 10_000, 2000, 1)["sampled"] >= 20.0


def test_the_time_of_a_trial_is_split_into_sampling_what_follows_and_waiting():
    # Two workers, 2 s of sampling in which they work 3.6 of 4 s, then 0.5 s in which one of them works 0.4 s.
    first = Timed(sampled=9.0, ended=10.0, sampling=1.0, busy=1.0, distance=5.0)
    second = Timed(sampled=12.0, ended=12.5, sampling=3.6, busy=4.0, distance=6.0)
    assert shares([first, second], workers=2, images=1000) == pytest.approx(
        {
            "trial": 2.5,
            "images_per_second": 400.0,
            "image": 0.0036,
            "idle": 0.2,
            "idle_while_sampling": 0.1,
            "after_sampling": 0.2,
        }
    )
