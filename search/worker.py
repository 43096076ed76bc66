"""A sampler worker: the Ray actor that holds an Evaluator.

Knows nothing of trials, strategies or the store: it answers calls, and says how many seconds each took. Imports nothing
heavy before it is made: whoever gets a handle of it loads this module too, and a trial that would import torch for that
starts seconds later.
"""

from __future__ import annotations  # a handle brings the signatures along

import platform
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from objectives.metrics import Real
    from objectives.reference import Reference
    from samplers.sampling import Solver
    from samplers.schedule import Schedule
    from search.evaluator import Evaluator, Features
    from search.spec import JobSpec


class SamplerWorker:
    """One process with the job's network, extractor and reference on its device ("cpu" or "cuda")."""

    def __init__(self, spec: JobSpec, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._spec, self._device = spec, torch.device(device)
        self._loaded: Evaluator | None = None
        self._real: Real | None = None

    def load(self, reference: Reference, fingerprint: str) -> int:
        """Load everything, with statistics that the driver has read; nothing where that was done. Returns its
        grain.

        Raises InputError where the network is not the one with this fingerprint: a file may have changed meanwhile.
        """
        from samplers.errors import InputError
        from search.evaluator import Evaluator

        if self._loaded is None:
            loaded = Evaluator.load(self._spec, self._device, reference)
            if loaded.model.fingerprint != fingerprint:
                where = f"{self._spec.model.path} on {platform.node()}"
                raise InputError(f"model.path: {where} is not the network with which the job was started")
            self._loaded = loaded
        return self._loaded.grain

    @property
    def _evaluator(self) -> Evaluator:
        assert self._loaded is not None, (
            "whoever calls a worker, or calls it again after it died, has it load first"
        )
        return self._loaded

    def sample(
        self,
        sampling: Solver,
        schedule: Schedule,
        start: int,
        stop: int,
        seed: int,
        parameters: Mapping[str, float],
        key: str,
    ) -> tuple[Features, tuple[int, float]]:
        """See Evaluator.sample; the last item is the number of images that were computed, and the seconds."""
        began = time.perf_counter()
        features, computed = self._evaluator.sample(
            sampling, schedule, start, stop, seed=seed, parameters=parameters, key=key
        )
        return features, (computed, time.perf_counter() - began)

    def conclude(
        self,
        sampling: Solver,
        schedule: Schedule,
        seed: int,
        parameters: Mapping[str, float],
        *parts: Features,
    ) -> tuple[tuple[dict[str, float], bytes], float]:
        """The job's metrics of an evaluation, from its features in the order of ids, and a picture; see Evaluator. And
        the seconds.

        Where the search minimises something else, the Fréchet distance is one of them.
        """
        from search.spec import FRECHET

        began = time.perf_counter()
        names = self._spec.metrics if self._spec.objective == FRECHET else (FRECHET, *self._spec.metrics)
        metrics = self._evaluator.metrics(names, self._real_for(self._spec.metrics), parts) if names else {}
        picture = self._evaluator.picture(sampling, schedule, seed, parameters)
        return (metrics, picture), time.perf_counter() - began

    def score(self, images: int, *parts: Features) -> tuple[tuple[float, NDArray[np.float64] | None], float]:
        """The job's objective of the first so many images, from features in the order of ids, see Evaluator; and the
        seconds. Of the last part some may be left over."""
        began = time.perf_counter()
        *whole, last = parts
        whole.append(last[: images - sum(len(part) for part in whole)])
        found = self._evaluator.score(self._spec.objective, self._real_for(self._spec.losses), whole)
        return found, time.perf_counter() - began

    def _real_for(self, names: Collection[str]) -> Real | None:
        """The real images' features, which the driver has cached, where a metric needs them; loaded once."""
        from objectives.metrics import Real, need_real

        if self._real is None and need_real(names):
            features, _ = self._evaluator.real(self._spec.dataset)
            self._real = Real.of(features.to(self._device))
        return self._real
