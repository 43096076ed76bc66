"""The fast form of a model on a GPU: weights cast once, a compiled network, and a decoder that rounds as it does.

Knows nothing of solvers, and of a network only which of them are lamtune's own. On a processor a model stays as it is:
there compilation takes longer than it saves.
"""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from samplers import compiling
from samplers.models.dhariwal import DhariwalUNet
from samplers.models.diffusers_model import Decoder
from samplers.models.protocol import Model
from samplers.models.song import SongUNet
from samplers.models.unet import UNet

_OWN = (UNet, SongUNet, DhariwalUNet)


def make_fast(model: Model, device: torch.device, precision: torch.dtype) -> None:
    """Prepare a model that is on `device` for calls of one shape under autocast to `precision` (float32: none).

    Changes the model in place; its answers change by rounding. A model without a torch module stays as it is.
    """
    network, decoder = getattr(model, "network", None), getattr(model, "decoder", None)
    if device.type != "cuda" or not isinstance(network, nn.Module):
        return
    if precision != torch.float32:
        if isinstance(network, _OWN):
            cast_weights(network, precision)
        if isinstance(decoder, Decoder):
            decoder.convolutions = "tf32"
    model.network = Compiled(network)  # type: ignore[attr-defined]


def cast_weights(network: nn.Module, precision: torch.dtype) -> None:
    """Cast, in place, the weights that autocast would cast in every call: those of convolutions and linear layers."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            layer.to(precision)


class Compiled(nn.Module):
    """A network that is compiled at its first call, see `compiling.Compiled`, and replayed as a CUDA graph.

    Every shape of the input is compiled for itself, which takes a minute: call it with one. Without the graph the
    launches of its kernels take longer than the kernels do on 500 images of 32×32.
    """

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__()
        self.network = network
        options = {"mode": "reduce-overhead", **options}
        self._call = compiling.Compiled(network.forward, type(network).__name__, dynamic=False, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network answers."""
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # The next replay writes over the answer of this one.
        return tree_map_only(torch.Tensor, torch.Tensor.clone, self._call(*args, **kwargs))
