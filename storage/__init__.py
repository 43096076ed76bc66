"""The SQL store of jobs and evaluations, beside Optuna's own tables, and its query for the best schedule.

Knows nothing of torch, images or strategies.
"""

from storage.errors import NotInStore
from storage.records import CONFIRM, Best, Evaluation, EvaluationState, Evaluator, Job, JobStatus, NewJob
from storage.store import Store, check_store, open_store

__all__ = [
    "CONFIRM",
    "Best",
    "Evaluation",
    "EvaluationState",
    "Evaluator",
    "Job",
    "JobStatus",
    "NewJob",
    "NotInStore",
    "Store",
    "check_store",
    "open_store",
]
