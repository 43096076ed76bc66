"""A sampler worker: the Ray actor that holds an Evaluator.

Knows nothing of trials, strategies or the store: it answers calls for ranges of images. Imports nothing heavy before
it is made: whoever gets a handle of it loads this module too, and a trial that would import torch for that starts
seconds later.
"""

from __future__ import annotations  # a handle brings the signatures along

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from objectives.moments import Moments
    from samplers.sampling import Solver
    from samplers.schedule import Schedule
    from search.spec import JobSpec


class SamplerWorker:
    """One process with the job's network, extractor and reference on its device."""

    def __init__(self, spec: JobSpec, device: str, threads: int) -> None:
        import torch

        from search.evaluator import Evaluator

        torch.set_num_threads(threads)
        self._evaluator = Evaluator.load(spec, torch.device(device))

    def ready(self) -> str:
        """Answers once everything is loaded: the name of the device."""
        import torch

        device = self._evaluator.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def sample(self, sampling: Solver, schedule: Schedule, start: int, stop: int) -> tuple[Moments, float]:
        """See Evaluator.sample."""
        return self._evaluator.sample(sampling, schedule, start, stop)

    def merge(self, *parts: Moments) -> tuple[Moments, float]:
        """See Evaluator.merge."""
        return self._evaluator.merge(*parts)
