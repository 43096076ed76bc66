"""DDIM of latent diffusion (Rombach et al. 2022): its noise schedule, timesteps and conventions, which differ
from guided-diffusion's, and classifier-free guidance as its sampler applies it.

Knows nothing of λ, checkpoints, decoders or what the latents stand for.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from samplers.errors import InputError
from samplers.grids import Floats, Timesteps
from samplers.prediction import Predict, Prediction
from samplers.solvers import Noise, check_eta


def latent_betas(linear_start: float, linear_end: float, steps: int = 1000) -> Floats:
    """The noise variances β of training, float64 [steps]: squares of equally spaced numbers from sqrt(linear_start)
    to sqrt(linear_end). LDM calls this schedule "linear", diffusers "scaled_linear".

    Raises InputError unless both ends lie between 0 and 1, and for fewer than 2 steps.
    """
    if not (0 < linear_start < 1 and 0 < linear_end < 1):
        raise InputError(
            f"linear_start and linear_end must lie between 0 and 1, not {linear_start} and {linear_end}"
        )
    if steps < 2:
        raise InputError(f"the noise schedule needs at least 2 timesteps, not {steps}")
    return np.asarray(np.linspace(linear_start**0.5, linear_end**0.5, steps) ** 2)


@dataclass(frozen=True, slots=True, eq=False)
class LatentGrid(Timesteps):
    """The visited timesteps, from 1 on. Arrays are [nfe], indexed by evaluation t, and read-only.

    abar: Π(1 - β) at the timestep. abar_prev: that of evaluation t - 1; at t = 0 that of timestep 0, not 1: sampling
    ends with a trace of noise.
    """

    abar: Floats
    abar_prev: Floats
    spread: Floats = field(init=False)

    def __post_init__(self) -> None:
        assert self.timestep.shape == self.abar.shape == self.abar_prev.shape, "one abar per timestep"
        assert ((self.abar < 1) & (self.abar <= self.abar_prev)).all(), "abar falls with the timestep"
        share = (1 - self.abar_prev) / (1 - self.abar) * (1 - self.abar / self.abar_prev)
        object.__setattr__(self, "spread", np.sqrt(share))
        for array in (self.timestep, self.abar, self.abar_prev, self.spread):
            array.setflags(write=False)


def latent_grid(betas: Floats, steps: int) -> LatentGrid:
    """The grid that LDM makes for `steps` (its `ddim_steps`, S) of a network trained with `betas` (float64 [N]).

    Every (N // S)-th timestep from 1 on, so there are more than S of them where S does not divide N: see `nfe`
    of the result. abar is rounded to float32, as LDM keeps it.

    Raises InputError for a β outside (0, 1), and, naming steps that work, where the last timestep would be N,
    which does not exist (with N = 1000: S = 3, 9, 27, 36, 37, 101 to 111, 251 to 333, and all above 500).
    """
    if not ((betas > 0) & (betas < 1)).all():
        raise InputError("every β of the noise schedule must lie between 0 and 1")
    if not _fits(steps, len(betas)):
        working = [s for s in range(1, len(betas)) if _fits(s, len(betas))]
        near = [s for s in working if s < steps][-2:] + [s for s in working if s > steps][:2]
        raise InputError(
            f"LDM's DDIM cannot take {steps} steps through {len(betas)} timesteps; "
            f"near it {', '.join(map(str, near))} work"
        )
    abar = np.cumprod(1 - betas).astype(np.float32).astype(np.float64)
    timestep = np.arange(0, len(betas), len(betas) // steps) + 1
    return LatentGrid(timestep, abar[timestep], np.append(abar[0], abar[timestep[:-1]]))


def _fits(steps: int, total: int) -> bool:
    return 1 <= steps <= total and range(0, total, total // steps)[-1] + 1 < total


@torch.no_grad()
def ddim(
    predict: Predict,
    x: Tensor,
    grid: LatentGrid,
    noise: Noise,
    *,
    eta: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """LDM's DDIM. Returns the latents [B, C, H, W] of the last step, which still hold noise if eta > 0.

    x: standard normal start [B, C, H, W], float32 as LDM has it or float64. Each step forms x0 = (x -
    sqrt(1 - abar)·eps)/sqrt(abar), clamps nothing, and goes to sqrt(abar_prev)·x0 + sqrt(1 - abar_prev -
    sigma²)·eps + temperature·sigma·z with sigma = eta·grid.spread, in the last step too.

    Raises InputError unless 0 <= eta <= 1 and temperature is finite and >= 0.
    """
    check_eta(eta)
    check_temperature(temperature)
    root, ratio = np.sqrt(1 / grid.abar).tolist(), np.sqrt(1 - grid.abar).tolist()
    weight_x0 = np.sqrt(grid.abar_prev).tolist()
    sigma = eta * grid.spread
    weight_eps = np.sqrt(np.maximum(1 - grid.abar_prev - sigma**2, 0.0)).tolist()
    deviation = (temperature * sigma).tolist()
    for t in reversed(range(grid.nfe)):
        eps = predict(x, t).eps
        x0 = root[t] * (x - ratio[t] * eps)
        x = weight_x0[t] * x0 + weight_eps[t] * eps
        if deviation[t] > 0:
            x = x + deviation[t] * noise(t)
    return x


def check_temperature(temperature: float) -> None:
    """Raises InputError unless it is finite and at least 0."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be finite and at least 0, not {temperature}")


def classifier_free(predict: Predict, scale: float) -> Predict:
    """Classifier-free guidance (Ho and Salimans 2022): eps_u + scale·(eps_c - eps_u) in one call of the network.

    predict takes the batch twice, [2B, C, H, W], the first half without condition and the second with it. The
    result takes [B, C, H, W]; its v is that of the second half. scale 1 is the conditional prediction itself.

    Epsilon scaling comes after guidance: scaled(classifier_free(net, g), schedule) divides the guided noise,
    which is what reaches the solver. The rule is linear, so dividing both halves first is the same.

    Raises InputError unless scale is finite.
    """
    if not math.isfinite(scale):
        raise InputError(f"the guidance scale must be finite, not {scale}")

    def predict_guided(x: Tensor, t: int) -> Prediction:
        eps, v = predict(torch.cat([x, x]), t)
        without, given = eps.chunk(2)
        return Prediction(without + scale * (given - without), None if v is None else v.chunk(2)[1])

    return predict_guided
