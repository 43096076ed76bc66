"""EDM's re-implementation of the ADM network of Dhariwal and Nichol 2021, for inference.

Parameter names are the official ones (NVlabs/edm, `DhariwalUNet`); the networks of guided-diffusion itself are in
`unet`. Knows nothing of files, preconditioning or sampling; see `edm_layers` for what both of EDM's U-Nets share.
"""

from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from samplers.models.edm_layers import (
    Block,
    Blocks,
    Conv,
    Count,
    Counts,
    Style,
    levels,
    norm,
    positional_embedding,
)
from samplers.models.normalisation import joined, normalised

_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DhariwalArchitecture:
    """The official constructor's arguments, with its defaults; dropout and label_dropout belong to the training."""

    img_resolution: Count
    in_channels: Count
    out_channels: Count
    label_dim: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    augment_dim: Annotated[int, Field(ge=0, le=1000)] = 0
    model_channels: Count = 192
    channel_mult: Counts = (1, 2, 3, 4)
    channel_mult_emb: Count = 4
    num_blocks: Blocks = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1
    label_dropout: float = 0.0

    @property
    def style(self) -> Style:
        """What all blocks have in common."""
        return Style(
            embedding=self.model_channels * self.channel_mult_emb,
            skip_scale=1.0,
            eps=_EPS,
            adaptive_scale=True,
            resample_proj=False,
            resample_filter=(1, 1),
            channels_per_head=64,
        )

    @property
    def levels(self) -> list[tuple[int, int, bool]]:
        """Per level: the image's side, the channels, and whether it has attention."""
        return levels(self.img_resolution, self.model_channels, self.channel_mult, self.attn_resolutions)


class DhariwalUNet(nn.Module):
    """x [B, C, H, W], noise [1] or [B], labels one-hot [B or 1, label_dim] → [B, out_channels, H, W].

    The arithmetic runs in the parameters' dtype, which the result has. With one noise level for the batch and no
    labels, the embedding is computed for one row only.
    """

    def __init__(self, net: DhariwalArchitecture) -> None:
        super().__init__()
        width, embedding = net.model_channels, net.style.embedding
        self.width = width
        # Augmentation belongs to the training; this is here for the checkpoint to fit.
        self.map_augment = nn.Linear(net.augment_dim, width, bias=False) if net.augment_dim else None
        self.map_layer0 = nn.Linear(width, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(net.label_dim, embedding, bias=False) if net.label_dim else None
        style = net.style
        channels = net.levels[0][1]
        skips = [channels]
        encoder: dict[str, nn.Module] = {}
        for level, (side, width, attention) in enumerate(net.levels):
            if level == 0:
                encoder[f"{side}x{side}_conv"] = Conv(net.in_channels, channels, 3)
            else:
                encoder[f"{side}x{side}_down"] = Block(channels, channels, style, "down")
                skips.append(channels)
            for index in range(net.num_blocks):
                encoder[f"{side}x{side}_block{index}"] = Block(channels, width, style, attention=attention)
                skips.append(channels := width)
        decoder: dict[str, nn.Module] = {}
        for level, (side, width, attention) in reversed(list(enumerate(net.levels))):
            if level == len(net.levels) - 1:
                decoder[f"{side}x{side}_in0"] = Block(channels, channels, style, attention=True)
                decoder[f"{side}x{side}_in1"] = Block(channels, channels, style)
            else:
                decoder[f"{side}x{side}_up"] = Block(channels, channels, style, "up")
            for index in range(net.num_blocks + 1):
                joined = channels + skips.pop()
                decoder[f"{side}x{side}_block{index}"] = Block(joined, width, style, attention=attention)
                channels = width
        self.enc, self.dec = nn.ModuleDict(encoder), nn.ModuleDict(decoder)
        self.out_norm = norm(channels, _EPS)
        self.out_conv = Conv(channels, net.out_channels, 3)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class."""
        emb = self._embed(noise, labels)
        x = x.to(self.map_layer0.weight.dtype, memory_format=torch.channels_last)
        skips = []
        for layer in self.enc.values():
            x = layer((x,), emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(joined(x, skips.pop()) if "_block" in name else (x,), emb)
        return cast(Tensor, self.out_conv(normalised(self.out_norm, (x,))))

    def _embed(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        dtype = self.map_layer0.weight.dtype
        exact = noise.reshape(-1).to(torch.promote_types(dtype, torch.float32))
        emb = positional_embedding(exact, self.width, endpoint=False).to(dtype)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            assert labels is not None, "a class-conditional network needs labels"
            emb = emb + self.map_label(labels.to(dtype))
        return F.silu(emb)
