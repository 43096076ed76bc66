"""search.progress: a line per trial that says what was tried and what came out."""

import io

import pytest
from rich.console import Console

from benchmarks.jobs import new_job
from samplers.schedule import Schedule
from search.progress import TerminalWatcher


def shown(store, searched, **tried):
    """The lines of a search of one trial."""
    job = store.create_job(new_job(spec={"search": {"parameters": searched}}))
    trial = store.start_evaluation(job.id, 0, "eta", Schedule.linear(8, 0.002, 0.99), **tried)
    console = Console(file=io.StringIO(), width=200)
    with TerminalWatcher(job, console) as watcher:
        watcher.started(trial, 1000, 12)
        store.report_rung(trial.id, images=1000, distance=5.25, network_evaluations=8000, seconds=1.0)
        watcher.ended(store.finish_evaluation(trial.id))
    return console.file.getvalue().splitlines()


def test_a_trial_is_a_line_below_its_header(store):
    job, header, row = shown(store, {})
    assert job.startswith("job 1: m on d, ddpm, NFE 8, 1,000 images a trial; distance: Fréchet distance")
    assert header.split()[:6] == ["trial", "phase", "mean", "λ", "k", "images"]
    assert row.split()[:6] == ["0", "eta", "0.997", "0.002", "1,000", "5.2500"]


@pytest.mark.parametrize(("tried", "cell"), [({"parameters": {"eta": 0.25}}, "0.25"), ({}, "–")])
def test_numbers_of_the_solver_that_are_searched_have_a_column(store, tried, cell):
    _, header, row = shown(store, {"eta": [0, 1]}, **tried)
    assert header.split()[4:7] == ["k", "eta", "images"]
    assert row.split()[3:5] == ["0.002", cell]
    assert header.index("images") == row.index("1,000") + len("1,000") - len("images")


def test_a_trial_that_failed_says_why(store):
    job = store.create_job(new_job())
    trial = store.start_evaluation(job.id, 0, "coarse", Schedule.uniform(8, 1.1))
    console = Console(file=io.StringIO(), width=200)
    with TerminalWatcher(job, console) as watcher:
        watcher.ended(store.fail_evaluation(trial.id, "images that are not finite"))
    assert "failed: images that are not finite" in console.file.getvalue()
