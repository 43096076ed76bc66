"""benchmarks.service: how PostgreSQL answers what programs ask, in a store of ten thousand trials."""

import pytest

from benchmarks import service
from storage import open_store


@pytest.fixture
def filled(postgresql_url):
    """A store with so many trials, and what can be asked of it."""
    return postgresql_url, service.fill(postgresql_url, 10_000, 25)


def test_ten_thousand_trials_are_read_through_indexes(filled):
    url, questions = filled
    calls = {
        "ix_lamtune_jobs_model_dataset_nfe": lambda store: store.best(**questions[7]),
        "pk_lamtune_jobs": lambda store: store.jobs(before_id=200),
        "uq_lamtune_evaluations_job_id_number": lambda store: store.evaluations(200, 10, after_number=4),
    }
    for index, call in calls.items():
        plan = service.plan(url, call)
        assert index in service.indexes(plan)
        # A table of a few hundred jobs may well be read as a whole where all of it is on a page or two.
        assert not any("Seq Scan on lamtune_evaluations" in line for line in plan)
    with open_store(url) as store:
        assert len(store.jobs(limit=1000)) == 400
        assert len(store.evaluations(200)) == 25
