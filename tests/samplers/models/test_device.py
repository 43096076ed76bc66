"""One network of each kind on a GPU: float32 there equals float64 on the processor, and so does the compiled form
within its precision. Skipped where there is no GPU.

Needs torch, numpy and pydantic; the networks of the diffusers library are skipped where it is absent.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samplers.generate import measure_ms_eps
from samplers.models.adm import load_adm
from samplers.models.compiled import Compiled, cast_weights
from samplers.models.dhariwal import DhariwalArchitecture, DhariwalUNet
from samplers.models.diffusers_model import ClassContext, Decoder
from samplers.models.digits import FLAGS, WEIGHTS
from samplers.models.song import SongArchitecture, SongUNet
from samplers.models.unet import Architecture, Classifier, UNet
from samplers.rounding import float32

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.usefixtures("no_tf32"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of diffusers, about numpy
]

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TOLERANCE = 2e-5  # of the largest number in the answer

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "adm": lambda: UNet(Architecture(3, 6, 64, (1, 2), 1, (2,), num_head_channels=32, resblock_updown=True)),
    "classifier": lambda: Classifier(Architecture(3, 10, 64, (1, 2), 1, (2,), num_head_channels=64), 16),
    "song": lambda: SongUNet(
        SongArchitecture(
            img_resolution=16, in_channels=3, out_channels=3, model_channels=64, channel_mult=(1, 2)
        )
    ),
    "dhariwal": lambda: DhariwalUNet(
        DhariwalArchitecture(
            img_resolution=16, in_channels=3, out_channels=3, model_channels=64, channel_mult=(1, 2)
        )
    ),
}


@pytest.fixture
def no_tf32() -> Iterator[None]:
    with float32(convolutions="ieee"):
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def agree(fast: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> None:
    assert (fast.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert float((fast.double().cpu() - exact).abs().max()) <= tolerance * float(exact.abs().max())


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_of_ours(kind: str, formula: Any) -> None:
    network = NETWORKS[kind]().eval()
    network.load_state_dict(formula.weights(network))
    x, time = normal(4, 3, 16, 16), torch.tensor([0.7], dtype=torch.float64)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(x, time)
        agree(network.to(GPU)(x.float().to(GPU), time.float().to(GPU)), exact)


# Half precision rounds every activation to 11 bits: some 4e-4 of the answer's norm in a real CIFAR-10 network.
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("kind", ["adm", "song", "dhariwal"])
def test_a_compiled_network(kind: str, precision: torch.dtype, tolerance: float, formula: Any) -> None:
    network = NETWORKS[kind]().eval().requires_grad_(False)
    network.load_state_dict(formula.weights(network))
    x, time = normal(4, 3, 16, 16), torch.tensor([0.7], dtype=torch.float64)
    exact = copy.deepcopy(network).double()(x, time)
    network.to(GPU)
    half = precision != torch.float32
    if half:
        cast_weights(network, precision)
    compiled = Compiled(network)
    with warnings.catch_warnings(record=True) as caught, torch.autocast("cuda", torch.float16, enabled=half):
        fast = compiled(x.float().to(GPU), time.float().to(GPU)).double().cpu()
    assert not [w for w in caught if "torch.compile failed" in str(w.message)]
    assert (fast - exact).norm() <= tolerance * exact.norm()


def test_the_gradient_of_a_classifier(formula: Any) -> None:
    network = NETWORKS["classifier"]().eval()
    network.load_state_dict(formula.weights(network))

    def slope(network: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        log_p = torch.log_softmax(network(x, torch.tensor([0.7]).to(x)), dim=1)[:, 3].sum()
        (gradient,) = torch.autograd.grad(log_p, x)
        return gradient

    x = normal(4, 3, 16, 16)
    exact = slope(copy.deepcopy(network).double(), x)
    agree(slope(network.to(GPU), x.float().to(GPU)), exact)


@pytest.mark.parametrize("kind", ["unet", "attending", "dit"])
def test_a_network_of_diffusers(kind: str, folders: Any) -> None:
    pytest.importorskip("diffusers")
    x, labels, width = normal(3, 3, 8, 8), torch.tensor([2, 0, 4]), 16
    network: nn.Module
    if kind == "unet":
        network = folders.unet(num_class_embeds=6)
    elif kind == "attending":
        network = ClassContext(folders.conditional(), normal(6, width).float())
    else:
        network, x = folders.dit(), normal(3, 4, 4, 4)

    def answer(network: nn.Module, x: Tensor) -> Tensor:
        times = torch.full((3,), 400.0, device=x.device)
        out: Tensor = network(x, times, class_labels=labels.to(x.device), return_dict=False)[0]
        return out

    with torch.no_grad():
        exact = answer(copy.deepcopy(network).double(), x)
        agree(answer(network.to(GPU), x.float().to(GPU)), exact)


@pytest.mark.parametrize(("convolutions", "tolerance"), [(None, TOLERANCE), ("tf32", 2e-3)])
@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_decoder_of_diffusers(kind: str, convolutions: Any, tolerance: float, folders: Any) -> None:
    pytest.importorskip("diffusers")
    network, x = getattr(folders, kind)(), normal(3, 4, 4, 4)
    if kind == "vq":  # near its codes: halfway between two of them rounding decides which one is taken
        codes = network.quantize.embedding.weight.detach().double()
        x = codes[torch.arange(48) % len(codes)].reshape(3, 4, 4, 3).permute(0, 3, 1, 2)
        x = network.config.scaling_factor * (x + 1e-3 * normal(3, 3, 4, 4))
    with torch.no_grad():
        exact = Decoder(copy.deepcopy(network).double())(x)
        decoder = Decoder(network.to(GPU))
        decoder.convolutions = convolutions
        agree(decoder(x.float().to(GPU)), exact, tolerance)


def test_the_statistics_of_analytic_dpm() -> None:
    numbers = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 1, 8, 8), generator=numbers, dtype=torch.uint8)
    flags = {**FLAGS, "diffusion_steps": 20, "rescale_timesteps": True}
    exact, fast = (load_adm(WEIGHTS, flags) for _ in range(2))
    exact.network.double()
    wanted, got = (
        measure_ms_eps(model.to(device), [images], device, count=4, shift1=True)
        for model, device in ((exact, CPU), (fast, GPU))
    )
    np.testing.assert_allclose(got, wanted, rtol=TOLERANCE)
