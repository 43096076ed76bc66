"""Networks on a GPU: float32 there equals float64 on the processor, and so does the fast form of a network within
its precision. Skipped where there is no GPU."""

import copy
import warnings

import pytest
import torch

from samplers.models.compiled import Compiled, cast_weights
from samplers.models.dhariwal import DhariwalArchitecture, DhariwalUNet
from samplers.models.song import SongArchitecture, SongUNet
from samplers.models.unet import Architecture, UNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def networks():
    adm = Architecture(3, 6, 64, (1, 2), 1, (2,), num_head_channels=32, resblock_updown=True)
    song = SongArchitecture(
        img_resolution=16, in_channels=3, out_channels=3, model_channels=64, channel_mult=(1, 2)
    )
    dhariwal = DhariwalArchitecture(
        img_resolution=16, in_channels=3, out_channels=3, model_channels=64, channel_mult=(1, 2)
    )
    return {"adm": UNet(adm), "song": SongUNet(song), "dhariwal": DhariwalUNet(dhariwal)}


@pytest.fixture
def no_tf32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("kind", ["adm", "song", "dhariwal"])
def test_float32_on_a_gpu_equals_float64_on_the_processor(kind, formula):
    network = networks()[kind].eval()
    network.load_state_dict(formula.weights(network))
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = torch.tensor([0.7], dtype=torch.float64)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(x, time)
        fast = network.cuda()(x.float().cuda(), time.float().cuda()).double().cpu()
    assert (fast - exact).abs().max() <= 2e-5 * exact.abs().max()


# Half precision rounds every activation to 11 bits: some 4e-4 of the answer's norm in a real CIFAR-10 network.
@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("kind", ["adm", "song", "dhariwal"])
def test_a_compiled_network_equals_float64_on_the_processor(kind, precision, tolerance, formula):
    network = networks()[kind].eval().requires_grad_(False)
    network.load_state_dict(formula.weights(network))
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = torch.tensor([0.7], dtype=torch.float64)
    exact = copy.deepcopy(network).double()(x, time)
    network.cuda()
    if precision != torch.float32:
        cast_weights(network, precision)
    half = precision != torch.float32
    with warnings.catch_warnings(action="error"), torch.autocast("cuda", torch.float16, enabled=half):
        fast = Compiled(network)(x.float().cuda(), time.float().cuda()).double().cpu()
    assert (fast - exact).norm() <= tolerance * exact.norm()
