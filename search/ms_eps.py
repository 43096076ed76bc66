"""Γ (ms_eps) of Analytic-DPM: estimated from a job's images before its workers start, and kept for the next job.

Knows nothing of Ray or the store. What Γ is and how it is measured is `samplers.analytic`'s matter.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from objectives.reference import DIGITS, cache_folder, read_images
from samplers.analytic import MsEpsSource, Statistics, cached_ms_eps, read_ms_eps
from samplers.errors import InputError
from samplers.generate import measure_ms_eps
from samplers.models.protocol import Model
from samplers.sampling import Analytic, Solver
from search.spec import JobSpec

_SEED = 0  # Γ belongs to a network and its data: searches with other seeds share it


@dataclass(frozen=True, slots=True)
class Complete:
    """A sampling with the file of Γ, if it needs one, and what tells that Γ from others on any machine: the digest
    of the numbers in a file that was given, or of what the estimate was made from."""

    sampling: Solver
    ms_eps: str | None = None


def complete(
    spec: JobSpec, model: Model, device: torch.device, progress: Callable[[int, int], None] | None = None
) -> tuple[Complete, ...]:
    """The samplings of a job, ready for workers. What Γ they lack is taken from the cache or estimated on `device`.

    model: on the CPU, where it also is afterwards. progress(done, total): evaluations of the network on one image
    each. Raises InputError, before anything is estimated where Γ cannot be, and NonFiniteError.
    """
    return tuple(_complete(spec, sampling, model, device, progress) for sampling in spec.sampling)


def _complete(
    spec: JobSpec,
    sampling: Solver,
    model: Model,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> Complete:
    if not isinstance(sampling, Analytic):
        return Complete(sampling)
    assert model.betas is not None, "the plan was checked"
    levels = len(model.betas)
    if not sampling.lacks_ms_eps:
        if sampling.variance != "analytic" or sampling.ms_eps is None:
            return Complete(sampling)
        given = read_ms_eps(Path(sampling.ms_eps), levels)
        return Complete(sampling, hashlib.sha256(given.tobytes()).hexdigest())
    if model.num_classes is not None:
        raise InputError(
            f"sampling.ms_eps: {sampling.solver} estimates Γ for networks without classes only; "
            "give the file of Γ for this network"
        )
    shape, resize, most = model.image_shape, spec.dataset.resize, sampling.ms_eps_images
    source = _images(spec, sampling)
    data, count = hashlib.sha256(str(shape).encode()), 0
    try:
        for batch in read_images(source, shape, resize=resize, most=most):
            data.update(batch.numpy().tobytes())
            count += len(batch)
    except InputError as error:
        raise InputError(f"{error}. {_needs_images(sampling)}") from None
    if count == 0:
        raise InputError(f"{source}: no images found. {_needs_images(sampling)}")

    def estimate() -> Statistics:
        try:
            return measure_ms_eps(
                model.to(device),
                read_images(source, shape, resize=resize, most=most),
                device,
                count=count,
                shift1=sampling.shift1,
                seed=_SEED,
                micro_batch=None if spec.resources.micro_batch == "auto" else spec.resources.micro_batch,
                progress=progress,
            )
        finally:
            model.to(torch.device("cpu"))
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the workers need it

    made_from = MsEpsSource(model.fingerprint, data.hexdigest(), count, _SEED, sampling.shift1)
    file = cached_ms_eps(cache_folder(), made_from, levels, estimate)
    return Complete(sampling.with_ms_eps(file), hashlib.sha256(made_from.text.encode()).hexdigest())


def _images(spec: JobSpec, sampling: Analytic) -> Path:
    if spec.dataset.images is None and spec.dataset.reference == DIGITS:
        raise InputError(f"dataset.reference: {DIGITS!r} is statistics. {_needs_images(sampling)}")
    return Path(spec.dataset.images or spec.dataset.reference)


def _needs_images(sampling: Analytic) -> str:
    return (
        f"{sampling.solver} estimates Γ from images: name a folder, an archive or an .npz of them as dataset.images, "
        "or give the file of Γ as sampling.ms_eps"
    )
