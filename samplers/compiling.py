"""Compilation by torch for GPUs: tried once, kept on disk for the next process, and never necessary.

Knows nothing of what is compiled.
"""

import fcntl
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from samplers.cache import cache_root

P = ParamSpec("P")
R = TypeVar("R")


class Compiled(Generic[P, R]):
    """A function that torch compiles at its first call, and that runs as it is where that fails.

    name: of the function, for the warning then. options: of torch.compile.
    """

    def __init__(self, plain: Callable[P, R], name: str, **options: Any) -> None:
        self._plain, self._name, self._options = plain, name, options
        self._compiled: Callable[P, R] | None = None
        self.failed = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.failed:
            return self._plain(*args, **kwargs)
        try:
            if self._compiled is None:
                os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_folder()))
                self._compiled = torch.compile(self._plain, **self._options)
            return self._compiled(*args, **kwargs)
        except Exception as error:  # whatever a compiler may raise; errors of the function itself come again
            lines = str(error).strip().splitlines() or [""]
            warnings.warn(
                f"torch.compile failed for {self._name}, which now runs several times slower "
                f"without it ({type(error).__name__}: {lines[0][:200]})",
                stacklevel=2,
            )
            self.failed = True
        return self._plain(*args, **kwargs)


def fused(plain: Callable[P, R]) -> Callable[P, R]:
    """The same elementwise function of tensors and numbers, as one kernel where its first tensor lies on a GPU.

    Numbers may change from call to call; the results change by rounding.
    """
    compiled = Compiled(plain, plain.__name__, dynamic=True)

    @wraps(plain)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        return (compiled if first.device.type == "cuda" else plain)(*args, **kwargs)

    return call


@contextmanager
def once_per_host(*what: object) -> Iterator[None]:
    """Let one process of this host compile while others that would compile the same wait for it, and find it on disk.

    what: texts and numbers that say what is compiled; torch and the GPU's model are added. Where the cache cannot be
    written, nobody waits.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    text = repr((*what, torch.__version__, device))
    done = _folder() / f"{hashlib.sha256(text.encode()).hexdigest()}.done"
    if done.exists():
        yield
        return
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        file = done.with_suffix(".lock").open("a")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        yield
        return
    with file:
        if done.exists():  # another process was first: those that waited go on together
            fcntl.flock(file, fcntl.LOCK_UN)
        yield
        with suppress(OSError):
            done.touch()


def _folder() -> Path:
    return cache_root() / "compiled"
