"""Adapter `diffusers`: a folder of the diffusers library, as its `save_pretrained` writes it.

Reads local files only, weights as safetensors (or `.bin` through torch's weights-only loader) and no code. The
networks are the library's own, an optional dependency; what is made of them is `diffusers_model`'s matter. Knows
nothing of solvers.
"""

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from samplers.diffusers_schedulers import config_betas, full_config, library
from samplers.errors import InputError
from samplers.models.diffusers_model import Answer, ClassContext, Decoder, DiffusersModel
from samplers.models.options import parse_options
from samplers.models.process import Process
from samplers.models.protocol import Variance
from samplers.models.weights import digest, read_state_dict, usable

_Size = Annotated[int, Field(gt=0)]
_ANSWERS: Mapping[str, Answer] = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_NETWORKS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DiffusersOptions:
    """What a folder does not say.

    guidance_scale: classifier-free guidance g of a class-conditional network, eps_u + g·(eps_c - eps_u); None: none.
    The unconditional half gets the last row of the label embedding, and with 0 all images do. num_classes: labels are
    drawn from 0 to this minus 1; default all rows, with guidance all but the last. class_embedder: for a
    UNet2DConditionModel that attends to its class (LDM on ImageNet), the file of the embedding that makes a label the
    context, LDM's ClassEmbedder: safetensors or torch.save of a state dict with that one tensor [rows, width];
    folders of the library have no place for it. sample_size: height and width of the state, where the network's
    config.json leaves it open. scheduler: overrides keys of scheduler_config.json, or stands for a missing one.
    """

    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    num_classes: _Size | None = None
    class_embedder: str | None = None
    sample_size: tuple[_Size, _Size] | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)


def load_diffusers(path: Path, options: Mapping[str, object], folder: Path = Path()) -> DiffusersModel:
    """The network of a folder, on the CPU. A relative class_embedder starts in `folder`.

    path: a pipeline's folder (`unet` or `transformer`, `scheduler`, and `vqvae` or `vae` where the network works on
    latents), or that of a network alone, with its scheduler_config.json beside config.json or in the options. Nothing
    is downloaded.

    Raises InputError where diffusers is missing, and, naming file or key, for other networks than UNet2DModel,
    UNet2DConditionModel (without cross-attention, or attending to an embedded class) and DiTTransformer2DModel, other
    decoders than VQModel and AutoencoderKL, schedulers that do not describe a discrete-time process, weights that do
    not fit, and options that do not.
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
    contexts = _contexts(files, place, config, chosen, folder)
    num_classes, guidance = _classes(place, config, chosen, contexts)
    decoder = _decoder(files, shape)
    network = _network(files, place, config)
    if config["_class_name"] == "UNet2DConditionModel":
        network = ClassContext(network, contexts)
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
        inside = path.is_relative_to(self.root)
        self._digests[path.relative_to(self.root).as_posix() if inside else path.name] = digest(path)
        return path

    def json(self, path: Path) -> dict[str, Any]:
        """The mapping in a JSON file."""
        try:
            content = json.loads(self.use(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is no JSON file: {error}") from None
        if not isinstance(content, dict):
            raise InputError(f"{path} holds a {type(content).__name__}, where a configuration is needed")
        return content

    def fingerprint(self, options: DiffusersOptions) -> str:
        """Digest of all files that were used, and of the options."""
        about = asdict(options)
        del about["class_embedder"]  # one of the files
        text = json.dumps([self._digests, about], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _denoiser(files: _Files) -> tuple[Path, dict[str, Any]]:
    """The folder of the denoising network and its config.json, with the defaults of its class filled in."""
    for place in (files.root / "unet", files.root / "transformer", files.root):
        if (place / "config.json").is_file():
            break
    else:
        raise InputError(f"{files.root} has no unet/config.json, transformer/config.json or config.json")
    config = files.json(place / "config.json")
    name = config.get("_class_name")
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        config["_class_name"] = "DiTTransformer2DModel"  # how DiT was called in folders of older versions
    elif name not in _NETWORKS:
        raise InputError(f"{place}: {name!r} cannot be used, only {', '.join(_NETWORKS)}")
    arguments = inspect.signature(getattr(library(), config["_class_name"])).parameters.values()
    return place, {p.name: p.default for p in arguments if p.default is not p.empty} | config


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
    for key in ("in_channels", "out_channels", "num_class_embeds", "num_embeds_ada_norm"):
        if not isinstance(config.get(key), int | None):
            raise InputError(f"{place}: {key} is {config[key]!r}, not a number")
    channels = config["in_channels"]
    out = config["out_channels"] or channels
    if out not in (channels, 2 * channels):
        raise InputError(f"{place}: {out} channels come out of the network, and {channels} go in")
    size = config["sample_size"]
    if options.sample_size is not None:
        if size is not None:
            raise InputError(f"model.options.sample_size: {place} has it, as {size}; leave it out")
        size = options.sample_size
    if size is None:
        raise InputError(
            f"{place} leaves the size of images open; give model.options.sample_size: [height, width]"
        )
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise InputError(f"{place}: sample_size {size!r} is no height and width")
    height, width = sides
    if config.get("time_embedding_type", "positional") != "positional":
        raise InputError(
            f"{place}: time_embedding_type {config['time_embedding_type']!r} is not that of a network of "
            "discrete timesteps; only positional can be used"
        )
    return (channels, height, width), out == 2 * channels


def _contexts(
    files: _Files, place: Path, config: Mapping[str, Any], options: DiffusersOptions, folder: Path
) -> Tensor | None:
    """What a UNet2DConditionModel attends to: a row per label, float32 [rows, width]."""
    blocks = [config.get(part) for part in ("down_block_types", "mid_block_type", "up_block_types")]
    if config["_class_name"] != "UNet2DConditionModel" or "CrossAttn" not in str(blocks):
        if options.class_embedder is not None:
            raise InputError(
                f"model.options.class_embedder: {place} attends to no context; leave the option out"
            )
        return None
    for key in ("encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type", "num_class_embeds"):
        if config[key] is not None:
            raise InputError(f"{place}: {key} cannot be used together with cross-attention")
    width = config["cross_attention_dim"]
    if not isinstance(width, int):
        raise InputError(f"{place}: cross_attention_dim is {width!r}; one width is needed")
    if options.class_embedder is None:
        raise InputError(
            f"{place}: the network attends to a context of width {width}. Where that is an embedded class (LDM on "
            f"ImageNet), name the file of the embedding [classes, {width}] as model.options.class_embedder; there is "
            "no way to give it a text"
        )
    path = files.use(folder / options.class_embedder)
    state = _tensors(path)
    if len(state) != 1:
        some = ", ".join(list(state)[:3])
        raise InputError(
            f"model.options.class_embedder: {path} holds {len(state)} tensors ({some} …); save the embedding alone, "
            'torch.save({"embedding.weight": …}, path)'
        )
    ((name, table),) = state.items()
    if table.dim() != 2 or table.shape[1] != width:
        raise InputError(
            f"model.options.class_embedder: {name} in {path} is {list(table.shape)}, but {place} attends to a "
            f"context of width {width}: [classes, {width}] is needed"
        )
    return table


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch.save file, floating point ones as float32."""
    if path.suffix != ".safetensors":
        return read_state_dict(path)
    from safetensors.torch import load_file  # comes with diffusers

    try:
        state = load_file(path)
    except Exception as error:  # of types of its own
        raise InputError(f"{path} is damaged, or no safetensors file: {error}") from error
    return {name: usable(path, name, value) for name, value in state.items()}


def _classes(
    place: Path, config: Mapping[str, Any], options: DiffusersOptions, contexts: Tensor | None
) -> tuple[int | None, tuple[float, int] | None]:
    """The number of classes, and scale and null label of guidance."""
    guided = options.guidance_scale is not None and options.guidance_scale != 1
    if config["_class_name"] == "DiTTransformer2DModel":
        rows = config["num_embeds_ada_norm"] + 1  # one for "no class"
        most = rows - 1
    else:
        if config["class_embed_type"] is not None:
            raise InputError(
                f"{place}: class_embed_type {config['class_embed_type']!r} is no embedding of labels"
            )
        rows = config["num_class_embeds"] or 0 if contexts is None else len(contexts)
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
