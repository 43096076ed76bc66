"""How much each image moves the Fréchet distance: its influence function, from which error bars follow.

The distance is a function of a mean and a covariance, so to first order the distance of n images is a constant plus
the mean of n independent numbers: ψ_i, the derivative of the distance in the direction of image i (Hampel's
influence function; Efron's infinitesimal jackknife). Their spread is the error bar of one distance. Under common
random numbers image i of two schedules share their noise, and the spread of ψ_i − ψ'_i is the error bar of the
difference: see `objectives.paired`.

Knows nothing of λ, trials or databases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from objectives.frechet import FrechetReference, Gaussian
from objectives.moments import Moments

_RANK = 1e-10  # eigenvalues below this share of the largest are those of a rank-deficient covariance


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivity:
    """The derivative of the distance d² at one Gaussian of generated features; float64, on one device.

    mean [D]: where it was taken. slope [D]: ∂d²/∂μ = 2(μg − μr). curve [D, D]: ∂d²/∂Σg = 1 − T, where
    T = Σr^½ (Σr^½ Σg Σr^½)^−½ Σr^½ is the optimal transport from Σg to Σr. offset: tr(curve·Σg) of the covariance
    with 1/n, so that the influences of the images behind `mean` sum to 0.
    """

    mean: Tensor
    slope: Tensor
    curve: Tensor
    offset: float

    @classmethod
    def of(cls, reference: FrechetReference, moments: Moments) -> Sensitivity:
        """At the moments of generated images (at least 2), brought to the reference's device.

        One symmetric eigendecomposition of [D, D]. Where Σg has no full rank (n ≤ D) its pseudo-inverse serves: the
        images that it was made of have no part outside of its range. Raises NonFiniteError as the distance does.
        """
        real = reference.gaussian
        generated = Gaussian.of(moments).to(real.mean.device)
        root = reference.root
        product = root @ generated.cov @ root
        values, vectors = torch.linalg.eigh((product + product.T) / 2)
        kept = values > _RANK * values[-1]
        inverse = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
        half = (root @ vectors) * inverse.sqrt()
        curve = torch.eye(len(root), dtype=root.dtype, device=root.device) - half @ half.T
        offset = float((curve * generated.cov).sum()) * (moments.n - 1) / moments.n
        return cls(generated.mean, 2 * (generated.mean - real.mean), curve, offset)

    def influences(self, features: Tensor) -> Tensor:
        """ψ of each image, [N] float64 in units of the distance, from its features [N, D] on the same device."""
        centred = features.to(torch.float64) - self.mean
        return centred @ self.slope + (centred @ self.curve * centred).sum(1) - self.offset
