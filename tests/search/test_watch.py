"""search.watch: how a running search is, from the store alone."""

import io
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from search import watch
from storage import CONFIRM, NotInStore


def test_a_line_says_phase_trials_speed_best_and_time_left(store, play):
    job = play(store)
    tried = store.evaluations(job.id)
    began = tried[0].started_at
    # Each trial took a second for every 100 images, one after another.
    timed = [
        replace(e, started_at=began, finished_at=began + timedelta(seconds=e.images / 100)) for e in tried[:6]
    ]
    timed.append(replace(tried[6], state="running", images=0, distance=None, finished_at=None))
    running = replace(job, status="running", finished_at=None)
    text = watch.line(running, timed, 15, job.updated_at)
    best = min(timed[:6], key=lambda e: e.distance)
    assert (
        f"job {job.id} running · {tried[6].phase}, trial 6 at 0 images · 6 ended early · 100 images/s" in text
    )
    assert f"best {best.distance:.4g}" in text
    # 7 trials of the search like those before, and λ = 1 and the winner on 5,000 images each.
    usual = sum(e.images for e in timed[:6]) / 6
    assert watch.images_left(job, timed[:6], 15) == pytest.approx(7 * usual + 2 * 5000)
    assert text.endswith("2 min left")


def test_a_finished_search_shows_its_confirmed_best(store, play):
    job = play(store)
    tried = store.evaluations(job.id)
    best = watch.best_so_far(tried)
    assert best.phase == CONFIRM
    assert best.number == store.best_of(job.id).number
    text = watch.line(job, tried, 15, datetime.now(UTC))
    assert "finished" in text
    assert "left" not in text


def test_a_search_whose_process_is_gone_says_so(store, play):
    job = play(store)
    running = replace(job, status="running", finished_at=None)
    text = watch.line(running, store.evaluations(job.id), None, job.updated_at + timedelta(minutes=5))
    assert "no sign of life for 5 min" in text


def test_before_the_first_trial_there_is_little_to_say(store, play):
    job = play(store)
    queued = replace(job, status="queued", finished_at=None)
    assert watch.line(queued, (), None, job.updated_at) == f"job {job.id} queued · no trial has ended"


def test_watching_ends_with_the_search_and_sees_what_it_expects(store, play):
    job = play(store)
    assert watch._expected(store, job) >= len(store.evaluations(job.id)) - 1
    store.set_status(job.id, "running")
    told = io.StringIO()
    ended = []
    thread = threading.Thread(
        target=lambda: ended.append(watch.follow(store, job.id, Console(file=told, width=300), 0.05))
    )
    thread.start()
    store.set_status(job.id, "finished")
    thread.join(timeout=20)
    assert ended[0].status == "finished"
    assert told.getvalue().splitlines()[-1].startswith(f"job {job.id} finished")
    with pytest.raises(NotInStore):
        watch.follow(store, 99, Console(file=told))
