"""The public surface of the store: a change of it breaks other people's programs."""

import inspect

import pytest

import storage
from storage import Store

REQUIRED = inspect.Parameter.empty


def test_the_package_exports_these_names_and_no_others():
    assert set(storage.__all__) == {
        "CONFIRM",
        "STALE_S",
        "Best",
        "ConnectionLost",
        "Evaluation",
        "EvaluationState",
        "Evaluator",
        "Job",
        "JobStatus",
        "NewJob",
        "NotInStore",
        "Pictures",
        "Store",
        "TakenOver",
        "check_store",
        "open_store",
        "refuse_secret",
        "refuse_sqlite",
    }
    assert all(hasattr(storage, name) for name in storage.__all__)


@pytest.mark.parametrize(
    ("call", "parameters"),
    [
        (storage.open_store, {"url": None, "patience": 0.0}),
        (Store.best_of, {"job_id": REQUIRED}),
        (Store.best, {"model": REQUIRED, "dataset": REQUIRED, "nfe": REQUIRED, "solver": None}),
        (Store.jobs, {"model": None, "dataset": None, "status": None, "limit": 50, "before_id": None}),
        (Store.job, {"job_id": REQUIRED}),
        (Store.evaluations, {"job_id": REQUIRED, "limit": None, "after_number": None}),
    ],
)
def test_what_readers_call_keeps_its_names_and_defaults(call, parameters):
    found = {name: one.default for name, one in inspect.signature(call).parameters.items() if name != "self"}
    assert found == parameters
