"""Follows a running search from the store, from any machine that reaches it: a line that is kept up to date.

Knows nothing of the process that runs the search, which `progress` watches from inside.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime

from rich.console import Console
from rich.live import Live

from search.report import duration, error_bar, number, parameters_in_words
from storage import CONFIRM, STALE_S, Evaluation, Job, Store

EXPECTED = "expected_trials"
"""The attribute of a study that tells about how many trials it will take in all."""

_CONFIRMED = 2  # trials of the confirmation that run to their end: λ = 1 and the first finalist


def follow(store: Store, job_id: int, console: Console, interval: float = 2.0) -> Job:
    """Show a job until it is over; return it as it is then. Where the output is no terminal, a line for each change.

    interval: seconds between looks. NotInStore.
    """
    shown = None
    with Live("", console=console, auto_refresh=False, transient=True) as live:
        while True:
            job = store.job(job_id)
            text = line(job, store.evaluations(job_id), _expected(store, job), store.now())
            if console.is_terminal:
                live.update(text, refresh=True)
            elif text != shown:
                console.print(text, highlight=False, soft_wrap=True)
            shown = text
            if job.finished_at is not None:
                break
            time.sleep(interval)
    if console.is_terminal:
        console.print(shown, highlight=False, soft_wrap=True)
    return job


def _expected(store: Store, job: Job) -> int | None:
    """What the search has noted in its Optuna study; None before it began."""
    import optuna

    with suppress(KeyError):  # there is no study yet
        study = optuna.load_study(study_name=job.study_name, storage=store.optuna_storage())
        found = study.user_attrs.get(EXPECTED)
        return None if found is None else int(found)
    return None


def line(job: Job, tried: Sequence[Evaluation], expected: int | None, now: datetime) -> str:
    """How a search is: phase, trials, speed, the best so far and the time left.

    expected: trials in all, about, where the search has said so.
    """
    ended = [e for e in tried if e.state != "running"]
    running = [e for e in tried if e.state == "running"]
    parts = [f"job {job.id} {job.status}"]
    if job.finished_at is None and (now - job.updated_at).total_seconds() > STALE_S and tried:
        parts[0] += f", no sign of life for {duration((now - job.updated_at).total_seconds())}"
    if running:
        parts.append(f"{running[-1].phase}, trial {running[-1].number} at {running[-1].images:,} images")
    states = [("complete", "complete"), ("pruned", "ended early"), ("failed", "failed")]
    counts = [f"{n} {name}" for state, name in states if (n := sum(e.state == state for e in ended))]
    parts.append(", ".join(counts) or "no trial has ended")
    rate = speed(job, ended)
    if rate is not None:
        parts.append(f"{rate:,.0f} images/s")
    best = best_so_far(ended)
    if best is not None:
        k = "" if not best.k else f", k {number(round(best.k, 6))}"
        k += parameters_in_words(best.parameters)
        value = f"{best.distance:.4g} {error_bar(best.standard_error)}".rstrip()
        parts.append(f"best {value} at mean λ {number(round(best.mean, 6))}{k} ({best.images:,} images)")
    if job.finished_at is None and rate is not None and expected is not None:
        parts.append(f"about {duration(images_left(job, ended, expected) / rate)} left")
    return " · ".join(parts)


def speed(job: Job, ended: Sequence[Evaluation]) -> float | None:
    """Images a second over the trials that ended, without those that were known before; None where there are none."""
    computed = [e for e in ended if e.network_evaluations and e.finished_at is not None]
    seconds = sum(
        (e.finished_at - e.started_at).total_seconds() for e in computed if e.finished_at is not None
    )
    return sum(e.network_evaluations for e in computed) / job.nfe / seconds if seconds > 0 else None


def images_left(job: Job, ended: Sequence[Evaluation], expected: int) -> float:
    """About how many images are still to come: the trials of the search like those before, then the confirmation."""
    searched = [e.images for e in ended if e.phase != CONFIRM]
    confirmed = len(ended) - len(searched)
    finals = max(_CONFIRMED - confirmed, 0) if job.confirm else 0
    rest = max(expected - len(ended) - finals, 0) if not confirmed else 0
    usual = sum(searched) / len(searched) if searched else job.images
    return rest * usual + finals * job.confirm


def best_so_far(ended: Sequence[Evaluation]) -> Evaluation | None:
    """The lowest distance of the group that compares and got furthest: the confirmation, else most images."""
    known = [e for e in ended if e.distance is not None and e.state in ("complete", "pruned")]
    confirmed = [e for e in known if e.phase == CONFIRM and e.state == "complete"]
    group = confirmed or known
    most = max((e.images for e in group), default=0)
    return min((e for e in group if e.images == most), key=lambda e: e.distance or 0.0, default=None)
