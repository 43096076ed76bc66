"""What goes into the store and comes out of it, as frozen values.

Knows nothing of SQL, sessions or Optuna.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from samplers.errors import InputError

JobStatus = Literal["queued", "running", "finished", "failed", "cancelled"]
EvaluationState = Literal["running", "complete", "failed", "pruned"]


def _check_text(**values: str) -> None:
    for key, value in values.items():
        if not value.strip():
            raise InputError(f"{key} is empty: give it a value")


def _check_json(key: str, value: Mapping[str, Any]) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key} cannot be written as JSON: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """What turned images into a distance; distances compare only where the fingerprints are equal.

    `fingerprint`: hex digest of all the rest (extractor weights, resize, precision, reference statistics).
    `features`: name of the extractor. `dimension`: of its features. `reference`: digest of the reference
    statistics. `details`: precision, resize and the like, for people to read.
    """

    fingerprint: str
    features: str
    dimension: int
    reference: str
    details: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_text(fingerprint=self.fingerprint, features=self.features, reference=self.reference)
        if self.dimension < 1:
            raise InputError(f"dimension is {self.dimension}: an evaluator has at least one feature")
        _check_json("details", self.details)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """One search: a model, a dataset, a solver with its options and one NFE.

    `study_name`: of Optuna's study, unique in the store. `model_fingerprint`: digest of weights and options.
    `sampling`: all options of the solver. `images`: the full image count, at which evaluations rank.
    `seed`: of the common random numbers, 0 to 2⁶³ - 1. `spec`: the whole job file, as it was submitted.
    """

    study_name: str
    model: str
    model_fingerprint: str
    dataset: str
    solver: str
    sampling: Mapping[str, Any]
    nfe: int
    strategy: str
    images: int
    seed: int
    spec: Mapping[str, Any]
    evaluator: Evaluator

    def __post_init__(self) -> None:
        _check_text(
            study_name=self.study_name,
            model=self.model,
            model_fingerprint=self.model_fingerprint,
            dataset=self.dataset,
            solver=self.solver,
            strategy=self.strategy,
        )
        if self.nfe < 1:
            raise InputError(f"nfe is {self.nfe}: a job needs at least one network evaluation")
        if self.images < 2:
            raise InputError(f"images is {self.images}: a covariance needs at least two")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}: it must lie between 0 and 2**63 - 1")
        _check_json("sampling", self.sampling)
        _check_json("spec", self.spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(NewJob):
    """A job as the store holds it; times are aware and in UTC.

    `updated_at` is the last sign of life: it moves with every write to the job or to its evaluations.
    `finished_at` is set while `status` is finished, failed or cancelled.
    """

    id: int
    status: JobStatus
    error: str | None
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One schedule λ_t tried in a job; times are aware and in UTC.

    `number`: of Optuna's trial. `k`, `b`: λ_t = k·t + b, both None for a free list. `lambdas[t]`: λ of
    network evaluation t, t = 0 the cleanest. `rungs`: image count → Fréchet distance there, ascending;
    `images` and `distance` are the last of them (0 and None before the first). `network_evaluations`: images
    × NFE paid so far. `seconds`: accelerator-seconds paid so far. A complete evaluation has a finite
    distance.
    """

    id: int
    job_id: int
    number: int
    phase: str
    k: float | None
    b: float | None
    mean: float
    lambdas: tuple[float, ...]
    state: EvaluationState
    images: int
    distance: float | None
    rungs: Mapping[int, float]
    network_evaluations: int
    seconds: float
    error: str | None
    started_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best schedule that the store has for a (model, dataset, NFE), and what finding it cost.

    `k`, `b`, `lambdas`, `number`, `distance`: of the winning evaluation (see `Evaluation`).
    `baseline_distance`: of λ = 1 in the same job, None where that was not measured. `images`, `seed`,
    `evaluator` (fingerprint) and `model_fingerprint` say what the distance may be compared with. `trials`,
    `network_evaluations` and `seconds` cover every evaluation of the winning job, pruned and failed ones too.
    """

    model: str
    model_fingerprint: str
    dataset: str
    solver: str
    sampling: Mapping[str, Any]
    nfe: int
    k: float | None
    b: float | None
    lambdas: tuple[float, ...]
    distance: float
    baseline_distance: float | None
    images: int
    seed: int
    evaluator: str
    job_id: int
    number: int
    status: JobStatus
    trials: int
    network_evaluations: int
    seconds: float
