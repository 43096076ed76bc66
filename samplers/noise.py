"""The random numbers an image gets: a pure function of (seed, image id, draw), nothing else.

Counter-based (Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer
tensor operations, so image i has the same initial noise, step noise and label for every λ, in any batch, on any
worker and on any device: CPU and every GPU model agree. Stateful device generators do not give that, because
their streams depend on the launch shape. Common random numbers are what makes a change of λ by 0.001 visible.

Knows nothing of solvers: what draw 0 or draw t + 1 is used for is decided in `samplers.generate`.
"""

import math

import torch
from torch import Tensor

from samplers.compiling import Compiled

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
LABEL_DRAW = _MASK  # a draw index that no solver step reaches
PRIOR_DRAW = _MASK - 1


Words = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four int64 tensors with values in [0, 2³²), broadcastable."""


def philox(counter: Words, key: tuple[int | Tensor, int | Tensor]) -> Words:
    """Philox4x32-10 of a 128-bit counter under a 64-bit key, whose two words lie in [0, 2³²)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32×32-bit product needs 64 bits; int64 wraps, but keeps every bit, and the mask undoes the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _key(seed: int) -> tuple[int, int]:
    """The seed modulo 2⁶⁴ in two words."""
    return seed & _MASK, (seed >> 32) & _MASK


def _counter(image_ids: Tensor, draw: int, quads: int) -> Words:
    """What numbers four [B, quads] tensors of 32-bit words for one draw of every image."""
    element = torch.arange(quads, device=image_ids.device)[None, :]
    ids = image_ids[:, None]
    return element, torch.full_like(element[:, :1], draw), ids & _MASK, (ids >> 32) & _MASK


def _words(seed: int, image_ids: Tensor, draw: int, quads: int) -> Words:
    return philox(_counter(image_ids, draw, quads), _key(seed))


def normal(seed: int, image_ids: Tensor, draw: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, [B, *shape], for the images `image_ids` (int64 [B]) on their device.

    Box-Muller in float64, then rounded to float32 whatever `dtype` (float32 or float64) is asked for: the last
    bits of log and cos differ between devices and vector widths, and the rounding hides that. |z| < 6.7.
    """
    numel = math.prod(shape)
    counter = _counter(image_ids, draw, -(-numel // 4))
    if image_ids.device.type == "cuda":
        # What changes from draw to draw enters as tensors on the device, which are filled without waiting for it.
        low, high = (torch.full_like(counter[1], word) for word in _key(seed))
        z = _fused(counter, (low, high))
    else:
        z = _box_muller(counter, _key(seed))
    return z[:, :numel].to(dtype).reshape(len(image_ids), *shape)


def _box_muller(counter: Words, key: tuple[int | Tensor, int | Tensor]) -> Tensor:
    """Float32 [B, 4·quads]: pairs of normal numbers from pairs of words."""
    u0, u1, u2, u3 = ((w.double() + 0.5) * 2.0**-32 for w in philox(counter, key))
    pairs = []
    for radius, angle in ((u0, u1), (u2, u3)):
        r, phi = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
        pairs += [r * phi.cos(), r * phi.sin()]
    return torch.stack(pairs, dim=-1).flatten(1).float()


# On a GPU one kernel instead of some hundred, which each read and write eight bytes per number.
_fused = Compiled(_box_muller, "the random numbers", dynamic=True)


def uniform(seed: int, image_ids: Tensor, draw: int, count: int) -> Tensor:
    """Uniform float64 numbers inside (0, 1), [B, count], for the images `image_ids` (int64 [B])."""
    words = _words(seed, image_ids, draw, -(-count // 4))
    return ((torch.stack(words, dim=-1).double() + 0.5) * 2.0**-32).flatten(1)[:, :count]


def labels(seed: int, image_ids: Tensor, num_classes: int) -> Tensor:
    """Class labels, int64 [B], uniform over 0 .. num_classes − 1 (bias below num_classes / 2³²)."""
    word = _words(seed, image_ids, LABEL_DRAW, 1)[0][:, 0]
    return (word * num_classes) >> 32
