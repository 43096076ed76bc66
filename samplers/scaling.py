"""Epsilon scaling: the only place where predicted noise is divided by λ_t.

Knows nothing of where the prediction comes from or what a solver does with it.
"""

from torch import Tensor

from samplers.prediction import Predict, Prediction
from samplers.schedule import Schedule


def scaled(predict: Predict, schedule: Schedule) -> Predict:
    """The same prediction with eps_t / λ_t in place of eps_t (Ning et al., ICLR 2024); v is left alone.

    It acts on eps, before x0 is formed and before any clipping. λ = 1 changes no bit. A network that predicts
    x0 or v is scaled through the eps that it implies (the ADM code leaves x0 networks unscaled).

    The schedule must have as many λ as the solver makes evaluations: t beyond it is an IndexError.
    """
    lambdas = schedule.lambdas

    def predict_scaled(x: Tensor, t: int) -> Prediction:
        eps, v = predict(x, t)
        return Prediction(eps / lambdas[t], v)

    return predict_scaled
