"""Exposure bias as a network meets it: what it is fed and how large its answers are, in training and in sampling.

In training a state is a real image with fresh noise; in sampling it is what the earlier predictions made of noise.
Both are observed at the same noise levels, those of a solver's evaluations. Knows nothing of distances, files or what
becomes of the numbers.
"""

import torch
from torch import Tensor

from samplers import noise
from samplers.errors import InputError, NonFiniteError
from samplers.generate import Observe, Sampler
from samplers.models.process import Process
from samplers.sampling import Plan
from samplers.schedule import Schedule

FORWARD_DRAW = 1 << 30
"""+ t: the draw of the noise that a real image gets at evaluation t, far from the draws of sampling."""


def plan_of(sampler: Sampler) -> Plan:
    """The solver's plan for the network. Raises InputError where real images cannot be noised as in its training:
    networks of classes (real images bring none), of latents (there is no encoder), and with a prior of their own
    (PFGM++, whose noise is not normal)."""
    model = sampler.model
    for wrong, why in (
        (model.num_classes is not None, "takes class labels, which the real images do not bring"),
        (
            model.shape != model.image_shape,
            "works on latents, into which real images would have to be encoded",
        ),
        (model.prior is not None, "was trained with other noise than normal"),
    ):
        if wrong:
            raise InputError(f"model: the network {why}: its exposure bias cannot be measured")
    return sampler.sampling.plan(model)


def levels(sampler: Sampler) -> list[tuple[float, float]]:
    """alpha and sigma of x = alpha·x0 + sigma·eps, the state that the network sees, at each evaluation t."""
    model = sampler.model
    process = Process(betas=model.betas, sigma_range=model.sigma_range)
    # Networks of Analytic-DPM's own training count their timesteps from 1.
    first = 0 if getattr(sampler.sampling, "shift1", True) else 1
    return [process.coefficients(time - first) for time in plan_of(sampler).times.tolist()]


def noised(sampler: Sampler, t: int, x0: Tensor, ids: Tensor, level: tuple[float, float]) -> Tensor:
    """alpha·x0 + sigma·z, a state of the training at the level of evaluation t.

    x0: real images in [-1, 1], [B, C, H, W]; z depends on (seed, id, t) only, ids int64 [B]. The result has the dtype
    of the solver's states.
    """
    alpha, sigma = level
    dtype = sampler.sampling.state_dtype
    z = noise.normal(sampler.seed, ids, FORWARD_DRAW + t, tuple(x0.shape[1:]), dtype)
    return alpha * x0.to(dtype) + sigma * z


@torch.no_grad()
def observe_training(sampler: Sampler, x0: Tensor, ids: Tensor, observe: Observe) -> None:
    """Every evaluation's network on real images with fresh noise: what training shows it. See `noised`."""
    plan = plan_of(sampler)
    predict = sampler.network(plan.times, None)
    for t, level in enumerate(levels(sampler)):
        x = noised(sampler, t, x0, ids, level)
        observe(t, x, predict(x, t).eps)


@torch.no_grad()
def late_start(sampler: Sampler, schedule: Schedule, t: int, x0: Tensor, ids: Tensor) -> Tensor:
    """Images uint8 [B, C, H, W] of sampling that starts at evaluation t, with the state of a real image there.

    What it lacks of the distance that sampling from pure noise reaches is owed to the evaluations before t. x0, ids:
    as for `noised`; the steps' noise is that of the ids in `Sampler.images`.

    Raises InputError where the solver cannot start at t, NonFiniteError.
    """
    plan = plan_of(sampler)
    if plan.tail is None:
        raise InputError(
            f"sampling.solver: {sampler.sampling.solver} cannot start late; ddpm, ddim, euler, heun can"
        )
    tail = plan.tail(t)
    dtype = sampler.sampling.state_dtype
    x = tail.run(
        sampler.network(tail.times, None),
        Schedule.free(schedule.lambdas[: t + 1]),
        tail.start * noised(sampler, t, x0, ids, levels(sampler)[t]),
        lambda step: noise.normal(sampler.seed, ids, step + 1, tuple(x0.shape[1:]), dtype),
        None,
    )
    if not torch.isfinite(x).all():
        raise NonFiniteError(f"sampling from evaluation {t} on gave images that are not finite")
    return sampler.model.pixels(x)


class Norms:
    """The mean of ‖eps‖₂ over images at each evaluation; summed in float64 on the device."""

    def __init__(self, nfe: int, device: torch.device) -> None:
        self._sums = torch.zeros(nfe, dtype=torch.float64, device=device)
        self._counts = [0] * nfe

    def add(self, t: int, eps: Tensor) -> None:
        """One batch [B, C, H, W] of evaluation t."""
        self._sums[t] += eps.double().flatten(1).norm(dim=1).sum()
        self._counts[t] += len(eps)

    @property
    def means(self) -> list[float]:
        """[nfe]; waits for the device. Raises NonFiniteError."""
        means = [total / count for total, count in zip(self._sums.tolist(), self._counts, strict=True)]
        if not all(map(_finite, means)):
            raise NonFiniteError("the network predicted noise that is not finite")
        return means


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
