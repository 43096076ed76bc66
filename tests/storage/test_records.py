from typing import Any

import pytest

from samplers.errors import InputError
from storage.records import Evaluator, NewJob

EVALUATOR = Evaluator(
    fingerprint="e1", features="digits", dimension=8, reference="r1", details={"dtype": "float64"}
)
JOB: dict[str, Any] = {
    "study_name": "s",
    "model": "m",
    "model_fingerprint": "f",
    "dataset": "d",
    "solver": "ddpm",
    "sampling": {},
    "nfe": 20,
    "strategy": "paper",
    "images": 1000,
    "seed": 0,
    "spec": {},
    "evaluator": EVALUATOR,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("study_name", ""),
        ("model", " "),
        ("model_fingerprint", ""),
        ("dataset", ""),
        ("solver", ""),
        ("strategy", ""),
        ("nfe", 0),
        ("images", 1),
        ("seed", -1),
        ("seed", 2**63),
        ("sampling", {"eta": float("nan")}),
        ("spec", {"path": object()}),
    ],
)
def test_a_job_refuses_what_the_store_could_not_keep_and_names_the_key(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        NewJob(**(JOB | {key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fingerprint", ""),
        ("features", ""),
        ("reference", ""),
        ("dimension", 0),
        ("details", {"x": float("inf")}),
    ],
)
def test_an_evaluator_refuses_what_the_store_could_not_keep_and_names_the_key(
    key: str, value: object
) -> None:
    fields: dict[str, Any] = {
        "fingerprint": "e",
        "features": "x",
        "dimension": 8,
        "reference": "r",
        "details": {},
    }
    with pytest.raises(InputError, match=key):
        Evaluator(**(fields | {key: value}))


def test_the_largest_seed_and_the_smallest_job_are_taken() -> None:
    job = NewJob(**(JOB | {"seed": 2**63 - 1, "nfe": 1, "images": 2}))
    assert (job.seed, job.nfe, job.images) == (2**63 - 1, 1, 2)
