"""Starts and ends the sampler workers: as many Ray actors as this machine has room for; they outlive trials.

Knows nothing of trials, strategies or the store.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from objectives.reference import Reference
from samplers.errors import InputError
from search.evaluator import BLOCK
from search.spec import JobSpec
from search.worker import SamplerWorker

# Images per call: enough that the call costs nothing beside its work, few enough that a lost one is no loss.
_UNIT = {"cuda": 8 * BLOCK, "cpu": 2 * BLOCK}
_RESTARTS = 3  # how often a worker that dies is started again, and a call that died with it repeated


@dataclass(frozen=True, slots=True)
class Resources:
    """What this machine gives a job: `workers` processes, a GPU each or `threads` processor cores each."""

    device: str
    workers: int
    threads: int

    @property
    def unit(self) -> int:
        """Images per call to a worker."""
        return _UNIT[self.device]


def available(spec: JobSpec) -> Resources:
    """Workers for a job on this machine. Raises InputError where more GPUs are asked for than there are."""
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    asked = spec.resources.workers
    if gpus:
        workers = gpus if asked == "auto" else asked
        if workers > gpus:
            raise InputError(
                f"resources.workers: {workers} were asked for, but this machine has {gpus} GPU(s)"
            )
        return Resources("cuda", workers, max(1, cores // (workers + 1)))
    workers = cores if asked == "auto" else asked
    return Resources("cpu", workers, max(1, cores // workers))


def start_workers(spec: JobSpec, reference: Reference, resources: Resources) -> list[ActorHandle[Any]]:
    """Start the workers and wait until all are ready. Ray must be initialised."""
    gpu = resources.device == "cuda"
    actor = ray.remote(SamplerWorker).options(
        num_gpus=1 if gpu else 0,
        num_cpus=0 if gpu else resources.threads,
        max_restarts=_RESTARTS,
        max_task_retries=_RESTARTS,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(resources.threads)}},
    )
    workers: list[Any] = [
        actor.remote(spec, resources.device, resources.threads) for _ in range(resources.workers)
    ]
    shared = ray.put(reference)
    ray.get([worker.load.remote(shared) for worker in workers])
    return workers


def stop_workers(workers: Sequence[ActorHandle[Any]]) -> None:
    """Give the processors or GPUs back, also where Ray goes on."""
    for worker in workers:
        ray.kill(worker)
