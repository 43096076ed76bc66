"""What a network says at one evaluation, and the way from other parametrisations to predicted noise.

Knows nothing of which network, solver or schedule is used.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from samplers.errors import InputError


class Prediction(NamedTuple):
    """A network's answer for a batch x of shape [B, C, H, W].

    eps: the predicted noise, shape and dtype of x.
    v: where the network learned the range of the variance, its raw interpolation value (nominally -1 .. 1,
    not clamped), shape and dtype of x; None otherwise.
    """

    eps: Tensor
    v: Tensor | None = None


Predict = Callable[[Tensor, int], Prediction]
"""predict(x, t): the prediction for the state x [B, C, H, W] at network evaluation t (t = 0 is the last
one)."""


def to_epsilon(kind: str, output: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The noise eps that a network's output implies, where x = alpha·x0 + sigma·eps.

    kind says what `output` is: "epsilon"; "x0", the clean image; "v" = (alpha·eps - sigma·x0)/sqrt(alpha² +
    sigma²), the velocity of Salimans and Ho (2022) in the variance-preserving case. Variance-preserving
    processes have alpha² + sigma² = 1, variance-exploding ones (EDM) alpha = 1. sigma > 0. Shapes and dtype
    are those of x.

    Raises InputError for another kind.
    """
    assert sigma > 0, sigma
    if kind == "epsilon":
        return output
    if kind == "x0":
        return (x - alpha * output) / sigma
    if kind == "v":
        square = alpha * alpha + sigma * sigma
        return (sigma / square) * x + (alpha / math.sqrt(square)) * output
    raise InputError(f"a network predicts 'epsilon', 'x0' or 'v', not {kind!r}")
