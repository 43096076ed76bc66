"""Reads the network snapshots of NVIDIA's EDM code base and of PFGM++: `network-snapshot-*.pkl`, `training-state-*.pt`.

The official loader runs Python source that is embedded in the file. Here nothing is run: the file is taken apart by
`pickles`, the source is ignored, and what is left are names, numbers and tensors. Knows nothing of the networks.
"""

import io
import math
import pickletools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samplers.errors import InputError
from samplers.models.archive import MAGIC, Archive
from samplers.models.pickles import Call, Global, Persistent, read_pickle
from samplers.models.weights import LEGACY_MAGIC, opened, read_tensors, usable

Scalar = bool | int | float | str | None
Plain = Scalar | tuple[Scalar, ...]

_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_MODULE_DICT = "torch.nn.modules.container.ModuleDict"
_PARAMETER = "torch._utils._rebuild_parameter"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_STORAGE = "torch.storage._load_from_bytes"
_DTYPE = "numpy.dtype"
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
_ADMITTED = frozenset((_PERSISTENT, _MODULE_DICT, _PARAMETER, _TENSOR, _STORAGE, _DTYPE, *_SCALARS, *_DICTS))
_FLOAT_STORAGE, _ENCODE = "torch.FloatStorage", "_codecs.encode"
_ADMITTED_IN_ARCHIVES = _ADMITTED | {_FLOAT_STORAGE, _ENCODE, "__builtin__.set"}

_MAX_PARTS = 100_000  # modules and tensors; the largest published network has under 2,000
_MAX_MODULE_DEPTH = 8  # official networks: 4
_MAX_LIST, _MAX_TEXT = 64, 1000  # of a constructor's argument


@dataclass(frozen=True, slots=True)
class Module:
    """A module as its file describes it.

    kwargs: what it was constructed with. attributes: its plain attributes as they were when it was saved.
    """

    class_name: str
    kwargs: Mapping[str, Plain]
    attributes: Mapping[str, Plain]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The averaged (EMA) network of a snapshot.

    precond: the outer module, which turns a U-Net into a denoiser; network: that U-Net, its only child. state: every
    parameter and buffer of the two under its state-dict name, on the CPU, floating point ones as float32.
    """

    precond: Module
    network: Module
    state: Mapping[str, Tensor]


def read_snapshot(path: Path) -> Snapshot:
    """The EMA network in `path`, a snapshot pickle or a torch.save archive of the same objects.

    Raises InputError that names the file for whatever is not such a network: globals other than the official ones,
    damage, and claims of more memory than the file has bytes.
    """
    with opened(path) as file:
        data = file.read()
    archive = None
    if data.startswith(MAGIC):
        archive = Archive(io.BytesIO(data), str(path))
        if "byteorder" in archive and archive.record("byteorder") != b"little":
            raise InputError(f"{path} was saved on a big-endian machine; save it again on another one")
        root = read_pickle(archive.record("data.pkl"), _ADMITTED_IN_ARCHIVES, str(path))
    else:
        root = read_pickle(data, _ADMITTED, str(path))
    if not isinstance(root, dict) or root.get("ema") is None:
        raise InputError(
            f"{path} holds no averaged network ('ema'); give network-snapshot-*.pkl of EDM, or of PFGM++ also "
            "training-state-*.pt"
        )
    return _Reader(path, len(data), archive).snapshot(root["ema"])


class _Reader:
    """Finds modules and tensors in the plain data of one file, and keeps to the limits while doing so."""

    def __init__(self, path: Path, size: int, archive: Archive | None) -> None:
        self._path = path
        self._archive = archive
        self._size = size
        self._bytes_left = size
        self._parts_left = _MAX_PARTS
        self._storages: dict[object, Tensor] = {}

    def snapshot(self, ema: object) -> Snapshot:
        """The snapshot of the module `ema`."""
        outer_name, outer = self._opened(ema, "ema")
        children = self._members(outer, "_modules", "ema")
        if list(children) != ["model"]:
            raise self._error(f"the network is a {outer_name[:100]}, not a preconditioned model")
        inner_name, inner = self._opened(children["model"], "model")
        return Snapshot(
            precond=self._described(outer_name, outer, "ema"),
            network=self._described(inner_name, inner, "model"),
            state=dict(self._tensors("", ema, 0)),
        )

    def _error(self, what: str) -> InputError:
        return InputError(f"{self._path}: {what}")

    def _opened(self, value: object, where: str) -> tuple[str, dict[object, object]]:
        """Class name and attributes of a module."""
        if isinstance(value, Call) and value.name == _MODULE_DICT and isinstance(value.state, dict):
            return "ModuleDict", value.state
        if isinstance(value, Call) and value.name == _PERSISTENT and value.state is None:
            about = value.args[0] if len(value.args) == 1 else None
            if isinstance(about, dict) and about.get("type") == "class":
                name, state = about.get("class_name"), about.get("state")
                if isinstance(name, str) and isinstance(state, dict):
                    return name, state
        raise self._error(f"{where} is no module of the official code")

    def _members(self, state: Mapping[object, object], kind: str, where: str) -> dict[str, object]:
        """The parameters, buffers or sub-modules among a module's attributes; those that are None left out."""
        members = state.get(kind)
        if not isinstance(members, dict) or not all(isinstance(name, str) for name in members):
            raise self._error(f"{where} has no {kind}")
        self._parts_left -= 1 + len(members)
        if self._parts_left < 0:
            raise self._error(f"there are more than {_MAX_PARTS} modules and tensors in it")
        return {name: value for name, value in members.items() if value is not None}

    def _tensors(self, prefix: str, module: object, depth: int) -> Iterator[tuple[str, Tensor]]:
        where = prefix.removesuffix(".") or "ema"
        if depth > _MAX_MODULE_DEPTH:
            raise self._error(f"modules are nested more than {_MAX_MODULE_DEPTH} deep at {where[:200]}")
        _, state = self._opened(module, where)
        for kind in ("_parameters", "_buffers"):
            for name, value in self._members(state, kind, where).items():
                yield prefix + name, usable(self._path, prefix + name, self._tensor(value, prefix + name))
        for name, child in self._members(state, "_modules", where).items():
            yield from self._tensors(f"{prefix}{name}.", child, depth + 1)

    def _tensor(self, value: object, where: str) -> Tensor:
        if isinstance(value, Call) and value.name == _PARAMETER and value.args:
            value = value.args[0]
        if not (isinstance(value, Call) and value.name == _TENSOR and len(value.args) >= 4):
            raise self._error(f"{where} is no tensor")
        (offset,) = self._naturals(value.args[1:2], where)
        size, stride = (self._naturals(part, where) for part in value.args[2:4])
        storage = self._storage(value.args[0], where)
        if len(size) != len(stride):
            raise self._error(f"{where} has no proper shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 in size or last >= len(storage):
            raise self._error(f"{where} reaches outside its storage")
        self._bytes_left -= math.prod(size) * storage.element_size()
        if self._bytes_left < 0:  # several tensors, or one with a stride of 0, can share little data
            raise self._error("its tensors claim more bytes than the file has")
        return storage.as_strided(size, stride, offset)

    def _naturals(self, value: object, where: str) -> tuple[int, ...]:
        """A tensor's shape, strides or offset: up to 8 numbers of 0 or more."""
        if type(value) is not tuple or len(value) > 8 or not all(type(n) is int and n >= 0 for n in value):
            raise self._error(f"{where} has no proper shape")
        return value

    def _storage(self, source: object, where: str) -> Tensor:
        """All elements of a storage [n]."""
        if isinstance(source, Persistent) and self._archive is not None:
            key = self._archive_key(source, where)
            if key not in self._storages:
                self._storages[key] = self._floats(self._archive.record(f"data/{key}"), where)
            return self._storages[key]
        if not (isinstance(source, Call) and source.name == _STORAGE and len(source.args) == 1):
            raise self._error(f"{where} has no storage")
        data = source.args[0]
        if type(data) is not bytes:
            raise self._error(f"the storage of {where} is a {type(data).__name__}, not bytes")
        if id(data) not in self._storages:  # `data` outlives this reader
            self._storages[id(data)] = self._stream(data, where)
        return self._storages[id(data)]

    def _archive_key(self, source: Persistent, where: str) -> str:
        match source.key:
            case ("storage", Global(name), str(key), str(), int()) if (
                name == _FLOAT_STORAGE and key.isdigit()
            ):
                return key
        raise self._error(f"{where} has no storage of float32 numbers")

    def _floats(self, data: bytes, where: str) -> Tensor:
        if not data or len(data) % 4:
            raise self._error(f"{where} has {len(data)} bytes, which are no float32 numbers")
        return torch.frombuffer(bytearray(data), dtype=torch.float32)

    def _stream(self, data: bytes, where: str) -> Tensor:
        """A storage that torch.save wrote in its old format."""
        source = f"{self._path}: the storage of {where}"
        header = io.BytesIO(data)
        try:  # magic number, version, machine, reference to the storage: one pickle each
            numbers = [
                [arg for _, arg, _ in pickletools.genops(header) if isinstance(arg, int)] for _ in range(4)
            ]
        except Exception as error:  # damage
            raise InputError(f"{source} is damaged ({type(error).__name__})") from error
        # torch takes the memory that the reference claims before it looks at the data.
        if numbers[0][-1:] != [LEGACY_MAGIC] or sum(abs(n) for n in numbers[3]) > len(data):
            raise InputError(f"{source} is damaged, or claims more numbers than it has bytes")
        storage = read_tensors(io.BytesIO(data), source, "storage", "It is no published network")
        if not isinstance(storage, torch.storage.TypedStorage):
            raise InputError(f"{source} is a {type(storage).__name__}")
        return torch.tensor([], dtype=storage.dtype).set_(storage)

    def _described(self, class_name: str, state: Mapping[object, object], where: str) -> Module:
        kwargs = state.get("_init_kwargs")
        if not isinstance(kwargs, dict) or state.get("_init_args") != ():
            raise self._error(f"{where} does not say how it was constructed")
        plain = {}
        for name, value in kwargs.items():
            try:
                plain[str(name)] = _plain(value)
            except ValueError:
                raise self._error(f"the argument {str(name)[:100]!r} of {where} is no plain value") from None
        attributes = {}
        for name, value in state.items():
            try:
                if not str(name).startswith("_"):
                    attributes[str(name)] = _plain(value)
            except ValueError:
                continue
        return Module(class_name, plain, attributes)


def _plain(value: object) -> Plain:
    """A value of a constructor's argument; ValueError for what is none."""
    if isinstance(value, (tuple, list)):
        if len(value) > _MAX_LIST:
            raise ValueError
        return tuple(_one(part) for part in value)
    return _one(value)


def _one(value: object) -> Scalar:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str) and len(value) <= _MAX_TEXT:
        return value
    if isinstance(value, Call) and value.name in _SCALARS and len(value.args) == 2:
        return _numpy_scalar(*value.args)
    raise ValueError


def _numpy_scalar(kind: object, content: object) -> float:
    """A NumPy float64, which is how arguments such as np.sqrt(0.5) are saved."""
    if isinstance(content, Call) and content.name == _ENCODE and len(content.args) == 2:
        text = content.args[0]  # bytes as protocol 2 has them
        content = text.encode("latin1") if isinstance(text, str) else None
    is_double = isinstance(kind, Call) and kind.name == _DTYPE and kind.args[:1] == ("f8",)
    if not is_double or not isinstance(content, bytes) or len(content) != 8:
        raise ValueError
    return float(np.frombuffer(content, dtype="<f8")[0])
