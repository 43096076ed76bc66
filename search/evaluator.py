"""Evaluates schedules in one process: network, extractor and reference loaded once, on one device.

All that happens on a GPU happens here. Knows nothing of Ray, Optuna or SQL; `search.pool` runs it in workers.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby, pairwise
from operator import add
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from objectives import losses
from objectives.features import NetworkExtractor, load_extractor
from objectives.frechet import FrechetReference
from objectives.influence import Sensitivity
from objectives.metrics import Generated, Real, measure
from objectives.moments import Moments
from objectives.reference import Reference, load_features, load_reference
from samplers.generate import Sampler, grain
from samplers.models.compiled import make_fast
from samplers.models.load import load_model
from samplers.models.protocol import Model
from samplers.sampling import Solver, with_parameters
from samplers.schedule import Schedule
from search import figures
from search.blocks import FeatureCache
from search.spec import FRECHET, DatasetSpec, JobSpec

# Images whose features are taken together, always cut at multiples of this id: float32 features may change in
# their last bits with the batch, and must not with the way in which a trial is split.
BLOCK = 250
_SMALL = 64  # pixels: images of which 64 are shown together

Precision = Literal["float32", "bfloat16", "float16"]
Features: TypeAlias = NDArray[np.floating[Any]]
"""Features [n, D] in the extractor's own float type, as what passes between processes without a copy."""


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


class Sampled(NamedTuple):
    """What a range of images leaves: features in the order of ids, and how many images were not in the cache."""

    features: Features
    computed: int


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
    micro_batch: int

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
        number_type = precision(spec, device)
        sampler = Sampler(
            model=model.to(device),
            sampling=spec.sampling[0],
            device=device,
            seed=spec.search.seed,
            precision=getattr(torch, number_type),
            micro_batch=None if spec.resources.micro_batch == "auto" else spec.resources.micro_batch,
        ).fitted()
        make_fast(model, device, sampler.precision)
        sampler.warm_up()
        return cls(
            model=model,
            extractor=extractor.to(device),
            reference=reference,
            frechet=FrechetReference.of(reference.gaussian().to(device)),
            device=device,
            seed=spec.search.seed,
            precision=number_type,
            micro_batch=sampler.size,
        )

    @property
    def fingerprint(self) -> str:
        """Hex digest of what makes two distances comparable: the extractor and the reference statistics."""
        return hashlib.sha256(f"{self.extractor.fingerprint} {self.reference.digest}".encode()).hexdigest()

    @property
    def grain(self) -> int:
        """See `samplers.generate.grain`."""
        return grain(self.micro_batch, self.device)

    def sample(
        self,
        sampling: Solver,
        schedule: Schedule,
        start: int,
        stop: int,
        *,
        seed: int | None = None,
        parameters: Mapping[str, float] | None = None,
        key: str | None = None,
    ) -> Sampled:
        """Images start … stop − 1 and what is kept of them.

        seed: of their random numbers, default the job's. parameters: options of the solver in place of those that
        `sampling` has. key: digest of all that decides the images and features; whole blocks of them are then taken
        from and left in this host's cache. Raises NonFiniteError, and InputError for parameters that the solver
        cannot take.
        """
        sampler = self._sampler(sampling, self.seed if seed is None else seed, parameters)
        cache = FeatureCache(key) if key is not None else None
        edges = [start, *range((start // BLOCK + 1) * BLOCK, stop, BLOCK), stop]
        blocks = list(pairwise(edges))
        known = {
            (a, b): found
            for a, b in blocks
            if cache is not None and b - a == BLOCK and (found := cache.load(a // BLOCK, BLOCK)) is not None
        }
        parts: list[Tensor] = []
        computed = 0
        for lacking, group in groupby(blocks, key=lambda block: block not in known):
            run = list(group)
            if not lacking:
                parts += [torch.from_numpy(known[block]).to(self.device) for block in run]
                continue
            first, end = run[0][0], run[-1][1]
            images = sampler.images(schedule, first, end)
            made = [self.extractor(images[a - first : b - first]) for a, b in run]
            parts += made
            computed += end - first
            if cache is not None:
                for (a, b), features in zip(run, made, strict=True):
                    if b - a == BLOCK:
                        cache.save(a // BLOCK, features.cpu().numpy())
        return Sampled(torch.cat(parts).cpu().numpy(), computed)

    def _sampler(self, sampling: Solver, seed: int, parameters: Mapping[str, float] | None = None) -> Sampler:
        return Sampler(
            model=self.model,
            sampling=with_parameters(sampling, parameters or {}),
            device=self.device,
            seed=seed,
            precision=getattr(torch, self.precision),
            micro_batch=self.micro_batch,
        )

    def real(
        self, dataset: DatasetSpec, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Tensor, str]:
        """The features [M, D] of the dataset's images on the CPU, and their digest; see `load_features`."""
        found = load_features(
            dataset.images or dataset.reference,
            self.extractor.to(accelerator()),
            self.model.image_shape,
            resize=dataset.resize,
            progress=progress,
        )
        self.extractor.to(self.device)
        return found

    def metrics(
        self, names: Collection[str], real: Real | None, parts: Iterable[Features]
    ) -> dict[str, float]:
        """The values of `objectives.metrics`, and `frechet`, on the features of an evaluation, in parts in the order of
        ids.

        real: on this device; None where no metric needs it. Raises as `measure` does.
        """
        made, known = self._generated(parts), {}
        if FRECHET in names:
            known[FRECHET] = self.frechet.distance(Moments.of(made.features))
        return known | measure([name for name in names if name != FRECHET], made, real)

    def score(
        self, objective: str, real: Real | None, parts: Sequence[Features]
    ) -> tuple[float, NDArray[np.float64] | None]:
        """The objective and the influence [n] of each image on it, None where it has none; parts, real: see `metrics`.

        objective: `frechet`, of which one part at a time is on the device, or one of `objectives.losses`. Raises
        NonFiniteError where features are not finite.
        """
        if objective == FRECHET:
            moments = reduce(add, (Moments.of(self._owned(part)) for part in parts))
            distance, sensitivity = self.frechet.distance(moments), Sensitivity.of(self.frechet, moments)
            influences = [sensitivity.influences(self._owned(part)) for part in parts]
            return distance, torch.cat(influences).cpu().numpy()
        loss, found = losses.measure(objective, self._generated(parts), real)
        return loss, None if found is None else found.cpu().numpy()

    def _generated(self, parts: Iterable[Features]) -> Generated:
        features = torch.cat([self._owned(part) for part in parts])
        return Generated(features, self.extractor.logits(features))

    def _owned(self, features: Features) -> Tensor:
        # Ray hands out read-only views of its object store: a tensor must own its memory.
        return torch.tensor(features, device=self.device)

    def picture(
        self, sampling: Solver, schedule: Schedule, seed: int, parameters: Mapping[str, float]
    ) -> bytes:
        """A PNG of the first images of an evaluation, 64 small ones or 16; sampled again, since none are kept."""
        count = 64 if max(self.model.image_shape) <= _SMALL else 16
        images = self._sampler(sampling, seed, parameters).images(schedule, 0, count)
        return figures.grid(images.cpu())
