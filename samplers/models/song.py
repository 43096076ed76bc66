"""EDM's re-implementation of the DDPM++ and NCSN++ networks of Song et al. 2021, for inference.

Parameter names are the official ones (NVlabs/edm, `SongUNet`), so that published snapshots load as they are. Knows
nothing of files, preconditioning or sampling; see `edm_layers` for the conventions that both U-Nets share.
"""

import math
from typing import Annotated, Literal, cast

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
    FourierEmbedding,
    FusedDown,
    Resampler,
    Style,
    levels,
    norm,
    positional_embedding,
)
from samplers.models.normalisation import joined, normalised

_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SongArchitecture:
    """The official constructor's arguments, with its defaults.

    DDPM++: the defaults. NCSN++: embedding_type "fourier", encoder_type "residual", channel_mult_noise 2,
    resample_filter (1, 3, 3, 1). dropout and label_dropout belong to the training.
    """

    img_resolution: Count
    in_channels: Count
    out_channels: Count
    label_dim: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    augment_dim: Annotated[int, Field(ge=0, le=1000)] = 0
    model_channels: Count = 128
    channel_mult: Counts = (1, 2, 2, 2)
    channel_mult_emb: Count = 4
    num_blocks: Blocks = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    label_dropout: float = 0.0
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: Count = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: Annotated[tuple[float, ...], Field(min_length=1, max_length=16)] = (1, 1)

    @property
    def style(self) -> Style:
        """What all blocks have in common."""
        return Style(
            embedding=self.model_channels * self.channel_mult_emb,
            skip_scale=math.sqrt(0.5),
            eps=_EPS,
            adaptive_scale=False,
            resample_proj=True,
            resample_filter=self.resample_filter,
            channels_per_head=None,
        )

    @property
    def levels(self) -> list[tuple[int, int, bool]]:
        """Per level: the image's side, the channels, and whether it has attention."""
        return levels(self.img_resolution, self.model_channels, self.channel_mult, self.attn_resolutions)


class SongUNet(nn.Module):
    """x [B, C, H, W], noise [1] or [B], labels one-hot [B or 1, label_dim] → [B, out_channels, H, W].

    The arithmetic runs in the parameters' dtype, which the result has. With one noise level for the batch and no
    labels, the embedding is computed for one row only.
    """

    def __init__(self, net: SongArchitecture) -> None:
        super().__init__()
        self.net = net
        embedding = net.style.embedding
        self.width = net.model_channels * net.channel_mult_noise
        if net.embedding_type == "fourier":
            self.map_noise = FourierEmbedding(self.width)
        self.map_label = nn.Linear(net.label_dim, self.width) if net.label_dim else None
        # Augmentation belongs to the training; this is here for the checkpoint to fit.
        self.map_augment = nn.Linear(net.augment_dim, self.width, bias=False) if net.augment_dim else None
        self.map_layer0 = nn.Linear(self.width, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.enc = self._encoder()
        self.dec = self._decoder()

    def _encoder(self) -> nn.ModuleDict:
        net, style = self.net, self.net.style
        layers: dict[str, nn.Module] = {}
        channels, aux = net.model_channels, net.in_channels
        for level, (side, width, attention) in enumerate(net.levels):
            name = f"{side}x{side}"
            if level == 0:
                layers[f"{name}_conv"] = Conv(net.in_channels, channels, 3)
            else:
                layers[f"{name}_down"] = Block(channels, channels, style, "down")
                if net.encoder_type == "skip":
                    layers[f"{name}_aux_down"] = Resampler("down", net.resample_filter)
                    layers[f"{name}_aux_skip"] = Conv(aux, channels, 1)
                elif net.encoder_type == "residual":
                    layers[f"{name}_aux_residual"] = FusedDown(aux, channels, 3, net.resample_filter)
                    aux = channels
            for index in range(net.num_blocks):
                layers[f"{name}_block{index}"] = Block(channels, width, style, attention=attention)
                channels = width
        return nn.ModuleDict(layers)

    def _decoder(self) -> nn.ModuleDict:
        net, style = self.net, self.net.style
        skips = [
            layer.out_channels
            for name, layer in self.enc.items()
            if "aux" not in name and isinstance(layer, (Conv, Block))
        ]
        layers: dict[str, nn.Module] = {}
        channels = skips[-1]
        last = len(net.levels) - 1
        for level, (side, width, attention) in reversed(list(enumerate(net.levels))):
            name = f"{side}x{side}"
            if level == last:
                layers[f"{name}_in0"] = Block(channels, channels, style, attention=True)
                layers[f"{name}_in1"] = Block(channels, channels, style)
            else:
                layers[f"{name}_up"] = Block(channels, channels, style, "up")
            for index in range(net.num_blocks + 1):
                attends = attention and index == net.num_blocks
                layers[f"{name}_block{index}"] = Block(
                    channels + skips.pop(), width, style, attention=attends
                )
                channels = width
            if net.decoder_type == "skip" or level == 0:
                if net.decoder_type == "skip" and level < last:
                    layers[f"{name}_aux_up"] = Resampler("up", net.resample_filter)
                layers[f"{name}_aux_norm"] = norm(channels, _EPS)
                layers[f"{name}_aux_conv"] = Conv(channels, net.out_channels, 3)
        return nn.ModuleDict(layers)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class."""
        emb = self._embed(noise, labels)
        x = x.to(self.map_layer0.weight.dtype, memory_format=torch.channels_last)
        aux = x
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer((x,), emb) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        image: Tensor | None = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                image = layer(image)
            elif "aux_norm" in name:
                normed = normalised(cast(nn.GroupNorm, layer), (x,))
            elif "aux_conv" in name:
                part = layer(normed)
                image = part if image is None else image + part
            else:
                x = layer(joined(x, skips.pop()) if "_block" in name else (x,), emb)
        return cast(Tensor, image)

    def _embed(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        dtype = self.map_layer0.weight.dtype
        exact = noise.reshape(-1).to(torch.promote_types(dtype, torch.float32))
        if self.net.embedding_type == "fourier":
            emb = self.map_noise(exact)
        else:
            emb = positional_embedding(exact, self.width, endpoint=True)
        emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1).to(dtype)  # sin first
        if self.map_label is not None:
            assert labels is not None, "a class-conditional network needs labels"
            emb = emb + self.map_label(labels.to(dtype) * math.sqrt(self.net.label_dim))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
