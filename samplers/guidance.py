"""Classifier guidance in the form that DDIM needs: a gradient folded into the predicted noise.

Knows nothing of classifiers or scaling. Ancestral sampling takes the gradient itself (`solvers.ddpm`).
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from samplers.grids import DiscreteGrid
from samplers.prediction import Predict, Prediction

Gradient = Callable[[Tensor, int], Tensor]
"""gradient(x, t): classifier scale times d/dx log p(y | x, t) at the state x of evaluation t, shape and dtype
of x."""


def guided(predict: Predict, gradient: Gradient, grid: DiscreteGrid, *, clip: bool = True) -> Predict:
    """Score conditioning (Dhariwal and Nichol 2021, algorithm 2): eps' - sqrt(1 - abar)·gradient(x, t).

    eps' is the noise that the image x0 implied by `predict` leaves after x0 is clamped to [-1, 1]
    (clip=True). Give the result to `solvers.ddim` with clip=False, because x0 is not clamped a second time.

    With a schedule S there are two orders:
      guided(scaled(net, S), g, grid)             scales the network's noise once, the sane variant;
      scaled(guided(scaled(net, S), g, grid), S)  is ADM-ES, which divides the guided noise again.
    """
    root = np.sqrt(1 / grid.abar).tolist()
    ratio = np.sqrt(1 / grid.abar - 1).tolist()
    spread = np.sqrt(1 - grid.abar).tolist()

    def predict_guided(x: Tensor, t: int) -> Prediction:
        eps, v = predict(x, t)
        if clip:
            x0 = (root[t] * x - ratio[t] * eps).clamp(-1, 1)
            eps = (root[t] * x - x0) / ratio[t]
        return Prediction(eps - spread[t] * gradient(x, t), v)

    return predict_guided
