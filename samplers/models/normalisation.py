"""Group normalisation of images and what follows it in every U-Net here: scale and shift, SiLU.

Eagerly these are torch's own operations. Traced for a compiler they are written so that it makes few passes over
channels_last memory of them. Knows nothing of networks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parts = tuple[Tensor, ...]
"""Images [B, C_i, H, W] that stand for one image of their channels one after the other."""


def joined(*images: Tensor) -> Parts:
    """The images as one. Traced, they stay apart: their readers can take both, and no copy is made."""
    return images if torch.compiler.is_compiling() else (torch.cat(images, dim=1),)


def whole(parts: Parts) -> Tensor:
    """The joined images as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def projected(conv: nn.Conv2d, parts: Parts) -> Tensor:
    """A 1×1 convolution of the joined images: [B, out_channels, H, W]."""
    if len(parts) == 1:
        result: Tensor = conv(parts[0])
        return result
    first, *others = torch.split(conv.weight, [part.shape[1] for part in parts], dim=1)
    result = F.conv2d(parts[0], first, conv.bias)
    for part, weight in zip(parts[1:], others, strict=True):
        result = result + F.conv2d(part, weight)
    return result


def normalised(
    norm: nn.GroupNorm,
    parts: Parts,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(GroupNorm(x)·(1 + scale) + shift) of the joined images x [B, C, H, W], of their shape.

    scale and shift, both or neither: [B or 1, C, 1, 1]. silu: false leaves it out. Traced, the arithmetic is float32
    for half precision, and the result has the parts' dtype.
    """
    if torch.compiler.is_compiling():
        return _by_channels(norm, parts, scale, shift, silu)
    h: Tensor = norm(whole(parts))
    if scale is not None and shift is not None:
        h = h * (1 + scale) + shift
    return F.silu(h) if silu else h


def _by_channels(
    norm: nn.GroupNorm, parts: Parts, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> Tensor:
    """The same from the statistics of each channel: a sum along memory that is contiguous in the channels, which the
    compiler makes where x is made, and once where x is read twice (a skip). Those of a group follow from them."""
    dtype, groups = parts[0].dtype, norm.num_groups
    exact = torch.promote_types(dtype, torch.float32)
    images = [part.to(exact) for part in parts]
    var, mean = (
        torch.cat(channels, dim=1).view(-1, groups, norm.num_channels // groups)
        for channels in zip(*(torch.var_mean(x, (2, 3), correction=0) for x in images), strict=True)
    )
    centre = mean.mean(2, keepdim=True)
    spread = (var + (mean - centre).square()).mean(2, keepdim=True)
    gain = (spread + norm.eps).rsqrt() * norm.weight.to(exact).view(groups, -1)
    offset = norm.bias.to(exact).view(groups, -1) - gain * centre
    gain, offset = (a.flatten(1)[:, :, None, None] for a in (gain, offset))
    if scale is not None and shift is not None:
        more = 1 + scale.to(exact)
        gain, offset = gain * more, offset * more + shift.to(exact)
    widths = [part.shape[1] for part in parts]
    done = []
    for x, a, b in zip(images, torch.split(gain, widths, 1), torch.split(offset, widths, 1), strict=True):
        h = x * a + b
        done.append((F.silu(h) if silu else h).to(dtype))
    return whole(tuple(done))
