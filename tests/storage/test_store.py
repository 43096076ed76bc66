"""The contract of the store, run on every database that it supports."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from threading import Barrier
from typing import Any

import optuna
import pytest
from sqlalchemy import Engine, create_engine, event, inspect, text, update
from sqlalchemy.exc import IntegrityError, OperationalError

from benchmarks.servers import PostgreSQL, postgresql
from samplers.errors import InputError, LamtuneError
from samplers.schedule import Schedule
from storage import (
    CONFIRM,
    Best,
    ConnectionLost,
    Evaluation,
    Evaluator,
    Job,
    NewJob,
    NotInStore,
    Store,
    TakenOver,
    open_store,
)
from storage.connection import make_engine, parse
from storage.tables import JobRow

ROOT = Path(__file__).parents[2]
IMAGES = 1000
NFE = 4


def evaluator(fingerprint: str = "e1") -> Evaluator:
    details = {"dtype": "float64", "resize": None}
    return Evaluator(fingerprint=fingerprint, features="digits", dimension=8, reference="r1", details=details)


def new_job(study_name: str, **changes: Any) -> NewJob:
    fields: dict[str, Any] = {
        "study_name": study_name,
        "model": "adm",
        "model_fingerprint": "w1",
        "dataset": "cifar10",
        "solver": "ddpm",
        "sampling": {"variance": "learned_range", "clip": True, "seeds": [1, 2]},
        "nfe": NFE,
        "strategy": "paper",
        "images": IMAGES,
        "seed": 7,
        "spec": {"model": {"name": "adm", "λ": 1.017}},
        "evaluator": evaluator(),
    }
    return NewJob(**(fields | changes))


def evaluated(
    store: Store, job: Job, number: int, schedule: float | Schedule, distance: float, images: int = IMAGES
) -> Evaluation:
    """A complete evaluation of a uniform b or of a schedule, of 0.5 s per image."""
    if isinstance(schedule, float):
        schedule = Schedule.uniform(job.nfe, schedule)
    started = store.start_evaluation(job.id, number, "coarse", schedule)
    cost = images * job.nfe
    store.report_rung(
        started.id, images=images, distance=distance, network_evaluations=cost, seconds=images / 2
    )
    return store.finish_evaluation(started.id)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with open_store(url) as opened:
        yield opened


@pytest.fixture
def execute(url: str) -> Iterator[Callable[[str], None]]:
    """Run SQL behind the store's back."""
    engine = create_engine(parse(url))

    def run(statement: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(statement))

    yield run
    engine.dispose()


class TestJobs:
    def test_a_new_job_is_queued_and_comes_back_as_it_was_given(self, store: Store) -> None:
        before = datetime.now(UTC)
        new = new_job("s")
        made = store.create_job(new)
        assert {field.name: getattr(made, field.name) for field in dataclasses.fields(NewJob)} == {
            field.name: getattr(new, field.name) for field in dataclasses.fields(NewJob)
        }
        assert (made.status, made.error, made.finished_at) == ("queued", None, None)
        assert before <= made.created_at == made.updated_at <= datetime.now(UTC)
        again = store.job(made.id)
        assert again == made == store.find_job("s")
        assert again.created_at.utcoffset() == timedelta(0)

    def test_the_largest_seed_survives(self, store: Store) -> None:
        assert store.job(store.create_job(new_job("s", seed=2**63 - 1)).id).seed == 2**63 - 1

    def test_a_taken_study_name_is_refused_and_names_the_job(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        with pytest.raises(InputError, match=f"study 's' already, as job {job.id}"):
            store.create_job(new_job("s"))

    def test_a_cancelled_job_is_held_until_its_process_has_said_so(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        assert store.claim(job.id, stale_after=60)
        asked = store.cancel(job.id, stale_after=60)
        assert (asked.status, asked.finished_at) == ("cancelled", None)
        assert store.heartbeat(job.id) == "cancelled"
        assert not store.claim(job.id, stale_after=60)
        assert store.claim(job.id, stale_after=-1)  # its process is gone
        store.set_status(job.id, "cancelled")
        assert store.claim(job.id, stale_after=60)

    def test_a_job_without_a_process_is_cancelled_at_once_and_one_that_is_over_cannot_be(
        self, store: Store
    ) -> None:
        queued, lost = store.create_job(new_job("s")), store.create_job(new_job("t"))
        assert store.claim(lost.id, stale_after=60)
        for job in (queued, lost):
            done = store.cancel(job.id, stale_after=-1)
            assert done.status == "cancelled"
            assert done.finished_at is not None
            with pytest.raises(LamtuneError, match=f"job {job.id} is cancelled already"):
                store.cancel(job.id, stale_after=60)
        store.set_status(queued.id, "finished")
        with pytest.raises(LamtuneError, match="is finished already"):
            store.cancel(queued.id, stale_after=60)
        assert store.job(queued.id).status == "finished"

    def test_what_is_not_there_is_not_in_the_store(self, store: Store) -> None:
        assert store.find_job("s") is None
        questions: list[Callable[[], object]] = [
            lambda: store.job(1),
            lambda: store.evaluations(1),
            lambda: store.set_status(1, "failed"),
            lambda: store.heartbeat(1),
            lambda: store.claim(1, stale_after=1),
            lambda: store.start_evaluation(1, 0, "coarse", Schedule.uniform(NFE, 1.0)),
            lambda: store.finish_evaluation(1),
        ]
        for question in questions:
            with pytest.raises(NotInStore, match="1") as caught:
                question()
            assert caught.value.exit_code == 1

    def test_a_status_sets_and_clears_the_end_and_the_error(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        failed = store.set_status(job.id, "failed", "out of memory")
        assert (failed.status, failed.error) == ("failed", "out of memory")
        assert failed.finished_at == failed.updated_at >= job.updated_at
        running = store.set_status(job.id, "running")
        assert (running.status, running.error, running.finished_at) == ("running", None, None)
        for status in ("finished", "cancelled"):
            assert store.set_status(job.id, status).finished_at is not None
        assert store.job(job.id).created_at == job.created_at

    def test_the_database_refuses_an_unknown_status(
        self, store: Store, execute: Callable[[str], None]
    ) -> None:
        store.create_job(new_job("s"))
        with pytest.raises(IntegrityError):
            execute("UPDATE lamtune_jobs SET status = 'lost'")

    def test_the_newest_jobs_come_first_page_by_page(self, store: Store) -> None:
        ids = [store.create_job(new_job(f"s{i}")).id for i in range(5)]
        first = store.jobs(limit=2)
        second = store.jobs(limit=2, before_id=first[-1].id)
        third = store.jobs(limit=2, before_id=second[-1].id)
        assert [job.id for page in (first, second, third) for job in page] == ids[::-1]
        assert store.jobs(before_id=ids[0]) == ()

    def test_jobs_are_filtered_by_model_dataset_and_status(self, store: Store) -> None:
        for model in ("a", "b"):
            for dataset in ("x", "y"):
                store.create_job(new_job(model + dataset, model=model, dataset=dataset))
        store.set_status(store.jobs(model="a", dataset="x")[0].id, "running")
        assert [job.study_name for job in store.jobs(model="a")] == ["ay", "ax"]
        assert [job.study_name for job in store.jobs(dataset="y")] == ["by", "ay"]
        assert [job.study_name for job in store.jobs(status="running")] == ["ax"]
        assert store.jobs(model="b", status="running") == ()

    def test_a_running_job_is_held_until_its_signs_of_life_stop(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        assert store.claim(job.id, stale_after=60)
        assert store.job(job.id).status == "running"
        assert not store.claim(job.id, stale_after=60)
        assert store.claim(job.id, stale_after=-1)

    def test_a_sign_of_life_from_the_future_is_none(self, store: Store, url: str) -> None:
        job = store.create_job(new_job("s"))
        assert store.claim(job.id, stale_after=60)
        engine = make_engine(parse(url))
        for ahead, free in ((30, False), (3600, True)):
            when = datetime.now(UTC) + timedelta(seconds=ahead)
            with engine.begin() as connection:
                connection.execute(update(JobRow).values(updated_at=when))
            assert store.claim(job.id, stale_after=60) == free
        with engine.begin() as connection:
            connection.execute(update(JobRow).values(updated_at=when))
        assert store.cancel(job.id, stale_after=60).finished_at is not None  # nobody is waited for
        engine.dispose()

    def test_hosts_whose_clocks_disagree_go_by_the_servers(
        self, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Ahead(datetime):
            """The clock of a host that is an hour ahead."""

            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
                return datetime.now(tz) + timedelta(hours=1)

        with open_store(postgresql_url) as right, open_store(postgresql_url) as wrong:
            job = right.create_job(new_job("s"))
            assert right.claim(job.id, stale_after=20)
            trial = right.start_evaluation(job.id, 0, "coarse", Schedule.uniform(NFE, 1.01))
            monkeypatch.setattr("storage.store.datetime", Ahead)
            assert not wrong.claim(job.id, stale_after=20)
            assert abs(wrong.now() - datetime.now(UTC)) < timedelta(minutes=1)
            monkeypatch.undo()
            assert right.fail_evaluation(trial.id, "late").finished_at is not None  # it is not fenced out

    def test_who_lost_a_job_to_another_process_can_no_longer_write_to_it(
        self, store: Store, url: str
    ) -> None:
        job = store.create_job(new_job("s"))
        assert store.claim(job.id, stale_after=60)
        late = store.start_evaluation(job.id, 0, "coarse", Schedule.uniform(NFE, 1.01))
        with open_store(url) as other:
            assert other.claim(job.id, stale_after=0)
            other.fail_evaluation(late.id, "interrupted")
            running = other.start_evaluation(job.id, 1, "coarse", Schedule.uniform(NFE, 1.01))
            before = (store.job(job.id), store.evaluations(job.id))
            schedule = Schedule.uniform(NFE, 1.02)
            rung = {"images": 500, "distance": 5.5, "network_evaluations": 2000, "seconds": 2.5}
            for write in (
                lambda: store.heartbeat(job.id),
                lambda: store.set_status(job.id, "failed", "late"),
                lambda: store.start_evaluation(job.id, 2, "coarse", schedule),
                lambda: store.report_rung(running.id, **rung),
                lambda: store.fail_evaluation(running.id, "late"),
            ):
                with pytest.raises(TakenOver, match="was taken over by another process"):
                    write()
            with pytest.raises(LamtuneError, match="is failed and cannot change any more"):
                store.report_rung(late.id, **rung)
            assert (store.job(job.id), store.evaluations(job.id)) == before
            other.report_rung(running.id, **rung)

    def test_a_job_that_is_over_can_be_claimed_again(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        store.set_status(job.id, "failed", "lost a GPU")
        assert store.claim(job.id, stale_after=60)
        claimed = store.job(job.id)
        assert (claimed.status, claimed.error, claimed.finished_at) == ("running", None, None)

    def test_a_heartbeat_is_a_sign_of_life_and_tells_of_cancelling(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        store.claim(job.id, stale_after=60)
        before = store.job(job.id).updated_at
        assert store.heartbeat(job.id) == "running"
        assert store.job(job.id).updated_at > before
        store.set_status(job.id, "cancelled")
        assert store.heartbeat(job.id) == "cancelled"


class TestEvaluations:
    def test_an_evaluation_goes_from_rung_to_rung_to_complete(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        schedule = Schedule.linear(NFE, 0.0008, 1.0034)
        started = store.start_evaluation(job.id, 3, "k", schedule)
        assert (started.number, started.phase, started.k, started.b) == (3, "k", 0.0008, 1.0034)
        assert (started.lambdas, started.mean) == (schedule.lambdas, schedule.mean)
        assert (started.state, started.images, started.distance, started.rungs) == ("running", 0, None, {})
        assert (started.network_evaluations, started.seconds, started.finished_at) == (0, 0.0, None)
        store.report_rung(started.id, images=250, distance=9.5, network_evaluations=1000, seconds=1.5)
        store.report_rung(started.id, images=1000, distance=8.1, network_evaluations=4000, seconds=6.25)
        done = store.finish_evaluation(started.id)
        assert (done.state, done.images, done.distance) == ("complete", 1000, 8.1)
        assert done.rungs == {250: 9.5, 1000: 8.1}
        assert list(done.rungs) == [250, 1000]
        assert (done.network_evaluations, done.seconds) == (4000, 6.25)
        assert (
            done.started_at
            == started.started_at
            <= (done.finished_at or started.started_at)
            <= datetime.now(UTC)
        )
        assert done.finished_at is not None
        assert store.evaluations(job.id) == (done,)

    def test_a_free_list_has_neither_k_nor_b_and_keeps_every_digit(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        lambdas = (1 / 3, 1.0 + 2**-52, math.pi, 1e-300)
        store.start_evaluation(job.id, 0, "free", Schedule.free(lambdas))
        (found,) = store.evaluations(job.id)
        assert (found.k, found.b, found.lambdas) == (None, None, lambdas)

    @pytest.mark.parametrize("distance", [math.nan, math.inf, -math.inf])
    def test_a_distance_that_is_not_finite_is_refused(self, store: Store, distance: float) -> None:
        job = store.create_job(new_job("s"))
        started = store.start_evaluation(job.id, 0, "coarse", Schedule.uniform(NFE, 1.0))
        with pytest.raises(LamtuneError, match=f"1000 images is {distance}"):
            store.report_rung(started.id, images=1000, distance=distance, network_evaluations=1, seconds=1)
        assert store.evaluations(job.id) == (started,)

    @pytest.mark.parametrize("distance", ["NULL", "'NaN'", "9e999", "-9e999"])
    def test_the_database_itself_keeps_complete_distances_finite(
        self, store: Store, url: str, execute: Callable[[str], None], distance: str
    ) -> None:
        if url.startswith("sqlite") and distance == "'NaN'":
            distance = "9e999 - 9e999"  # SQLite's only way to a NaN, which it keeps as NULL
        elif distance.endswith("9e999") and not url.startswith("sqlite"):
            distance = f"'{distance.replace('9e999', 'Infinity')}'"
        evaluated(store, store.create_job(new_job("s")), 0, 1.0, 5.0)
        with pytest.raises(IntegrityError):
            execute(f"UPDATE lamtune_evaluations SET distance = {distance}")

    def test_the_database_itself_refuses_an_evaluation_of_no_job(self, store: Store, url: str) -> None:
        evaluated(store, store.create_job(new_job("s")), 0, 1.0, 5.0)
        engine = make_engine(parse(url))
        with pytest.raises(IntegrityError), engine.begin() as connection:
            connection.execute(text("DELETE FROM lamtune_jobs"))
        engine.dispose()

    def test_without_a_distance_an_evaluation_is_not_complete_but_may_be_pruned(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        started = store.start_evaluation(job.id, 0, "coarse", Schedule.uniform(NFE, 1.0))
        with pytest.raises(LamtuneError, match="no distance"):
            store.finish_evaluation(started.id)
        assert store.finish_evaluation(started.id, pruned=True).state == "pruned"

    def test_rungs_only_ascend(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        started = store.start_evaluation(job.id, 0, "coarse", Schedule.uniform(NFE, 1.0))
        rung = store.report_rung(started.id, images=500, distance=5.0, network_evaluations=1, seconds=1)
        for images in (500, 250, 0):
            with pytest.raises(LamtuneError, match=f"past {images} images, at 500"):
                store.report_rung(started.id, images=images, distance=4.0, network_evaluations=2, seconds=2)
        assert store.evaluations(job.id) == (rung,)

    def test_a_failed_evaluation_keeps_its_rungs_costs_and_error(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        started = store.start_evaluation(job.id, 0, "coarse", Schedule.uniform(NFE, 1.0))
        store.report_rung(started.id, images=500, distance=5.0, network_evaluations=2000, seconds=2.5)
        failed = store.fail_evaluation(started.id, "the worker died")
        assert (failed.state, failed.error, failed.rungs) == ("failed", "the worker died", {500: 5.0})
        assert (failed.network_evaluations, failed.seconds) == (2000, 2.5)
        assert failed.finished_at is not None

    def test_what_is_over_does_not_change(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        done = evaluated(store, job, 4, 1.0, 5.0)
        changes: list[Callable[[], object]] = [
            lambda: store.report_rung(
                done.id, images=2000, distance=1.0, network_evaluations=9000, seconds=9000
            ),
            lambda: store.finish_evaluation(done.id, pruned=True),
            lambda: store.fail_evaluation(done.id, "late"),
        ]
        for change in changes:
            with pytest.raises(LamtuneError, match=f"evaluation 4 of job {job.id} is complete"):
                change()
        assert store.evaluations(job.id) == (done,)

    def test_a_number_is_taken_once_in_a_job(self, store: Store) -> None:
        first, second = (store.create_job(new_job(name)) for name in ("s", "t"))
        store.start_evaluation(first.id, 0, "coarse", Schedule.uniform(NFE, 1.0))
        store.start_evaluation(second.id, 0, "coarse", Schedule.uniform(NFE, 1.0))
        with pytest.raises(LamtuneError, match=r"(?i)unique"):
            store.start_evaluation(first.id, 0, "coarse", Schedule.uniform(NFE, 1.1))
        assert len(store.evaluations(first.id)) == 1

    def test_evaluations_come_by_number_and_of_their_job_only(self, store: Store) -> None:
        job, other = (store.create_job(new_job(name)) for name in ("s", "t"))
        for number in (2, 0, 1):
            evaluated(store, job, number, 1.0, 5.0)
        evaluated(store, other, 3, 1.0, 5.0)
        assert [one.number for one in store.evaluations(job.id)] == [0, 1, 2]

    def test_evaluations_come_page_by_page(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        for number in range(5):
            evaluated(store, job, number, 1.0, 5.0)
        whole = store.evaluations(job.id)
        pages = [store.evaluations(job.id, limit=2)]
        while pages[-1]:
            pages.append(store.evaluations(job.id, limit=2, after_number=pages[-1][-1].number))
        assert [len(page) for page in pages] == [2, 2, 1, 0]
        assert tuple(one for page in pages for one in page) == whole

    def test_what_was_measured_under_a_key_is_known_to_every_job_at_each_of_its_rungs(
        self, store: Store
    ) -> None:
        first, second = (store.create_job(new_job(name)) for name in ("s", "t"))
        schedule = Schedule.uniform(NFE, 1.01)
        running = store.start_evaluation(first.id, 0, "b", schedule, key="k")
        for images in (500, IMAGES):
            store.report_rung(
                running.id, images=images, distance=5.0, network_evaluations=images, seconds=1.0
            )
        assert store.known("k", 500) is None  # it may still fail
        done = store.finish_evaluation(running.id)
        assert store.known("k", 500) == store.known("k", IMAGES) == done
        assert store.known("k", 250) is None  # more images than that, but no rung there
        assert store.known("k", 2 * IMAGES) is None
        assert store.known("other", 500) is None
        copy = store.start_evaluation(
            second.id, 0, "b", schedule, key="k", reused=done.id, seed=5, parameters={"eta": 0.5}
        )
        assert (copy.reused, copy.seed, copy.parameters, copy.key) == (done.id, 5, {"eta": 0.5}, "k")

    def test_every_write_to_an_evaluation_is_a_sign_of_life_of_its_job(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        seen = [job.updated_at]
        started = store.start_evaluation(job.id, 0, "coarse", Schedule.uniform(NFE, 1.0))
        seen.append(store.job(job.id).updated_at)
        store.report_rung(started.id, images=500, distance=5.0, network_evaluations=2000, seconds=2.5)
        seen.append(store.job(job.id).updated_at)
        store.finish_evaluation(started.id)
        seen.append(store.job(job.id).updated_at)
        assert seen == sorted(set(seen))


class TestBest:
    def test_it_is_the_lowest_distance_with_its_baseline_and_what_the_job_cost(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        evaluated(store, job, 0, 1.0, 10.0)
        evaluated(store, job, 1, Schedule.linear(NFE, 0.001, 1.01), 7.5)
        evaluated(store, job, 2, 1.02, 8.0)
        pruned = store.start_evaluation(job.id, 3, "fine", Schedule.uniform(NFE, 1.03))
        store.report_rung(pruned.id, images=500, distance=6.0, network_evaluations=2000, seconds=250.25)
        store.finish_evaluation(pruned.id, pruned=True)
        store.set_status(job.id, "finished")
        assert store.best("adm", "cifar10", NFE) == Best(
            model="adm",
            model_fingerprint="w1",
            dataset="cifar10",
            solver="ddpm",
            sampling=job.sampling,
            nfe=NFE,
            k=0.001,
            b=1.01,
            lambdas=Schedule.linear(NFE, 0.001, 1.01).lambdas,
            parameters={},
            distance=7.5,
            standard_error=None,
            baseline_distance=10.0,
            gain=None,
            gain_error=None,
            significant=None,
            confirmed=False,
            images=IMAGES,
            seed=7,
            metrics={},
            objective="Fréchet distance",
            evaluator="e1",
            job_id=job.id,
            number=1,
            status="finished",
            strategy="paper",
            trials=4,
            network_evaluations=3 * IMAGES * NFE + 2000,
            seconds=3 * IMAGES / 2 + 250.25,
            confirm_network_evaluations=0,
            confirm_seconds=0.0,
        )

    def test_a_diagnosis_is_kept_with_the_newest_job_of_its_network_and_solver(self, store: Store) -> None:
        first = store.create_job(new_job("a"))
        assert store.diagnosis(first.id) is None
        newest = store.create_job(new_job("b"))
        store.create_job(new_job("other weights", model_fingerprint="w2"))
        store.create_job(new_job("other solver", sampling={"variance": "small"}))
        of = {"model": "adm", "model_fingerprint": "w1", "dataset": "cifar10"}
        sampling = {**newest.sampling, "precision": "float16"}
        for content in ({"norms": [1.5, 0.25], "name": "λ = 1"}, {"norms": []}):
            assert store.add_diagnosis(content, **of, sampling=sampling) == newest
            assert store.diagnosis(newest.id) == content
        assert store.diagnosis(first.id) is None
        assert store.add_diagnosis({}, **of, sampling={**sampling, "clip": False}) is None

    def test_what_was_confirmed_on_fresh_random_numbers_ranks_before_what_the_search_found_by_luck(
        self, store: Store
    ) -> None:
        job = store.create_job(new_job("s", confirm=2 * IMAGES))
        evaluated(store, job, 0, 1.0, 10.0)
        evaluated(store, job, 1, 1.02, 7.0)
        assert not store.best("adm", "cifar10", NFE).confirmed

        def confirm(number: int, b: float, distance: float, gain: float, images: int = 2 * IMAGES) -> None:
            schedule = Schedule.uniform(NFE, b)
            one = store.start_evaluation(job.id, number, CONFIRM, schedule, seed=99, parameters={})
            store.report_rung(
                one.id,
                images=images,
                distance=distance,
                network_evaluations=images * NFE,
                seconds=1.0,
                standard_error=0.5,
                gain=gain,
                gain_error=0.25,
                influence=b"\0\0\x80?",
                metrics={"kid": 0.5},
            )
            store.finish_evaluation(one.id)

        confirm(2, 1.0, 10.5, 0.0)
        confirm(3, 1.02, 8.0, 2.5)
        confirm(4, 1.03, 1.0, 9.5, images=IMAGES)  # too few to rank
        best = store.best("adm", "cifar10", NFE)
        assert (best.confirmed, best.b, best.distance, best.baseline_distance) == (True, 1.02, 8.0, 10.5)
        assert (best.gain, best.gain_error, best.standard_error) == (2.5, 0.25, 0.5)
        assert (best.seed, best.images, best.significant) == (99, 2 * IMAGES, True)
        assert best.metrics == {"kid": 0.5}
        assert (best.trials, best.network_evaluations) == (2, 2 * IMAGES * NFE)
        assert (best.confirm_network_evaluations, best.confirm_seconds) == (5 * IMAGES * NFE, 3.0)
        assert store.evaluations(job.id)[3].influence == b"\0\0\x80?"

    def test_a_gain_within_two_standard_errors_is_not_significant(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        one = store.start_evaluation(job.id, 0, "coarse", Schedule.uniform(NFE, 1.01))
        store.report_rung(
            one.id,
            images=IMAGES,
            distance=5.0,
            network_evaluations=1,
            seconds=1.0,
            gain=1.0,
            gain_error=0.6,
        )
        store.finish_evaluation(one.id)
        assert store.best("adm", "cifar10", NFE).significant is False

    def test_running_failed_pruned_and_partial_evaluations_do_not_rank(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        evaluated(store, job, 0, 1.01, 10.0)
        evaluated(store, job, 1, 1.02, 1.0, images=IMAGES - 1)
        evaluated(store, job, 2, 1.03, 1.0, images=IMAGES + 1)
        for number in (3, 4, 5):
            started = store.start_evaluation(job.id, number, "fine", Schedule.uniform(NFE, 1.04))
            store.report_rung(started.id, images=IMAGES, distance=1.0, network_evaluations=1, seconds=1)
            if number == 4:
                store.fail_evaluation(started.id, "lost")
            if number == 5:
                store.finish_evaluation(started.id, pruned=True)
        best = store.best("adm", "cifar10", NFE)
        assert (best.b, best.distance, best.trials) == (1.01, 10.0, 6)

    def test_of_equal_distances_the_first_evaluated_wins(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        for number, b in enumerate((1.0, 1.02, 1.01)):
            evaluated(store, job, number, b, 5.0)
        later = store.create_job(new_job("t"))
        evaluated(store, later, 0, 0.9, 5.0)
        best = store.best("adm", "cifar10", NFE)
        assert (best.job_id, best.b, best.baseline_distance) == (job.id, 1.0, 5.0)

    @pytest.mark.parametrize(
        "changes",
        [{"evaluator": evaluator("e2")}, {"images": 500}, {"seed": 8}, {"model_fingerprint": "w2"}],
        ids=lambda changes: next(iter(changes)),
    )
    def test_what_cannot_be_compared_is_not_ranked_together_and_the_newest_counts(
        self, store: Store, changes: dict[str, Any]
    ) -> None:
        old = store.create_job(new_job("s"))
        evaluated(store, old, 0, 1.01, 1.0)
        new = store.create_job(new_job("t", **changes))
        assert store.best("adm", "cifar10", NFE).job_id == old.id  # the new one has nothing to rank yet
        evaluated(store, new, 0, 1.02, 3.0, images=new.images)
        evaluated(store, new, 1, 1.03, 2.0, images=new.images)
        assert store.best("adm", "cifar10", NFE).b == 1.03
        back = store.create_job(new_job("u"))
        evaluated(store, back, 0, 1.04, 9.0)
        best = store.best("adm", "cifar10", NFE)
        assert (best.job_id, best.b, best.distance) == (old.id, 1.01, 1.0)

    def test_the_baseline_is_that_of_the_winning_job(self, store: Store) -> None:
        first, second = (store.create_job(new_job(name)) for name in ("s", "t"))
        evaluated(store, first, 0, 1.0, 10.0)
        evaluated(store, second, 0, 1.01, 4.0)
        assert store.best("adm", "cifar10", NFE).baseline_distance is None
        evaluated(store, second, 1, 1.0, 11.0, images=IMAGES // 2)
        assert store.best("adm", "cifar10", NFE).baseline_distance is None
        evaluated(store, second, 2, Schedule.free([1.0] * NFE), 12.0)
        assert store.best("adm", "cifar10", NFE).baseline_distance == 12.0

    def test_solvers_compete_unless_one_is_asked_for(self, store: Store) -> None:
        for solver, distance in (("ddpm", 5.0), ("ddim", 3.0)):
            evaluated(store, store.create_job(new_job(solver, solver=solver)), 0, 1.01, distance)
        assert store.best("adm", "cifar10", NFE).solver == "ddim"
        assert store.best("adm", "cifar10", NFE, solver="ddpm").distance == 5.0

    def test_other_models_datasets_and_nfe_do_not_answer_but_are_named(self, store: Store) -> None:
        for nfe in (20, 50):
            evaluated(store, store.create_job(new_job(f"a{nfe}", nfe=nfe)), 0, 1.01, 5.0)
        evaluated(store, store.create_job(new_job("b", model="edm", dataset="ffhq")), 0, 1.01, 5.0)
        store.create_job(new_job("c", model="adm-without-results"))
        for question in [("adm", "cifar10", 10), ("adm", "cifar", 20), ("admm", "cifar10", 20)]:
            with pytest.raises(NotInStore) as caught:
                store.best(*question)
            lines = str(caught.value).splitlines()
            assert str(question[2]) in lines[0]
            assert lines[1:] == [
                "  model adm, dataset cifar10, solver ddpm, NFE 20, 50",
                f"  model edm, dataset ffhq, solver ddpm, NFE {NFE}",
            ]
        with pytest.raises(NotInStore, match="solver heun, NFE 20"):
            store.best("adm", "cifar10", 20, solver="heun")

    def test_only_the_nearest_of_many_are_named(self, store: Store) -> None:
        for i in range(10):
            evaluated(store, store.create_job(new_job(f"s{i}", model=f"model{i}")), 0, 1.01, 5.0)
        with pytest.raises(NotInStore, match="and 2 more") as caught:
            store.best("model7x", "cifar10", NFE)
        assert "model7," in str(caught.value).splitlines()[1]

    def test_an_empty_store_says_so(self, store: Store) -> None:
        with pytest.raises(NotInStore, match="nor for any other"):
            store.best("adm", "cifar10", NFE)


class TestOptuna:
    def test_a_study_and_our_tables_live_in_one_database_ours_first(self, store: Store, url: str) -> None:
        job = store.create_job(new_job("s"))
        study = optuna.create_study(study_name="s", storage=store.optuna_storage())
        study.enqueue_trial({"b": 1.01})
        trial = study.ask({"b": optuna.distributions.FloatDistribution(0.9, 1.1)})
        study.tell(trial, 3.5)
        evaluated(store, job, trial.number, trial.params["b"], 3.5)
        with open_store(url) as again:
            found = optuna.load_study(study_name="s", storage=again.optuna_storage())
            assert (found.best_params, found.best_value) == ({"b": 1.01}, 3.5)
            assert again.best("adm", "cifar10", NFE).number == found.best_trial.number

    def test_a_study_and_our_tables_live_in_one_database_optunas_first(self, url: str) -> None:
        plain = parse(url).render_as_string(hide_password=False)
        optuna.create_study(study_name="s", storage=plain)
        engine = create_engine(parse(url))
        before = set(inspect(engine).get_table_names())
        with open_store(url) as store:
            store.create_job(new_job("s"))
            assert optuna.load_study(study_name="s", storage=store.optuna_storage()).trials == []
        ours = set(inspect(engine).get_table_names()) - before
        assert all(name.startswith("lamtune_") for name in ours)
        assert "alembic_version" in before
        engine.dispose()

    def test_a_store_has_one_optuna_storage_which_outlives_it(self, url: str) -> None:
        with open_store(url) as store, ThreadPoolExecutor(4) as pool:
            first, *others = pool.map(lambda _: store.optuna_storage(), range(4))
        assert all(other is first for other in others)
        assert optuna.create_study(study_name="s", storage=first).trials == []
        first.engine.dispose()

    def test_many_may_make_optunas_tables_at_once(self, url: str) -> None:
        barrier = Barrier(4)

        def made(i: int) -> str:
            with open_store(url) as store:
                barrier.wait()
                return optuna.create_study(study_name=f"s{i}", storage=store.optuna_storage()).study_name

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(made, range(4))) == ["s0", "s1", "s2", "s3"]

    def test_tables_of_another_optuna_are_an_input_error(
        self, store: Store, url: str, execute: Callable[[str], None]
    ) -> None:
        store.optuna_storage()
        execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
        with open_store(url) as another, pytest.raises(InputError, match="updating optuna"):
            another.optuna_storage()


class TestSeveralAtOnce:
    def test_writers_of_several_jobs_lose_nothing(self, url: str) -> None:
        """Each with a store of its own, as processes have, and Optuna writing in between."""
        writers, trials = 6, 5
        barrier = Barrier(writers)
        open_store(url).close()

        def write(i: int) -> int:
            with open_store(url) as store:
                barrier.wait()  # all add the same evaluator at once
                job = store.create_job(new_job(f"s{i}"))
                study = optuna.create_study(study_name=f"s{i}", storage=store.optuna_storage())
                for number in range(trials):
                    trial = study.ask()
                    assert trial.number == number
                    evaluated(store, job, number, 1.0 + 0.01 * number, 10.0 * i + number)
                    study.tell(trial, 10.0 * i + number)
                store.set_status(job.id, "finished")
                return job.id

        with ThreadPoolExecutor(writers) as pool:
            ids = list(pool.map(write, range(writers)))
        assert len(set(ids)) == writers
        engine = create_engine(parse(url))
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM lamtune_evaluators")).scalar_one() == 1
        engine.dispose()
        with open_store(url) as store:
            assert sorted(job.id for job in store.jobs(status="finished")) == sorted(ids)
            for i, job_id in enumerate(ids):
                assert [one.distance for one in store.evaluations(job_id)] == [
                    10.0 * i + n for n in range(trials)
                ]
            assert store.best("adm", "cifar10", NFE).job_id == ids[0]

    def test_of_many_who_claim_a_job_one_gets_it(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        barrier = Barrier(6)

        def claim(_: int) -> bool:
            barrier.wait()
            return store.claim(job.id, stale_after=60)

        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(claim, range(6))) == 1

    def test_of_two_who_close_an_evaluation_at_once_one_does(self, store: Store) -> None:
        job = store.create_job(new_job("s"))
        barrier = Barrier(2)

        def close(evaluation_id: int) -> bool:
            barrier.wait()
            try:
                store.fail_evaluation(evaluation_id, "lost")
            except LamtuneError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            for number in range(10):
                started = store.start_evaluation(job.id, number, "coarse", Schedule.uniform(NFE, 1.0))
                assert sum(pool.map(close, [started.id] * 2)) == 1

    def test_a_killed_process_leaves_all_that_it_reported(self, store: Store, url: str) -> None:
        job = store.create_job(new_job("s"))
        code = """if True:
            import os, signal, sys
            from samplers.schedule import Schedule
            from storage import open_store
            store, job = open_store(sys.argv[1]), int(sys.argv[2])
            assert store.claim(job, stale_after=60)
            one = store.start_evaluation(job, 0, "coarse", Schedule.uniform(4, 1.01))
            store.report_rung(one.id, images=500, distance=5.5, network_evaluations=2000, seconds=2.5)
            os.kill(os.getpid(), signal.SIGKILL)
        """
        done = subprocess.run([sys.executable, "-c", code, url, str(job.id)], cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
        (left,) = store.evaluations(job.id)
        assert (left.state, left.rungs, left.seconds) == ("running", {500: 5.5}, 2.5)
        assert not store.claim(job.id, stale_after=60)
        assert store.claim(job.id, stale_after=0)
        assert store.fail_evaluation(left.id, "interrupted").state == "failed"


def test_a_database_that_goes_away_is_a_lamtune_error_without_the_password(postgresql_url: str) -> None:
    with open_store(postgresql_url) as store:
        engine = create_engine(parse(postgresql_url))
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE lamtune_pictures"))
            connection.execute(text("DROP TABLE lamtune_evaluations"))
        engine.dispose()
        with pytest.raises(LamtuneError, match="does not exist") as caught:
            store.best("adm", "cifar10", NFE)
        assert not isinstance(caught.value, InputError)
        assert caught.value.__suppress_context__
        assert str(parse(postgresql_url).password) not in f"{caught.value} {caught.value.__context__}"


def test_a_database_that_is_restarted_amid_a_transaction_is_waited_for_and_the_loss_is_said() -> None:
    pytest.importorskip("psycopg")
    with postgresql() as server:
        url = server.url.render_as_string(hide_password=False)
        with open_store(url, patience=30) as store, open_store(url) as hasty:
            job = store.create_job(new_job("s"))
            study = optuna.create_study(study_name="s", storage=store.optuna_storage())
            with killing(server, store._readers), pytest.raises(ConnectionLost) as caught:
                store.set_status(job.id, "failed")
            assert str(server.url.password) not in f"{caught.value} {caught.value.__context__}"
            with pytest.raises(LamtuneError, match="refused"):
                hasty.job(job.id)
            with ThreadPoolExecutor(2) as threads:
                asked = threads.submit(store.job, job.id), threads.submit(study.ask)
                server.start()
                assert asked[0].result() == job
                trial = asked[1].result()
            optunas = study._storage._backend.engine  # type: ignore[attr-defined]
            with killing(server, optunas), pytest.raises(ConnectionLost), store.errors():
                study.ask()
            server.start()
            study.tell(trial, 1.0)


def test_a_process_that_is_asked_to_end_amid_a_statement_ends(postgresql_url: str) -> None:
    def leave(number: int, _: Any) -> None:
        sys.exit(number)

    def ask_to_end(delay: float, ended: threading.Event) -> None:
        while not ended.wait(delay):
            os.kill(os.getpid(), signal.SIGTERM)
            delay = 5.0  # again: what a handler raises while Python finalises an object is lost

    def read_on() -> None:
        while True:
            store.jobs()

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with open_store(postgresql_url) as store:
            for number in range(30):
                ended = threading.Event()
                asking = threading.Thread(target=ask_to_end, args=(0.02 + 0.001 * (number % 20), ended))
                asking.start()
                with pytest.raises(SystemExit):
                    read_on()
                ended.set()
                asking.join()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_fails_while_a_process_ends_is_an_error_of_its_own(sqlite_url: str) -> None:
    def fail() -> None:
        with store.errors():
            raise OperationalError("UPDATE", None, Exception("away"))

    with open_store(sqlite_url) as store:
        try:
            raise SystemExit(15)
        except SystemExit:
            with pytest.raises(LamtuneError, match="away"):
                fail()


@contextmanager
def killing(server: PostgreSQL, engine: Engine) -> Iterator[None]:
    """Kill the server after the next statement of an engine, amid its transaction."""

    def kill(*_: Any) -> None:
        event.remove(engine, "after_cursor_execute", kill)
        server.kill()

    event.listen(engine, "after_cursor_execute", kill)
    yield


def test_a_full_database_is_said_and_keeps_what_it_has(sqlite_url: str) -> None:
    with open_store(sqlite_url) as store:
        job = store.create_job(new_job("s"))
        store._readers.dispose()
        event.listen(store._readers, "connect", lambda c, _: c.execute("PRAGMA max_page_count = 1"))
        written: list[Evaluation] = []

        def write_on() -> None:
            for number in range(10_000):
                schedule = Schedule.uniform(NFE, 1.0)
                written.append(store.start_evaluation(job.id, number, "coarse", schedule))

        with pytest.raises(LamtuneError, match="full"):
            write_on()
        assert store.evaluations(job.id) == tuple(written)


def test_a_sqlite_store_lets_readers_in_while_one_writes(sqlite_url: str) -> None:
    with open_store(sqlite_url) as store:
        job = store.create_job(new_job("s"))
        engine = make_engine(parse(sqlite_url)).execution_options(write=True)
        with engine.begin():
            assert store.job(job.id) == job
        engine.dispose()
        assert Path(f"{parse(sqlite_url).database}-wal").exists() or os.name == "nt"
