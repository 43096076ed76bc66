"""Adapter `ideal`: the exact denoiser of a point cloud or of a Gaussian. No network, no training error.

Used for smoke runs without weights and wherever the true answer is needed. Knows nothing of solvers. All
arithmetic is float64 whatever the state's dtype, so that what rounding is left does not depend on the batch
size.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from samplers.errors import InputError
from samplers.models.options import parse_options
from samplers.models.process import Process, TimeKind
from samplers.models.protocol import Variance
from samplers.prediction import Prediction

Floats = NDArray[np.float64]

_PAIRS = 1 << 22  # image-point pairs whose weights are held at once: 32 MB of float64


class Distribution(Protocol):
    """A distribution of clean images x0 that can be denoised exactly."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of an image."""

    @property
    def arrays(self) -> tuple[Floats, ...]:
        """All numbers that define it."""

    def to(self, device: torch.device) -> None:
        """Move to the device, in place."""

    def epsilon(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[eps | x] for x = alpha * x0 + sigma * eps; x is float64 [B, C*H*W], and so is the result."""


class PointCloud:
    """The images `points` [N, C, H, W], each with probability 1/N.

    E[x0 | x] is their average weighted by softmax(-|x - alpha p|² / (2 sigma²)), and eps = (x - alpha E[x0])
    / sigma.
    """

    def __init__(self, points: Floats) -> None:
        if points.ndim != 4 or 0 in points.shape:
            raise InputError(f"a point cloud is an array [N, C, H, W], not one of shape {list(points.shape)}")
        self.shape = (points.shape[1], points.shape[2], points.shape[3])
        self.arrays = (points,)
        self._points = torch.from_numpy(points.reshape(len(points), -1))
        self._half_squares = self._points.square().sum(dim=1) / 2

    def to(self, device: torch.device) -> None:
        """See `Distribution`."""
        self._points, self._half_squares = self._points.to(device), self._half_squares.to(device)

    def epsilon(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """See `Distribution`."""
        rows = max(1, _PAIRS // len(self._points))
        return torch.cat([self._epsilon(part, alpha, sigma) for part in torch.split(x, rows)])

    def _epsilon(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        # |x|² is the same for all points, so it is left out of the distances.
        nearness = (alpha * (x @ self._points.T) - alpha**2 * self._half_squares) / sigma**2
        return (x - alpha * (nearness.softmax(dim=1) @ self._points)) / sigma


class Gaussian:
    """Images with mean `mean` [C, H, W] and covariance `covariance` [D, D], or variances [C, H, W]; D =
    C*H*W.

    eps = sigma (alpha² covariance + sigma² I)^-1 (x - alpha mean). A covariance may be singular, not
    negative.
    """

    def __init__(self, mean: Floats, covariance: Floats) -> None:
        if mean.ndim != 3 or 0 in mean.shape:
            raise InputError(
                f"the mean of a Gaussian is an array [C, H, W], not one of shape {list(mean.shape)}"
            )
        self.shape = (mean.shape[0], mean.shape[1], mean.shape[2])
        self.arrays = (mean, covariance)
        self._axes: Tensor | None = None
        if covariance.shape == mean.shape:
            variances = covariance.reshape(-1)
        elif covariance.shape == (mean.size, mean.size):
            if not np.allclose(covariance, covariance.T):
                raise InputError("the covariance of a Gaussian must be symmetric")
            variances, axes = np.linalg.eigh(covariance)
            # What rounding made slightly negative is zero.
            variances = np.where(abs(variances) <= 1e-12 * abs(variances).max(), 0, variances)
            self._axes = torch.from_numpy(axes)
        else:
            raise InputError(
                f"a covariance of shape {list(covariance.shape)} does not fit a mean of shape "
                f"{list(mean.shape)}"
            )
        if variances.min() < 0:
            raise InputError("the covariance of a Gaussian must not have negative eigenvalues")
        self._mean = torch.from_numpy(mean.reshape(-1))
        self._variances = torch.from_numpy(variances)

    def to(self, device: torch.device) -> None:
        """See `Distribution`."""
        self._mean, self._variances = self._mean.to(device), self._variances.to(device)
        if self._axes is not None:
            self._axes = self._axes.to(device)

    def epsilon(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """See `Distribution`."""
        shrink = sigma / (alpha**2 * self._variances + sigma**2)
        away = x - alpha * self._mean
        if self._axes is None:
            return away * shrink
        return ((away @ self._axes) * shrink) @ self._axes.T


class IdealModel:
    """The exact noise prediction of a distribution under a process, as a `Model`; see there."""

    num_classes: None = None
    learned_range = False
    variance: Variance = "fixed_large"
    gradient: None = None
    round_sigma: None = None
    prior: None = None

    def __init__(self, distribution: Distribution, process: Process) -> None:
        self.distribution = distribution
        self.process = process
        self.shape = self.image_shape = distribution.shape
        self.time = process.time
        self.betas = process.betas
        self.sigma_range = process.sigma_range
        about = [
            type(distribution).__name__,
            self.time,
            self.sigma_range,
            [a.shape for a in distribution.arrays],
        ]
        content = hashlib.sha256(json.dumps(about).encode())
        for array in (*distribution.arrays, *(() if process.betas is None else (process.betas,))):
            content.update(np.ascontiguousarray(array).tobytes())
        self.fingerprint = content.hexdigest()

    def to(self, device: torch.device) -> Self:
        """See `Model`."""
        self.distribution.to(device)
        return self

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        """See `Model`; labels are ignored. sigma at `time` must not be 0."""
        alpha, sigma = self.process.coefficients(time)
        eps = self.distribution.epsilon(x.double().flatten(1), alpha, sigma)
        return Prediction(eps.reshape(x.shape).to(x.dtype))

    def pixels(self, x: Tensor) -> Tensor:
        """See `Model`: ADM's rounding for discrete time, EDM's for sigma time."""
        return self.process.pixels(x)


_Size = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class IdealOptions:
    """The process, and, where no file describes the images, what they are.

    time: "sigma" with sigma_min, sigma_max, or "discrete" with noise_schedule, diffusion_steps. Without a
    file: shape [C, H, W] and either points (that many images of uniform noise in [-1, 1], from `seed`) or std
    (a Gaussian with that standard deviation and `mean` in every value).
    """

    time: TimeKind = "sigma"
    noise_schedule: str = "linear"
    diffusion_steps: _Size = 1000
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    shape: tuple[_Size, _Size, _Size] | None = None
    points: _Size | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    mean: float | None = None
    std: Annotated[float, Field(ge=0)] | None = None


def load_ideal(path: Path | None, options: Mapping[str, object]) -> IdealModel:
    """The exact denoiser that a file or the options describe, on the CPU.

    path: a .npy point cloud [N, C, H, W]; or an .npz with `points`, or with `mean` [C, H, W] and one of `std`
    ([C, H, W] or a number) and `covariance` [D, D]. uint8 points are taken as pixels: value / 127.5 - 1.
    Raises InputError that names the option, or the file and the array.
    """
    chosen = parse_options(IdealOptions, "ideal", options)
    process = Process.of(
        chosen.time, chosen.noise_schedule, chosen.diffusion_steps, chosen.sigma_min, chosen.sigma_max
    )
    if path is None:
        return IdealModel(_described(chosen), process)
    given = [name for name in ("shape", "points", "mean", "std") if asdict(chosen)[name] is not None]
    if given:
        raise InputError(
            f"model.options.{given[0]} and model.path exclude each other: {path} says what the images are"
        )
    try:
        return IdealModel(_stored(_arrays(path)), process)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _described(options: IdealOptions) -> Distribution:
    if options.shape is None:
        raise InputError("format 'ideal' needs model.path, or model.options.shape with points or std")
    if (options.points is None) == (options.std is None):
        raise InputError("model.options of format 'ideal': give one of points and std")
    if options.points is not None:
        if options.mean is not None:
            raise InputError("model.options.mean belongs to std, not to points")
        numbers = np.random.Generator(np.random.Philox(options.seed))
        return PointCloud(numbers.uniform(-1, 1, (options.points, *options.shape)))
    assert options.std is not None
    mean = 0.0 if options.mean is None else options.mean
    if not math.isfinite(mean + options.std):
        raise InputError("model.options.mean and std must be finite")
    return Gaussian(np.full(options.shape, mean), np.full(options.shape, options.std**2))


def _arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of a .npz, or that of a .npy as `points`."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"points": content}
        with content:
            return {name: content[name] for name in content.files}
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged archive can raise anything
        raise InputError(
            f"is damaged or no .npy or .npz of plain numbers ({type(error).__name__})"
        ) from error


def _stored(arrays: Mapping[str, NDArray[np.generic]]) -> Distribution:
    names = set(arrays)
    if names == {"points"}:
        points = arrays["points"]
        return PointCloud(
            _floats("points", points) / 127.5 - 1 if points.dtype == np.uint8 else _floats("points", points)
        )
    if names in ({"mean", "std"}, {"mean", "covariance"}):
        mean = _floats("mean", arrays["mean"])
        if "covariance" in names:
            return Gaussian(mean, _floats("covariance", arrays["covariance"]))
        std = _floats("std", arrays["std"])
        if std.shape not in ((), mean.shape):
            raise InputError(
                f"std of shape {list(std.shape)} does not fit a mean of shape {list(mean.shape)}"
            )
        return Gaussian(mean, np.broadcast_to(std**2, mean.shape).copy())
    raise InputError(
        f"needs the arrays points, or mean and std, or mean and covariance; it has {sorted(names)}"
    )


def _floats(name: str, array: NDArray[np.generic]) -> Floats:
    if array.dtype.kind not in "fiu":
        raise InputError(f"array {name!r} holds {array.dtype}, not numbers")
    result = np.ascontiguousarray(array, dtype=np.float64).reshape(array.shape)
    if not np.isfinite(result).all():
        raise InputError(f"array {name!r} holds NaN or infinity")
    return result
