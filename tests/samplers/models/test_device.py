"""Networks on a GPU: float32 there equals float64 on the processor. Skipped where there is no GPU."""

import copy

import pytest
import torch

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
