"""The distance between the states of sampling and those of training: the exposure bias δ_t (Ning et al., ICLR 2024).

The paper looks at the distributions of x_t in the forward process and of x̂_t in sampling through their first two
moments. So does this: δ_t is the squared Fréchet distance of the two Gaussians with these moments, 0 where sampling
meets the states that the network was trained on. Knows nothing of networks, solvers or images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from objectives.frechet import FrechetReference, Gaussian
from objectives.moments import Moments
from samplers.errors import NonFiniteError

Form = Literal["full", "diagonal"]

# Covariances [D, D] in float64, one per evaluation: 134 MB each at this D, and some seconds per eigendecomposition.
_FULL_UP_TO = 4096


def form(dim: int) -> Form:
    """Which moments are kept of states of so many values: means and covariances, or for more than 4,096 values means
    and variances only. The diagonal form does not see how values vary together; it never exceeds the full one by more
    than rounding."""
    return "full" if dim <= _FULL_UP_TO else "diagonal"


@dataclass(frozen=True, slots=True, eq=False)
class Variances:
    """n, Σx and Σx² of n states of D values, in float64 on one device; they add up like `Moments`."""

    n: int
    sum: Tensor
    squares: Tensor

    @classmethod
    def of(cls, states: Tensor) -> Variances:
        """Of states [N, D]."""
        x = states.double()
        return cls(len(x), x.sum(0), x.square().sum(0))

    def __add__(self, other: Variances) -> Variances:
        return Variances(self.n + other.n, self.sum + other.sum, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        """[D]."""
        return self.sum / self.n

    @property
    def var(self) -> Tensor:
        """[D], with n - 1."""
        return ((self.squares - self.n * self.mean.square()) / (self.n - 1)).clamp(min=0)


class StateSums:
    """The moments of the states at each evaluation, added up batch by batch on their device.

    Costs N·D² multiplications in float64 per evaluation in the full form (N images, D values), N·D in the diagonal.
    """

    def __init__(self, nfe: int, dim: int) -> None:
        self._kind = Moments if form(dim) == "full" else Variances
        self._sums: list[Moments | Variances | None] = [None] * nfe

    def add(self, t: int, x: Tensor) -> None:
        """One batch [B, C, H, W] of evaluation t."""
        new, old = self._kind.of(x.flatten(1)), self._sums[t]
        self._sums[t] = new if old is None else old + new  # type: ignore[operator]  # of one kind

    def __getitem__(self, t: int) -> Moments | Variances:
        sums = self._sums[t]
        assert sums is not None, f"no state of evaluation {t} was added"
        return sums


class ForwardProcess:
    """The moments of x_t = alpha·x0 + sigma·eps, which follow from those of the real images x0: mean alpha·μ and
    covariance alpha²·Σ + sigma²·I. No noise is drawn, so this side of the distance has none."""

    def __init__(self, real: Moments | Variances) -> None:
        self._real = real
        if isinstance(real, Moments):
            self._cov = real.cov
            values, self._vectors = torch.linalg.eigh(self._cov)
            self._values = values.clamp(min=0)

    def distance(self, alpha: float, sigma: float, states: Moments | Variances) -> float:
        """δ_t: the squared Fréchet distance of the states (at least 2) at the level alpha, sigma.

        Raises NonFiniteError. Of N states it is too large by what N states of the forward process itself would have,
        about D²/(4N)·sigma² in the full form for N > D; `StateSums` of such states give that floor.
        """
        mean = alpha * self._real.mean
        if isinstance(states, Moments):
            assert isinstance(self._real, Moments)
            eye = torch.eye(states.dim, dtype=torch.float64, device=mean.device)
            spread = (alpha**2 * self._values + sigma**2).sqrt()
            root = (self._vectors * spread) @ self._vectors.T  # one decomposition serves all levels
            return FrechetReference(Gaussian(mean, alpha**2 * self._cov + sigma**2 * eye), root).distance(
                states
            )
        assert isinstance(self._real, Variances)
        there = (alpha**2 * self._real.var + sigma**2).sqrt()
        distance = float((mean - states.mean).square().sum() + (there - states.var.sqrt()).square().sum())
        if not abs(distance) < float("inf"):
            raise NonFiniteError("the states of sampling are not finite")
        return distance


def deltas(forward: ForwardProcess, levels: Sequence[tuple[float, float]], states: StateSums) -> list[float]:
    """δ_t at each evaluation; levels[t]: alpha and sigma there."""
    return [forward.distance(alpha, sigma, states[t]) for t, (alpha, sigma) in enumerate(levels)]
