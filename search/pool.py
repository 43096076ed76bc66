"""The sampler workers: Ray actors that hold an Evaluator each and outlive trials.

Knows nothing of trials, strategies or the store: it answers calls for ranges of images.
"""

import os
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from objectives.moments import Moments
from samplers.errors import InputError
from samplers.sampling import DDIM, DDPM, EDM, Diffusers
from samplers.schedule import Schedule
from search.evaluator import BLOCK, Evaluator
from search.spec import JobSpec

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


class SamplerWorker:
    """One process with the job's network, extractor and reference on its device."""

    def __init__(self, spec: JobSpec, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._evaluator = Evaluator.load(spec, torch.device(device))

    def ready(self) -> str:
        """Answers once everything is loaded: the name of the device."""
        device = self._evaluator.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def sample(
        self, sampling: DDPM | DDIM | EDM | Diffusers, schedule: Schedule, start: int, stop: int
    ) -> tuple[Moments, float]:
        """See Evaluator.sample."""
        return self._evaluator.sample(sampling, schedule, start, stop)

    def merge(self, *parts: Moments) -> tuple[Moments, float]:
        """See Evaluator.merge."""
        return self._evaluator.merge(*parts)


def start_workers(spec: JobSpec, resources: Resources) -> list[ActorHandle[Any]]:
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
    ray.get([worker.ready.remote() for worker in workers])
    return workers
