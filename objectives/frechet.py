"""The Fréchet distance of two Gaussians in feature space, in float64 on whatever device its inputs are.

Knows nothing of images, of extractors, or of where a mean and a covariance come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from objectives.moments import Moments
from samplers.errors import NonFiniteError


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """Mean [D] and covariance [D, D] (symmetric, positive semi-definite), float64 on one device.

    Raises NonFiniteError for NaN or infinite entries.
    """

    mean: Tensor
    cov: Tensor

    def __post_init__(self) -> None:
        assert self.mean.dtype == self.cov.dtype == torch.float64
        assert self.mean.ndim == 1
        assert self.cov.shape == (len(self.mean), len(self.mean))
        assert self.mean.device == self.cov.device
        for name, values in (("mean", self.mean), ("covariance", self.cov)):
            bad = values.numel() - int(values.isfinite().sum())
            if bad:
                raise NonFiniteError(
                    f"the {name} of the features has {bad} NaN or infinite entries out of {values.numel()}: "
                    "check the images (a diverged sampler) and the feature extractor"
                )

    @classmethod
    def of(cls, moments: Moments) -> Gaussian:
        """The Gaussian with the mean and the unbiased covariance of `moments` (at least 2 images)."""
        return cls(moments.mean, moments.cov)

    def to(self, device: torch.device | str) -> Gaussian:
        """The same Gaussian on `device`."""
        return Gaussian(self.mean.to(device), self.cov.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class FrechetReference:
    """The real data's side of the distance, with the square root Σr^½ that every distance to it needs.

    `root` is [D, D], float64, on the device of `gaussian`. Make one with `of`, once for each reference and
    device.
    """

    gaussian: Gaussian
    root: Tensor

    @classmethod
    def of(cls, gaussian: Gaussian) -> FrechetReference:
        """Computes Σr^½ by one symmetric eigendecomposition on the device of `gaussian`."""
        values, vectors = torch.linalg.eigh(gaussian.cov)
        # Rounding leaves tiny negative eigenvalues where the covariance is rank-deficient.
        return cls(gaussian, (vectors * values.clamp(min=0).sqrt()) @ vectors.T)

    def distance(self, other: Gaussian | Moments) -> float:
        """The squared Fréchet distance d² between the reference and `other`, which is brought to this device.

        d² = |μr − μg|² + tr Σr + tr Σg − 2 tr (Σr^½ Σg Σr^½)^½   (Dowson, Landau 1982; FID for Inception)

        The symmetric form has the eigenvalues of ΣrΣg, but real ones: no complex square roots. Rounding
        leaves an error of about 1e-12·tr Σr, and 1e-7·tr Σr for rank-deficient covariances (n ≤ D), so equal
        Gaussians may be at a tiny negative distance. Raises NonFiniteError for NaN or infinite moments.
        """
        real = self.gaussian
        generated = (Gaussian.of(other) if isinstance(other, Moments) else other).to(real.mean.device)
        assert generated.mean.shape == real.mean.shape, f"{generated.mean.shape} against {real.mean.shape}"
        product = self.root @ generated.cov @ self.root
        overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
        shift = (real.mean - generated.mean).square().sum()
        return float(shift + real.cov.trace() + generated.cov.trace() - 2 * overlap)
