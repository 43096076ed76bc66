"""Error bars of distances and of their differences, from the influences of images (`objectives.influence`).

Two distances of images with the same random numbers err together: image i raises or lowers both. So the error bar of
a difference is taken from the differences of influences, image by image, and not from the two error bars.

Influences are kept as means over blocks of BLOCK consecutive images, in float32: small enough to be stored with every
trial, and rungs of fewer images are their first numbers. Knows nothing of torch, features or databases; numpy is
loaded by those who need it, so that a command that answers from the store need not wait for it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Influence: TypeAlias = NDArray[np.float32]
else:
    Influence = Any
"""Block means [⌈n / BLOCK⌉] of the influences of images 0 … n − 1, float32, in units of the distance."""

BLOCK = 5
"""Images per stored number: few enough that 100 numbers at 500 images give the covariance of a dozen schedules."""


def block_means(influences: NDArray[np.float64]) -> Influence:
    """Influences of images 0 … n − 1, [n] → means of blocks; what is left over makes a short last block."""
    import numpy as np

    whole = len(influences) // BLOCK * BLOCK
    means = [influences[:whole].reshape(-1, BLOCK).mean(1)]
    if whole < len(influences):
        means.append(influences[whole:].mean(keepdims=True))
    return np.concatenate(means).astype(np.float32)


def pack(influence: Influence) -> bytes:
    """For a database: little-endian float32."""
    return influence.astype("<f4").tobytes()


def unpack(data: bytes) -> Influence | None:
    """What `pack` made; None for no bytes."""
    import numpy as np

    return np.frombuffer(data, dtype="<f4").astype(np.float32) if data else None


def first(influence: Influence, images: int) -> Influence:
    """The part that belongs to the first `images` images."""
    return influence[: blocks(images)]


def blocks(images: int) -> int:
    """How many numbers `images` images have."""
    return -(-images // BLOCK)


def covariance(influences: Sequence[Influence]) -> NDArray[np.float64]:
    """The covariance [m, m] of m distances, all of the same images and random numbers; 0 for fewer than 2 blocks."""
    import numpy as np

    stacked = np.stack(influences).astype(np.float64)
    if stacked.shape[1] < 2:
        return np.zeros((len(influences), len(influences)))
    answer: NDArray[np.float64] = np.atleast_2d(np.cov(stacked)) / stacked.shape[1]
    return answer


def standard_error(influence: Influence) -> float:
    """Of one distance."""
    return _error(influence.tolist())


def difference_error(one: Influence, other: Influence) -> float:
    """Standard error of the difference of two distances of the same images and random numbers."""
    return standard_error(one - other)


def packed_difference_error(one: bytes, other: bytes, images: int) -> float:
    """The same on the first `images` images, from what `pack` made."""
    numbers = [struct.unpack_from(f"<{blocks(images)}f", data) for data in (one, other)]
    return _error([a - b for a, b in zip(*numbers, strict=True)])


def _error(values: Sequence[float]) -> float:
    """Standard error of a mean; 0 for fewer than 2 values."""
    n = len(values)
    if n < 2:
        return 0.0
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
