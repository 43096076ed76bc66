"""How GPUs round the factors of float32 convolutions and matrix products. Knows nothing of what computes with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Rounding = Literal["ieee", "tf32"]
"""ieee: not at all. tf32: to 10 bits of mantissa, as float16 has, with float32's range."""


@contextmanager
def float32(*, convolutions: Rounding | None = None, products: Rounding | None = None) -> Iterator[None]:
    """Have torch round them so meanwhile, None: as it is set; the caller's settings come back after."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    asked = [
        (backend, rounding)
        for backend, rounding in ((conv, convolutions), (torch.backends.cuda.matmul, products))
        if rounding is not None
    ]
    before = [backend.fp32_precision for backend, _ in asked]
    try:
        for backend, rounding in asked:
            backend.fp32_precision = rounding
        yield
    finally:
        for (backend, _), rounding in zip(asked, before, strict=True):
            backend.fp32_precision = rounding
