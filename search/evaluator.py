"""Evaluates schedules in one process: network, extractor and reference loaded once, on one device.

All that happens on a GPU happens here. Knows nothing of Ray, Optuna or SQL; `search.pool` runs it in workers.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Literal, Self

import torch

from objectives.features import NetworkExtractor, load_extractor
from objectives.frechet import FrechetReference
from objectives.moments import Moments
from objectives.reference import Reference, load_reference
from samplers.generate import Sampler
from samplers.models.compiled import make_fast
from samplers.models.load import load_model
from samplers.models.protocol import Model
from samplers.sampling import Solver
from samplers.schedule import Schedule
from search.spec import JobSpec

# Images whose features are taken together, always cut at multiples of this id: float32 features may change in
# their last bits with the batch, and must not with the way in which a trial is split.
BLOCK = 250

Precision = Literal["float32", "bfloat16", "float16"]


def precision(spec: JobSpec, device: torch.device) -> Precision:
    """The number type of the network's arithmetic; `auto` is float16 (autocast) on a GPU and float32 elsewhere.

    Not bfloat16, which is as fast but moved the distance of a real CIFAR-10 network at λ = 1 by 1.9 of 43.8, more
    than its error bar; float16 moved it by 0.05. Where float16 overflows the trial fails and says so.
    """
    asked = spec.model.precision
    if asked == "auto":
        return "float16" if device.type == "cuda" else "float32"
    return asked


def accelerator() -> torch.device:
    """Where features are computed fastest on this machine."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A model, an extractor and reference statistics that fit each other, on one device."""

    model: Model
    extractor: NetworkExtractor
    reference: Reference
    frechet: FrechetReference
    device: torch.device
    seed: int
    precision: Precision
    micro_batch: int | None

    @classmethod
    def load(
        cls,
        spec: JobSpec,
        device: torch.device,
        reference: Reference | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Read everything that the job names. Raises InputError that names the key or file at fault.

        reference: statistics that another process has read already; None: read them, or compute them once, with
        progress(done, total), and cache them.
        """
        # float32 means float32: cuDNN would take TF32, with a mantissa of 10 bits, for convolutions.
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        model = load_model(spec.model.format, spec.model.path, spec.model.options, spec.folder)
        for sampling in spec.sampling:
            sampling.plan(model)
        extractor = load_extractor(spec.features, model.image_shape)
        if reference is None:
            data = spec.dataset
            reference = load_reference(
                data.reference,
                extractor.to(accelerator()),
                model.image_shape,
                resize=data.resize,
                progress=progress,
            )
        micro_batch = None if spec.resources.micro_batch == "auto" else spec.resources.micro_batch
        make_fast(model.to(device), device, getattr(torch, precision(spec, device)))
        evaluator = cls(
            model=model,
            extractor=extractor.to(device),
            reference=reference,
            frechet=FrechetReference.of(reference.gaussian().to(device)),
            device=device,
            seed=spec.search.seed,
            precision=precision(spec, device),
            micro_batch=micro_batch,
        )
        evaluator._sampler(spec.sampling[0]).warm_up()
        return evaluator

    @property
    def fingerprint(self) -> str:
        """Hex digest of what makes two distances comparable: the extractor and the reference statistics."""
        return hashlib.sha256(f"{self.extractor.fingerprint} {self.reference.digest}".encode()).hexdigest()

    def sample(self, sampling: Solver, schedule: Schedule, start: int, stop: int) -> tuple[Moments, float]:
        """Moments of the features of images start … stop − 1, and the seconds that it took.

        Raises NonFiniteError.
        """
        began = time.perf_counter()
        images = self._sampler(sampling).images(schedule, start, stop)
        edges = [start, *range((start // BLOCK + 1) * BLOCK, stop, BLOCK), stop]
        blocks = [self.extractor(images[a - start : b - start]) for a, b in pairwise(edges)]
        moments = Moments.of(torch.cat(blocks)).to("cpu")
        return moments, time.perf_counter() - began

    def _sampler(self, sampling: Solver) -> Sampler:
        return Sampler(
            model=self.model,
            sampling=sampling,
            device=self.device,
            seed=self.seed,
            precision=getattr(torch, self.precision),
            micro_batch=self.micro_batch,
        )

    def merge(self, *parts: Moments) -> tuple[Moments, float]:
        """The sum of moments of disjoint images, in the order given, and its Fréchet distance to the reference.

        Raises NonFiniteError where features were not finite.
        """
        total = reduce(add, parts)
        return total, self.frechet.distance(total)
