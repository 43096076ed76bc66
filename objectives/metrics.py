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

    radii: distance to the third nearest other one [M], float64; what precision asks of every trial.
    """

    features: Tensor
    radii: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Real":
        """Raises InputError for fewer than 4 images, NonFiniteError for NaN or infinite entries."""
        _check("features of the real images", features)
        return cls(features, _radii(features))


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric needs, which way it is better, and how it is computed."""

    of: Callable[[Generated, Real | None], float]
    needs_real: bool
    needs_logits: bool
    higher_is_better: bool


def kid(generated: Generated, real: Real) -> float:
    """Kernel Inception distance (Bińkowski et al. 2018): the mean over 100 random subsets of 1,000 images (all, where
    there are fewer) of the unbiased squared maximum mean discrepancy with the kernel (x·y/D + 1)³.

    float64 on the device. Slightly negative values are rounding around 0. Raises InputError for fewer than 2 images.
    """
    x, y = generated.features, real.features
    size = min(_KID_SUBSET, len(x), len(y))
    _need(size, 2, "kid")
    rng = np.random.RandomState(_SEED)  # torch-fidelity's generator: the same subsets
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for _ in range(_KID_SUBSETS):
        a, b = (
            part[torch.from_numpy(rng.choice(len(part), size, replace=False)).to(part.device)].double()
            for part in (x, y)
        )
        # The sum over pairs of different images of one set; a pair of both sets is never of the same image.
        within = sum(kernel.sum() - kernel.diagonal().sum() for kernel in (_kernel(a, a), _kernel(b, b)))
        total += within / (size * (size - 1)) - 2 * _kernel(a, b).mean()
    return float(total / _KID_SUBSETS)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def precision(generated: Generated, real: Real) -> float:
    """Improved precision (Kynkäänniemi et al. 2019): the share of generated images that lie within the distance of a
    real one to its third nearest neighbour."""
    return _share_within(generated.features, real.features, real.radii)


def recall(generated: Generated, real: Real) -> float:
    """Improved recall (Kynkäänniemi et al. 2019): the share of real images that lie within the distance of a generated
    one to its third nearest neighbour. Raises InputError for fewer than 4 images."""
    return _share_within(real.features, generated.features, _radii(generated.features))


def _radii(features: Tensor) -> Tensor:
    """The distance [N] of each image to its third nearest other one."""
    _need(len(features), _NEIGHBOURS + 1, "precision and recall")
    parts = _rows(features, features)
    # The nearest of all is the image itself.
    return torch.cat([_distances(part, features).kthvalue(_NEIGHBOURS + 1, dim=1).values for part in parts])


def _share_within(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    hits = [(_distances(part, centres) <= radii).any(dim=1) for part in _rows(points, centres)]
    return float(torch.cat(hits).double().mean())


def _rows(points: Tensor, centres: Tensor) -> tuple[Tensor, ...]:
    return torch.split(points, max(1, _PAIRS // len(centres)))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.double(), b.double())


def inception_score(generated: Generated) -> float:
    """Inception score (Salimans et al. 2016), the mean over 10 splits of exp E KL(p(y|x) ‖ p(y)); torch-fidelity's own.

    Comparable with published ones for Inception's logits only. Raises InputError for fewer than 10 images.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # seconds of imports

    assert generated.logits is not None
    _need(len(generated.logits), _SPLITS, "inception_score")
    return float(isc_features_to_metric(generated.logits, _SPLITS, True, _SEED)[KEY_METRIC_ISC_MEAN])


def _with_real(function: Callable[[Generated, Real], float]) -> Callable[[Generated, Real | None], float]:
    def of(generated: Generated, real: Real | None) -> float:
        assert real is not None
        return function(generated, real)

    return of


METRICS: Mapping[str, Metric] = {
    "kid": Metric(_with_real(kid), needs_real=True, needs_logits=False, higher_is_better=False),
    "precision": Metric(_with_real(precision), needs_real=True, needs_logits=False, higher_is_better=True),
    "recall": Metric(_with_real(recall), needs_real=True, needs_logits=False, higher_is_better=True),
    "inception_score": Metric(
        lambda generated, _: inception_score(generated),
        needs_real=False,
        needs_logits=True,
        higher_is_better=True,
    ),
}
"""Every metric by the name that a job file gives it."""


def need_real(names: Iterable[str]) -> bool:
    """Whether one of them needs the features of the real images."""
    return any(METRICS[name].needs_real for name in names)


def check(names: Iterable[str], *, real: bool, logits: bool) -> None:
    """Raises InputError where a name is none of METRICS, or needs real features or logits that there are not."""
    for name in names:
        metric = METRICS.get(name)
        if metric is None:
            raise InputError(f"metrics: {name!r} is not known; there are {', '.join(METRICS)}")
        if metric.needs_real and not real:
            raise InputError(
                f"metrics: {name} needs the real images and not their statistics alone; name a folder, an archive or "
                "an .npz of them as dataset.images"
            )
        if metric.needs_logits and not logits:
            raise InputError(
                f"metrics: {name} needs features with class logits, and these have none; use inception-v3-compat"
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


def _need(count: int, least: int, what: str) -> None:
    if count < least:
        raise InputError(f"{what} needs at least {least} images, not {count}: ask for more images")


def _check(name: str, values: Tensor | None) -> None:
    if values is None:
        return
    assert values.ndim == 2
    assert values.is_floating_point()
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"the {name} hold NaN or infinite entries")
