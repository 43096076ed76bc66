"""The noising process a model was trained on: which times there are, alpha and sigma at a time, pixel
rounding.

Knows nothing of networks and of sampling grids: which times are visited is `samplers.grids`' matter.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplers.errors import InputError
from samplers.grids import training_betas

TimeKind = Literal["discrete", "sigma"]


@dataclass(frozen=True, eq=False, slots=True)
class Process:
    """x = alpha * x0 + sigma * eps.

    Discrete (`betas` given, length T0): alpha² = abar and sigma² = 1 - abar at the training index 0..T0-1.
    Sigma (`sigma_range` given, 0 <= min < max, max may be infinite): alpha = 1 and the time is sigma itself.
    Exactly one of the two is given.
    """

    betas: NDArray[np.float64] | None = None
    sigma_range: tuple[float, float] | None = None
    _abar: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        assert (self.betas is None) != (self.sigma_range is None)
        if self.sigma_range is not None and not 0 <= self.sigma_range[0] < self.sigma_range[1]:
            low, high = self.sigma_range
            raise InputError(
                f"0 <= sigma_min < sigma_max is needed, not sigma_min {low} and sigma_max {high}"
            )
        object.__setattr__(
            self, "_abar", np.cumprod(1 - self.betas) if self.betas is not None else np.ones(0)
        )

    @classmethod
    def of(
        cls, time: TimeKind, noise_schedule: str, diffusion_steps: int, sigma_min: float, sigma_max: float
    ) -> "Process":
        """The process that options name: the first two count for discrete time, the last two for
        sigma time."""
        if time == "sigma":
            return cls(sigma_range=(sigma_min, sigma_max))
        return cls(betas=training_betas(noise_schedule, diffusion_steps))

    @property
    def time(self) -> TimeKind:
        """What a time means here."""
        return "sigma" if self.betas is None else "discrete"

    def coefficients(self, time: float) -> tuple[float, float]:
        """alpha and sigma at a time; for discrete time the index, 0 <= time <= T0 - 1.

        Between two indices log(sigma/alpha) is interpolated linearly.
        """
        if self.betas is None:
            return 1.0, time
        low = int(time)
        abar = float(self._abar[low])
        if low != time:
            low_odds, high_odds = (1 / self._abar[k] - 1 for k in (low, low + 1))  # (sigma/alpha)²
            abar = float(1 / (1 + low_odds * (high_odds / low_odds) ** (time - low)))
        return abar**0.5, (1 - abar) ** 0.5

    def pixels(self, x: Tensor) -> Tensor:
        """[-1, 1] → uint8 as ADM (discrete: (x+1)*127.5) or EDM (sigma: x*127.5+128) does: clamped to 0..255,
        and the fraction dropped."""
        scaled = (x + 1) * 127.5 if self.time == "discrete" else x * 127.5 + 128
        return scaled.clamp(0, 255).to(torch.uint8)
