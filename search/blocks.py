"""Features that were computed once, on this host's disk, one file per block of images: nothing is computed twice.

A search that goes on with a schedule on more images, one that was killed, and one of another job that meets the same
schedule find here what they need. A file that is lost or damaged costs its block, nothing else. Knows nothing of what
a key stands for.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samplers.cache import cache_root

_LIMIT = 8 * 2**30  # bytes; 10,000 images of Inception features are 80 MB


class FeatureCache:
    """The blocks of one key: a digest of network, solver, λ, random numbers and extractor."""

    def __init__(self, key: str) -> None:
        self._folder = _root() / key[:2] / key

    def load(self, block: int, images: int) -> NDArray[np.floating[Any]] | None:
        """The features [images, D] of a block; None where there are none."""
        try:
            found: NDArray[np.floating[Any]] = np.load(self._folder / f"{block}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return found if found.ndim == 2 and len(found) == images else None

    def save(self, block: int, features: NDArray[np.floating[Any]]) -> None:
        """Keep a block; a disk that is full or read-only is no reason to fail."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    np.save(file, features, allow_pickle=False)
                os.replace(temporary, self._folder / f"{block}.npy")
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise


def trim(limit: int = _LIMIT) -> None:
    """Delete the keys that were written to least recently until the rest takes `limit` bytes at most."""
    found = []
    for folder in _root().glob("*/*"):
        with suppress(OSError):
            size = sum(file.stat().st_size for file in folder.iterdir())
            found.append((folder.stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in found)
    for _, size, folder in sorted(found, key=lambda item: item[0]):
        if total <= limit:
            return
        shutil.rmtree(folder, ignore_errors=True)
        total -= size


def _root() -> Path:
    return cache_root() / "features"
