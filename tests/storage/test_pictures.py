"""storage.pictures: Optuna's artifacts in the database."""

import io

import pytest
from optuna.artifacts.exceptions import ArtifactNotFound

from benchmarks.jobs import new_job
from samplers.errors import LamtuneError
from samplers.schedule import Schedule
from storage import NotInStore, Pictures, open_store


@pytest.fixture
def evaluated(url: str):
    """A store, its job and a running evaluation with one rung."""
    with open_store(url) as store:
        job = store.create_job(new_job(nfe=2, images=10, versions={"torch": "2.11"}))
        running = store.start_evaluation(job.id, 0, "baseline", Schedule.uniform(2, 1.0))
        store.report_rung(running.id, images=10, distance=1.0, network_evaluations=20, seconds=0.0)
        assert store.job(job.id).versions == {"torch": "2.11"}
        yield store, job, running


def test_a_picture_comes_back_as_it_was_written(evaluated) -> None:
    store, job, running = evaluated
    content = bytes(range(256)) * 500
    Pictures(store, running.id).write("an-id", io.BytesIO(content))
    assert Pictures(store).open_reader("an-id").read() == content
    assert store.pictures(job.id) == {running.id: content}


def test_what_is_not_there_is_not_found_and_nothing_is_removed(evaluated) -> None:
    store, job, _ = evaluated
    assert store.pictures(job.id) == {}
    with pytest.raises(ArtifactNotFound, match="no picture other"):
        Pictures(store).open_reader("other")
    with pytest.raises(NotInStore):
        store.picture("other")
    with pytest.raises(PermissionError):
        Pictures(store).remove("other")


def test_an_evaluation_that_has_ended_takes_no_more_pictures(evaluated) -> None:
    store, _, running = evaluated
    store.finish_evaluation(running.id)
    with pytest.raises(LamtuneError, match="is complete and cannot change"):
        store.add_picture(running.id, "late", b"")


def test_the_best_of_one_job_is_its_own(evaluated) -> None:
    store, job, running = evaluated
    with pytest.raises(NotInStore, match="job 1 .* has no result yet: it is queued"):
        store.best_of(job.id)
    store.finish_evaluation(running.id)
    assert store.best_of(job.id) == store.best("m", "d", 2)
    with pytest.raises(NotInStore, match="no job 7"):
        store.best_of(7)
