"""Analytic-DPM (Bao et al., ICLR 2022): ancestral sampling and DDIM with the optimal reverse variance, and the
estimate of the statistics Γ from which that variance follows. Conventions are those of its official code.

Knows nothing of λ, checkpoints or where images come from. Γ is measured with the network as it was trained
(λ = 1) and stays as it is when λ ≠ 1: the paper has no Analytic-DPM with scaling in public code, and dividing Γ
by λ², the alternative, would make the variance follow λ too.
"""

import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplers import noise as numbers
from samplers.errors import InputError, NonFiniteError
from samplers.grids import Floats
from samplers.models.weights import check_stream, opened
from samplers.prediction import Predict
from samplers.solvers import Noise, check_eta

Spacing = Literal["linear", "quad_ddim"]
Variance = Literal["analytic", "fixed_small", "fixed_large"]
Statistics = NDArray[np.float32]
"""Γ, the official `ms_eps`: float32 [N + 1]; entry n is the mean square of the noise predicted at noise level n,
over data, noise and dimensions. Entry 0 has no meaning and is 0."""


# --- noise levels -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class AnalyticGrid:
    """The visited noise levels in Analytic-DPM's counting: 1 … N, and 0 is the clean image.

    Arrays are [nfe], indexed by evaluation t. level: int64, from 1 at t = 0 upwards; "quad_ddim" with many
    steps repeats the lowest ones. abar: Π(1 - β) at the level. abar_prev: that of evaluation t - 1, and 1 at
    t = 0. levels: N. shift1: see `times`. Arrays are read-only.
    """

    level: NDArray[np.int64]
    abar: Floats
    abar_prev: Floats
    levels: int
    shift1: bool

    def __post_init__(self) -> None:
        assert self.level.shape == self.abar.shape == self.abar_prev.shape, "one abar per level"
        assert self.level[0] == 1, "the last evaluation is at level 1"
        assert self.level[-1] <= self.levels, "levels lie within 1 .. N"
        for array in (self.level, self.abar, self.abar_prev):
            array.setflags(write=False)

    @property
    def nfe(self) -> int:
        """The number of network evaluations."""
        return self.level.size

    @property
    def times(self) -> Floats:
        """What the network is told at evaluation t, float64 [nfe]: n, or n - 1 with shift1.

        n - 1 is the training timestep of a network that counts from 0, as those of ADM, DDPM and diffusers do;
        Analytic-DPM's own training counts from 1. A network trained on rescaled timesteps (times 1000/N) has
        them rescaled by its adapter.
        """
        return (self.level - int(self.shift1)).astype(np.float64)

    @property
    def beta(self) -> Floats:
        """Variance added since evaluation t - 1, 1 - abar/abar_prev [nfe]."""
        return 1 - self.abar / self.abar_prev

    @property
    def posterior_variance(self) -> Floats:
        """The variance of q(x_s | x_r, x_0), β(1 - abar_prev)/(1 - abar) [nfe]; 0 at t = 0."""
        return self.beta * (1 - self.abar_prev) / (1 - self.abar)


def analytic_grid(betas: Floats, nfe: int, *, spacing: Spacing = "linear", shift1: bool) -> AnalyticGrid:
    """The grid of `nfe` noise levels of a network trained with `betas` (float64 [N]; betas[0] belongs to n = 1).

    "linear": equally spaced, 1 and N included. "quad_ddim": int(u²) + 1 with u equally spaced from 0 to
    sqrt(0.8·N); sampling then starts below N although the start is standard normal.

    Raises InputError for a β outside (0, 1), fewer than 2 or more than N steps, and another spacing.
    """
    if not ((betas > 0) & (betas < 1)).all():
        raise InputError("every β of the noise schedule must lie between 0 and 1")
    if not 2 <= nfe <= len(betas):
        raise InputError(f"Analytic-DPM takes 2 to {len(betas)} steps of this network, not {nfe}")
    if spacing == "linear":
        level = _linear(len(betas), nfe)
    elif spacing == "quad_ddim":
        level = [int(u) + 1 for u in np.linspace(0, np.sqrt(len(betas) * 0.8), nfe) ** 2]
    else:
        raise InputError(f"spacing must be linear or quad_ddim, not {spacing!r}")
    abar = np.append(1.0, np.cumprod(1 - betas))[level]
    return AnalyticGrid(np.array(level), abar, np.append(1.0, abar[:-1]), len(betas), shift1)


def _linear(levels: int, nfe: int) -> list[int]:
    stride = (levels - 1) / (nfe - 1)
    position, level = 1.0, []
    for _ in range(nfe):
        # The running sum and Python's half-to-even rounding are the official ones: 1 + j·stride rounds elsewhere
        # for some numbers of steps.
        level.append(round(position))
        position += stride
    return level


# --- variances ----------------------------------------------------------------------------------------------


def ddpm_variance(grid: AnalyticGrid, kind: Variance, ms_eps: Statistics | None = None) -> Floats:
    """The variance of each ancestral step, float64 [nfe]; 0 at t = 0, where no noise is added.

    "fixed_large": β. "fixed_small": β(1 - abar_prev)/(1 - abar). "analytic": the optimal one, fixed_small +
    abar_prev·β²/(1 - abar)²·cov (Bao et al. 2022, theorem 1), where cov = (1 - abar)/abar·(1 - Γ), the mean
    variance of x0 given x, is clipped to [0, 1], what images in [-1, 1] can have.

    Raises InputError for another kind, and for Γ (needed by "analytic" alone) that does not fit the grid.
    """
    if kind == "fixed_large":
        variance = grid.beta
    elif kind == "fixed_small":
        variance = grid.posterior_variance
    elif kind == "analytic":
        weight = np.sqrt(grid.abar_prev) * grid.beta / (1 - grid.abar)
        variance = grid.posterior_variance + weight**2 * _image_variance(grid, ms_eps)
    else:
        raise InputError(f"variance must be analytic, fixed_small or fixed_large, not {kind!r}")
    return np.append(0.0, variance[1:])


def ddim_variance(grid: AnalyticGrid, eta: float, ms_eps: Statistics | None = None) -> Floats:
    """The variance of each DDIM step, float64 [nfe]; 0 at t = 0, where no noise is added.

    Without Γ: eta²·β(1 - abar_prev)/(1 - abar). With Γ the optimal one: (sqrt(abar_prev) - sqrt((1 - abar_prev
    - that)·abar/(1 - abar)))²·cov more, cov as in `ddpm_variance`; it is above 0 even for eta = 0.

    Raises InputError unless 0 <= eta <= 1, and for Γ that does not fit the grid.
    """
    check_eta(eta)
    variance = eta**2 * grid.posterior_variance
    if ms_eps is not None:
        weight = np.sqrt(grid.abar_prev) - _direction(grid, eta) * np.sqrt(grid.abar / (1 - grid.abar))
        variance = variance + weight**2 * _image_variance(grid, ms_eps)
    return np.append(0.0, variance[1:])


def clipped(variance: Floats, grid: AnalyticGrid, *, clip_sigma_idx: int, clip_pixel: float) -> Floats:
    """The variance [nfe], kept small in the last noisy steps, where noise would be seen in the image.

    Steps that lead to a level below that of evaluation t = clip_sigma_idx get a variance of at most
    (clip_pixel·2/255·sqrt(π/2))²: on average the noise moves a value by no more than clip_pixel of 255 levels.
    clip_sigma_idx 0: none; 1: only the last step that adds noise. The official CIFAR-10 settings are idx 1
    with pixel 2 (DDPM, linear schedule) or 1 (DDPM with the cosine schedule; DDIM).

    Raises InputError unless 0 <= clip_sigma_idx < nfe and clip_pixel is finite and >= 0.
    """
    if not 0 <= clip_sigma_idx < grid.nfe:
        raise InputError(f"clip_sigma_idx must lie within 0 .. {grid.nfe - 1}, not {clip_sigma_idx}")
    if not 0 <= clip_pixel < math.inf:
        raise InputError(f"clip_pixel must be finite and at least 0, not {clip_pixel}")
    target = np.append(0, grid.level[:-1])
    most = (clip_pixel * 2 / 255 * math.sqrt(math.pi / 2)) ** 2
    return np.where(target < grid.level[clip_sigma_idx], np.minimum(variance, most), variance)


def _image_variance(grid: AnalyticGrid, ms_eps: Statistics | None) -> Floats:
    if ms_eps is None:
        raise InputError("the analytic variance needs Γ (ms_eps): estimate it, or name its file")
    if ms_eps.shape != (grid.levels + 1,):
        raise InputError(
            f"ms_eps has the shape {list(ms_eps.shape)}, but a network of {grid.levels} timesteps needs "
            f"[{grid.levels + 1}]"
        )
    seen = ms_eps.astype(np.float64)[grid.level]
    return np.clip((1 - grid.abar) / grid.abar * (1 - seen), 0.0, 1.0)


def _direction(grid: AnalyticGrid, eta: float) -> Floats:
    """The weight of eps in a DDIM step, sqrt(1 - abar_prev - eta²·posterior variance) [nfe]."""
    return np.asarray(np.sqrt(np.maximum(1 - grid.abar_prev - eta**2 * grid.posterior_variance, 0.0)))


# --- solvers ------------------------------------------------------------------------------------------------


@torch.no_grad()
def ddpm(
    predict: Predict, x: Tensor, grid: AnalyticGrid, noise: Noise, *, variance: Floats, clip: bool = True
) -> Tensor:
    """Ancestral sampling with the given variance of each step ([nfe], see `ddpm_variance`).

    x: standard normal start [B, C, H, W], float32 as the official code has it or float64. Returns the image x0
    of the last evaluation, to which no noise is added. clip: clamp each x0 to [-1, 1]; the official code can
    leave it out with the fixed variances only.
    """
    root, ratio = np.sqrt(1 / grid.abar).tolist(), np.sqrt(1 / grid.abar - 1).tolist()
    weight_x0 = (grid.beta * np.sqrt(grid.abar_prev) / (1 - grid.abar)).tolist()
    weight_x = (np.sqrt(1 - grid.beta) * (1 - grid.abar_prev) / (1 - grid.abar)).tolist()
    deviation = np.sqrt(variance).tolist()
    for t in reversed(range(grid.nfe)):
        x0 = root[t] * x - ratio[t] * predict(x, t).eps
        if clip:
            x0 = x0.clamp(-1, 1)
        x = weight_x0[t] * x0 + weight_x[t] * x
        if deviation[t] > 0:
            x = x + deviation[t] * noise(t)
    return x


@torch.no_grad()
def ddim(
    predict: Predict, x: Tensor, grid: AnalyticGrid, noise: Noise, *, variance: Floats, eta: float = 0.0
) -> Tensor:
    """DDIM with the given variance of each step ([nfe], `ddim_variance` of the same eta).

    x: as for `ddpm`. Returns the clamped x0 of the last evaluation. Each x0 is clamped to [-1, 1]; the direction
    takes the network's eps as it is, where guided-diffusion's DDIM takes what the clamped x0 leaves.

    Raises InputError unless 0 <= eta <= 1.
    """
    check_eta(eta)
    root, ratio = np.sqrt(1 / grid.abar).tolist(), np.sqrt(1 / grid.abar - 1).tolist()
    weight_x0 = np.sqrt(grid.abar_prev).tolist()
    weight_eps = _direction(grid, eta).tolist()
    deviation = np.sqrt(variance).tolist()
    for t in reversed(range(grid.nfe)):
        eps = predict(x, t).eps
        x0 = (root[t] * x - ratio[t] * eps).clamp(-1, 1)
        x = weight_x0[t] * x0 + weight_eps[t] * eps
        if deviation[t] > 0:
            x = x + deviation[t] * noise(t)
    return x


# --- statistics ---------------------------------------------------------------------------------------------

# Images of an estimate when nobody says. What this costs is one trial of 10,000 images at NFE 100 (for N = 1,000);
# with 3×32×32 values in each, its noise moves the variances of 20 ancestral steps by less than 0.1 %. Smaller
# images and fewer steps need more of them. The official code takes all of the training data.
MS_EPS_IMAGES = 1_000

_LARGEST = 1 << 24  # bytes of an array of Γ, which are 4 per timestep
_MS_EPS_DRAW = 1 << 31  # + n: the noise of level n, far from the draws of sampling


@dataclass(frozen=True, slots=True)
class MsEpsSource:
    """What an estimate of Γ was made from: with the same source it comes out the same.

    model: the network's fingerprint; data: digest of the images; images: how many of them; seed: of the noise;
    shift1: whether level n was told as n - 1 (see `AnalyticGrid.times`).
    """

    model: str
    data: str
    images: int
    seed: int
    shift1: bool

    @property
    def text(self) -> str:
        """All of it as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


@torch.no_grad()
def estimate_ms_eps(
    predict: Callable[[Tensor, int], Tensor],
    images: Iterable[Tensor],
    betas: Floats,
    *,
    seed: int,
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Γ: for each level n the mean of eps(x_n, n)² over the images, their dimensions and one noise per image.

    predict(x, n): the noise that the unscaled network predicts at level n = 1 … N, of x's shape. images: batches
    [B, C, H, W] of clean images in [-1, 1], float32 or float64, on the network's device, `count` of them in all.
    betas: of the training, float64 [N]. The noise depends on (seed, place of the image, n) only, not on the
    batches. progress(done, total) is called with evaluations of one image each, total = count·N.

    Raises InputError if there are not `count` images, NonFiniteError if the network predicts NaN or infinity.
    """
    abar = np.cumprod(1 - betas)
    signal, spread = np.sqrt(abar).tolist(), np.sqrt(1 - abar).tolist()
    levels, done = len(betas), 0
    sums: Tensor | None = None
    for x0 in images:
        if sums is None:
            sums = torch.zeros(levels + 1, dtype=torch.float64, device=x0.device)
        ids = torch.arange(done, done + len(x0), device=x0.device)
        for n in range(1, levels + 1):
            z = numbers.normal(seed, ids, _MS_EPS_DRAW + n, tuple(x0.shape[1:]), x0.dtype)
            eps = predict(signal[n - 1] * x0 + spread[n - 1] * z, n)
            sums[n] += eps.double().square().flatten(1).mean(dim=1).sum()
            if progress is not None:
                progress(done * levels + n * len(x0), count * levels)
        done += len(x0)
    if sums is None or done != count:
        raise InputError(f"{count} images were to be used for ms_eps, but there are {done}")
    ms_eps: Statistics = (sums / count).float().cpu().numpy()
    if not np.isfinite(ms_eps).all():
        raise NonFiniteError(
            f"the network's noise at level {int(np.argmin(np.isfinite(ms_eps)))} is not finite"
        )
    return ms_eps


def cached_ms_eps(folder: Path, source: MsEpsSource, levels: int, estimate: Callable[[], Statistics]) -> Path:
    """The file of Γ [levels + 1] in `folder` that was made from `source`; made by `estimate` where it is missing
    or damaged. It appears at once and whole, also when several processes write it.

    Raises InputError if the file cannot be written, and what `estimate` raises.
    """
    file = folder / f"{hashlib.sha256(source.text.encode()).hexdigest()}.ms_eps.npz"
    try:
        if _archived(file, "source").item() == source.text:
            read_ms_eps(file, levels)
            return file
    except InputError:
        pass  # not there, or cut off by a full disk, say
    save_ms_eps(file, estimate(), source)
    return file


def save_ms_eps(path: Path, ms_eps: Statistics, source: MsEpsSource) -> None:
    """Writes Γ as an .npz: `ms_eps`, and `source` as text. It appears at once and whole.

    Raises InputError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, ms_eps=ms_eps, source=np.array(source.text))
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{path} cannot be written: {error.strerror}") from error
        raise


def read_ms_eps(path: Path, levels: int) -> Statistics:
    """Γ [levels + 1] from an .npz that `save_ms_eps` wrote, or else from an official `*.ms_eps.pth`.

    The latter is a NumPy array in a `torch.save` file; nothing but the rebuilding of plain arrays is admitted
    when it is read. Raises InputError that names the file unless it holds levels + 1 finite numbers >= 0.
    """
    array = _archived(path, "ms_eps") if path.suffix == ".npz" else _pickled(path)
    if array.dtype.kind != "f" or array.shape != (levels + 1,):
        raise InputError(
            f"{path}: ms_eps is {array.dtype} {list(array.shape)}; a network of {levels} timesteps needs "
            f"[{levels + 1}] floating point numbers, one per timestep after a first unused one"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
        ms_eps: Statistics = array.astype(np.float32)
    if not (np.isfinite(ms_eps).all() and (ms_eps >= 0).all()):
        raise InputError(f"{path}: ms_eps holds NaN, infinite or negative entries; estimate it anew")
    return ms_eps


def _archived(path: Path, key: str) -> NDArray[np.generic]:
    try:
        with opened(path) as file, np.load(file, allow_pickle=False) as archive:
            if (
                archive.zip.getinfo(f"{key}.npy").file_size > _LARGEST
            ):  # a small file can hold any number of zeros
                raise InputError(f"{path}: {key} has more bytes than the {_LARGEST} allowed")
            array: NDArray[np.generic] = archive[key]
            return array
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged archive can raise anything
        raise InputError(f"{path} is damaged, or no .npz with {key!r} ({type(error).__name__})") from error


def _pickled(path: Path) -> NDArray[np.generic]:
    rebuild = np.zeros(0).__reduce__()[0]
    admitted: list[Any] = [
        (rebuild, "numpy.core.multiarray._reconstruct"),  # written by NumPy 1
        (rebuild, "numpy._core.multiarray._reconstruct"),  # written by NumPy 2
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float32)),
        type(np.dtype(np.float64)),
    ]
    expected = "ms_eps file written by torch.save"
    try:
        with opened(path) as file, warnings.catch_warnings(), torch.serialization.safe_globals(admitted):
            warnings.simplefilter("ignore")  # about odd files, which are refused anyhow
            check_stream(file, str(path), expected)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle or archive can raise anything, OSError too
        asked = re.search(r"(?:GLOBAL |got <class ')([\w.]+)", str(error))
        if asked:
            raise InputError(
                f"{path} holds more than an array: it asks for {asked[1]}. Nothing of it was run. "
                "An ms_eps file is one float32 NumPy array in a torch.save file, or an .npz"
            ) from None
        raise InputError(f"{path} is damaged, or no {expected} ({type(error).__name__})") from error
    if type(content) is not np.ndarray:
        raise InputError(f"{path} holds a {type(content).__name__}, where a NumPy array (ms_eps) is needed")
    return content
