"""The solvers: from a noisy state to an image, in plain functions over a grid.

They know nothing of λ, checkpoints, labels or how random numbers are made. A solver that needs another prior
(its start is the caller's) or another step is another function here. Numbers that depend on the grid alone
are float64 on the host before the loop and enter it as Python floats, which take the state's dtype; nothing
in a loop waits for the device. What a step does to every element is a function of its own, one kernel on a GPU.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from samplers.compiling import fused
from samplers.errors import InputError
from samplers.grids import DiscreteGrid, SigmaGrid
from samplers.guidance import Gradient
from samplers.prediction import Predict, Prediction

Noise = Callable[[int], Tensor]
"""noise(t): standard normal numbers of the state's shape, dtype and device for the step whose first
evaluation is t. Asked at most once per step, and not at all where the step adds no noise: it must not depend
on the other calls."""

Variance = Literal["fixed_small", "fixed_large", "learned_range"]


@torch.no_grad()
def ddpm(
    predict: Predict,
    x: Tensor,
    grid: DiscreteGrid,
    noise: Noise,
    *,
    variance: Variance,
    clip: bool = True,
    gradient: Gradient | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2; variances as in guided-diffusion).

    x: standard normal start [B, C, H, W], float32 as ADM has it or float64. Returns the image x0, of the same
    kind. Each step forms x0 = x/sqrt(abar) - sqrt(1/abar - 1)·eps, clamps it to [-1, 1] (clip) and draws from
    the posterior q(x_{t-1} | x_t, x0) with variance β ("fixed_large"), β(1 - abar_prev)/(1 - abar)
    ("fixed_small"), or the geometric interpolation between the two by the network's v, which is not clamped
    ("learned_range", Nichol and Dhariwal 2021). The last step adds no noise.

    gradient: classifier guidance (Dhariwal and Nichol 2021, algorithm 1), taken at the unclipped x of
    evaluation t; the mean moves by variance·gradient and x0 is not clamped again.

    Raises InputError for another variance, and for "learned_range" where the network predicts no v.
    """
    root = np.sqrt(1 / grid.abar).tolist()
    ratio = np.sqrt(1 / grid.abar - 1).tolist()
    weight_x0 = (grid.beta * np.sqrt(grid.abar_prev) / (1 - grid.abar)).tolist()
    weight_x = ((1 - grid.abar_prev) * np.sqrt(1 - grid.beta) / (1 - grid.abar)).tolist()
    spread = _spread(grid, variance)
    for t in reversed(range(grid.nfe)):
        eps, v = predict(x, t)
        if variance != "learned_range":
            v = None
        elif v is None:
            raise InputError(
                "variance 'learned_range' needs a network that predicts it (learn_sigma); use fixed_large"
            )
        push = None if gradient is None else gradient(x, t)
        z = noise(t) if t > 0 else None
        x = _ancestral_step(
            x, eps, v, push, z, root[t], ratio[t], weight_x0[t], weight_x[t], *spread[t], clip
        )
    return x


@fused
def _ancestral_step(
    x: Tensor,
    eps: Tensor,
    v: Tensor | None,
    push: Tensor | None,
    z: Tensor | None,
    root: float,
    ratio: float,
    weight_x0: float,
    weight_x: float,
    low: float,
    high: float,
    clip: bool,
) -> Tensor:
    """From x_t to x_{t-1}, see `ddpm`. low, high: logarithms of the two variances that v lies between; without v the
    variance and its root."""
    x0 = root * x - ratio * eps
    if clip:
        x0 = x0.clamp(-1, 1)
    mean = weight_x0 * x0 + weight_x * x
    if z is None and push is None:  # a logarithm that is not used would be compiled for this one value of it
        return mean
    log = None
    if v is not None:
        part = (v + 1) / 2
        log = part * high + (1 - part) * low
    if push is not None:
        mean = mean + (low if log is None else log.exp()) * push
    if z is None:
        return mean
    return mean + (high if log is None else (0.5 * log).exp()) * z


def _spread(grid: DiscreteGrid, variance: Variance) -> list[tuple[float, float]]:
    """What `_ancestral_step` takes as low and high at each t."""
    posterior = grid.posterior_variance
    # At t = 0 the posterior variance is 0: guided-diffusion puts that of t = 1 where its logarithm is
    # needed, and in place of the first β of "fixed_large".
    if variance == "learned_range":
        lifted = np.append(posterior[1], posterior[1:])
        return list(zip(np.log(lifted).tolist(), np.log(grid.beta).tolist(), strict=True))
    if variance == "fixed_small":
        fixed = posterior.tolist()
    elif variance == "fixed_large":
        fixed = np.append(posterior[1], grid.beta[1:]).tolist()
    else:
        raise InputError(f"variance must be fixed_small, fixed_large or learned_range, not {variance!r}")
    return [(one, math.sqrt(one)) for one in fixed]


@torch.no_grad()
def ddim(
    predict: Predict, x: Tensor, grid: DiscreteGrid, noise: Noise, *, eta: float = 0.0, clip: bool = True
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12) as guided-diffusion has it. Returns x0 [B, C, H, W].

    x: standard normal start [B, C, H, W]. Each step forms x0 as `ddpm` does, clamps it to [-1, 1] (clip),
    takes the eps that this x0 leaves, and goes to sqrt(abar_prev)·x0 + sqrt(1 - abar_prev - sigma²)·eps +
    sigma·z, with sigma = eta·sqrt((1 - abar_prev)/(1 - abar))·sqrt(1 - abar/abar_prev). The network's v is
    ignored. Classifier guidance: give `guidance.guided` as `predict`, with clip=False here.

    Raises InputError unless 0 <= eta <= 1.
    """
    check_eta(eta)
    root = np.sqrt(1 / grid.abar).tolist()
    ratio = np.sqrt(1 / grid.abar - 1).tolist()
    share = (1 - grid.abar_prev) / (1 - grid.abar) * (1 - grid.abar / grid.abar_prev)
    sigma = (eta * np.sqrt(share)).tolist()
    weight_x0 = np.sqrt(grid.abar_prev).tolist()
    weight_eps = np.sqrt(np.maximum(1 - grid.abar_prev - eta**2 * share, 0.0)).tolist()
    for t in reversed(range(grid.nfe)):
        eps = predict(x, t).eps
        z = noise(t) if sigma[t] > 0 else None
        x = _ddim_step(x, eps, z, root[t], ratio[t], weight_x0[t], weight_eps[t], sigma[t], clip)
    return x


@fused
def _ddim_step(
    x: Tensor,
    eps: Tensor,
    z: Tensor | None,
    root: float,
    ratio: float,
    weight_x0: float,
    weight_eps: float,
    sigma: float,
    clip: bool,
) -> Tensor:
    """From x_t to x_{t-1}, see `ddim`."""
    x0 = root * x - ratio * eps
    if clip:
        x0 = x0.clamp(-1, 1)
    eps = (root * x - x0) / ratio
    x = weight_x0 * x0 + weight_eps * eps
    return x if z is None else x + sigma * z


def check_eta(eta: float) -> None:
    """Raises InputError unless 0 <= eta <= 1; for every DDIM, also those of other modules."""
    if not 0 <= eta <= 1:
        raise InputError(f"eta must lie between 0 (deterministic) and 1 (ancestral), not {eta}")


@torch.no_grad()
def edm(predict: Predict, x: Tensor, grid: SigmaGrid, noise: Noise) -> Tensor:
    """EDM's Euler and Heun samplers with churn (Karras et al. 2022, algorithms 1 and 2).

    x: the start [B, C, H, W], grid.start times standard normal numbers; float64 as EDM has it. Returns the
    image x0 [B, C, H, W]. Nothing is clamped. The prediction is eps = (x - x0)/sigma at sigma =
    grid.times[t], so for the linear schedule dx/dsigma = eps.

    With scaling "vp" the state is s·(x0 + sigma·eps), which the network must not see: give
    change_of_variables(net, grid) as `predict`. With a λ schedule S there are then two orders:
      change_of_variables(scaled(net, S), grid)  divides the network's noise, the consistent rule;
      scaled(change_of_variables(net, grid), S)  is EDM-ES's `ablation_sampler`: (s·x - x0)/sigma is divided.
    They are the same for scaling "none". That sampler also leaves Heun's corrections unscaled, which is
    S.first_stages(); EDM-ES's `edm_sampler` is scaled(net, S).
    """
    drift, gain, alpha = grid.drift.tolist(), grid.gain.tolist(), grid.alpha
    for step in grid.steps:
        t = step.t
        if step.stretch != 1:
            x = step.stretch * x
        if step.noise > 0:
            x = x + step.noise * noise(t)
        length = alpha * step.length if step.corrected else step.length
        slope, ahead = _euler_step(x, predict(x, t).eps, drift[t], gain[t], length)
        if step.corrected:
            eps = predict(ahead, t - 1).eps
            share = 1 / (2 * alpha)
            ahead = _corrected(x, slope, ahead, eps, drift[t - 1], gain[t - 1], share, step.length)
        x = ahead
    return x


@fused
def _euler_step(x: Tensor, eps: Tensor, drift: float, gain: float, length: float) -> tuple[Tensor, Tensor]:
    """The slope at x, and where it leads, see `edm`."""
    slope = drift * x + gain * eps
    return slope, x + length * slope


@fused
def _corrected(
    x: Tensor,
    slope: Tensor,
    ahead: Tensor,
    eps: Tensor,
    drift: float,
    gain: float,
    share: float,
    length: float,
) -> Tensor:
    """Where the mean of the slopes at x and ahead leads, see `edm`."""
    second = drift * ahead + gain * eps
    return x + length * ((1 - share) * slope + share * second)


def change_of_variables(predict: Predict, grid: SigmaGrid) -> Predict:
    """A prediction for the solver's state x = s·(x0 + sigma·eps) from one for x/s: both name the same x0.

    The result's eps is (x - x0)/sigma = eps + x·(1 - 1/s)/sigma, what `edm` expects; x is not divided by s in
    it, as in EDM-ES. See `edm` for the two orders in which this and `scaling.scaled` combine. Without scaling
    it changes nothing.
    """
    if (grid.scale == 1).all():
        return predict
    inverse = (1 / grid.scale).tolist()
    shift = ((1 - 1 / grid.scale) / grid.times).tolist()

    def predict_moved(x: Tensor, t: int) -> Prediction:
        eps, v = predict(inverse[t] * x, t)
        return Prediction(eps + shift[t] * x, v)

    return predict_moved
