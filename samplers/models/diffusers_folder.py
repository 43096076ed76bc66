"""Adapter `diffusers`: a folder of the diffusers library, as its `save_pretrained` writes it.

Reads local files only, weights as safetensors (or `.bin` through torch's weights-only loader) and no code. The
networks are the library's own, an optional dependency. Knows nothing of solvers, and of λ only where it acts: on what
a call returns, which is the guided noise.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from samplers.diffusers_schedulers import config_betas, full_config, library
from samplers.errors import InputError
from samplers.ldm import classifier_free
from samplers.models.options import parse_options
from samplers.models.process import Process
from samplers.models.protocol import Variance
from samplers.models.weights import digest, read_state_dict
from samplers.prediction import Prediction, to_epsilon

_Size = Annotated[int, Field(gt=0)]
Answer = Literal["epsilon", "x0", "v"]
_ANSWERS: Mapping[str, Answer] = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PIXELS_AT_ONCE = 2**21  # what the decoder makes in one call: 32 images of 256×256


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DiffusersOptions:
    """What a folder does not say.

    guidance_scale: classifier-free guidance g of a class-conditional network, eps_u + g·(eps_c - eps_u); None: none.
    The unconditional half gets the last row of the label embedding. num_classes: labels are drawn from 0 to this
    minus 1; default all rows that stand for classes. sample_size: height and width of the state, where the network's
    config.json leaves it open. scheduler: overrides keys of scheduler_config.json, or stands for a missing one.
    """

    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    num_classes: _Size | None = None
    sample_size: tuple[_Size, _Size] | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)


class DiffusersModel:
    """A denoiser of the library as a `Model`; see there. It runs in float32 unless autocast says otherwise.

    guidance: its scale, and the label that stands for no class. decoder: from latents to images in [-1, 1], in float32.
    """

    time: Literal["discrete"] = "discrete"
    gradient: None = None
    prior: None = None
    round_sigma: None = None
    sigma_range: None = None

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        *,
        shape: tuple[int, int, int],
        answers: Answer,
        variance: Variance,
        num_classes: int | None,
        guidance: tuple[float, int] | None,
        decoder: "Decoder | None",
        scheduler_config: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        self.network = network
        self.process = process
        self.shape = shape
        self.answers = answers
        self.variance = variance
        self.learned_range = variance == "learned_range"
        self.num_classes = num_classes
        self.decoder = decoder
        self.scheduler_config = scheduler_config
        self.fingerprint = fingerprint
        self._guidance = guidance

    @property
    def betas(self) -> NDArray[np.float64]:
        """See `Model`."""
        assert self.process.betas is not None
        return self.process.betas

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """See `Model`."""
        return self.shape if self.decoder is None else self.decoder.image_shape(self.shape)

    def to(self, device: torch.device) -> Self:
        """See `Model`."""
        self.network.to(device)
        if self.decoder is not None:
            self.decoder.network.to(device)
        return self

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        """See `Model`. With guidance the network sees the batch twice, and v is that of the conditional half."""
        if self._guidance is None:
            return self._predict(x, time, labels)
        assert labels is not None
        scale, null = self._guidance
        both = torch.cat([torch.full_like(labels, null), labels])
        return classifier_free(lambda twice, _: self._predict(twice, time, both), scale)(x, 0)

    def _predict(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        times = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        given = {} if self.num_classes is None else {"class_labels": labels}
        output = self.network(x.float(), times, return_dict=False, **given)[0].to(x.dtype)
        first, v = output.chunk(2, dim=1) if self.learned_range else (output, None)
        return Prediction(to_epsilon(self.answers, first, x, *self.level(time)), v)

    def level(self, time: float) -> tuple[float, float]:
        """See `Converting`."""
        return self.process.coefficients(time)

    def pixels(self, x: Tensor) -> Tensor:
        """See `Model`: decoded where x is a latent; then as the library's pipelines, 255·clamp(x/2 + 1/2, 0, 1) rounded
        to the nearest integer, halves to even (ADM and EDM drop the fraction)."""
        image = x.float() if self.decoder is None else self.decoder(x.float())
        return ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


class Decoder:
    """The second half of a VQModel or AutoencoderKL."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self._scale: float = network.config.scaling_factor
        self._shift: float = network.config.get("shift_factor") or 0.0

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """C, H, W of the image of a latent of that shape."""
        factor = 2 ** (len(self.network.config.block_out_channels) - 1)
        return self.network.config.out_channels, shape[1] * factor, shape[2] * factor

    def __call__(self, x: Tensor) -> Tensor:
        """Latents float32 [B, C, h, w], as they were sampled → images [B, C, H, W], a few at a time."""
        _, height, width = self.image_shape((1, *x.shape[-2:]))
        size = max(1, _PIXELS_AT_ONCE // (height * width))
        parts = (x[i : i + size] / self._scale + self._shift for i in range(0, len(x), size))
        return torch.cat([self.network.decode(part, return_dict=False)[0] for part in parts])


def load_diffusers(path: Path, options: Mapping[str, object]) -> DiffusersModel:
    """The network of a folder, on the CPU.

    path: a pipeline's folder (`unet` or `transformer`, `scheduler`, and `vqvae` or `vae` where the network works on
    latents), or that of a network alone, with its scheduler_config.json beside config.json or in the options. Nothing
    is downloaded.

    Raises InputError where diffusers is missing, and, naming file or key, for other networks than UNet2DModel and
    DiTTransformer2DModel, other decoders than VQModel and AutoencoderKL, schedulers that do not describe a
    discrete-time process, weights that do not fit, and options that do not.
    """
    chosen = parse_options(DiffusersOptions, "diffusers", options)
    library()
    if not path.is_dir():
        raise InputError(
            f"model.path: there is no folder {path}; format 'diffusers' reads one that save_pretrained wrote, and "
            "downloads nothing"
        )
    files = _Files(path)
    place, config = _denoiser(files)
    scheduler, source = _scheduler(files, chosen)
    full = full_config(scheduler, source)
    answers = _ANSWERS.get(full["prediction_type"])
    if answers is None:
        raise InputError(
            f"{source}: prediction_type {full['prediction_type']!r} is none of {', '.join(_ANSWERS)}"
        )
    shape, learned = _shape(place, config, chosen)
    num_classes, guidance = _classes(place, config, chosen)
    decoder = _decoder(files, shape)
    network = _network(files, place, config)
    return DiffusersModel(
        network,
        Process(betas=config_betas(full, source)),
        shape=shape,
        answers=answers,
        variance=_variance(full, learned),
        num_classes=num_classes,
        guidance=guidance,
        decoder=decoder,
        scheduler_config=scheduler,
        fingerprint=files.fingerprint(chosen),
    )


class _Files:
    """The files of a folder that were read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._digests: dict[str, str] = {}

    def use(self, path: Path) -> Path:
        """Notes the file for the fingerprint. Raises InputError if it cannot be read."""
        self._digests[path.relative_to(self.root).as_posix()] = digest(path)
        return path

    def json(self, path: Path) -> dict[str, Any]:
        """The mapping in a JSON file."""
        try:
            content = json.loads(self.use(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is no JSON file: {error}") from None
        if not isinstance(content, dict):
            raise InputError(f"{path} holds a {type(content).__name__}, where a configuration is needed")
        return content

    def fingerprint(self, options: DiffusersOptions) -> str:
        """Digest of all files that were used, and of the options."""
        text = json.dumps([self._digests, asdict(options)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _denoiser(files: _Files) -> tuple[Path, dict[str, Any]]:
    """The folder of the denoising network and its config.json."""
    for place in (files.root / "unet", files.root / "transformer", files.root):
        if (place / "config.json").is_file():
            break
    else:
        raise InputError(f"{files.root} has no unet/config.json, transformer/config.json or config.json")
    config = files.json(place / "config.json")
    name = config.get("_class_name")
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        config["_class_name"] = "DiTTransformer2DModel"  # how DiT was called in folders of older versions
    elif name == "UNet2DConditionModel":
        raise InputError(
            f"{place}: a UNet2DConditionModel needs text embeddings, which lamtune has none of; UNet2DModel and "
            "DiTTransformer2DModel, without classes or with, can be used"
        )
    elif name not in ("UNet2DModel", "DiTTransformer2DModel"):
        raise InputError(f"{place}: {name!r} cannot be used, only UNet2DModel and DiTTransformer2DModel")
    return place, config


def _scheduler(files: _Files, options: DiffusersOptions) -> tuple[dict[str, Any], str]:
    """The scheduler's configuration, and what to call it in errors."""
    for path in (files.root / "scheduler" / "scheduler_config.json", files.root / "scheduler_config.json"):
        if path.is_file():
            return files.json(path) | options.scheduler, str(path)
    if not options.scheduler:
        raise InputError(
            f"{files.root} has no scheduler/scheduler_config.json, so the noise schedule is not known; give it as "
            "model.options.scheduler, such as {_class_name: DDPMScheduler, beta_schedule: linear}"
        )
    return dict(options.scheduler), "model.options.scheduler"


def _shape(
    place: Path, config: Mapping[str, Any], options: DiffusersOptions
) -> tuple[tuple[int, int, int], bool]:
    """C, H, W of the state, and whether the network learned its variance."""
    dit = config["_class_name"] == "DiTTransformer2DModel"
    channels = config.get("in_channels", 4 if dit else 3)
    out = config.get("out_channels", None if dit else 3) or channels
    if out not in (channels, 2 * channels):
        raise InputError(f"{place}: {out} channels come out of the network, and {channels} go in")
    size = config.get("sample_size", 32 if dit else None)
    if options.sample_size is not None:
        if size is not None:
            raise InputError(f"model.options.sample_size: {place} has it, as {size}; leave it out")
        size = options.sample_size
    if size is None:
        raise InputError(
            f"{place} leaves the size of images open; give model.options.sample_size: [height, width]"
        )
    height, width = (size, size) if isinstance(size, int) else size
    if config.get("time_embedding_type", "positional") != "positional":
        raise InputError(
            f"{place}: time_embedding_type {config['time_embedding_type']!r} is not that of a network of "
            "discrete timesteps; only positional can be used"
        )
    return (channels, height, width), out == 2 * channels


def _classes(
    place: Path, config: Mapping[str, Any], options: DiffusersOptions
) -> tuple[int | None, tuple[float, int] | None]:
    """The number of classes, and scale and null label of guidance."""
    guided = options.guidance_scale is not None and options.guidance_scale != 1
    if config["_class_name"] == "DiTTransformer2DModel":
        rows = (config.get("num_embeds_ada_norm") or 1000) + 1  # one for "no class"
        most = rows - 1
    else:
        if config.get("class_embed_type") is not None:
            raise InputError(
                f"{place}: class_embed_type {config['class_embed_type']!r} is no embedding of labels"
            )
        rows = config.get("num_class_embeds") or 0
        most = rows - guided
    if not rows:
        if options.guidance_scale is not None or options.num_classes is not None:
            raise InputError(
                f"model.options: {place} knows no classes; leave guidance_scale and num_classes out"
            )
        return None, None
    if options.num_classes is not None and options.num_classes > most:
        raise InputError(f"model.options.num_classes: the network knows {most}, not {options.num_classes}")
    if not guided:
        return options.num_classes or most, None
    assert options.guidance_scale is not None
    return options.num_classes or most, (options.guidance_scale, rows - 1)


def _variance(scheduler: Mapping[str, Any], learned: bool) -> Variance:
    if learned:
        return "learned_range"
    return "fixed_large" if str(scheduler.get("variance_type")).startswith("fixed_large") else "fixed_small"


def _decoder(files: _Files, shape: tuple[int, int, int]) -> Decoder | None:
    for place in (files.root / "vqvae", files.root / "vae"):
        if not (place / "config.json").is_file():
            continue
        config = files.json(place / "config.json")
        if config.get("_class_name") not in ("VQModel", "AutoencoderKL"):
            raise InputError(
                f"{place}: {config.get('_class_name')!r} cannot be used, only VQModel and AutoencoderKL"
            )
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise InputError(f"{place}: latents_mean and latents_std cannot be used, only scaling_factor")
        network: Any = _network(files, place, config)
        if network.config.latent_channels != shape[0]:
            raise InputError(
                f"{place} decodes {network.config.latent_channels} channels, the network makes {shape[0]}"
            )
        return Decoder(network)
    if shape[0] not in (1, 3):
        raise InputError(
            f"{files.root}: the network makes {shape[0]} channels, but there is no vqvae or vae folder to decode them"
        )
    return None


def _network(files: _Files, place: Path, config: Mapping[str, Any]) -> nn.Module:
    """The module that config.json in `place` describes, with its weights, frozen."""
    if config.get("quantization_config") is not None:
        raise InputError(f"{place}: quantized weights cannot be used; save them in float32")
    kind = getattr(library(), config["_class_name"])
    safe = (place / _WEIGHTS).is_file() or (place / f"{_WEIGHTS}.index.json").is_file()
    for path in _weights(files, place):
        files.use(path)
        if not safe:
            read_state_dict(
                path
            )  # refuses by name whatever is not a tensor; the library's loader is as strict
    try:
        with torch.random.fork_rng(devices=[]):
            network, report = kind.from_pretrained(
                str(place),
                local_files_only=True,
                use_safetensors=safe,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # wrong configurations, shapes and damaged files raise many types
        raise InputError(f"{place} cannot be loaded: {type(error).__name__}: {error}") from error
    _complete(place, report)
    for name, value in network.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{place}: parameter {name!r} holds NaN or infinity")
    network.requires_grad_(False).eval()
    assert isinstance(network, nn.Module)
    return network


def _weights(files: _Files, place: Path) -> Iterable[Path]:
    """The weight files of a network: one, or an index and its parts."""
    if (place / _WEIGHTS).is_file():
        return [place / _WEIGHTS]
    if (index := place / f"{_WEIGHTS}.index.json").is_file():
        parts = set(map(str, files.json(index).get("weight_map", {}).values()))
        if any(Path(part).name != part for part in parts):
            raise InputError(f"{index} names files outside of its folder")
        return [place / part for part in sorted(parts)]
    if (old := place / "diffusion_pytorch_model.bin").is_file():
        return [old]
    raise InputError(f"{place} has no {_WEIGHTS} (variants such as fp16 are not read)")


def _complete(place: Path, report: Mapping[str, Iterable[Any]]) -> None:
    """The library gives parameters that the file lacks random values; here that is an error."""
    for key, what in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has too much:"),
        ("mismatched_keys", "has in another shape"),
    ):
        names = [str(name) for name in report[key]]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise InputError(
                f"{place}: the weights do not fit config.json: the file {what} {', '.join(names[:5])}{more}"
            )
