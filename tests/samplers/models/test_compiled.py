"""samplers.models.compiled: the fast form of a network answers as the plain one does."""

import copy
import warnings

import pytest
import torch
from torch import nn

from samplers.models.compiled import Compiled, cast_weights, make_fast
from samplers.models.dhariwal import DhariwalArchitecture, DhariwalUNet
from samplers.models.edm import EdmModel
from samplers.models.load import load_model
from samplers.models.preconditioning import Edm
from samplers.models.song import SongArchitecture, SongUNet
from samplers.models.unet import Architecture, UNet

SIZE = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_blocks": 1}
NETWORKS = {
    "adm": lambda: UNet(Architecture(3, 6, 32, (1, 2), 1, (2,), num_head_channels=16, resblock_updown=True)),
    # The decoder's last level has as many channels as it is given: a skip without weights.
    "adm, wide first": lambda: UNet(Architecture(3, 6, 32, (2, 1), 1, (2,), use_scale_shift_norm=False)),
    "ddpm++": lambda: SongUNet(SongArchitecture(**SIZE, channel_mult=(1, 2), attn_resolutions=(4,))),
    "ncsn++": lambda: SongUNet(
        SongArchitecture(
            **SIZE,
            channel_mult=(2, 1),
            embedding_type="fourier",
            encoder_type="residual",
            decoder_type="skip",
            resample_filter=(1, 3, 3, 1),
        )
    ),
    "dhariwal": lambda: DhariwalUNet(
        DhariwalArchitecture(**SIZE, channel_mult=(1, 2), attn_resolutions=(4,))
    ),
}
TIME = torch.tensor([0.7])


def filled(name, formula):
    network = NETWORKS[name]().requires_grad_(False).eval()
    network.load_state_dict(formula.weights(network))
    return network


def noise():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_traced_as_one_graph_and_equals_float64(name, formula):
    network = filled(name, formula)
    exact = copy.deepcopy(network).double()(noise().double(), TIME.double())
    with warnings.catch_warnings(action="error", category=UserWarning):
        fast = Compiled(network, backend="eager", fullgraph=True)(noise(), TIME).double()
    assert (fast - exact).abs().max() <= 2e-5 * exact.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_casting_weights_once_changes_no_bit_of_what_autocast_gives(name, formula):
    network = filled(name, formula)
    with torch.autocast("cpu", torch.bfloat16):
        before = network(noise(), TIME)
        cast_weights(network, torch.bfloat16)
        after = network(noise(), TIME)
    assert torch.equal(before, after)
    casts = {layer.weight.dtype for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    norms = {layer.weight.dtype for layer in network.modules() if isinstance(layer, nn.GroupNorm)}
    assert casts == {torch.bfloat16}
    assert norms == {torch.float32}


def test_half_weights_leave_the_preconditioning_in_float32(formula):
    network = filled("ddpm++", formula)
    model = EdmModel(network, Edm(0.5), (3, 8, 8), None, (0.002, 80.0), "")
    x = 80 * noise().double()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x, 80.0, None).eps
        cast_weights(network, torch.bfloat16)
        after = model(x, 80.0, None).eps
    assert torch.equal(before, after)
    assert (after - x / 80).abs().max() < 0.1  # what is left is the network's share of the image


def test_where_compilation_fails_the_network_runs_as_it_is_and_says_so_once():
    def failing(graph, inputs):
        raise RuntimeError("no kernel for this")

    network = nn.Linear(3, 3)
    fast = Compiled(network, backend=failing)
    x = torch.randn(2, 3)
    with pytest.warns(UserWarning, match="torch.compile failed for Linear.*slower") as caught:
        assert torch.equal(fast(x), network(x))
    assert sum(issubclass(w.category, UserWarning) for w in caught) == 1
    with warnings.catch_warnings(action="error"):
        assert torch.equal(fast(x), network(x))


def test_an_error_of_the_network_itself_is_raised():
    fast = Compiled(nn.Linear(3, 3), backend="eager")
    with pytest.warns(UserWarning, match="failed"), pytest.raises(RuntimeError, match="shapes"):
        fast(torch.randn(2, 4))


def test_a_model_on_a_processor_stays_as_it_is():
    model = load_model("digits", None, {})
    network = model.network
    make_fast(model, torch.device("cpu"), torch.float32)
    assert model.network is network


@pytest.mark.parametrize(
    ("precision", "convolutions"),
    [(torch.float16, "tf32"), (torch.bfloat16, "tf32"), (torch.float32, None)],
)
def test_a_decoder_rounds_its_convolutions_only_where_the_network_is_rounded(
    folders, precision, convolutions
):
    path = folders.pipeline(unet=folders.unet(), vqvae=folders.vq())
    model = load_model("diffusers", path.name, {}, path.parent)
    make_fast(model, torch.device("cuda"), precision)
    assert model.decoder.convolutions == convolutions
