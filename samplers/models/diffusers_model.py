"""Networks of the diffusers library behind the protocol: prediction, guidance, decoding of latents.

Knows nothing of folders and configurations (`diffusers_folder` reads them) or solvers, and of λ only where it acts: on
what a call returns, which is the guided noise.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from samplers.ldm import classifier_free
from samplers.models.process import Process
from samplers.models.protocol import Variance
from samplers.prediction import Prediction, to_epsilon
from samplers.rounding import Rounding, float32

Answer = Literal["epsilon", "x0", "v"]
_PIXELS_AT_ONCE = 2**21  # what the decoder makes in one call: 32 images of 256×256


class DiffusersModel:
    """A denoiser of the library as a `Model`; see there. It runs in float32 unless autocast says otherwise.

    guidance: its scale, and the label that stands for no class. decoder: from latents to images in [-1, 1].
    """

    time: Literal["discrete"] = "discrete"
    gradient: None = None
    prior: None = None
    round_sigma: None = None
    sigma_range: None = None

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        *,
        shape: tuple[int, int, int],
        answers: Answer,
        variance: Variance,
        num_classes: int | None,
        guidance: tuple[float, int] | None,
        decoder: "Decoder | None",
        scheduler_config: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        self.network = network
        self.process = process
        self.shape = shape
        self.answers = answers
        self.variance = variance
        self.learned_range = variance == "learned_range"
        self.num_classes = num_classes
        self.decoder = decoder
        self.scheduler_config = scheduler_config
        self.fingerprint = fingerprint
        self._guidance = guidance

    @property
    def betas(self) -> NDArray[np.float64]:
        """See `Model`."""
        assert self.process.betas is not None
        return self.process.betas

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """See `Model`."""
        return self.shape if self.decoder is None else self.decoder.image_shape(self.shape)

    def to(self, device: torch.device) -> Self:
        """See `Model`."""
        self.network.to(device)
        if self.decoder is not None:
            self.decoder.network.to(device)
        return self

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        """See `Model`. With guidance the network sees the batch twice, and v is that of the conditional half; with
        scale 0, which is unconditional sampling, it sees it once."""
        if self._guidance is None:
            return self._predict(x, time, labels)
        assert labels is not None
        scale, null = self._guidance
        none = torch.full_like(labels, null)
        if scale == 0:
            return self._predict(x, time, none)
        both = torch.cat([none, labels])
        return classifier_free(lambda twice, _: self._predict(twice, time, both), scale)(x, 0)

    def _predict(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        times = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        given = {} if self.num_classes is None else {"class_labels": labels}
        output = self.network(x.float(), times, return_dict=False, **given)[0].to(x.dtype)
        first, v = output.chunk(2, dim=1) if self.learned_range else (output, None)
        return Prediction(to_epsilon(self.answers, first, x, *self.level(time)), v)

    def level(self, time: float) -> tuple[float, float]:
        """See `Converting`."""
        return self.process.coefficients(time)

    def pixels(self, x: Tensor) -> Tensor:
        """See `Model`: decoded where x is a latent; then as the library's pipelines, 255·clamp(x/2 + 1/2, 0, 1) rounded
        to the nearest integer, halves to even (ADM and EDM drop the fraction)."""
        image = x.float() if self.decoder is None else self.decoder(x.float())
        return ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


class ClassContext(nn.Module):
    """A UNet2DConditionModel that is called as the other networks are, network(x, t, class_labels=labels).

    contexts: a row per label, [rows, D], which is the one token that the network attends to: the weight of LDM's
    ClassEmbedder. None for a network without cross-attention.
    """

    contexts: Tensor | None

    def __init__(self, network: nn.Module, contexts: Tensor | None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("contexts", contexts)

    def forward(
        self, x: Tensor, times: Tensor, class_labels: Tensor | None = None, return_dict: bool = False
    ) -> Any:
        """See UNet2DConditionModel."""
        if self.contexts is None:
            return self.network(x, times, None, class_labels=class_labels, return_dict=return_dict)
        assert class_labels is not None
        context = nn.functional.embedding(class_labels, self.contexts)[:, None]
        return self.network(x, times, context, return_dict=return_dict)


class Decoder:
    """The second half of a VQModel or AutoencoderKL, in float32.

    convolutions: how they are rounded, see `samplers.rounding`: TF32 has float32's range, which the activations of some
    decoders need. The choice of a VQModel's codes is no convolution, and stays exact.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        self.convolutions: Rounding | None = None
        self._scale: float = network.config.scaling_factor
        self._shift: float = network.config.get("shift_factor") or 0.0

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """C, H, W of the image of a latent of that shape."""
        factor = 2 ** (len(self.network.config.block_out_channels) - 1)
        return self.network.config.out_channels, shape[1] * factor, shape[2] * factor

    def __call__(self, x: Tensor) -> Tensor:
        """Latents float32 [B, C, h, w], as they were sampled → images [B, C, H, W], a few at a time."""
        _, height, width = self.image_shape((1, *x.shape[-2:]))
        size = max(1, _PIXELS_AT_ONCE // (height * width))
        parts = (x[i : i + size] / self._scale + self._shift for i in range(0, len(x), size))
        with float32(convolutions=self.convolutions):
            return torch.cat([self.network.decode(part, return_dict=False)[0] for part in parts])
