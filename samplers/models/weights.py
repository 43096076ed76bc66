"""Reads a file of plain weights without running anything that is in it.

Knows nothing of the network that the weights belong to.
"""

import hashlib
import re
import warnings
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from samplers.errors import InputError
from samplers.models.archive import MAGIC, Archive
from samplers.models.pickles import read_pickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # how torch.save began its files before it wrote archives
_MOST = 8  # times its file: half precision takes twice as much as float32, and tensors may be shared


def digest(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex; InputError if it cannot be read."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def opened(path: Path) -> BufferedReader:
    """The file, opened for reading; InputError if it cannot be, or is a device or pipe, which may never end."""
    try:
        if path.is_char_device() or path.is_block_device() or path.is_fifo() or path.is_socket():
            raise InputError(f"{path} cannot be read: it is no plain file")
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def read_tensors(file: BinaryIO, source: str, expected: str, advice: str) -> object:
    """What torch.save wrote to `file`, on the CPU; only tensors and plain containers are unpickled.

    Raises InputError that begins with `source`: a file that asks for anything else is refused before it runs (with
    the advice), a damaged one is said to be no `expected`. Neither takes much more memory than the file has bytes.
    """
    check_stream(file, source, expected)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd files, which are refused anyhow
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle or archive can raise anything, OSError too
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise InputError(
                f"{source} holds more than weights: it asks for {asked[1]}. Nothing of it was run. {advice}"
            ) from None
        raise InputError(f"{source} is damaged, or no {expected} ({type(error).__name__})") from error


def check_stream(file: BinaryIO, source: str, expected: str) -> None:
    """Refuses what could exhaust or crash torch's loader in a file of torch.save, read from its beginning: compressed
    archives, endless nesting, keys that cannot be hashed. Raises InputError that begins with `source`.
    """
    if file.read(len(MAGIC)) == MAGIC:
        read_pickle(Archive(file, source, expected).record("data.pkl"), None, source, expected)
    else:
        file.seek(0)
        if read_pickle(file, None, source, expected) == LEGACY_MAGIC:  # else torch reads no further
            for _ in range(4):  # version, machine, content, names of the storages
                read_pickle(file, None, source, expected)
    file.seek(0)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a `torch.save` file: name → tensor on the CPU, floating point ones as float32.

    Only tensors and plain containers are unpickled (`weights_only`); a file that asks for anything else is
    refused before it runs. Raises InputError naming the file, and the entry where there is one.
    """
    with opened(path) as file:
        size = path.stat().st_size
        content = read_tensors(
            file,
            str(path),
            "state dict written by torch.save",
            "Save the state dict alone: torch.save(model.state_dict(), path)",
        )
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path} holds a {type(content).__name__}, where a state dict (name → tensor) is needed"
        )
    claimed = sum(value.nbytes for value in content.values() if isinstance(value, Tensor))
    if claimed > _MOST * size:  # steps of 0 make any tensor of one number
        raise InputError(f"{path} is damaged: its tensors claim {claimed} bytes, but it has {size}")
    return {str(name): usable(path, str(name), value) for name, value in content.items()}


def usable(path: Path, name: str, value: object) -> Tensor:
    """A tensor of the file as it is used: floating point as float32. Raises InputError unless finite."""
    if not isinstance(value, Tensor):
        inner = isinstance(value, dict) and value and all(isinstance(part, Tensor) for part in value.values())
        hint = f"; the weights seem to lie under {name!r}: save that part alone" if inner else ""
        raise InputError(f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor{hint}")
    if not value.is_floating_point():
        return value
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"{path}: parameter {name!r} holds NaN or infinity")
    return value.float()
