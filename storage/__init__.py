"""The SQL store of jobs and evaluations, beside Optuna's own tables, and its query for the best schedule.

For programs, the command line included:

    from storage import open_store

    with open_store("postgresql://…") as store:         # or LAMTUNE_STORE, or lamtune.db here
        found = store.best(model="adm-cifar10", dataset="cifar10", nfe=20)
        print(found.k, found.b, found.lambdas)          # a frozen `Best`; NotInStore where there is none
        for job in store.jobs(model="adm-cifar10"):     # newest first, by pages
            history = store.evaluations(job.id)         # every schedule that the job tried; pages too

Knows nothing of torch, images or strategies.
"""

from storage.connection import refuse_secret, refuse_sqlite
from storage.errors import ConnectionLost, NotInStore, TakenOver
from storage.pictures import Pictures
from storage.records import (
    CONFIRM,
    STALE_S,
    Best,
    Evaluation,
    EvaluationState,
    Evaluator,
    Job,
    JobStatus,
    NewJob,
)
from storage.store import Store, check_store, open_store

__all__ = [
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
]
