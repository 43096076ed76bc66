"""The layers that EDM's two U-Nets share: resampling convolutions, the residual block with attention, embeddings.

Parameter and buffer names are the official ones. Knows nothing of how a network arranges them, of files or of noise
levels. Source of the conventions: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
Models", appendix F, and the behaviour of NVlabs/edm. Activations are channels_last all the way, as in `unet`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from samplers.models.normalisation import Parts, normalised, projected, whole

Resample = Literal["up", "down"]
Filter = tuple[float, ...]

# What an argument in a file may be: enough for any network, too little to keep a machine busy.
Count = Annotated[int, Field(ge=1, le=65_536)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=16)]
Blocks = Annotated[int, Field(ge=1, le=64)]


@dataclass(frozen=True, slots=True)
class Style:
    """What the blocks of one network have in common.

    embedding: channels of the noise embedding. skip_scale: factor after each residual sum. channels_per_head: of the
    attention; None for one head. adaptive_scale: the embedding scales and shifts after the normalisation, instead of
    being added before it. resample_proj: a resampling skip always has a 1×1 convolution.
    """

    embedding: int
    skip_scale: float
    eps: float
    adaptive_scale: bool
    resample_proj: bool
    resample_filter: Filter
    channels_per_head: int | None


def levels(
    side: int, channels: int, multiples: tuple[int, ...], attended: tuple[int, ...]
) -> list[tuple[int, int, bool]]:
    """Per level of a U-Net for images of that side: the side, the channels, and whether it has attention."""
    return [
        (side >> level, channels * multiple, side >> level in attended)
        for level, multiple in enumerate(multiples)
    ]


def norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation with at least 4 channels per group, 32 groups at most."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


def positional_embedding(noise: Tensor, width: int, *, endpoint: bool) -> Tensor:
    """cos then sin of noise * 10000^(-k / (width/2)), k = 0 … width/2 - 1: [T] → [T, width].

    endpoint: the last exponent is exactly -1, i.e. k is divided by width/2 - 1.
    """
    half = width // 2
    steps = torch.arange(half, dtype=noise.dtype, device=noise.device) / (half - 1 if endpoint else half)
    angles = noise[:, None] * (1 / 10000) ** steps
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """cos then sin of 2π times random frequencies, which are part of the checkpoint: [T] → [T, width]."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2))

    def forward(self, noise: Tensor) -> Tensor:
        """See the class."""
        angles = noise[:, None] * (2 * math.pi * self.freqs.to(noise.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def _kernel(weights: Filter) -> Tensor:
    """The separable low-pass filter [1, 1, k, k] with these taps; its sum is 1."""
    taps = torch.tensor(weights, dtype=torch.float32)
    return (taps.outer(taps) / taps.sum().square())[None, None]


def _resampled(x: Tensor, kernel: Tensor, resample: Resample, padding: int | None = None) -> Tensor:
    """[B, C, H, W] → twice or half the size, every channel filtered by `kernel` [1, 1, k, k]."""
    channels = x.shape[1]
    each = kernel.expand(channels, -1, -1, -1)
    pad = (kernel.shape[-1] - 1) // 2 if padding is None else padding
    if resample == "up":
        return F.conv_transpose2d(x, 4 * each, stride=2, padding=pad, groups=channels)
    return F.conv2d(x, each, stride=2, padding=pad, groups=channels)


class Resampler(nn.Module):
    """Doubles or halves the image, with no weights but the fixed filter."""

    resample_filter: Tensor

    def __init__(self, resample: Resample, taps: Filter) -> None:
        super().__init__()
        self.resample: Resample = resample
        self.register_buffer("resample_filter", _kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, 2H, 2W] or [B, C, H/2, W/2]."""
        return _resampled(x, self.resample_filter, self.resample)


class Conv(nn.Conv2d):
    """A convolution that keeps the size, before which the image may be doubled or halved."""

    resample_filter: Tensor

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        resample: Resample | None = None,
        taps: Filter = (1, 1),
    ) -> None:
        super().__init__(channels, out_channels, kernel, padding=kernel // 2)
        self.resample: Resample | None = resample
        if resample is not None:
            self.register_buffer("resample_filter", _kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, out_channels, H, W], or twice or half of H and W."""
        if self.resample is not None:
            x = _resampled(x, self.resample_filter, self.resample)
        return super().forward(x)


class FusedDown(Conv):
    """A convolution first and halving after it, padded once before both."""

    def __init__(self, channels: int, out_channels: int, kernel: int, taps: Filter) -> None:
        super().__init__(channels, out_channels, kernel, "down", taps)
        self._wide = kernel // 2 + (len(taps) - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, out_channels, H/2, W/2]."""
        h = _resampled(F.conv2d(x, self.weight, padding=self._wide), self.resample_filter, "down", 0)
        return (
            h + cast(Tensor, self.bias).to(h.dtype)[:, None, None]
        )  # as autocast adds the bias of a convolution


class Block(nn.Module):
    """Two convolutions around the noise embedding, with a skip, then self-attention with a skip.

    The channels of `qkv` are ordered head, channel, (q, k, v). `out_channels` is there for whoever counts skips.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        style: Style,
        resample: Resample | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.adaptive_scale = style.adaptive_scale
        self.skip_scale = style.skip_scale
        # Fewer channels than one head has make no head, and so no attention: the official rounding.
        per_head = style.channels_per_head or out_channels
        self.heads = out_channels // per_head if attention else 0
        taps = style.resample_filter
        self.norm0 = norm(channels, style.eps)
        self.conv0 = Conv(channels, out_channels, 3, resample, taps)
        self.affine = nn.Linear(style.embedding, out_channels * (2 if style.adaptive_scale else 1))
        self.norm1 = norm(out_channels, style.eps)
        self.conv1 = Conv(out_channels, out_channels, 3)
        self.skip: Conv | Resampler | None = None
        if out_channels != channels or (resample is not None and style.resample_proj):
            self.skip = Conv(channels, out_channels, 1, resample, taps)
        elif resample is not None:
            self.skip = Resampler(resample, taps)
        if self.heads:
            self.norm2 = norm(out_channels, style.eps)
            self.qkv = Conv(out_channels, 3 * out_channels, 1)
            self.proj = Conv(out_channels, out_channels, 1)

    def forward(self, parts: Parts, emb: Tensor) -> Tensor:
        """parts: the image [B, C, H, W]; emb: [B or 1, E]."""
        h = self.conv0(normalised(self.norm0, parts))
        shift = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = shift.chunk(2, dim=1)
            h = normalised(self.norm1, (h,), scale=scale, shift=shift)
        else:
            h = normalised(self.norm1, (h + shift,))
        if self.skip is None:
            skip = whole(parts)
        elif len(parts) == 1:
            skip = self.skip(*parts)
        else:  # a decoder's block, which does not resample
            skip = projected(cast(Conv, self.skip), parts)
        x: Tensor = (self.conv1(h) + skip) * self.skip_scale
        if self.heads:
            x = (self.proj(self._attention(normalised(self.norm2, (x,), silu=False))) + x) * self.skip_scale
        return x

    def _attention(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.qkv(x).permute(0, 2, 3, 1).reshape(batch, height * width, self.heads, -1, 3)
        q, k, v = (part.transpose(1, 2) for part in tokens.unbind(4))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
