"""What a search may minimise in place of the Fréchet distance: a metric as a loss, and what each image adds to it.

Which way a metric is better is decided here and nowhere else: a loss is better when it is less, as a distance is.

The influence of image i is its jackknife value (n − 1)·(loss − loss without i), the counterpart of what
`objectives.influence` has for the Fréchet distance, and error bars follow from it in the same way. That is exact where
the loss is a mean over images (precision) or a U-statistic (KID), and to first order where it is a smooth function of
means (Inception score). Recall is neither: each image changes which others are near. Its jackknife is not consistent
(error bars 1.5 to 2.9 times the spread of repetitions for 100 and 400 images, of paired differences most of all), so it
has none. The real images are held fixed, since what they err by is the same for all schedules.

Knows nothing of images, extractors or trials.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from objectives import metrics
from objectives.metrics import Generated, Real, kernel, kernel_of_itself, need, rows, within
from samplers.errors import NonFiniteError

Measured: TypeAlias = tuple[float, Tensor | None]
"""A loss, and the influence [N] of each generated image on it, float64 with the sum 0; None where it has none."""


@dataclass(frozen=True, slots=True)
class Loss:
    """label: what is minimised, as people write it. error_bars: whether it has influences."""

    label: str
    of: Callable[[Generated, Real | None], Measured]
    error_bars: bool = True


def kid(generated: Generated, real: Real | None) -> Measured:
    """The unbiased squared maximum mean discrepancy of all images, which the subsets of `metrics.kid` estimate.

    With the sums r_i of the kernel of image i with the other ones and c_i with the M real ones, it is
    mean(r)/(N − 1) − 2·mean(c)/M plus what the real images have among themselves.
    """
    assert real is not None
    x, y = generated.features.double(), real.features.double()
    n, m = len(x), len(y)
    need(n, 3, "kid")
    others = torch.cat([kernel(part, x).sum(1) for part in rows(x, x)])
    others -= kernel_of_itself(x)
    across = torch.cat([kernel(part, y).sum(1) for part in rows(x, y)])
    loss = others.mean() / (n - 1) - 2 * across.mean() / m + real.within
    return float(loss), _centred(2 * others / (n - 2) - 2 * across / m)


def precision(generated: Generated, real: Real | None) -> Measured:
    """1 − `metrics.precision`: the share of generated images that lie near no real one."""
    assert real is not None
    missed = 1 - within(generated.features, real.features, real.radii)
    return float(missed.mean()), _centred(missed)


def recall(generated: Generated, real: Real | None) -> Measured:
    """1 − `metrics.recall`: the share of real images that lie near no generated one. It has no influences."""
    assert real is not None
    return 1 - metrics.recall(generated, real), None


def inception_score(generated: Generated, _: Real | None) -> Measured:
    """1 / Inception score, of all images as one split, which has less bias than the ten of `metrics.inception_score`.

    ln of the score is the mean of KL(p(y|x_i) ‖ p(y)), whose derivative in the direction of image i is its own term
    less the mean: what it moves p(y) by cancels.
    """
    assert generated.logits is not None
    logs = generated.logits.double().log_softmax(1)
    shares = logs.exp()
    overall = shares.mean(0).clamp(
        min=torch.finfo(shares.dtype).tiny
    )  # a class that no image is of adds nothing
    terms = (shares * (logs - overall.log())).sum(1)
    loss = (-terms.mean()).exp()
    return float(loss), _centred(-loss * terms)


LOSSES: Mapping[str, Loss] = {
    "kid": Loss("KID", kid),
    "precision": Loss("1 − precision", precision),
    "recall": Loss("1 − recall", recall, error_bars=False),
    "inception_score": Loss("1 / Inception score", inception_score),
}
"""By the name of the metric."""


def measure(name: str, generated: Generated, real: Real | None) -> Measured:
    """One of LOSSES; `metrics.check` has accepted its name for what is given here.

    Raises InputError for too few images, NonFiniteError where the loss is NaN or infinite.
    """
    loss, influences = LOSSES[name].of(generated, real)
    if not math.isfinite(loss):
        raise NonFiniteError(f"{LOSSES[name].label} is {loss}")
    return loss, influences


def _centred(values: Tensor) -> Tensor:
    return values - values.mean()
