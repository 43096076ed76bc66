"""Further metrics of generated images, on the features that the Fréchet distance takes: KID, precision, recall and
the Inception score, with the conventions (and, where that runs on the device, the code) of torch-fidelity.

A metric is a function of `Generated` and, for most, `Real` features, to a number. The Fréchet distance needs moments
only; these need the features themselves. Knows nothing of images, extractors, trials or where real features come
from.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samplers.errors import InputError, NonFiniteError

# torch-fidelity's defaults, under which its numbers are published.
_SEED = 2020  # of the random subsets and splits
_KID_SUBSETS, _KID_SUBSET = 100, 1000
_NEIGHBOURS = 3
_SPLITS = 10

_PAIRS = 1 << 25  # distances that are held at once: 256 MB of float64


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """Features [N, D] of generated images, and where the extractor classifies their logits [N, classes].

    Floating, on one device. Raises NonFiniteError for NaN or infinite entries.
    """

    features: Tensor
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        for name, values in (("features", self.features), ("logits", self.logits)):
            _check(f"{name} of the generated images", values)


@dataclass(frozen=True, slots=True, eq=False)
class Real:
    """Features [M, D] of the real images on the device of the generated ones'; make it with `of`, once.

    What every trial asks of them: radii, the distance to the third nearest other one [M], float64 (precision); within,
    the mean of KID's kernel over pairs of different ones.
    """

    features: Tensor
    radii: Tensor
    within: float

    @classmethod
    def of(cls, features: Tensor) -> "Real":
        """Raises InputError for fewer than 4 images, NonFiniteError for NaN or infinite entries."""
        _check("features of the real images", features)
        y, m = features.double(), len(features)
        pairs = sum(float(kernel(part, y).sum() - kernel_of_itself(part).sum()) for part in rows(y, y))
        return cls(features, _radii(features), pairs / (m * (m - 1)))


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric needs, and how it is computed."""

    of: Callable[[Generated, Real | None], float]
    needs_real: bool
    needs_logits: bool


def kid(generated: Generated, real: Real) -> float:
    """Kernel Inception distance (Bińkowski et al. 2018): the mean over 100 random subsets of 1,000 images (all, where
    there are fewer) of the unbiased squared maximum mean discrepancy with the kernel (x·y/D + 1)³.

    float64 on the device. Slightly negative values are rounding around 0. Raises InputError for fewer than 2 images.
    """
    x, y = generated.features, real.features
    size = min(_KID_SUBSET, len(x), len(y))
    need(size, 2, "kid")
    rng = np.random.RandomState(_SEED)  # torch-fidelity's generator: the same subsets
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for _ in range(_KID_SUBSETS):
        a, b = (
            part[torch.from_numpy(rng.choice(len(part), size, replace=False)).to(part.device)].double()
            for part in (x, y)
        )
        # The sum over pairs of different images of one set; a pair of both sets is never of the same image.
        pairs = sum(kernel(part, part).sum() - kernel_of_itself(part).sum() for part in (a, b))
        total += pairs / (size * (size - 1)) - 2 * kernel(a, b).mean()
    return float(total / _KID_SUBSETS)


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """KID's kernel (x·y/D + 1)³ of every pair of rows: [A, D] and [B, D] → [A, B]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_of_itself(a: Tensor) -> Tensor:
    """The diagonal [A] of `kernel(a, a)`."""
    return (a.square().sum(1) / a.shape[1] + 1) ** 3


def precision(generated: Generated, real: Real) -> float:
    """Improved precision (Kynkäänniemi et al. 2019): the share of generated images that lie within the distance of a
    real one to its third nearest neighbour."""
    return float(within(generated.features, real.features, real.radii).mean())


def recall(generated: Generated, real: Real) -> float:
    """Improved recall (Kynkäänniemi et al. 2019): the share of real images that lie within the distance of a generated
    one to its third nearest neighbour. Raises InputError for fewer than 4 images."""
    return float(within(real.features, generated.features, _radii(generated.features)).mean())


def _radii(features: Tensor) -> Tensor:
    """The distance [N] of each image to its third nearest other one."""
    need(len(features), _NEIGHBOURS + 1, "precision and recall")
    parts = rows(features, features)
    # The nearest of all is the image itself.
    return torch.cat([_distances(part, features).kthvalue(_NEIGHBOURS + 1, dim=1).values for part in parts])


def within(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Whether each point lies within the radius of any centre: 1 or 0 [points], float64."""
    hits = [(_distances(part, centres) <= radii).any(dim=1) for part in rows(points, centres)]
    return torch.cat(hits).double()


def rows(points: Tensor, centres: Tensor) -> tuple[Tensor, ...]:
    """The points in parts, so few that one number for each pair of a point and a centre fits into memory."""
    return torch.split(points, max(1, _PAIRS // len(centres)))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.double(), b.double())


def inception_score(generated: Generated) -> float:
    """Inception score (Salimans et al. 2016), the mean over 10 splits of exp E KL(p(y|x) ‖ p(y)); torch-fidelity's own.

    Comparable with published ones for Inception's logits only. Raises InputError for fewer than 10 images.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # seconds of imports

    assert generated.logits is not None
    need(len(generated.logits), _SPLITS, "inception_score")
    return float(isc_features_to_metric(generated.logits, _SPLITS, True, _SEED)[KEY_METRIC_ISC_MEAN])


def _with_real(function: Callable[[Generated, Real], float]) -> Callable[[Generated, Real | None], float]:
    def of(generated: Generated, real: Real | None) -> float:
        assert real is not None
        return function(generated, real)

    return of


METRICS: Mapping[str, Metric] = {
    "kid": Metric(_with_real(kid), needs_real=True, needs_logits=False),
    "precision": Metric(_with_real(precision), needs_real=True, needs_logits=False),
    "recall": Metric(_with_real(recall), needs_real=True, needs_logits=False),
    "inception_score": Metric(
        lambda generated, _: inception_score(generated),
        needs_real=False,
        needs_logits=True,
    ),
}
"""Every metric by the name that a job file gives it."""


def need_real(names: Iterable[str]) -> bool:
    """Whether one of them needs the features of the real images."""
    return any(METRICS[name].needs_real for name in names)


def check(key: str, names: Iterable[str], *, real: bool, logits: bool) -> None:
    """Raises InputError where a name is none of METRICS, or needs real features or logits that there are not.

    key: of the job file, which has the names.
    """
    for name in names:
        metric = METRICS.get(name)
        if metric is None:
            raise InputError(f"{key}: {name!r} is not known; there are {', '.join(METRICS)}")
        if metric.needs_real and not real:
            raise InputError(
                f"{key}: {name} needs the real images and not their statistics alone; name a folder, an archive or "
                "an .npz of them as dataset.images"
            )
        if metric.needs_logits and not logits:
            raise InputError(
                f"{key}: {name} needs features with class logits, and these have none; use inception-v3-compat"
            )


def measure(names: Iterable[str], generated: Generated, real: Real | None = None) -> dict[str, float]:
    """The value of each metric by its name. `check` has accepted the names for what is given here.

    Raises InputError for too few images, NonFiniteError where a value is NaN or infinite.
    """
    values = {name: METRICS[name].of(generated, real) for name in names}
    for name, value in values.items():
        if not np.isfinite(value):
            raise NonFiniteError(f"{name} is {value}")
    return values


def need(count: int, least: int, what: str) -> None:
    """Raises InputError for fewer images than `what` needs."""
    if count < least:
        raise InputError(f"{what} needs at least {least} images, not {count}: ask for more images")


def _check(name: str, values: Tensor | None) -> None:
    if values is None:
        return
    assert values.ndim == 2
    assert values.is_floating_point()
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"the {name} hold NaN or infinite entries")
