"""How EDM makes a denoiser of a network F: D(x, sigma) = c_skip·x + c_out·F(c_in·x, c_noise).

Karras et al. 2022, table 1, with the noise levels of each as NVlabs/edm has them. All numbers are float32, as in the
official code, because what rounding does to them is part of what its networks were trained with. Knows nothing of
networks, files or sampling.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


class Coefficients(NamedTuple):
    """The four factors at one noise level, as float32 numbers."""

    skip: float
    out: float
    scale_in: float
    noise: float


class Preconditioning(Protocol):
    """One row of the table."""

    def coefficients(self, sigma: float) -> Coefficients:
        """The factors at sigma > 0."""


@dataclass(frozen=True, slots=True)
class Edm:
    """c_skip and c_out keep the variances of F's input and target at 1; c_noise = ln(sigma)/4."""

    sigma_data: float

    def coefficients(self, sigma: float) -> Coefficients:
        """See `Preconditioning`."""
        s, data = _single(sigma), self.sigma_data
        total = s.square() + data**2
        return _numbers(data**2 / total, s * data / total.sqrt(), 1 / total.sqrt(), s.log() / 4)


@dataclass(frozen=True, slots=True)
class Vp:
    """DDPM++'s: c_noise = (steps - 1)·t with sigma(t) = sqrt(exp(β_d·t²/2 + β_min·t) - 1)."""

    beta_d: float
    beta_min: float
    steps: float

    def coefficients(self, sigma: float) -> Coefficients:
        """See `Preconditioning`."""
        s = _single(sigma)
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + s.square()).log()).sqrt()
        time = (root - self.beta_min) / self.beta_d
        return _numbers(1.0, -s, 1 / (s.square() + 1).sqrt(), (self.steps - 1) * time)


@dataclass(frozen=True, slots=True)
class Ve:
    """NCSN++'s: c_noise = ln(sigma/2)."""

    def coefficients(self, sigma: float) -> Coefficients:
        """See `Preconditioning`."""
        s = _single(sigma)
        return _numbers(1.0, s, 1.0, (0.5 * s).log())


@dataclass(frozen=True, slots=True, eq=False)
class Iddpm:
    """Improved DDPM's: the network knows `levels` [steps + 1] only, falling to 0; c_noise = steps - 1 - index."""

    levels: Tensor

    def coefficients(self, sigma: float) -> Coefficients:
        """See `Preconditioning`; c_noise is that of the nearest level."""
        s = _single(sigma)
        noise = len(self.levels) - 2 - int(self._nearest(s.reshape(1)))
        return _numbers(1.0, -s, 1 / (s.square() + 1).sqrt(), float(noise))

    def round_sigma(self, sigma: Floats) -> Floats:
        """The nearest levels, float64 [n]."""
        nearest = self._nearest(torch.from_numpy(sigma).float())
        return self.levels[nearest].double().numpy()

    def _nearest(self, sigma: Tensor) -> Tensor:
        # cdist squares and subtracts in float32, so it decides near-ties its own way; so does the official code.
        return torch.cdist(sigma.reshape(1, -1, 1), self.levels.reshape(1, -1, 1)).argmin(2)[0]


def _single(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float32, device="cpu")


def _numbers(*values: Tensor | float) -> Coefficients:
    return Coefficients(*(float(value) for value in values))
