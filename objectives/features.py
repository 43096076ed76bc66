"""Feature extractors: images in, one vector per image out, with a fingerprint of how.

Knows nothing of samplers, of moments or distances, or of where images come from.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from samplers.errors import InputError
from samplers.rounding import float32

DIGITS = "digits"
DIGITS_WEIGHTS = Path(__file__).with_name("digits-features.pt")
INCEPTION = "inception-v3-compat"
# Of Inception: the published Inception scores are of these logits, a linear function of those features.
_LOGITS, _POOLED = "logits_unbiased", "2048"
_OPTIONS = ("name", "path", "sha256", "layer")


def names() -> tuple[str, ...]:
    """Every extractor that is asked for by name; anything else is a TorchScript file."""
    return (DIGITS, *sorted(_registry()))


def _registry() -> Mapping[str, Any]:
    # Imported here: with torchvision it costs seconds, which the bundled and the TorchScript features need not pay.
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    return cast(Mapping[str, Any], FEATURE_EXTRACTORS_REGISTRY)


class Extractor(Protocol):
    """What turns images into features.

    `fingerprint` is a hex SHA-256 of the weights, the layer, the resize rule and the dtype: features with
    different fingerprints are never compared. A call takes uint8 [N, C, H, W] with values 0..255 on any
    device (grey C = 1 is repeated for an extractor of colour images) and gives floating [N, dim] on the
    extractor's device, without gradient.
    """

    name: str
    dim: int
    fingerprint: str

    def to(self, device: torch.device | str) -> Self:
        """The same extractor with its weights on `device`."""
        ...

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(slots=True, eq=False)
class NetworkExtractor:
    """An `Extractor` around a network of uint8 [n, channels, H, W] → [n, dim], `chunk` images at a time.

    head: class logits [n, classes] of features [n, dim]; None where these features are not those that it classifies by.
    The chunk bounds the memory whatever the caller's batch is. On CUDA, convolutions run deterministically
    and nothing runs in TF32, whose 10-bit mantissa would make the values of different GPUs differ.
    """

    name: str
    network: nn.Module
    dim: int
    fingerprint: str
    channels: int
    chunk: int
    head: Callable[[Tensor], Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self._run(part) for part in torch.split(images, self.chunk)])

    def logits(self, features: Tensor) -> Tensor | None:
        """The class logits [N, classes] of images from their features [N, dim] on the extractor's device, if it has
        them."""
        if self.head is None:
            return None
        with torch.no_grad(), _full_precision():
            return self.head(features)

    def _run(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        images = images.to(self.device)
        if images.shape[1] == 1:
            images = images.expand(-1, self.channels, -1, -1)
        # The profiling executor of TorchScript would compile anew for each batch size, with other rounding.
        with (
            torch.no_grad(),
            _full_precision(),
            torch.jit.optimized_execution(False),  # type: ignore[attr-defined]
        ):
            features: Tensor = self.network(images)
            return features


@contextmanager
def _full_precision() -> Iterator[None]:
    """Deterministic convolutions, and no TF32 for float32; the caller's settings come back after."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        with float32(convolutions="ieee", products="ieee"):
            yield
    finally:
        cudnn.deterministic = before


class DigitsFeatures(nn.Module):
    """A small classifier of 8×8 grey digits; its 64 pooled features are the bundled extractor "digits".

    Input of both methods: [N, 1, 8, 8], pixels 0..255, uint8 or floating. The result has the dtype of the
    weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
        )
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [N, 64]."""
        x: Tensor = self.layers(images.to(self.head.weight.dtype) / 127.5 - 1)
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of the digits 0 to 9."""
        logits: Tensor = self.head(self.features(images))
        return logits


def load_extractor(
    spec: str | os.PathLike[str] | Mapping[str, object], image_shape: tuple[int, int, int]
) -> NetworkExtractor:
    """The extractor that a job file's `features:` asks for, on the CPU.

    `spec` is one of `names()` (torch-fidelity's also as "name/layer"), the path of a TorchScript file that
    takes uint8 [N, C, H, W] to [N, D], or a mapping with `name` and/or `path`, and optionally `sha256` and
    `layer`. With a name, `path` is the file of its weights, so that nothing is downloaded; `sha256` (hex) of
    the file is checked before the file is parsed. State dicts are loaded without executing anything in them.
    A TorchScript file is a program: give only one that you trust. `image_shape` is (C, H, W) of the images to
    come.

    Raises InputError, naming the key or file and the next step, for whatever cannot be used.
    """
    options = _options(spec)
    name, layer, sha256 = options.get("name"), options.get("layer"), options.get("sha256")
    path = Path(options["path"]) if "path" in options else None
    if image_shape[0] not in (1, 3):
        raise InputError(
            f"features: the model makes {image_shape[0]} channels, but features need grey or RGB images"
        )
    if name is not None and name != DIGITS and name in _registry():
        return _torch_fidelity(name, layer, path, sha256, image_shape)
    if layer is not None:
        raise InputError(f"features.layer: {name or path} has no layers to choose; leave it out")
    if name == DIGITS:
        return _digits(path or DIGITS_WEIGHTS, sha256, image_shape)
    if name is None and path is not None:
        return _torchscript(path, sha256, image_shape)
    raise InputError(f"features.name: {name!r} is not known; take one of {', '.join(names())}")


def _options(spec: str | os.PathLike[str] | Mapping[str, object]) -> dict[str, str]:
    """The options as texts, whatever form the job file gave them in: with `name`, or `path`, or both."""
    if not isinstance(spec, Mapping):
        text = os.fspath(spec)
        if text == DIGITS or (not Path(text).is_absolute() and text.split("/")[0] in names()):
            spec = {"name": text}
        elif Path(text).exists():
            spec = {"path": text}
        else:
            raise InputError(
                f"features: {text!r} is neither a file nor a known name; "
                f"give the path of a TorchScript file or one of {', '.join(names())}"
            )
    unknown = sorted(set(spec) - set(_OPTIONS))
    if unknown:
        raise InputError(f"features.{unknown[0]}: no such option; there are {', '.join(_OPTIONS)}")
    options = {key: str(value) for key, value in spec.items() if value is not None}
    if not options.keys() & {"name", "path"}:
        raise InputError(f"features: give a name ({', '.join(names())}) or the path of a TorchScript file")
    name, slash, layer = options.get("name", "").partition("/")
    if slash:
        if options.setdefault("layer", layer) != layer:
            raise InputError(f"features.layer: {options['layer']!r} contradicts the name {options['name']!r}")
        options["name"] = name
    return options


def _digits(path: Path, sha256: str | None, image_shape: tuple[int, int, int]) -> NetworkExtractor:
    if image_shape != (1, 8, 8):
        raise InputError(
            f"features: {DIGITS!r} is for images of shape (1, 8, 8), but the model makes {image_shape}"
        )
    network = DigitsFeatures()
    raw = _read(path, sha256)
    try:
        network.load_state_dict(torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True))
    except Exception as error:
        raise _unusable(path, 'weights of "digits"', error) from error
    # float64: the value of an image is the same to 1e-12 in any batch, on any device.
    module = _Features(network.double().requires_grad_(False).eval())
    fingerprint = _fingerprint(_state_digest(network), "digits", "no resize", "float64")
    return NetworkExtractor(DIGITS, module, 64, fingerprint, channels=1, chunk=100, head=network.head)


def _torchscript(path: Path, sha256: str | None, image_shape: tuple[int, int, int]) -> NetworkExtractor:
    raw = _read(path, sha256)
    try:
        with warnings.catch_warnings():
            # torch says of every use that torch.export is to replace torch.jit; the user cannot act on it.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(io.BytesIO(raw), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise _unusable(path, "TorchScript file", error) from error
    content = hashlib.sha256(raw).hexdigest()
    failure: Exception | None = None
    for channels in dict.fromkeys((image_shape[0], 3)):
        extractor = NetworkExtractor(path.name, network, 0, "", channels, chunk=250)
        try:
            probe = _probe(extractor, image_shape)
        except Exception as error:
            failure = failure or error
            continue
        extractor.dim = probe.shape[1]
        extractor.fingerprint = _fingerprint(content, "torchscript", "no resize", str(probe.dtype))
        return extractor
    assert failure is not None
    raise InputError(
        f"features: {path} failed on two uint8 images of shape {image_shape}: {_last_line(failure)}; "
        "it has to map uint8 [N, C, H, W] to floating [N, D]"
    ) from failure


def _torch_fidelity(
    name: str, layer: str | None, path: Path | None, sha256: str | None, image_shape: tuple[int, int, int]
) -> NetworkExtractor:
    from torch_fidelity.utils import create_feature_extractor

    kind = _registry()[name]
    layers = kind.get_provided_features_list()
    layer = layer or kind.get_default_feature_layer_for_metric("fid")
    if layer not in layers:
        raise InputError(f"features.layer: {name} has no layer {layer!r}; take one of {', '.join(layers)}")
    if path is None and name == INCEPTION:
        path = _downloaded_inception()
    if path is None and sha256 is not None:
        raise InputError(f"features.sha256: set features.path to the file with the weights of {name}")
    raw = None if path is None else _read(path, sha256)
    try:
        weights = None if raw is None else _without_code(name, raw)
        network = create_feature_extractor(
            name, [layer], cuda=False, verbose=False, feature_extractor_weights_path=weights
        )
    except NotImplementedError as error:
        raise InputError(
            f"features.path: torch-fidelity takes no weights file for {name}; leave it out"
        ) from error
    except Exception as error:
        if path is not None:
            raise _unusable(path, f"weights of {name}", error) from error
        raise InputError(
            f"features: torch-fidelity could not get {name}: {_last_line(error)}; "
            "where it cannot be downloaded, set features.path to a file with its weights"
        ) from error
    module = _FirstLayer(network)
    resize = "TensorFlow 1 bilinear, as in torch-fidelity"
    fingerprint = _fingerprint(_state_digest(network), f"{name}/{layer}", resize, "float32")
    extractor = NetworkExtractor(f"{name}/{layer}", module, 0, fingerprint, channels=3, chunk=64)
    if layer == _POOLED and _LOGITS in layers:
        extractor.head = lambda features: features @ network.fc.weight.T
    extractor.dim = _probe(extractor, image_shape).shape[1]
    return extractor


class _Features(nn.Module):
    """`DigitsFeatures` called for its features rather than its logits."""

    def __init__(self, network: DigitsFeatures) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(images)


class _FirstLayer(nn.Module):
    """A torch-fidelity extractor of one layer, without the tuple around its answer."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: tuple[Tensor] = self.network(images)
        return features[0]


def _downloaded_inception() -> Path:
    """The file of the Inception weights in torch.hub's cache, downloaded when it is not there yet."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2])
    if not path.exists():
        # torch.hub's convention: the last part of the file's name begins its SHA-256.
        prefix = path.stem.rpartition("-")[2]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"features: no download of the weights of {INCEPTION} to {path} ({_last_line(error)}); "
                f"download {URL_INCEPTION_V3} elsewhere and set features.path to the file"
            ) from error
    return path


def _without_code(name: str, raw: bytes) -> io.BytesIO:
    """The weights as a file that is safe for torch-fidelity, which unpickles whatever it is given."""
    if name.startswith("clip-"):
        return io.BytesIO(raw)  # a TorchScript archive; torch.jit.load never unpickles Python objects
    safe = io.BytesIO()
    torch.save(torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True), safe)
    safe.seek(0)
    return safe


def _read(path: Path, sha256: str | None) -> bytes:
    """The bytes of a file, with its checksum verified if there is one to verify."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"features.path: {path} cannot be read: {error.strerror}") from error
    if sha256 is not None:
        found = hashlib.sha256(raw).hexdigest()
        if found != sha256.strip().lower():
            raise InputError(
                f"features.sha256: {path} has the SHA-256 {found}, not {sha256}: "
                "get the right file or correct the sum"
            )
    return raw


def _probe(extractor: NetworkExtractor, image_shape: tuple[int, int, int]) -> Tensor:
    """The features of two images; raises ValueError unless they are floating [2, D]."""
    images = torch.arange(2 * image_shape[0] * image_shape[1] * image_shape[2]).remainder(256).to(torch.uint8)
    features = extractor(images.reshape(2, *image_shape))
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        shape = tuple(getattr(features, "shape", ()))
        raise ValueError(f"its answer has the shape {shape} instead of (2, D)")
    if not features.is_floating_point():
        raise ValueError(f"its answer is {features.dtype} instead of floating")
    return features


def _fingerprint(content: str, layer: str, resize: str, dtype: str) -> str:
    text = "\n".join((content, layer, resize, dtype.removeprefix("torch.")))
    return hashlib.sha256(text.encode()).hexdigest()


def _state_digest(network: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and values of all weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _unusable(path: Path, what: str, error: Exception) -> InputError:
    return InputError(f"features.path: {path} cannot be used as {what}: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    """The line of an error that says what happened: PyTorch puts stack traces of its own before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
