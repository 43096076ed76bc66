"""The guided-diffusion (ADM) U-Net and the classifier made of its encoder half, for inference.

Parameter names are the official ones, so that published state dicts load as they are. Knows nothing of files,
noise schedules or sampling. Source of the conventions: Dhariwal and Nichol 2021, "Diffusion Models Beat GANs
on Image Synthesis", appendix, and the behaviour of openai/guided-diffusion.

Layout: activations are channels_last all the way, so that a convolution and the attention's view of an image
as H*W tokens both take the memory as it lies.
"""

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samplers.errors import InputError
from samplers.models.normalisation import Parts, joined, normalised, projected, whole

_GROUPS = 32


@dataclass(frozen=True, slots=True)
class Architecture:
    """Everything that decides the layers and the arithmetic of a network.

    channel_mult: width of each resolution level in units of `num_channels`; each level halves the image.
    attention_factors: the down-sampling factors (1, 2, 4, ...) with attention; the middle always has it.
    num_head_channels: channels per attention head; -1 means `num_heads` heads (`num_heads_upsample` in the
    decoder). Raises InputError where normalisation or attention cannot divide the channels.
    """

    in_channels: int
    out_channels: int
    num_channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention_factors: tuple[int, ...]
    num_heads: int = 4
    num_heads_upsample: int = 4
    num_head_channels: int = -1
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for mult in self.channel_mult:
            if self.width(mult) % _GROUPS or self.width(mult) < _GROUPS:
                raise InputError(
                    f"num_channels {self.num_channels} times channel_mult {mult:g} "
                    f"is not a multiple of {_GROUPS}"
                )

    def width(self, mult: float) -> int:
        """Channels of a level."""
        return int(mult * self.num_channels)

    @property
    def levels(self) -> list[tuple[int, int, bool]]:
        """Per resolution level: its down-sampling factor, its channels, and whether it has attention."""
        factors = [2**level for level in range(len(self.channel_mult))]
        return [
            (factor, self.width(mult), factor in self.attention_factors)
            for factor, mult in zip(factors, self.channel_mult, strict=True)
        ]


def timestep_embedding(time: Tensor, width: int) -> Tensor:
    """cos then sin of time * 10000^(-k / (width/2)): [T] floating point → [T, width]."""
    half = width // 2
    steps = torch.arange(half, dtype=time.dtype, device=time.device)
    angles = time[:, None] * torch.exp(steps * (-math.log(10000) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-5)


def _conv(channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    """Two convolutions around the time (and label) embedding, with a skip; optionally halves or doubles
    the image."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        net: Architecture,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = net.use_scale_shift_norm
        self.resample = resample
        self.in_layers = nn.Sequential(_norm(channels), nn.SiLU(), _conv(channels, out_channels))
        rows = 2 * out_channels if net.use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * net.num_channels, rows))
        # Index 2 was the dropout of the training; it stays so that the convolution keeps its number.
        self.out_layers = nn.Sequential(
            _norm(out_channels), nn.SiLU(), nn.Identity(), _conv(out_channels, out_channels)
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else _conv(channels, out_channels, kernel=1)

    def forward(self, parts: Parts, emb: Tensor) -> Tensor:
        """parts: the image [B, C, H, W]; emb: [B or 1, E]."""
        h = normalised(cast(nn.GroupNorm, self.in_layers[0]), parts)
        if self.resample is not None:
            change = _double if self.resample == "up" else _halve
            h, parts = change(h), tuple(change(part) for part in parts)
        h = self.in_layers[2](h)
        shift = self.emb_layers(emb)[:, :, None, None]
        norm = cast(nn.GroupNorm, self.out_layers[0])
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = normalised(norm, (h,), scale=scale, shift=shift)
        else:
            h = normalised(norm, (h + shift,))
        conv = self.skip_connection
        skip = projected(conv, parts) if isinstance(conv, nn.Conv2d) else whole(parts)
        result: Tensor = skip + self.out_layers[3](h)
        return result


class Downsample(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = _conv(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H/2, W/2]."""
        return cast(Tensor, self.op(x))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, 2H, 2W]."""
        return cast(Tensor, self.conv(_double(x)))


class AttentionBlock(nn.Module):
    """Self-attention over the H*W positions of an image, with a skip.

    The channels of `qkv` are ordered q, k, v and then heads (new order), or heads and then q, k, v (legacy).
    q and k times d^(-1/4) each, as in the official code, is the 1/sqrt(d) of scaled_dot_product_attention.
    """

    def __init__(self, channels: int, heads: int, net: Architecture) -> None:
        super().__init__()
        if net.num_head_channels != -1:
            if channels % net.num_head_channels:
                raise InputError(
                    f"num_head_channels {net.num_head_channels} does not divide {channels} channels"
                )
            heads = channels // net.num_head_channels
        elif channels % heads:
            raise InputError(
                f"{heads} attention heads (num_heads, num_heads_upsample) do not divide {channels} channels"
            )
        self.heads = heads
        self.new_order = net.use_new_attention_order
        self.norm = _norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → the same shape."""
        batch, channels, height, width = x.shape
        tokens = _tokens(normalised(self.norm, (x,), silu=False))
        qkv = F.linear(tokens, self.qkv.weight.squeeze(-1), self.qkv.bias)
        if self.new_order:
            q, k, v = qkv.view(batch, height * width, 3, self.heads, -1).unbind(2)
        else:
            q, k, v = qkv.view(batch, height * width, self.heads, 3, channels // self.heads).unbind(3)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        mixed = mixed.transpose(1, 2).reshape(batch, height * width, channels)
        mixed = F.linear(mixed, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return x + mixed.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H*W, C]; a view of a channels_last image."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class Stage(nn.ModuleList):
    """Layers in a row, of which the ResBlocks also get the embedding."""

    def forward(self, parts: Parts, emb: Tensor) -> Tensor:
        """parts: the image [B, C, H, W], of which only a ResBlock takes several; emb: [B or 1, E]."""
        for layer in self:
            parts = (layer(parts, emb) if isinstance(layer, ResBlock) else layer(*parts),)
        (x,) = parts
        return x


class _Encoder(nn.Module):
    """The half that both networks share: embedding of the time, down to the middle block."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.num_channels = net.num_channels
        embedding = 4 * net.num_channels
        self.time_embed = nn.Sequential(
            nn.Linear(net.num_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        channels = net.width(net.channel_mult[0])
        stages = [Stage([_conv(net.in_channels, channels)])]
        self.skips = [channels]  # channels of every stage's output, which the decoder takes back
        for factor, width, attention in net.levels:
            if factor > 1:
                down = (
                    ResBlock(channels, channels, net, "down") if net.resblock_updown else Downsample(channels)
                )
                stages.append(Stage([down]))
                self.skips.append(channels)
            for _ in range(net.num_res_blocks):
                stage = Stage([ResBlock(channels, width, net)])
                if attention:
                    stage.append(AttentionBlock(width, net.num_heads, net))
                stages.append(stage)
                self.skips.append(channels := width)
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = Stage(
            [
                ResBlock(channels, channels, net),
                AttentionBlock(channels, net.num_heads, net),
                ResBlock(channels, channels, net),
            ]
        )

    def embed(self, time: Tensor) -> Tensor:
        """[], [1] or [B] times → [1 or B, E]."""
        dtype = cast(nn.Linear, self.time_embed[0]).weight.dtype
        # Half precision has too few digits for the angles of times near 1000.
        exact = time.reshape(-1).to(torch.promote_types(dtype, torch.float32))
        return cast(Tensor, self.time_embed(timestep_embedding(exact, self.num_channels).to(dtype)))

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """The outputs of all stages, then that of the middle block."""
        dtype = cast(nn.Linear, self.time_embed[0]).weight.dtype
        h = x.to(dtype, memory_format=torch.channels_last)
        outputs = []
        for stage in self.input_blocks:
            outputs.append(h := stage((h,), emb))
        return [*outputs, self.middle_block((h,), emb)]


class UNet(_Encoder):
    """The denoiser: x [B, C, H, W], time [], [1] or [B] (fractions are fine), labels int64 [B] → [B, out, H,
    W].

    With one time for the batch and no classes, the embedding and its projections are computed for one row
    only.
    """

    def __init__(self, net: Architecture) -> None:
        super().__init__(net)
        self.label_emb = (
            None if net.num_classes is None else nn.Embedding(net.num_classes, 4 * net.num_channels)
        )
        skips = list(self.skips)
        channels = skips[-1]
        stages = []
        for factor, width, attention in reversed(net.levels):
            for index in range(net.num_res_blocks + 1):
                stage = Stage([ResBlock(channels + skips.pop(), width, net)])
                if attention:
                    stage.append(AttentionBlock(width, net.num_heads_upsample, net))
                if factor > 1 and index == net.num_res_blocks:
                    stage.append(
                        ResBlock(width, width, net, "up") if net.resblock_updown else Upsample(width)
                    )
                stages.append(stage)
                channels = width
        self.output_blocks = nn.ModuleList(stages)
        self.out = nn.Sequential(_norm(channels), nn.SiLU(), _conv(channels, net.out_channels))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class; the arithmetic runs in the parameters' dtype, which the result has."""
        emb = self.embed(time)
        if self.label_emb is not None:
            assert labels is not None, "a class-conditional network needs labels"
            emb = emb + self.label_emb(labels)
        skips = self.encode(x, emb)
        h = skips.pop()
        for stage in self.output_blocks:
            h = stage(joined(h, skips.pop()), emb)
        return cast(Tensor, self.out[2](normalised(cast(nn.GroupNorm, self.out[0]), (h,))))


class AttentionPool(nn.Module):
    """One attention read-out of an image: the mean over positions asks, mean and all positions answer.

    Only that first token's answer is used, so only its query is computed. Heads have 64 channels, in the new
    order, whatever the trunk does (an official constant).
    """

    head_channels = 64

    def __init__(self, positions: int, channels: int, classes: int) -> None:
        super().__init__()
        if channels % self.head_channels:
            raise InputError(
                f"the classifier's last width, {channels}, is not a multiple of {self.head_channels}"
            )
        self.positional_embedding = nn.Parameter(torch.zeros(channels, positions + 1))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] with H*W = positions → [B, classes]."""
        tokens = _tokens(x)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positional_embedding.T
        channels = x.shape[1]
        weight = self.qkv_proj.weight.squeeze(-1)
        bias = cast(Tensor, self.qkv_proj.bias)
        query = F.linear(tokens[:, :1], weight[:channels], bias[:channels])
        key, value = F.linear(tokens, weight[channels:], bias[channels:]).chunk(2, dim=2)
        split = (len(x), -1, channels // self.head_channels, self.head_channels)
        q, k, v = (part.reshape(split).transpose(1, 2) for part in (query, key, value))
        pooled = F.scaled_dot_product_attention(q, k, v).flatten(1)
        return F.linear(pooled, self.c_proj.weight.squeeze(-1), self.c_proj.bias)


class Classifier(_Encoder):
    """log-odds of the classes of a noisy image: x [B, C, H, W], time [], [1] or [B] → [B, out_channels].

    The image must have `image_size` pixels a side: the pool has one learned vector per position.
    """

    def __init__(self, net: Architecture, image_size: int) -> None:
        super().__init__(net)
        channels = self.skips[-1]
        side = image_size // net.levels[-1][0]
        self.out = nn.Sequential(
            _norm(channels), nn.SiLU(), AttentionPool(side * side, channels, net.out_channels)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """See the class; the arithmetic runs in the parameters' dtype, which the result has."""
        return cast(Tensor, self.out(self.encode(x, self.embed(time))[-1]))
