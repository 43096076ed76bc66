"""What goes into the store and comes out of it, as frozen values.

Knows nothing of SQL, sessions or Optuna.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from samplers.errors import InputError

CONFIRM = "confirm"
"""The phase of evaluations on random numbers that the search has not seen: what they measure ranks."""

JobStatus = Literal["queued", "running", "finished", "failed", "cancelled"]
EvaluationState = Literal["running", "complete", "failed", "pruned"]


STALE_S = 20.0
"""A running job whose last sign of life is older, in seconds, has lost its process."""


def alive(sign: datetime, now: datetime, stale_after: float) -> bool:
    """Whether a last sign of life is younger than `stale_after` seconds. One that lies as far in the future is none:
    that clock was wrong."""
    return abs((now - sign).total_seconds()) <= stale_after


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
    statistics. `details`: for people to read, as `objective`, what is minimised where it is not the Fréchet distance.
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

    @property
    def objective(self) -> str:
        """What is called a distance, in words."""
        return str(self.details.get("objective", "Fréchet distance"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """One search: a model, a dataset, a solver with its options and one NFE.

    `study_name`: of Optuna's study, unique in the store. `model_fingerprint`: digest of weights and options.
    `sampling`: all options of the solver. `images`: the full image count of the search. `confirm`: image count of the
    evaluations on fresh random numbers that rank in the end; 0: none, the search's own full evaluations rank. `seed`:
    of the search's common random numbers, 0 to 2⁶³ - 1. `spec`: the whole job file, as it was submitted. `versions`: of
    the programs that made the job, by name.
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
    confirm: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

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
        if self.confirm == 1 or self.confirm < 0:
            raise InputError(
                f"confirm is {self.confirm}: give a number of images of at least 2, or 0 for none"
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}: it must lie between 0 and 2**63 - 1")
        _check_json("sampling", self.sampling)
        _check_json("spec", self.spec)
        _check_json("versions", self.versions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(NewJob):
    """A job as the store holds it; times are aware and in UTC.

    `updated_at` is the last sign of life: it moves with every write to the job or to its evaluations.
    `finished_at` is set while `status` is finished, failed or cancelled; a job that is being cancelled gets it when its
    process has ended. `warm_start`: where the search began, and which job said so; None: at λ = 1, or not yet.
    """

    id: int
    status: JobStatus
    error: str | None
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None
    warm_start: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One schedule λ_t tried in a job; times are aware and in UTC.

    `number`: of Optuna's trial. `k`, `b`: λ_t = k·t + b, both None for a free list. `lambdas[t]`: λ of
    network evaluation t, t = 0 the cleanest. `rungs`: image count → Fréchet distance there, ascending;
    `images` and `distance` are the last of them (0 and None before the first). `network_evaluations`: images
    × NFE paid so far. `seconds`: device time, what all workers together have worked for it so far, from the images to
    distances, influences, metrics and picture; not what they waited, loaded, or had begun when they died. A complete
    evaluation has a finite distance; a pruned one was stopped at its last rung.

    `parameters`: options of the solver that were tried in place of the job's. `seed`: of its random numbers.
    `standard_error`: of `distance`. `gain`: the distance of λ = 1 minus this one at the same images and seed, with
    `gain_error`, its paired standard error; None where λ = 1 was not measured there. `influence`: little-endian
    float32, one per 5 images, what error bars of differences are computed from. `metrics`: further numbers of the
    same images by name. `key`: digest of all that decides the numbers. `reused`: id of the evaluation, perhaps of
    another job, that they were taken from.
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
    parameters: Mapping[str, float]
    seed: int
    standard_error: float | None
    gain: float | None
    gain_error: float | None
    influence: bytes
    metrics: Mapping[str, float]
    key: str
    reused: int | None

    @property
    def is_baseline(self) -> bool:
        """λ = 1 with the job's own solver."""
        return set(self.lambdas) == {1.0} and not self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best schedule that the store has for a (model, dataset, NFE), and what finding it cost.

    `k`, `b`, `lambdas`, `parameters`, `number`, `phase`, `distance`, `standard_error`, `gain`, `gain_error`, `images`,
    `seed`, `metrics`: of the winning evaluation (see `Evaluation`). `objective`: what the distance is, in words; less
    is better. `significant`: whether the gain is more than twice its standard error; None where that is not known.
    `confirmed`: whether its random numbers are other ones than the search's, so that no luck of the search is in the
    distance. `baseline_distance`: of λ = 1 in the same job, on the same random numbers and as many images; None where
    that was not measured. `images`, `seed`, `evaluator` (fingerprint) and `model_fingerprint` say what the distance may
    be compared with. `trials`, `network_evaluations` and `seconds` cover every evaluation of the winning job's search,
    pruned and failed ones too; `confirm_network_evaluations` and `confirm_seconds` its confirmation.
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
    parameters: Mapping[str, float]
    distance: float
    standard_error: float | None
    baseline_distance: float | None
    gain: float | None
    gain_error: float | None
    significant: bool | None
    confirmed: bool
    images: int
    seed: int
    metrics: Mapping[str, float]
    objective: str
    evaluator: str
    job_id: int
    number: int
    status: JobStatus
    strategy: str
    trials: int
    network_evaluations: int
    seconds: float
    confirm_network_evaluations: int
    confirm_seconds: float

    @property
    def is_baseline(self) -> bool:
        """λ = 1 with the job's own solver."""
        return set(self.lambdas) == {1.0} and not self.parameters
