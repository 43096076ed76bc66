"""What a network must offer to be sampled from, whatever family its checkpoint belongs to.

Knows nothing of files, solvers or lambda: a model predicts the noise in one state at one time, no more.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplers.prediction import Prediction

Variance: TypeAlias = Literal["fixed_small", "fixed_large", "learned_range"]
"""Which variance an ancestral step takes, in the terms of guided-diffusion."""

Prior: TypeAlias = Callable[[int, Tensor], Tensor]
"""(seed, image ids int64 [B]) → the state at the first noise level, float64 [B, C, H, W] on the ids' device.

A pure function of the two, as all of `samplers.noise` is.
"""

Gradient: TypeAlias = Callable[[Tensor, float, Tensor], Tensor]
"""(x, time, labels) → scale * d/dx log p(labels | x, time), of x's shape and dtype."""


class Model(Protocol):
    """A denoising network of x = alpha * x0 + sigma * eps behind one call."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of the state that is sampled."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W of what `pixels` returns; differs from `shape` where the state is a latent."""

    @property
    def time(self) -> Literal["discrete", "sigma"]:
        """What `time` means in a call: a training step's index 0..T0-1, or sigma where alpha = 1."""

    @property
    def num_classes(self) -> int | None:
        """Labels run from 0 to this minus 1; None: the model takes no labels."""

    @property
    def variance(self) -> Variance:
        """The variance to take where the job asks for no other; sigma models have no use for it."""

    @property
    def learned_range(self) -> bool:
        """True when every prediction brings `v`, the interpolation between the two log-variances."""

    @property
    def betas(self) -> NDArray[np.float64] | None:
        """The training betas (discrete time), else None."""

    @property
    def sigma_range(self) -> tuple[float, float] | None:
        """Smallest and largest sigma of the training (sigma time), else None."""

    @property
    def round_sigma(self) -> Callable[[NDArray[np.float64]], NDArray[np.float64]] | None:
        """Sigmas [n] → the nearest ones that the network knows; None: it knows all of its range."""

    @property
    def prior(self) -> Prior | None:
        """Where sampling starts; None: at standard normal noise times what the solver's grid says."""

    @property
    def gradient(self) -> Gradient | None:
        """Classifier guidance that came with the model, already multiplied by its scale; None:
        there is none."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that decides what the model predicts: weights and options."""

    def to(self, device: torch.device) -> Self:
        """Move to the device, in place; returns itself."""

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        """The noise in x.

        x: [B, C, H, W] float32 or float64; labels: int64 [B] where the model has classes, ignored elsewhere.
        `time` is one for the whole batch. The result has x's shape and dtype. Nothing waits for the device.
        """

    def pixels(self, x: Tensor) -> Tensor:
        """The final state [B, *shape] as uint8 [B, *image_shape], rounded as the family does it."""


@runtime_checkable
class Converting(Protocol):
    """What a discrete-time model adds whose network may answer in another form than noise.

    For solvers that work at noise levels between the training timesteps, where each interpolates in its own way.
    """

    @property
    def answers(self) -> Literal["epsilon", "x0", "v"]:
        """The form of the network's answer, see `samplers.prediction.to_epsilon`."""

    def level(self, time: float) -> tuple[float, float]:
        """alpha and sigma with which an answer at `time`, possibly fractional, is converted to noise."""


@runtime_checkable
class BringsScheduler(Protocol):
    """What a model adds that was stored together with a scheduler of diffusers."""

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The content of its scheduler_config.json."""
