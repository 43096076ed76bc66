"""Adapter `python`: a network that the user's own code builds.

Runs that code in this process, and tries the result once. Knows nothing of the network beyond its call:
module(x, t) or, with classes, module(x, t, labels).
"""

import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from samplers.errors import InputError
from samplers.models.options import parse_options
from samplers.models.process import Process, TimeKind
from samplers.models.protocol import Variance
from samplers.models.weights import read_state_dict
from samplers.prediction import Prediction, to_epsilon

_Size = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PythonOptions:
    """What lamtune must know of a network that it cannot look into.

    shape: C, H, W. time and prediction: what the network is told and what it answers: the noise, the clean
    image, or the velocity v = (alpha eps - sigma x0) / sqrt(alpha² + sigma²). Discrete time: noise_schedule
    and diffusion_steps; sigma time: sigma_min and sigma_max, in which x = x0 + sigma eps reaches the network
    as it is. num_classes: it takes labels. learn_sigma: 2C channels come out, the second C interpolate the
    variance. arguments: keyword arguments of the factory. weights: a state dict (torch.save) for the module
    it returns.
    """

    shape: tuple[_Size, _Size, _Size]
    time: TimeKind
    prediction: Literal["epsilon", "x0", "v"]
    noise_schedule: str = "linear"
    diffusion_steps: _Size = 1000
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    num_classes: _Size | None = None
    learn_sigma: bool = False
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str = ""


class PythonModel:
    """The user's module as a `Model`; see there. The module runs in float32 whatever x is."""

    gradient: None = None
    round_sigma: None = None
    prior: None = None

    def __init__(
        self, options: PythonOptions, network: nn.Module, process: Process, fingerprint: str
    ) -> None:
        self.network = network
        self.process = process
        self.fingerprint = fingerprint
        self.shape = self.image_shape = options.shape
        self.num_classes = options.num_classes
        self.learned_range = options.learn_sigma
        self.variance: Variance = "learned_range" if options.learn_sigma else "fixed_large"
        self.time = process.time
        self.betas = process.betas
        self.sigma_range = process.sigma_range
        self.answers = options.prediction

    def to(self, device: torch.device) -> Self:
        """See `Model`."""
        self.network.to(device)
        return self

    def answer(self, x: Tensor, time: float, labels: Tensor | None) -> Any:
        """What the module says to float32 x and t [B]: int64 indices in discrete time, float32 sigmas
        otherwise, and float32 too where a solver asks between two indices."""
        kind = torch.int64 if self.time == "discrete" and float(time).is_integer() else torch.float32
        times = torch.full((len(x),), time, dtype=torch.float64, device=x.device).to(kind)
        given = (x.float(), times) if self.num_classes is None else (x.float(), times, labels)
        return self.network(*given)

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        """See `Model`."""
        output = self.answer(x, time, labels).to(x.dtype)
        first, v = output.chunk(2, dim=1) if self.learned_range else (output, None)
        return Prediction(to_epsilon(self.answers, first, x, *self.level(time)), v)

    def level(self, time: float) -> tuple[float, float]:
        """See `Converting`."""
        return self.process.coefficients(time)

    def pixels(self, x: Tensor) -> Tensor:
        """See `Model`: ADM's rounding for discrete time, EDM's for sigma time."""
        return self.process.pixels(x)


def load_python(target: str, options: Mapping[str, object], folder: Path = Path()) -> PythonModel:
    """The network that `target` builds, on the CPU, tried once on two images of noise.

    target: "file.py:factory" or "package.module:factory"; relative paths start in `folder`, and modules are
    looked up there too. The factory runs under a fixed torch seed, so that every process gets the same
    initial weights. Raises InputError for whatever is missing, raises, or has the wrong shape.

    The fingerprint covers the factory's source file, the state dict and the options; not other modules that
    the source imports.
    """
    chosen = parse_options(PythonOptions, "python", options)
    process = Process.of(
        chosen.time, chosen.noise_schedule, chosen.diffusion_steps, chosen.sigma_min, chosen.sigma_max
    )
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise InputError(f"model.path {target!r} must be file.py:factory or package.module:factory")
    with _importing_from(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _module(place, folder)
        network = _network(target, module, name, chosen.arguments)
        if chosen.weights:
            _fill(network, folder / chosen.weights)
        network.requires_grad_(False).eval()
        fingerprint = _fingerprint(module, network, chosen)
        model = PythonModel(chosen, network, process, fingerprint)
        _try(target, model)
    return model


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


class _Unkept(SourceFileLoader):
    """Runs a file as it is now. Python's kept bytecode stands for any text of the same length and second of change."""

    def get_code(self, fullname: str) -> CodeType:
        """See SourceLoader."""
        return self.source_to_code(self.get_data(self.path), self.path)


def _module(place: str, folder: Path) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = (folder / place).resolve()
        if not path.is_file():
            raise InputError(f"model.path: there is no file {path}")
        # One name per file, so that two files of the same name do not replace each other.
        name = f"lamtune_user_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        spec = importlib.util.spec_from_file_location(name, path, loader=_Unkept(name, str(path)))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look their module up
        spec.loader.exec_module(module)
        return module
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"model.path: importing {place} failed: {_told(error)}") from error


def _network(target: str, module: ModuleType, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    factory: Callable[..., object] | None = getattr(module, name, None)
    if factory is None:
        raise InputError(f"model.path {target}: {module.__file__} has no {name!r}")
    if not callable(factory):
        raise InputError(
            f"model.path {target}: {name!r} is a {type(factory).__name__}, not a function or class"
        )
    try:
        network = factory(**arguments)
    except Exception as error:
        raise InputError(
            f"model.path {target}: {name}(**model.options.arguments) failed: {_told(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            f"model.path {target}: {name} returned a {type(network).__name__}, not a torch.nn.Module"
        )
    return network


def _fill(network: nn.Module, path: Path) -> None:
    try:
        network.load_state_dict(read_state_dict(path))
    except RuntimeError as error:  # torch lists every name and shape that does not fit
        raise InputError(f"model.options.weights: {path} does not fit the network. {error}") from error


def _try(target: str, model: PythonModel) -> None:
    """One call with two images of noise at the middle of the times."""
    if model.betas is not None:
        time = float(len(model.betas) // 2)
    else:
        assert model.sigma_range is not None
        time = min(max(model.sigma_range[0], 1.0), model.sigma_range[1])
    x = torch.randn(2, *model.shape)
    channels, *sides = model.shape
    wanted = (2, 2 * channels if model.learned_range else channels, *sides)
    try:
        with torch.no_grad():
            output = model.answer(x, time, torch.zeros(2, dtype=torch.int64))
    except Exception as error:
        asked = "(x, t)" if model.num_classes is None else "(x, t, labels)"
        raise InputError(
            f"model.path {target}: calling the network with {asked}, x of shape {list(x.shape)}, failed: "
            f"{_told(error)}"
        ) from error
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise InputError(
            f"model.path {target}: the network returned a {_kind(output)}, not a floating-point tensor"
        )
    if output.shape != wanted:
        raise InputError(
            f"model.path {target}: the network answers x of shape {list(x.shape)} with {list(output.shape)}, "
            f"where shape and learn_sigma in model.options ask for {list(wanted)}"
        )


def _kind(value: object) -> str:
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _fingerprint(module: ModuleType, network: nn.Module, options: PythonOptions) -> str:
    about = asdict(options)
    del about["weights"]  # its content counts, as part of the state dict, and not its name
    content = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    if module.__file__ is not None:
        content.update(Path(module.__file__).read_bytes())
    for name, value in network.state_dict().items():
        if isinstance(value, Tensor):
            content.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            content.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
