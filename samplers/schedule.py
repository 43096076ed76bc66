"""The epsilon-scaling schedule λ_t as a value: uniform, linear, linear with its sum kept, or a free list.

Knows nothing of networks, grids, solvers or tensors; what divides by λ_t is `samplers.scaling`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from samplers.errors import InputError


@dataclass(frozen=True, slots=True)
class Schedule:
    """One λ per network evaluation; lambdas[t] divides the noise predicted at evaluation t.

    t counts evaluations from the end of sampling: t = 0 is the last (cleanest) one, t = nfe - 1 the first
    (noisiest). λ_t = k·t + b where `k` and `b` are given; both are None for a free list.

    Raises InputError unless every λ is finite and > 0, and unless k and b (if given) describe the list.
    """

    lambdas: tuple[float, ...]
    k: float | None = None
    b: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lambdas", tuple(float(value) for value in self.lambdas))
        if not self.lambdas:
            raise InputError("a schedule needs one λ per network evaluation, but the list is empty")
        for t, value in enumerate(self.lambdas):
            if not math.isfinite(value) or value <= 0:
                raise InputError(
                    f"λ at evaluation {t} is {value}: every λ must be finite and above 0; "
                    f"choose b nearer to 1 or k nearer to 0"
                )
        if (self.k is None) != (self.b is None):
            raise InputError("a schedule has both k and b (a line) or neither (a free list)")
        if self.k is not None and self.b is not None:
            for t, value in enumerate(self.lambdas):
                if abs(value - (self.k * t + self.b)) > 1e-9:
                    raise InputError(f"λ at evaluation {t} is {value}, not k·t + b = {self.k * t + self.b}")

    @classmethod
    def uniform(cls, nfe: int, b: float) -> Self:
        """λ_t = b at each of `nfe` evaluations."""
        return cls.linear(nfe, 0.0, b)

    @classmethod
    def linear(cls, nfe: int, k: float, b: float) -> Self:
        """λ_t = k·t + b for t = 0 .. nfe - 1."""
        k, b = float(k), float(b)
        return cls(tuple(k * t + b for t in range(nfe)), k, b)

    @classmethod
    def constrained(cls, nfe: int, mean: float, k: float) -> Self:
        """The line of slope k whose λ sum to nfe·mean, as those of uniform(nfe, mean) do.

        b = mean - k·(nfe - 1)/2 (the paper's linear schedule), to 12 decimals, so that it prints as people write it.
        """
        return cls.linear(nfe, k, round(mean - k * (nfe - 1) / 2, 12))

    @classmethod
    def free(cls, lambdas: Iterable[float]) -> Self:
        """Any list, lambdas[0] for the last (cleanest) evaluation."""
        return cls(tuple(lambdas))

    @property
    def nfe(self) -> int:
        """The number of network evaluations."""
        return len(self.lambdas)

    @property
    def mean(self) -> float:
        """The mean λ."""
        return math.fsum(self.lambdas) / self.nfe

    def first_stages(self) -> Self:
        """The same λ where Heun predicts, 1 where it corrects (the odd t), for an odd nfe.

        EDM-ES's `ablation_sampler` scales like this; its `edm_sampler` and the paper scale both stages.
        """
        if self.nfe % 2 == 0:
            raise InputError(f"Heun's method has an odd number of evaluations, not {self.nfe}")
        return self.free(1.0 if t % 2 else value for t, value in enumerate(self.lambdas))
