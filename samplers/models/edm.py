"""Adapters `edm` and `pfgmpp`: network snapshots of NVIDIA's EDM code base, and those of PFGM++.

Binds a U-Net, its preconditioning and, for PFGM++, its prior. Knows nothing of solvers: on which noise levels a
network is called, and with which churn, is their matter.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import scipy.special
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from samplers import noise
from samplers.errors import InputError
from samplers.models.dhariwal import DhariwalArchitecture, DhariwalUNet
from samplers.models.options import parse_options
from samplers.models.preconditioning import Edm, Floats, Iddpm, Preconditioning, Ve, Vp
from samplers.models.process import Process
from samplers.models.protocol import Prior, Variance
from samplers.models.snapshot import Module, Snapshot, read_snapshot
from samplers.models.song import SongArchitecture, SongUNet
from samplers.models.weights import digest
from samplers.prediction import Prediction, to_epsilon

Family = Literal["edm", "pfgmpp"]

PRIOR_SIGMA = 80.0  # the official code has no other, whatever sigma_max is
_DIRECTION_DRAW = 0  # taken by nothing else: a network with a prior has no latents


class EdmModel:
    """A network snapshot as a `Model`; see there.

    Time is sigma. The arithmetic runs in the dtype of `network`, float32 as loaded, whatever x is, and so does the
    denoised image; eps = (x - D)/sigma is formed in x's dtype. `network` is a plain module of x, c_noise and one-hot
    labels, for whoever wants to compile it.
    """

    time: Literal["sigma"] = "sigma"
    betas: None = None
    gradient: None = None
    learned_range = False
    variance: Variance = "fixed_large"

    def __init__(
        self,
        network: nn.Module,
        preconditioning: Preconditioning,
        shape: tuple[int, int, int],
        num_classes: int | None,
        sigma_range: tuple[float, float],
        fingerprint: str,
        prior: Prior | None = None,
    ) -> None:
        self.network = network
        self.preconditioning = preconditioning
        self.shape = self.image_shape = shape
        self.num_classes = num_classes
        self.sigma_range = sigma_range
        self.fingerprint = fingerprint
        self.prior = prior
        self._process = Process(sigma_range=sigma_range)

    @property
    def round_sigma(self) -> Callable[[Floats], Floats] | None:
        """See `Model`; only iDDPM networks know a list of levels."""
        return self.preconditioning.round_sigma if isinstance(self.preconditioning, Iddpm) else None

    def to(self, device: torch.device) -> Self:
        """See `Model`."""
        self.network.to(device)
        return self

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        """See `Model`. A class-conditional network without labels is told of no class (all zeros)."""
        # Half precision is for the network alone: sigma runs over more digits than it has.
        dtype = torch.promote_types(next(self.network.parameters()).dtype, torch.float32)
        c = self.preconditioning.coefficients(time)
        seen = x.to(dtype)
        level = torch.full((1,), c.noise, dtype=torch.float32, device=x.device)
        output = self.network(c.scale_in * seen, level, self._one_hot(labels, x.device)).to(dtype)
        # The first channels: iDDPM networks also predict a variance, which these samplers have no use for.
        denoised = c.skip * seen + c.out * output[:, : self.shape[0]]
        return Prediction(to_epsilon("x0", denoised.to(x.dtype), x, 1.0, time))

    def _one_hot(self, labels: Tensor | None, device: torch.device) -> Tensor | None:
        if self.num_classes is None:
            return None
        if labels is None:
            return torch.zeros(1, self.num_classes, device=device)
        return nn.functional.one_hot(labels, self.num_classes).float()

    def pixels(self, x: Tensor) -> Tensor:
        """See `Model`: x * 127.5 + 128, cut to 0..255, fraction dropped."""
        return self._process.pixels(x)


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class PfgmppOptions:
    """D: the number of additional dimensions that the job expects; the snapshot knows it, and must agree."""

    D: Annotated[int, Field(gt=0)] | None = None


def load_edm(path: Path, options: Mapping[str, object]) -> EdmModel:
    """The EMA network in a snapshot of EDM's code base, on the CPU. There are no options.

    Raises InputError that names the file or the option.
    """
    if options:
        raise InputError(
            f"model.options: format 'edm' has no option {next(iter(options))!r}; the snapshot holds them all"
        )
    return _load(path, "edm", None)


def load_pfgmpp(path: Path, options: Mapping[str, object]) -> EdmModel:
    """The EMA network in a PFGM++ snapshot or training state, on the CPU; options: `PfgmppOptions`.

    Raises InputError that names the file or the option.
    """
    return _load(path, "pfgmpp", parse_options(PfgmppOptions, "pfgmpp", options).D)


def _load(path: Path, family: Family, expected_d: int | None) -> EdmModel:
    snapshot = read_snapshot(path)
    about = _Attributes(path, snapshot.precond)
    augmented = bool(snapshot.precond.attributes.get("pfgmpp"))
    if augmented != (family == "pfgmpp"):
        other = "edm" if family == "pfgmpp" else "pfgmpp"
        raise InputError(f"{path} is no network of model.format {family!r}; use {other!r}")
    channels, side = about.count("img_channels"), about.count("img_resolution")
    shape = (channels, side, side)
    classes = about.count("label_dim", least=0) or None
    network = _network(path, snapshot, shape, classes)
    prior = None
    if augmented:
        d, n = about.count("D"), about.count("N")
        if n != math.prod(shape):
            raise InputError(f"{path}: N is {n}, but its images have {math.prod(shape)} values")
        if expected_d not in (None, d):
            raise InputError(f"model.options.D is {expected_d}, but the network in {path} has D {d}")

        def prior(seed: int, ids: Tensor) -> Tensor:
            return pfgmpp_prior(seed, ids, shape, d)

    fingerprint = hashlib.sha256(json.dumps([digest(path), family]).encode()).hexdigest()
    return EdmModel(
        network=network,
        preconditioning=_preconditioning(path, snapshot, about),
        shape=shape,
        num_classes=classes,
        sigma_range=(about.number("sigma_min"), about.number("sigma_max")),
        fingerprint=fingerprint,
        prior=prior,
    )


def pfgmpp_prior(seed: int, ids: Tensor, shape: tuple[int, int, int], d: int) -> Tensor:
    """PFGM++'s start for the images `ids` (int64 [B]): float64 [B, C, H, W] on their device (Xu et al. 2023).

    The radius is the quantile function of its distribution at a uniform number of the image.
    """
    uniform = noise.uniform(seed, ids.cpu(), noise.PRIOR_DRAW, 1)[:, 0].numpy()
    beta = torch.from_numpy(scipy.special.betaincinv(math.prod(shape) / 2, d / 2, uniform))
    gaussian = noise.normal(seed, ids, _DIRECTION_DRAW, shape, torch.float32)
    return spread(beta.to(ids.device), gaussian, d)


def spread(beta: Tensor, gaussian: Tensor, d: int) -> Tensor:
    """Points at the radius 80·sqrt(D·β/(1 - β)), β ~ Beta(N/2, D/2), in the direction of a normal vector.

    beta: float64 [B]; gaussian: [B, C, H, W]. The direction is rounded to float32, the product is float64.
    """
    length = gaussian.double().flatten(1).norm(dim=1)
    direction = (gaussian / length[:, None, None, None]).float()
    radius = (beta / (1 - beta)).sqrt() * (PRIOR_SIGMA * math.sqrt(d))
    start: Tensor = direction.double() * radius[:, None, None, None]
    return start


class _Attributes:
    """The numbers that the preconditioned module keeps as attributes."""

    def __init__(self, path: Path, module: Module) -> None:
        self._path, self._values = path, module.attributes

    def number(self, name: str) -> float:
        """A float; infinity is one, NaN is not."""
        value = self._values.get(name)
        if not isinstance(value, (int, float)) or math.isnan(value):
            raise InputError(f"{self._path}: the network has no number {name!r}")
        return float(value)

    def count(self, name: str, least: int = 1) -> int:
        """An integer of that size or more."""
        value = self._values.get(name)
        if type(value) is not int or not least <= value < 2**31:
            raise InputError(f"{self._path}: the network has no count {name!r}")
        return value


def _preconditioning(path: Path, snapshot: Snapshot, about: _Attributes) -> Preconditioning:
    match snapshot.precond.class_name:
        case "EDMPrecond":
            return Edm(about.number("sigma_data"))
        case "VPPrecond":
            return Vp(about.number("beta_d"), about.number("beta_min"), about.number("M"))
        case "VEPrecond":
            return Ve()
        case "iDDPMPrecond":
            levels = snapshot.state.get("u")
            if levels is None or levels.shape != (about.count("M") + 1,):
                raise InputError(f"{path} lacks the noise levels 'u' of iDDPM")
            return Iddpm(levels)
        case other:
            raise InputError(
                f"{path}: the network is a {other[:100]}; EDMPrecond, VPPrecond, VEPrecond and iDDPMPrecond are known"
            )


_NETWORKS: Mapping[str, tuple[Any, Callable[[Any], nn.Module]]] = {
    "SongUNet": (SongArchitecture, SongUNet),
    "DhariwalUNet": (DhariwalArchitecture, DhariwalUNet),
}


def _network(path: Path, snapshot: Snapshot, shape: tuple[int, int, int], classes: int | None) -> nn.Module:
    """The U-Net for inference with the tensors of the snapshot."""
    name = snapshot.network.class_name
    if name not in _NETWORKS:
        raise InputError(f"{path}: the U-Net is a {name[:100]}; {' and '.join(_NETWORKS)} are known")
    kind, build = _NETWORKS[name]
    try:
        architecture = TypeAdapter(kind).validate_python(dict(snapshot.network.kwargs))
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            network = build(architecture)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"{path}: the arguments of its {name} cannot be used: {wrong}") from None
    except (
        ValueError,
        ArithmeticError,
        RuntimeError,
    ) as error:  # channels that no group can divide, sides of 0
        raise InputError(f"{path}: no {name} has the arguments that it gives: {error}") from error
    given = (architecture.in_channels, architecture.img_resolution, architecture.img_resolution)
    if given != shape or architecture.label_dim != (classes or 0) or architecture.out_channels < shape[0]:
        raise InputError(f"{path}: the U-Net and its preconditioning are not of one shape")
    state = {
        key.removeprefix("model."): tensor
        for key, tensor in snapshot.state.items()
        if key.startswith("model.")
    }
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if expected != found:
        wrong = "; ".join(
            f"{key} is {found.get(key, 'absent')}, not {expected.get(key, 'part of the network')}"
            for key in [*found, *(key for key in expected if key not in found)]
            if found.get(key) != expected.get(key)
        )
        raise InputError(f"{path}: the tensors do not fit its {name}: {wrong[:500]}")
    network.load_state_dict(
        {
            key: tensor.contiguous(
                memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
            )
            for key, tensor in state.items()
        },
        assign=True,
    )
    return network.requires_grad_(False).eval()
