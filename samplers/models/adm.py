"""Adapter `adm`: guided-diffusion (ADM) checkpoints, their flags, and their classifiers.

The options are the official command-line flags with the official defaults. Knows nothing of solvers: what a
flag says about sampling (the kind of variance) is passed on as `AdmModel.variance`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from samplers.errors import InputError
from samplers.grids import training_betas
from samplers.models.options import parse_options
from samplers.models.process import Process
from samplers.models.protocol import Gradient, Variance
from samplers.models.unet import Architecture, Classifier, UNet
from samplers.models.weights import digest, read_state_dict
from samplers.prediction import Prediction, to_epsilon

# Width of the levels where `channel_mult` is left empty. 32 is ADM-ES' addition; the original has no entry
# for it.
_CHANNEL_MULT: Mapping[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


def _listed(value: object) -> object:
    """The official spelling of a list, "16,8", as a tuple; one number is a list of one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, (int, float)) else value


_Network = TypeVar("_Network", UNet, Classifier)

_Count = Annotated[int, Field(gt=0)]
_CountOrUnset = Annotated[int, Field(ge=-1)]
_Counts = Annotated[tuple[_Count, ...], BeforeValidator(_listed)]
_Multiples = Annotated[
    tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], BeforeValidator(_listed)
]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class AdmOptions:
    """The flags of guided-diffusion's `script_util`, with its defaults.

    Lists are written "16,8" or [16, 8]. `channel_mult` empty means: by image size. Accepted and without
    effect on inference in float32: dropout, use_checkpoint, use_fp16, classifier_use_fp16, use_kl,
    rescale_learned_sigmas. `num_classes` counts the rows of the label embedding (a constant in the official
    code). With `classifier_path` a classifier guides the sampling; its network is described by the
    `classifier_*` flags.
    """

    image_size: _Count = 64
    num_channels: _Count = 128
    num_res_blocks: _Count = 2
    channel_mult: _Multiples = ()
    attention_resolutions: _Counts = (16, 8)
    num_heads: _Count = 4
    num_heads_upsample: _CountOrUnset = -1
    num_head_channels: _CountOrUnset = -1
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    class_cond: bool = False
    num_classes: _Count = 1000
    learn_sigma: bool = False
    dropout: float = 0.0
    use_checkpoint: bool = False
    use_fp16: bool = False
    diffusion_steps: _Count = 1000
    timestep_respacing: str = ""
    noise_schedule: str = "linear"
    predict_xstart: bool = False
    sigma_small: bool = False
    rescale_timesteps: bool = False
    use_kl: bool = False
    rescale_learned_sigmas: bool = False
    classifier_path: str = ""
    classifier_scale: float = 1.0
    classifier_width: _Count = 128
    classifier_depth: _Count = 2
    classifier_attention_resolutions: _Counts = (32, 16, 8)
    classifier_use_scale_shift_norm: bool = True
    classifier_resblock_updown: bool = True
    classifier_use_fp16: bool = False
    classifier_pool: Literal["attention"] = "attention"

    def __post_init__(self) -> None:
        if self.timestep_respacing:
            raise InputError(
                "timestep_respacing is no matter of the model; give the number of steps as sampling.nfe"
            )
        if not self.channel_mult and self.image_size not in _CHANNEL_MULT:
            sizes = ", ".join(map(str, sorted(_CHANNEL_MULT)))
            raise InputError(f"image_size {self.image_size} needs channel_mult (only {sizes} have a default)")
        if self.image_size % 2 ** (len(self.multiples) - 1):
            raise InputError(
                f"image_size {self.image_size} cannot be halved {len(self.multiples) - 1} times, "
                f"once per level of channel_mult {_written(self.multiples)}"
            )
        for name in ("num_heads_upsample", "num_head_channels"):
            if getattr(self, name) == 0:
                raise InputError(f"{name} is 0; use -1 for unset")

    @property
    def multiples(self) -> tuple[float, ...]:
        """`channel_mult`, or the default of the image size."""
        return self.channel_mult or _CHANNEL_MULT[self.image_size]

    @property
    def variance(self) -> Variance:
        """The reverse variance that the official code would take."""
        if self.learn_sigma:
            return "learned_range"
        return "fixed_small" if self.sigma_small else "fixed_large"

    def network(self, channels: int) -> Architecture:
        """The denoiser for images of so many channels."""
        return Architecture(
            in_channels=channels,
            out_channels=2 * channels if self.learn_sigma else channels,
            num_channels=self.num_channels,
            channel_mult=self.multiples,
            num_res_blocks=self.num_res_blocks,
            attention_factors=_factors(self.image_size, self.attention_resolutions),
            num_heads=self.num_heads,
            num_heads_upsample=self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample,
            num_head_channels=self.num_head_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            resblock_updown=self.resblock_updown,
            use_new_attention_order=self.use_new_attention_order,
            num_classes=self.num_classes if self.class_cond else None,
        )

    def classifier(self, channels: int) -> Architecture:
        """The classifier: always the default levels of the image size, 64 channels per head, the
        legacy order."""
        if self.image_size not in _CHANNEL_MULT:
            raise InputError(f"there is no classifier for image_size {self.image_size}")
        return Architecture(
            in_channels=channels,
            out_channels=self.num_classes,
            num_channels=self.classifier_width,
            channel_mult=_CHANNEL_MULT[self.image_size],
            num_res_blocks=self.classifier_depth,
            attention_factors=_factors(self.image_size, self.classifier_attention_resolutions),
            num_head_channels=64,
            use_scale_shift_norm=self.classifier_use_scale_shift_norm,
            resblock_updown=self.classifier_resblock_updown,
        )


def _factors(image_size: int, resolutions: tuple[int, ...]) -> tuple[int, ...]:
    """Official rule: a resolution stands for the down-sampling factor image_size // resolution."""
    return tuple(sorted(image_size // resolution for resolution in resolutions))


class AdmModel:
    """A guided-diffusion network as a `Model`; see there.

    The arithmetic runs in the dtype of `network`, float32 as loaded, whatever x is. `network` and
    `classifier` are plain modules of a tensor time (see `unet`), for whoever wants to compile them.
    """

    time: Literal["discrete"] = "discrete"
    sigma_range: None = None
    round_sigma: None = None
    prior: None = None

    def __init__(
        self,
        options: AdmOptions,
        network: UNet,
        channels: int,
        fingerprint: str,
        classifier: Classifier | None = None,
    ) -> None:
        self.network = network
        self.classifier = classifier
        self.shape = self.image_shape = (channels, options.image_size, options.image_size)
        self.learned_range = options.learn_sigma
        self.variance = options.variance
        self.fingerprint = fingerprint
        self.num_classes = options.num_classes if options.class_cond or classifier else None
        self._class_cond = options.class_cond
        self._scale = options.classifier_scale
        self.answers: Literal["x0", "epsilon"] = "x0" if options.predict_xstart else "epsilon"
        self._process = Process(betas=training_betas(options.noise_schedule, options.diffusion_steps))
        self._time_unit = 1000 / options.diffusion_steps if options.rescale_timesteps else 1.0

    @property
    def betas(self) -> NDArray[np.float64]:
        """See `Model`."""
        assert self._process.betas is not None
        return self._process.betas

    @property
    def gradient(self) -> Gradient | None:
        """See `Model`; there is one when the options name a classifier."""
        return None if self.classifier is None else self._gradient

    def to(self, device: torch.device) -> Self:
        """See `Model`."""
        self.network.to(device)
        if self.classifier is not None:
            self.classifier.to(device)
        return self

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        """See `Model`; `time` is the original training index, 0..diffusion_steps-1."""
        output = self.network(x, self._seen(time, x), labels if self._class_cond else None).to(x.dtype)
        first, v = output.chunk(2, dim=1) if self.learned_range else (output, None)
        if self.answers == "epsilon":
            return Prediction(first, v)
        return Prediction(to_epsilon(self.answers, first, x, *self.level(time)), v)

    def level(self, time: float) -> tuple[float, float]:
        """See `Converting`."""
        return self._process.coefficients(time)

    def _seen(self, time: float, x: Tensor) -> Tensor:
        """The time as the networks get it, float32 [1]: with `rescale_timesteps` index * 1000 / T0."""
        return torch.full((1,), time * self._time_unit, dtype=torch.float32, device=x.device)

    def _gradient(self, x: Tensor, time: float, labels: Tensor) -> Tensor:
        """classifier_scale * d/dx log p(labels | x, time), in x's shape and dtype."""
        assert self.classifier is not None
        # Leaves inference mode too, and copies: a tensor that was made there cannot take part in a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            image = x.detach().float().clone().requires_grad_()
            log_odds = self.classifier(image, self._seen(time, x))
            log_p = torch.log_softmax(log_odds, dim=1).gather(1, labels.clone()[:, None]).sum()
            (slope,) = torch.autograd.grad(log_p, image)
        return slope.to(x.dtype) * self._scale

    def pixels(self, x: Tensor) -> Tensor:
        """See `Model`: ((x + 1) * 127.5), cut to 0..255, fraction dropped."""
        return self._process.pixels(x)


def load_adm(path: Path, options: Mapping[str, object], folder: Path = Path()) -> AdmModel:
    """The network in a guided-diffusion checkpoint, on the CPU.

    `options` are the flags of `AdmOptions`; a relative `classifier_path` starts in `folder`. The number of
    image channels is read from the checkpoint. Raises InputError: unknown or impossible flag, unreadable
    file, or flags that do not fit the file (with the parameters at fault and the flags that would fit).
    """
    flags = parse_options(AdmOptions, "adm", options)
    state = read_state_dict(path)
    channels = _image_channels(path, state, classifier=False)
    architecture = flags.network(channels)
    network = _filled(lambda: UNet(architecture), state, path, _unet_flags(state, flags.image_size), flags)
    classifier = None
    parts: list[object] = [digest(path), asdict(architecture), flags.image_size, flags.predict_xstart]
    parts += [flags.noise_schedule, flags.diffusion_steps, flags.rescale_timesteps]
    if flags.classifier_path:
        file = folder / flags.classifier_path
        state = read_state_dict(file)
        if _image_channels(file, state, classifier=True) != channels:
            raise InputError(f"classifier_path {file} is for images of other channels than {path}")
        guide = flags.classifier(channels)
        fitting = _classifier_flags(state, flags.image_size)
        classifier = _filled(lambda: Classifier(guide, flags.image_size), state, file, fitting, flags)
        parts += [digest(file), asdict(guide), flags.classifier_scale]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return AdmModel(flags, network, channels, fingerprint, classifier)


def _image_channels(path: Path, state: Mapping[str, Tensor], *, classifier: bool) -> int:
    first = state.get("input_blocks.0.0.weight")
    if first is None or first.dim() != 4 or "time_embed.0.weight" not in state:
        some = ", ".join(list(state)[:3])
        raise InputError(
            f"{path} is no guided-diffusion network: it lacks time_embed.0.weight or input_blocks.0.0.weight "
            f"(it has {some}, ...)"
        )
    if classifier != ("out.2.c_proj.weight" in state):
        is_not = (
            "no classifier with an attention pool"
            if classifier
            else "a classifier: give it as classifier_path"
        )
        raise InputError(f"{path} is {is_not}")
    return first.shape[1]


def _filled(
    build: Callable[[], _Network],
    state: Mapping[str, Tensor],
    path: Path,
    fitting: Iterator[tuple[str, object]],
    flags: AdmOptions,
) -> _Network:
    """A network for inference that holds the tensors of `state`; InputError if they are not exactly its
    own."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        network = build()
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        raise InputError(_misfit(path, expected, found, fitting, flags))
    laid_out = {
        name: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        for name, tensor in state.items()
    }
    network.load_state_dict(laid_out, assign=True)
    return network.requires_grad_(False).eval()


def _misfit(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    fitting: Iterator[tuple[str, object]],
    flags: AdmOptions,
) -> str:
    """What does not fit, and which flags would."""
    wrong = []
    for name in [*found, *(name for name in expected if name not in found)]:
        have, want = found.get(name), expected.get(name)
        if have != want:
            there = f"has the shape {list(have)}" if have else "is missing"
            asked = f"the options ask for {list(want)}" if want else "the options ask for no such parameter"
            wrong.append(f"{name} {there} in the file, {asked}")
    more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    changes = []
    with suppress(LookupError, ValueError):  # names that are not as they should be end the inference
        for name, value in fitting:
            given = flags.multiples if name == "channel_mult" else getattr(flags, name)
            if given != value:
                changes.append(f"{name}: {_written(value)} (now {_written(given)})")
    advice = f"Set {', '.join(changes)}" if changes else "Give the flags that it was trained with"
    return f"{path} does not fit model.options. {advice}. Parameters: {'; '.join(wrong[:5])}{more}"


def _written(value: object) -> str:
    """A flag as one would write it in a job file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return '"' + ",".join(f"{part:g}" for part in value) + '"'
    return str(value)


def _unet_flags(state: Mapping[str, Tensor], image_size: int) -> Iterator[tuple[str, object]]:
    """Those flags of a denoiser that its parameters tell; ends early where the names are not as they
    should be."""
    yield "num_channels", state["time_embed.0.weight"].shape[1]
    if "out.2.weight" in state:
        yield "learn_sigma", len(state["out.2.weight"]) == 2 * state["input_blocks.0.0.weight"].shape[1]
    yield "class_cond", "label_emb.weight" in state
    if "label_emb.weight" in state:
        yield "num_classes", len(state["label_emb.weight"])
    # The decoder has num_res_blocks + 1 stages per level, and the last of each level but one ends in an
    # up-sampling: the place of the first one tells the number of blocks.
    stages = _count(state, "output_blocks")
    ups = [name for name in state if _is_up(name)]
    if ups:
        first = min(int(name.split(".")[1]) for name in ups)
        yield "resblock_updown", not any(name.endswith("conv.weight") for name in ups)
    else:
        first = stages - 1
    if first < 1 or stages % (first + 1):
        return
    yield "num_res_blocks", first
    yield from _encoder_flags(state, image_size, first, stages // (first + 1))


def _is_up(name: str) -> bool:
    """Whether a parameter belongs to an up-sampling: the last layer of a decoder stage that is no
    attention."""
    parts = name.split(".")
    return (
        parts[0] == "output_blocks"
        and parts[2] != "0"
        and name.endswith(("in_layers.2.weight", "conv.weight"))
    )


def _classifier_flags(state: Mapping[str, Tensor], image_size: int) -> Iterator[tuple[str, object]]:
    """The same for a classifier, whose levels follow from the image size."""
    yield "classifier_width", state["time_embed.0.weight"].shape[1]
    levels = len(_CHANNEL_MULT[image_size])
    if "out.2.positional_embedding" in state:
        side = math.isqrt(state["out.2.positional_embedding"].shape[1] - 1)
        yield "image_size", side * 2 ** (levels - 1)
    if "out.2.c_proj.weight" in state:
        yield "num_classes", len(state["out.2.c_proj.weight"])
    stages = _count(state, "input_blocks")
    if stages % levels or stages == levels:
        return
    depth = stages // levels - 1
    yield "classifier_resblock_updown", not any(name.endswith(".0.op.weight") for name in state)
    yield "classifier_depth", depth
    names = {"attention_resolutions", "use_scale_shift_norm"}
    for name, value in _encoder_flags(state, image_size, depth, levels):
        if name in names:
            yield f"classifier_{name}", value


def _encoder_flags(
    state: Mapping[str, Tensor], image_size: int, blocks: int, levels: int
) -> Iterator[tuple[str, object]]:
    """Flags told by an encoder of so many levels: stage 0, then per level `blocks` stages and one
    that halves."""
    heads = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    convs = [state.get(f"{head}.0.in_layers.2.weight") for head in heads]
    projection = state.get(f"{heads[0]}.0.emb_layers.1.weight")
    if any(conv is None for conv in convs) or projection is None:
        return
    widths = [len(conv) for conv in convs if conv is not None]
    yield "use_scale_shift_norm", len(projection) == 2 * widths[0]
    yield "channel_mult", tuple(width / state["time_embed.0.weight"].shape[1] for width in widths)
    attended = tuple(
        image_size >> level for level, head in enumerate(heads) if f"{head}.1.qkv.weight" in state
    )
    yield "attention_resolutions", attended


def _count(state: Mapping[str, Tensor], blocks: str) -> int:
    return 1 + max((int(name.split(".")[1]) for name in state if name.startswith(f"{blocks}.")), default=-1)
